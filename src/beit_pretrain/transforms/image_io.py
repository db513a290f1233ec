"""Decodes image files: accepted formats, size limits before decoding, conversion to grey, RGB or RGBA.

Where Pillow reads other values than a file has (tiff.py, PNG, JPEG 2000), they are put right here, for every reader.
"""

from __future__ import annotations

import io
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

from beit_pretrain.transforms.grey_values import is_deep, note, notes, to_grey8
from beit_pretrain.transforms.tiff import open_tiff, pixel_limit
from beit_pretrain.transforms.tiff_pages import is_tiff

# Pillow's name of a format -> extension in a shard. Not EPS: Pillow would run Ghostscript on untrusted files.
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tiff"}
EXTENSIONS |= {"JPEG2000": "jp2", "AVIF": "avif", "PPM": "ppm", "ICO": "ico", "TGA": "tga", "PCX": "pcx", "SGI": "sgi"}
IMAGE_EXTENSIONS = frozenset(EXTENSIONS.values()) | frozenset(
    "jpeg jpe jfif jif mpo tif apng dib j2k jpf jpx j2c jpc avifs pgm pbm pnm pfm icb vda vst rgba".split()
)
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's mode by number of channels
PNG_START = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
_Turn = Image.Transpose
TURNS = {2: _Turn.FLIP_LEFT_RIGHT, 3: _Turn.ROTATE_180, 4: _Turn.FLIP_TOP_BOTTOM, 5: _Turn.TRANSPOSE}  # to upright
TURNS |= {6: _Turn.ROTATE_270, 7: _Turn.TRANSVERSE, 8: _Turn.ROTATE_90}
HEAD = 32  # bytes that tell a file's format
MAX_PIXELS = 179_000_000  # of an image; about where Pillow, too, refuses one as a decompression bomb


@cache
def _formats() -> tuple[str, ...]:
    """The formats that this Pillow was built with."""
    Image.init()  # an explicit list of formats does not load the plugins
    return tuple(name for name in EXTENSIONS if name in Image.OPEN)


@contextmanager
def open_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """Open an image for the length of a `with` block, in which it must be decoded.

    Raises ValueError, before decoding, if it has more than `max_pixels`, or is a TIFF whose pixels have no defined
    meaning here or are a camera's raw data, and whatever Pillow raises for broken files.
    """
    try:
        with pixel_limit(max_pixels), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with _opened(data, max_pixels) as image:
                yield image
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError(f"more than max_pixels={max_pixels} pixels") from None


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
    if (again.size, again.mode) != (image.size, image.mode):  # its owner has called `draft`
        return image
    again.draft(None, size)
    return again


def _opened(data: bytes, max_pixels: int) -> Image.Image:
    """An opened image, with notes on its values where Pillow's are others than the file's."""
    if is_tiff(data):
        return open_tiff(data, max_pixels)
    if data[:16] == PNG_START and data[24:26] == b"\x10\x04":
        return _deep_grey_and_alpha(data)
    image = Image.open(io.BytesIO(data), formats=_formats())
    if image.format == "PNG" and (clear := image.info.get("transparency")) is not None:
        _put_transparency_right(image, clear)
    if image.format == "JPEG2000" and image.mode in ("L", "I;16") and (start := data.find(b"\xff\x4f\xff\x51")) >= 0:
        depth = data[start + 42]  # of the first component, in bits less one, and whether it has a sign
        bits, shift = 1 + (depth & 127), 2 ** (depth & 127) if depth > 127 else 0
        note(image, factor=2.0 ** (bits - (8 if image.mode == "L" else 16)), offset=-float(shift))
    elif tiles := getattr(image, "tile", None):
        codec, args = tiles[0][0], tiles[0][3]
        if image.format != "JPEG" and (codec.startswith("ppm") or (isinstance(args, str) and args.startswith("L;"))):
            note(image)  # its decoder's settings are gone once it is decoded
    return image


def _put_transparency_right(image: Image.Image, clear: Any) -> None:
    """The transparent colour of a PNG, not yet decoded, in Pillow's values instead of the file's."""
    tiles = getattr(image, "tile", None)
    raw = str(tiles[0][3]) if tiles else ""
    if not isinstance(clear, int | tuple):  # per entry of a palette
        return
    if image.mode == "I;16" and isinstance(clear, int):
        note(image, nodata=float(clear))
    elif raw in ("L;2", "L;4"):
        note(image)  # its decoder's settings are gone once it is decoded
        image.info["transparency"] = clear * {"L;2": 85, "L;4": 17}[raw]
    elif ";16" in raw and isinstance(clear, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in clear)


def has_deep_colours(image: Image.Image) -> bool:
    """Whether an image, not yet decoded, has more than 8 bits a channel and several, of which 8 are kept."""
    if is_deep(image):
        return False
    tiles = getattr(image, "tile", None) or []
    ppm = [tile[3] for tile in tiles if tile[0] in ("ppm", "ppm_plain") and isinstance(tile[3], tuple)]
    raw = [str(tile[3]) for tile in tiles]
    wide = any(";16" in args and not args.startswith("BGR;16") for args in raw)  # that is 5 and 6 bits a channel
    return wide or notes(image).bits > 8 or any(largest > 255 for _, largest in ppm)


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
    if (alpha := notes(image).alpha) is None:
        if not image.has_transparency_data or is_deep(image):
            return None
        alpha = image.convert("RGBA").getchannel("A")
    return alpha if alpha.getextrema() != (255, 255) else None


def _deep_grey_and_alpha(data: bytes) -> Image.Image:
    """All 16 bits of the grey values of a PNG of these and of alpha, which its notes have (upper 8 bits).

    Pillow has no such image and keeps the upper bytes. Four bytes a pixel are RGBA of 8 bits to it, once the header
    says so: filters and interlacing of PNG go by bytes (ISO/IEC 15948, section 9.2).
    """
    header = data[12:24] + b"\x08\x06" + data[26:29]
    data = data[:12] + header + zlib.crc32(header).to_bytes(4) + data[33:]
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        values_HW4 = np.asarray(image)
    grey_HW = values_HW4[..., 0].astype(np.uint16) << 8 | values_HW4[..., 1]
    grey = note(Image.fromarray(grey_HW), alpha=Image.fromarray(np.ascontiguousarray(values_HW4[..., 2])))
    grey.format = "PNG"
    return grey


def exif_orientation(image: Image.Image) -> int:
    """How a photo was stored, 1 ... 8 (EXIF); 1, upright, if its file does not say so. Pillow turns TIFFs itself."""
    if image.format == "TIFF":
        return 1
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # broken EXIF raises nearly everything, and leaves a photo that can be read
        return 1
    return found if found in TURNS else 1


def turned_to_fit(photo: Image.Image, orientation: int, size: tuple[int, int]) -> tuple[Image.Image, bool]:
    """A photo turned upright if a label map of `size` (width, height) fits it then, and whether it was.

    Annotation tools show photos upright: a map that fits both the upright and the stored photo is one of the former.
    """
    upright = photo.size[::-1] if orientation > 4 else photo.size
    if orientation == 1 or upright != size:
        return photo, False
    return photo.transpose(TURNS[orientation]), True


def to_channels(image: Image.Image, channels: int = 3) -> Image.Image:
    """Decode an image (an animation's current frame), convert it to 1 (grey), 3 (RGB) or 4 (RGBA) channels of 8 bits.

    As `PIL.Image.convert` does, but for grey images of more than 8 bits (`to_grey8`) and LAB (by colour profile). RGB
    is without the alpha channel, not blended with it. Raises what Pillow raises for broken files.
    """
    image.load()
    mode = MODES[channels]
    if is_deep(image):
        alpha = notes(image).alpha
        image, _ = to_grey8(image)
        if alpha is not None:
            image = Image.merge("LA", (image, alpha))
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


def starts_as_image(head: bytes) -> bool:
    """Whether a file with these first `HEAD` bytes looks like an accepted format, as far as that has a mark."""
    # Pillow's tests of these two accept texts such as BMW or Python.
    if (head[:2] == b"BM" and any(head[6:10])) or (head[:1] == b"P" and not head[2:3].isspace()):
        return False
    tests = (Image.OPEN[name][1] for name in _formats())
    return any(test(head) for test in tests if test is not None)
