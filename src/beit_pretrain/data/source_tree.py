"""Walks the folders of a source, on disk or in a tar, and keeps the files that may be images (rules: layout.py)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

from beit_pretrain.data import label_map_names, layout
from beit_pretrain.data.left_out import LeftOut
from beit_pretrain.errors import UserError
from beit_pretrain.transforms.image_io import HEAD, IMAGE_EXTENSIONS, starts_as_image

LOOKED_INTO = 64  # folders, to find out what a folder beside others holds
DIRECTORY, LINKED, FILE = "directory", "linked", "file"


class Folder(NamedTuple):
    """A folder with the files that are kept. Paths end with a slash, or are empty."""

    path: str  # below the tree's root
    part: str  # how much of it names the part of the set that was picked at the top
    classes: str  # the path without the names of parts: folders that may name the class
    names: list[str]
    of_parts: bool  # the names of its tars are those of parts


class _Place(NamedTuple):
    """A folder to walk through."""

    path: str = ""
    part: str = ""
    classes: str = ""
    beside: tuple[str, ...] = ()  # folders of photos next to it


class Tree(Protocol):
    """Folders and files by their paths below a root ("" or ending with a slash)."""

    one_image_per_key: bool  # as in WebDataset's tars

    def entries(self, path: str) -> list[tuple[str, str]]:
        """(name, DIRECTORY, LINKED or FILE) of everything in a folder, sorted. Raises UserError."""

    def identity(self, path: str) -> object:
        """The same for two paths if they lead to the same folder; None: it does not exist."""

    def head(self, path: str) -> bytes:
        """The first bytes of a file; empty if it cannot be read."""


class DiskTree:
    """A folder on disk."""

    one_image_per_key = False

    def __init__(self, root: Path):
        self.root = str(root)

    def entries(self, path: str) -> list[tuple[str, str]]:
        try:
            # scandir needs no call per file to tell files from folders, which is faster on network file systems.
            found = sorted(os.scandir(os.path.join(self.root, path)), key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(f"cannot read the folder {os.path.join(self.root, path)}: {error.strerror}") from None
        return [(entry.name, _kind(entry)) for entry in found]

    def identity(self, path: str) -> object:
        try:
            status = os.stat(os.path.join(self.root, path))
        except OSError as error:
            raise UserError(f"cannot read the folder {os.path.join(self.root, path)}: {error.strerror}") from None
        return status.st_dev, status.st_ino

    def head(self, path: str) -> bytes:
        try:
            with open(os.open(os.path.join(self.root, path), os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
                return file.read(HEAD)
        except OSError:
            return b""


def _kind(entry: os.DirEntry) -> str:
    if entry.is_symlink():
        return LINKED if os.path.isdir(entry.path) else FILE
    return DIRECTORY if entry.is_dir() else FILE


class NamesTree:
    """The members of a tar, by their names."""

    one_image_per_key = True

    def __init__(self, names: Iterable[str]):
        self.folders: dict[str, dict[str, str]] = {"": {}}
        for name in names:
            folder, _, file = name.rpartition("/")
            folder += "/" if folder else ""
            self._folder(folder)[file] = FILE

    def _folder(self, path: str) -> dict[str, str]:
        if path not in self.folders:
            above, _, name = path[:-1].rpartition("/")
            self._folder(above + "/" if above else "")[name] = DIRECTORY
            self.folders[path] = {}
        return self.folders[path]

    def entries(self, path: str) -> list[tuple[str, str]]:
        return sorted(self.folders.get(path, {}).items())

    def identity(self, path: str) -> object:
        return path

    def head(self, path: str) -> bytes:
        return b""


def walk(
    tree: Tree, split: str | None, left_out: LeftOut, top: str = "", image_key: Sequence[str] = (), source: str = ""
) -> Iterator[Folder]:
    """Yield the folders of a tree, each with its files that may be images. What is left out goes into `left_out`.

    Linked folders come after real ones, and no folder is read twice, so that loops of links end.

    Args:
        split: part to read where folders are parts; None = everything.
        top: start of the keys in `left_out`.
        image_key: extensions, of which the first is read of files that differ by their extension alone.
        source: for messages.
    Raises UserError if a folder cannot be read, or a source with parts does not have `split`.
    """
    seen: set[object] = set()
    folders, links = [_Place()], list[_Place]()
    while folders or links:
        here = folders.pop() if folders else links.pop(0)
        path = here.path
        if (identity := tree.identity(path)) in seen:
            continue
        seen.add(identity)
        kinds = dict(tree.entries(path))
        for name in [name for name in kinds if layout.is_by_product(name)]:
            slash = "" if kinds.pop(name) == FILE else "/"
            left_out.add(f"{top}{path}{name}{slash}", layout.BY_PRODUCT, folder=top + path)
        inner = [name for name, kind in kinds.items() if kind != FILE]
        files = [name for name, kind in kinds.items() if kind == FILE]
        parts = _parts(inner, files) if split is not None else {}
        if parts:
            assert split is not None
            inner, files = _picked(tree, path, parts, split, inner, files, left_out, top, source)
        maps = label_map_names.map_folders(path, inner, partial(_first_images, tree, start=path), here.beside)
        for name in maps.found:
            left_out.add(f"{top}{path}{name}/", layout.MAP)
        for name in maps.doubtful:
            left_out.note(f"{top}{path}{name}/", layout.MAYBE_MAPS)
        inner = sorted({*inner}.difference(maps.found))
        kept = _kept(tree, path, files, left_out, top, image_key)
        yield Folder(path, here.part, here.classes, kept, bool(parts))
        photos = tuple(f"{path}{name}" for name in inner if layout.says_photos(name))
        below = {
            name: _Place(
                f"{path}{name}/",
                f"{path}{name}/" if parts and not path else here.part,
                here.classes if parts else f"{here.classes}{name}/",
                photos if name not in photos else (),
            )
            for name in inner
        }
        folders += [place for name, place in below.items() if kinds[name] == DIRECTORY][::-1]
        links += [place for name, place in below.items() if kinds[name] == LINKED]


def _parts(folders: list[str], files: list[str]) -> dict[str, str]:
    """The parts among the folders, or else among folders and tars, with what they are."""
    if parts := layout.parts_of(folders):
        return parts
    tars = {name.rpartition(".")[0]: name for name in files if name.lower().endswith(".tar")}
    parts = layout.parts_of([*folders, *tars]) if tars else {}
    return {name if name in folders else tars[name]: role for name, role in parts.items()}


def _picked(
    tree: Tree,
    path: str,
    parts: dict[str, str],
    split: str,
    inner: list[str],
    files: list[str],
    left_out: LeftOut,
    top: str,
    source: str,
) -> tuple[list[str], list[str]]:
    """Folders and tars of a folder with parts that are read: those of the split."""
    try:
        picked = layout.of_split(parts, split)
    except UserError as error:
        raise UserError(f"{os.path.join(source, path).rstrip('/')} {error}") from None
    read = {parts[name] for name in picked}
    for name in [name for name in (*inner, *files) if name not in picked]:
        if parts.get(name, next(iter(read))) not in read:
            why: str | None = layout.OTHER_PART
        elif name in files:
            why = layout.why_no_image(name) or (layout.BESIDE if _may_be_image(tree, path + name) else layout.NO_IMAGE)
        else:
            why = layout.BESIDE if name in parts or _first_images(tree, path + name)[1] else None
        if why is not None:
            left_out.add(f"{top}{path}{name}{'/' if name in inner else ''}", why)
    return [name for name in inner if name in picked], [name for name in files if name in picked]


def _may_be_image(tree: Tree, path: str) -> bool:
    """Whether a file is a tar or an image, by its extension or else its first bytes."""
    return layout.stem_of(path)[1] in {*IMAGE_EXTENSIONS, "tar"} or starts_as_image(tree.head(path))


def map_folders_of(members: Iterable[str]) -> set[str]:
    """The folders of label maps among the members of a tar, and the folders in them. Paths end with a slash."""
    tree = NamesTree(name for name in members if "/" in name)
    found: set[str] = set()
    for path, entries in tree.folders.items():  # a folder comes before those in it
        inner = sorted(name for name, kind in entries.items() if kind == DIRECTORY)
        if inner and path in found:
            found |= {f"{path}{name}/" for name in inner}
        elif inner:
            maps = label_map_names.map_folders(path, inner, partial(_first_images, tree, start=path))
            found |= {f"{path}{name}/" for name in maps.found}
    return found


def other_image_folders(tree: Tree, known: Sequence[str]) -> list[str]:
    """Folders at the top of a tree that hold images, besides the known ones."""
    folders = [name for name, kind in tree.entries("") if kind != FILE and not layout.is_by_product(name)]
    return [name for name in folders if name not in known and _first_images(tree, name)[1]]


def _first_images(tree: Tree, place: str, start: str = "") -> tuple[str, list[str]]:
    """Path and image names of the first folder with images at or below a place; of `start` only those in itself."""
    waiting, seen = [f"{place}/" if place and not place.endswith("/") else place], 0
    while waiting and seen < LOOKED_INTO:
        folder = waiting.pop()
        seen += 1
        try:
            entries = tree.entries(folder)
        except UserError:
            return "", []
        if found := [n for n, kind in entries if kind == FILE and layout.stem_of(n)[1] in IMAGE_EXTENSIONS]:
            return folder.removesuffix("/"), found
        if folder != start:
            inner = [name for name, kind in entries if kind == DIRECTORY and not layout.is_by_product(name)]
            waiting += [f"{folder}{name}/" for name in inner[:LOOKED_INTO][::-1]]
    return "", []


def _kept(tree: Tree, path: str, files: list[str], left_out: LeftOut, top: str, image_key: Sequence[str]) -> list[str]:
    """The files of a folder that may be images."""
    dropped = {name: why for name in files if (why := layout.why_no_image(name))}
    rest = [name for name in files if name not in dropped]
    if image_key:  # says which files are images where some differ by extensions alone, dotted ones too
        chosen = {subject for name in rest if (subject := _keyed(name, image_key))}
        dropped |= {name: layout.FURTHER for name in rest if not _keyed(name, image_key) and _stems(name) & chosen}
    maps = label_map_names.maps_among([name for name in rest if name not in dropped])
    dropped |= {name: layout.MAP for name in maps.found if not _keyed(name, image_key)}
    for name in maps.doubtful:
        if not _keyed(name, image_key):
            left_out.note(f"{top}{path}{name}", layout.MAYBE_MAPS)
    for first, others in label_map_names.twins([name for name in rest if name not in dropped], image_key).items():
        for other in others:
            if tree.one_image_per_key or image_key:
                dropped[other] = layout.FURTHER
            elif label_map_names.is_lossy(first) and label_map_names.is_grey_png(tree.head(path + other)):
                dropped[other] = layout.MAP
            else:
                left_out.note(f"{top}{path}{other}", layout.BOTH_READ)
    for name, why in dropped.items():
        left_out.add(f"{top}{path}{name}", why)
    return [name for name in files if name not in dropped]


def _keyed(name: str, image_key: Sequence[str]) -> str | None:
    """The name without the first extension of `image_key` that it has; None if it has none of them."""
    return next((name[: -len(key) - 1] for key in image_key if name.lower().endswith(f".{key}")), None)


def _stems(name: str) -> set[str]:
    """All starts of a name that end before a dot."""
    parts = name.split(".")
    return {".".join(parts[:n]) for n in range(1, len(parts))}
