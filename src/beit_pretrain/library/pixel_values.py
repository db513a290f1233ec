"""One image, or one label map, resized, cropped, rescaled and normalised by the options of a processor."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from beit_pretrain.library.image_inputs import pictures, to_8_bits
from beit_pretrain.library.processor_options import Options
from beit_pretrain.transforms.image_io import MAX_PIXELS
from beit_pretrain.transforms.jitter import normalise
from beit_pretrain.transforms.processor_view import Layout, ProcessorView
from beit_pretrain.transforms.segmentation import reduced_ids


def pixel_values(image: Image.Image | np.ndarray, options: Options) -> Tensor:
    """An image as a network takes it (C, H, W), float32 if it is rescaled or normalised, else of its own type.

    Resized are 8 bits, by Pillow; an array that is not resized keeps its precision. Raises ValueError.
    """
    view, scaled = options.view, False
    if isinstance(image, Image.Image):
        check_size(view, image.height, image.width)
        values_CHW = _planes([view.applied(image)])
    elif view.resize is None:
        values_CHW = cut(image, view.layout(*image.shape[1:]))
    else:
        check_size(view, *image.shape[1:])
        levels_CHW, scaled = to_8_bits(image)
        values_CHW = _planes([view.applied(part) for part in pictures(levels_CHW)])
    values = torch.from_numpy(values_CHW.copy())
    values = values.float() / 255 if scaled else values
    if options.factor is not None:
        if scaled and values_CHW.any():
            warnings.warn(
                "floats in [0, 1] are multiplied by rescale_factor once more; do_rescale=False leaves them",
                stacklevel=4,
            )
        values = values.float() * options.factor
    return values if options.mean is None else normalised(values.float(), options)


def check_size(view: ProcessorView, height: int, width: int) -> None:
    """Raise ValueError for an image that would become too large, as thin ones do by their shorter side."""
    rows, columns = view.layout(height, width).size
    if rows * columns > MAX_PIXELS:
        raise ValueError(f"an image of {height} x {width} pixels would become {rows} x {columns}: set a crop_size")


def _planes(parts: list[Image.Image]) -> np.ndarray:
    """(C, H, W) of one image, or of one for each channel."""
    planes = [np.asarray(part) for part in parts]
    return planes[0].transpose(2, 0, 1) if planes[0].ndim == 3 else np.stack(planes)


def normalised(image_CHW: Tensor, options: Options) -> Tensor:
    """Less the mean and divided by the standard deviation. Raises ValueError for another number of channels."""
    by_channel = []
    for name, given in (("image_mean", options.mean), ("image_std", options.std)):
        values = tuple(given) if isinstance(given, list) else (given or 0.0,) * len(image_CHW)
        if len(values) != len(image_CHW):
            raise ValueError(f"{name} has {len(values)} values for an image of {len(image_CHW)} channels")
        by_channel.append(values)
    return normalise(image_CHW, *by_channel)


def cut(values_CHW: np.ndarray, layout: Layout) -> np.ndarray:
    """The view of an image that is not resized, 0 beyond its edges."""
    _, (top, left), (height, width) = layout
    found_CHW = np.zeros_like(values_CHW, shape=(len(values_CHW), height, width))
    part_CHW = values_CHW[:, max(0, top) : top + height, max(0, left) : left + width]
    upper, first = max(0, -top), max(0, -left)
    found_CHW[:, upper : upper + part_CHW.shape[1], first : first + part_CHW.shape[2]] = part_CHW
    return found_CHW


def labels(label_map: Image.Image, options: Options) -> Tensor:
    """A label map (H, W) int64: resized to the nearest pixel, cropped, then reduced, with the 0 beyond its edges.

    Raises ValueError for an id below 0, which cannot be reduced.
    """
    view = options.view
    if options.reduce_labels and (lowest := int(np.asarray(label_map).min())) < 0:
        raise ValueError(
            f"a label map has the id {lowest}: do_reduce_labels=True takes ids from 0; those to ignore are 0 or 255"
        )
    check_size(view, label_map.height, label_map.width)
    nearest = ProcessorView(resize=view.resize, crop=view.crop, resample=int(Image.Resampling.NEAREST))
    ids_HW = np.asarray(nearest.applied(label_map)).astype(np.int64)
    return torch.from_numpy(reduced_ids(ids_HW) if options.reduce_labels else ids_HW)
