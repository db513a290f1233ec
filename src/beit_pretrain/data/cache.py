"""Shards of other machines on this one's disk: a folder of bounded size that all processes of a node share.

A shard is fetched whole and named by its SHA-256, so that neither its name nor its origin can lead out of the folder,
data sets share what is equal, and a changed shard is another one:

    <sha256>.tar         a shard that has been checked, renamed to this name when it was complete
    <sha256>.index.npy   its index, made from it
    <sha256>.partial     a shard on its way; whoever fetches it holds a lock on it, others wait for that
    .lock                held while room is made and while a shard gets its name

Whatever else lies in the folder belongs to somebody: it is neither counted nor touched.

Room is reserved before a byte is fetched: the partial file gets its final size at once. What was not used for longest
makes room; a file that is being read survives that, since an open file outlives its name. Use is the file's mtime,
which readers and prefetchers renew (`ahead.py`).
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from beit_pretrain import fileio
from beit_pretrain.data.manifest import INDEX_DTYPE, index_shard
from beit_pretrain.errors import UserError

RECENT = 60.0  # seconds since its last use in which a shard does not make room for one that is fetched ahead
TOUCH = 1.0  # seconds between two notes of a shard's use by one process
WAIT = 0.1  # seconds between two looks for room
INDEX_HEADER = 256  # bytes of an index file before its rows
OURS = re.compile(r"[0-9a-f]{64}\.(tar|index\.npy|partial)")  # files of the cache, by name


class Shard(NamedTuple):
    """What the manifest says of a shard."""

    name: str
    samples: int
    bytes: int
    sha256: str


class ShardCache:
    """The folder.

    Args:
        folder: on a disk of this machine.
        limit: bytes that the cache's files in it may have together.
    """

    def __init__(self, folder: str | Path, limit: int):
        self.folder, self.limit = Path(folder).expanduser(), limit
        self._touched: dict[str, float] = {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / ".lock").touch()
        except OSError as error:
            raise UserError(f"data.cache_dir={self.folder} cannot be written: {error.strerror}") from None

    def open(self, shard: Shard, fetch: Callable[[BinaryIO], None]) -> int:
        """A file descriptor of the shard, fetched first if it is not here. Raises UserError if it cannot be had.

        `fetch` writes the shard, from its beginning, into the file it is given; an OSError that it raises is taken for
        one of this folder's disk.
        """
        try:
            while True:
                if (descriptor := self._opened(shard)) is not None:
                    return descriptor
                if (descriptor := self._fetched(shard, fetch, urgent=True)) is not None:
                    return descriptor
        except OSError as error:
            raise UserError(f"data.cache_dir={self.folder} with {shard.name}: {error.strerror or error}") from None

    def fetch_ahead(self, shard: Shard, fetch: Callable[[BinaryIO], None]) -> None:
        """Renew a shard that is here; fetch it if it is not, nobody else does, and there is room for it."""
        descriptor = self._opened(shard)
        if descriptor is None:
            descriptor = self._fetched(shard, fetch, urgent=False)
        if descriptor is not None:
            os.close(descriptor)

    def index(self, shard: Shard, descriptor: int) -> np.ndarray:
        """INDEX_DTYPE rows of a shard that is open."""
        with suppress(OSError, ValueError, EOFError):
            rows = np.load(self._path(shard, "index.npy"), allow_pickle=False)
            if rows.dtype == INDEX_DTYPE and len(rows) == shard.samples:
                return rows
        return index_shard(f"/dev/fd/{descriptor}")  # it has just made room for another one

    def _path(self, shard: Shard, kind: str) -> Path:
        return self.folder / f"{shard.sha256}.{kind}"

    def _opened(self, shard: Shard) -> int | None:
        path = self._path(shard, "tar")
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        if os.fstat(descriptor).st_size != shard.bytes:  # somebody else has been at it
            os.close(descriptor)
            path.unlink(missing_ok=True)
            return None
        now = time.monotonic()
        if now - self._touched.get(shard.sha256, -TOUCH) >= TOUCH:
            self._touched[shard.sha256] = now
            with suppress(OSError):
                os.utime(path)
        return descriptor

    def _fetched(self, shard: Shard, fetch: Callable[[BinaryIO], None], urgent: bool) -> int | None:
        """Fetch the shard. None if it may be here by now (another process had it), or if it is not urgent and waits."""
        partial = self._path(shard, "partial")
        try:
            with fileio.exclusive_lock(partial, wait=urgent, remove=True, strict=True), partial.open("r+b") as file:
                return None if self._path(shard, "tar").exists() else self._filled(file, shard, fetch, urgent)
        except fileio.LockedError:
            return None

    def _filled(self, file: BinaryIO, shard: Shard, fetch: Callable[[BinaryIO], None], urgent: bool) -> int | None:
        """Fetch the shard into its partial file, which this process holds, and give that its name."""
        size = shard.bytes + INDEX_HEADER + INDEX_DTYPE.itemsize * shard.samples
        if size > self.limit:
            raise UserError(f"{shard.name} has {shard.bytes:,} bytes, more than data.cache_gb leaves room for")
        while not self._reserved(file, size, urgent):
            if not urgent:
                return None
            time.sleep(WAIT)  # others' shards are on their way, in room of their own
        fetch(file)
        file.flush()
        index = index_shard(file.name)
        fileio.flush(file)
        with self._locked():  # nobody may take the index's room before it is there
            os.ftruncate(file.fileno(), shard.bytes)
            np.save(self._path(shard, "index.npy"), index)
            os.rename(file.name, self._path(shard, "tar"))
        return os.dup(file.fileno())

    def _locked(self) -> AbstractContextManager:
        return fileio.exclusive_lock(self.folder / ".lock", wait=True, strict=True)

    def _reserved(self, file: BinaryIO, size: int, urgent: bool) -> bool:
        """Make room for `size` bytes and give them to the file; False if there is none to be had now."""
        with self._locked():
            shards, total = self._contents(Path(file.name))
            now, victims = time.time(), []
            for used, path, occupied in sorted(shards):
                if total + size <= self.limit or (not urgent and now - used < RECENT):
                    break
                victims.append(path)
                total -= occupied
            if total + size > self.limit:
                return False
            for path in victims:
                path.unlink(missing_ok=True)
                path.with_suffix(".index.npy").unlink(missing_ok=True)
            os.ftruncate(file.fileno(), size)
            return True

    def _contents(self, mine: Path) -> tuple[list[tuple[float, Path, int]], int]:
        """Last use, path and bytes (with its index) of every shard, and all bytes but `mine`'s; clears what is dead.

        Files of other names are not looked at.
        """
        sizes, used = {}, {}
        for entry in (entry for entry in os.scandir(self.folder) if OURS.fullmatch(entry.name)):
            with suppress(FileNotFoundError):
                sizes[entry.name], used[entry.name] = entry.stat().st_size, entry.stat().st_mtime
        for name in list(sizes):
            path = self.folder / name
            if path == mine:
                del sizes[name]
            elif name.endswith(".partial"):
                with suppress(fileio.LockedError), fileio.exclusive_lock(path, remove=True):  # who held it has died
                    del sizes[name]
            elif name.endswith(".index.npy") and name.replace(".index.npy", ".tar") not in sizes:
                path.unlink(missing_ok=True)
                del sizes[name]
        shards = [
            (used[name], self.folder / name, size + sizes.get(name[:-3] + "index.npy", 0))
            for name, size in sizes.items()
            if name.endswith(".tar")
        ]
        return shards, sum(sizes.values())


def check_content(file: BinaryIO, shard: Shard) -> None:
    """Raise OSError if the first bytes of a file are not the shard that the manifest describes."""
    digest, left = hashlib.sha256(), shard.bytes
    file.flush()
    file.seek(0)
    while left and (block := file.read(min(left, 1 << 20))):
        digest.update(block)
        left -= len(block)
    if digest.hexdigest() != shard.sha256:
        raise OSError("its content is not what its manifest says (another SHA-256)")
