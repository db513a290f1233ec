"""From a decoded image to what the networks see: crops, flips, colour jitter, normalisation (RECIPE sections 1 and 5).

Workers crop and resize and send uint8; jitter and normalisation run batched on the training device, with the same
jitter for both views (`color_jitter`). `pil_reference=True` keeps the authors' order instead: jitter and flip of the whole
image with PIL, then the crops.

Shapes: B batch, C channels, H W pixels.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from itertools import permutations
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from pydantic import ConfigDict, PrivateAttr
from torch import Tensor

from beit_pretrain.errors import UserError
from beit_pretrain.settings import Channels, ShareAboveZero, Side, Text, about
from beit_pretrain.transforms.image_io import open_image, to_channels
from beit_pretrain.transforms.mean_color_grid import SIDE
from beit_pretrain.transforms.scaled_decoding import Crop, TurboJpeg, cropped_array, resized, scaled_decode, turbo_jpeg
from beit_pretrain.transforms.settings import CropSettings, ViewSettings

HALF = (0.5, 0.5, 0.5)  # mean and std of BEiT's ImageNet-22k pre-training
BRIGHTNESS, CONTRAST, SATURATION = range(3)
ORDERS = np.array(list(permutations(range(3))))
GREY = (0.2989, 0.587, 0.114)  # torchvision's weights of red, green and blue
EPSILON = 1e-3  # of a level of 8 bits: what float32 may miss an integer by
THIN = 16  # times as long as wide: from there on an image is never enlarged as a whole


class Jitter(NamedTuple):
    """Colour jitter of one image: the factor of brightness, contrast and saturation, and the order they come in."""

    factors: np.ndarray  # (3,) float32, 1 = unchanged
    order: np.ndarray  # (3,) int64, a permutation of BRIGHTNESS, CONTRAST, SATURATION


class AugmentParams(NamedTuple):
    """What one position draws for its view."""

    jitter: Jitter
    flip: bool
    crop: Crop

    def mirrored(self, width: int) -> AugmentParams:
        """The draw with the box in an unflipped image of `width`, where ours is cropped before it is flipped."""
        top, left, height, side = self.crop
        return self._replace(crop=Crop(top, width - left - side, height, side)) if self.flip else self


def draw_crop(
    rng: np.random.Generator, width: int, height: int, scale: Sequence[float], ratio: Sequence[float]
) -> Crop:
    """A random resized crop's box: area uniform in `scale`, aspect log-uniform in `ratio`, ten tries, else central."""
    area = width * height
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        # a + (b - a) * random() is what Generator.uniform computes, at a quarter of its time.
        target = area * (scale[0] + (scale[1] - scale[0]) * rng.random())
        aspect = math.exp(low + (high - low) * rng.random())
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            return Crop(int((height - h + 1) * rng.random()), int((width - w + 1) * rng.random()), h, w)
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w, h = min(width, max(1, round(height * aspect))), min(height, max(1, round(width / aspect)))
    return Crop((height - h) // 2, (width - w) // 2, h, w)


def draw_jitter(rng: np.random.Generator, strength: Sequence[float] | None) -> Jitter:
    """Factors uniform in [1 - s, 1 + s] (not below 0) for each of the three strengths, in random order."""
    strength = strength or (0.0, 0.0, 0.0)
    low = [max(0.0, 1 - s) for s in strength]
    factors = [a + (1 + s - a) * rng.random() for a, s in zip(low, strength, strict=True)]
    return Jitter(np.array(factors, np.float32), ORDERS[int(len(ORDERS) * rng.random())])


def resized_crop(image: Image.Image, crop: Crop, size: int, resample: Image.Resampling) -> Image.Image:
    """Crop, then resize to (size, size): torchvision's `resized_crop` on a PIL image."""
    top, left, height, width = crop
    return image.crop((left, top, left + width, top + height)).resize((size, size), resample)


def to_array(image: Image.Image, flip: bool = False) -> np.ndarray:
    """uint8 (C, H, W) of an image of 8 bits a channel."""
    array = np.asarray(image)
    array = array[:, :, None] if array.ndim == 2 else array
    return np.ascontiguousarray((array[:, ::-1] if flip else array).transpose(2, 0, 1))


class TwoViewTransform(ViewSettings):
    """The two views of one crop, for the backbone (bicubic) and for the tokenizer: `TwoViewTransform(224, 112)`.

    Args:
        image_size, token_image_size: sides in pixels (224 and 112 in the paper's runs); without a side for the
            tokenizer's view there is none, as when the tokens are known already.
        others: see `ViewSettings`. With `pil_reference` the tokenizer's view is resized with Lanczos, else bicubic.
    """

    model_config = ConfigDict(frozen=True)
    positional = ("image_size", "token_image_size")

    image_size: Side = about("side of the backbone's view, pixels")

    def prepare_view(self, data: bytes, rng: np.random.Generator) -> Callable[[], dict[str, np.ndarray]]:
        """What makes the same of an image file's bytes; draws already, where the file's first bytes tell the size.

        It raises what Pillow raises for broken files.
        """
        if not self.pil_reference and self.channels == 3 and (jpeg := turbo_jpeg(data)) is not None:
            draw = self.draw(jpeg.size, rng)
            return lambda: self.apply(jpeg, draw)
        return lambda: self._of_opened(data, rng)

    def _of_opened(self, data: bytes, rng: np.random.Generator) -> dict[str, np.ndarray]:
        with open_image(data) as image:
            return self(image, rng)

    def draw(self, size: tuple[int, int], rng: np.random.Generator) -> AugmentParams:
        """Jitter, flip and crop of an image of `size` (width, height), the same whatever is `pil_reference`.

        The box lies in the flipped image, since the authors flip before they crop: so both show the same part.
        """
        jitter = draw_jitter(rng, self.jitter)
        return AugmentParams(jitter, bool(rng.random() < self.flip), draw_crop(rng, *size, self.scale, self.ratio))

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """`image`, `token_image` as uint8 (C, H, W), `jitter_factors` (3,), `jitter_order` (3,) and
        `jitter_tiles` (64, C) uint8, the whole image's colours.

        With `pil_reference` the jitter has been applied and the factors are 1.
        """
        return self.apply(image, self.draw(image.size, rng))

    def apply(
        self, image: Image.Image | TurboJpeg, draw: AugmentParams, names: Sequence[str] = ("image", "token_image")
    ) -> dict[str, np.ndarray]:
        """What `__call__` gives, for a draw made before; of `image` and `token_image` only those in `names`."""
        sizes = {"image": self.image_size, "token_image": self.token_image_size}
        wanted = {name: size for name, size in sizes.items() if name in names and size is not None}
        top, left, height, width = draw.crop
        if top + height > image.size[1] or left + width > image.size[0] or min(width, height) < 1:
            raise ValueError("the crop of its view lies outside the image")
        if not self.pil_reference:
            # Decoded for the larger view, whatever is asked for: the pixels of one do not depend on the other.
            largest = max(size for size in sizes.values() if size is not None)
            cropped = cropped_array(image, draw.mirrored(image.width).crop, largest, self.channels)
            made = {name: resized(cropped.array, size) for name, size in wanted.items()}
            arrays = {name: (view.flip(-1) if draw.flip else view).numpy() for name, view in made.items()}
            return arrays | jitter_arrays(draw.jitter, cropped.tiles)
        assert isinstance(image, Image.Image)
        image = pil_jitter(to_channels(image, self.channels), draw.jitter)
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draw.flip else image
        filters = {"image": Image.Resampling.BICUBIC, "token_image": Image.Resampling.LANCZOS}
        arrays = {name: to_array(resized_crop(image, draw.crop, size, filters[name])) for name, size in wanted.items()}
        tiles = np.zeros((SIDE * SIDE, self.channels), np.uint8)  # a factor of 1 looks at none
        return arrays | jitter_arrays(draw.jitter._replace(factors=np.ones(3, np.float32)), tiles)

    def seen_bytes(self, data: bytes, draw: AugmentParams, names: Sequence[str] = ("image", "token_image")) -> dict:
        """`seen` of an image file's bytes. Raises what Pillow raises for broken files, ValueError for a box outside."""
        if not self.pil_reference and self.channels == 3 and (jpeg := turbo_jpeg(data)) is not None:
            return self.apply(jpeg, draw, names)
        with open_image(data) as image:
            return self.apply(image, draw, names)


class ClassificationTransform(CropSettings):
    """Training view (random resized crop, flip, optional RandAugment) or evaluation view (resize, centre crop).

    Args:
        image_size: side in pixels.
        train: which of the two.
        scale, ratio, flip: of the random resized crop.
        auto_augment: timm's name of a RandAugment policy, such as `rand-m9-mstd0.5-inc1`; None = none.
        fill: colour in [0, 1] of what RandAugment moves in from outside: the mean of the normalisation.
        crop_ratio: evaluation resizes the shorter side to image_size / crop_ratio (None: .875 below 384, 1 from there).
        channels: see `TwoViewTransform`; RandAugment takes 1 or 3.
    """

    model_config = ConfigDict(frozen=True)
    defaults = "tasks/finetune.yaml:data"
    positional = ("image_size", "train")

    image_size: Side = about("pixels")
    train: bool = True
    auto_augment: Text | None = about("of RandAugment")
    fill: tuple[float, ...] = HALF
    crop_ratio: ShareAboveZero | None = about("of the evaluation view")
    channels: Channels = 3
    _augment: list = PrivateAttr(default_factory=list)  # timm's transform, built at first use

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """`image` as uint8 (C, H, W)."""
        if not self.train:
            return {"image": to_array(centre_view(image, self.image_size, self.crop_ratio, self.channels))}
        crop = draw_crop(rng, *image.size, self.scale, self.ratio)
        flip = bool(rng.random() < self.flip)
        image, crop = scaled_decode(image, crop, self.image_size, self.channels)
        view = resized_crop(image, crop, self.image_size, Image.Resampling.BICUBIC)
        if self.auto_augment:
            view = self._randaugment(view, self.auto_augment, rng)
        return {"image": to_array(view, flip)}

    def _randaugment(self, view: Image.Image, policy: str, rng: np.random.Generator) -> Image.Image:
        if not self._augment:
            from timm.data.auto_augment import rand_augment_transform

            levels = tuple(round(255 * m) for m in self.fill)
            fill = levels if self.channels == 3 else levels[0]
            settings = {"translate_const": int(self.image_size * 0.45), "img_mean": fill}
            self._augment.append(
                rand_augment_transform(policy, {**settings, "interpolation": Image.Resampling.BICUBIC})
            )
        # timm draws from the global generators: seed them by the position, so that workers cannot matter.
        seed = int(rng.integers(2**32))
        random.seed(seed)
        np.random.seed(seed)
        return self._augment[0](view)


def shorter_side(size: int, crop_ratio: float | None = None) -> int:
    """What evaluation resizes an image's shorter side to; ratio .875 below 384 pixels and 1 from there by default."""
    if crop_ratio is None:
        crop_ratio = 0.875 if size < 384 else 1.0
    return math.floor(size / crop_ratio)


def centre_view(image: Image.Image, size: int, crop_ratio: float | None = None, channels: int = 3) -> Image.Image:
    """Evaluation view: shorter side to size / crop_ratio (bicubic), then the central (size, size) crop.

    Of a thin image the central part alone is enlarged: 3000 x 1 pixels would take gigabytes. It is the same but for the
    rounding between Pillow's two passes, whose order depends on the size.
    """
    shorter = shorter_side(size, crop_ratio)
    # Decode JPEGs at twice the size that is needed: the bicubic filter then still sees every detail that counts.
    if image.format == "JPEG" and min(image.size) > shorter * 2:
        image.draft(None, (shorter * 2, shorter * 2))
    image = to_channels(image, channels)
    width, height = image.size
    short = min(width, height)
    whole = max(size, int(shorter * width / short)), max(size, int(shorter * height / short))
    left, top = round((whole[0] - size) / 2), round((whole[1] - size) / 2)
    if max(width, height) > THIN * short:
        across, down = width / whole[0], height / whole[1]
        right, bottom = min(width, (left + size) * across), min(height, (top + size) * down)
        box = (left * across, top * down, right, bottom)
        return image.resize((size, size), Image.Resampling.BICUBIC, box)
    image = image.resize(whole, Image.Resampling.BICUBIC)
    return image.crop((left, top, left + size, top + size))


def pil_jitter(image: Image.Image, jitter: Jitter) -> Image.Image:
    """Colour jitter of a PIL image, rounded to 8 bits after each operation, as the authors' loader applies it."""
    from torchvision.transforms import functional as F  # an exact view only: torchvision is slow to import

    adjust = {BRIGHTNESS: F.adjust_brightness, CONTRAST: F.adjust_contrast, SATURATION: F.adjust_saturation}
    for operation in jitter.order:
        image = adjust[int(operation)](image, float(jitter.factors[operation]))
    return image


def jitter_arrays(jitter: Jitter, tiles: np.ndarray) -> dict[str, np.ndarray]:
    """What a sample carries of its jitter; `tiles` (64, C) uint8 are the whole image's colours."""
    return {"jitter_factors": jitter.factors, "jitter_order": jitter.order, "jitter_tiles": tiles}


def color_jitter(image_BCHW: Tensor, factors_B3: Tensor, order_B3: Tensor, tiles_BKC: Tensor | None = None) -> Tensor:
    """Colour jitter of a batch of images in [0, 1], each with its own factors and order, in static shapes.

    With `tiles_BKC` in [0, 1] as Pillow does it to the whole image: contrast blends with the mean grey of these colours
    after the operations before it, and every operation cuts off what is below a level of 8 bits. Without, contrast
    blends with the mean grey of what it gets.
    Every operation blends the image with a reference (black, its mean grey, its grey image), as torchvision's do. An
    image of one channel is its own grey image: saturation changes nothing. A fourth channel is left alone, as PIL does
    with alpha.
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
    """Mean or std for so many channels: as given, or one value for all. Raises UserError for any other number."""
    if len(values) != channels and len(set(values)) == 1:
        return (values[0],) * channels
    if len(values) != channels:
        raise UserError(f"{name}={list(values)} has {len(values)} values for data.channels={channels}")
    return tuple(values)


def normalise(image_BCHW: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(image - mean) / std per channel."""
    mean_C11, std_C11 = (constant(values, image_BCHW).view(-1, 1, 1) for values in (mean, std))
    return (image_BCHW - mean_C11) / std_C11


_CONSTANTS: dict[tuple, Tensor] = {}


def _may_be_kept(like: Tensor) -> bool:
    """A compiler keeps constants by itself; a fake tensor must not outlive what it was made for."""
    return not torch.compiler.is_compiling() and type(like) is Tensor


def constant(values: tuple[float, ...], like: Tensor) -> Tensor:
    """A few numbers as a tensor (len(values),) in the precision and on the device of `like`, made once for each.

    Made anew at every call, it would be a copy for which the host waits until the GPU has done all its work.
    """
    if not _may_be_kept(like):
        return like.new_tensor(values)
    key = (tuple(values), like.dtype, like.device)
    if key not in _CONSTANTS:
        with torch.inference_mode(False):  # validation may ask first, and training use it afterwards
            _CONSTANTS[key] = torch.tensor(values, dtype=like.dtype, device=like.device)
    return _CONSTANTS[key]


def jittered_views(batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Both views of a batch in [0, 1] float32 on the batch's device, jittered alike: (backbone's, tokenizer's)."""
    return jittered_view(batch, "image"), jittered_view(batch, "token_image")


def jittered_view(batch: dict[str, Any], name: str) -> Tensor:
    """One of the two views, `image` or `token_image`."""
    jitter = (batch["jitter_factors"], batch["jitter_order"], batch["jitter_tiles"].float() / 255)
    return color_jitter(batch[name].float() / 255, *jitter)
