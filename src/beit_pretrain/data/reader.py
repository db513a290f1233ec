"""Reads samples of any source by their address (shard, row): the bytes of an image file and its label.

Several sources are read as one, with shards numbered consecutively. A local shard is opened once per process and
read with `pread`, so that workers share the page cache but no file position. A remote shard is opened for every read,
which takes a few microseconds, so that the disk space of evicted files is freed at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from beit_pretrain.data.open_source import open_source
from beit_pretrain.data.order import MethodCache, Sample
from beit_pretrain.data.settings import SourceSettings
from beit_pretrain.data.shard_folder import ShardFolder
from beit_pretrain.data.shard_index import INDEX_DTYPE
from beit_pretrain.errors import UserError

AT_ONCE = 8  # shards fetched at a time before the first batch
INDEX_MEMORY = 64 << 20  # bytes of indices that a process keeps


class Record(NamedTuple):
    """One sample as stored in its shard. `label` is -1 without a class."""

    data: bytes
    label: int


class ShardReader:
    """Random access to the samples of one or more sources (open_source.py), or of folders that are open already.

    `split`: the part of a source with parts. Raises UserError if a source cannot be read.
    """

    def __init__(
        self,
        source: str | Path | Sequence[str | Path | ShardFolder],
        settings: SourceSettings | None = None,
        split: str = "train",
    ):
        sources = [source] if isinstance(source, str | Path) else list(source)
        settings = settings or SourceSettings()
        self.folders = [s if isinstance(s, ShardFolder) else open_source(str(s), settings, split) for s in sources]
        self.manifest: dict[str, Any] = self.folders[0].about
        named = [folder.about["classes"] for folder in self.folders]
        self.classes_differ = any(classes != named[0] for classes in named)
        # Labels of different class lists cannot be combined; pre-training needs none.
        self.classes: list[str] = [] if self.classes_differ else named[0]
        self.shards = [shard for folder in self.folders for shard in folder.shards]
        self.sizes = [shard.samples for shard in self.shards]
        self.samples = sum(self.sizes)
        if not self.samples:
            raise UserError(f"{' and '.join(map(str, self.folders))}: no samples")
        self.without_class = self.samples - sum(sum(folder.about["class_counts"]) for folder in self.folders)
        self._place = [(folder, number) for folder in self.folders for number in range(len(folder.shards))]
        self._label_of: np.ndarray | None = None  # of the class numbers of the source; None = as they are
        bytes_of_one = INDEX_DTYPE.itemsize * max(1, self.samples // len(self.sizes))
        self._index = MethodCache(self._load_index, max(8, INDEX_MEMORY // bytes_of_one))

    def parts(self) -> list[list[int]]:
        """Samples of each shard of each folder."""
        return [[shard.samples for shard in folder.shards] for folder in self.folders]

    def descriptions(self) -> list[str]:
        """What was found in each source, a line each."""
        return [folder.description() for folder in self.folders]

    @property
    def in_place(self) -> list[ShardFolder]:
        """The sources whose images are read as users have them."""
        return [folder for folder in self.folders if folder.in_place]

    @property
    def remote(self) -> bool:
        """Whether any shard is fetched before it is read."""
        return any(folder.remote for folder in self.folders)

    def is_remote(self, shard: int) -> bool:
        """Whether a shard is fetched before it is read."""
        return self._place[shard][0].remote

    def where(self, shard: int) -> str:
        """The shard's path or location, for messages."""
        folder, number = self._place[shard]
        return folder.where(number)

    def number_classes_as(self, classes: list[str]) -> bool:
        """Number the classes as another list does that has all of them, by name. Returns whether it does."""
        if self.classes == classes or not set(self.classes) <= set(classes):
            return self.classes == classes
        number_of = {name: number for number, name in enumerate(classes)}
        self._label_of = np.array([*(number_of[name] for name in self.classes), -1], np.int64)
        self.classes = classes
        return True

    def labels(self, shard: int) -> np.ndarray:
        """Labels (samples,) int64 of one shard; -1 where there is none."""
        return self._index(shard)["label"].astype(np.int64)

    def has_label_map(self, shard: int) -> np.ndarray:
        """Whether each sample of one shard has a label map, (samples,) bool."""
        return self._index(shard)["segmentation_size"] > 0

    def read(self, sample: Sample) -> Record:
        """The image file's bytes and the label of a sample.

        Raises UserError if its shard is missing or damaged, OSError if its own file is.
        """
        row = self._index(sample.shard)[sample.row]
        folder, number = self._place[sample.shard]
        data = folder.read(number, sample.row, int(row["image_offset"]), int(row["image_size"]))
        return Record(data, int(row["label"]))

    def label_map(self, sample: Sample) -> bytes:
        """The bytes of a sample's label map. Raises ValueError if it has none."""
        row = self._index(sample.shard)[sample.row]
        if not row["segmentation_size"]:
            raise ValueError("it has no label map")
        folder, number = self._place[sample.shard]
        return folder.label_map(number, sample.row, int(row["segmentation_offset"]), int(row["segmentation_size"]))

    def key(self, sample: Sample) -> str:
        """The key of a sample: the name of its image in the tar, without the extension, or its path in the source."""
        folder, number = self._place[sample.shard]
        return folder.key(number, sample.row, int(self._index(sample.shard)[sample.row]["image_offset"]))

    def check_content(self, shard: int) -> None:
        """Raise UserError if a local shard does not have its manifest's SHA-256. Downloads check remote ones."""
        folder, number = self._place[shard]
        folder.check_content(number)

    def fetch_ahead(self, shard: int) -> None:
        """Fetch a remote shard, or mark it as used if cached. Raises UserError if the download fails."""
        folder, number = self._place[shard]
        folder.fetch_ahead(number)

    def fetch(self, shards: Iterable[int]) -> None:
        """Fetch remote shards, several at a time; before the first batch nothing has been fetched ahead.

        One that fails is left to `read`, which tries again and says so.
        """
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for fetched in [pool.submit(self.fetch_ahead, shard) for shard in sorted(shards)]:
                fetched.exception()

    def _load_index(self, shard: int) -> np.ndarray:
        folder, number = self._place[shard]
        index = folder.index(number)
        classes = len(folder.about["classes"])
        if not self.classes:
            index = index.copy()
            index["label"] = -1
        elif (index["label"] >= classes).any() or (index["label"] < -1).any():
            raise UserError(f"{self.where(shard)} has labels beyond the {classes} classes of its manifest")
        elif self._label_of is not None:
            index = index.copy()
            index["label"] = self._label_of[index["label"]]
        return index
