"""A segmentation model, ready for PIL images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from beit_pretrain.inference.sliding_window import SlidingWindow, segmented_all
from beit_pretrain.models.checkpoints.formats import Checkpoint, read_checkpoint
from beit_pretrain.models.checkpoints.pretrained import segmenter
from beit_pretrain.transforms.image_io import to_channels
from beit_pretrain.transforms.jitter import HALF, normalise
from beit_pretrain.transforms.segmentation import SegmentationEvalTransform


class ImageSegmenter:
    """A segmenter, ready for PIL images.

    Args:
        source: a segmenter in any format that `load_pretrained` reads, or a checkpoint that has been read.
        windows: sliding-window options; None = one scale, not mirrored.
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
        """Views (C, h, w) uint8 of an image, one per scale."""
        return list(self.views.scaled(to_channels(image, self.channels)).values())

    def segment_views(self, views: Sequence[Sequence[Tensor]], sizes: Sequence[Sequence[int]]) -> list[Tensor]:
        """Classes (H, W) int64, on the CPU, of views made by `apply`, at the given sizes (height, width)."""
        normalised = [
            [normalise(view[None].to(self.device).float() / 255, self.mean, self.std) for view in some]
            for some in views
        ]
        return [found.cpu() for found in segmented_all(self.model, normalised, sizes, self.windows)]
