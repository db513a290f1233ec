"""Fine-tuning of the backbone as a classifier (BEiT, section 2.6 and appendix G; RECIPE section 5).

Shapes: B batch, C channels, H W pixels.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from beit_pretrain.data.dataset import first_position
from beit_pretrain.engine.module import TrainedModule
from beit_pretrain.engine.optim import Optim
from beit_pretrain.errors import UserError
from beit_pretrain.models.backbone import Classifier
from beit_pretrain.models.checkpoints.formats import Checkpoint, read_checkpoint
from beit_pretrain.models.checkpoints.pretrained import classifier
from beit_pretrain.transforms.jitter import HALF, normalise, per_channel
from beit_pretrain.transforms.views import centre_view, to_array


@dataclass
class MixConfig:
    """What makes the labels softer and the images harder.

    Args:
        label_smoothing: share of the target that is spread over all classes.
        mixup, cutmix: alpha of the two; 0 = off. With either, the batch must be even.
        erasing: probability of erasing a rectangle of an image with noise.
    """

    label_smoothing: float = 0.1
    mixup: float = 0.0
    cutmix: float = 0.0
    erasing: float = 0.0


class Finetuning(TrainedModule):
    """Trains a classifier; validates top-1 and top-5 over every image exactly once, on any number of processes."""

    kind = "classifier"
    model: Classifier

    def __init__(
        self,
        model: Classifier,
        optim: Optim,
        regularisation: MixConfig,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        seed: int = 0,
    ):
        super().__init__(model, optim, seed)
        self.regularisation, self.mean, self.std = regularisation, tuple(mean), tuple(std)
        self._erase = RandomErasing(probability=regularisation.erasing, mode="pixel", device="cpu")
        self._mix: Mixup | None = None
        if regularisation.mixup or regularisation.cutmix:
            smoothing = regularisation.label_smoothing
            alphas = {"mixup_alpha": regularisation.mixup, "cutmix_alpha": regularisation.cutmix}
            self._mix = Mixup(**alphas, label_smoothing=smoothing, num_classes=model.num_classes)
        self._totals = torch.zeros(0)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Logits (B, classes) of images in [0, 1]."""
        return self.model(normalise(image_BCHW, self.mean, self.std))

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        """Cross-entropy with smoothed, possibly mixed labels."""
        image = normalise(batch["image"].float() / 255, self.mean, self.std)
        image, target_BK = self.regularise(image, batch["label"], first_position(batch))
        logits = self.maybe_compile(self.model.forward)(image, self.drop_path_noise(batch)).float()
        loss = F.cross_entropy(logits, target_BK)
        self.accumulate(loss=loss, accuracy=(logits.argmax(1) == target_BK.argmax(1)).float().mean())
        return loss

    def regularise(self, image_BCHW: Tensor, label_B: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """Erased and mixed images, and targets (B, classes) as probabilities."""
        smoothing, classes = self.regularisation.label_smoothing, self.model.num_classes
        target = F.one_hot(label_B, classes).float() * (1 - smoothing) + smoothing / classes
        if not (self._mix or self.regularisation.erasing):
            return image_BCHW, target
        # timm draws from the global generators: keyed by the position, so that a resumed run repeats them.
        with torch.random.fork_rng(devices=[image_BCHW.device] if image_BCHW.is_cuda else []):
            random.seed(position + self.seed)
            np.random.seed((position + self.seed) % 2**32)
            torch.manual_seed(position + self.seed)
            if self.regularisation.erasing:
                self._erase.device = image_BCHW.device
                image_BCHW = self._erase(image_BCHW)
            return self._mix(image_BCHW, label_B) if self._mix else (image_BCHW, target)

    def on_validation_epoch_start(self) -> None:
        self._totals = torch.zeros(4, dtype=torch.float64, device=self.device)

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        logits = self(batch["image"].float() / 255).float()
        label_B = batch["label"]
        top = logits.topk(min(5, logits.shape[1]), dim=1).indices == label_B.unsqueeze(1)
        loss = F.cross_entropy(logits, label_B, reduction="sum")
        self._totals += torch.stack([loss, top[:, 0].sum(), top.any(1).sum(), loss.new_full((), len(label_B))])

    def on_validation_epoch_end(self) -> None:
        loss, top1, top5, images = self.sum_over_processes(self._totals)
        self.log_validation(
            {"loss": loss / images, "accuracy": top1 / images, "top5_accuracy": top5 / images, "images": images}
        )

    test_step = validation_step
    on_test_epoch_start = on_validation_epoch_start
    on_test_epoch_end = on_validation_epoch_end


class Prediction(NamedTuple):
    """One class that an image may be of."""

    name: str
    probability: float
    number: int


class ImageClassifier:
    """A fine-tuned classifier, ready for PIL images.

    Args:
        source: a classifier in any format that `load_pretrained` reads, or a checkpoint that is read already.
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
        """The `top` classes of every view (uint8), the likeliest first."""
        best = self.probabilities(image_BCHW).topk(min(top, len(self.classes)), dim=1)
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [[Prediction(self.classes[i], p, i) for i, p in zip(ids, ps, strict=True)] for ids, ps in pairs]

    @torch.no_grad()
    def probabilities(self, image_BCHW: Tensor) -> Tensor:
        """(B, K) of the views (uint8)."""
        image = normalise(image_BCHW.to(self.device).float() / 255, self.mean, self.std)
        return self.model(image).float().softmax(1)
