"""Colour jitter and normalisation on the training device; both views of an image get the same jitter.

A worker draws the jitter of its images (`draw_jitter`) and sends uint8; `color_jitter` applies it. `pil_jitter` is the
authors' way, on the whole image in the worker. Shapes: B batch, C channels, H W pixels, K colours of the whole image.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from beit_pretrain.errors import UserError

HALF = (0.5, 0.5, 0.5)  # mean and std of BEiT's ImageNet-22k pre-training
BRIGHTNESS, CONTRAST, SATURATION = range(3)
ORDERS = np.array(list(permutations(range(3))))
GREY = (0.2989, 0.587, 0.114)  # torchvision's weights of red, green and blue
EPSILON = 1e-3  # of a level of 8 bits: by how much float32 may miss an integer


class Jitter(NamedTuple):
    """Colour jitter of one image: the factor of brightness, contrast and saturation, and the order they come in."""

    factors: np.ndarray  # (3,) float32, 1 = unchanged
    order: np.ndarray  # (3,) int64, a permutation of BRIGHTNESS, CONTRAST, SATURATION


def draw_jitter(rng: np.random.Generator, strength: Sequence[float] | None) -> Jitter:
    """Factors uniform in [1 - s, 1 + s], not below 0, for each of the three strengths, and a random order."""
    strength = strength or (0.0, 0.0, 0.0)
    low = [max(0.0, 1 - s) for s in strength]
    factors = [a + (1 + s - a) * rng.random() for a, s in zip(low, strength, strict=True)]
    return Jitter(np.array(factors, np.float32), ORDERS[int(len(ORDERS) * rng.random())])


def pil_jitter(image: Image.Image, jitter: Jitter) -> Image.Image:
    """Colour jitter of a PIL image, rounded to 8 bits after each operation, as in the authors' loader."""
    from torchvision.transforms import functional as F  # slow to import

    adjust = {BRIGHTNESS: F.adjust_brightness, CONTRAST: F.adjust_contrast, SATURATION: F.adjust_saturation}
    for operation in jitter.order:
        image = adjust[int(operation)](image, float(jitter.factors[operation]))
    return image


def jitter_arrays(jitter: Jitter, tiles: np.ndarray) -> dict[str, np.ndarray]:
    """The jitter as a sample carries it; `tiles` (64, C) uint8 are the whole image's colours."""
    return {"jitter_factors": jitter.factors, "jitter_order": jitter.order, "jitter_tiles": tiles}


def color_jitter(image_BCHW: Tensor, factors_B3: Tensor, order_B3: Tensor, tiles_BKC: Tensor | None = None) -> Tensor:
    """Colour jitter of a batch of images in [0, 1], each with its own factors and order, in static shapes.

    Every operation blends the image with a reference, as in torchvision: black, its mean grey, or its grey image.
    With `tiles_BKC`, the whole image's colours in [0, 1], contrast blends with their mean grey and every operation
    rounds down to 8 bits, as Pillow does on the whole image. Saturation does not change images of one channel; a fourth
    channel is left alone, as Pillow leaves alpha.
    """
    if image_BCHW.shape[1] > 3:
        of_three = None if tiles_BKC is None else tiles_BKC[..., :3]
        colours = color_jitter(image_BCHW[:, :3], factors_B3, order_B3, of_three)
        return torch.cat([colours, image_BCHW[:, 3:]], dim=1)
    whole_BCK1 = None if tiles_BKC is None else tiles_BKC.transpose(1, 2)[..., None]
    for slot in range(3):
        operation_B111 = order_B3[:, slot].view(-1, 1, 1, 1)
        factor_B111 = factors_B3.gather(1, order_B3[:, slot : slot + 1]).to(image_BCHW.dtype).view(-1, 1, 1, 1)
        mean_B111 = _grey(image_BCHW if whole_BCK1 is None else whole_BCK1).mean(dim=(1, 2, 3), keepdim=True)
        image_BCHW = _blended(image_BCHW, operation_B111, factor_B111, mean_B111)
        if whole_BCK1 is not None:
            image_BCHW = (image_BCHW * 255 + EPSILON).floor() / 255
            whole_BCK1 = (_blended(whole_BCK1, operation_B111, factor_B111, mean_B111) * 255 + EPSILON).floor() / 255
    return image_BCHW


def _grey(image_BCHW: Tensor) -> Tensor:
    channels = image_BCHW.shape[1]
    weight_C = constant(GREY if channels == 3 else (1.0 / channels,) * channels, image_BCHW)
    return (image_BCHW * weight_C.view(1, -1, 1, 1)).sum(1, keepdim=True)  # no matmul: autocast would round it


def _blended(image_BCHW: Tensor, operation_B111: Tensor, factor_B111: Tensor, mean_B111: Tensor) -> Tensor:
    """One operation of the jitter: away from, or towards, black, the mean grey or the image's own grey."""
    reference = torch.where(operation_B111 == CONTRAST, mean_B111, _grey(image_BCHW))
    reference = torch.where(operation_B111 == BRIGHTNESS, torch.zeros_like(reference), reference)
    return torch.lerp(reference.expand_as(image_BCHW), image_BCHW, factor_B111).clamp(0, 1)


def per_channel(values: Sequence[float], channels: int, name: str) -> tuple[float, ...]:
    """Mean or std for `channels` channels: as given, or one value for all. Raises UserError for another number."""
    if len(values) != channels and len(set(values)) == 1:
        return (values[0],) * channels
    if len(values) != channels:
        raise UserError(f"{name}={list(values)} has {len(values)} values for data.channels={channels}")
    return tuple(values)


def normalise(image_BCHW: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    mean_C11, std_C11 = (constant(values, image_BCHW).view(-1, 1, 1) for values in (mean, std))
    return (image_BCHW - mean_C11) / std_C11


_CONSTANTS: dict[tuple, Tensor] = {}


def _may_be_kept(like: Tensor) -> bool:
    """A compiler keeps constants itself; a fake tensor must not outlive its tracing."""
    return not torch.compiler.is_compiling() and type(like) is Tensor


def constant(values: tuple[float, ...], like: Tensor) -> Tensor:
    """A few numbers as a tensor (len(values),) in the precision and on the device of `like`, made once for each.

    Made at every call, it would be a copy for which the host waits until the GPU has done all its work.
    """
    if not _may_be_kept(like):
        return like.new_tensor(values)
    key = (tuple(values), like.dtype, like.device)
    if key not in _CONSTANTS:
        with torch.inference_mode(False):  # a validation may ask first, and training use it afterwards
            _CONSTANTS[key] = torch.tensor(values, dtype=like.dtype, device=like.device)
    return _CONSTANTS[key]


def jittered_views(batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Both views of a batch in [0, 1] float32 on the batch's device, jittered alike: (backbone's, tokenizer's)."""
    return jittered_view(batch, "image"), jittered_view(batch, "token_image")


def jittered_view(batch: dict[str, Any], name: str) -> Tensor:
    """One of the two views, `image` or `token_image`."""
    jitter = (batch["jitter_factors"], batch["jitter_order"], batch["jitter_tiles"].float() / 255)
    return color_jitter(batch[name].float() / 255, *jitter)
