"""Images with label maps: training crops and whole images for segmentation, and the classes of patches.

The first two follow the pipelines of the release's semantic_segmentation/configs. By default 0 in a label map is
ignored and ids 1 ... K are the classes 0 ... K - 1, as in ADE20K; IGNORE marks ignored pixels. Shapes: C channels, H W
pixels, S the side of a crop or view, N patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from beit_pretrain.transforms.grey_values import IGNORE, label_ids
from beit_pretrain.transforms.image_io import exif_orientation, to_channels, turned_to_fit
from beit_pretrain.transforms.jitter import HALF
from beit_pretrain.transforms.views import centre_view, to_array

LONGEST = 4  # largest ratio of a resized image's longer side to the requested shorter side
CROPS = 10  # tries for a crop that is not mostly of one class
SHIFT, FACTORS, HUE = 32.0, (0.5, 1.5), 18 / 180  # photometric distortion; hue in turns


def read_labels(label_map: Image.Image, classes: int, reduce_labels: bool, size: tuple[int, int]) -> np.ndarray:
    """Classes (H, W) uint8 of a label map, IGNORE where a pixel is ignored.

    Raises ValueError if it is not a label map of an image of `size` (width, height), or has ids beyond the classes.
    """
    if label_map.size != size:
        raise ValueError(f"its label map has {label_map.width} x {label_map.height} pixels, not {size[0]} x {size[1]}")
    ids = label_ids(label_map)
    if reduce_labels:
        ids = reduced_ids(ids)
    beyond = (ids != IGNORE) & ((ids < 0) | (ids >= classes))
    if beyond.any():
        found = int(ids[beyond][0]) + reduce_labels
        raise ValueError(f"its label map has the id {found}, beyond the {classes} classes")
    return ids.astype(np.uint8)


def reduced_ids(ids: np.ndarray) -> np.ndarray:
    """Ids of any shape less 1; 0, and IGNORE, become IGNORE."""
    return np.where((ids == 0) | (ids == IGNORE), IGNORE, ids - 1)


def fitting(image: Image.Image, label_map: Image.Image, channels: int) -> Image.Image:
    """An image decoded to `channels`, and turned upright if its label map fits it then."""
    orientation = exif_orientation(image)
    return turned_to_fit(to_channels(image, channels), orientation, label_map.size)[0]


def fitted(size: tuple[int, int], shorter: float) -> tuple[int, int]:
    """(width, height) with the same aspect, the shorter side `shorter`, the longer at most LONGEST times that."""
    factor = min(shorter / min(size), LONGEST * shorter / max(size))
    return max(1, int(size[0] * factor + 0.5)), max(1, int(size[1] * factor + 0.5))


@dataclass(frozen=True)
class SegmentationTrainTransform:
    """Training: resize by a random ratio, a crop that is not mostly of one class, flip, photometric distortion."""

    size: int  # S, pixels; ratio 1 brings an image's shorter side to it
    classes: int
    reduce_labels: bool = True  # the label maps' 0 is ignored, ids shift by one
    ratio: tuple[float, float] = (0.5, 2.0)  # of the random resize, uniform
    max_share: float = 0.75  # of one class among a crop's pixels that count
    flip: float = 0.5  # probability
    distort: bool = True
    fill: tuple[float, ...] = HALF  # colour in [0, 1] beyond the edges of a small image: the normalisation's mean
    channels: int = 3

    def __call__(self, image: Image.Image, rng: np.random.Generator, label_map: Image.Image) -> dict[str, np.ndarray]:
        """`image` (C, S, S) uint8 and `target` (S, S) uint8, IGNORE where nothing counts."""
        image = fitting(image, label_map, self.channels)
        labels = read_labels(label_map, self.classes, self.reduce_labels, image.size)
        width, height = fitted(image.size, self.size * rng.uniform(*self.ratio))
        resized = np.asarray(Image.fromarray(labels).resize((width, height), Image.Resampling.NEAREST))
        top, left = self._place(resized, rng)
        h, w = min(self.size, height), min(self.size, width)
        target = resized[top : top + h, left : left + w]
        sx, sy = image.width / width, image.height / height
        box = (left * sx, top * sy, min((left + w) * sx, image.width), min((top + h) * sy, image.height))
        pixels = np.asarray(image.resize((w, h), Image.Resampling.BILINEAR, box=box))
        flip = rng.random() < self.flip
        pixels = distorted(pixels, rng) if self.distort else pixels
        if flip:
            pixels, target = pixels[:, ::-1], target[:, ::-1]
        image_CSS = np.empty((self.channels, self.size, self.size), np.uint8)
        image_CSS[:] = np.rint(np.multiply(self.fill, 255)).astype(np.uint8)[:, None, None]
        image_CSS[:, :h, :w] = pixels.reshape(h, w, self.channels).transpose(2, 0, 1)
        target_SS = np.full((self.size, self.size), IGNORE, np.uint8)
        target_SS[:h, :w] = target
        return {"image": image_CSS, "target": target_SS}

    def _place(self, labels_HW: np.ndarray, rng: np.random.Generator) -> tuple[int, int]:
        """Top and left of the first crop with at most `max_share` of one class, else of the last one tried."""
        height, width = labels_HW.shape
        top = left = 0
        for _ in range(CROPS):
            top = int(rng.integers(max(0, height - self.size) + 1))
            left = int(rng.integers(max(0, width - self.size) + 1))
            crop = labels_HW[top : top + self.size, left : left + self.size]
            counts = np.bincount(crop.ravel(), minlength=256)[:IGNORE]
            if counts.max() <= self.max_share * counts.sum() and counts.any():
                break
        return top, left


@dataclass(frozen=True)
class SegmentationEvalTransform:
    """Testing: the whole image at some scales (factors of `size`), and its label map at the original size."""

    size: int  # of the shorter side at scale 1, pixels
    classes: int
    reduce_labels: bool = True
    scales: Sequence[float] = (1.0,)
    channels: int = 3

    def __call__(
        self, image: Image.Image, rng: np.random.Generator | None, label_map: Image.Image
    ) -> dict[str, np.ndarray]:
        """`scale_0`, `scale_1`, ... (C, h, w) uint8, one for each scale, and `target` (H, W) uint8."""
        image = fitting(image, label_map, self.channels)
        labels = read_labels(label_map, self.classes, self.reduce_labels, image.size)
        return {**self.scaled(image), "target": labels}

    def scaled(self, image: Image.Image) -> dict[str, np.ndarray]:
        """The image (already of the right channels) at every scale."""
        sizes = [fitted(image.size, self.size * scale) for scale in self.scales]
        return {f"scale_{i}": to_array(image.resize(size, Image.Resampling.BILINEAR)) for i, size in enumerate(sizes)}


@dataclass(frozen=True)
class PatchLabelTransform:
    """The evaluation view of an image, and the class of each patch: the one that most of its labelled pixels have."""

    size: int  # S, pixels
    patch_size: int
    reduce_labels: bool = True
    channels: int = 3

    def __call__(self, image: Image.Image, rng: object, label_map: Image.Image) -> dict[str, np.ndarray]:
        """`image` (C, S, S) and `target` (N,), both uint8; IGNORE where no pixel counts.

        That is so everywhere if the label map cannot be used: these classes are only to watch a training.
        """
        image = fitting(image, label_map, self.channels)
        try:
            labels = read_labels(label_map, IGNORE, self.reduce_labels, image.size)
        except ValueError:
            labels = np.full(image.size[::-1], IGNORE, np.uint8)
        view = centre_view(image, self.size, channels=self.channels)
        map_SS = np.asarray(centre_view(Image.fromarray(labels), self.size, None, 1, Image.Resampling.NEAREST))
        side = self.size // self.patch_size
        patches = map_SS.reshape(side, self.patch_size, side, self.patch_size).swapaxes(1, 2).reshape(side * side, -1)
        numbered = patches + 256 * np.arange(len(patches))[:, None]  # all patches in one histogram
        counts = np.bincount(numbered.ravel(), minlength=256 * len(patches)).reshape(-1, 256)[:, :IGNORE]
        target = np.where(counts.any(1), counts.argmax(1), IGNORE).astype(np.uint8)
        return {"image": to_array(view), "target": target}


def distorted(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Photometric distortion of uint8 pixels (H, W) or (H, W, C), each step with probability 1/2.

    Brightness, then contrast either before or after saturation and hue. Grey has neither of these two; a fourth channel
    stays as it is.
    """
    brightness, first, contrasted, saturated, turned = rng.random(5) < 0.5
    shift, (contrast, saturation) = rng.uniform(-SHIFT, SHIFT), rng.uniform(*FACTORS, 2)
    turn = rng.uniform(-HUE, HUE)
    coloured, rest = pixels.ndim == 3, pixels[..., 3:]
    pixels = pixels[..., :3] if coloured else pixels
    pixels = _linear(pixels, 1.0, shift) if brightness else pixels
    if contrasted and first:
        pixels = _linear(pixels, contrast, 0.0)
    if coloured and (saturated or turned):
        hsv = np.array(Image.fromarray(np.ascontiguousarray(pixels)).convert("HSV"))
        if saturated:
            hsv[..., 1] = _linear(hsv[..., 1], saturation, 0.0)
        if turned:
            hsv[..., 0] += np.uint8(round(turn * 256) % 256)  # a circle of 256: uint8 wraps as hues do
        pixels = np.asarray(Image.fromarray(hsv, "HSV").convert("RGB"))
    if contrasted and not first:
        pixels = _linear(pixels, contrast, 0.0)
    return np.concatenate([pixels, rest], axis=2) if coloured and rest.shape[2] else pixels


def _linear(pixels: np.ndarray, factor: float, shift: float) -> np.ndarray:
    return np.clip(pixels.astype(np.float32) * factor + shift, 0, 255).astype(np.uint8)
