"""Local LRU cache of remote shards: a folder of bounded size that all processes of a machine share.

Shards are downloaded whole and named by their SHA-256. So no name can lead out of the folder, data sets share equal
shards, and a changed shard is a new file:

    <sha256>.tar         a complete, checked shard; renamed to this name when finished
    <sha256>.index.npy   its index
    <sha256>.partial     a shard being downloaded; the downloading process locks it, others wait
    .lock                held while files are evicted and while a shard is renamed; says how many bytes all files
                         have together at most, so that not every reservation looks at every file

A shard that is made from another file (`exact` is False, table_folder.py) is named by a digest of what it is made from,
and its size is an estimate until then. Other files in the folder are not counted and never touched.

Space is reserved before a download: the partial file gets its final size at once, or the estimate, which is corrected
when the shard is complete. The least recently used shards are evicted; a reader that has one open can read on, since an
open file outlives its name. The time of last use is the file's mtime, which readers and prefetchers update
(`prefetch.py`).
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from io import FileIO
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from beit_pretrain import fileio
from beit_pretrain.data.shard_index import INDEX_DTYPE, index_shard
from beit_pretrain.errors import UserError

RECENT = 60.0  # seconds since its last use in which a shard is not evicted for a prefetched one
TOUCH = 1.0  # seconds between two updates of a shard's mtime by one process
WAIT = 0.1  # seconds between two checks for free space
INDEX_HEADER = 256  # bytes of an index file before its rows
OURS = re.compile(r"[0-9a-f]{64}\.(tar|index\.npy|partial)")  # names of the cache's files


class Shard(NamedTuple):
    """A shard's entry in the manifest, or a file from which a shard is made."""

    name: str
    samples: int  # -1: not known yet
    bytes: int
    sha256: str
    stored: str = ""  # its name in the cache, 64 hexadecimal digits, if not `sha256`
    exact: bool = True  # False: `bytes` is an estimate
    spare: int = 0  # bytes of disk that making it needs for a while


def name_and_size(name: str, samples: int, size: int) -> str:
    """Stands in for the SHA-256 of a shard that nobody has read: what a resumed run compares, wherever it lies."""
    return hashlib.sha256(f"{name} {samples} {size}".encode(errors="surrogateescape")).hexdigest()


class ShardCache:
    """The cache in `folder`, on a local disk; its files have at most `limit` bytes together."""

    def __init__(self, folder: str | Path, limit: int):
        self.folder, self.limit = fileio.expand_home(folder), limit
        self._touched: dict[str, float] = {}
        self._looked = False  # whether this process has looked at every file
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / ".lock").touch()
        except OSError as error:
            raise UserError(f"data.cache_dir={self.folder} cannot be written: {error.strerror}") from None

    def open(self, shard: Shard, fetch: Callable[[BinaryIO], None]) -> int:
        """A file descriptor of the shard, downloaded first if missing. Raises UserError if that fails.

        `fetch` writes the whole shard into the file that it gets, and leaves its position at the end; an OSError that
        it raises is reported as an error of the local disk.
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
        """Mark a cached shard as used; download a missing one if no other process does and there is space."""
        descriptor = self._opened(shard)
        if descriptor is None:
            descriptor = self._fetched(shard, fetch, urgent=False)
        if descriptor is not None:
            os.close(descriptor)

    def index(self, shard: Shard, descriptor: int, image_key: Sequence[str] = ()) -> np.ndarray:
        """INDEX_DTYPE rows of an open shard. `image_key`: as of `shard_index`; such indices are not cached."""
        if image_key:
            return index_shard(f"/dev/fd/{descriptor}", image_key)
        with suppress(OSError, ValueError, EOFError):
            rows = np.load(self._path(shard, "index.npy"), allow_pickle=False)
            if rows.dtype == INDEX_DTYPE and (len(rows) == shard.samples or shard.samples < 0):
                return rows
        return index_shard(f"/dev/fd/{descriptor}")  # the shard has just been evicted

    def _path(self, shard: Shard, kind: str) -> Path:
        return self.folder / f"{shard.stored or shard.sha256}.{kind}"

    def _opened(self, shard: Shard) -> int | None:
        path = self._path(shard, "tar")
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        if shard.exact and os.fstat(descriptor).st_size != shard.bytes:  # another program has changed it
            os.close(descriptor)
            path.unlink(missing_ok=True)
            return None
        now = time.monotonic()
        if now - self._touched.get(path.name, -TOUCH) >= TOUCH:
            self._touched[path.name] = now
            with suppress(OSError):
                os.utime(path)
        return descriptor

    def _fetched(self, shard: Shard, fetch: Callable[[BinaryIO], None], urgent: bool) -> int | None:
        """Download the shard. None if another process has, or if it is not urgent and would have to wait."""
        partial = self._path(shard, "partial")
        try:
            with fileio.exclusive_lock(partial, wait=urgent, remove=True, strict=True), partial.open("r+b") as file:
                return None if self._path(shard, "tar").exists() else self._filled(file, shard, fetch, urgent)
        except fileio.LockedError:
            return None

    def _filled(self, file: BinaryIO, shard: Shard, fetch: Callable[[BinaryIO], None], urgent: bool) -> int | None:
        """Download the shard into its partial file, which this process has locked, and rename it."""
        most = shard.samples if shard.samples >= 0 else shard.bytes // 1024  # a member has at least two blocks
        about_index = INDEX_HEADER + INDEX_DTYPE.itemsize * most
        self._check_fits(shard.name, shard.bytes + shard.spare, about_index)
        while not self._reserved(file, shard.bytes + shard.spare + about_index, urgent):
            if not urgent:
                return None
            time.sleep(WAIT)  # other processes' downloads hold reserved space
        fetch(file)
        file.flush()
        final = shard.bytes if shard.exact else file.tell()
        if final > shard.bytes + shard.spare:
            self._check_fits(shard.name, final, about_index)
            # Two processes could wait for each other here: what cannot be freed now, the next reservation frees.
            self._reserved(file, final + about_index, urgent=True)
        os.ftruncate(file.fileno(), final + about_index)
        index = index_shard(file.name)
        if not shard.exact and shard.samples >= 0 and len(index) != shard.samples:
            raise UserError(f"{shard.name} has {len(index):,} images and not {shard.samples:,}; it has changed")
        fileio.flush(file)
        with self._locked():  # no process may take the index's reserved space before it is written
            os.ftruncate(file.fileno(), final)
            np.save(self._path(shard, "index.npy"), index)
            os.rename(file.name, self._path(shard, "tar"))
        return os.dup(file.fileno())

    def _check_fits(self, name: str, size: int, index: int) -> None:
        if size + index > self.limit:
            raise UserError(f"{name} has {size:,} bytes, more than data.cache_gb leaves room for")

    def _locked(self) -> AbstractContextManager[FileIO]:
        return fileio.exclusive_lock(self.folder / ".lock", wait=True, strict=True)

    def _reserved(self, file: BinaryIO, size: int, urgent: bool) -> bool:
        """Evict shards until `size` bytes are free, and reserve them for the file. False if that is impossible now."""
        with self._locked() as lock:
            most = _noted(lock) if self._looked else None
            if most is not None and most + size <= self.limit:
                _note(lock, most + size)
                os.ftruncate(file.fileno(), size)
                return True
            self._looked = True
            shards, total = self._contents(os.path.basename(file.name))
            now, victims = time.time(), []
            for used, name, occupied in sorted(shards):
                if total + size <= self.limit or (not urgent and now - used < RECENT):
                    break
                victims.append(name)
                total -= occupied
            if total + size > self.limit:
                _note(lock, None)  # a file that is larger than estimated grows nevertheless
                return False
            for name in victims:
                (self.folder / name).unlink(missing_ok=True)
                (self.folder / _index_of(name)).unlink(missing_ok=True)
            _note(lock, total + size)
            os.ftruncate(file.fileno(), size)
            return True

    def _contents(self, mine: str) -> tuple[list[tuple[float, str, int]], int]:
        """Last use, name and bytes (with its index) of every shard, and the total bytes without the file `mine`.

        Deletes partial files of dead processes and indices without a shard. Other files are ignored.
        """
        sizes, used = {}, {}
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if entry.name != mine and OURS.fullmatch(entry.name):
                    with suppress(FileNotFoundError):
                        found = entry.stat()
                        sizes[entry.name], used[entry.name] = found.st_size, found.st_mtime
        for name in [name for name in sizes if not name.endswith(".tar")]:
            if name.endswith(".partial"):
                lock = fileio.exclusive_lock(self.folder / name, remove=True)
                with suppress(fileio.LockedError), lock:  # its process has died
                    del sizes[name]
            elif name.replace(".index.npy", ".tar") not in sizes:
                (self.folder / name).unlink(missing_ok=True)
                del sizes[name]
        shards = [
            (used[name], name, size + sizes.get(_index_of(name), 0))
            for name, size in sizes.items()
            if name.endswith(".tar")
        ]
        return shards, sum(sizes.values())


def _index_of(tar: str) -> str:
    return tar.removesuffix("tar") + "index.npy"


def _noted(lock: FileIO) -> int | None:
    """The most bytes that all files of the cache have, as its lock file says; None = not known."""
    lock.seek(0)
    with suppress(ValueError):
        return int(lock.read(20))
    return None


def _note(lock: FileIO, most: int | None) -> None:
    lock.seek(0)
    lock.write(f"{'' if most is None else most:20}".encode())


def check_content(file: BinaryIO, shard: Shard) -> None:
    """Raise OSError if the first `shard.bytes` bytes of a file do not have the shard's SHA-256."""
    digest, left = hashlib.sha256(), shard.bytes
    file.flush()
    file.seek(0)
    while left and (block := file.read(min(left, 1 << 20))):
        digest.update(block)
        left -= len(block)
    if digest.hexdigest() != shard.sha256:
        raise OSError("its content is not what its manifest says (another SHA-256)")
