"""A trained network as a function of PIL images."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from beit_pretrain.errors import UserError
from beit_pretrain.inference.settings import SlidingWindow
from beit_pretrain.inference.sliding_window import segmented
from beit_pretrain.models.backbone import Backbone, Classifier
from beit_pretrain.models.checkpoints.formats import Checkpoint, read_checkpoint
from beit_pretrain.models.checkpoints.pretrained import classifier, segmenter
from beit_pretrain.models.upernet import Segmenter
from beit_pretrain.transforms.image_io import to_channels
from beit_pretrain.transforms.jitter import HALF, normalise, per_channel
from beit_pretrain.transforms.processor_view import ProcessorView
from beit_pretrain.transforms.segmentation import SegmentationEvalTransform
from beit_pretrain.transforms.views import centre_view, to_array
from beit_pretrain.visualization.overlays import overlay


class Prediction(NamedTuple):
    """A predicted class."""

    name: str
    probability: float
    number: int


Answer = list[Prediction] | np.ndarray


class ImageNetwork:
    """A trained network on the GPU, if there is one, with its classes and the normalisation of its images.

    `apply` makes the views (C, h, w) uint8 of an image. It does not hold the network, which would otherwise be sent to
    the loader processes.
    """

    apply: Callable[[Image.Image], list[np.ndarray]]

    def __init__(self, model: Backbone):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = model.requires_grad_(False).to(self.device)
        self.channels: int = model.config["in_chans"]
        self.classes: list[str] = model.about.get("classes") or [str(i) for i in range(model.num_classes)]
        for note in model.about.get("view_differs", []):
            warn(note)
        half = per_channel(HALF, self.channels, "mean")
        self.mean, self.std = model.about.get("mean", half), model.about.get("std", half)

    def views(self, image: Image.Image) -> list[Tensor]:
        """The views of an image as tensors."""
        return [torch.from_numpy(view) for view in self.apply(image)]

    def normalised(self, image_BCHW: Tensor) -> Tensor:
        """Views (uint8) as the network takes them."""
        return normalise(image_BCHW.to(self.device).float() / 255, self.mean, self.std)


class ImageClassifier(ImageNetwork):
    """A fine-tuned classifier; its only view of an image is the evaluation view (resize and centre crop).

    Of a Hugging Face checkpoint it is the view of its processor. What we do otherwise is said in a warning.
    """

    model: Classifier

    def __init__(self, source: Checkpoint):
        super().__init__(classifier(source))
        self.apply = evaluation_view(self.model, source.path)

    @torch.no_grad()
    def classify(self, image_BCHW: Tensor, top: int = 5) -> list[list[Prediction]]:
        """The `top` classes of every view (uint8), most likely first."""
        probabilities_BK = self.model(self.normalised(image_BCHW)).float().softmax(1)
        best = probabilities_BK.topk(min(top, len(self.classes)), dim=1)
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [[Prediction(self.classes[i], p, i) for i, p in zip(ids, ps, strict=True)] for ids, ps in pairs]


class ImageSegmenter(ImageNetwork):
    """A segmentation model; its views of an image are the whole image at one or several scales.

    `windows`: sliding-window options; None = one scale, not mirrored.
    """

    model: Segmenter

    def __init__(self, source: Checkpoint, windows: SlidingWindow | None = None):
        super().__init__(segmenter(source))
        self.windows = windows or SlidingWindow()
        self.reduce_labels: bool = self.model.about.get("reduce_labels", True)
        side = min(self.model.grid) * self.model.config["patch_size"]
        scales, classes = self.windows.scales, self.model.num_classes
        self.apply = partial(_scaled, SegmentationEvalTransform(side, classes, scales=scales, channels=self.channels))

    def segment(self, views: Sequence[Sequence[Tensor]], sizes: Sequence[Sequence[int]]) -> list[Tensor]:
        """Classes (H, W) int64, on the CPU, of several images' views, at the given sizes (height, width)."""
        normalised = [[self.normalised(view[None]) for view in some] for some in views]
        return [found.cpu() for found in segmented(self.model, normalised, sizes, self.windows)]


def evaluation_view(model: Backbone, path: Path) -> Callable[[Image.Image], list[np.ndarray]]:
    """The evaluation view of a network's images: that of its processor, else resize and centre crop.

    Raises UserError for a network whose images are not square.
    """
    size = model.config["image_size"]
    if not isinstance(size, int):
        raise UserError(f"{path} is for images of {size} pixels; square ones are needed here")
    about, channels = model.about, model.config["in_chans"]
    if (said := about.get("view")) is None:
        return partial(_centre, size=size, crop_ratio=about.get("crop_ratio"), channels=channels)
    view = ProcessorView.model_validate(said)
    if view.size() != [size, size]:
        warn(f"{path}: its processor makes no images of {size} x {size} pixels; they are resized to it")
    return partial(_processed, view=view, size=size, channels=channels)


def _centre(image: Image.Image, size: int, crop_ratio: float | None, channels: int) -> list[np.ndarray]:
    return [to_array(centre_view(image, size, crop_ratio, channels))]


def _processed(image: Image.Image, view: ProcessorView, size: int, channels: int) -> list[np.ndarray]:
    return [to_array(view(image, size, channels))]


def warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


def _scaled(transform: SegmentationEvalTransform, image: Image.Image) -> list[np.ndarray]:
    return list(transform.scaled(to_channels(image, transform.channels)).values())


def image_network(source: Checkpoint, windows: SlidingWindow | None = None) -> ImageClassifier | ImageSegmenter:
    """The network of a checkpoint. Raises UserError if it is neither a classifier nor a segmenter."""
    if source.kind == "segmenter":
        return ImageSegmenter(source, windows)
    if source.kind == "classifier":
        return ImageClassifier(source)
    raise UserError(f"{source.path} holds a {source.kind}; a classifier or a segmentation model is needed")


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
        self._network = image_network(source, windows)
        self.classes = self._network.classes

    def __call__(
        self,
        images: Image.Image | Sequence[Image.Image],
        top: int = 5,
        sizes: Sequence[tuple[int, int]] | None = None,
        batch_size: int = 8,
    ) -> Answer | list[Answer]:
        """Predict for one image, or for a list of images (returns a list). Images may have any size and mode.

        They are not changed. TIFFs that Pillow reads wrongly (transforms/tiff.py) must be opened by open_image of
        transforms/image_io.py.

        A classifier returns the `top` Predictions (name, probability, number), most likely first. A segmenter returns
        classes (H, W) int64 at the image's size, or at the given `sizes`, (height, width) for each image.
        Raises TypeError for anything but PIL images (open files with PIL.Image.open), ValueError for `top` below 1.
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
        if wrong := [image for image in images if not isinstance(image, Image.Image)]:
            raise TypeError(f"a PIL image is needed, not a {type(wrong[0]).__name__}; open files with PIL.Image.open")
        if top < 1:
            raise ValueError(f"top must be at least 1, got {top}")
        views = [self._network.views(image) for image in images]
        if isinstance(self._network, ImageClassifier):
            return self._network.classify(torch.stack([view for (view,) in views]), top)
        sizes = sizes or [(image.height, image.width) for image in images]
        if len(sizes) != len(images):
            raise ValueError(f"{len(sizes)} sizes for {len(images)} images")
        return [found.numpy() for found in self._network.segment(views, sizes)]

    def overlay(self, image: Image.Image, labels_HW: np.ndarray) -> Image.Image:
        """The image under the colours of a label map of its size."""
        return overlay(image, labels_HW.astype(np.uint8), len(self.classes))
