"""WebDataset tars on a local disk that have no manifest: their indices lie in the cache, by size and date.

An index is made once per tar, by all cores; a killed start goes on where it stopped. `shards index` writes indices and
a manifest beside the tars for good.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from beit_pretrain.data import layout
from beit_pretrain.data.cache import Shard, name_and_size
from beit_pretrain.data.left_out import LeftOut
from beit_pretrain.data.listing.labels import named_classes
from beit_pretrain.data.manifest import write_rows
from beit_pretrain.data.notes import digest, read_note
from beit_pretrain.data.order import MethodCache
from beit_pretrain.data.settings import SourceSettings
from beit_pretrain.data.shard_folder import FileFolder, OpenFile, cache_folder, open_file
from beit_pretrain.data.shard_index import scan_shard
from beit_pretrain.data.tars import scan_tar
from beit_pretrain.errors import UserError
from beit_pretrain.fileio import atomic_write, exclusive_lock
from beit_pretrain.processes import cores, in_order
from beit_pretrain.transforms.image_io import IMAGE_EXTENSIONS

FORMAT = 1  # of the cached indices
FEW = 64  # tars that are not worth starting processes
LOOKED_AT = 300  # members of a tar by which shards are told from tars of a class


class LocalTars(FileFolder):
    """Tars as one set, in the given order. `name`: of the set, for messages; `note`: a line for the user.

    Raises UserError if one cannot be read, if there is no sample, or if the cache cannot be written.
    """

    made_of = "tars"

    def __init__(self, tars: Sequence[str], name: str, settings: SourceSettings, note: str = ""):
        self.note = note
        self.name, self.tars = name, [os.path.abspath(tar) for tar in tars]
        self.cached = cache_folder(settings) / "indices"
        self.index_at = f"indices in {self.cached}"
        image_key = tuple(settings.image_key or ())
        stamps = [_stamp(tar) for tar in self.tars]
        self.files = [
            digest(FORMAT, *stamp, image_key)[:32] for stamp in zip(self.tars, stamps)
        ]  # names of the indices
        known = self.cached / f"tars-{digest(self.files)[:32]}.json"
        try:
            found = read_note(known) or self._index_alone(known, image_key)
        except OSError as error:
            raise UserError(f"data.cache_dir={self.cached.parent} cannot be written: {error.strerror}") from None
        counts = found["class_counts"]
        classes = [str(number) for number in range(len(counts))]
        if settings.classes is not None:
            classes = named_classes(settings.classes, len(counts))
        self.about = {**found, "classes": classes, "class_counts": counts + [0] * (len(classes) - len(counts))}
        self.shards = [
            Shard(base, samples, size, name_and_size(base, samples, size))
            for base, samples, (size, _) in zip(map(os.path.basename, self.tars), found["samples"], stamps)
        ]
        if not sum(found["samples"]):
            raise UserError(f"{name} holds no image; no member of its tars has a name that says so (.jpg, .png, ...)")
        self._stamps = stamps
        self._file = MethodCache(open_file, 256)

    def __str__(self) -> str:
        return self.name

    def where(self, number: int) -> str:
        return self.tars[number]

    def addresses(self) -> list[str]:
        return self.tars

    def opened(self, number: int) -> OpenFile:
        file: OpenFile = self._file(self.tars[number])
        now = os.fstat(file.descriptor)
        if (now.st_size, now.st_mtime_ns) != self._stamps[number]:
            raise UserError(f"{self.tars[number]} has changed since it was indexed; rerun the same command")
        return file

    def rows(self, number: int) -> np.ndarray:
        file = self.cached / f"{self.files[number]}.npy"
        try:
            return np.load(file, allow_pickle=False)
        except (OSError, ValueError, EOFError, MemoryError):
            raise UserError(f"{file} is missing or damaged; delete {self.cached}, and rerun the same command") from None

    def _index_alone(self, note: Path, image_key: tuple[str, ...]) -> dict[str, Any]:
        """`_index` in one process of a machine, since it takes all cores; the others wait for its note."""
        self.cached.mkdir(parents=True, exist_ok=True)
        message = f"{self.name}: waiting for another process that indexes its tars"
        with exclusive_lock(note.with_name(f".{note.stem}.lock"), message, wait=True):
            return read_note(note) or self._index(note, image_key)

    def _index(self, note: Path, image_key: tuple[str, ...]) -> dict[str, Any]:
        """Index the tars that have no index yet, and note what is known of the whole set."""
        left_out, samples, segmentation = LeftOut(), [], False
        counts = np.zeros(0, np.int64)
        with in_order(min(cores(), len(self.tars)), inline=FEW) as run:
            work = run(partial(_index_of, self.cached, image_key), zip(self.tars, self.files))
            for one in tqdm(work, total=len(self.tars), unit=" tars", desc="index", delay=1):
                samples.append(one["samples"])
                here = np.asarray(one["class_counts"], np.int64)
                longer, shorter = (here, counts) if len(here) > len(counts) else (counts, here)
                counts = longer.copy()
                counts[: len(shorter)] += shorter
                segmentation = segmentation or one["segmentation"]
                for key, reason, files in one["left_out"]:
                    left_out.add(key, reason, files, key)
                for key, text, files in one["notes"]:
                    left_out.note(key, text, files)
        left_out.warn()
        about = {"samples": samples, "class_counts": counts.tolist(), "segmentation": segmentation}
        about |= {"segmentation_classes": [], "settings": {}, "left_out": left_out.counts()}
        atomic_write(note, json.dumps(about), unique=True)
        return about


def _index_of(cached: Path, image_key: tuple[str, ...], of: tuple[str, str]) -> dict[str, Any]:
    """What is known of a tar: from its note in the cache, or by indexing it."""
    tar, name = of
    if (found := read_note(cached / f"{name}.json")) is not None:
        return found
    left_out = LeftOut()
    rows = scan_shard(Path(tar), image_key, left_out)
    labels = rows["label"][rows["label"] >= 0]
    about = {
        "samples": len(rows),
        "class_counts": np.bincount(labels).tolist() if len(labels) else [],
        "segmentation": bool(rows["segmentation_size"].any()),
        "left_out": [(key, reason, files) for (_, reason), (key, files) in left_out.found.items()],
        "notes": [(key, text, files) for text, (key, files) in left_out.notes.items()],
    }
    write_rows(cached / f"{name}.npy", rows)
    atomic_write(cached / f"{name}.json", json.dumps(about), unique=True)
    return about


def _stamp(tar: str) -> tuple[int, int]:
    """Size in bytes and time of change (ns) of a tar. Raises UserError if there is none."""
    try:
        found = os.stat(tar)
    except OSError as error:
        raise UserError(f"{tar} cannot be read: {error.strerror}") from None
    return found.st_size, found.st_mtime_ns


def are_shards(tars: Sequence[Path]) -> bool:
    """Whether tars are WebDataset shards, not one tar per class: their numbers, of three digits or more, follow each
    other, or most images of the first have a `.cls`, `.json` or `.txt` of their name.

    Raises UserError if the first cannot be read.
    """
    numbers = [re.fullmatch(r"(.*?)(\d{3,})", tar.stem) for tar in sorted(tars)]
    if len(tars) > 1 and all(numbers) and len({found[1] for found in numbers if found}) == 1:
        values = [int(found[2]) for found in numbers if found]
        if values == list(range(values[0], values[0] + len(values))):
            return True
    names = [name for name, *_ in islice(scan_tar(tars[0]), LOOKED_AT)]
    images = [key for key, extension in map(layout.split_key, names) if extension in IMAGE_EXTENSIONS]
    companions = {layout.split_key(name)[0] for name in names if name.lower().endswith((".cls", ".json", ".txt"))}
    return bool(images) and 2 * sum(key in companions for key in images) >= len(images)
