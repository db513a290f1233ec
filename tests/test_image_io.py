"""Images of every format become RGB without loss of contrast; decompression bombs are refused before decoding."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from beit_pretrain.transforms.image_io import open_image, reason, to_channels, to_grey8, to_rgb


def encoded(number: int, size: tuple[int, int] = (24, 18), kind: str = "JPEG", mode: str = "RGB") -> bytes:
    """A small noisy image that differs from every other `number`."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def bomb(side: int) -> bytes:
    """A PNG of a few bytes that claims side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

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
