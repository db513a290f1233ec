"""From an opened image to uint8 views: random resized crops, flips, RandAugment, centre crops.

Runs in loader workers. Jitter and normalisation follow on the training device (`jitter.py`); `pil_reference=True`
keeps the authors' order instead: jitter and flip of the whole image with PIL, then the crops.
Shapes: C channels, H W pixels.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from pydantic import ConfigDict

from beit_pretrain.settings import Channels, ShareAboveZero, Side, about
from beit_pretrain.transforms.image_io import open_image, reduced, to_channels
from beit_pretrain.transforms.jitter import HALF, Jitter, draw_jitter, jitter_arrays, pil_jitter
from beit_pretrain.transforms.mean_color_grid import SIDE
from beit_pretrain.transforms.scaled_decoding import Crop, TurboJpeg, cropped_array, resized, scaled_decode, turbo_jpeg
from beit_pretrain.transforms.settings import AutoAugment, CropSettings, ViewSettings

THIN = 16  # times as long as wide: from there on an image is never enlarged as a whole


class AugmentParams(NamedTuple):
    """The random numbers of a position's view."""

    jitter: Jitter
    flip: bool
    crop: Crop

    def mirrored(self, width: int) -> AugmentParams:
        """The draw with its box in the unflipped image of `width`, for cropping before flipping."""
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
    """The two views of one crop, for the backbone and for the tokenizer: `TwoViewTransform(224, 112)`, as in the paper.

    Without a side for the tokenizer's view there is none, as when the tokens are known already. Resized bicubic, but
    the tokenizer's view with Lanczos if `pil_reference`.
    """

    model_config = ConfigDict(frozen=True)
    positional = ("image_size", "token_image_size")

    image_size: Side = about("side of the backbone's view, pixels")

    def prepare_view(self, data: bytes, rng: np.random.Generator) -> Callable[[], dict[str, np.ndarray]]:
        """A function that makes the views of an image file's bytes; it raises what Pillow raises for broken files.

        The random numbers are drawn now if the file's first bytes tell the size, else when the function is called.
        """
        if (jpeg := self._turbo_jpeg(data)) is not None:
            draw = self.draw(jpeg.size, rng)
            return lambda: self.apply(jpeg, draw)
        return lambda: self._of_opened(data, rng)

    def _turbo_jpeg(self, data: bytes) -> TurboJpeg | None:
        return turbo_jpeg(data) if self.channels == 3 and not self.pil_reference else None

    def _of_opened(self, data: bytes, rng: np.random.Generator) -> dict[str, np.ndarray]:
        with open_image(data) as image:
            return self(image, rng)

    def draw(self, size: tuple[int, int], rng: np.random.Generator) -> AugmentParams:
        """Jitter, flip and crop of an image of `size` (width, height), the same with and without `pil_reference`.

        The box lies in the flipped image, since the authors flip before they crop.
        """
        jitter = draw_jitter(rng, self.jitter)
        return AugmentParams(jitter, bool(rng.random() < self.flip), draw_crop(rng, *size, self.scale, self.ratio))

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """`image`, `token_image` as uint8 (C, H, W), and the jitter as in `jitter_arrays`.

        With `pil_reference` the jitter has been applied and the factors are 1.
        """
        return self.apply(image, self.draw(image.size, rng))

    def apply(
        self, image: Image.Image | TurboJpeg, draw: AugmentParams, names: Sequence[str] = ("image", "token_image")
    ) -> dict[str, np.ndarray]:
        """What `__call__` returns, for a given draw; of `image` and `token_image` only those in `names`."""
        sizes = {"image": self.image_size, "token_image": self.token_image_size}
        wanted = {name: size for name, size in sizes.items() if name in names and size is not None}
        top, left, height, width = draw.crop
        if top + height > image.size[1] or left + width > image.size[0] or min(width, height) < 1:
            raise ValueError("the crop of its view lies outside the image")
        if not self.pil_reference:
            # Decoded for the larger view whatever is asked for: the pixels of one must not depend on the other.
            largest = max(size for size in sizes.values() if size is not None)
            cropped = cropped_array(image, draw.mirrored(image.size[0]).crop, largest, self.channels)
            made = {name: resized(cropped.array, size) for name, size in wanted.items()}
            arrays = {name: (view.flip(-1) if draw.flip else view).numpy() for name, view in made.items()}
            return arrays | jitter_arrays(draw.jitter, cropped.tiles)
        assert isinstance(image, Image.Image)
        image = pil_jitter(to_channels(image, self.channels), draw.jitter)
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draw.flip else image
        filters = {"image": Image.Resampling.BICUBIC, "token_image": Image.Resampling.LANCZOS}
        arrays = {name: to_array(resized_crop(image, draw.crop, size, filters[name])) for name, size in wanted.items()}
        tiles = np.zeros((SIDE * SIDE, self.channels), np.uint8)  # not used where factors are 1
        return arrays | jitter_arrays(draw.jitter._replace(factors=np.ones(3, np.float32)), tiles)

    def seen_bytes(self, data: bytes, draw: AugmentParams, names: Sequence[str] = ("image", "token_image")) -> dict:
        """`apply` to a file's bytes. Raises what Pillow raises for broken files, ValueError for a box outside."""
        if (jpeg := self._turbo_jpeg(data)) is not None:
            return self.apply(jpeg, draw, names)
        with open_image(data) as image:
            return self.apply(image, draw, names)


class ClassificationTransform(CropSettings):
    """Training view (random resized crop, flip, optional RandAugment) or evaluation view (resize, centre crop)."""

    model_config = ConfigDict(frozen=True)
    defaults = "tasks/finetune.yaml:data"
    positional = ("image_size", "train")

    image_size: Side = about("pixels")
    train: bool = True
    auto_augment: AutoAugment | None = about("RandAugment policy of timm; None = none")
    fill: tuple[float, ...] = HALF  # colour in [0, 1] that RandAugment moves in from outside: the normalisation's mean
    crop_ratio: ShareAboveZero | None = about(
        "the shorter side becomes image_size / this for evaluation; see `shorter_side`"
    )
    channels: Channels = 3  # RandAugment takes 1 or 3

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """`image` as uint8 (C, H, W)."""
        if not self.train:
            return {"image": to_array(centre_view(image, self.image_size, self.crop_ratio, self.channels))}
        crop = draw_crop(rng, *image.size, self.scale, self.ratio)
        flip = bool(rng.random() < self.flip)
        image, crop = scaled_decode(image, crop, self.image_size, self.channels)
        view = resized_crop(image, crop, self.image_size, Image.Resampling.BICUBIC)
        if self.auto_augment:
            # timm draws from the global generators: seed them by the position, so that workers cannot matter.
            seed = int(rng.integers(2**32))
            random.seed(seed)
            np.random.seed(seed)
            view = self._randaugment(view)
        return {"image": to_array(view, flip)}

    @cached_property
    def _randaugment(self) -> Callable[[Image.Image], Image.Image]:
        from timm.data.auto_augment import rand_augment_transform

        assert self.auto_augment is not None
        levels = tuple(round(255 * m) for m in self.fill)
        fill = levels if self.channels == 3 else levels[0]
        settings = {"translate_const": int(self.image_size * 0.45), "img_mean": fill}
        augment = rand_augment_transform(self.auto_augment, {**settings, "interpolation": Image.Resampling.BICUBIC})
        for operation in augment.ops:
            if operation.name.startswith("Posterize"):
                operation.aug_fn = posterize
        return augment


def posterize(image: Image.Image, bits: int, **settings: Any) -> Image.Image:
    """Keep the `bits` highest bits of every value: none, which timm draws too, is black (newer Pillows refuse 0)."""
    kept = 256 - (256 >> max(0, bits))
    return image.point(lambda value: value & kept)


def shorter_side(size: int, crop_ratio: float | None = None) -> int:
    """What evaluation resizes an image's shorter side to; ratio .875 below 384 pixels and 1 from there by default."""
    if crop_ratio is None:
        crop_ratio = 0.875 if size < 384 else 1.0
    return math.floor(size / crop_ratio)


def centre_view(
    image: Image.Image,
    size: int,
    crop_ratio: float | None = None,
    channels: int = 3,
    resample: Image.Resampling = Image.Resampling.BICUBIC,
) -> Image.Image:
    """Evaluation view: shorter side to size / crop_ratio, then the central (size, size) crop.

    Of a thin image only the central part is enlarged: 3000 x 1 pixels would take gigabytes. The result is the same but
    for the rounding between Pillow's two passes, whose order depends on the size.
    """
    shorter = shorter_side(size, crop_ratio)
    # JPEGs are decoded at twice the needed size, which loses no detail that the bicubic filter would keep.
    if image.format == "JPEG" and min(image.size) > shorter * 2:
        image = reduced(image, (shorter * 2, shorter * 2))
    image = to_channels(image, channels)
    width, height = image.size
    short = min(width, height)
    whole = max(size, int(shorter * width / short)), max(size, int(shorter * height / short))
    left, top = round((whole[0] - size) / 2), round((whole[1] - size) / 2)
    if max(width, height) > THIN * short:
        across, down = width / whole[0], height / whole[1]
        right, bottom = min(width, (left + size) * across), min(height, (top + size) * down)
        box = (left * across, top * down, right, bottom)
        return image.resize((size, size), resample, box)
    image = image.resize(whole, resample)
    return image.crop((left, top, left + size, top + size))
