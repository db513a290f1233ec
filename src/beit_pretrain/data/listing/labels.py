"""Classes that are not folder names: the ground truth of a validation set, names of segmentation classes.

`labels.path` takes ImageNet's devkit (`ILSVRC2012_devkit_t12.tar.gz`, or unpacked), or a list with a row per image:
text, CSV or JSON lines (label_text.py, label_columns.py), such as Kaggle's LOC_val_solution.csv, ADE20K's
sceneCategories.txt, Tiny ImageNet's val_annotations.txt, Hugging Face's metadata.csv, ISIC's one-hot CSVs.
label_matching.py says which name an image has.

An image that the list does not name is an error, or with `labels.unlisted=skip` is rejected with that reason. Any other
file is no reason to stop: it is rejected like those of a source without a list. Names without an image are a warning.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Collection
from pathlib import Path

import numpy as np

from beit_pretrain.data.listing.label_columns import read_rows
from beit_pretrain.data.listing.label_matching import LabelList
from beit_pretrain.data.listing.label_text import lines_of, read_text
from beit_pretrain.data.listing.metadata_file import parquet_rows
from beit_pretrain.data.listing.settings import LabelSettings
from beit_pretrain.data.sources import Candidate, read_bytes
from beit_pretrain.data.tars import read_named
from beit_pretrain.errors import UserError, first_line
from beit_pretrain.fileio import expand_home
from beit_pretrain.transforms.image_io import HEAD, starts_as_image

GROUND_TRUTH, META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
LARGEST = 2**28  # bytes of a file of labels


class Labeller:
    """Gives the files of a source the classes of `settings.path`. Raises UserError for a list that cannot be read."""

    def __init__(self, settings: LabelSettings):
        assert settings.path is not None
        self.settings = settings
        self.listed = read_labels(settings.path, settings.file_column, settings.class_column)
        self.files = self.images = 0  # not listed; `images` are the images among them
        self.examples: list[str] = []  # the first of each that is not listed

    def class_of(self, candidate: Candidate) -> str | None:
        """The class of a file; None if it is not listed. Raises UserError if it has several."""
        return self.listed.class_of(candidate.key, _whole_path(candidate))

    def skips(self, candidate: Candidate) -> bool:
        """Whether a file that is not listed is an image, to be left out. Raises UserError if it cannot be read."""
        image = _is_image(candidate)
        if not self.files or (image and not self.images):
            self.examples = [candidate.key]
        self.files += 1
        self.images += image
        return image

    def check(self, files: int, classes: int) -> None:
        """Raise UserError unless all of `files` files are as listed; warn of what looks like a mistake.

        `classes`: how many the listed files have.
        """
        where = self.listed.where
        if files and self.files == files:
            example = self.examples[0]
            said = f"it lists {self.listed.like(example)!r}, src holds {example!r}"
            raise UserError(f"{where} names none of the {files:,} files of src: {said}; {ADVICE}")
        if self.images and self.settings.unlisted == "error":
            more = f" and {self.images - 1:,} more images" if self.images > 1 else ""
            said = "add them to it, or leave them out with labels.unlisted=skip"
            raise UserError(f"{where} has no class for {self.examples[0]!r}{more}; {said}")
        count, example = self.listed.unused()
        if count:
            print(f"warning: {where} names {count:,} images that src lacks, such as {example!r}", file=sys.stderr)
        if classes == files - self.files >= MANY:
            said = f"all {classes:,} images have a class of their own; labels.class_column= chooses another column"
            print(f"warning: {where}: {said}", file=sys.stderr)
        if joined := _joined(self.listed.class_names()):
            said = f"{len(joined):,} classes join the names of others, such as {joined[0]!r}, and count as their own"
            print(f"warning: {where}: {said}; an image has one class (multi-label is not read)", file=sys.stderr)
        if self.listed.twice:
            row, key = self.listed.twice
            said = f"{self.listed.name(row)!r} names several images, {key!r} too: they get the same class"
            print(f"warning: {where}: {said}", file=sys.stderr)


def _joined(classes: Collection[str]) -> list[str]:
    """The classes whose names join those of others (cat|dog), as where an image has several."""
    known = {*classes}
    parts = {name: [[part.strip() for part in name.split(mark)] for mark in "|,; "] for name in classes}
    return [name for name, ways in parts.items() if any(len(way) > 1 and known.issuperset(way) for way in ways)]


ADVICE = "names count with case and extension; labels.file_column= chooses another column"
MANY = 20  # images with a class each that are probably a mistake


def read_labels(path: str | Path, file_column: str | None = None, class_column: str | None = None) -> LabelList:
    """The classes in a devkit or a list. Raises UserError for any other file."""
    path = expand_home(path)
    where = f"labels={path}"
    found = LabelList(where)
    try:
        if path.is_dir() or path.name.endswith((".tar.gz", ".tgz", ".tar")):
            for name, class_name in _devkit_labels(read_named(path, {GROUND_TRUTH, META}, LARGEST)).items():
                found.add(name, class_name)
            return found
        if path.exists() and not path.is_file():  # reading it would never end
            raise UserError(f"{where}: it is a pipe or a device")
        if path.suffix == ".parquet":
            for name, class_name in parquet_rows(path, file_column, class_column):
                found.add(name, class_name)
            return found
        if path.stat().st_size > LARGEST:
            raise UserError(f"{where} has more than {LARGEST} bytes")
        text = read_text(path, "labels")
    except OSError as error:
        raise UserError(f"{where} cannot be read: {error.strerror or error}") from None
    except UserError:
        raise
    except Exception as error:  # scipy raises nearly anything on a file that is no .mat
        raise UserError(f"{where} is neither ImageNet's devkit nor a list of names: {first_line(error)}") from None
    try:
        for line, name, class_name in read_rows(text, file_column, class_column):
            found.add(name, class_name, line)
    except ValueError as error:
        raise UserError(f"{where}: {first_line(error)}") from None
    return found


def read_class_names(path: str | Path, setting: str = "labels") -> list[str]:
    """The names in a file of class names, a line each, without what blanks and lines end it.

    Raises UserError for a line between them that is blank, and for a name that comes twice.
    """
    try:
        lines = lines_of(read_text(expand_home(path), setting).rstrip())
    except OSError as error:
        raise UserError(f"{setting}={path} cannot be read: {error.strerror or error}") from None
    first: dict[str, int] = {}
    for number, name in enumerate(map(str.strip, lines), 1):
        if not name:
            raise UserError(f"{setting}={path}: line {number} is blank; give every class a name")
        if (before := first.setdefault(name, number)) != number:
            raise UserError(f"{setting}={path}: {name!r} is the name of two classes, in lines {before} and {number}")
    return list(first)


def named_classes(given: int | str, at_least: int) -> list[str]:
    """The names that data.classes gives. Raises UserError for fewer than the labels need."""
    if isinstance(given, int) or given.isdecimal():
        names = [str(number) for number in range(int(given))]
    else:
        names = read_class_names(given, "data.classes")
    if len(names) < at_least:
        raise UserError(f"data.classes={given} are {len(names)} classes, but there is the class number {at_least - 1}")
    return names


def _whole_path(candidate: Candidate) -> str:
    """The absolute path of a file; of a member of a tar, with its path in the tar."""
    if candidate.kind != "file":
        return candidate.key
    tar = os.path.basename(candidate.path)
    if not tar.lower().endswith(".tar"):
        return candidate.path
    inner = candidate.key.rpartition(f"{tar}/")[2]
    return f"{candidate.path.removesuffix('.tar')}/{inner}"


def _is_image(candidate: Candidate) -> bool:
    """Whether a file begins like an image that can be read. Raises UserError if it cannot be read at all."""
    if candidate.kind != "file":
        return True
    if candidate.size <= 0:
        return False
    if candidate.key.lower().endswith(".tga"):  # has no mark
        return True
    try:
        start = read_bytes(candidate.path, candidate.offset, min(HEAD, candidate.size))
    except OSError as error:
        raise UserError(f"{candidate.path} cannot be read: {error.strerror or error}") from None
    return starts_as_image(start)


def _devkit_labels(files: dict[str, bytes]) -> dict[str, str]:
    """ILSVRC2012_val_00000001, ... -> WordNet ids: line n of the ground truth is the ILSVRC2012_ID of image n."""
    from scipy.io import loadmat  # for this one file

    synsets = loadmat(io.BytesIO(files[META]), squeeze_me=True, variable_names=["synsets"])["synsets"]
    wnid = {int(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in np.ravel(synsets)}
    return {f"ILSVRC2012_val_{i:08d}": wnid[int(line)] for i, line in enumerate(files[GROUND_TRUTH].split(), 1)}


def segmentation_names(source: Path) -> list[str]:
    """Names of ADE20K's classes 1, 2, ... from objectInfo150.txt in the source or beside it; none if there is none."""
    for file in (source / "objectInfo150.txt", source.parent / "objectInfo150.txt"):
        if file.is_file() and file.stat().st_size < LARGEST:
            lines = file.read_text("utf-8", "replace").splitlines()[1:]
            return [line.split("\t")[-1].strip() for line in lines if line.strip()]
    return []
