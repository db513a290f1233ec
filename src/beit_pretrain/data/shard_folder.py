"""What a reader reads: folders of shards, and the samples of each shard by row.

A shard is a file, such as a tar, with an index of its images; or a part of a list of files (`listed_folder.py`).
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from beit_pretrain.data.cache import Shard, ShardCache, check_content
from beit_pretrain.data.left_out import EXPECTED, summary
from beit_pretrain.data.manifest import MANIFEST, image_key_of, index_path, parse_manifest, read_manifest
from beit_pretrain.data.order import MethodCache
from beit_pretrain.data.settings import RemoteOptions
from beit_pretrain.data.shard_index import INDEX_DTYPE, key_of
from beit_pretrain.data.storage import Remote, check_json
from beit_pretrain.data.tars import LONGEST_HEADERS, member_name
from beit_pretrain.errors import UserError
from beit_pretrain.fileio import expand_home, size

MANIFEST_LIMIT = 1 << 30  # bytes of a remote manifest


def cache_folder(access: RemoteOptions) -> Path:
    """The folder of the cache: data.cache_dir, or the user's own."""
    usual = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "beit_pretrain", "shards")
    return expand_home(access.cache_dir or usual)


class ShardFolder(ABC):
    """Numbered shards with numbered samples.

    `about`: `classes`, `class_counts`, `segmentation`, `segmentation_classes` and `settings`, as in a manifest
    (manifest.py). `str()`: its path or location, for messages.
    """

    about: dict[str, Any]
    shards: list[Shard]
    remote = False  # whether shards are fetched before they are read
    in_place = False  # whether images are read as users have them, which `shards make` could shrink
    made_of = "shards"
    index_at = ""  # where the index lies, for the user
    note = ""  # something else to tell the user

    @abstractmethod
    def index(self, number: int) -> np.ndarray:
        """INDEX_DTYPE rows of a shard. Raises UserError if it cannot be read."""

    @abstractmethod
    def read(self, number: int, row: int, offset: int, size: int) -> bytes:
        """`size` bytes of a shard from `offset`, of its sample `row`; fewer if the file has become shorter.

        Raises UserError if the shard cannot be read, OSError if only this sample cannot.
        """

    @abstractmethod
    def key(self, number: int, row: int, offset: int) -> str:
        """The key of the sample whose image is at `offset`."""

    def label_map(self, number: int, row: int, offset: int, size: int) -> bytes:
        return self.read(number, row, offset, size)

    @property
    def total_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.bytes for shard in self.shards)

    def description(self) -> str:
        """What was found, in one line: images, shards, classes, bytes, where the index lies, what was left out."""
        classes, left_out = len(self.about["classes"]), self.about.get("left_out") or {}
        left_out = {why: files for why, files in left_out.items() if why not in EXPECTED}
        found = [f"{sum(shard.samples for shard in self.shards):,} images in {self.count:,} {self.made_of}"]
        found += [f"{classes:,} classes" if classes else "no classes", size(self.total_bytes)]
        found += [text for text in (self.index_at, self.note) if text]
        return f"{self}: {', '.join(found)}" + (f"; {summary(left_out)}" if left_out else "")

    @property
    def count(self) -> int:
        """Number of the files."""
        return len(self.shards)

    def where(self, number: int) -> str:
        """The shard's path or location, for messages."""
        return f"{self}/{self.shards[number].name}"

    def check_content(self, number: int) -> None:  # noqa: B027
        """Raise UserError if a local shard does not have its SHA-256, where that is known."""

    def fetch_ahead(self, number: int) -> None:  # noqa: B027
        """Fetch a remote shard, or mark it as used if cached. Raises UserError if the download fails."""

    def addresses(self) -> list[str]:
        """Paths or addresses of the tars, for a stream. Raises UserError if the shards are none."""
        raise UserError(
            f"{self} is not made of tars, so it cannot be streamed; data.order=position reads it beside tars"
        )


class FileFolder(ShardFolder):
    """Shards that are files, with an index of offsets."""

    @abstractmethod
    def opened(self, number: int) -> OpenFile:
        """The file of a shard. Raises UserError or OSError."""

    @abstractmethod
    def rows(self, number: int) -> np.ndarray:
        """The index of a shard, unchecked. Raises UserError."""

    def index(self, number: int) -> np.ndarray:
        index, shard = self.rows(number), self.shards[number]
        if index.dtype != INDEX_DTYPE or index.shape != (shard.samples,):
            raise UserError(f"the index of {self.where(number)} does not fit its manifest; see: shards verify")
        for part in ("image", "segmentation"):
            here = index[f"{part}_size"] > 0 if part == "segmentation" else slice(None)
            offset, size = index[f"{part}_offset"][here], index[f"{part}_size"][here]
            if (offset > shard.bytes).any() or (size > shard.bytes - offset).any() or (offset < 512).any():
                raise UserError(f"the index of {self.where(number)} points outside the shard; see: shards verify")
        return index

    def read(self, number: int, row: int, offset: int, size: int) -> bytes:
        try:
            file = self.opened(number)  # kept: it closes when nothing refers to it
            data = os.pread(file.descriptor, size, offset)
        except OSError as error:
            raise UserError(f"{self.where(number)} cannot be read: {error.strerror or error}") from None
        if len(data) < size:
            raise UserError(f"{self.where(number)} is shorter than its index says; see: shards verify")
        return data

    def key(self, number: int, row: int, offset: int) -> str:
        before = self.read(number, row, max(0, offset - LONGEST_HEADERS), min(offset, LONGEST_HEADERS))
        return key_of(member_name(before))


class LocalFolder(FileFolder):
    """A local shard folder. Raises UserError if one of its shards is missing or has another size."""

    def __init__(self, path: str | Path):
        self.path = expand_home(path)
        self.about = read_manifest(self.path)
        self.shards = _shards(self.about)
        for shard in self.shards:
            file = os.path.join(self.path, shard.name)
            with suppress(OSError):
                if os.stat(file).st_size == shard.bytes:
                    continue
            raise UserError(f"{file} is missing or not as its manifest says; see: shards verify src={path}")
        self._file = MethodCache(open_file, 256)

    def __str__(self) -> str:
        return str(self.path)

    def opened(self, number: int) -> OpenFile:
        return self._file(os.path.join(self.path, self.shards[number].name))

    def rows(self, number: int) -> np.ndarray:
        file = index_path(self.path / self.shards[number].name)
        try:
            return np.load(file, allow_pickle=False)
        except (OSError, ValueError, EOFError, MemoryError) as error:
            raise UserError(f"{file} is missing or damaged; see: shards verify src={self.path}") from error

    def check_content(self, number: int) -> None:
        try:
            with open(self.path / self.shards[number].name, "rb") as file:
                check_content(file, self.shards[number])
        except OSError as error:
            why = error.strerror or f"{error}; see: shards verify src={self}"
            raise UserError(f"{self.where(number)} cannot be used: {why}") from None

    def addresses(self) -> list[str]:
        return [os.path.join(self.path, shard.name) for shard in self.shards]


class RemoteFolder(FileFolder):
    """A remote shard folder, read through the cache. Raises UserError if its manifest cannot be downloaded."""

    remote = True

    def __init__(self, location: str, access: RemoteOptions):
        self.index_at = f"fetched into {cache_folder(access)}"
        self.source = Remote(location, access.retries, access.timeout)
        data = self.source.read(MANIFEST, MANIFEST_LIMIT, check_json)
        text, where = data.decode("utf-8", errors="replace"), f"{MANIFEST} of {self.source}"
        self.about = parse_manifest(text, where, "give the location of a folder that shards make wrote")
        self.shards = _shards(self.about)
        self.cache = ShardCache(cache_folder(access), int(access.cache_gb * 1e9))

    def __str__(self) -> str:
        return str(self.source)

    def opened(self, number: int) -> OpenFile:
        """The file of a shard; if it is missing, it is downloaded first."""
        return OpenFile(self.cache.open(self.shards[number], partial(self._fetch, self.shards[number])))

    def rows(self, number: int) -> np.ndarray:
        file = self.opened(number)
        return self.cache.index(self.shards[number], file.descriptor, image_key_of(self.about))

    def fetch_ahead(self, number: int) -> None:
        self.cache.fetch_ahead(self.shards[number], partial(self._fetch, self.shards[number]))

    def addresses(self) -> list[str]:
        return [self.source.address(shard.name) for shard in self.shards]

    def _fetch(self, shard: Shard, file: BinaryIO) -> None:
        self.source.fetch(shard.name, file, shard.bytes, check=lambda: check_content(file, shard))


def _shards(manifest: dict[str, Any]) -> list[Shard]:
    """The manifest's shards as compact tuples: 20,000 dictionaries would take megabytes in every worker."""
    return [Shard(e["name"], e["samples"], e["bytes"], e["sha256"]) for e in manifest.pop("shards")]


class OpenFile:
    """A file descriptor that closes when the last reference is dropped."""

    def __init__(self, descriptor: int):
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


def open_file(path: str) -> OpenFile:
    return OpenFile(os.open(path, os.O_RDONLY))
