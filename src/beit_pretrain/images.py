"""File bytes -> image: which formats are read, size limits before decoding, conversion to RGB."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

# Pillow's name of a format -> extension in a shard. No EPS: Pillow would hand untrusted files to Ghostscript.
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tiff"}
EXTENSIONS |= {"JPEG2000": "jp2", "AVIF": "avif", "PPM": "ppm", "ICO": "ico", "TGA": "tga", "PCX": "pcx", "SGI": "sgi"}
IMAGE_EXTENSIONS = frozenset(EXTENSIONS.values()) | {"jpeg", "tif", "pgm", "pbm"}
MAX_PIXELS = 179_000_000  # of an image; about where Pillow, too, refuses one as a decompression bomb


@cache
def _formats() -> tuple[str, ...]:
    """The formats that this Pillow was built with."""
    Image.init()  # an explicit list of formats does not load the plugins
    return tuple(name for name in EXTENSIONS if name in Image.OPEN)


@contextmanager
def opened(data: bytes, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """Open an image, not yet decoded, for the length of a `with` block, in which it must be decoded.

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


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode an image (an animation's current frame) and convert it to 8-bit RGB, without its alpha channel.

    Grey images of 16 bits or more, integer or float, are scaled from their own minimum and maximum to 0 ... 255, where
    Pillow would clip at 255 (and turn X-rays white). Raises what Pillow raises for broken files.
    """
    image.load()
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image).astype(np.float64)
        finite = values[np.isfinite(values)]
        low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
        values = np.nan_to_num(values, nan=low, posinf=high, neginf=low) - low
        return Image.fromarray(np.rint(values * (255 / ((high - low) or 1))).astype(np.uint8)).convert("RGB")
    if image.mode == "LAB":  # Pillow converts it by colour profile only
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
        assert converted is not None  # it is None for in-place conversion only
        return converted
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours as straight to RGB, but without a warning per image
    return image.convert("RGB")


def reason(error: Exception) -> str:
    """Why a file is no usable image, in one line that is the same in every run and place.

    That is, without Pillow's memory addresses and the system's paths.
    """
    if isinstance(error, UnidentifiedImageError):
        return "not an image in a known format"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(f"{type(error).__name__}: {text}".split())
