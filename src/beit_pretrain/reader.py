"""Sample address -> bytes of its image file, from a folder of local shards by their index.

A shard is opened once per process and read with `pread`, so that the workers of a node share the page cache and no
file position.
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from beit_pretrain.errors import UserError
from beit_pretrain.manifest import read_manifest
from beit_pretrain.order import Sample


class Record(NamedTuple):
    """One sample as it stands in its shard. `label` is -1 without a class."""

    data: bytes
    label: int


class ShardReader:
    """Random access to the samples of one shard folder (`.../train` with its manifest).

    Raises UserError if the folder, its manifest, a shard or an index is missing or does not belong together.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        manifest = read_manifest(self.folder)
        self.classes: list[str] = manifest["classes"]
        self.names = [shard["name"] for shard in manifest["shards"]]
        self.sizes = [int(shard["samples"]) for shard in manifest["shards"]]
        self.samples = sum(self.sizes)
        self.manifest = manifest
        for shard in manifest["shards"]:
            file = self.folder / shard["name"]
            if not file.is_file() or file.stat().st_size != shard["bytes"]:
                raise UserError(f"{file} is missing or not as its manifest says; see: shards verify src={folder}")
        self._open()

    def _open(self) -> None:
        self._file = lru_cache(maxsize=256)(_open_read_only)
        self._index = lru_cache(maxsize=1024)(self._load_index)

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k not in ("_file", "_index")}

    def __setstate__(self, state: dict) -> None:  # open files do not travel to a worker
        self.__dict__.update(state)
        self._open()

    def _load_index(self, shard: int) -> np.ndarray:
        file = (self.folder / self.names[shard]).with_suffix(".index.npy")
        try:
            return np.load(file, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise UserError(f"{file} is missing or damaged; see: shards verify src={self.folder}") from error

    def labels(self, shard: int) -> np.ndarray:
        """Labels (samples,) int64 of one shard; -1 where there is none."""
        return self._index(shard)["label"].astype(np.int64)

    def read(self, sample: Sample) -> Record:
        """The image file's bytes and the label of a sample."""
        row = self._index(sample.shard)[sample.row]
        handle = self._file(str(self.folder / self.names[sample.shard]))
        data = os.pread(handle.fd, int(row["image_size"]), int(row["image_offset"]))
        return Record(data, int(row["label"]))


class _Handle:
    """A file descriptor that closes when the last user drops it."""

    def __init__(self, path: str):
        self.fd = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        os.close(self.fd)


def _open_read_only(path: str) -> _Handle:
    return _Handle(path)
