"""Fine-tuning as a classifier (BEiT, section 2.6, appendix G; release: `run_class_finetuning.py`), with mixup, random
erasing, averaged weights (EMA) and early stopping.

Shapes: B batch, C channels, H W pixels.
"""

from __future__ import annotations

import random
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging
from pydantic import Field, Strict
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from beit_pretrain.data.dataset import first_position
from beit_pretrain.engine.settings import OptimSettings
from beit_pretrain.engine.task import Task
from beit_pretrain.errors import UserError
from beit_pretrain.models.backbone import Classifier
from beit_pretrain.models.build import network
from beit_pretrain.models.checkpoints.init_from import normalisation, origin, read_source
from beit_pretrain.models.checkpoints.pretrained import classifier
from beit_pretrain.settings import Count, NonNegative, Rule, Settings, Share, Switch, about
from beit_pretrain.tasks.common import (
    BackboneModule,
    BackboneSettings,
    ClassificationDataSettings,
    NetworkSettings,
    labelled_data,
)
from beit_pretrain.transforms.jitter import normalise

Decay = Annotated[float, Strict(), Field(gt=0, lt=1), Rule("a number above 0 and below 1")]


class MixConfig(Settings):
    """Label smoothing, mixup, cutmix and random erasing."""

    defaults = "tasks/finetune.yaml:regularisation"

    label_smoothing: Share = about("share of the target that is spread over all classes")
    mixup: NonNegative = about("alpha of mixup; 0 = off. With mixup or cutmix the batch must be even")
    cutmix: NonNegative = about("alpha of cutmix; 0 = off")
    erasing: Share = about("probability of erasing a rectangle of an image with noise")


class ClassifierSettings(NetworkSettings):
    """Architecture of a new classifier. With init_from, the values set here must agree with the checkpoint."""

    pool: Literal["avg", "token"] | None = about(
        "avg: mean of the patches, new norm | token: [CLS] after the final norm; null = that of init_from, else avg"
    )


class FinetuneSettings(BackboneSettings):
    """Settings of fine-tuning a classifier."""

    defaults = "fit.yaml tasks/finetune.yaml"

    from_scratch: Switch = about("train the same network without a checkpoint")
    model: ClassifierSettings
    regularisation: MixConfig
    ema: Decay | None = about("decay of averaged weights, such as 0.9999: validated and saved in place of the weights")
    early_stopping: Count | None = about("stop after this many validations without a better accuracy")
    activation_checkpointing: Switch = about("saves most activation memory; a third slower", True)
    data: ClassificationDataSettings


class Finetuning(BackboneModule):
    """Trains a classifier; validates top-1 and top-5 over every image exactly once, on any number of processes."""

    kind = "classifier"
    model: Classifier

    def __init__(
        self,
        model: Classifier,
        optim: OptimSettings,
        regularisation: MixConfig,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        seed: int = 0,
    ):
        super().__init__(model, optim, mean, std, seed)
        self.regularisation, self.totals_shape = regularisation, (4,)
        self._erase = RandomErasing(probability=regularisation.erasing, mode="pixel", device="cpu")
        self._mix: Mixup | None = None
        if regularisation.mixup or regularisation.cutmix:
            smoothing = regularisation.label_smoothing
            alphas = {"mixup_alpha": regularisation.mixup, "cutmix_alpha": regularisation.cutmix}
            self._mix = Mixup(**alphas, label_smoothing=smoothing, num_classes=model.num_classes)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Logits (B, classes) of images in [0, 1]."""
        return self.model(normalise(image_BCHW, self.mean, self.std))

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        """Cross-entropy with smoothed, possibly mixed labels."""
        image, target_BK = self.regularise(self.image_of(batch), batch["label"], first_position(batch))
        logits = self.maybe_compile(self.model.forward)(image, self.drop_path_noise(batch)).float()
        loss = F.cross_entropy(logits, target_BK)
        self.accumulate(loss=loss, accuracy=(logits.argmax(1) == target_BK.argmax(1)).float().mean())
        return loss

    def regularise(self, image_BCHW: Tensor, label_B: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """Return erased and mixed images, and targets (B, classes) as probabilities."""
        smoothing, classes = self.regularisation.label_smoothing, self.model.num_classes
        target = F.one_hot(label_B, classes).float() * (1 - smoothing) + smoothing / classes
        if not (self._mix or self.regularisation.erasing):
            return image_BCHW, target
        # timm uses the global generators. Seeded by position, a resumed run draws the same numbers.
        with torch.random.fork_rng(devices=[image_BCHW.device] if image_BCHW.is_cuda else []):
            random.seed(position + self.seed)
            np.random.seed((position + self.seed) % 2**32)
            torch.manual_seed(position + self.seed)
            if self.regularisation.erasing:
                self._erase.device = image_BCHW.device
                image_BCHW = self._erase(image_BCHW)
            return self._mix(image_BCHW, label_B) if self._mix else (image_BCHW, target)

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        logits = self(batch["image"].float() / 255).float()
        label_B = batch["label"]
        top = logits.topk(min(5, logits.shape[1]), dim=1).indices == label_B.unsqueeze(1)
        loss = F.cross_entropy(logits, label_B, reduction="sum")
        self.totals += torch.stack([loss, top[:, 0].sum(), top.any(1).sum(), loss.new_full((), len(label_B))])

    def on_validation_epoch_end(self) -> None:
        loss, top1, top5, images = self.sum_over_processes(self.totals)
        self.log_validation(
            {"loss": loss / images, "accuracy": top1 / images, "top5_accuracy": top5 / images, "images": images}
        )


class Finetune(Task):
    """The task `finetune`: image classification."""

    settings = FinetuneSettings
    best = ("val/accuracy", "max")
    fsdp = True
    module: Finetuning

    def __init__(self, cfg: FinetuneSettings):
        super().__init__(cfg)
        source = None if cfg.from_scratch else read_source(cfg, expands_bias=True)
        mean, std = normalisation(cfg, source.about if source else {})
        self.data = data = labelled_data(cfg, mean)
        if source is None:
            model = Classifier(len(data.classes), cfg.model.pool or "avg", **network(cfg))
        else:
            same = source.about.get("classes") in (None, list(data.classes))  # else the head cannot be reused
            drop = cfg.model.drop_path_rate
            model = classifier(source, cfg.image_size, len(data.classes), drop, cfg.model.pool, new_head=not same)
            model.train()
        model.set_grad_checkpointing(cfg.activation_checkpointing)
        optim = cfg.optim.with_warmup_in_steps(data.samples, cfg.global_batch_size)
        self.module = Finetuning(model, optim, cfg.regularisation, mean, std, cfg.seed)
        self.module.about |= {"classes": list(data.classes), "crop_ratio": cfg.data.crop_ratio}
        self.origin = origin(source)
        if cfg.ema is not None:
            self.callbacks.append(EMAWeightAveraging(decay=cfg.ema))
        if cfg.early_stopping is not None:
            if "val" not in data.readers:
                raise UserError("early_stopping watches the held-out accuracy: data.val is needed")
            patience = cfg.early_stopping
            self.callbacks.append(EarlyStopping("val/accuracy", mode="max", patience=patience, strict=False))

    def check_micro_batch(self, images: int, world: int, on_gpus: bool, given: str) -> None:
        if (self.cfg.regularisation.mixup or self.cfg.regularisation.cutmix) and images % 2:
            raise UserError(f"mixup and cutmix pair images: {images} at once ({given}) must be even")
