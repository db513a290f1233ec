"""Images read where they lie: a folder of class folders, a folder of images, a tar, by a list of them in the cache.

The list is made once (`listing/file_index.py`) and lies in the folder `indices` of the cache. Later starts only look
whether a folder or tar has changed since. The order is that of `shards make` with its defaults: the same seeded
permutation, cut into shards of 1,000 images, so that shards made later give the same batches.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from beit_pretrain.data import cifar
from beit_pretrain.data.cache import Shard
from beit_pretrain.data.left_out import LEFT_OUT, LeftOut
from beit_pretrain.data.listing.file_index import Listing, build_listing, shuffled_rows
from beit_pretrain.data.listing.labels import segmentation_names
from beit_pretrain.data.listing.metadata_file import with_metadata
from beit_pretrain.data.listing.settings import LabelSettings
from beit_pretrain.data.notes import digest, read_note
from beit_pretrain.data.order import MethodCache
from beit_pretrain.data.settings import SourceSettings
from beit_pretrain.data.shard_folder import ShardFolder, cache_folder
from beit_pretrain.data.shard_index import INDEX_DTYPE
from beit_pretrain.data.sources import Candidate, Choice, read_candidate
from beit_pretrain.errors import UserError
from beit_pretrain.fileio import atomic_write, discard, exclusive_lock
from beit_pretrain.processes import cores

SHARD = 1000  # images; `samples_per_shard` and `seed` of `shards make`
SEED = 0
ORDER = "order.npy"
FORMAT = 2  # of the cached list
CHANGED = "it has changed since it was listed"


class ListedFolder(ShardFolder):
    """The images of a folder or tar, in place. `split`: the part of a source with parts.

    Raises UserError if it holds no image or cannot be read, or if the cache cannot be written.
    """

    made_of = "files read in place"
    in_place = True

    def __init__(self, path: Path, settings: SourceSettings, split: str):
        self.path = path
        self.about = cached_list(
            path, Choice(split, tuple(settings.image_key or ())), cache_folder(settings) / "indices"
        )
        self.index_at = f"list in {self.about['folder']}"
        counts = [min(SHARD, self.about["samples"] - first) for first in range(0, self.about["samples"], SHARD)]
        listing = self.about["listing_sha256"]
        named = (hashlib.sha256(f"{listing} {number}".encode()).hexdigest() for number in range(len(counts)))
        self.shards = [Shard(f"images-{n:06d}", count, 0, sha) for n, (count, sha) in enumerate(zip(counts, named))]
        self._opened = MethodCache(_open_list, 1)

    def __str__(self) -> str:
        return str(self.path)

    @property
    def total_bytes(self) -> int:
        return int(self.about["bytes"])

    @property
    def count(self) -> int:
        return int(self.about["samples"])

    def where(self, number: int) -> str:
        return str(self)

    def index(self, number: int) -> np.ndarray:
        listing, order = self._opened(self.about["folder"])
        rows = order[number * SHARD : (number + 1) * SHARD]
        index = np.zeros(len(rows), INDEX_DTYPE)
        index["image_offset"], index["image_size"] = listing.rows["offset"][rows], listing.rows["size"][rows]
        index["label"] = listing.class_numbers(self.about["classes"])[listing.rows["class"][rows]]
        index["segmentation_size"] = self.about["segmentation"]
        return index

    def key(self, number: int, row: int, offset: int) -> str:
        return self._candidate(number, row).key

    def read(self, number: int, row: int, offset: int, size: int) -> bytes:
        candidate = self._candidate(number, row)
        found = os.stat(candidate.path)
        if candidate.offset:  # in a tar, of which every other member may lie elsewhere now
            if self.about["places"].get(candidate.path, found.st_mtime_ns) != found.st_mtime_ns:
                raise UserError(f"{candidate.path}: {CHANGED}; rerun the same command to list it anew")
        elif candidate.kind == "file" and candidate.size >= 0 and candidate.size != found.st_size:
            with suppress(OSError):
                os.unlink(self.about["note"])  # a file written in place leaves its folder's date: list anew next time
            raise OSError(CHANGED)
        try:
            data = read_candidate(candidate)
        except ValueError as error:  # too large for an image
            raise OSError(str(error)) from None
        return cifar.as_png(data) if candidate.kind == "cifar" else data

    def label_map(self, number: int, row: int, offset: int, size: int) -> bytes:
        return Path(self._candidate(number, row).mask).read_bytes()

    def _candidate(self, number: int, row: int) -> Candidate:
        listing, order = self._opened(self.about["folder"])
        return listing.candidate(int(order[number * SHARD + row]))


def _open_list(folder: str) -> tuple[Listing, np.ndarray]:
    return Listing(Path(folder)), np.load(Path(folder) / ORDER, mmap_mode="r")


def cached_list(path: Path, choice: Choice, cache: Path) -> dict[str, Any]:
    """What is known of the images of a source, from the cache if nothing has changed since, else listed now.

    Keys: `folder` of the list, its `note` in the cache, `samples`, `bytes`, `classes`, `class_counts`, `segmentation`,
    `segmentation_classes`, `left_out`, `listing_sha256`, and `places`: time of change of every folder and tar.
    Raises UserError as `ListedFolder` does.
    """
    name = f"images-{digest(FORMAT, os.path.realpath(path), *choice)[:24]}"
    note = cache / f"{name}.json"
    if (about := _unchanged(note)) is not None:
        return about
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(cache / f".{name}.lock", f"{path}: waiting for another process that lists it", wait=True):
            if (about := _unchanged(note)) is not None:
                return about
            making = cache / f".{name}.making"
            discard(making)  # left by a process that was killed
            making.mkdir()
            try:
                about = _make_list(path, choice, making)
                folder = cache / f"{name}-{about['listing_sha256'][:8]}-{time.time_ns()}"
                os.rename(making, folder)
            finally:
                discard(making)
            about |= {"folder": str(folder), "note": str(note)}
            atomic_write(note, json.dumps(about))
            earlier = sorted(cache.glob(f"{name}-*"), key=lambda old: int(old.name.rpartition("-")[2]))
            for old in earlier[:-2]:  # another run may still read the last but one
                discard(old)
            return about
    except OSError as error:
        raise UserError(f"data.cache_dir={cache.parent} cannot hold the list of {path}: {error.strerror}") from None


def _unchanged(note: Path) -> dict[str, Any] | None:
    """What a note says, if the list is there and no folder or tar has changed since."""
    try:
        about = read_note(note) or {}
        same = all(os.stat(place).st_mtime_ns == changed for place, changed in about["places"].items())
        return about if same and Path(about["folder"]).is_dir() else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _make_list(path: Path, choice: Choice, folder: Path) -> dict[str, Any]:
    """List a source into a folder. Raises UserError, or OSError if the folder cannot be written."""
    try:
        seen = dict(_places(str(path)))  # before it is listed: a change meanwhile is found at the next start
    except OSError as error:
        raise UserError(f"{error.filename or path} cannot be read: {error.strerror}") from None
    labels = with_metadata([str(path)], choice.split, LabelSettings())
    if labels.path is not None:
        seen[labels.path] = os.stat(labels.path).st_mtime_ns
    build_listing(folder, [str(path)], choice, 0, labels, cores())
    listing = Listing(folder)
    np.save(folder / ORDER, shuffled_rows(len(listing), SEED).astype(np.min_scalar_type(len(listing))))
    classes = sorted(listing.classes)
    numbers = listing.labels(classes)
    segmentation = any(unit.masks for unit in listing.units)
    return {
        "samples": len(listing),
        "bytes": int(np.maximum(listing.rows["size"], 0).sum()),
        "classes": classes,
        "class_counts": np.bincount(numbers[numbers >= 0], minlength=len(classes)).tolist(),
        "segmentation": segmentation,
        "segmentation_classes": segmentation_names(path) if segmentation else [],
        "settings": {},
        "left_out": LeftOut.read(folder / LEFT_OUT).counts(),
        "listing_sha256": listing.digest(),
        "places": seen,
    }


def _places(root: str) -> Iterator[tuple[str, int]]:
    """Every folder and tar of a source, or the source if it is a file, with the time of its last change, ns."""
    waiting, seen = [root], set()
    while waiting:
        place = waiting.pop()
        found = os.stat(place)
        if (found.st_dev, found.st_ino) in seen:
            continue
        seen.add((found.st_dev, found.st_ino))
        yield place, found.st_mtime_ns
        if stat.S_ISDIR(found.st_mode):
            with os.scandir(place) as entries:
                waiting += [
                    e.path for e in entries if e.name.lower().endswith(".tar") or (e.is_dir() and e.name[0] != ".")
                ]
