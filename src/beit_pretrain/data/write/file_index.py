"""The list of everything a make may read, on disk: built once by all cores, then mapped by every process.

Fourteen million candidates as Python objects would take gigabytes in each process. Here each is a row of flat files
(about 28 bytes and its name), and the order of a split a file of row numbers.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from beit_pretrain.data import cifar
from beit_pretrain.data.sources import Candidate, Rows, SourceGroup, mask_of, rows, units
from beit_pretrain.data.write import synthetic
from beit_pretrain.data.write.labels import read_labels, stem
from beit_pretrain.errors import UserError
from beit_pretrain.processes import in_order

COLUMNS: dict[str, np.dtype[Any]] = {
    "end": np.dtype("<u8"),
    "offset": np.dtype("<i8"),
    "size": np.dtype("<i8"),
    "class": np.dtype("<i4"),
}
FEW = 16  # units that are not worth starting processes


class Listing:
    """The rows of a folder that `build_listing` filled. A process maps only what it looks at."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.units = [SourceGroup(*fields[:-1]) for fields in _unit_lines(folder)]
        self.first = np.array([fields[-1] for fields in _unit_lines(folder)], np.int64)
        self.columns = {name: np.memmap(folder / name, dtype, "r") for name, dtype in COLUMNS.items()}
        self.names = np.memmap(folder / "names", np.uint8, "r")
        self.classes: list[str] = json.loads((folder / "classes.json").read_text("utf-8"))

    def __len__(self) -> int:
        return len(self.columns["end"])

    def candidate(self, row: int) -> Candidate:
        """The candidate of a row."""
        unit = self.units[int(np.searchsorted(self.first, row, side="right")) - 1]
        start = int(self.columns["end"][row - 1]) if row else 0
        name = self.names[start : int(self.columns["end"][row])].tobytes().decode("utf-8", "surrogateescape")
        path, mask, kind = unit.path, "", "file"
        if unit.kind == "files":
            path = os.path.join(unit.path, name)
            mask = str(mask_of(unit.masks, name)) if unit.masks else ""
        elif unit.kind in ("cifar", "synthetic"):
            path, kind = str(_pixel_file(self.folder, unit)), unit.kind
        number = int(self.columns["class"][row])
        class_name = self.classes[number] if number >= 0 else None
        offset, size = (int(self.columns[column][row]) for column in ("offset", "size"))
        return Candidate(unit.top + unit.prefix + name, class_name, path, offset, size, kind, mask)

    def labels(self, classes: list[str]) -> np.ndarray:
        """Index in `classes` of every row's class, -1 where there is none. Raises KeyError for a class not in it."""
        number = {name: index for index, name in enumerate(classes)}
        index = np.array([number[name] for name in self.classes] + [-1], np.int32)
        return index[self.columns["class"]]

    def digest(self) -> str:
        """SHA-256 over keys, sizes and classes: the same for the same files, wherever they lie."""
        digest = hashlib.sha256(json.dumps([self.classes, [[u.top, u.prefix] for u in self.units]]).encode())
        for column in (self.names, self.columns["size"], self.columns["class"]):
            for start in range(0, len(column), 2**20):
                digest.update(column[start : start + 2**20].tobytes())
        return digest.hexdigest()


@lru_cache(maxsize=1)
def opened_listing(folder: Path) -> Listing:
    """The listing of a folder, opened once per process."""
    return Listing(folder)


def source_units(sources: list[str], split: str, images: int = 0) -> Iterator[SourceGroup]:
    """The units of all sources in turn; of several tars each is a class. Raises UserError as `sources.units` does."""
    if sources == ["synthetic"]:
        yield SourceGroup("synthetic", "", "", "", "", (("", images),))
        return
    paths = [Path(source) for source in sources]
    tars = len(paths) > 1 and all(path.suffix.lower() == ".tar" and not path.is_dir() for path in paths)
    for path, name in zip(paths, distinct_names(paths), strict=True):
        yield from units(path, f"{name}/" if len(sources) > 1 else "", split, as_class=tars)


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """The last part of every path, or as many of its last parts as tell it from the others."""
    lengths = [1] * len(paths)
    while True:
        names = ["/".join(path.parts[-length:]) for path, length in zip(paths, lengths, strict=True)]
        count = Counter(names)
        longer = [
            length + (count[name] > 1 and length < len(path.parts))
            for path, name, length in zip(paths, names, lengths, strict=True)
        ]
        if longer == lengths:
            return names
        lengths = longer


def build_listing(
    folder: Path, sources: list[str], split: str, images: int, labels: str | None, num_workers: int
) -> None:
    """List the sources into the files of `folder`, which must be empty. Raises UserError if one holds nothing.

    `labels`: file of the ground truth that replaces the classes of the folders; it must know every image.
    """
    truth = None if labels is None else read_labels(labels)
    numbers: dict[str, int] = {}
    end = first = 0
    empty = set(sources)
    with ExitStack() as stack:
        files = {name: stack.enter_context(open(folder / name, "wb")) for name in ("names", "units.jsonl", *COLUMNS)}
        bar = stack.enter_context(tqdm(desc="listing", unit=" files"))
        run = stack.enter_context(in_order(num_workers, inline=FEW))
        for unit, listed in run(partial(_rows, folder), source_units(sources, split, images)):
            classes = listed.classes if truth is None else _known_classes(listed.names, truth, labels)
            encoded = [name.encode("utf-8", "surrogateescape") for name in listed.names]
            ends = end + np.cumsum([len(name) for name in encoded], dtype=np.int64)
            ids = [-1 if name is None else numbers.setdefault(name, len(numbers)) for name in classes]
            columns = {"end": ends, "offset": listed.offsets, "size": listed.sizes, "class": np.array(ids)}
            for name, values in columns.items():
                files[name].write(values.astype(COLUMNS[name]).tobytes())
            files["names"].write(b"".join(encoded))
            files["units.jsonl"].write(json.dumps([*unit._replace(files=(), span=(0, 0)), first]).encode() + b"\n")
            if encoded:
                file = Path(unit.path, unit.files[0][0] if unit.kind == "files" else "")
                empty = {s for s in empty if s != "synthetic" and not file.is_relative_to(s)}
                end, first = int(ends[-1]), first + len(encoded)
            bar.update(len(encoded))
    if empty:
        raise UserError(f"src={min(empty)} holds no image; give a folder of class folders, a tar, or synthetic")
    (folder / "classes.json").write_text(json.dumps(list(numbers)), "utf-8")


def _rows(folder: Path, unit: SourceGroup) -> tuple[SourceGroup, Rows]:
    """A unit with its rows; the pixels of CIFAR-100 are put into `folder`."""
    if unit.kind == "synthetic":
        numbers = np.arange(unit.files[0][1])
        textures = [synthetic.TEXTURES[i % len(synthetic.TEXTURES)] for i in numbers]
        return unit, Rows([f"synthetic/{i}" for i in numbers], [*textures], numbers, np.zeros_like(numbers))
    if unit.kind == "cifar":
        names, classes, pixels = cifar.read(Path(unit.path), unit.files[0][0])
        _pixel_file(folder, unit).write_bytes(pixels.tobytes())
        offsets = np.arange(len(names)) * cifar.PIXELS
        return unit, Rows(names, [*classes], offsets, np.full_like(offsets, cifar.PIXELS))
    return unit, rows(unit)


def _pixel_file(folder: Path, unit: SourceGroup) -> Path:
    """Where the pixels of a CIFAR-100 archive lie."""
    return folder / f"pixels-{hashlib.sha256(unit.path.encode(errors='surrogateescape')).hexdigest()[:16]}"


def _known_classes(names: list[str], truth: dict[str, str], labels: str | None) -> list[str | None]:
    """The class of every name. Raises UserError for a name that the ground truth lacks."""
    classes = [truth.get(stem(name)) for name in names]
    if None in classes:
        raise UserError(f"labels={labels} says nothing of {names[classes.index(None)]!r}")
    return [*classes]


def _unit_lines(folder: Path) -> list[list[Any]]:
    with open(folder / "units.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]
