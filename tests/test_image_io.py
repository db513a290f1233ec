"""Images of every format become RGB without loss of contrast; decompression bombs are refused before decoding."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from beit_pretrain.transforms.grey_values import label_ids, note, notes
from beit_pretrain.transforms.image_io import (
    alpha_of,
    has_deep_colours,
    open_image,
    reason,
    to_channels,
    to_grey8,
    to_rgb,
)


def encoded(number: int, size: tuple[int, int] = (24, 18), kind: str = "JPEG", mode: str = "RGB") -> bytes:
    """A small noisy image that differs from every other `number`."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(values: np.ndarray, bits: int, colour: int = 0, clear: tuple[int, ...] = ()) -> bytes:
    """A PNG of any depth, of values (H, W) or (H, W, S); `clear`: its transparent colour."""
    height, width = values.shape[:2]
    ones = (values.reshape(height, -1, 1) >> np.arange(bits - 1, -1, -1)) & 1
    rows = np.packbits(ones.reshape(height, -1).astype(np.uint8), axis=1)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    palette = chunk(b"PLTE", bytes(value % 256 for value in range(3 * 2**bits))) if colour == 3 else b""
    transparent = chunk(b"tRNS", struct.pack(f">{len(clear)}H", *clear)) if clear else b""
    pixels = chunk(b"IDAT", zlib.compress(np.pad(rows, ((0, 0), (1, 0))).tobytes()))
    return b"\x89PNG\r\n\x1a\n" + header + palette + transparent + pixels + chunk(b"IEND", b"")


def bomb(side: int) -> bytes:
    """A PNG of a few bytes that claims side x side pixels."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0" * 99)) + chunk(b"IEND", b"")
    )


def test_decompression_bombs_are_refused():
    limit = Image.MAX_IMAGE_PIXELS
    with open_image(encoded(0, (10, 10), "PNG"), max_pixels=100) as image:
        assert to_rgb(image).size == (10, 10)
    for data in (encoded(1, (11, 10), "PNG"), bomb(60000)):
        with pytest.raises(ValueError, match="more than max_pixels=100"), open_image(data, max_pixels=100):
            pytest.fail("opened a bomb")
    with pytest.raises(ValueError, match="max_pixels"), open_image(bomb(60000)):
        pytest.fail("opened a bomb")
    assert limit == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("data", [b"", b"no image", b"%!PS-Adobe-3.0 EPSF"])
def test_non_images_are_refused(data):
    with pytest.raises(OSError, match="cannot identify") as caught, open_image(data):
        pytest.fail("opened what is no image")
    assert reason(caught.value) == "not an image in a known format"  # Pillow tells a memory address


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I", "F"])
def test_16_bit_grey_keeps_contrast(mode):
    ramp = np.linspace(1000, 5000, 64 * 64).reshape(64, 64)
    kinds = {"I;16": "<u2", "I;16B": ">u2", "I": "<i4", "F": "<f4"}
    image = Image.frombytes(mode, (64, 64), ramp.astype(kinds[mode]).tobytes())
    if mode == "I;16":  # through a file, as it comes from a scanner
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        image = Image.open(buffer)
    rgb = np.asarray(to_rgb(image)).astype(float)
    assert rgb.shape == (64, 64, 3)
    assert rgb.min() == 0
    assert rgb.max() == 255
    np.testing.assert_allclose(rgb[..., 0], np.clip((ramp - 1020) / 3960, 0, 1) * 255, atol=1)


def test_intensity_window():
    ramp = Image.fromarray(np.linspace(0, 4095, 100 * 100).astype(np.uint16).reshape(100, 100))  # 12 bits in 16
    grey, (low, high) = to_grey8(ramp, window=(1000, 2000))
    assert (grey.mode, low, high) == ("L", 1000, 2000)
    values = np.asarray(ramp).astype(float)
    np.testing.assert_allclose(np.asarray(grey), np.clip((values - 1000) / 1000, 0, 1) * 255, atol=0.51)
    outlier = np.asarray(ramp).copy()
    outlier[0, 0] = 65535  # a hot pixel must not darken the rest
    kept = np.asarray(to_grey8(Image.fromarray(outlier))[0]).astype(int)
    assert np.abs(kept - np.asarray(to_grey8(ramp)[0]).astype(int))[0, 1:].max() <= 1
    nearly_flat = np.full((100, 100), 7, np.uint16)
    nearly_flat[50, 50] = 9
    assert np.asarray(to_grey8(Image.fromarray(nearly_flat))[0]).max() == 255
    assert to_grey8(Image.fromarray(np.array([[-5, 5]], np.int32)), (-5, 5))[0].getpixel((1, 0)) == 255


def test_channels():
    colours = Image.open(io.BytesIO(encoded(0, kind="PNG", mode="RGBA")))
    deep = Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000)
    for channels, mode in ((1, "L"), (3, "RGB"), (4, "RGBA")):
        np.testing.assert_array_equal(to_channels(colours, channels), colours.convert(mode))
        assert to_channels(deep, channels).mode == mode
        assert np.asarray(to_channels(deep, 1)).std() > 50


def test_constant_and_nan_grey():
    assert np.asarray(to_rgb(Image.new("I;16", (4, 4), 40000))).max() == 0
    holes = Image.fromarray(np.array([[np.nan, 0], [np.inf, 8]], np.float32))
    assert np.asarray(to_rgb(holes))[..., 0].tolist() == [[0, 0], [255, 255]]


def test_to_rgb_matches_pillow():
    colours = Image.open(io.BytesIO(encoded(0, kind="PNG")))
    palette = colours.convert("P")
    palette.info["transparency"] = bytes(range(256))
    cmyk = Image.open(io.BytesIO(encoded(0, kind="JPEG", mode="CMYK")))
    images = [colours.convert(mode) for mode in ("1", "L", "LA", "RGBA", "P")] + [palette, cmyk]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = [np.asarray(image.convert("RGB")) for image in images]
    for image, pixels in zip(images, expected, strict=True):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            np.testing.assert_array_equal(np.asarray(to_rgb(image)), pixels)
    assert np.asarray(to_rgb(cmyk)).std() > 20
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    assert to_rgb(Image.open(buffer)).getpixel((0, 0)) == (255, 0, 0)
    assert np.asarray(to_rgb(Image.new("LAB", (1, 1), (255, 128, 128)))).min() >= 254  # white is L=100, a=b=0


REFLECTANCE = np.tile(np.linspace(0.02, 0.4, 48), (40, 1))


def with_hole(value: float | np.ndarray, kind: str = "f4", scale: float = 1.0) -> Image.Image:
    """A grey image with `value` in its first four rows' first ten pixels."""
    values = (REFLECTANCE * scale).astype(kind)
    values[:4, :10] = value
    return Image.fromarray(values)


@pytest.mark.parametrize(
    ("image", "nodata", "said", "hole"),
    [
        (with_hole(-9999), None, [-9999], 0),
        (with_hole(-9999), -9999.0, [-9999], 0),
        (with_hole(-3.4e38), None, [float(np.float32(-3.4e38))], 0),
        (with_hole(-3.4028234e38), -3.40282e38, [-3.40282e38], 0),
        (with_hole(1e31), None, [float(np.float32(1e31))], 0),
        (with_hole(np.nan), float("nan"), ["nan"], 0),
        (with_hole(0.9), 0.9, [0.9], 0),  # declared, and not far from the others
        (with_hole(-32768, "i4", 1e4), None, [-32768], 0),
        (with_hole(65535, "u2", 1e4), 65535.0, [65535], 0),
        (with_hole(65535, "u2", 1e4), None, [65535], 255),  # may be saturation: it stays white
        (with_hole(0, "u2", 1e4), 0.0, [0], 0),
        (with_hole(-999), None, [-999], 0),
        (with_hole(32767, "i4", 1e4), None, [32767], 255),
        (with_hole(np.repeat([-9999, -32768], 5), "i4", 1e4), None, [-32768, -9999], 0),
        (with_hole(np.repeat([-9999, 65535], 5), "i4", 1e4), None, [-9999, 65535], {0, 255}),
    ],
)
def test_no_data_has_no_part_in_percentiles(image, nodata, said, hole):
    if nodata is not None:
        note(image, nodata=nodata)
    grey, (low, high) = to_grey8(image)
    pixels = np.asarray(grey)
    assert (pixels[6:].min(), pixels[6:].max()) == (0, 255)
    assert set(np.unique(pixels[:4, :10])) == (hole if isinstance(hole, set) else {hole})
    assert grey.info["nodata"] == pytest.approx(said) if said != ["nan"] else grey.info["nodata"] == said
    values = np.asarray(image)[6:]
    assert values.min() <= low < high <= values.max()
    assert np.asarray(to_grey8(image, window=(low, high))[0])[6:].max() == 255  # the window is obeyed


@pytest.mark.parametrize(
    ("image", "black"),
    [
        (with_hole(0, "u2", 1e4), 0),  # zero beside an X-ray
        (with_hole(4095, "u2", 1e4), 200),  # saturated white
        (with_hole(-9999, "f4", 5e5), -9999),  # heights of 10,000 to 200,000: not far outside
        (with_hole(-1000, "i4", 1e4), -1000),  # air in a CT scan
        (Image.fromarray(np.where(REFLECTANCE > 0.2, 65535, 0).astype(np.uint16)), 0),  # black and white
        (Image.fromarray(np.where(REFLECTANCE > 0.2, 65535, REFLECTANCE * 196605).astype(np.uint16)), 3932),
        (Image.fromarray(np.where(REFLECTANCE > 0.2, -9999, 5).astype(np.int32)), -9999),  # of two values
    ],
)
def test_values_that_may_be_meant_stay(image, black):
    grey, (low, high) = to_grey8(image)
    assert "nodata" not in grey.info
    assert (low, high) == (pytest.approx(black, abs=1), np.asarray(image).max())
    assert np.asarray(grey).max() == 255


def test_masks_of_no_data_and_one_value_keep_their_shape():
    image = note(Image.fromarray(np.where(REFLECTANCE > 0.2, 1, 0).astype(np.uint16)), nodata=0.0)
    np.testing.assert_array_equal(np.asarray(to_grey8(image)[0]) == 255, REFLECTANCE > 0.2)
    nothing = note(Image.fromarray(np.zeros((4, 4), np.uint16)), nodata=0.0)
    assert np.asarray(to_grey8(nothing)[0]).max() == 0


@pytest.mark.parametrize("largest", [1, 3, 15, 255, 1023, 4095, 65535])
def test_numbers_of_pgm_files(largest):
    values = (np.arange(40 * 8).reshape(8, 40) * 211 % (largest + 1)).astype(">u2" if largest > 255 else "u1")
    plain = f"P2 40 8 {largest} " + " ".join(map(str, values.ravel().tolist()))
    for data in (f"P5 40 8 {largest}\n".encode() + values.tobytes(), plain.encode() + b"\n"):
        with open_image(data) as image:
            np.testing.assert_array_equal(label_ids(image), values)
        if largest > 255:
            with open_image(data) as image:
                assert to_grey8(image, percentiles=(0, 100))[1] == (values.min(), values.max())


def test_colours_of_more_than_8_bits_in_ppm_are_told():
    for largest, deep in ((255, False), (4095, True), (65535, True)):
        values = np.full((2, 2, 3), largest // 2, ">u2" if deep else "u1")
        with open_image(f"P6 2 2 {largest}\n".encode() + values.tobytes()) as image:
            assert has_deep_colours(image) == deep
            assert np.asarray(to_rgb(image)).max() in (127, 128)
        with open_image(f"P3 1 1 {largest} 1 2 3\n".encode()) as image:
            assert has_deep_colours(image) == deep


def test_numbers_of_jpeg_2000():
    values = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "JPEG2000", irreversible=False)
    file = bytearray(buffer.getvalue())
    with open_image(bytes(file)) as image:
        np.testing.assert_array_equal(label_ids(image), values)
    file[file.index(b"\xff\x4f\xff\x51") + 42] = 11  # 12 bits: Pillow shifts them by 4
    with open_image(bytes(file)) as image:
        assert notes(image).factor == 1 / 16
        assert to_grey8(image, percentiles=(0, 100))[1][1] <= 4095


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_transparent_grey_of_png(bits):
    values = np.arange(64).reshape(8, 8) % 2**bits
    with open_image(png(values, bits, clear=(1,))) as image:
        if bits == 16:
            assert to_grey8(image)[0].info["nodata"] == [1]
        else:
            np.testing.assert_array_equal(np.asarray(alpha_of(image)) == 0, values == 1)
    with open_image(png(values, bits, clear=(1,))) as image:
        np.testing.assert_array_equal(label_ids(image)[values != 1], values[values != 1])


def test_transparent_colour_of_16_bits():
    values = np.zeros((4, 4, 3), int)
    values[1, 2] = 1000, 2000, 3000
    with open_image(png(values, 16, 2, clear=(1000, 2000, 3000))) as image:
        assert np.argwhere(np.asarray(alpha_of(image)) == 0).tolist() == [[1, 2]]


def test_16_bits_of_grey_and_alpha_are_the_same_for_every_reader():
    values = np.stack([np.arange(64).reshape(8, 8) * 10 + 3000, np.full((8, 8), 40000)], axis=2)
    with open_image(png(values, 16, 4)) as image:
        pixels = np.asarray(to_channels(image, 4))
    assert (pixels[..., 0].min(), pixels[..., 0].max()) == (0, 255)
    assert (pixels[..., 3] == 40000 >> 8).all()


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_ids_of_png_label_maps(bits):
    values = np.arange(64).reshape(8, 8) % 2**bits
    for colour in (0, 3) if bits < 16 else (0,):
        with open_image(png(values, bits, colour)) as image:
            image.load()
            np.testing.assert_array_equal(label_ids(image), values)
        if bits > 1:  # opened by Pillow alone
            np.testing.assert_array_equal(label_ids(Image.open(io.BytesIO(png(values, bits, colour)))), values)
