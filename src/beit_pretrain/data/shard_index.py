"""The index of a WebDataset tar: which members are images, label maps and classes, and which belong together."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from beit_pretrain.data import label_map_names, layout
from beit_pretrain.data.left_out import LeftOut
from beit_pretrain.data.source_tree import map_folders_of
from beit_pretrain.data.sources import read_bytes
from beit_pretrain.data.tars import REFUSED, scan_tar
from beit_pretrain.errors import UserError
from beit_pretrain.transforms.image_io import HEAD, IMAGE_EXTENSIONS, starts_as_image

EMPTY = "an empty image"
INNER_TAR = "a tar in a tar, which shards make reads"
NO_IMAGE_IN_SAMPLE = "a sample without an image"
NUMBERS = re.compile(r"((?:\d[^.]*\.)*\d[^.]*)\.")  # parts of an extension that begin with a digit
MOST_CLASSES = 1_000_000  # largest number of classes; each has a name in the manifest
# Offsets and sizes in bytes, from the start of the tar to the member's data. label -1: no class; size 0: no mask.
INDEX_DTYPE = np.dtype(
    [("image_offset", "<u8"), ("image_size", "<u8"), ("label", "<i8")]
    + [("segmentation_offset", "<u8"), ("segmentation_size", "<u8")]
)


def index_shard(path: str | Path, image_key: Sequence[str] = ()) -> np.ndarray:
    """The index of a WebDataset tar: INDEX_DTYPE rows of the samples with an image, in the tar's order.

    `image_key`: as of `scan_shard`. Raises UserError if the tar cannot be read or a `.cls` holds no class number.
    """
    return scan_shard(Path(path), image_key, LeftOut())


def scan_shard(path: Path, image_key: Sequence[str], left_out: LeftOut, tar: str | None = None) -> np.ndarray:
    """`index_shard`; what is left out goes into `left_out`, under the name `tar`, or the path's.

    As in WebDataset, a sample's key is the path up to the first dot of the file name, but numbers after it belong to
    the key if no member has the bare one (`scan.0001.jpg`, `scan.0002.jpg`). The last part of the extension gives the
    member's kind (`k.input.jpg` is an image, `k.target.cls` a class), but a plain extension (`k.jpg`) has priority. Of
    several images `label_map_names.image_rank` chooses, by `image_key` (extensions) if it is given. A repeated member
    of a key starts a new sample. Label maps with keys of their own (`masks/k.png`, `k_mask.png`) are left out.
    """
    notes: list[str] = []
    members = [(name, (offset, size), size) for name, offset, size in scan_tar(path, notes=notes)]
    for text in notes:
        left_out.note(tar or path.name, text)
    folders = map_folders_of(name for name, _, _ in members)
    maps = _keys_of_maps(keys_of(name for name, _, _ in members))
    samples = gather(
        tar or str(path),
        members,
        lambda place, most: read_bytes(path, place[0], min(place[1], most)),
        image_key,
        left_out,
        lambda key, name: key in maps or name[: name.rfind("/") + 1] in folders,
    )
    rows = [(*s.places.get("image", (0, 0)), s.label, *s.places.get("seg.png", (0, 0))) for s in samples]
    return np.array([row for row in rows if row[1]], INDEX_DTYPE)


class SampleMembers:
    """The members of one sample that count."""

    def __init__(self, key: str, first: str):
        self.key = key
        self.first = first  # name of its first member, in messages
        self.label = -1
        self.places: dict[str, Any] = {}  # of its "image", "seg.png" and "cls"
        self.ranks: dict[str, tuple[int, ...]] = {}  # of the member taken so far, by kind
        self.extensions: set[str] = set()
        self.images = 0


def keys_of(names: Iterable[str]) -> list[tuple[str, str]]:
    """Key and extension of members, by their names, as `scan_shard` explains."""
    split = [layout.split_key(name) for name in names]
    bare = {key for key, extension in split if "." not in extension}
    for place, (key, extension) in enumerate(split):
        if key not in bare and (number := NUMBERS.match(extension)):
            split[place] = f"{key}.{number[1]}", extension[number.end() :]
    return split


def gather(
    where: str,
    members: Sequence[tuple[str, Any, int]],
    read: Callable[[Any, int], bytes],
    image_key: Sequence[str],
    left_out: LeftOut,
    is_map: Callable[[str, str], bool],
) -> list[SampleMembers]:
    """The samples among the members of a tar, or of a part of it; also those without an image.

    Args:
        where: the tar, for messages.
        members: name, place and size of each; a negative size says why it must not be read (`tars.REFUSED`).
        read: (place, most) -> the first bytes of a member, at most so many.
        image_key, left_out: as of `scan_shard`.
        is_map: (key, name) -> whether an image is a label map of another key.

    Raises UserError if a `.cls` holds no class number.
    """
    tar = where.rpartition("/")[2]
    samples: list[SampleMembers] = []
    of_key: dict[str, SampleMembers] = {}  # the last sample of a key
    for (key, extension), (name, place, size) in zip(keys_of(name for name, _, _ in members), members, strict=True):
        kind = _kind(name, extension, size, partial(read, place))
        if kind == "image" and is_map(key, name):
            kind = layout.MAP
        if kind not in ("image", "seg.png", "cls"):
            left_out.add(f"{tar}/{name}", kind, folder=tar)
            continue
        if key not in of_key or extension in of_key[key].extensions:
            of_key[key] = SampleMembers(key, f"{tar}/{name}")
            samples.append(of_key[key])
        sample = of_key[key]
        rank = label_map_names.image_rank(extension, image_key) if kind == "image" else (extension != kind,)
        if kind == "image":
            sample.images += 1
        if rank is not None and (kind not in sample.ranks or rank < sample.ranks[kind]):
            sample.ranks[kind] = rank
            if kind == "cls":
                sample.label = _class_number(where, name, read(place, 100))
            elif size:
                sample.places[kind] = place
            else:
                sample.places.pop(kind, None)
        sample.extensions.add(extension)
    for sample in samples:
        further = sample.images - ("image" in sample.ranks)
        if further:
            left_out.add(sample.first, layout.FURTHER, further, tar)
        if "image" not in sample.places:
            left_out.add(sample.first, EMPTY if "image" in sample.ranks else NO_IMAGE_IN_SAMPLE, folder=tar)
    return samples


def _keys_of_maps(members: Iterable[tuple[str, str]]) -> set[str]:
    """The keys, among (key, extension), of which the last words say label maps of another key (`k_mask`)."""
    names: dict[str, dict[str, str]] = {}
    for key, extension in members:
        if extension in IMAGE_EXTENSIONS:
            folder, slash, stem = key.rpartition("/")
            names.setdefault(folder + slash, {})[f"{stem}.{extension}"] = key
    return {of[name] for of in names.values() for name in label_map_names.maps_among(of).found}


def key_of(name: str) -> str:
    """The key of a sample by the name of its image: without the extension, with numbers after the first dot."""
    key, extension = layout.split_key(name)
    number = NUMBERS.match(extension)
    return f"{key}.{number[1]}" if number else key


def wanted(name: str) -> bool:
    """Whether a member may count, by its name: it must be read."""
    last = layout.split_key(name)[1].rpartition(".")[2]
    return last in IMAGE_EXTENSIONS or last == "cls" or (last != "tar" and not layout.why_no_image(name))


def _kind(name: str, extension: str, size: int, read: Callable[[int], bytes]) -> str:
    """What a member is: "image", "seg.png", "cls", or the reason why it is left out."""
    if any(map(layout.is_by_product, name.split("/"))):
        return layout.BY_PRODUCT
    last = "seg.png" if extension.endswith("seg.png") else extension.rpartition(".")[2]
    kind = "image" if last in IMAGE_EXTENSIONS else last if last in ("seg.png", "cls") else ""
    if not kind and last == "tar":
        return INNER_TAR
    if not kind and (why := layout.why_no_image(name)):
        return why
    if size < 0:  # a link, a device, or a name that leads outside
        return REFUSED[size]
    if not kind:  # an unknown extension, or none
        return "image" if starts_as_image(read(HEAD)) else layout.NO_IMAGE
    return kind


def _class_number(where: str, name: str, text: bytes) -> int:
    try:
        number = int(text)
    except ValueError:
        raise UserError(f"{where}: {name} holds {text[:20]!r} where a class number is needed") from None
    if not -1 <= number < MOST_CLASSES:
        said = text.decode(errors="replace").strip()
        raise UserError(f"{where}: {name} holds the class number {said[:20]}, not one of -1 to {MOST_CLASSES - 1:,}")
    return number
