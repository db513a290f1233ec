"""What is known of remote tars from earlier runs: one file for each set of folders, in the cache's folder `indices`.

A line of the file is a JSON list: key of the tar, size and version by its server, then, once it has been read, its real
size, number of samples, whether it has label maps, and the samples of each class. The last line of a key counts, so
that processes only append, under a lock; a line that a crash cut is ignored. Keys are digests of addresses: no address,
query or command is written.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from beit_pretrain import fileio
from beit_pretrain.data.storage import without_secrets
from beit_pretrain.errors import UserError

INDICES = "indices"
FORMAT = "beit_pretrain-tars/1"


class TarRecord(NamedTuple):
    """A tar as its server states it (None = not stated), and as it was read (`samples` is None before)."""

    bytes: int | None
    version: str | None
    size: int | None = None
    samples: int | None = None
    label_maps: bool = False
    labels: str = ""  # samples by class, by `pack_labels`


class TarRecords:
    """The records of tars in `folder`, for the readers of these addresses with one `image_key`; `keys` of the tars."""

    def __init__(self, folder: Path, urls: Sequence[str], image_key: Sequence[str]):
        plain = [without_secrets(url) for url in urls]
        count = Counter(plain)
        # What is signed anew is the same tar: an address counts without its query, unless the query names the tar.
        named = (
            bare if count[bare] == 1 and bare.lower().endswith(".tar") else url
            for url, bare in zip(urls, plain, strict=True)
        )
        self.keys = [hashlib.sha256(text.encode()).hexdigest()[:32] for text in named]
        folders = sorted({bare.rpartition("/")[0] for bare in plain})
        name = hashlib.sha256("\n".join([FORMAT, *image_key, "", *folders]).encode()).hexdigest()[:32]
        self.path = folder / INDICES / f"{name}.jsonl"

    def load(self) -> dict[str, TarRecord]:
        """The records by key."""
        records: dict[str, TarRecord] = {}
        try:
            lines = self.path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return records
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error.strerror}") from None
        for line in lines:
            try:
                key, *values = json.loads(line)
                if values:
                    records[key] = TarRecord(*values)
                else:
                    records.pop(key, None)
            except (ValueError, TypeError):  # empty, cut by a crash, or of another version
                continue
        return records

    def add(self, records: Mapping[str, TarRecord | None]) -> None:
        """Append records; None makes a tar unknown again. Raises UserError if the file cannot be written."""
        lines = b"".join(json.dumps([key, *(record or ())]).encode() + b"\n" for key, record in records.items())
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with fileio.exclusive_lock(self.path.with_suffix(".lock"), wait=True), self.path.open("ab+") as file:
                size = file.seek(0, os.SEEK_END)
                cut = size and os.pread(file.fileno(), 1, size - 1) != b"\n"
                file.write(b"\n" * bool(cut) + lines)
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror}") from None

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Hold the right to ask for tars of the set and to read them: one process of a machine does it for all."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with fileio.exclusive_lock(self.path.with_suffix(".reading"), wait=True):
                yield
        except OSError as error:
            raise UserError(f"{self.path.parent} cannot be written: {error.strerror}") from None


def pack_labels(labels: np.ndarray) -> str:
    """The number of samples of each class as text; `labels` (samples,) with -1 for none."""
    classes, counts = np.unique(labels[labels >= 0], return_counts=True)
    if not len(classes):
        return ""
    steps = np.diff(classes, prepend=0)  # small numbers, which compress well
    return base64.b64encode(zlib.compress(np.concatenate([steps, counts]).astype("<u4").tobytes(), 1)).decode()


def class_counts(packed: Iterable[str]) -> np.ndarray:
    """Samples of each class (classes,) int64 over several tars, up to the largest class number."""
    total = np.zeros(1024, np.int64)
    most = 0
    for text in filter(None, packed):
        steps, counts = np.frombuffer(zlib.decompress(base64.b64decode(text)), "<u4").reshape(2, -1)
        classes = np.cumsum(steps, dtype=np.int64)
        most = max(most, int(classes[-1]) + 1)
        if most > len(total):
            total = np.pad(total, (0, 2 * most - len(total)))
        total[classes] += counts
    return total[:most]
