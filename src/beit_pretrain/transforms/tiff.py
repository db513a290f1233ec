"""Opens TIFF files, and decodes those that Pillow refuses or reads wrongly.

Pillow decompresses (LZW, deflate, ...), as a grey image of 8 bits whose pixels are the bytes of the samples; order of
bytes, differences between neighbours, sign, bands and alpha are taken care of here (TIFF 6.0, and its Technical Note 3
for floats). Shapes: H W pixels, S samples of a pixel.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImagePalette, UnidentifiedImageError

from beit_pretrain.transforms.grey_values import note
from beit_pretrain.transforms.tiff_pages import Page, Tag, full_page, nodata_of, pages_of

GREY, RGB, CMYK = (0, 1), 2, 5  # photometric interpretations; 0: white is zero
LOSSLESS = (1, 5, 8, 32773, 32946, 34925, 50000)  # compressions of bytes as they are
WITH_PREDICTOR = (5, 8, 32946, 34925, 50000)
ASSOCIATED = 1  # kind of alpha by which the colours have been multiplied
ALPHA = (ASSOCIATED, 2)  # kinds of extra samples
KINDS = {1: "u", 2: "i", 3: "f", 4: "u"}  # numpy's, by sample format


def open_tiff(data: bytes, max_pixels: int) -> Image.Image:
    """Open the page of full resolution, with notes on its values (grey_values.py).

    Raises ValueError for camera raw files, for more than `max_pixels` and for samples without a defined meaning.
    """
    order = "<" if data[:2] == b"II" else ">"
    pages = list(pages_of(data, order))
    if not pages:
        raise ValueError("a TIFF whose tags are cut off or broken")
    page = full_page(pages)
    about = {"page": 1 + pages.index(page), "nodata": nodata_of(page), "left_out": _left_out(page)}
    if (image := _decoded(data, page, max_pixels)) is not None:
        image.format = "TIFF"
        return note(image, **about)
    if page is not pages[0]:
        big = data[2:4] in (b"+\0", b"\0+")
        at, kind = (8, "Q") if big else (4, "I")
        data = data[:at] + struct.pack(order + kind, page.offset) + data[at + struct.calcsize(kind) :]
    try:
        image = Image.open(io.BytesIO(data), formats=("TIFF",))
    except UnidentifiedImageError:
        if not page.pixels:
            raise
        raise _unsupported(page) from None
    if image.mode == "P" and page.tags.get(Tag.COLORMAP) and max(page.tags[Tag.COLORMAP]) < 256:
        # Colours of 8 bits in fields of 16, as old programs write them; Pillow takes the upper 8, that is black.
        image.palette = ImagePalette.raw("RGB;L", bytes(page.tags[Tag.COLORMAP]))
    return note(image, **about)


def _unsupported(page: Page) -> ValueError:
    kind = {1: "unsigned", 2: "signed", 3: "float"}.get(page.one(Tag.FORMAT, 1), "complex or other")
    what = f"{page.one(Tag.SAMPLES, 1)} bands of {page.one(Tag.BITS, 1)} bits, {kind}"
    how = f"photometric {page.one(Tag.PHOTOMETRIC, -1)}, compression {page.one(Tag.COMPRESSION, 1)}"
    return ValueError(f"a TIFF of this kind is not supported ({what}, {how}); store it with 8 or 16 bits a channel")


def _left_out(page: Page) -> int:
    """The number of bands that are neither colours nor alpha."""
    if page.one(Tag.PHOTOMETRIC, 1) not in (*GREY, RGB, CMYK):
        return 0
    colours, alpha = _bands(page)
    return max(0, page.one(Tag.SAMPLES, 1) - colours - (alpha is not None))


def _bands(page: Page) -> tuple[int, int | None]:
    """The number of colours of a page of grey, RGB or CMYK, and the place of its alpha channel, if it has one."""
    samples = page.one(Tag.SAMPLES, 1)
    photometric = page.one(Tag.PHOTOMETRIC, RGB if samples == 3 else 1)
    colours = {RGB: 3, CMYK: 4}.get(photometric, 1)
    extra = [int(value) for value in page.tags.get(Tag.EXTRA, ())][: samples - colours]
    if photometric == RGB and samples == 4 and not extra:
        return colours, 3  # as Pillow takes it
    return colours, next((colours + i for i, value in enumerate(extra) if value in ALPHA), None)


def _decoded(data: bytes, page: Page, max_pixels: int) -> Image.Image | None:
    """The image of a page that Pillow refuses or reads wrongly; None: it does not. Raises ValueError."""
    samples, bits, kind = page.one(Tag.SAMPLES, 1), page.one(Tag.BITS, 1), KINDS.get(page.one(Tag.FORMAT, 1), "")
    photometric = page.one(Tag.PHOTOMETRIC, RGB if samples == 3 else 1)
    grey = photometric in GREY
    if not (grey or photometric in (RGB, CMYK)) or not page.pixels:
        return None
    if grey and samples > 2:
        raise ValueError(f"a TIFF of {samples} bands without stated colours; store three of them as RGB, or one")
    lossless = page.one(Tag.COMPRESSION, 1) in LOSSLESS
    ordinary = page.one(Tag.FORMAT, 1) == 1 and samples <= 4 and Tag.PHOTOMETRIC in page.tags
    ordinary &= samples == 1 or (not grey and page.one(Tag.PLANAR, 1) == 1)
    exact = ASSOCIATED not in page.tags.get(Tag.EXTRA, ())  # Pillow divides by alpha what it has shortened to 8 bits
    ordinary &= bits == 8 or (bits == 16 and samples > 1 and lossless and exact)
    if bits < 8 or (ordinary and data[:4] != b"MM\0+") or (bits == 8 and not lossless):
        return None
    colours, alpha = _bands(page)
    mixed = any(len(set(page.tags.get(tag, ()))) > 1 for tag in (Tag.BITS, Tag.FORMAT))
    deep = samples == 1 and (bits in (8, 16, 32, 64) or (kind == "u" and bits < 16)) and (kind, bits) != ("f", 8)
    if mixed or not kind or samples < colours or not lossless:
        raise _unsupported(page)
    if not deep and (kind != "u" or bits not in (8, 16)):
        raise _unsupported(page)
    bands = [*range(colours), *([] if alpha is None else [alpha])]
    values_HWS = _upright(_samples(data, page, bands, max_pixels), page.one(Tag.ORIENTATION, 1))
    if alpha is not None and page.tags.get(Tag.EXTRA) and page.tags[Tag.EXTRA][alpha - colours] == ASSOCIATED:
        top = np.iinfo(values_HWS.dtype).max  # colours are stored times alpha
        weight = np.maximum(values_HWS[..., -1:], 1).astype(np.uint64)
        values_HWS[..., :-1] = np.minimum(values_HWS[..., :-1] * np.uint64(top) // weight, top)
    return _grey(values_HWS, photometric == 0) if grey else _colours(values_HWS, photometric)


def _grey(values_HWS: np.ndarray, white_is_zero: bool) -> Image.Image:
    """A grey image of numbers of any type, and of alpha, if there is a second sample."""
    values = np.ascontiguousarray(values_HWS[..., 0])
    alpha = None if values_HWS.shape[2] == 1 else _upper(values_HWS[..., 1])
    if values.dtype == np.uint8:
        image = Image.fromarray(255 - values if white_is_zero else values)
        image = image if alpha is None else Image.merge("LA", (image, Image.fromarray(alpha)))
        return note(image, factor=-1.0, offset=255.0) if white_is_zero else image
    exact = None
    if values.dtype.kind == "f" and values.dtype.itemsize < 8:
        held = values.astype(np.float32)
    elif values.dtype == np.uint16:
        held = values
    elif values.dtype.kind != "f" and values.max() < 2**31 and (values.dtype.kind == "u" or values.min() >= -(2**31)):
        held = values.astype(np.int32)
    else:
        exact = values
        with np.errstate(over="ignore"):
            held = values.astype(np.float32)
    transparency = None if alpha is None else Image.fromarray(alpha)
    return note(Image.fromarray(held), exact=exact, white_is_zero=white_is_zero, alpha=transparency)


def _colours(values_HWS: np.ndarray, photometric: int) -> Image.Image:
    """An image of RGB, RGBA or CMYK, of the upper 8 bits."""
    colours_HWS = _upper(values_HWS)
    mode = "CMYK" if photometric == CMYK else "RGB" if colours_HWS.shape[2] == 3 else "RGBA"
    image = Image.frombuffer(mode, colours_HWS.shape[1::-1], np.ascontiguousarray(colours_HWS[..., : len(mode)]))
    return note(image, bits=8 * values_HWS.dtype.itemsize)


def _upper(values: np.ndarray) -> np.ndarray:
    """The upper 8 bits of unsigned numbers."""
    return np.ascontiguousarray(values if values.dtype == np.uint8 else values >> 8).astype(np.uint8)


def _upright(values: np.ndarray, orientation: int) -> np.ndarray:
    """An array turned as the tag says, which Pillow does with TIFFs, too."""
    if orientation in (5, 6, 7, 8):
        values = values.swapaxes(0, 1)
    down, across = {2: (1, -1), 3: (-1, -1), 4: (-1, 1), 6: (1, -1), 7: (-1, -1), 8: (-1, 1)}.get(orientation, (1, 1))
    return np.ascontiguousarray(values[::down, ::across])


def _samples(data: bytes, page: Page, bands: Sequence[int], max_pixels: int) -> np.ndarray:
    """(H, W, bands) of a page, in a numpy type that holds its numbers. Raises ValueError for more than `max_pixels`."""
    width, bits, samples = page.one(Tag.WIDTH), page.one(Tag.BITS, 1), page.one(Tag.SAMPLES, 1)
    planes = [[band] for band in bands] if samples > 1 and page.one(Tag.PLANAR, 1) == 2 else [list(range(samples))]
    across = page.one(Tag.TILE_WIDTH) or width  # pixels of a tile's row, or of a strip's
    tiles, row = -(-width // across), -(-across * len(planes[0]) * bits // 8)
    if page.pixels > max_pixels or tiles * row * page.one(Tag.HEIGHT) > 16 * max_pixels:
        raise ValueError(f"more than max_pixels={max_pixels} pixels")
    found = []
    for plane in planes:
        first = plane[0] if len(planes) > 1 else 0
        raw = _unpacked(data, page, first, tiles, row).reshape(-1, tiles, row)
        found.append(_numbers(raw, page, len(plane)).reshape(len(raw), -1, len(plane))[:, :width])
    return np.concatenate(found, axis=2) if len(planes) > 1 else found[0][..., list(bands)]


def _numbers(raw: np.ndarray, page: Page, samples: int) -> np.ndarray:
    """(H, tiles, pixels * samples) of bytes (H, tiles, bytes of a row), the differences between neighbours undone."""
    bits, kind = page.one(Tag.BITS, 1), KINDS[page.one(Tag.FORMAT, 1)]
    height, tiles, row = raw.shape
    predictor = page.one(Tag.PREDICTOR, 1) if page.one(Tag.COMPRESSION, 1) in WITH_PREDICTOR else 1
    if bits % 8:
        if predictor != 1:
            raise _unsupported(page)
        return _of_bits(raw, bits)
    size = bits // 8
    if predictor == 3:  # the bytes of a row by their weight, the highest first
        summed = raw.reshape(height, tiles, -1, samples).cumsum(axis=2, dtype=np.uint8)
        sorted_ = np.ascontiguousarray(summed.reshape(height, tiles, size, -1).swapaxes(2, 3))
        return sorted_.view(f">{kind}{size}")[..., 0].astype(f"{kind}{size}")
    whole = raw.view(f"{page.order}u{size}").astype(f"u{size}")
    if predictor == 2:
        whole = whole.reshape(height, tiles, -1, samples).cumsum(axis=2, dtype=whole.dtype).reshape(height, tiles, -1)
    return whole.view(f"{kind}{size}")


def _of_bits(raw: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned numbers of `bits` bits, below 16, the highest first, from the bytes of rows."""
    count = raw.shape[-1] * 8 // bits
    found = np.zeros((*raw.shape[:-1], count), np.uint16)
    for rows, numbers in zip(raw, found):  # one by one: a bit takes a byte here
        places = np.unpackbits(rows, axis=-1)[..., : count * bits].reshape(-1, count, bits)
        for place in range(bits):
            numbers |= places[..., place].astype(np.uint16) << np.uint16(bits - 1 - place)
    return found


def _unpacked(data: bytes, page: Page, plane: int, tiles: int, row: int) -> np.ndarray:
    """The bytes (H, tiles * row) of a plane, each tile's row of `row` bytes."""
    height, compression, tiled = page.one(Tag.HEIGHT), page.one(Tag.COMPRESSION, 1), bool(page.one(Tag.TILE_WIDTH))
    high = page.one(Tag.TILE_HEIGHT) if tiled else min(page.one(Tag.ROWS, height), height)
    place_tag, length_tag = (Tag.TILES, Tag.TILE_BYTES) if tiled else (Tag.STRIPS, Tag.STRIP_BYTES)
    pieces = tiles * -(-height // max(1, high))
    own = slice(plane * pieces, (plane + 1) * pieces)
    places, lengths = page.tags.get(place_tag, ())[own], page.tags.get(length_tag, ())[own]
    if len(places) < pieces or (len(lengths) < pieces and compression != 1):
        raise ValueError("a TIFF that lacks some of its pixels")
    tags: dict[int, Sequence[int]] = {Tag.WIDTH: [tiles * row], Tag.HEIGHT: [height], Tag.BITS: [8]}
    tags |= {Tag.COMPRESSION: [compression], Tag.PHOTOMETRIC: [1], Tag.FILL_ORDER: [page.one(Tag.FILL_ORDER, 1)]}
    tags |= {Tag.TILE_WIDTH: [row], Tag.TILE_HEIGHT: [high]} if tiled else {Tag.ROWS: [high]}
    tags |= {place_tag: places, length_tag: lengths, Tag.SAMPLES: [1]}
    # The caller has checked the size; here bytes take the place of pixels.
    with pixel_limit(None), Image.open(io.BytesIO(_with_page(data, tags, page.order)), formats=("TIFF",)) as image:
        return np.asarray(image)


def _with_page(data: bytes, tags: dict[int, Sequence[int]], order: str) -> bytes:
    """The file with another first page, of these tags. Raises ValueError for files of 4 GiB."""
    data += b"\0" * (len(data) % 2)
    entries, values = [], bytearray()
    start = len(data) + 2 + 12 * len(tags) + 4
    if start + sum(4 * len(numbers) for numbers in tags.values()) >= 2**32:
        raise ValueError("a TIFF of more than 4 GiB")
    for tag, numbers in sorted(tags.items()):
        packed = struct.pack(f"{order}{len(numbers)}I", *numbers)
        if len(packed) > 4:
            entries.append(struct.pack(order + "HHII", tag, 4, len(numbers), start + len(values)))
            values += packed
        else:
            entries.append(struct.pack(order + "HHI", tag, 4, len(numbers)) + packed.ljust(4, b"\0"))
    signature = b"II*\0" if order == "<" else b"MM\0*"
    head = signature + struct.pack(order + "I", len(data))
    return b"".join([head, data[8:], struct.pack(order + "H", len(tags)), *entries, b"\0" * 4, values])


@contextmanager
def pixel_limit(limit: int | None) -> Iterator[None]:
    """The size above which Pillow refuses an image, an inner one too, within a `with` block."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = limit
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before
