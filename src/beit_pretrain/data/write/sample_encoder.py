"""The stored members of one image: read, decoded in full once, shrunk or brought to 8 bits where that is asked for.

A file that is no usable image raises what Pillow raises, and is rejected. One that cannot be read raises UserError: the
next time it may be readable.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from beit_pretrain.data import cifar
from beit_pretrain.data.listing import synthetic
from beit_pretrain.data.sources import Candidate, read_candidate
from beit_pretrain.data.write.settings import EncodeSettings
from beit_pretrain.data.write.staging import KEPT
from beit_pretrain.errors import UserError
from beit_pretrain.transforms import image_io as reading
from beit_pretrain.transforms import mean_color_grid as tiles
from beit_pretrain.transforms.grey_values import is_deep, label_ids, notes, to_grey8
from beit_pretrain.transforms.image_io import open_image, to_rgb

LARGEST_ID = 65_535  # of a label map as a PNG
LARGEST_JPEG = 65_500  # pixels a side that libjpeg writes


def sample_members(candidate: Candidate, label: int, settings: EncodeSettings) -> dict[str, bytes]:
    """The members of a sample by extension. Raises whatever Pillow raises for a file that is no usable image.

    Raises UserError if the file cannot be read, which is no fault of the image.
    """
    about: dict[str, Any] = {"source": candidate.key}
    if candidate.kind == "synthetic":
        drawn = synthetic.draw(candidate.offset, settings.seed, settings.size)
        members = {
            "jpg": _saved(Image.fromarray(drawn.pixels), "JPEG", quality=settings.quality),
            "seg.png": _saved(Image.fromarray(drawn.segmentation), "PNG"),
        }
        about |= {"shape": drawn.shape, "background": drawn.background}
    else:
        members = _image_members(candidate, settings, about)
    if label >= 0:
        members["cls"] = str(label).encode()
    return members | {"json": json.dumps(about).encode()}


def _image_members(candidate: Candidate, settings: EncodeSettings, about: dict[str, Any]) -> dict[str, bytes]:
    """Image and label map to store for a file, once both have been decoded in full. Adds to `about` what was done."""
    data = _read(candidate, settings.max_pixels)
    label_map, map_file = _label_map(candidate.mask, settings.max_pixels) if candidate.mask else (None, b"")
    if candidate.kind == "cifar":
        image, extension = cifar.image_of(data), ""
    else:
        image, extension = _decoded(data, settings, about, label_map.size if label_map else None)
    if label_map is not None and label_map.size != image.size:
        sizes = f"{label_map.width} x {label_map.height} pixels, the image {image.width} x {image.height}"
        raise ValueError(f"its label map has {sizes}")
    full, shorter = image.size, min(image.size)
    if settings.resize is not None and shorter > settings.resize:
        width, height = (round(side * settings.resize / shorter) for side in full)
        image, extension = _resized(image, (width, height)), ""
        if image.mode in ("L", "RGB") and max(image.size) <= LARGEST_JPEG:
            # With these marks scaled_decoding.py decodes a crop's rows alone.
            marks = {"restart_marker_rows": 1, "comment": tiles.comment(image)}
            extension, data = "jpg", _saved(image, "JPEG", quality=settings.quality, **marks)
    if not extension:  # not the source's bytes; lossless
        image.info.pop("transparency", None)  # a colour that new pixels may have by chance
        extension, data = "png", _saved(image, "PNG")
    members = {extension: data}
    if label_map is not None:
        if not map_file or image.size != full:
            map_file = _saved(label_map.resize(image.size, Image.Resampling.NEAREST), "PNG")
        members["seg.png"] = map_file
    return members


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """An image in another size, alpha as one more channel: Pillow weighs colours by it, and those that are transparent
    would not be what readers of RGB see of a kept file."""
    if image.mode not in ("LA", "RGBA"):
        return image.resize(size, Image.Resampling.LANCZOS)
    return Image.merge(image.mode, [band.resize(size, Image.Resampling.LANCZOS) for band in image.split()])


def _read(candidate: Candidate, max_pixels: int) -> bytes:
    """The bytes of a file. Raises UserError if it cannot be read, ValueError for what is not to be read, OSError for a
    link that led nowhere when it was listed already."""
    try:
        return read_candidate(candidate, max_pixels)
    except OSError as error:
        raise error if candidate.size == -1 else _unreadable(candidate.path, error) from None


def _unreadable(path: str, error: OSError) -> UserError:
    return UserError(f"{path} cannot be read: {error.strerror or error}; {KEPT}")


def _decoded(
    data: bytes, settings: EncodeSettings, about: dict[str, Any], map_size: tuple[int, int] | None
) -> tuple[Image.Image, str]:
    """An image decoded in full, L or RGB, with A if it is not opaque and the file's bytes are not kept; the extension
    under which they can be kept, "" = they cannot. It is upright if it has a label map, of `map_size`, that fits it so.

    Adds to `about` the values that became 0 and 255, and what else a reader would not expect.
    """
    with open_image(data, settings.max_pixels) as image:
        about |= _noted(image)
        orientation = reading.exif_orientation(image) if map_size else 1
        image.load()
        extension, deep = reading.EXTENSIONS[image.format or ""], is_deep(image)
        if deep or (settings.window and reading.is_grey(image)):
            grey = image if deep else image.convert("L")
            stored, about["window"] = to_grey8(grey, settings.window, settings.percentiles)
            about |= {"nodata": stored.info["nodata"]} if "nodata" in stored.info else {}
            extension = ""
        else:  # conversion may fail, too; readers convert in the same way
            stored = image.convert("L") if image.mode in ("L", "LA") else to_rgb(image)
        shrunk = settings.resize is not None and min(image.size) > settings.resize
        if (shrunk or not extension or orientation > 1) and (alpha := reading.alpha_of(image)) is not None:
            stored = Image.merge(f"{stored.mode}A", (*stored.split(), alpha))
    if map_size is not None:
        stored, turned = reading.turned_to_fit(stored, orientation, map_size)
        if turned:
            about["turned"], extension = orientation, ""
    return stored, extension


def _noted(image: Image.Image) -> dict[str, Any]:
    """What of an image, not yet decoded, is not read or not where one would look for it."""
    noted: dict[str, Any] = {"bits": 16} if reading.has_deep_colours(image) else {}
    if (page := notes(image).page) > 1:
        noted["page"] = page
    if left_out := notes(image).left_out:
        noted["bands_left_out"] = left_out
    return noted


def _label_map(file: str, max_pixels: int) -> tuple[Image.Image, bytes]:
    """A label map of the ids in a file (L or I;16), and the file's bytes if they are a PNG, else none.

    Raises OSError or ValueError if it is none, UserError if there is one that cannot be read.
    """
    try:
        data = Path(file).read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise OSError(f"its label map {Path(file).name}: {error.strerror}") from None
    except OSError as error:
        raise _unreadable(file, error) from None
    with open_image(data, max_pixels) as label_map:
        ids, is_png = label_ids(label_map), label_map.format == "PNG"
    if ids.min() < 0 or ids.max() > LARGEST_ID:
        raise ValueError(f"its label map has ids from {ids.min()} to {ids.max()}, not from 0 to {LARGEST_ID}")
    return Image.fromarray(ids.astype(np.uint8 if ids.max() < 256 else np.uint16)), data if is_png else b""


def _saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
