"""Reads samples from local or remote shards by their index: sample address -> bytes of the image file.

Several shard folders are read as one, with shards numbered consecutively. A local shard is opened once per process and
read with `pread`, so that workers share the page cache but no file position. A remote shard is opened for every read,
which takes a few microseconds, so that the disk space of evicted files is freed at once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from beit_pretrain.data.cache import Shard, ShardCache, check_content
from beit_pretrain.data.manifest import MANIFEST, image_key_of, index_path, parse_manifest, read_manifest
from beit_pretrain.data.order import MethodCache, Sample
from beit_pretrain.data.settings import RemoteOptions
from beit_pretrain.data.shard_index import INDEX_DTYPE, key_of
from beit_pretrain.data.storage import Remote, is_remote
from beit_pretrain.data.tars import LONGEST_HEADERS, member_name
from beit_pretrain.errors import UserError
from beit_pretrain.fileio import expand_home

MANIFEST_LIMIT = 1 << 30  # bytes of a remote manifest
INDEX_MEMORY = 64 << 20  # bytes of indices that a process keeps
DEFAULT_CACHE = "~/.cache/beit_pretrain/shards"


class Record(NamedTuple):
    """One sample as stored in its shard. `label` is -1 without a class."""

    data: bytes
    label: int


class ShardReader:
    """Random access to the samples of one or more shard folders (`.../train` with its manifest), local or remote.

    Raises UserError if a folder, manifest, shard or index is missing, or they do not belong together.
    """

    def __init__(self, source: str | Path | Sequence[str | Path], access: RemoteOptions | None = None):
        sources = [source] if isinstance(source, str | Path) else list(source)
        access = access or RemoteOptions()
        self.folders = [RemoteFolder(str(s), access) if is_remote(s) else LocalFolder(s) for s in sources]
        self.manifest: dict[str, Any] = self.folders[0].about
        named = [folder.about["classes"] for folder in self.folders]
        self.classes_differ = any(classes != named[0] for classes in named)
        # Labels of different class lists cannot be combined; pre-training needs none.
        self.classes: list[str] = [] if self.classes_differ else named[0]
        self.shards = [shard for folder in self.folders for shard in folder.shards]
        self.sizes = [shard.samples for shard in self.shards]
        self.samples = sum(self.sizes)
        if not self.samples:
            raise UserError(f"{source} holds no samples")
        self.without_class = self.samples - sum(sum(folder.about["class_counts"]) for folder in self.folders)
        self._folder = [folder for folder in self.folders for _ in folder.shards]  # of each shard
        bytes_of_one = INDEX_DTYPE.itemsize * max(1, self.samples // len(self.sizes))
        self._index = MethodCache(self._load_index, max(8, INDEX_MEMORY // bytes_of_one))

    def parts(self) -> list[list[int]]:
        """Samples of each shard of each folder."""
        return [[shard.samples for shard in folder.shards] for folder in self.folders]

    @property
    def remote(self) -> bool:
        """Whether any of the folders is remote."""
        return any(isinstance(folder, RemoteFolder) for folder in self.folders)

    def is_remote(self, shard: int) -> bool:
        """Whether a shard is in a remote folder."""
        return isinstance(self._folder[shard], RemoteFolder)

    def where(self, shard: int) -> str:
        """The shard's path or location, for messages."""
        return f"{self._folder[shard]}/{self.shards[shard].name}"

    def labels(self, shard: int) -> np.ndarray:
        """Labels (samples,) int64 of one shard; -1 where there is none."""
        return self._index(shard)["label"].astype(np.int64)

    def read(self, sample: Sample) -> Record:
        """The image file's bytes and the label of a sample. Raises UserError if its shard is missing or damaged."""
        row = self._index(sample.shard)[sample.row]
        offset, size = int(row["image_offset"]), int(row["image_size"])
        return Record(self._bytes(sample.shard, offset, size), int(row["label"]))

    def label_map(self, sample: Sample) -> bytes:
        """The bytes of a sample's label map (PNG). Raises ValueError if it has none."""
        row = self._index(sample.shard)[sample.row]
        if not row["segmentation_size"]:
            raise ValueError("it has no label map")
        return self._bytes(sample.shard, int(row["segmentation_offset"]), int(row["segmentation_size"]))

    def key(self, sample: Sample) -> str:
        """The key of a sample: the name of its image in the tar, without the extension."""
        row = self._index(sample.shard)[sample.row]
        offset = int(row["image_offset"])
        before = self._bytes(sample.shard, max(0, offset - LONGEST_HEADERS), min(offset, LONGEST_HEADERS))
        return key_of(member_name(before))

    def check_content(self, shard: int) -> None:
        """Raise UserError if a local shard does not have its manifest's SHA-256. Downloads check remote ones."""
        folder, entry = self._folder[shard], self.shards[shard]
        if isinstance(folder, LocalFolder):
            try:
                with open(folder.path / entry.name, "rb") as file:
                    check_content(file, entry)
            except OSError as error:
                why = error.strerror or f"{error}; see: shards verify src={folder}"
                raise UserError(f"{self.where(shard)} cannot be used: {why}") from None

    def fetch_ahead(self, shard: int) -> None:
        """Download a remote shard, or mark it as used if cached. Raises UserError if the download fails."""
        folder = self._folder[shard]
        if isinstance(folder, RemoteFolder):
            folder.fetch_ahead(self.shards[shard])

    def _bytes(self, shard: int, offset: int, size: int) -> bytes:
        try:
            file = self._folder[shard].opened(self.shards[shard])
            data = os.pread(file.descriptor, size, offset)
        except OSError as error:
            raise UserError(f"{self.where(shard)} cannot be read: {error.strerror or error}") from None
        if len(data) < size:
            raise UserError(f"{self.where(shard)} is shorter than its index says; see: shards verify")
        return data

    def _load_index(self, shard: int) -> np.ndarray:
        folder, entry = self._folder[shard], self.shards[shard]
        index = folder.index(entry)
        if index.dtype != INDEX_DTYPE or index.shape != (entry.samples,):
            raise UserError(f"the index of {self.where(shard)} does not fit its manifest; see: shards verify")
        for part in ("image", "segmentation"):
            here = index[f"{part}_size"] > 0 if part == "segmentation" else slice(None)
            offset, size = index[f"{part}_offset"][here], index[f"{part}_size"][here]
            if (offset > entry.bytes).any() or (size > entry.bytes - offset).any() or (offset < 512).any():
                raise UserError(f"the index of {self.where(shard)} points outside the shard; see: shards verify")
        classes = len(folder.about["classes"])
        if not self.classes:
            index = index.copy()
            index["label"] = -1
        elif (index["label"] >= classes).any() or (index["label"] < -1).any():
            raise UserError(f"{self.where(shard)} has labels beyond the {classes} classes of its manifest")
        return index


class LocalFolder:
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
        self._file = MethodCache(_open, 256)

    def __str__(self) -> str:
        return str(self.path)

    def opened(self, shard: Shard) -> _OpenFile:
        return self._file(os.path.join(self.path, shard.name))

    def index(self, shard: Shard) -> np.ndarray:
        file = index_path(self.path / shard.name)
        try:
            return np.load(file, allow_pickle=False)
        except (OSError, ValueError, EOFError, MemoryError) as error:
            raise UserError(f"{file} is missing or damaged; see: shards verify src={self.path}") from error


class RemoteFolder:
    """A remote shard folder, read through the cache. Raises UserError if its manifest cannot be downloaded."""

    def __init__(self, location: str, access: RemoteOptions):
        self.remote = Remote(location, access.retries, access.timeout)
        data = self.remote.read(MANIFEST, MANIFEST_LIMIT, _check_end)
        text, where = data.decode("utf-8", errors="replace"), f"{MANIFEST} of {self.remote}"
        self.about = parse_manifest(text, where, "give the location of a folder that shards make wrote")
        self.shards = _shards(self.about)
        self.cache = ShardCache(access.cache_dir or DEFAULT_CACHE, int(access.cache_gb * 1e9))

    def __str__(self) -> str:
        return str(self.remote)

    def opened(self, shard: Shard) -> _OpenFile:
        """The file of a shard; if it is missing, it is downloaded first."""
        return _OpenFile(self.cache.open(shard, partial(self._fetch, shard)))

    def index(self, shard: Shard) -> np.ndarray:
        file = self.opened(shard)
        return self.cache.index(shard, file.descriptor, image_key_of(self.about))

    def fetch_ahead(self, shard: Shard) -> None:
        self.cache.fetch_ahead(shard, partial(self._fetch, shard))

    def _fetch(self, shard: Shard, file: BinaryIO) -> None:
        self.remote.fetch(shard.name, file, shard.bytes, check=lambda: check_content(file, shard))


def _check_end(manifest: bytes) -> None:
    """Raise OSError for a truncated manifest, since a server may end early without having sent a length."""
    if manifest.lstrip().startswith(b"{"):
        try:
            json.loads(manifest)
        except ValueError:
            raise OSError(f"broke off after {len(manifest):,} bytes, or is damaged") from None
        except RecursionError:  # not a manifest; `parse_manifest` reports it
            pass


def _shards(manifest: dict[str, Any]) -> list[Shard]:
    """The manifest's shards as compact tuples: 20,000 dictionaries would take megabytes in every worker."""
    return [Shard(e["name"], e["samples"], e["bytes"], e["sha256"]) for e in manifest.pop("shards")]


class _OpenFile:
    """A file descriptor that closes when the last reference is dropped."""

    def __init__(self, descriptor: int):
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


def _open(path: str) -> _OpenFile:
    return _OpenFile(os.open(path, os.O_RDONLY))
