"""Decodes image files: accepted formats, size limits before decoding, conversion to grey, RGB or RGBA."""

from __future__ import annotations

import io
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

# Pillow's name of a format -> extension in a shard. Not EPS: Pillow would run Ghostscript on untrusted files.
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tiff"}
EXTENSIONS |= {"JPEG2000": "jp2", "AVIF": "avif", "PPM": "ppm", "ICO": "ico", "TGA": "tga", "PCX": "pcx", "SGI": "sgi"}
IMAGE_EXTENSIONS = frozenset(EXTENSIONS.values()) | {"jpeg", "tif", "pgm", "pbm"}
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's mode by number of channels
MAX_PIXELS = 179_000_000  # of an image; about where Pillow, too, refuses one as a decompression bomb


@cache
def _formats() -> tuple[str, ...]:
    """The formats that this Pillow was built with."""
    Image.init()  # an explicit list of formats does not load the plugins
    return tuple(name for name in EXTENSIONS if name in Image.OPEN)


@contextmanager
def open_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """Open an image for the length of a `with` block, in which it must be decoded.

    Raises ValueError, before decoding, if it has more than `max_pixels`, and whatever Pillow raises for broken files.
    """
    formats = _formats()
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = max_pixels  # Pillow checks every size it reads, that of inner images too
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=formats) as image:
                yield image
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError(f"more than max_pixels={max_pixels} pixels") from None
    finally:
        Image.MAX_IMAGE_PIXELS = before


def reduced(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """A JPEG opened anew, to be decoded at 1/2, 1/4 or 1/8 of its side but not below `size`; else the image itself.

    That is, an image of another format, one that was decoded already, or one whose file cannot be read again. The given
    image stays as it is: Pillow's `draft` would leave its owner with one of another size.
    """
    file = getattr(image, "fp", None)
    if image.format not in ("JPEG", "MPO") or not getattr(image, "tile", None) or file is None or image.tell() != 0:
        return image
    try:
        place = file.tell()
        file.seek(0)
        data = file.read()
        file.seek(place)
    except (OSError, ValueError):
        return image
    again = Image.open(io.BytesIO(data), formats=("JPEG", "MPO"))
    if again.size != image.size:  # its owner has called `draft`
        return image
    again.draft(None, size)
    return again


def is_deep(image: Image.Image) -> bool:
    """Whether an image is grey with more than 8 bits a pixel (12 and 16 bits, integer or float)."""
    return image.mode == "F" or image.mode.startswith("I")


def has_deep_colours(image: Image.Image) -> bool:
    """Whether an image, not yet decoded, has 16 bits a channel and more than one, of which Pillow keeps the upper 8."""
    return not is_deep(image) and any(";16" in str(tile[3]) for tile in getattr(image, "tile", []))


def is_grey(image: Image.Image) -> bool:
    """Whether a decoded image has no colours by its kind: grey, with or without alpha, of 1 bit, or of grey palette."""
    if image.mode in ("L", "LA", "La", "1"):
        return True
    if image.mode != "P":
        return False
    palette = np.asarray(image.getpalette("RGB") or [], np.uint8).reshape(-1, 3)
    indices = np.unique(np.asarray(image))
    used = palette[indices[indices < len(palette)]]
    return bool((used == used[:, :1]).all())


def alpha_of(image: Image.Image) -> Image.Image | None:
    """The alpha channel (L) of a decoded image; None if it has none, or is opaque everywhere."""
    if not image.has_transparency_data:
        return None
    alpha = image.convert("RGBA").getchannel("A")
    return alpha if alpha.getextrema() != (255, 255) else None


def deep_grey_and_alpha(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[Image.Image, Image.Image] | None:
    """All 16 bits of the grey values (I;16), and the alpha channel (L, upper 8 bits), of a PNG of both; None: another.

    Pillow has no such image and keeps the upper bytes. Four bytes a pixel are RGBA of 8 bits to it, once the header
    says so: filters and interlacing of PNG go by bytes (ISO/IEC 15948, section 9.2).
    """
    if data[:16] != b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" or data[24:26] != b"\x10\x04":
        return None
    header = data[12:24] + b"\x08\x06" + data[26:29]
    with open_image(data[:12] + header + zlib.crc32(header).to_bytes(4) + data[33:], max_pixels) as image:
        values_HW4 = np.asarray(image)
    grey_HW = values_HW4[..., 0].astype(np.uint16) << 8 | values_HW4[..., 1]
    return Image.fromarray(grey_HW), Image.fromarray(np.ascontiguousarray(values_HW4[..., 2]))


def to_grey8(
    image: Image.Image, window: Sequence[float] | None = None, percentiles: Sequence[float] = (0.5, 99.5)
) -> tuple[Image.Image, tuple[float, float]]:
    """A grey image as 8 bits, by a linear map to 0 ... 255, and the values that became 0 and 255.

    These are those of `window`, or else these percentiles of the image's own values.
    Pillow would clip at 255 instead (and turn X-rays white). NaN becomes black, infinities the nearer end.
    """
    image.load()
    values = np.asarray(image).astype(np.float32)
    if window is not None:
        low, high = window
    else:
        # Of a large image every n-th value: percentiles hardly differ, and memory stays bounded.
        sample = values.reshape(-1)[:: 1 + values.size // 2**22]
        sample = sample[np.isfinite(sample)].astype(np.float64)
        low, high = (float(v) for v in np.percentile(sample, percentiles)) if sample.size else (0.0, 0.0)
        if low == high and sample.size:  # nearly all of one value: what differs must stay to be seen
            low, high = float(sample.min()), float(sample.max())
    scaled = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
    scaled = (np.clip(scaled, low, high) - low) * np.float32(255 / ((high - low) or 1))
    return Image.fromarray(np.rint(scaled).astype(np.uint8)), (low, high)


def to_channels(image: Image.Image, channels: int = 3) -> Image.Image:
    """Decode an image (an animation's current frame), convert it to 1 (grey), 3 (RGB) or 4 (RGBA) channels of 8 bits.

    As `PIL.Image.convert` does, but for grey images of more than 8 bits (`to_grey8`) and LAB (by colour profile). RGB
    is without the alpha channel, not blended with it. Raises what Pillow raises for broken files.
    """
    image.load()
    mode = MODES[channels]
    if is_deep(image):
        image, _ = to_grey8(image)
    if image.mode == "LAB":  # Pillow converts it by colour profile only
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
        assert converted is not None  # it is None for in-place conversion only
        return converted.convert(mode)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours as straight to RGB, but without a warning per image
    return image.convert(mode)


def to_rgb(image: Image.Image) -> Image.Image:
    """`to_channels` with three."""
    return to_channels(image, 3)


def reason(error: Exception) -> str:
    """Why a file is no usable image, in one line that is the same in every run and place.

    That is, without Pillow's memory addresses and the system's paths.
    """
    if isinstance(error, UnidentifiedImageError):
        return "not an image in a known format"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(f"{type(error).__name__}: {text}".split())
