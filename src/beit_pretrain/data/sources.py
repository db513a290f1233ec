"""Lists files of folders and tars that may be images: source -> units (a folder's files, a tar) -> rows -> candidates.

Nothing is decoded here: a candidate is a file, or part of one, that may hold an image. One process lists one unit at a
time, so that all cores share the work on twenty thousand tars.
"""

from __future__ import annotations

import hashlib
import math
import os
import stat
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from beit_pretrain.data import cifar
from beit_pretrain.data.tars import OUTSIDE, REFUSED, inside, scan_tar
from beit_pretrain.errors import UserError
from beit_pretrain.transforms.image_io import MAX_PIXELS

NOT_IMAGES = tuple(
    ".txt .json .jsonl .csv .tsv .xml .yaml .yml .toml .ini .md .rst .htm .html .pdf .log .db .py .sh .cls .lst .idx "
    ".npy .npz .mat .h5 .hdf5 .pkl .pt .pth .safetensors .parquet .zip .7z .rar .gz .bz2 .xz .zst .mp3 .mp4 .wav .avi "
    ".mov .mkv".split()
)
COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
COMPRESSED = "is compressed, which allows no random access; decompress it first"
# Usual folder names of held-out parts. `split=` picks a part of a source that has parts.
HELD_OUT = ("val", "validation", "valid", "test")
PARTS = {"train": ("train", "training"), **{name: (name, *HELD_OUT) for name in HELD_OUT}}
ADVICE = "give a folder of class folders, a tar, or synthetic"
Row = tuple[str, str | None, int, int]  # of a unit: name (after top and prefix), class name, offset and size in bytes


class Candidate(NamedTuple):
    """A source file that may be an image."""

    key: str  # path within the source; the name of the file if that is the source
    class_name: str | None
    path: str  # file that holds the bytes
    offset: int = 0
    size: int = -1  # bytes; -1 = the whole file; below -1: a key of tars.REFUSED
    kind: str = "file"  # or "synthetic" (image `offset` of the set), or "cifar" (raw pixels)
    mask: str = ""  # file of the label map


class SourceGroup(NamedTuple):
    """A unit: a part of a source that one process lists."""

    kind: str  # "files" of one folder, "tar", "cifar" or "synthetic"
    path: str  # folder, or file
    top: str  # start of its keys: the source's name if there are several, and the part that `split` picked
    prefix: str  # next part of its keys; contains the class name
    stamp: str  # changes when the files change
    files: tuple[tuple[str, int], ...] = ()  # names and sizes of "files"; the split of "cifar"
    span: tuple[int, float] = (0, math.inf)  # the bytes of a tar in `path`
    masks: str = ""  # folder of the label maps; images then have no class


def units(source: Path, top: str = "", split: str = "train", as_class: bool = False) -> Iterator[SourceGroup]:
    """The units of a folder or file, in an order that depends only on names.

    `split` picks a part of a source with parts (folders train/ and val/, ADE20K, CIFAR-100).
    `as_class`: treat a tar as one in a folder of tars: its name is a class.
    Raises UserError if the source does not exist or cannot be read.
    """
    _check_kind(source, ADVICE)
    if cifar.recognised(source):
        file = cifar.part_of(source, split)
        yield SourceGroup("cifar", str(file), top, "", _stat(file)[1], ((split, 0),))
    elif not source.is_dir():
        top = top.removesuffix(f"{source.name}/") if as_class else top  # then the prefix contains the name
        yield from _file_units(source, source.name, top, alone=not as_class)
    elif (source / "manifest.json").is_file() and any(source.glob("*.index.npy")):
        raise UserError(f"src={source} is a shard folder already; shards index lists foreign shards, fit reads ours")
    elif (source / "images").is_dir() and (source / "annotations").is_dir():
        images, masks = (_part(source / name, split) or (source / name, "") for name in ("images", "annotations"))
        for unit in _folder_units(images[0], f"{top}images/{images[1]}"):
            folder = os.path.join(masks[0], unit.prefix)
            masks_of = (Path(folder, name).with_suffix(".png") for name, _ in unit.files)
            stamps = [unit.stamp, *(_stat(mask, may_lack=True)[1] for mask in masks_of)]
            yield unit._replace(masks=folder, stamp=hashlib.sha256(" ".join(stamps).encode()).hexdigest())
    else:
        root, part = _part(source, split, nested=True) or (source, "")
        for unit in _folder_units(root, top + part):
            _refuse_label_maps(source, root, unit)
            yield unit


def rows(unit: SourceGroup) -> list[Row]:
    """The rows of a unit of kind "files" or "tar", sorted by name. Raises UserError for a damaged tar."""
    found: dict[str, tuple[int, int]] = {}  # of several members of one name the last counts, as in unpacking
    if unit.kind == "files":
        found = {name: (0, size) for name, size in unit.files}
    else:
        for name, offset, size in _tar_members(Path(unit.path), *unit.span):
            key = PurePosixPath(name).as_posix() if "./" in name or "//" in name else name
            if size == OUTSIDE or not (_ignored(key) or key.lower().endswith(NOT_IMAGES)):
                found[key] = offset, size
    return [(name, _class_of(unit, name), *place) for name, place in sorted(found.items())]


def candidate_of(unit: SourceGroup, row: Row) -> Candidate:
    name, class_name, offset, size = row
    path = os.path.join(unit.path, name) if unit.kind == "files" else unit.path
    kind = unit.kind if unit.kind in ("cifar", "synthetic") else "file"
    mask = str(Path(unit.masks, name).with_suffix(".png")) if unit.masks else ""
    return Candidate(unit.top + unit.prefix + name, class_name, path, offset, size, kind, mask)


def check_sources(sources: Sequence[str | Path]) -> None:
    """Raise UserError for a source that does not exist or has no possible image."""
    for source in (Path(source).expanduser() for source in sources if source != "synthetic"):
        if next(units(source), None) is None:
            raise UserError(f"src={source} holds no image; {ADVICE}")


def list_images(src: str | Path) -> list[Candidate]:
    """The possible images in `src`, an image file, a folder of any depth or a tar, sorted by name. Raises UserError."""
    source, advice = Path(src).expanduser(), "give an image, a folder of images, or a tar"
    _check_kind(source, advice)
    listed = _folder_units(source, "") if source.is_dir() else _file_units(source, source.name, "", alone=True)
    found = [candidate_of(unit, row) for unit in listed for row in rows(unit)]
    if not found:
        raise UserError(f"src={source} holds no image; {advice}")
    return sorted(found, key=lambda candidate: candidate.key)


def read_candidate(candidate: Candidate, max_pixels: int = MAX_PIXELS) -> bytes:
    """The bytes of a candidate in a file or tar.

    Raises OSError if they cannot be read or the file has become shorter, ValueError if the candidate is not a plain
    file or is larger than an image of `max_pixels` can be.
    """
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
        raise UserError(f"src={source} {fault}; {advice}")


def _refuse_label_maps(source: Path, root: Path, unit: SourceGroup) -> None:
    """Raise UserError for label maps in ADE20K's layout somewhere below the source: they would count as photos."""
    above, found, _ = f"/{unit.prefix}".partition("/annotations/")
    folder = Path(root, above[1:])
    if found and (folder / "images").is_dir() and any(name.lower().endswith(".png") for name, _ in unit.files):
        said = f"give src={folder}, or for the photos alone src={folder / 'images'}"
        raise UserError(f"src={source}: {folder / 'annotations'} holds label maps, no photos; {said}")


def _part(root: Path, split: str, nested: bool = False) -> tuple[Path, str] | None:
    """The part of a folder that `split` picks, and its key prefix; None if the folder has no parts.

    A folder has parts if it holds `train` (or `training`) and a name of `HELD_OUT`. With `nested`, `train` must also
    hold folders or tars, since train and test may be class names. Raises UserError if there is no part `split`.
    """
    train = next((name for name in PARTS["train"] if (root / name).is_dir()), None)
    held_out = [name for name in HELD_OUT if (root / name).is_dir()]
    if train is None or not held_out:
        return None
    if nested and not any(e.is_dir() or e.name.endswith(".tar") for e in os.scandir(root / train)):
        return None
    for name in PARTS.get(split, (split,)):
        if (root / name).is_dir():
            return root / name, f"{name}/"
    raise UserError(f"src={root} has the parts {', '.join([train, *held_out])}; split={split} is none of them")


def _folder_units(root: Path, top: str) -> Iterator[SourceGroup]:
    """The units of a folder tree. Compressed tars (such as ImageNet's devkit) are left out with a warning.

    Raises UserError if there are only compressed tars.
    """
    compressed: list[Path] = []
    some = False
    for folder, prefix, names in _folders(root):
        files: list[tuple[str, int]] = []
        digest = hashlib.sha256()
        for name in names:
            packed = name.lower().endswith(COMPRESSED_TARS)
            if name.lower().endswith(NOT_IMAGES) and not packed:
                continue
            path = Path(folder, name)
            size, stamp = _stat(path)
            if not stamp:  # a pipe or a device
                continue
            if packed:
                compressed.append(path)
            elif path.suffix.lower() == ".tar":
                some = True
                yield from _file_units(path, prefix + name, top)
            else:
                files.append((name, size))
                digest.update(f"{name}\0{stamp}\0".encode(errors="surrogateescape"))
        if files:
            some = True
            yield SourceGroup("files", folder, top, prefix, digest.hexdigest(), tuple(files))
    if not some and compressed:
        raise UserError(f"{min(compressed)} {COMPRESSED}, or move it away")
    if compressed:
        more = f" and {len(compressed) - 1} more" if len(compressed) > 1 else ""
        said = f"left out {min(compressed)}{more}: compressed tars; decompress what holds images"
        print(f"warning: {said}", file=sys.stderr)


def _folders(root: Path) -> Iterator[tuple[str, str, list[str]]]:
    """Yield path, key prefix and sorted file names of every folder in a tree that is not hidden.

    Linked folders come after real ones, and no folder is read twice, so that loops of links end.
    """
    seen: set[tuple[int, int]] = set()
    folders, links = [(str(root), "")], list[tuple[str, str]]()
    while folders or links:
        folder, prefix = folders.pop() if folders else links.pop(0)
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            # scandir needs no call per file to tell files from folders, which is faster on network file systems.
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(f"cannot read the folder {folder}: {error.strerror}") from None
        names, inner = list[str](), list[tuple[str, str]]()
        for entry in (entry for entry in entries if not _ignored(entry.name)):
            linked = entry.is_symlink()
            if os.path.isdir(entry.path) if linked else entry.is_dir():
                (links if linked else inner).append((entry.path, f"{prefix}{entry.name}/"))
            else:
                names.append(entry.name)
        yield folder, prefix, names
        folders += reversed(inner)


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


def _file_units(path: Path, key: str, top: str, alone: bool = False) -> Iterator[SourceGroup]:
    """The units of one file. `key` is its path in the source folder, or its name if it is the source (`alone`)."""
    if path.name.lower().endswith(COMPRESSED_TARS):
        raise UserError(f"{path} {COMPRESSED}, or move it away")
    size, stamp = _stat(path)
    if path.suffix.lower() == ".tar":
        unit = SourceGroup("tar", str(path), top, "" if alone else f"{key}/", stamp)
        yield from _inner_tars(unit) or (unit,)
    elif not path.name.lower().endswith(NOT_IMAGES):
        yield SourceGroup("files", str(path.parent), top, key.removesuffix(path.name), stamp, ((path.name, size),))


def _inner_tars(unit: SourceGroup) -> list[SourceGroup]:
    """A unit for each tar in a tar that holds only tars (ImageNet's training tar); none for any other tar.

    `rows` lists tars that lie between images, in one process.
    """
    inner: list[SourceGroup] = []
    for name, offset, size in scan_tar(Path(unit.path)):
        if not name.lower().endswith(".tar") or not inside(name):
            return []
        if size >= 0 and not _ignored(name):
            key = f"{unit.prefix}{PurePosixPath(name).as_posix()}/"
            inner.append(unit._replace(prefix=key, span=(offset, offset + size)))
    return inner


def _tar_members(path: Path, start: float, stop: float) -> Iterator[tuple[str, int, int]]:
    """Members of a tar and of the tars inside it."""
    for name, offset, size in scan_tar(path, int(start), stop):
        if not name.lower().endswith(".tar") or size < 0:
            yield name, offset, size
        elif not _ignored(name):
            for inner, inner_offset, inner_size in scan_tar(path, offset, offset + size):
                yield f"{name}/{inner}" if inside(inner) else inner, inner_offset, inner_size


def _ignored(key: str) -> bool:
    """Whether a file or one of its folders is hidden, or created by macOS (`._x`, `__MACOSX`)."""
    return any((part[:1] == "." and part != ".") or part == "__MACOSX" for part in key.split("/"))


def _class_of(unit: SourceGroup, name: str) -> str | None:
    """The name of the folder that holds the file, or of the tar in a folder (or tar) of tars."""
    if unit.masks or not inside(name):
        return None
    return (unit.prefix + name).rpartition("/")[0].rpartition("/")[2].removesuffix(".tar") or None
