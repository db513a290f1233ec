"""A fine-tuned classifier, ready for PIL images."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from beit_pretrain.errors import UserError
from beit_pretrain.models.checkpoints.formats import Checkpoint, read_checkpoint
from beit_pretrain.models.checkpoints.pretrained import classifier
from beit_pretrain.transforms.jitter import HALF, normalise, per_channel
from beit_pretrain.transforms.views import centre_view, to_array


class Prediction(NamedTuple):
    """A predicted class."""

    name: str
    probability: float
    number: int


class ImageClassifier:
    """A fine-tuned classifier, ready for PIL images.

    Args:
        source: a classifier in any format that `load_pretrained` reads, or a checkpoint that has been read.
    """

    def __init__(self, source: str | Path | Checkpoint):
        source = source if isinstance(source, Checkpoint) else read_checkpoint(source)
        self.model = classifier(source).requires_grad_(False)
        about = self.model.about
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model.to(self.device)
        self.classes: list[str] = about.get("classes") or [str(i) for i in range(self.model.num_classes)]
        half = per_channel(HALF, self.model.config["in_chans"], "mean")
        self.mean, self.std = about.get("mean", half), about.get("std", half)
        self.image_size: int = self.model.config["image_size"]
        if not isinstance(self.image_size, int):
            raise UserError(f"{source.path} is for images of {self.image_size} pixels; square ones are needed here")
        self.channels: int = self.model.config["in_chans"]
        self.crop_ratio: float | None = about.get("crop_ratio")

    def view(self, image: Image.Image) -> Tensor:
        """The evaluation view (C, H, W) uint8 of one image."""
        return torch.from_numpy(to_array(centre_view(image, self.image_size, self.crop_ratio, self.channels)))

    def classify(self, image_BCHW: Tensor, top: int = 5) -> list[list[Prediction]]:
        """The `top` classes of every view (uint8), most likely first."""
        best = self.probabilities(image_BCHW).topk(min(top, len(self.classes)), dim=1)
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [[Prediction(self.classes[i], p, i) for i, p in zip(ids, ps, strict=True)] for ids, ps in pairs]

    @torch.no_grad()
    def probabilities(self, image_BCHW: Tensor) -> Tensor:
        """Class probabilities (B, K) of the views (uint8)."""
        image = normalise(image_BCHW.to(self.device).float() / 255, self.mean, self.std)
        return self.model(image).float().softmax(1)
