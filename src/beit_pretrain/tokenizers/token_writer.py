"""The hidden staging folder where any number of processes make tokens; an unfinished set is resumed.

.tokens.making/plan.json   images, tokenizer and settings; the first process writes it, all others must agree
.tokens.making/tokens/     the files of finished shards; renamed to `tokens` when all are there, with tokens.json
.tokens.making/lock-*      held while a process works on a part
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from beit_pretrain import fileio
from beit_pretrain.data.reader import ShardReader
from beit_pretrain.data.write.staging import check_same, publish, show
from beit_pretrain.errors import UserError, first_line
from beit_pretrain.settings import renamed
from beit_pretrain.tokenizers.token_cache import TOKENS, TokenFolder, open_records, tokens_name


@contextmanager
def work_folder(out: Path, part: tuple[int, int]) -> Iterator[Path]:
    """Open the staging folder beside `out`, locked for this part; its content is kept if the block fails.

    Raises UserError if another process works on the same part, or the folder cannot be written.
    """
    work = out.parent / f".{out.name}.making"
    try:
        (work / out.name).mkdir(parents=True, exist_ok=True)
        lock, refusal = f"lock-{part[0]}-of-{part[1]}", f"another process is making this part of {out}; wait for it"
        with fileio.exclusive_lock(work / lock, refusal):
            yield work
    except OSError as error:
        raise UserError(
            f"cannot write tokens to {out}: {error.strerror or error}; finished shards are kept; rerun the same "
            "command to resume"
        ) from None
    finally:
        if not (work / "plan.json").exists():  # nothing was started, or everything is finished
            for left in work.glob("lock-*"):
                left.unlink(missing_ok=True)
            for folder in (work / out.name, work):
                with suppress(OSError):
                    folder.rmdir()


def begin(work: Path, plan: dict[str, Any]) -> None:
    """Write the plan if there is none yet. Raises UserError if the unfinished set has another plan."""
    file = work / "plan.json"
    with fileio.exclusive_lock(work / "lock-plan", wait=True):
        if not file.exists():
            fileio.atomic_write(file, json.dumps(plan), durable=True)
    try:
        before = json.loads(file.read_bytes())
    except ValueError as error:
        raise UserError(f"{file} is damaged ({first_line(error)}); delete {work} to start anew") from None
    check_same(work, _flat(before), _flat(plan))


def _flat(plan: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten a plan to the names of the settings on the command line, where they have one."""
    flat: dict[str, Any] = {}
    for key, value in plan.items():
        if isinstance(value, dict):
            flat |= _flat(value, "" if key == "view" else f"{key}.")
        elif key != "shards":
            flat[f"{prefix}{key}"] = value
    return flat


def is_finished(out: Path, plan: dict[str, Any]) -> bool:
    """Whether `out` holds the finished tokens. Raises UserError if it holds anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    advice = "choose another out=, or delete it first"
    if not (out / TOKENS).is_file():
        raise UserError(f"{out} exists and is not empty; {advice}")
    TokenFolder(out)
    recorded = json.loads((out / TOKENS).read_bytes())
    before, now = _flat({**recorded, "view": renamed(recorded["view"])}), _flat(plan)
    for key in now:
        if before.get(key) != now[key]:
            raise UserError(f"{out} holds tokens with {key}={show(before.get(key))}, not {show(now[key])}; {advice}")
    return True


def save(path: Path, records: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, records, allow_pickle=False)
    fileio.atomic_write(path, buffer.getvalue(), durable=True, unique=True)


def is_whole(path: Path, shape: tuple[int, int], patches: int) -> bool:
    """Whether a file of an unfinished set is complete and has this shape."""
    try:
        records = open_records(path, shape, patches)
    except UserError:
        return False
    return path.stat().st_size == records.offset + records.nbytes


def finish(work: Path, out: Path, plan: dict[str, Any], reader: ShardReader) -> bool:
    """Write the manifest of a complete set and publish it. Returns False if shards are missing."""
    folder, patches = work / out.name, math.prod(plan["grid"])
    files = [folder / tokens_name(shard.name) for shard in reader.shards]
    missing = [file for file, size in zip(files, reader.sizes) if not is_whole(file, (size, plan["views"]), patches)]
    if missing:
        print(
            f"this part is done; {len(missing):,} of {len(files):,} shards are left to other parts, or to the same "
            "command without part="
        )
        return False
    with fileio.exclusive_lock(work / "lock-finish", wait=True):
        if is_finished(out, plan):
            return True
        undecodable = 0
        entries = []
        for file, size in zip(files, reader.sizes):
            data = file.read_bytes()
            records = np.load(io.BytesIO(data), allow_pickle=False)
            undecodable += int((records["crop"][:, 0, 2] == 0).sum())
            digest = hashlib.sha256(data).hexdigest()
            entries.append({"name": file.name, "samples": size, "bytes": len(data), "sha256": digest})
        about = {**plan, "undecodable": undecodable, "shards": entries}
        fileio.atomic_write(folder / TOKENS, json.dumps(about, indent=1) + "\n", durable=True)
        publish(work, out.name, out.parent)
        shutil.rmtree(work, ignore_errors=True)
    return True


def summary(out: Path) -> str:
    """One line that describes a finished token folder."""
    about = json.loads((out / TOKENS).read_bytes())
    size = sum(entry["bytes"] for entry in about["shards"])
    bad = f", {about['undecodable']:,} images without" if about["undecodable"] else ""
    return (
        f"{about['images']['samples']:,} images x {about['views']} views x {about['grid'][0]} x {about['grid'][1]} "
        f"tokens of {about['tokenizer']['vocab_size']:,}, {size / 1e6:,.1f} MB{bad}"
    )
