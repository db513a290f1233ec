"""The hidden folder beside `out` where vectors are computed: a killed `embed` goes on there.

.vectors.npy.making/lock           held while a process works
.vectors.npy.making/plan.json      what the vectors depend on; another command does not continue them
.vectors.npy.making/rows           the growing file (vector_formats.py)
.vectors.npy.making/names.jsonl    the name, and the class if there is one, of every row
.vectors.npy.making/bad.jsonl      unreadable images, with reasons
.vectors.npy.making/progress.json  how far the three files count: what is behind that is cut off

At the end `out` appears at once, after the files beside it: `out.names.jsonl` (not for all formats), `out.about.json`.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from beit_pretrain import fileio
from beit_pretrain.data.notes import read_note
from beit_pretrain.data.write.staging import difference
from beit_pretrain.errors import UserError
from beit_pretrain.inference.image_stream import Item
from beit_pretrain.inference.vector_formats import ABOUT, NAMES, VectorFormat, beside

SAVE_EVERY = 2.0  # seconds: what a kill can cost
ROWS, OF_ROWS, BAD = "rows", "names.jsonl", "bad.jsonl"


class GrowingVectors:
    """Vectors in the making. Continues what lies in `work`.

    Attributes: `images`, rows so far; `bad`, (name, reason) of images without a row; together they say how far the
    source has been read.
    """

    def __init__(self, work: Path, form: VectorFormat):
        self.work, self.form = work, form
        said = read_note(work / "progress.json")
        if said is None or any(_size(work / name) < size for name, size in said["bytes"].items()):
            said = {"images": 0, "bytes": {ROWS: 0, OF_ROWS: 0, BAD: 0}}
        self.images: int = said["images"]
        self.files: dict[str, BinaryIO] = {}
        for name, size in said["bytes"].items():
            self.files[name] = file = open(work / name, "ab")  # noqa: SIM115
            file.truncate(size)
            file.seek(size)  # for `tell`
        if not said["bytes"][ROWS]:
            self.files[ROWS].write(form.head)
        with (work / BAD).open("rb") as listed:
            self.bad = [(entry["file"], entry["reason"]) for entry in map(json.loads, listed)]
        self._listed, self._saved = len(self.bad), time.monotonic()

    @property
    def start(self) -> int:
        """The first image that is missing."""
        return self.images + len(self.bad)

    def append(self, items: Sequence[Item], rows: np.ndarray, labels: Sequence[str | None] | None) -> None:
        """Add the vectors (n, *shape) of images. `labels`: of all images of the source, if it has any."""
        names = [{"file": item.name, "label": labels[item.number]} if labels else {"file": item.name} for item in items]
        self.files[ROWS].write(self.form.encode([item.name for item in items], rows))
        self.files[OF_ROWS].write("".join(json.dumps(name) + "\n" for name in names).encode())
        self.images += len(items)
        if time.monotonic() - self._saved >= SAVE_EVERY:
            self.save()

    def save(self) -> None:
        """Make sure that all of this survives."""
        lines = (json.dumps({"file": name, "reason": why}) + "\n" for name, why in self.bad[self._listed :])
        self.files[BAD].write("".join(lines).encode())
        for file in self.files.values():
            fileio.flush(file)
        said = {"images": self.images, "bytes": {name: file.tell() for name, file in self.files.items()}}
        fileio.atomic_write(self.work / "progress.json", json.dumps(said), durable=True)
        self._listed, self._saved = len(self.bad), time.monotonic()

    def close(self) -> None:
        for file in self.files.values():
            file.close()

    def publish(self, out: Path, about: dict[str, Any]) -> None:
        """Make the finished file and those beside it; an earlier `out` is replaced."""
        self.save()
        finished = self.form.seal(self.work / ROWS, self.work / OF_ROWS, self.images)
        out.unlink(missing_ok=True)  # it never lies beside the names of others
        beside(out, NAMES).unlink(missing_ok=True)
        if self.form.names_beside:
            fileio.link(self.work / OF_ROWS, beside(out, NAMES))
        ends = {"": finished} | ({NAMES: self.work / OF_ROWS} if self.form.names_beside else {})
        about = {**about, "bytes": {end: _size(path) for end, path in ends.items()}}
        fileio.atomic_write(beside(out, ABOUT), json.dumps(about, indent=1) + "\n")
        fileio.publish(finished, out)


@contextmanager
def growing(out: Path, form: VectorFormat, plan: dict[str, Any], resume: str) -> Iterator[GrowingVectors | None]:
    """Lend the vectors in the making, new or as far as they are; None if `out` is finished. They stay if it fails.

    `plan`: what the vectors depend on, flat. `resume`: "never" discards what there is.
    Raises UserError if another process works there, if `out` or the work is of another command, and if they cannot be
    written.
    """
    work = out.with_name(f".{out.name}.making")
    try:
        work.mkdir(parents=True, exist_ok=True)
        refusal = f"another process is computing {out}; wait for it, or choose another out="
        with fileio.exclusive_lock(work / "lock", refusal):
            try:
                if resume == "never":
                    _clear(work)
                elif _is_finished(out, plan, stopped := _plan_of(work) == plan):
                    if stopped:  # between publishing and clearing; the unfinished work of another command stays
                        _clear(work)
                    yield None
                    return
                _check_plan(work, plan)
                vectors = GrowingVectors(work, form)
                try:
                    yield vectors
                finally:
                    vectors.close()
                _clear(work)
            finally:
                if not _size(work / "progress.json"):  # finished, or nothing was started
                    shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        kept = ""
        if _size(work / "progress.json"):
            same = f"the same command{' without resume=never' if resume == 'never' else ''}"
            kept = f"; what is finished is kept; rerun {same} to resume"
        raise UserError(f"embedding into {out} failed: {error.strerror or error}{kept}") from None


def _clear(work: Path) -> None:
    for path in work.iterdir():
        if path.name != "lock":
            fileio.discard(path)


def _plan_of(work: Path) -> dict[str, Any] | None:
    """The plan of unfinished work; without progress it is of no use."""
    return read_note(work / "plan.json") if _size(work / "progress.json") else None


def _check_plan(work: Path, plan: dict[str, Any]) -> None:
    """Note the plan. Raises UserError if the work in the folder is of another one."""
    if (before := _plan_of(work)) is None:
        _clear(work)
        fileio.atomic_write(work / "plan.json", json.dumps(plan), durable=True)
    elif differs := difference(before, plan):
        raise UserError(
            f"{work} holds unfinished vectors with {differs}; give the same settings to resume them, or resume=never "
            "to start anew"
        )


def _is_finished(out: Path, plan: dict[str, Any], replaces: bool) -> bool:
    """Whether `out` is what this command writes.

    Raises UserError if it is something else, or not whole; not if this command was begun to replace it (resume=never).
    """
    if not out.exists():
        return False
    try:
        return _is_whole(out, plan)
    except UserError:
        if not replaces:
            raise
    return False


def _is_whole(out: Path, plan: dict[str, Any]) -> bool:
    advice = "choose another out=, or resume=never to replace it"
    if out.is_dir() or (about := read_note(beside(out, ABOUT))) is None:
        raise UserError(f"{out} exists and is not known to be of this command; {advice}")
    if differs := difference({key: about.get(key) for key in plan}, plan):
        raise UserError(f"{out} holds vectors with {differs}; {advice}")
    said = about.get("bytes")
    for end, size in (said if isinstance(said, dict) else {"": None}).items():
        if not (file := beside(out, end)).exists():
            raise UserError(f"{file} is missing; resume=never computes {out} again")
        if _size(file) != size:
            raise UserError(f"{file} has {_size(file):,} bytes, not those written; resume=never computes {out} again")
    return True


def _size(path: Path) -> int:
    with suppress(OSError):
        return os.stat(path).st_size
    return 0
