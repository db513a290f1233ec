"""Lists files of folders and tars that may be images: source -> units (a folder's files, a tar) -> rows -> candidates.

Nothing is decoded here: a candidate is a file, or part of one, that may hold an image. One process lists one unit at a
time, so that all cores share the work on twenty thousand tars.
"""

from __future__ import annotations

import hashlib
import math
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from beit_pretrain.data import ade20k, cifar, layout, table_rows
from beit_pretrain.data.left_out import EXPECTED, LeftOut
from beit_pretrain.data.source_tree import DiskTree, NamesTree, other_image_folders, walk
from beit_pretrain.data.table_files import local_tables
from beit_pretrain.data.tars import OUTSIDE, REFUSED, inside, scan_tar
from beit_pretrain.errors import UserError
from beit_pretrain.fileio import expand_home
from beit_pretrain.transforms.image_io import MAX_PIXELS

ADVICE = "give a folder of class folders, a folder of images, or a tar"
# Of a unit: name (after top and prefix), folder that may name the class (see folder_classes.py), offset, size in bytes.
Row = tuple[str, str | None, int, int]


class Candidate(NamedTuple):
    """A source file that may be an image."""

    key: str  # path within the source; the name of the file if that is the source
    class_name: str | None
    path: str  # file that holds the bytes
    offset: int = 0
    size: int = -1  # bytes; -1 = the whole file; below -1: a key of tars.REFUSED
    kind: str = "file"  # or "synthetic" (image `offset` of the set), "cifar" (raw pixels), "table" (row `offset`)
    mask: str = ""  # file of the label map


class SourceGroup(NamedTuple):
    """A unit: a part of a source that one process lists."""

    kind: str  # "files" of one folder, "tar", "table", "cifar" or "synthetic"
    path: str  # folder, or file
    top: str  # start of its keys: the source's name if there are several, and the part that `split` picked
    prefix: str  # next part of its keys
    stamp: str  # changes when the files change
    files: tuple[tuple[str, int], ...] = ()  # names and sizes of "files"; the split of "cifar"
    span: tuple[int, float] = (0, math.inf)  # the bytes of a tar in `path`
    masks: str = ""  # folder of the label maps; images then have no class
    classes: str = ""  # folders that may name the class, with a slash: the prefix without the names of parts


class Choice(NamedTuple):
    """Which files of a source are read."""

    split: str | None = "train"  # part of a source with parts; None = everything
    image_key: tuple[str, ...] = ()  # extensions of the image, where files differ by their extension alone; or a column
    label_key: str | None = None  # column of the class in tables; None = found


TRAIN, EVERYTHING = Choice(), Choice(None)


def units(
    source: Path,
    top: str = "",
    choice: Choice = TRAIN,
    as_class: bool = False,
    left_out: LeftOut | None = None,
) -> Iterator[SourceGroup]:
    """The units of a folder or file, in an order that depends only on names. What is left out goes into `left_out`.

    `choice.split` picks a part of a source with parts (folders train/ and val/, ADE20K, CIFAR-100).
    `as_class`: treat a tar as one in a folder of tars: its name is a class.
    Raises UserError if the source does not exist or cannot be read.
    """
    _check_kind(source, ADVICE)
    left_out = LeftOut() if left_out is None else left_out
    if cifar.recognised(source):
        split = choice.split or "train"
        yield SourceGroup("cifar", str(cifar.part_of(source, split)), top, "", _stat(source)[1], ((split, 0),))
    elif tables := _table_units(source, top, choice.split):
        yield from tables
    elif not source.is_dir():
        top = top.removesuffix(f"{source.name}/") if as_class else top  # then the prefix contains the name
        yield from _file_units(source, source.name, top, alone=not as_class)
    elif (source / "manifest.json").is_file() and any(source.glob("*.index.npy")):
        raise UserError(f"{source} is a shard folder already; shards index lists foreign shards, fit reads ours")
    elif ade20k.has_label_maps(source):
        images = ade20k.part(source / "images", choice.split, left_out, f"{top}images/")
        masks = ade20k.part(source / "annotations", choice.split)
        for name in other_image_folders(DiskTree(source), ("images", "annotations")):
            left_out.add(f"{top}{name}/", layout.BESIDE_MAPS)
        for unit in _folder_units(images[0], f"{top}images/{images[1]}", choice, left_out):
            folder = os.path.join(masks[0], unit.prefix)
            masks_of = (Path(folder, name).with_suffix(".png") for name, _ in unit.files)
            stamps = [unit.stamp, *(_stat(mask, may_lack=True)[1] for mask in masks_of)]
            stamp = hashlib.sha256(" ".join(stamps).encode()).hexdigest()
            yield unit._replace(masks=folder, stamp=stamp, classes="")
    else:
        checked = set[Path]()
        for unit in _folder_units(source, top, choice, left_out):
            ade20k.refuse_label_maps(source, unit.path, checked)
            yield unit


def rows(unit: SourceGroup, choice: Choice = TRAIN, left_out: LeftOut | None = None) -> list[Row]:
    """The rows of a unit of kind "files", "tar" or "table", sorted by name. Raises UserError for a damaged file."""
    if unit.kind == "files":
        return [(name, unit.classes, 0, size) for name, size in unit.files]
    if unit.kind == "table":
        return [(f"{row:08d}", None, row, -1) for row in range(table_rows.count_rows(unit.path, choice.image_key))]
    left_out = LeftOut() if left_out is None else left_out
    found: dict[str, tuple[int, int]] = {}  # of several members of one name the last counts, as in unpacking
    start = unit.top + unit.prefix
    refused: list[Row] = []
    notes: list[str] = []
    for name, offset, size in _tar_members(Path(unit.path), *unit.span, notes):
        if size == OUTSIDE:
            refused.append((name, None, offset, size))
        else:
            name = PurePosixPath(name).as_posix() if "./" in name or "//" in name else name
            if name in found and layout.why_no_image(name) is None:
                left_out.add(start + name, layout.REPLACED, folder=start)
            found[name] = offset, size
    for text in notes:
        left_out.note(start.removesuffix("/") or os.path.basename(unit.path), text)
    inside_tar = LeftOut()
    folders = [*walk(NamesTree(found), choice.split, inside_tar, "", choice.image_key, unit.path)]
    # A shard of WebDataset, where images have companions: its name is no class.
    companions = {layout.split_key(name)[0] for name in found if name.lower().endswith((".cls", ".json", ".txt"))}
    kept = [folder.path + name for folder in folders for name in folder.names]
    shard = bool(companions) and 2 * sum(layout.split_key(name)[0] in companions for name in kept) >= len(kept)
    listed = [
        (folder.path + name, ("" if shard else unit.classes) + folder.classes, *found[folder.path + name])
        for folder in folders
        for name in folder.names
    ]
    for (_, why), (example, count) in inside_tar.found.items():
        left_out.add(start + example, why, count, start)
    for text, (example, count) in inside_tar.notes.items():
        left_out.note(start + example, text, count)
    return sorted(listed + refused, key=lambda row: row[0])


def candidate_of(unit: SourceGroup, row: Row) -> Candidate:
    """The candidate of a row; its class is that of the row."""
    name, class_name, offset, size = row
    path = os.path.join(unit.path, name) if unit.kind == "files" else unit.path
    kind = unit.kind if unit.kind in ("cifar", "synthetic", "table") else "file"
    mask = str(Path(unit.masks, name).with_suffix(".png")) if unit.masks else ""
    return Candidate(unit.top + unit.prefix + name, class_name, path, offset, size, kind, mask)


def check_sources(sources: Sequence[str | Path]) -> None:
    """Raise UserError for a source that does not exist or has no possible image."""
    for source in (expand_home(source) for source in sources if source != "synthetic"):
        left_out = LeftOut()
        if next(units(source, left_out=left_out), None) is None:
            raise nothing_in(source, ADVICE, left_out)


def nothing_in(source: str | Path, advice: str, left_out: LeftOut) -> UserError:
    """The error for a source without a possible image; names what was left out."""
    path = expand_home(source)
    alone = layout.why_no_image(path.name) if path.is_file() else None  # such as a zip
    why = alone or next((f"{key}: {why}" for key, why in left_out.examples() if why not in EXPECTED), advice)
    return UserError(f"{source} holds no image; {why}")


def list_images(src: str | Path, choice: Choice = EVERYTHING, left_out: LeftOut | None = None) -> list[Candidate]:
    """The possible images in `src`, sorted by name: an image file, a folder of any depth, a tar, or tables.

    Raises UserError.
    """
    source, advice = expand_home(src), "give an image, a folder of images, a tar, or a parquet file"
    left_out = LeftOut() if left_out is None else left_out
    _check_kind(source, advice)
    listed: Iterable[SourceGroup] = _table_units(source, "", choice.split)
    if listed:
        pass
    elif source.is_dir():
        listed = _folder_units(source, "", choice, left_out)
    else:
        listed = _file_units(source, source.name, "", alone=True)
    found = [candidate_of(unit, row) for unit in listed for row in rows(unit, choice, left_out)]
    if not found:
        raise nothing_in(source, advice, left_out)
    return sorted(found, key=lambda candidate: candidate.key)


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """The last part of every path, or as many of its last parts as tell it from the others."""
    count = Counter(path.parts[-n:] for path in paths for n in range(1, len(path.parts) + 1))
    endings = [next((n for n in range(1, len(p.parts)) if count[p.parts[-n:]] == 1), len(p.parts)) for p in paths]
    return [Path(*path.parts[-n:]).as_posix() for path, n in zip(paths, endings, strict=True)]


def read_candidate(candidate: Candidate, max_pixels: int = MAX_PIXELS) -> bytes:
    """The bytes of a candidate in a file or tar.

    Raises OSError if they cannot be read or the file has become shorter, ValueError if the candidate is not a plain
    file or is larger than an image of `max_pixels` can be.
    """
    if candidate.kind == "table":
        return table_rows.read_row(candidate.path, candidate.offset)
    if candidate.size in REFUSED:
        raise ValueError(REFUSED[candidate.size])
    size = candidate.size if candidate.size >= 0 else os.path.getsize(candidate.path)
    if size > 16 * max_pixels + 2**20:  # such as a film or a disk image, too large for memory
        raise ValueError(f"{size} bytes are too many for an image of max_pixels={max_pixels}")
    data = read_bytes(candidate.path, candidate.offset, size)
    if len(data) < size:
        raise OSError("it has become shorter since it was listed")
    return data


def read_bytes(path: str | Path, offset: int, size: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(size)


def _check_kind(source: Path, advice: str) -> None:
    """Raise UserError for a source that is neither a folder nor a file: reading a pipe could block for ever."""
    if not (source.is_dir() or source.is_file()):
        fault = "is a pipe or a device" if os.path.exists(source) else "does not exist"
        raise UserError(f"{source} {fault}; {advice}")


def _folder_units(root: Path, top: str, choice: Choice, left_out: LeftOut) -> Iterator[SourceGroup]:
    """The units of a folder tree. Raises UserError if there are only compressed tars."""
    some = False
    for folder in walk(DiskTree(root), choice.split, left_out, top, choice.image_key, str(root)):
        files: list[tuple[str, int]] = []
        digest = hashlib.sha256()
        prefix, start = folder.path.removeprefix(folder.part), top + folder.part
        for name in folder.names:
            path = root / folder.path / name
            size, stamp = _stat(path)
            if not stamp:
                left_out.add(top + folder.path + name, layout.DEVICE)
            elif path.suffix.lower() == ".tar":
                some = True
                yield from _file_units(path, prefix + name, start, classes=folder.classes, of_part=folder.of_parts)
            else:
                files.append((name, size))
                digest.update(f"{name}\0{stamp}\0".encode(errors="surrogateescape"))
        if files:
            some = True
            where = str(root / folder.path)
            yield SourceGroup("files", where, start, prefix, digest.hexdigest(), tuple(files), classes=folder.classes)
    if not some and (compressed := [key for key, why in left_out.examples() if why == layout.COMPRESSED]):
        raise UserError(f"{root / min(compressed).removeprefix(top)} is {layout.COMPRESSED}, or move it away")


def _table_units(source: Path, top: str, split: str | None) -> list[SourceGroup]:
    """A unit for each parquet or Arrow file of a part; none if the source holds something else."""
    if source.is_dir() and ((source / "manifest.json").is_file() or ade20k.has_label_maps(source)):
        return []
    units = []
    for path in local_tables(source, split) or []:
        prefix = "" if path == source else f"{path.relative_to(source).as_posix()}/"
        units.append(SourceGroup("table", str(path), top, prefix, _stat(path)[1]))
    return units


def _stat(path: Path, may_lack: bool = False) -> tuple[int, str]:
    """Size of a file in bytes, and a stamp that changes with it ("" for a pipe or a device); (-1, "-") for a dead link.

    Raises UserError if the file cannot be read, or is missing (unless `may_lack`, then (-1, "-")).
    """
    try:
        status = os.stat(path)
    except OSError as error:
        if path.is_symlink() or (may_lack and isinstance(error, FileNotFoundError | NotADirectoryError)):
            return -1, "-"
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    return status.st_size, f"{status.st_size}:{status.st_mtime_ns}" if stat.S_ISREG(status.st_mode) else ""


def _file_units(
    path: Path, key: str, top: str, alone: bool = False, classes: str | None = None, of_part: bool = False
) -> Iterator[SourceGroup]:
    """The units of one file. `key` is its path in the source folder, or its name if it is the source (`alone`).

    `of_part`: the name of a tar is that of a part, and no class.
    """
    if path.name.lower().endswith(layout.COMPRESSED_TARS):
        raise UserError(f"{path} is {layout.COMPRESSED}, or move it away")
    size, stamp = _stat(path)
    classes = key.removesuffix(path.name) if classes is None else classes
    if path.suffix.lower() == ".tar":
        prefix, classes = ("", "") if alone else (f"{key}/", classes if of_part else f"{classes}{path.name}/")
        unit = SourceGroup("tar", str(path), top, prefix, stamp, classes=classes)
        yield from _inner_tars(unit) or (unit,)
    elif layout.why_no_image(path.name) in (None, layout.BY_PRODUCT):  # a hidden file that is named was meant
        folder = key.removesuffix(path.name)
        yield SourceGroup("files", str(path.parent), top, folder, stamp, ((path.name, size),), classes=classes)


def _inner_tars(unit: SourceGroup) -> list[SourceGroup]:
    """A unit for each tar in a tar that holds only tars (ImageNet's training tar); none for any other tar.

    `rows` lists tars that lie between images, in one process.
    """
    inner: list[SourceGroup] = []
    for name, offset, size in scan_tar(Path(unit.path)):
        if not name.lower().endswith(".tar") or not inside(name):
            return []
        if size >= 0 and not any(map(layout.is_by_product, name.split("/"))):
            below = f"{PurePosixPath(name).as_posix()}/"
            span = offset, offset + size
            inner.append(unit._replace(prefix=unit.prefix + below, classes=unit.classes + below, span=span))
    return inner


def _tar_members(path: Path, start: float, stop: float, notes: list[str]) -> Iterator[tuple[str, int, int]]:
    """Members of a tar and of the tars inside it."""
    for name, offset, size in scan_tar(path, int(start), stop, notes):
        if not name.lower().endswith(".tar") or size < 0:
            yield name, offset, size
        elif not any(map(layout.is_by_product, name.split("/"))):
            for inner, inner_offset, inner_size in scan_tar(path, offset, offset + size, notes):
                yield f"{name}/{inner}" if inside(inner) else inner, inner_offset, inner_size
