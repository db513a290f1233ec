"""The pages of a TIFF file with their tags, and which of them is the image itself.

TIFF 6.0, BigTIFF, and the marks of reduced images and camera raw data of TIFF/EP and DNG.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import suppress
from enum import IntEnum
from typing import Any, NamedTuple

SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"II\0*", b"MM*\0")  # the last two are wrong, but read
TYPES = {1: "B", 2: "s", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 13: "I", 16: "Q", 17: "q", 18: "Q"}
RAW = {32803: "colour filter array", 34892: "linear sensor values"}  # photometric interpretations of cameras
NOT_THE_IMAGE = 1 | 4 | 8  # bits of Tag.SUBFILE
MOST_PAGES = 64


class Tag(IntEnum):
    """The tags that are read."""

    SUBFILE = 254  # bits: 1 reduced, 4 mask, 8 depth
    OLD_SUBFILE = 255  # 2 = reduced
    WIDTH = 256
    HEIGHT = 257
    BITS = 258
    COMPRESSION = 259
    PHOTOMETRIC = 262
    FILL_ORDER = 266
    STRIPS = 273
    ORIENTATION = 274
    SAMPLES = 277
    ROWS = 278
    STRIP_BYTES = 279
    PLANAR = 284
    PREDICTOR = 317
    COLORMAP = 320
    TILE_WIDTH = 322
    TILE_HEIGHT = 323
    TILES = 324
    TILE_BYTES = 325
    SUB_PAGES = 330
    EXTRA = 338  # kinds of the samples beyond the colours
    FORMAT = 339
    NODATA = 42113  # GDAL's value for no data, a text
    DNG = 50706  # version of Adobe's camera raw format
    CR2_SLICES = 50752  # of Canon's raw data


READ = frozenset(Tag)


def is_tiff(data: bytes) -> bool:
    """Whether a file begins as a TIFF."""
    return data[:4] in SIGNATURES


class Page(NamedTuple):
    """A page's place in its file, and its tags (tuples of numbers; Tag.NODATA is bytes)."""

    offset: int
    tags: dict[int, Any]
    order: str  # < or >

    def one(self, tag: int, default: int = 0) -> int:
        """The only or first value of a tag."""
        return int(self.tags[tag][0]) if self.tags.get(tag) else default

    @property
    def pixels(self) -> int:
        return self.one(Tag.WIDTH) * self.one(Tag.HEIGHT)


def pages_of(data: bytes, order: str) -> Iterator[Page]:
    """The pages of a file, each followed by its sub-pages; ends where the file is broken."""
    big = data[2:4] in (b"+\0", b"\0+")
    places = list(struct.unpack_from(order + ("Q" if big else "I"), data.ljust(16, b"\0"), 8 if big else 4))
    seen = set[int]()
    while places and len(seen) < MOST_PAGES:
        offset = places.pop(0)
        if offset in seen:
            continue
        seen.add(offset)
        try:
            tags, following = _tags(data, offset, order, big)
        except (struct.error, ValueError, OverflowError):
            return
        yield Page(offset, tags, order)
        places = [int(place) for place in tags.get(Tag.SUB_PAGES, ())] + places + ([following] if following else [])


def _tags(data: bytes, offset: int, order: str, big: bool) -> tuple[dict[int, Any], int]:
    """The tags at `offset` that are read here, and the place of the next page. Raises struct.error if it is broken."""
    head, entry, link = ("Q", "HHQ8s", "Q") if big else ("H", "HHI4s", "I")
    (count,) = struct.unpack_from(order + head, data, offset)
    offset += struct.calcsize(order + head)
    tags: dict[int, Any] = {}
    size = struct.calcsize(order + entry)
    if count * size > len(data):
        raise ValueError("more tags than bytes")
    for place in range(offset, offset + count * size, size):
        tag, kind, number, value = struct.unpack_from(order + entry, data, place)
        if tag not in READ or kind not in TYPES or number > len(data):
            continue
        form = f"{order}{number}{TYPES[kind]}"
        inside = struct.calcsize(form) <= len(value)
        with suppress(struct.error):  # a value beyond the end: the others may do
            start = 0 if inside else min(struct.unpack(order + link, value)[0], len(data))
            tags[tag] = struct.unpack_from(form, value if inside else data, start)
    last = data[offset + count * size :][: struct.calcsize(link)]
    return tags, struct.unpack(order + link, last)[0] if len(last) == struct.calcsize(link) else 0


def full_page(pages: Sequence[Page]) -> Page:
    """The first page, or if it is marked as a reduced image or a mask, the largest of those that are not.

    Raises ValueError for a camera raw file: what can be read of it is a preview.
    """
    whole = [p for p in pages if not p.one(Tag.SUBFILE) & NOT_THE_IMAGE and p.one(Tag.OLD_SUBFILE) != 2]
    raw = next((page for page in pages if page.one(Tag.PHOTOMETRIC, -1) in RAW or Tag.CR2_SLICES in page.tags), None)
    if raw is not None:
        kind = RAW.get(raw.one(Tag.PHOTOMETRIC, -1), "Canon's")
        raise ValueError(f"a camera raw file ({kind}), of which only previews can be read; develop it to TIFF or JPEG")
    if pages[0] in whole:
        return pages[0]
    if not whole and Tag.DNG in pages[0].tags:
        raise ValueError("a camera raw file, of which only previews can be read; develop it to TIFF or JPEG")
    return max(whole or pages, key=lambda page: page.pixels)


def nodata_of(page: Page) -> float | None:
    """GDAL's value for no data (tag 42113)."""
    try:
        return float(page.tags[Tag.NODATA][0].rstrip(b"\0 ").decode())
    except (LookupError, ValueError, AttributeError):
        return None
