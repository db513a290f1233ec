"""The hidden folder in which shards are made: a killed run can be resumed, and a split is published as a whole.

OUT/.making/lock          held while a process works
OUT/.making/plan.json     settings and sources; written once everything is listed
OUT/.making/listing/      the files to read, and their order (file_index.py)
OUT/.making/reports-*/    a report per finished shard
OUT/.making/train/, val/  the shards; become OUT/train, OUT/val when all are finished
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from beit_pretrain import fileio
from beit_pretrain.errors import UserError

WORK = ".making"
KEPT = "what is finished is kept; rerun the same command to resume"


@contextmanager
def work_folder(out: Path) -> Iterator[Path]:
    """Lend `out/.making`, locked. If the block fails, its content stays once there is a plan.

    Raises UserError if another process works there, or it cannot be written.
    """
    work = out / WORK
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        work.mkdir(parents=True, exist_ok=True)
        refusal = f"another process is making shards in {out}; wait for it, or choose another out="
        with fileio.exclusive_lock(work / "lock", refusal):
            try:
                yield work
            finally:
                if not (work / "plan.json").exists():
                    shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        kept = f"; {KEPT}" if (work / "plan.json").exists() else ""
        raise UserError(f"cannot write shards to {out}: {error.strerror or error}{kept}") from None
    finally:
        for folder in made:
            with suppress(OSError):  # not empty: finished, or to be resumed
                folder.rmdir()


def read_plan(work: Path) -> dict[str, Any] | None:
    """The plan of a half-done run; None if there is none (then everything else is removed)."""
    try:
        plan: dict[str, Any] = json.loads((work / "plan.json").read_bytes())
        return plan
    except (OSError, ValueError):
        for path in work.iterdir():
            if path.name != "lock":
                fileio.discard(path)
        return None


def check_same(work: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise UserError for the first setting that differs between the half-done run and this one."""
    if differs := difference(before, now):
        advice = "give the same settings to resume it, or delete that folder to start again"
        raise UserError(f"{work} holds a half-done run with {differs}; {advice}")


def difference(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """`key=old, not new` of the first key, by name, whose values differ."""
    for key in sorted(before.keys() | now.keys()):
        if (old := before.get(key)) != (new := now.get(key)):
            return f"{key}={show(old)}, not {show(new)}"
    return None


def show(value: Any) -> str:
    """A value as the command line takes it."""
    if isinstance(value, list | tuple):
        return f"[{','.join(map(show, value))}]"
    return "null" if value is None else str(value)


def publish(work: Path, name: str, out: Path) -> None:
    """Make a finished split, with its manifest, visible under its name."""
    for path in (work / name).glob(f"*{fileio.PARTIAL}"):
        path.unlink(missing_ok=True)
    with suppress(FileNotFoundError):
        (out / name).rmdir()  # an empty one
    os.rename(work / name, out / name)


def close(work: Path) -> None:
    """Remove the work folder: the plan last, so that a run with a plan can always be resumed."""
    for path in work.iterdir():
        if path.name not in ("plan.json", "lock"):
            fileio.discard(path)
    (work / "plan.json").unlink()
    shutil.rmtree(work)
