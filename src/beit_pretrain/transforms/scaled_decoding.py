"""Decodes only what a crop needs, and resizes it.

JPEGs are decoded at 1/2, 1/4 or 1/8 of their size where the crop allows it. Resizing is torch's antialiased bicubic
on uint8: Pillow's filter within rounding, at a quarter of its time. If simplejpeg is installed, JPEGs are decoded by it
straight into an array, and of those with restart markers only the rows that the crop needs; the pixels are the same,
since Pillow and simplejpeg are libjpeg-turbo with the same settings.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from beit_pretrain.transforms.image_io import MAX_PIXELS, open_image, reduced, to_channels
from beit_pretrain.transforms.jpeg_rows import cut_rows
from beit_pretrain.transforms.mean_color_grid import in_comment, in_jpeg, of_image

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

SAME_RGB = ("YCbCr", "Gray", "RGB")  # colours of a JPEG; CMYK's two kinds differ


class Crop(NamedTuple):
    """A box in pixels of the original image."""

    top: int
    left: int
    height: int
    width: int


class Cropped(NamedTuple):
    array: np.ndarray  # uint8 (h, w, C), the crop
    tiles: np.ndarray  # uint8 (64, C), the whole image's mean colours


def cropped_array(image: Image.Image | TurboJpeg, crop: Crop, size: int, channels: int = 3) -> Cropped:
    """The crop of an opened image, at least `size` pixels a side where the image has them, and its mean colours.

    Raises what Pillow raises for broken files.
    """
    if isinstance(image, TurboJpeg):
        if (cropped := turbo_crop(image, crop, size)) is not None:
            return cropped
        with open_image(image.data) as again:
            return cropped_array(again, crop, size, channels)
    tiles = in_comment(image.info.get("comment"), channels)
    image, crop = scaled_decode(image, crop, size, channels)
    # A copy, since torch warns of arrays that cannot be written to.
    array = np.array(image.crop((crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)))
    return Cropped(array.reshape(crop.height, crop.width, channels), of_image(image) if tiles is None else tiles)


def scaled_decode(image: Image.Image, crop: Crop, size: int, channels: int = 3) -> tuple[Image.Image, Crop]:
    """Decode to `channels`, JPEGs at 1/2, 1/4 or 1/8 of their size where the crop still keeps `size` pixels a side.

    Returns the image and the crop in its pixels. The given image keeps its size.
    """
    width, height = image.size
    if image.format in ("JPEG", "MPO") and (scale := decoding_scale(crop, size)) > 1:
        image = reduced(image, (max(1, width // scale), max(1, height // scale)))
        crop = crop_in(crop, (width, height), image.size)
    return to_channels(image, channels), crop


def decoding_scale(crop: Crop, size: int) -> int:
    """1, 2, 4 or 8: the factor by which an image may be decoded smaller for a view of `size`."""
    factor = min(crop.height, crop.width) / size
    return next((scale for scale in (8, 4, 2) if factor >= scale), 1)


def crop_in(crop: Crop, image_size: tuple[int, int], decoded_size: tuple[int, int]) -> Crop:
    """A box of an image of (width, height) in the pixels of its decoded version."""
    if image_size == decoded_size:
        return crop
    sx, sy = decoded_size[0] / image_size[0], decoded_size[1] / image_size[1]
    height, width = max(1, round(crop.height * sy)), max(1, round(crop.width * sx))
    return Crop(
        min(int(crop.top * sy), decoded_size[1] - height),
        min(int(crop.left * sx), decoded_size[0] - width),
        height,
        width,
    )


class TurboJpeg(NamedTuple):
    """A JPEG of which only the header was read, in place of an opened PIL image."""

    data: bytes
    size: tuple[int, int]  # width, height
    tiles: np.ndarray | None = None  # the image's mean colours, if the file has them in a comment


def turbo_jpeg(data: bytes) -> TurboJpeg | None:
    """The JPEG in `data` if simplejpeg decodes it to the same RGB as Pillow; None = open it with Pillow."""
    if simplejpeg is None or data[:3] != b"\xff\xd8\xff":
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    if colours not in SAME_RGB or not 0 < width * height <= MAX_PIXELS:
        return None
    return TurboJpeg(data, (width, height), in_jpeg(data))


def turbo_crop(image: TurboJpeg, crop: Crop, size: int) -> Cropped | None:
    """`cropped_array` by simplejpeg; None if it fails: for damaged files Pillow decides."""
    data, first, scale = image.data, 0, decoding_scale(crop, size)
    try:
        if scale > 1:
            width, height = (math.ceil(side / scale) for side in image.size)
            array = simplejpeg.decode_jpeg(data, "RGB", min_height=height, min_width=width)
            crop = crop_in(crop, image.size, (array.shape[1], array.shape[0]))
        else:
            if image.tiles is not None:  # else the whole image is needed for them
                data, first = cut_rows(data, crop.top, crop.top + crop.height) or (data, 0)
            array = simplejpeg.decode_jpeg(data, "RGB")
            crop = crop._replace(top=crop.top - first)
    except ValueError:
        return None
    tiles = of_image(array) if image.tiles is None else image.tiles
    return Cropped(array[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width], tiles)


def resized(array_HWC: np.ndarray, size: int) -> Tensor:
    """Antialiased bicubic resize of an array of 8 bits a channel: uint8 (C, size, size), channels_last."""
    if array_HWC.shape[2] == 4:  # Pillow weighs colours by alpha, as it does in the authors' order
        image = Image.fromarray(array_HWC, "RGBA").resize((size, size), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)
    # Channels innermost in memory, or torch's kernel would spend half of its time on copies.
    image_1CHW = torch.from_numpy(np.ascontiguousarray(array_HWC))[None].permute(0, 3, 1, 2)
    return F.interpolate(image_1CHW, (size, size), mode="bicubic", antialias=True)[0]
