"""Which images are photos, and which are label maps, masks, depth maps or thumbnails of them, by names (layout.py)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

from beit_pretrain.data.layout import (
    CLASSES_TOO,
    COLOUR,
    MAPS,
    ROLE_AT_END,
    THUMBS,
    role_of,
    says_photos,
    split_words,
    stem_of,
)
from beit_pretrain.transforms.image_io import IMAGE_EXTENSIONS

MOST_PARTNERS = 64  # folders that are compared with one of label maps
_LOSSY = frozenset("jpg jpeg jpe jfif webp avif jp2 j2k".split())


class Subject(NamedTuple):
    """What an image shows, and which kind of picture of it the words at the end of the name say."""

    name: str
    kind: str  # "photo" (x, x_rgb), "map" (x_mask, x.depth, x_gtFine_labelIds) or "thumbnail"


def subject(stem: str) -> Subject:
    """The subject of an image by its name without extension."""
    kind, rest = "photo", stem.replace("leftImg8bit", "rgb")  # Cityscapes
    while found := re.fullmatch(r"(.+?)[._ -]+([^\W\d_]+)(?:[._ -]?\d{1,2})?", rest):
        words = set(split_words(found[2]))
        said = "map" if words <= MAPS else "thumbnail" if words <= THUMBS else "photo" if words <= COLOUR else ""
        if not said:
            break
        kind, rest = said if kind == "photo" else kind, found[1]
    return Subject(rest, kind)


class Maps(NamedTuple):
    """Files or folders that are label maps or thumbnails of photos by their names."""

    found: list[str]  # the photos are beside them
    doubtful: list[str]  # the names alone say so


def map_folders(
    path: str, names: Sequence[str], images_in: Callable[[str], tuple[str, Sequence[str]]], beside: Sequence[str] = ()
) -> Maps:
    """The folders `names` of a folder `path` that hold label maps or thumbnails of the photos beside them or above.

    Such a folder's name says so (`masks`, `SegmentationClass`, `train_masks`, `thumbs`), the name of a partner says
    photos (`images`), a part (`train`) or the same without the word (`x_masks` of `x`), and both hold files of one
    subject. Where no further folder holds images, plain names (`images`, `masks`) are enough, and only there words that
    may be classes (`label`) count.

    Args:
        path: ends with a slash, or is empty.
        images_in: path and file names of the first folder with images, from a path on; of `path` itself only its own.
        beside: further partners, paths of folders of photos.
    """
    words_of = {name: split_words(name) for name in names}
    marked = [name for name, words in words_of.items() if _of_maps(words)]
    if not marked:
        return Maps([], [])

    @lru_cache(4 * MOST_PARTNERS)
    def subjects_in(place: str) -> tuple[str, set[str]]:
        where, files = images_in(place)
        # Without the part that some names end with (`21_training`).
        return where, {ROLE_AT_END.sub("", subject(stem_of(file)[0]).name) for file in files}

    photos = [name for name, words in words_of.items() if {*words} & COLOUR][:MOST_PARTNERS]
    parts = [name for name in names if role_of(name)][:MOST_PARTNERS]
    plain = [*beside, *(path + name for name in photos if says_photos(name))]
    further = [name for name in names if not _of_maps(words_of[name]) and name not in (*photos, *parts)]
    alone = not any(subjects_in(path + name)[1] for name in further[:MOST_PARTNERS])
    by_words = {words: name for name, words in words_of.items()}
    result = Maps([], [])
    for name in marked:
        where, shown = subjects_in(path + name)
        if not shown:
            continue
        maps = _of_maps(words_of[name])
        rest = tuple(word for word in _split_ends(words_of[name]) if word not in maps | {"class", "object"})
        same = [by_words[rest]] if rest in by_words and rest else []
        partners = [*(path + s for s in [*same, *photos, *parts] if s != name), *beside]
        inner = where.removeprefix(path + name)
        shares = any(
            shown & subjects_in(place)[1]
            for place in dict.fromkeys([path, *(place for s in partners for place in (s + inner, s))])
        )
        certain = bool(rest) or not maps <= CLASSES_TOO
        if (shares and (certain or alone)) or (alone and certain and not rest and {*plain} - {path + name}):
            result.found.append(name)
        elif shares or {*partners} & {*beside, *(path + s for s in photos)}:
            result.doubtful.append(name)
    return result


def _split_ends(words: tuple[str, ...]) -> tuple[str, ...]:
    """The words of a folder's name, the last in two if it ends like `trainannot`."""
    tail = next((tail for tail in ("annot", "masks", "mask") if words and words[-1].endswith(tail)), "")
    return tuple(word for word in (*words[:-1], words[-1].removesuffix(tail), tail) if word) if tail else words


def _of_maps(words: tuple[str, ...]) -> set[str]:
    """Those of a folder's words that say label maps or thumbnails."""
    return {*_split_ends(words)} & (MAPS | THUMBS)


def maps_among(names: Iterable[str]) -> Maps:
    """The files of one folder that are label maps or thumbnails of others in it, by the words at their ends.

    Doubtful are files in formats of label maps that lie among photos, but have none of their own.
    """
    of: dict[str, list[tuple[str, str]]] = {}
    kinds = set[str]()
    for name in names:
        found = subject(stem_of(name)[0])
        kinds.add(found.kind)
        of.setdefault(found.name, []).append((found.kind, name))
    result = Maps([], [])
    if kinds <= {"photo"}:
        return result
    for group in of.values():
        if any(kind == "photo" for kind, _ in group):
            result.found.extend(name for kind, name in group if kind != "photo")
        elif "photo" in kinds:
            result.doubtful.extend(name for kind, name in group if kind == "map" and not is_lossy(name))
    return result


def image_rank(extension: str, image_key: Sequence[str] = ()) -> tuple[int, ...] | None:
    """The order in which members of one sample count as its image, the smallest first; None: it is no image.

    `extension`: all that follows the key, such as `jpg` or `mask.png`. With `image_key` (extensions) only these count,
    in this order. Else photos come before label maps and thumbnails (`mask.png`, `depth.png`, `thumb.jpg`), plain
    extensions before dotted ones, and lossy formats before lossless ones, in which label maps are stored.
    """
    if image_key:
        return (image_key.index(extension),) if extension in image_key else None
    *words, last = extension.split(".")
    kind = subject(".".join(["x", *words])).kind
    return (kind != "photo", bool(words), last not in _LOSSY)


def twins(names: Iterable[str], image_key: Sequence[str] = ()) -> dict[str, list[str]]:
    """Files of one folder that differ by their image extensions alone: the one that is the image -> the others."""
    of: dict[str, list[str]] = {}
    for name in names:
        stem, extension = stem_of(name)
        if extension in IMAGE_EXTENSIONS:
            of.setdefault(stem, []).append(name)
    found: dict[str, list[str]] = {}
    for group in of.values():
        if len(group) > 1:
            first, *others = sorted(group, key=lambda name: (image_rank(stem_of(name)[1], image_key) or (9,), name))
            found[first] = others
    return found


def is_lossy(name: str) -> bool:
    """Whether a file's format is one of photos, in which no label map is stored."""
    return stem_of(name)[1] in _LOSSY


def is_grey_png(head: bytes) -> bool:
    """Whether a file that begins so is a PNG of grey values or a palette, of at most 8 bits, as label maps are."""
    return head[:16] == b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" and head[24] <= 8 and head[25] in (0, 3)
