"""Which files of folders and tars may be images: source -> units (a folder's files, a tar) -> rows -> candidates.

Nothing is decoded here: a candidate is a place to read from, and whether an image lies there shows when it is opened.
A unit is what one process lists at a time, so twenty thousand tars are listed by all cores and never all at once.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple, NoReturn

import numpy as np

from beit_pretrain.data import cifar
from beit_pretrain.data.tars import OUTSIDE, REFUSED, inside, scan_tar
from beit_pretrain.errors import UserError
from beit_pretrain.transforms.image_io import MAX_PIXELS

NOT_IMAGES = re.compile(
    r"\.(txt|jsonl?|[ct]sv|xml|ya?ml|toml|ini|md|rst|html?|pdf|log|db|py|sh|cls|lst|idx|np[yz]|mat|h5|hdf5|pkl|pth?)"
    r"|\.(safetensors|parquet|zip|7z|rar|gz|bz2|xz|zst|mp[34]|wav|avi|mov|mkv)"
)
COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
# Names that data sets give to their held-out part. `split=` picks the part of a source that has some.
HELD_OUT = ("val", "validation", "valid", "test")
PARTS = {"train": ("train", "training"), **{name: (name, *HELD_OUT) for name in HELD_OUT}}


class Candidate(NamedTuple):
    """A source file that may be an image."""

    key: str  # path within the source; the name of the file if that is the source
    class_name: str | None
    path: str  # file that holds the bytes
    offset: int = 0
    size: int = -1  # bytes; -1 = the whole file; below: a key of tars.REFUSED
    kind: str = "file"  # or "synthetic" (image `offset` of the set), or "cifar" (raw pixels)
    mask: str = ""  # file of the label map


class SourceGroup(NamedTuple):
    """A part of a source that is listed as one."""

    kind: str  # "files" of one folder, "tar", "cifar" or "synthetic"
    path: str  # folder, or file
    top: str  # what its keys begin with: the source's name if there are several, the part that `split` picked
    prefix: str  # what comes next in its keys; says the class
    stamp: str  # changes when the files do
    files: tuple[tuple[str, int], ...] = ()  # names and sizes of "files"; the split of "cifar"
    span: tuple[int, float] = (0, math.inf)  # the bytes of a tar in `path`
    masks: str = ""  # folder of the label maps; images then have no class


class Rows(NamedTuple):
    """What a unit lists: names (after top and prefix), class names, offsets and sizes, one each, sorted by name."""

    names: list[str]
    classes: list[str | None]
    offsets: np.ndarray
    sizes: np.ndarray


def units(source: Path, top: str = "", split: str = "train", as_class: bool = False) -> Iterator[SourceGroup]:
    """The units of a folder or file, in an order that depends on names alone.

    `split` picks the part of a source that has parts of its own (folders train/ and val/, ADE20K, CIFAR-100).
    `as_class`: the source is a tar as if it lay in a folder of tars, so that its name is a class.
    Raises UserError for a source that does not exist or cannot be read.
    """
    _check_kind(source, "give a folder of class folders, a tar, or synthetic")
    if cifar.recognised(source):
        file = cifar.part_of(source, split)
        yield SourceGroup("cifar", str(file), top, "", _stamp(file), ((split, 0),))
    elif not source.is_dir():
        top = top.removesuffix(f"{source.name}/") if as_class else top  # which then begins its keys anyway
        yield from _file_units(source, source.name, top, alone=not as_class)
    elif (source / "manifest.json").is_file() and any(source.glob("*.index.npy")):
        raise UserError(f"src={source} is a shard folder already; shards index lists foreign shards, fit reads ours")
    elif (source / "images").is_dir() and (source / "annotations").is_dir():
        images, masks = (_part(source / name, split) or (source / name, "") for name in ("images", "annotations"))
        for unit in _folder_units(images[0], f"{top}images/{images[1]}"):
            folder = os.path.join(masks[0], unit.prefix)
            stamps = [unit.stamp, *(_stamp(mask_of(folder, name)) for name, _ in unit.files)]
            yield unit._replace(masks=folder, stamp=hashlib.sha256(" ".join(stamps).encode()).hexdigest())
    else:
        root, part = _part(source, split, nested=True) or (source, "")
        for unit in _folder_units(root, top + part):
            _refuse_label_maps(source, root, unit)
            yield unit


def mask_of(folder: str, name: str) -> Path:
    """Where the label map of an image lies."""
    return Path(folder, name).with_suffix(".png")


def rows(unit: SourceGroup) -> Rows:
    """The rows of a unit of kind "files" or "tar". Raises UserError for a damaged tar."""
    found: dict[str, tuple[int, int]] = {}  # the last of several members of one name counts, as when unpacking
    if unit.kind == "files":
        found = {name: (0, size) for name, size in unit.files}
    else:
        for name, offset, size in _tar_members(Path(unit.path), *unit.span):
            key = PurePosixPath(name).as_posix() if "./" in name or "//" in name else name
            if size == OUTSIDE or not (_ignored(key) or NOT_IMAGES.fullmatch(os.path.splitext(key)[1].lower())):
                found[key] = offset, size
    names = sorted(found)
    places = np.array([found[name] for name in names], np.int64).reshape(-1, 2)
    classes = [None if unit.masks or not inside(name) else _class_of(unit.prefix + name) for name in names]
    return Rows(names, classes, places[:, 0], places[:, 1])


def check_sources(sources: Sequence[str | Path]) -> None:
    """Raise UserError for a source that does not exist or seems to hold no image."""
    for source in (Path(source).expanduser() for source in sources if source != "synthetic"):
        if next(units(source), None) is None:
            raise UserError(f"src={source} holds no image; give a folder of class folders, a tar, or synthetic")


def list_images(src: str | Path) -> list[Candidate]:
    """What may be an image in `src`, an image file, a folder of any depth or a tar, by name. Raises UserError."""
    source, found = Path(src).expanduser(), list[Candidate]()
    advice = "give an image, a folder of images, or a tar"
    _check_kind(source, advice)
    for unit in _folder_units(source, "") if source.is_dir() else _file_units(source, source.name, "", alone=True):
        listed = rows(unit)
        for name, class_name, offset, size in zip(*listed, strict=True):
            path = os.path.join(unit.path, name) if unit.kind == "files" else unit.path
            found.append(Candidate(unit.prefix + name, class_name, path, int(offset), int(size)))
    if not found:
        raise UserError(f"src={source} holds no image; {advice}")
    return sorted(found, key=lambda c: c.key)


def _check_kind(source: Path, advice: str) -> None:
    """Raise UserError for a source that is neither a folder nor a file: a pipe would be waited for without end."""
    if not os.path.exists(source):
        raise UserError(f"src={source} does not exist; {advice}")
    if not source.is_dir() and not source.is_file():
        raise UserError(f"src={source} is a pipe or a device; {advice}")


def _refuse_label_maps(source: Path, root: Path, unit: SourceGroup) -> None:
    """Raise UserError for a unit of ADE20K's layout somewhere below the source: label maps would count as photos."""
    above, found, _ = f"/{unit.prefix}".partition("/annotations/")
    folder = Path(root, above[1:])
    if found and (folder / "images").is_dir() and any(name.lower().endswith(".png") for name, _ in unit.files):
        said = f"give src={folder}, or for the photos alone src={folder / 'images'}"
        raise UserError(f"src={source}: {folder / 'annotations'} holds label maps, no photos; {said}")


def read_candidate(candidate: Candidate, max_pixels: int = MAX_PIXELS) -> bytes:
    """The bytes of a candidate in a file or tar.

    Raises OSError if they cannot be read or are fewer than was listed, ValueError if these are more than an image of
    `max_pixels` could have, or no plain file's.
    """
    if candidate.size in REFUSED:
        raise ValueError(REFUSED[candidate.size])
    size = candidate.size if candidate.size >= 0 else os.path.getsize(candidate.path)
    if size > 16 * max_pixels + 2**20:  # a film or a disk image, say: not to be read into memory
        raise ValueError(f"{size} bytes are too many for an image of max_pixels={max_pixels}")
    data = read_bytes(candidate.path, candidate.offset, size)
    if len(data) < size:
        raise OSError("it has become shorter since it was listed")
    return data


def read_bytes(path: str | Path, offset: int, size: int) -> bytes:
    """`size` bytes of a file from `offset` on."""
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(size)


def _part(root: Path, split: str, nested: bool = False) -> tuple[Path, str] | None:
    """The part of a folder that `split` means, and its key prefix; None if the folder is not divided in parts.

    It is if it has `train` (or `training`) and a name of `HELD_OUT`; with `nested`, `train` must hold folders or tars:
    train and test may be classes. Raises UserError if it is, but not into what `split` says.
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
    """The units of a folder tree. Of compressed tars beside them (ImageNet's devkit, say) a warning tells.

    Raises UserError if there is nothing but compressed tars.
    """
    compressed: list[Path] = []
    some = False
    for folder, prefix, names in _folders(root):
        files: list[tuple[str, int]] = []
        stamp = hashlib.sha256()
        for name in names:
            path = Path(folder, name)
            if _compressed(path):
                compressed.append(path)
            elif path.suffix.lower() == ".tar":
                some = True
                yield from _file_units(path, prefix + name, top)
            elif not NOT_IMAGES.fullmatch(path.suffix.lower()):
                text, size = _stamp(path), _size(path)
                files.append((name, size))
                stamp.update(f"{name}\0{text}\0".encode(errors="surrogateescape"))
        if files:
            some = True
            yield SourceGroup("files", folder, top, prefix, stamp.hexdigest(), tuple(files))
    if compressed:
        first = min(compressed)
        if not some:
            _refuse_compressed(first)
        more = f" and {len(compressed) - 1} more" if len(compressed) > 1 else ""
        print(f"warning: left out {first}{more}: compressed tars; decompress what holds images", file=sys.stderr)


def _folders(root: Path) -> Iterator[tuple[str, str, list[str]]]:
    """Yield path, key prefix and sorted names of the files of every folder in a tree that is not hidden.

    Linked folders come after real ones and none is read twice, so loops end.
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
            # scandir knows files from folders without a call per file, which counts on network file systems.
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(f"cannot read the folder {folder}: {error.strerror}") from None
        names, inner = list[str](), list[tuple[str, str]]()
        for entry in (entry for entry in entries if not _ignored(entry.name)):
            linked = entry.is_symlink()
            if os.path.isdir(entry.path) if linked else entry.is_dir():
                (links if linked else inner).append((entry.path, f"{prefix}{entry.name}/"))
            elif entry.is_file(follow_symlinks=False) or (linked and not _special(entry.path)):
                names.append(entry.name)
        yield folder, prefix, names
        folders += reversed(inner)


def _special(path: str) -> bool:
    """Whether a link leads to a pipe or a device. One that leads nowhere does not: it is to be listed as rejected."""
    return os.path.exists(path) and not os.path.isfile(path)


def _stamp(path: Path) -> str:
    """Size and time of change of a file; "-" where there is none."""
    status = _status(path)
    return f"{status.st_size}:{status.st_mtime_ns}" if status else "-"


def _size(path: Path) -> int:
    """Bytes of a file, -1 of a link that leads nowhere. Raises UserError for a file that is no longer there."""
    if (status := _status(path)) is not None:
        return status.st_size
    if not path.is_symlink():
        raise UserError(f"{path} has gone while it was listed")
    return -1


def _status(path: Path) -> os.stat_result | None:
    """What the system says of a file; None where there is none, or a link that leads nowhere. Raises UserError."""
    try:
        return path.stat()
    except OSError as error:
        if isinstance(error, FileNotFoundError | NotADirectoryError) or path.is_symlink():
            return None
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _file_units(path: Path, key: str, top: str, alone: bool = False) -> Iterator[SourceGroup]:
    """The units of one file; `key` is its path within the source folder, or its name if it is the source (`alone`)."""
    if _compressed(path):
        _refuse_compressed(path)
    if path.suffix.lower() == ".tar":
        unit = SourceGroup("tar", str(path), top, "" if alone else f"{key}/", _stamp(path))
        yield from _inner_tars(unit) or (unit,)
    elif not NOT_IMAGES.fullmatch(path.suffix.lower()):
        prefix = key.removesuffix(path.name)
        yield SourceGroup("files", str(path.parent), top, prefix, _stamp(path), ((path.name, _size(path)),))


def _inner_tars(unit: SourceGroup) -> list[SourceGroup]:
    """The tars in a tar of nothing but tars (ImageNet's training tar), each a unit; none if it is another tar.

    Tars between images are listed by `rows`, which one process does.
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


def _compressed(path: Path) -> bool:
    return path.name.lower().endswith(COMPRESSED_TARS)


def _refuse_compressed(path: Path) -> NoReturn:
    raise UserError(f"{path} is compressed, which allows no random access; decompress it first, or move it away")


def _ignored(key: str) -> bool:
    """Whether a file or one of its folders is hidden, or (`._x`, `__MACOSX`) a macOS archive's by-product."""
    return any((part[:1] == "." and part != ".") or part == "__MACOSX" for part in key.split("/"))


def _class_of(key: str) -> str | None:
    """The name of the folder that holds the file, or of the tar in a folder (or tar) of tars."""
    return key.rpartition("/")[0].rpartition("/")[2].removesuffix(".tar") or None
