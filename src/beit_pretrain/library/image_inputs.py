"""Images and label maps as people have them, PIL, NumPy, torch, batches and lists of these, as a list of single ones.

Shapes: B batch, C channels, H W pixels.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from beit_pretrain.errors import UserError, stop_if_memory_was_short
from beit_pretrain.transforms.grey_values import label_ids
from beit_pretrain.transforms.image_io import MODES, TURNS, exif_orientation, open_image, reason, to_channels

FIRST, LAST = "channels_first", "channels_last"
KINDS = "a PIL image, a NumPy array, a torch tensor, a path, or a list of these"


def flat(images: Any, dimensions: int) -> list[Image.Image | np.ndarray]:
    """Single images of anything that holds some, in order; paths are opened.

    Args:
        dimensions: of a single array: 3 for images, of which grey ones may have 2; 2 for label maps.

    Raises TypeError for other things, ValueError for arrays of other dimensions, UserError for unreadable files.
    """
    if isinstance(images, list | tuple):
        return [single for some in images for single in flat(some, dimensions)]
    name, kind = ("images", "image") if dimensions == 3 else ("segmentation_maps", "label map")
    if isinstance(images, Image.Image):
        return [images]
    if isinstance(images, str | os.PathLike):
        return [opened(os.fspath(images))]
    array = as_array(images, name)
    if dimensions == 2 and array.ndim in (3, 4) and array.shape[-1] == 1:  # (H, W, 1), (B, H, W, 1)
        array = array[..., 0]
    if array.ndim == dimensions + 1:
        return list(array)
    if array.ndim == dimensions or (array.ndim, dimensions) == (2, 3):
        return [array]
    raise ValueError(f"an array of shape {array.shape} is no {kind} and no batch of them")


def as_array(values: Any, name: str) -> np.ndarray:
    """NumPy, torch and what else offers itself as an array. Raises TypeError, which calls it `name`."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        return (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    if not hasattr(values, "__array__"):
        raise TypeError(f"{name} must be {KINDS}; got {type(values).__name__}")
    array = np.asarray(values)
    if array.dtype.kind not in "buif" or array.dtype.itemsize > 8:
        raise TypeError(f"{name} must hold numbers of up to 64 bits, got an array of {array.dtype}")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def opened(path: str) -> Image.Image:
    """An image file, decoded, and turned upright if its EXIF says so. Raises UserError if it cannot be read."""
    if "://" in path[:10]:
        raise ValueError(f"images are not fetched from the network: {path[:200]}")
    try:
        with open_image(Path(path).read_bytes()) as image:
            turn = TURNS.get(exif_orientation(image))
            image.load()
            return image.copy() if turn is None else image.transpose(turn)
    except Exception as error:  # broken files raise nearly everything
        stop_if_memory_was_short(error, path)
        raise UserError(f"{path[:200] or repr(path)} cannot be read as an image: {reason(error)}") from None


def image_values(
    image: Image.Image | np.ndarray, channels: int, convert: bool | None = None, order: str | None = None
) -> Image.Image | np.ndarray:
    """A single image in the wanted channels: a PIL image of 8 bits, or an array (C, H, W) of its own type.

    Args:
        channels: wanted; another number is converted, as `to_channels` does: RGB is without alpha, not blended with it.
        convert: True = RGB, alpha blended with white, as transformers 5.23 does; False = the channels as they are.
        order: FIRST or LAST, of an array's channels; None = found from its shape.

    Raises ValueError, and UserError for an image that cannot be decoded.
    """
    shape = image.shape if isinstance(image, np.ndarray) else image.size
    if 0 in shape:
        raise ValueError(f"an image of {' x '.join(map(str, shape))} has no pixels")
    if isinstance(image, np.ndarray):
        return converted(channels_first(image, channels, order), channels, convert)
    try:
        if convert is None and channels in MODES:
            return to_channels(image, channels)
        if convert and image.has_transparency_data:
            return on_white(channels_first(np.asarray(image.convert("RGBA")), 4, LAST))
        return to_channels(image, 3) if convert else channels_first(np.asarray(image), channels, LAST)
    except Exception as error:
        stop_if_memory_was_short(error, "an image")
        raise UserError(f"an image of mode {image.mode} cannot be decoded: {reason(error)}") from None


def channels_first(image: np.ndarray, channels: int, order: str | None) -> np.ndarray:
    """An image (H, W), (C, H, W) or (H, W, C) as (C, H, W). Where both could be, the channels are first."""
    if image.ndim == 2:
        return image[None]
    if order is None:
        known = {1, 3, 4, channels}
        if image.shape[0] not in known and image.shape[2] not in known:
            raise ValueError(
                f"an image of shape {image.shape} has {channels} channels neither first nor last; say input_data_format"
            )
        order = FIRST if image.shape[0] in known else LAST
    return image if order == FIRST else image.transpose(2, 0, 1)


def converted(image_CHW: np.ndarray, channels: int, convert: bool | None) -> np.ndarray:
    """An array in other channels, as `image_values` says; what has no rule stays as it is."""
    wanted = 3 if convert else channels
    count = len(image_CHW)
    if convert is False or count == wanted:
        return image_CHW
    if count == 1:
        return image_CHW.repeat(wanted, 0)
    if (count, wanted) == (4, 3):
        return on_white(image_CHW) if convert else image_CHW[:3]
    return image_CHW


def on_white(image_CHW: np.ndarray) -> np.ndarray:
    """RGBA, integers up to 255 or floats up to 1, as RGB over white. Raises ValueError for larger ones."""
    integer = image_CHW.dtype.kind in "bui"
    white = 255 if integer else 1.0
    if not (image_CHW.min() >= 0 and image_CHW.max() <= white):
        raise ValueError(f"RGBA with values from {image_CHW.min()} to {image_CHW.max()}, not from 0 to {white}")
    alpha_HW = image_CHW[3] / white
    blended = image_CHW[:3] * alpha_HW + (1 - alpha_HW) * white
    return (np.rint(blended) if integer else blended).astype(image_CHW.dtype)


def to_8_bits(image_CHW: np.ndarray) -> tuple[np.ndarray, bool]:
    """(levels uint8, whether these are 255 times the values): floats up to 1 are multiplied, others up to 255 rounded.

    Raises ValueError for values outside, which have no 8 bits.
    """
    if image_CHW.dtype == np.uint8:
        return image_CHW, False
    low, high = image_CHW.min(), image_CHW.max()
    if not (low >= 0 and high <= 255):  # NaN is neither
        raise ValueError(
            f"values from {low} to {high} cannot be resized: floats in [0, 1], or numbers up to 255, are needed; "
            "do_resize=False takes all"
        )
    scaled = image_CHW.dtype.kind == "f" and bool(high <= 1)
    return np.rint(image_CHW * 255.0 if scaled else image_CHW).astype(np.uint8), scaled


def pictures(levels_CHW: np.ndarray) -> list[Image.Image]:
    """8 bits as one PIL image, or, in a number of channels that Pillow lacks, one for each channel."""
    if len(levels_CHW) in (3, 4):
        return [Image.fromarray(np.ascontiguousarray(levels_CHW.transpose(1, 2, 0)))]
    return [Image.fromarray(np.ascontiguousarray(channel_HW)) for channel_HW in levels_CHW]


def label_maps(maps: Any) -> list[Image.Image]:
    """Label maps, as `flat` takes images, also (B, 1, H, W), as PIL images of 32 bits.

    Raises ValueError for what is none, UserError for what cannot be decoded.
    """
    if hasattr(maps, "ndim") and maps.ndim == 4 and maps.shape[1] == 1:
        maps = maps[:, 0]
    return [Image.fromarray(_ids(one)) for one in flat(maps, 2)]


def _ids(labels: Image.Image | np.ndarray) -> np.ndarray:
    if isinstance(labels, Image.Image):
        try:
            return label_ids(labels)
        except OSError as error:
            raise UserError(f"a label map of mode {labels.mode} cannot be decoded: {reason(error)}") from None
    if not labels.size:
        raise ValueError(f"a label map of shape {labels.shape} has no pixels")
    with np.errstate(invalid="ignore"):
        ids_HW = labels.astype(np.int32)
    if not np.array_equal(ids_HW, labels):
        raise ValueError("a label map must hold whole numbers of 32 bits")
    return ids_HW
