"""The list of all files that a make may read, on disk: built once by all cores, then mapped by every process.

Fourteen million candidates as Python objects would take gigabytes in each process. Here each is a row of flat files
(28 bytes and its name), and the order of a split a file of row numbers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from beit_pretrain.data import cifar
from beit_pretrain.data.left_out import LEFT_OUT, LeftOut
from beit_pretrain.data.listing import synthetic
from beit_pretrain.data.listing.folder_classes import alike, classes_of
from beit_pretrain.data.listing.labels import Labeller
from beit_pretrain.data.listing.settings import FolderChoice, LabelSettings
from beit_pretrain.data.sources import (
    ADVICE,
    Candidate,
    Choice,
    Row,
    SourceGroup,
    candidate_of,
    distinct_names,
    nothing_in,
    rows,
    units,
)
from beit_pretrain.data.table_rows import TableFile
from beit_pretrain.processes import in_order

# `end`: of the row's name in the file of names; `class`: number of its class, -1 = none, or UNLISTED.
ROW = np.dtype([("end", "<u8"), ("offset", "<i8"), ("size", "<i8"), ("class", "<i4")])
UNLISTED = -2  # class of an image to leave out: labels= does not name it
FEW = 16  # units that are not worth starting processes


class Listing:
    """The rows of a folder that `build_listing` filled, as memory maps."""

    def __init__(self, folder: Path):
        self.folder = folder
        lines = [json.loads(line) for line in (folder / "units.jsonl").read_text("utf-8").splitlines()]
        self.units = [SourceGroup(*fields) for *fields, _ in lines]
        self.first = np.array([first for *_, first in lines])
        self.rows = np.memmap(folder / "rows", ROW, "r")
        self.names = np.memmap(folder / "names", np.uint8, "r")
        self.classes: list[str] = json.loads((folder / "classes.json").read_text("utf-8"))

    def __len__(self) -> int:
        return len(self.rows)

    def candidate(self, row: int) -> Candidate:
        unit = self.units[int(np.searchsorted(self.first, row, side="right")) - 1]
        end, offset, size, number = self.rows[row].item()
        start = int(self.rows["end"][row - 1]) if row else 0
        name = self.names[start:end].tobytes().decode("utf-8", "surrogateescape")
        class_name = self.classes[number] if number >= 0 else None
        candidate = candidate_of(unit, (name, class_name, offset, size))
        if unit.kind == "cifar":
            return candidate._replace(path=str(_unpacked(self.folder, unit)))
        if unit.kind == "table":
            return candidate._replace(path=str(_unpacked(self.folder, unit)), kind="file")
        return candidate

    def class_numbers(self, classes: list[str]) -> np.ndarray:
        """Index in `classes` by the number in `rows["class"]`: also at -1 (no class) and UNLISTED. Raises KeyError."""
        number = {name: index for index, name in enumerate(classes)}
        return np.array([number[name] for name in self.classes] + [UNLISTED, -1], np.int32)

    def labels(self, classes: list[str]) -> np.ndarray:
        """Index in `classes` of every row's class, -1 where there is none, or UNLISTED. Raises KeyError."""
        return self.class_numbers(classes)[self.rows["class"]]

    def digest(self) -> str:
        """SHA-256 over keys, sizes and classes: the same for the same files, wherever they lie."""
        digest = hashlib.sha256(json.dumps([self.classes, [[u.top, u.prefix] for u in self.units]]).encode())
        for column in (self.names, self.rows["size"], self.rows["class"]):
            for start in range(0, len(column), 2**20):
                digest.update(column[start : start + 2**20].tobytes())
        return digest.hexdigest()


def shuffled_rows(count: int, seed: int) -> np.ndarray:
    """The order in which the rows of a listing become samples, int64 (count,)."""
    # Sorts raw draws for the reason in `order.permutation`.
    return np.argsort(np.random.PCG64(seed).random_raw(count), kind="stable")


opened_listing = lru_cache(maxsize=1)(Listing)  # once per process


def source_units(
    sources: list[str], choice: Choice, images: int = 0, left_out: LeftOut | None = None
) -> Iterator[SourceGroup]:
    """The units of all sources in turn; of several tars each is a class. Raises UserError as `sources.units` does."""
    if sources == ["synthetic"]:
        yield SourceGroup("synthetic", "", "", "", "", (("", images),))
        return
    paths = [Path(source) for source in sources]
    tars = len(paths) > 1 and all(path.suffix.lower() == ".tar" and not path.is_dir() for path in paths)
    for path, name in zip(paths, distinct_names(paths), strict=True):
        yield from units(path, f"{name}/" if len(sources) > 1 else "", choice, tars, left_out)


def build_listing(
    folder: Path,
    sources: list[str],
    choice: Choice,
    images: int,
    labels: LabelSettings,
    num_workers: int,
) -> None:
    """List the sources into the files of `folder`, which must be empty. Raises UserError if one holds nothing.

    `labels`: the list whose classes replace those of the folders (labels.py).
    """
    labeller = Labeller(labels) if labels.path is not None else None
    numbers: dict[str, int] = {}  # of classes if there is a list, else of folders
    end = first = 0
    empty = set(sources)
    left_out = LeftOut()
    with (
        open(folder / "names", "wb") as names,
        open(folder / "rows", "wb") as table,
        open(folder / "units.jsonl", "w", encoding="utf-8") as lines,
        tqdm(desc="listing", unit=" files") as bar,
        in_order(num_workers, FEW, lambda unit: unit.kind == "files") as run,
    ):
        listing = source_units(sources, choice, images, left_out)
        for unit, listed, without in run(partial(_rows, folder, choice), listing):
            left_out.update(without)
            lines.write(json.dumps([*unit._replace(files=(), span=(0, 0)), first]) + "\n")
            records = []
            for row in listed:
                name, class_name, offset, size = row
                number = -1
                if labeller is not None:
                    candidate = candidate_of(unit, row)
                    if (class_name := labeller.class_of(candidate)) is None and labeller.skips(candidate):
                        number = UNLISTED
                if class_name is not None:
                    number = numbers.setdefault(class_name, len(numbers))
                end += names.write(name.encode("utf-8", "surrogateescape"))
                records.append((end, offset, size, number))
            table.write(np.array(records, ROW).tobytes())
            if listed:
                file = Path(unit.path, unit.files[0][0] if unit.kind == "files" else "")
                empty = {s for s in empty if s != "synthetic" and not file.is_relative_to(s)}
                first += len(listed)
            bar.update(len(listed))
    if empty:
        raise nothing_in(min(empty), ADVICE, left_out)
    if labeller is not None:
        labeller.check(first, len(numbers))
        classes = [*numbers]
        for note in alike(classes):
            left_out.note("classes", note)
    else:
        classes = _number_classes(folder, [*numbers], labels.folder, left_out)
    (folder / "classes.json").write_text(json.dumps(classes), "utf-8")
    left_out.write(folder / LEFT_OUT)
    left_out.warn(f"all in {LEFT_OUT}")


def _number_classes(folder: Path, folders: list[str], which: FolderChoice, left_out: LeftOut) -> list[str]:
    """Turn the folders' numbers in the rows into those of classes. Returns the classes, the first found first."""
    named, notes = classes_of(folders, which)
    for note in notes:
        left_out.note("classes", note)
    numbers: dict[str, int] = {}
    number_of = [-1 if name is None else numbers.setdefault(name, len(numbers)) for name in named]
    if number_of != [*range(len(folders))]:
        table = np.memmap(folder / "rows", ROW, "r+")
        table["class"] = np.array([*number_of, -1], np.int32)[table["class"]]
        table.flush()
    return [*numbers]


def _rows(folder: Path, choice: Choice, unit: SourceGroup) -> tuple[SourceGroup, list[Row], LeftOut]:
    """A unit with its rows and what is left out of it; writes the images of CIFAR-100 and of tables into `folder`."""
    left_out = LeftOut()
    if unit.kind == "synthetic":
        textures = synthetic.TEXTURES
        listed: list[Row] = [(f"synthetic/{i}", textures[i % len(textures)], i, 0) for i in range(unit.files[0][1])]
    elif unit.kind == "cifar":
        names, classes, pixels = cifar.read(Path(unit.path), unit.files[0][0])
        _unpacked(folder, unit).write_bytes(pixels.tobytes())
        size = cifar.PIXELS
        listed = [(name, c, i * size, size) for i, (name, c) in enumerate(zip(names, classes, strict=True))]
    elif unit.kind == "table":
        listed = _table_rows(_unpacked(folder, unit), unit, choice)
    else:
        listed = rows(unit, choice, left_out)
    return unit, listed, left_out


def _table_rows(out: Path, unit: SourceGroup, choice: Choice) -> list[Row]:
    """The rows of a table, whose images are written one after another into the file `out`."""
    listed: list[Row] = []
    with open(out, "wb") as file:
        samples = TableFile(unit.path, unit.path).named_samples(choice.image_key, choice.label_key)
        for number, (image, name) in enumerate(samples):
            # A class is the name of a folder here, where a slash would begin another.
            name = None if name is None else name.replace("/", "\N{DIVISION SLASH}")
            listed.append((f"{number:08d}", name, file.tell(), file.write(image)))
    return listed


def _unpacked(folder: Path, unit: SourceGroup) -> Path:
    """The copy of a CIFAR-100 archive's pixels, or of a table's images."""
    return folder / f"pixels-{hashlib.sha256(unit.path.encode(errors='surrogateescape')).hexdigest()[:16]}"
