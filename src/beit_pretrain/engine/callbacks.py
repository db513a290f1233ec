"""Callbacks: progress, throughput and data wait, masked | predicted | original pictures."""

from __future__ import annotations

import time
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from PIL import Image
from torch import Tensor

from beit_pretrain.data.datamodule import ShardData
from beit_pretrain.data.dataset import ShardDataset
from beit_pretrain.errors import UserError
from beit_pretrain.tasks.pretrain import Pretraining
from beit_pretrain.tasks.segment import Segmentation
from beit_pretrain.transforms.jitter import normalise
from beit_pretrain.visualization import grids
from beit_pretrain.visualization.attention_maps import attention_picture
from beit_pretrain.visualization.overlays import comparison
from beit_pretrain.visualization.token_maps import token_sheet


class ProgressBar(TQDMProgressBar):
    """One bar over the whole run: steps, elapsed and remaining time, steps/s, and the latest metrics."""

    def get_metrics(self, trainer: Trainer, pl_module) -> dict:
        items = super().get_metrics(trainer, pl_module)
        items.pop("v_num", None)
        return {**items, **getattr(pl_module, "shown", {})}

    def on_train_start(self, trainer: Trainer, pl_module) -> None:
        super().on_train_start(trainer, pl_module)
        # Of a run that goes on, which Lightning would let begin at nothing, without an end.
        bar = self.train_progress_bar
        bar.total = self.total_train_batches
        bar.initial = bar.n = trainer.global_step * trainer.accumulate_grad_batches

    def on_exception(self, trainer: Trainer, pl_module, exception: BaseException) -> None:
        for bar in (self._val_progress_bar, self._train_progress_bar):  # what is said next gets a line of its own
            if bar is not None:
                bar.close()

    @property
    def total_train_batches(self) -> int | float:
        return self.trainer.num_training_batches  # Lightning's own count mixes optimiser steps and micro-batches

    def init_train_tqdm(self):
        bar = super().init_train_tqdm()
        bar.set_description("training")
        return bar


class Throughput(Callback):
    """Images per second over all processes, and the share of time in which the step waited for data."""

    def __init__(self) -> None:
        self._mark = self._waited = 0.0
        self._images = 0
        self._started = 0.0

    def on_train_start(self, trainer: Trainer, pl_module) -> None:
        self._mark = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module, batch: dict, batch_idx: int) -> None:
        if pl_module.batch_ended is not None:
            self._waited += time.perf_counter() - pl_module.batch_ended

    def on_train_batch_end(self, trainer: Trainer, pl_module, outputs, batch: dict, batch_idx) -> None:
        self._images += len(batch["position"]) * trainer.world_size
        now = time.perf_counter()
        last_micro_batch = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if last_micro_batch and trainer.global_step % pl_module.log_every == 0:
            # Callbacks run before the module's own hook, so this lands in the flush of the same step.
            elapsed = max(now - self._mark, 1e-9)
            pl_module.accumulate(images_per_s=self._images / elapsed, data_wait=self._waited / elapsed)
            self._mark, self._waited, self._images = now, 0.0, 0

    def on_validation_start(self, trainer: Trainer, pl_module) -> None:
        self._started = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module) -> None:
        self._mark += time.perf_counter() - self._started  # validation is neither training nor waiting
        pl_module.batch_ended = None


class MaskedPictures(Callback):
    """Writes masked | predicted | decoded | original pictures of held-out images, and attention maps, after every
    validation; token maps, which do not change, after the first one.

    Args:
        folder: where `step-000100.png` go.
        data: its validation images are shown.
        images: how many.
    """

    def __init__(self, folder: Path, data: ShardData, images: int = 6):
        self.folder, self.data, self.images = folder, data, images

    def on_validation_end(self, trainer: Trainer, pl_module) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        batch = first_images(self.data.eval_dataset("val"), self.images, pl_module.device)
        publish(trainer, masked_picture(pl_module, batch), self.folder)
        image, ids_BN = pl_module.image_and_tokens(batch)
        normalised, model = normalise(image[:2], pl_module.mean, pl_module.std), pl_module.model
        publish(trainer, attention_picture(model, normalised, image[:2]), self.folder, "attention")
        if not any(self.folder.glob("step-*-tokens.png")):
            decoded = pl_module.tokenizer.decode(ids_BN)
            publish(trainer, token_sheet(image, decoded, ids_BN, model.vocab_size), self.folder, "tokens")


def publish(trainer: Trainer, picture: Image.Image, folder: Path, name: str = "") -> None:
    """Write a picture of the current step and hand it to the loggers that take pictures."""
    path = folder / f"step-{trainer.global_step:06d}{f'-{name}' if name else ''}.png"
    grids.save(picture, path)
    for logger in trainer.loggers:
        if hasattr(logger, "log_image"):  # W&B
            logger.log_image(f"pictures/{name or 'main'}", [str(path)], step=trainer.global_step)


class SegmentationPictures(Callback):
    """Writes image | annotated | found, in colour, of held-out images after every validation.

    Arguments as of `MaskedPictures`.
    """

    def __init__(self, folder: Path, data: ShardData, images: int = 6):
        self.folder, self.data, self.images = folder, data, images

    def on_validation_end(self, trainer: Trainer, pl_module) -> None:
        if not trainer.sanity_checking and trainer.is_global_zero:
            publish(trainer, segmentation_picture(pl_module, self.data, self.images), self.folder)


def segmentation_picture(module: Segmentation, data: ShardData, images: int, split: str = "val") -> Image.Image:
    """A row for each of the first images of a split: image, overlay of its label map, overlay of what is found."""
    training, dataset, rows = module.model.training, data.eval_dataset(split), []
    module.model.eval()
    for position in range(min(images, dataset.order.samples)):
        sample = dataset.sample(position)
        scales = [torch.from_numpy(sample[name]).to(module.device) for name in sorted(sample) if "scale_" in name]
        target = sample["target"]
        found = module.segment(scales, target.shape).cpu().numpy().astype("uint8")
        image = grids.to_pil(scales[0] / 255).resize(target.shape[::-1], Image.Resampling.BICUBIC)
        rows.append(comparison(image, [("annotated", target), ("found", found)], module.about["classes"]))
    module.model.train(training)
    return grids.stack(rows)


def first_images(dataset: ShardDataset, count: int, device: torch.device) -> dict[str, Tensor]:
    """The first images of a data set as a batch on `device`."""
    samples = [dataset.sample(position) for position in range(min(count, dataset.order.samples))]
    return {k: torch.stack([torch.as_tensor(s[k]) for s in samples]).to(device) for k in samples[0]}


@torch.no_grad()
def masked_picture(module: Pretraining, batch: dict[str, Tensor]):
    """Grid of masked | predicted tokens decoded | original tokens decoded | original, one row an image.

    Raises UserError without a tokenizer, which is what turns tokens into pictures.
    """
    if module.tokenizer is None:
        raise UserError("the run trains from cached tokens alone; only a tokenizer can draw them")
    training = module.model.training
    module.model.eval()
    image, tokens_BN = module.image_and_tokens(batch)
    mask_BN = batch["mask"]
    predicted_BN = tokens_BN.clone()
    logits_MV = module.model(normalise(image, module.mean, module.std), mask_BN)
    predicted_BN[mask_BN] = logits_MV.argmax(-1)
    module.model.train(training)
    side = int(image.shape[-1])
    decoded = [F.interpolate(module.tokenizer.decode(t), (side, side)) for t in (predicted_BN, tokens_BN)]
    columns = [grids.hide(image, mask_BN), *decoded, image]
    return grids.grid(columns, ["masked", "predicted", "tokens decoded", "original"])
