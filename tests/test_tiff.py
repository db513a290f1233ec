"""Every kind of TIFF is read with its own values, or refused with the reason."""

import io
import itertools
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from beit_pretrain.transforms.grey_values import label_ids, notes, numbers, to_grey8
from beit_pretrain.transforms.image_io import alpha_of, has_deep_colours, open_image, to_channels, to_rgb

KINDS = {"u": 1, "i": 2, "f": 3}
CODES = {1: "B", 2: "B", 3: "H", 4: "I", 16: "Q"}


def tiff(*pages: tuple[dict, list[bytes]], order: str = "<", big: bool = False) -> bytes:
    """A TIFF of pages (tags {number: (type, values)}, pieces of pixels); a tag's value may be a page: its sub-page."""
    link = "Q" if big else "I"
    head = (b"II" if order == "<" else b"MM") + struct.pack(
        order + ("HHH" if big else "H"), *((43, 8, 0) if big else (42,))
    )
    out = bytearray(head + b"\0" * struct.calcsize(link))
    place = len(head)

    def add(tags: dict, pieces: list[bytes]) -> tuple[int, int]:
        tags, places = dict(tags), []
        for piece in pieces:
            places.append(len(out))
            out.extend(piece + b"\0" * (len(piece) % 2))
        tiled = 322 in tags
        tags[324 if tiled else 273] = (4, places)
        tags[325 if tiled else 279] = (4, [len(piece) for piece in pieces])
        if isinstance(tags.get(330), tuple) and isinstance(tags[330][0], dict):
            tags[330] = (4, [add(*tags[330])[0]])
        entries = b""
        for tag, (kind, values) in sorted(tags.items()):
            data = bytes(values) if kind == 2 else struct.pack(f"{order}{len(values)}{CODES[kind]}", *values)
            entries += struct.pack(f"{order}HH{link}", tag, kind, len(values))
            if len(data) > struct.calcsize(link):
                entries += struct.pack(order + link, len(out))
                out.extend(data + b"\0" * (len(data) % 2))
            else:
                entries += data.ljust(struct.calcsize(link), b"\0")
        start = len(out)
        out.extend(struct.pack(order + ("Q" if big else "H"), len(tags)) + entries)
        out.extend(b"\0" * struct.calcsize(link))
        return start, len(out) - struct.calcsize(link)

    for page in pages:
        start, following = add(*page)
        struct.pack_into(order + link, out, place, start)
        place = following
    return bytes(out)


def page(
    values: np.ndarray,
    photometric: int | None = 1,
    *,
    order: str = "<",
    planar: int = 1,
    compression: int = 1,
    predictor: int = 1,
    tile: int = 0,
    rows: int = 0,
    bits: int = 0,
    **more: tuple,
) -> tuple[dict, list[bytes]]:
    """A page of values (H, W) or (H, W, S); `t338=(3, [2])` sets further tags."""
    values = values[..., None] if values.ndim == 2 else values
    height, width, samples = values.shape
    kind, size = values.dtype.kind, values.dtype.itemsize
    tags = {256: (4, [width]), 257: (4, [height]), 258: (3, [bits or size * 8] * samples), 259: (3, [compression])}
    tags |= {277: (3, [samples]), 284: (3, [planar]), 317: (3, [predictor]), 339: (3, [KINDS[kind]] * samples)}
    tags |= {int(name[1:]): value for name, value in more.items()}
    if photometric is not None:
        tags[262] = (3, [photometric])
    if tile:
        tags |= {322: (3, [tile]), 323: (3, [tile])}
        values = np.pad(values, ((0, -height % tile), (0, -width % tile), (0, 0)), mode="edge")
        corners = itertools.product(range(0, height, tile), range(0, width, tile))
        blocks = [values[top : top + tile, left : left + tile] for top, left in corners]
    else:
        rows = rows or height
        tags[278] = (3, [rows])
        blocks = [values[top : top + rows] for top in range(0, height, rows)]
    planes = [[b[..., i : i + 1] for b in blocks] for i in range(samples)] if planar == 2 else [blocks]

    def packed(block: np.ndarray) -> bytes:
        h, w, s = block.shape
        if bits:
            ones = (block.reshape(h, w * s, 1) >> np.arange(bits - 1, -1, -1).astype(block.dtype)) & 1
            data = np.packbits(ones.reshape(h, -1).astype(np.uint8), axis=1).tobytes()
        elif predictor == 3:
            by_weight = np.frombuffer(block.astype(f">{kind}{size}").tobytes(), np.uint8).reshape(h, w * s, size)
            flat = by_weight.swapaxes(1, 2).reshape(h, -1, s)
            data = np.diff(flat, axis=1, prepend=np.zeros((h, 1, s), np.uint8)).tobytes()
        else:
            whole = block.view(f"u{size}")
            if predictor == 2:
                whole = np.diff(whole, axis=1, prepend=np.zeros((h, 1, s), whole.dtype))
            data = whole.astype(f"{order}u{size}").tobytes()
        return zlib.compress(data) if compression == 8 else data

    return tags, [packed(np.ascontiguousarray(block)) for plane in planes for block in plane]


RAMP = np.linspace(0, 1, 37 * 23).reshape(23, 37)
RANGES = {"u1": (0, 255), "i1": (-128, 127), "u2": (0, 65535), "i2": (-32768, 32767), "u4": (10, 2**32 - 1)}
RANGES |= {"i4": (-(2**31), 2**31 - 1), "f2": (-7, 9), "f4": (-1, 1), "f8": (1e9, 1e9 + 1), "u8": (2**40, 2**40 + 999)}
LAYOUTS = {
    "strips": {"rows": 5},
    "deflate": {"compression": 8, "rows": 5},
    "differences": {"compression": 8, "predictor": 2, "rows": 5},
    "tiles": {"compression": 8, "predictor": 2, "tile": 16},
    "plain tiles": {"tile": 16},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("kind", RANGES)
def test_grey_numbers(kind, order, layout):
    low, high = RANGES[kind]
    values = (low + RAMP * (high - low)).astype(kind)
    for photometric, big in ((1, False), (0, False), (1, True)):
        if kind == "u1" and (photometric == 0):
            continue  # below
        made = page(values, photometric, order=order, **LAYOUTS[layout])
        with open_image(tiff(made, order=order, big=big)) as image:
            assert image.size == (37, 23)
            if kind == "u1":
                np.testing.assert_array_equal(np.asarray(image), values)
                continue
            grey, (black, white) = to_grey8(image, percentiles=(0, 100))
            expected = np.rint(255 * (values.astype(float) - values.min()) / np.ptp(values.astype(float)))
            expected = 255 - expected if photometric == 0 else expected
            assert np.abs(np.asarray(grey) - expected).max() <= 1
            assert sorted((black, white)) == [float(values.min()), float(values.max())]
            assert (black > white) == (photometric == 0)
            assert np.abs(np.asarray(to_channels(image, 1)) - np.asarray(to_grey8(image)[0]).astype(int)).max() == 0


@pytest.mark.parametrize("bits", [10, 12, 14])
@pytest.mark.parametrize("layout", [{"rows": 5}, {"tile": 16, "compression": 8}])
def test_grey_of_packed_bits(bits, layout):
    values = np.rint(RAMP * (2**bits - 1)).astype("u4")
    for photometric in (0, 1):
        with open_image(tiff(page(values, photometric, bits=bits, **layout))) as image:
            np.testing.assert_array_equal(label_ids(image), values)
            assert (np.asarray(to_rgb(image))[0, 0, 0] == 255) == (photometric == 0)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("kind", ["f4", "f8"])
@pytest.mark.parametrize("layout", [{"rows": 5}, {"tile": 16}])
def test_differences_between_floats(kind, order, layout):
    values = (RAMP * 3 - 1).astype(kind)
    with open_image(tiff(page(values, order=order, compression=8, predictor=3, **layout), order=order)) as image:
        assert to_grey8(image, percentiles=(0, 100))[1] == (values.min(), values.max())


def test_white_is_zero_of_8_bits_and_labels_of_it():
    values = np.rint(RAMP * 255).astype(np.uint8)
    for more in ({}, {"compression": 8, "rows": 4}):
        with open_image(tiff(page(values, 0, **more))) as image:
            ids = label_ids(image)
            np.testing.assert_array_equal(np.asarray(to_channels(image, 1)), 255 - values)
        np.testing.assert_array_equal(ids, values)


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("photometric", [0, 1])
def test_label_maps_of_few_bits_hold_the_numbers_of_the_file(bits, photometric):
    values = np.rint(RAMP * (2**bits - 1)).astype(np.uint8)
    with open_image(tiff(page(values, photometric, bits=bits, rows=5))) as image:
        np.testing.assert_array_equal(label_ids(image), values)
        shown = np.asarray(to_channels(image, 1))
    brightness = values if photometric == 1 else 2**bits - 1 - values
    np.testing.assert_array_equal(shown, brightness * (255 // (2**bits - 1)))


COLOURS = np.stack([RAMP, RAMP[::-1], 1 - RAMP[:, ::-1] / 2], axis=2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("planar", [1, 2])
@pytest.mark.parametrize(("kind", "order"), [("u1", "<"), ("u2", "<"), ("u2", ">")])
def test_colours(kind, order, planar, layout):
    top = np.iinfo(kind).max
    colours = np.rint(COLOURS * top).astype(kind)
    upper = (colours >> (8 * (colours.itemsize - 1))).astype(np.uint8)
    alpha = np.rint((0.2 + 0.8 * RAMP) * top).astype(kind)[..., None]
    nir = np.full_like(alpha, 77)
    associated = np.rint(colours * (alpha / top)).astype(kind)
    cmyk = np.concatenate([top - colours, 0 * nir], axis=2).astype(kind)
    cases = [
        ("rgb", colours, 2, [], 0, None),
        ("rgba", [colours, alpha], 2, [2], 0, alpha),
        ("associated", [associated, alpha], 2, [1], 0, alpha),
        ("rgbn", [colours, nir], 2, [0], 1, None),
        ("rgba and nir", [colours, alpha, nir], 2, [2, 0], 1, alpha),
        ("rgb, nir and alpha", [colours, nir, alpha], 2, [0, 2], 1, alpha),
        ("cmyk", cmyk, 5, [], 0, None),
    ]
    for name, bands, photometric, extra, left_out, clear in cases:
        values = np.concatenate(bands, axis=2) if isinstance(bands, list) else bands
        more = {"t338": (3, extra)} if extra else {}
        file = tiff(page(values, photometric, order=order, planar=planar, **LAYOUTS[layout], **more), order=order)
        with open_image(file) as image:
            assert has_deep_colours(image) == (kind == "u2"), name
            assert notes(image).left_out == left_out, name
            found = np.asarray(to_rgb(image)).astype(int)
            opacity = alpha_of(image)
        assert np.abs(found - upper).max() <= (6 if name == "associated" else 1), name
        assert (opacity is None) == (clear is None), name
        if clear is not None:
            np.testing.assert_array_equal(opacity, (clear[..., 0] >> (8 * (clear.itemsize - 1))))


@pytest.mark.parametrize("kind", ["u1", "u2"])
def test_colours_nearly_transparent_and_of_no_stated_format(kind):
    top = np.iinfo(kind).max
    colours = np.rint(COLOURS * top).astype(kind)
    with open_image(tiff(page(colours, 2, t339=(3, [4, 4, 4])))) as image:
        np.testing.assert_array_equal(to_rgb(image), colours >> (8 * (colours.itemsize - 1)))
    alpha = np.full((*RAMP.shape, 1), round(0.05 * top), kind)
    stored = np.concatenate([np.rint(COLOURS * alpha).astype(kind), alpha], axis=2)
    with open_image(tiff(page(stored, 2, t338=(3, [1])))) as image:
        error = np.abs(np.asarray(to_rgb(image)) - COLOURS * 255).max()
    assert error < (12 if kind == "u1" else 1)  # 255 steps of 13 are left of 8 bits


def test_grey_with_alpha_and_a_further_band():
    values = np.rint(RAMP * 60000).astype(np.uint16)
    two = np.stack([values, values[::-1] // 2 + 2000], axis=2)
    for extra, kind in itertools.product((0, 1, 2), ("u2", "u1")):
        bands = two if kind == "u2" else (two >> 8).astype(np.uint8)
        with open_image(tiff(page(bands, 1, t338=(3, [extra])))) as image:
            opacity, left_out = alpha_of(image), notes(image).left_out
            grey = np.asarray(to_channels(image, 4))
        assert (opacity is None, left_out) == (extra == 0, int(extra == 0))
        if extra:
            upper = bands[..., 1] >> 8 if kind == "u2" else bands[..., 1]
            np.testing.assert_array_equal(grey[..., 3], upper)
        if extra != 1:
            assert np.corrcoef(grey[..., 0].ravel(), values.ravel())[0, 1] > 0.99


@pytest.mark.parametrize(
    ("values", "photometric", "more", "said"),
    [
        (np.zeros((4, 4, 13), np.uint16), 1, {"t338": (3, [0] * 12)}, "13 bands without stated colours"),
        (np.zeros((4, 4, 13), np.uint16), 1, {"planar": 2, "t338": (3, [0] * 12)}, "13 bands without stated colours"),
        (np.zeros((4, 4, 3), np.uint8), 1, {"t338": (3, [0, 0])}, "3 bands without stated colours"),
        (np.zeros((4, 4, 3), np.float32), 2, {}, "3 bands of 32 bits, float"),
        (np.zeros((4, 4, 3), np.int16), 2, {}, "3 bands of 16 bits, signed"),
        (np.zeros((4, 4, 2), np.float32), 1, {"t338": (3, [0])}, "2 bands of 32 bits, float"),
        (np.zeros((4, 4), np.uint32), 1, {"bits": 24}, "1 bands of 24 bits"),
        (np.zeros((4, 4), np.uint16), 1, {"t339": (3, [6])}, "complex"),
        (np.zeros((4, 4), np.uint16), 1, {"t259": (3, [7])}, "compression 7"),
        (np.zeros((4, 4, 3), np.uint16), 2, {"t259": (3, [7])}, "compression 7"),
    ],
)
def test_what_has_no_defined_meaning_is_refused(values, photometric, more, said):
    file = tiff(page(values, photometric, **more))
    with pytest.raises(ValueError, match=said), open_image(file):
        pytest.fail("opened it")


def test_limits_and_damage():
    values = np.rint(RAMP * 60000).astype(np.uint16)
    with pytest.raises(ValueError, match="more than max_pixels=100"), open_image(tiff(page(values)), 100):
        pytest.fail("opened it")
    with open_image(tiff(page(values)), 37 * 23) as image:
        assert image.size == (37, 23)
    tags, pieces = page(values, tile=16)
    wide = tags | {322: (4, [2**31 - 16])}
    for broken in (tiff((wide, pieces)), tiff((tags, pieces[:1])), tiff((tags, [p[:7] for p in pieces]))):
        with pytest.raises((ValueError, OSError)), open_image(broken) as image:
            image.load()
    file = tiff(page(values))
    for end in range(0, len(file) - 4, 97):  # a missing link to the next page does no harm
        with pytest.raises((ValueError, OSError)), open_image(file[:end]) as image:
            image.load()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_that_of_pillow(orientation):
    values = np.rint(RAMP * 255).astype(np.uint8)
    with open_image(tiff(page(values, t274=(3, [orientation])))) as image:
        expected = np.asarray(to_channels(image, 1))
    with open_image(tiff(page(values.astype(np.uint16) * 9, t274=(3, [orientation])))) as image:
        assert image.size == expected.shape[::-1]
        np.testing.assert_array_equal(label_ids(image) // 9, expected)


def test_palettes_of_16_entries_and_of_8_bits():
    indices = (np.arange(6 * 8).reshape(6, 8) % 16).astype(np.uint8)
    colours = np.arange(48).reshape(3, 16) * 5
    for scale, bits in itertools.product((1, 257), (4, 8)):
        table = np.zeros((3, 2**bits), int)
        table[:, :16] = colours * scale
        tags, pieces = page(indices, 3, bits=bits, t320=(3, table.ravel().tolist()))
        with open_image(tiff((tags, pieces))) as image:
            np.testing.assert_array_equal(np.asarray(to_rgb(image)), colours.T[indices])
            np.testing.assert_array_equal(label_ids(image), indices)


THUMBNAIL = page(np.full((6, 8, 3), 200, np.uint8), 2, t254=(4, [1]))
WHOLE = page(np.full((30, 40, 3), 90, np.uint8), 2, t254=(4, [0]))
DEEP = page(np.full((30, 40), 900, np.uint16), 1, t254=(4, [0]))
SENSOR = page(np.full((30, 40), 900, np.uint16), 32803, t254=(4, [0]))
MASK = page(np.full((60, 80), 255, np.uint8), 1, t254=(4, [4]))


def with_sub_page(made: tuple, sub: tuple) -> tuple:
    return made[0] | {330: sub}, made[1]


@pytest.mark.parametrize(
    ("pages", "size", "number"),
    [
        ([THUMBNAIL, WHOLE], (40, 30), 2),
        ([WHOLE, THUMBNAIL], (40, 30), 1),
        ([THUMBNAIL, MASK, DEEP], (40, 30), 3),
        ([page(np.zeros((6, 8), np.uint8), t255=(3, [2])), WHOLE], (40, 30), 2),
        ([with_sub_page(THUMBNAIL, WHOLE)], (40, 30), 2),
        ([with_sub_page(WHOLE, THUMBNAIL)], (40, 30), 1),
        ([THUMBNAIL], (8, 6), 1),  # all there is
        ([DEEP, page(np.zeros((60, 80), np.uint8))], (40, 30), 1),  # not marked: pages of a document
    ],
)
@pytest.mark.parametrize("big", [False, True])
def test_the_page_of_full_resolution(pages, size, number, big):
    with open_image(tiff(*pages, big=big)) as image:
        assert (image.size, notes(image).page) == (size, number)
        assert to_rgb(image).size == size


@pytest.mark.parametrize(
    "pages",
    [
        [THUMBNAIL, SENSOR],
        [with_sub_page(THUMBNAIL, SENSOR)],
        [SENSOR],
        [WHOLE, THUMBNAIL, (DEEP[0] | {50752: (3, [1, 2, 3])}, DEEP[1])],  # Canon's, whose previews have no mark
        [(THUMBNAIL[0] | {50706: (1, [1, 4, 0, 0])}, THUMBNAIL[1])],
        [with_sub_page(THUMBNAIL, (SENSOR[0] | {262: (3, [34892])}, SENSOR[1]))],
    ],
)
def test_previews_do_not_stand_for_camera_raw_files(pages):
    with pytest.raises(ValueError, match="a camera raw file"), open_image(tiff(*pages)):
        pytest.fail("opened a preview")


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "packbits", "tiff_adobe_deflate"])
@pytest.mark.parametrize("kind", ["u2", "i4", "f4"])
def test_files_of_pillow(compression, kind):
    values, buffer = np.rint(RAMP * 60000).astype(kind), io.BytesIO()
    tags = {317: 2} if compression in ("tiff_lzw", "tiff_adobe_deflate") and kind == "u2" else {}
    Image.fromarray(values).save(buffer, "TIFF", compression=compression, tiffinfo=tags)
    with open_image(buffer.getvalue()) as image:
        np.testing.assert_array_equal(numbers(image), values)
