"""A trained network as a function of PIL images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from beit_pretrain.inference.classifier import ImageClassifier, Prediction
from beit_pretrain.inference.image_stream import no_predictor
from beit_pretrain.inference.segmenter import ImageSegmenter
from beit_pretrain.inference.sliding_window import SlidingWindow
from beit_pretrain.models.checkpoints.formats import read_checkpoint
from beit_pretrain.visualization.overlays import overlay

Answer = list[Prediction] | np.ndarray


class Predictor:
    """Classes or label maps of PIL images, from any classifier or segmenter that `load_pretrained` reads.

    Args:
        checkpoint: file or folder.
        windows: sliding-window options of a segmenter; None = one scale, not mirrored.

    Attributes: `classes`, the class names; `kind`, "classifier" or "segmenter".
    Raises UserError for any other kind of checkpoint.
    """

    def __init__(self, checkpoint: str | Path, windows: SlidingWindow | None = None):
        source = read_checkpoint(checkpoint)
        self.kind = source.kind
        self._network: ImageClassifier | ImageSegmenter
        if source.kind == "segmenter":
            self._network = ImageSegmenter(source, windows)
        elif source.kind == "classifier":
            self._network = ImageClassifier(source)
        else:
            raise no_predictor(checkpoint, source.kind)
        self.classes = self._network.classes

    def __call__(
        self,
        images: Image.Image | Sequence[Image.Image],
        top: int = 5,
        sizes: Sequence[tuple[int, int]] | None = None,
        batch_size: int = 8,
    ) -> Answer | list[Answer]:
        """Predict for one image, or for a list of images (returns a list). Images may have any size and mode.

        A classifier returns the `top` Predictions (name, probability, number), most likely first. A segmenter returns
        classes (H, W) int64 at the image's size, or at the given `sizes`, (height, width) for each image.
        """
        if isinstance(images, Image.Image):
            return self._answers([images], top, sizes)[0]
        answers: list[Answer] = []
        for first in range(0, len(images), batch_size):
            part = slice(first, first + batch_size)
            answers += self._answers(images[part], top, None if sizes is None else sizes[part])
        return answers

    def _answers(
        self, images: Sequence[Image.Image], top: int, sizes: Sequence[tuple[int, int]] | None
    ) -> Sequence[Answer]:
        if isinstance(self._network, ImageClassifier):
            return self._network.classify(torch.stack([self._network.view(image) for image in images]), top)
        views = [[torch.from_numpy(view) for view in self._network.apply(image)] for image in images]
        sizes = sizes or [(image.height, image.width) for image in images]
        if len(sizes) != len(images):
            raise ValueError(f"{len(sizes)} sizes for {len(images)} images")
        return [found.numpy() for found in self._network.segment_views(views, sizes)]

    def overlay(self, image: Image.Image, labels_HW: np.ndarray) -> Image.Image:
        """The image under the colours of a label map of its size."""
        return overlay(image, labels_HW.astype(np.uint8), len(self.classes))
