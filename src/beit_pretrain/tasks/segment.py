"""Semantic segmentation: training on crops, testing by sliding windows at several scales (RECIPE section 7).

Shapes: B batch, C channels, H W pixels, K classes, S the side of the network's images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from beit_pretrain.engine.module import TrainedModule
from beit_pretrain.engine.optim import Optim
from beit_pretrain.errors import UserError
from beit_pretrain.models.checkpoints.formats import Checkpoint, read_checkpoint
from beit_pretrain.models.checkpoints.pretrained import segmenter
from beit_pretrain.models.drop_path import uniforms
from beit_pretrain.models.upernet import DROPOUT, Segmenter
from beit_pretrain.transforms.image_io import to_channels
from beit_pretrain.transforms.jitter import HALF, normalise
from beit_pretrain.transforms.segmentation import IGNORE, SegmentationEvalTransform

AUX_WEIGHT = 0.4
WINDOWS = 8  # windows that go through the network at once
AT_ONCE = 2**28  # numbers of an enlarged map: 1 GB
KEEP_SEED = 0x5E6  # dropout's numbers are others than drop path's


@dataclass
class SlidingWindow:
    """How whole images are tested.

    Args:
        stride: of the sliding window, as a share of its side.
        flip: whether mirrored images are averaged in.
        scales: factors of the network's size that the shorter side is brought to.
    """

    stride: float = 2 / 3
    flip: bool = False
    scales: Sequence[float] = (1.0,)

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is None:  # only `validate` has a run whose setting could be meant
                raise UserError(f"test.{name} must not be null here")


class Segmentation(TrainedModule):
    """Trains a segmenter; validates on whole images, every pixel exactly once, on any number of processes."""

    kind = "segmenter"
    model: Segmenter

    def __init__(
        self,
        model: Segmenter,
        optim: Optim,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        seed: int = 0,
        windows: SlidingWindow | None = None,
    ):
        super().__init__(model, optim, seed)
        self.mean, self.std, self.windows = tuple(mean), tuple(std), windows or SlidingWindow()
        self._confusion = torch.zeros(0)

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        """Cross-entropy per pixel, and that of the auxiliary head at .4."""
        image, target_BHW = normalise(batch["image"].float() / 255, self.mean, self.std), batch["target"].long()
        maps = self.model(image, self.drop_path_noise(batch), self.dropout_mask(batch["position"]))
        loss = main = pixel_loss(maps.main, target_BHW)
        if maps.auxiliary is not None:
            loss = main + AUX_WEIGHT * pixel_loss(maps.auxiliary, target_BHW)
        with torch.no_grad():
            found = upsampled(maps.main, target_BHW.shape[-2:]).argmax(1)
            counted = target_BHW != IGNORE
            hits = (found == target_BHW).sum()
        self.accumulate(loss=loss, decode_loss=main)
        self.accumulate(counted.sum().clamp(min=1), accuracy=hits / counted.sum().clamp(min=1))
        return loss

    def dropout_mask(self, position_B: Tensor) -> Tensor:
        """Dropout's factors (B, F + aux) of whole channels: a function of seed and position, like drop path."""
        channels = self.model.channels + self.model.aux_channels
        return (uniforms(self.seed + KEEP_SEED, position_B, channels) >= DROPOUT).float() / (1 - DROPOUT)

    def on_validation_epoch_start(self) -> None:
        classes = self.model.num_classes
        self._confusion = torch.zeros(classes, classes, dtype=torch.int64, device=self.device)

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        scales = [batch[f"scale_{i}"] for i in range(sum(name.startswith("scale_") for name in batch))]
        for number, target_HW in enumerate(batch["target"]):
            images = [scale[number] for scale in scales]
            found_HW = self.segment(images, target_HW.shape[-2:])
            self._confusion += confusion(found_HW, target_HW.long(), self.model.num_classes)

    def segment(self, images: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Classes (H, W) at `size` of one image at some scales, (C, h, w) uint8 each."""
        normalised = [normalise(image[None].float() / 255, self.mean, self.std) for image in images]
        return segmented(self.model, normalised, size, self.windows)

    def on_validation_epoch_end(self) -> None:
        self.log_validation({**scores(self.sum_over_processes(self._confusion))})

    test_step = validation_step
    on_test_epoch_start = on_validation_epoch_start
    on_test_epoch_end = on_validation_epoch_end


def upsampled(logits_BKhw: Tensor, size: Sequence[int]) -> Tensor:
    """Logits (B, K, H, W) at another size, float32."""
    return F.interpolate(logits_BKhw.float(), tuple(size), mode="bilinear", align_corners=False)


def pixel_loss(logits_BKhw: Tensor, target_BHW: Tensor) -> Tensor:
    """Cross-entropy, a mean over all pixels, those that do not count among them with a loss of 0.

    So each pixel weighs the same in every batch, on any number of processes; it is how the release's trainer averaged.
    """
    logits = upsampled(logits_BKhw, target_BHW.shape[-2:])
    return F.cross_entropy(logits, target_BHW, ignore_index=IGNORE, reduction="sum") / target_BHW.numel()


def confusion(found: Tensor, target: Tensor, classes: int) -> Tensor:
    """Pixels (K, K) int64 by class (rows) and class found (columns), where the target counts."""
    counted = target != IGNORE
    pairs = target[counted] * classes + found[counted]
    return torch.bincount(pairs, minlength=classes * classes).view(classes, classes)


def scores(confusion_KK: Tensor) -> dict[str, float]:
    """mIoU, mean accuracy of the classes, accuracy of the pixels; classes that occur nowhere are left out of means."""
    counts = confusion_KK.double()
    hits, true, found = counts.diagonal(), counts.sum(1), counts.sum(0)
    iou, accuracy = hits / (true + found - hits), hits / true  # NaN where there is nothing to find
    total = float(true.sum())
    return {
        "miou": float(iou.nanmean()),
        "macc": float(accuracy.nanmean()),
        "aacc": float(hits.sum()) / total if total else float("nan"),
    }


@torch.no_grad()
def segmented(model: Segmenter, images: Sequence[Tensor], size: Sequence[int], windows: SlidingWindow) -> Tensor:
    """Classes (H, W) of one image at some scales, (1, C, h, w) normalised each, resized to `size`.

    Probabilities of all scales, and of the mirrored ones, are averaged at the final size.
    """
    return segmented_all(model, [images], [size], windows)[0]


@torch.no_grad()
def segmented_all(
    model: Segmenter, images: Sequence[Sequence[Tensor]], sizes: Sequence[Sequence[int]], windows: SlidingWindow
) -> list[Tensor]:
    """`segmented` of several images, whose windows go through the network together."""
    scales = len(images[0])
    views = [(scale, False) for scale in range(scales)] + [(scale, True) for scale in range(scales) if windows.flip]
    found: list[list[Tensor]] = [[] for _ in images]  # logits of each image in each view
    for scale, mirrored in views:
        seen = [some[scale].flip(-1) if mirrored else some[scale] for some in images]
        for own, logits in zip(found, slide_all(model, seen, windows.stride), strict=True):
            own.append(logits.flip(-1) if mirrored else logits)
    return [best_classes(own, size) for own, size in zip(found, sizes, strict=True)]


def best_classes(views: Sequence[Tensor], size: Sequence[int], limit: int = AT_ONCE) -> Tensor:
    """Classes (H, W) at `size` of logits (1, K, h, w) of some views of one image, whose probabilities are averaged.

    Some classes are enlarged at a time, as many as are `limit` numbers: those of a photo of 50 megapixels and 150
    classes would take 30 GB together.
    """
    classes, pixels = views[0].shape[1], size[0] * size[1]
    some = max(1, min(classes, limit // pixels))
    parts = [slice(first, first + some) for first in range(0, classes, some)]
    norms: list[Tensor] = []  # log of the softmax's denominator at every pixel
    for view in views if len(views) > 1 else ():
        sums = [upsampled(view[:, part], size).logsumexp(1) for part in parts]
        norms.append(sums[0] if len(sums) == 1 else torch.stack(sums).logsumexp(0))
    best = index = None
    for part in parts:
        shares = [upsampled(view[:, part], size) for view in views]
        if norms:
            shares = [(share - norm.unsqueeze(1)).exp() for share, norm in zip(shares, norms, strict=True)]
        values, places = sum(shares[1:], shares[0])[0].max(0)
        if best is None or index is None:
            best, index = values, places
        else:
            index = torch.where(values > best, places + part.start, index)
            best = torch.maximum(values, best)
    assert index is not None
    return index


def label_maps(logits_BKhw: Tensor, sizes: Sequence[Sequence[int]] | None = None) -> list[Tensor]:
    """Classes (H, W) int64 of a segmenter's logits, resized to the original images' sizes, (height, width) each.

    As transformers' `post_process_semantic_segmentation`: logits are resized, then compared. None = as they are.
    Raises ValueError if there are not as many sizes as images.
    """
    if sizes is None:
        return list(logits_BKhw.argmax(1))
    if len(sizes) != len(logits_BKhw):
        raise ValueError(f"{len(sizes)} sizes for {len(logits_BKhw)} images")
    return [upsampled(logits[None], size)[0].argmax(0) for logits, size in zip(logits_BKhw, sizes, strict=True)]


def slide(model: Segmenter, image_1CHW: Tensor, stride: float = 2 / 3) -> Tensor:
    """Logits (1, K, H, W) of an image of any size: the mean over the windows that see a pixel.

    Windows have the network's own size, a step of `stride` of it, and the last ones end at the edges. An image smaller
    than that is filled up with the mean colour, which is 0.
    """
    return slide_all(model, [image_1CHW], stride)[0]


def slide_all(model: Segmenter, images: Sequence[Tensor], stride: float = 2 / 3) -> list[Tensor]:
    """`slide` of several images (1, C, H, W), whose windows go through the network together."""
    sides = [side * model.config["patch_size"] for side in model.grid]
    padded = [F.pad(x, (0, max(0, sides[1] - x.shape[-1]), 0, max(0, sides[0] - x.shape[-2]))) for x in images]
    places = [
        (i, top, left)
        for i, image in enumerate(padded)
        for top in starts(image.shape[-2], sides[0], stride)
        for left in starts(image.shape[-1], sides[1], stride)
    ]
    totals = [x.new_zeros(1, model.num_classes, *x.shape[-2:], dtype=torch.float32) for x in padded]
    seen = [x.new_zeros(1, 1, *x.shape[-2:], dtype=torch.float32) for x in padded]
    for first in range(0, len(places), WINDOWS):
        some = places[first : first + WINDOWS]
        crops = torch.cat([padded[i][..., top : top + sides[0], left : left + sides[1]] for i, top, left in some])
        logits = upsampled(model(crops).main, sides)
        for (i, top, left), one in zip(some, logits, strict=True):
            totals[i][0, :, top : top + sides[0], left : left + sides[1]] += one
            seen[i][..., top : top + sides[0], left : left + sides[1]] += 1
    return [
        (total / count)[..., : image.shape[-2], : image.shape[-1]]
        for total, count, image in zip(totals, seen, images, strict=True)
    ]


def starts(length: int, side: int, stride: float) -> list[int]:
    """Where windows of `side` begin along a length of at least that: steps of `stride` x side, the last at the end."""
    step = max(1, int(side * stride))
    count = -(-(length - side) // step) + 1
    return [min(i * step, length - side) for i in range(count)]


class ImageSegmenter:
    """A segmenter, ready for PIL images.

    Args:
        source: a segmenter in any format that `load_pretrained` reads, or a checkpoint that is read already.
        windows: how it is tested; None = at one scale, not mirrored.
    """

    def __init__(self, source: str | Path | Checkpoint, windows: SlidingWindow | None = None):
        source = source if isinstance(source, Checkpoint) else read_checkpoint(source)
        self.model = segmenter(source).requires_grad_(False)
        about: dict[str, Any] = self.model.about
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model.to(self.device)
        self.classes: list[str] = about.get("classes") or [str(i) for i in range(self.model.num_classes)]
        self.reduce_labels: bool = about.get("reduce_labels", True)
        self.mean, self.std = about.get("mean", HALF), about.get("std", HALF)
        self.channels: int = self.model.config["in_chans"]
        self.windows = windows or SlidingWindow()
        side = min(self.model.grid) * self.model.config["patch_size"]
        self.views = SegmentationEvalTransform(
            side, self.model.num_classes, scales=self.windows.scales, channels=self.channels
        )

    def segment(self, image: Image.Image) -> Tensor:
        """Classes (H, W) int64, on the CPU, at the image's own size."""
        views = [torch.from_numpy(view) for view in self.apply(image)]
        return self.segment_views([views], [(image.height, image.width)])[0]

    def apply(self, image: Image.Image) -> list[np.ndarray]:
        """(C, h, w) uint8 of an image at every scale."""
        return list(self.views.scaled(to_channels(image, self.channels)).values())

    def segment_views(self, views: Sequence[Sequence[Tensor]], sizes: Sequence[Sequence[int]]) -> list[Tensor]:
        """Classes (H, W) int64, on the CPU, of the views that `seen` made, at the given sizes (height, width)."""
        normalised = [
            [normalise(view[None].to(self.device).float() / 255, self.mean, self.std) for view in some]
            for some in views
        ]
        return [found.cpu() for found in segmented_all(self.model, normalised, sizes, self.windows)]
