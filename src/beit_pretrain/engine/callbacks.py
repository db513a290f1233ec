"""Callbacks: progress bar, throughput and data wait, pictures after a validation."""

from __future__ import annotations

import time

from lightning import Callback, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

from beit_pretrain.engine.task import Task
from beit_pretrain.visualization import grids


class ProgressBar(TQDMProgressBar):
    """One progress bar for the whole run: steps, elapsed and remaining time, steps/s and the latest metrics."""

    def get_metrics(self, trainer: Trainer, pl_module) -> dict:
        items = super().get_metrics(trainer, pl_module)
        items.pop("v_num", None)
        return {**items, **getattr(pl_module, "shown", {})}

    def show_metrics(self, trainer: Trainer, pl_module) -> None:
        """Show the metrics that were just written: the bar's own refresh of a step comes before them."""
        if self._train_progress_bar is not None and not self._train_progress_bar.disable:
            self._train_progress_bar.set_postfix(self.get_metrics(trainer, pl_module))

    def on_train_start(self, trainer: Trainer, pl_module) -> None:
        super().on_train_start(trainer, pl_module)
        # On resume Lightning would start the bar at 0, without a total.
        bar = self.train_progress_bar
        bar.total = self.total_train_batches
        bar.initial = bar.n = trainer.global_step * trainer.accumulate_grad_batches

    def on_exception(self, trainer: Trainer, pl_module, exception: BaseException) -> None:
        for bar in (self._val_progress_bar, self._train_progress_bar):  # so that the next message starts on a new line
            if bar is not None:
                bar.close()

    @property
    def total_train_batches(self) -> int | float:
        return self.trainer.num_training_batches  # Lightning's count mixes optimiser steps and micro-batches

    def init_train_tqdm(self):
        bar = super().init_train_tqdm()
        bar.set_description("training")
        return bar


class Throughput(Callback):
    """Logs images per second over all processes, and the share of time spent waiting for data (`data_wait`)."""

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
        step = trainer.global_step
        if last_micro_batch and (step % pl_module.log_every == 0 or step == trainer.max_steps):
            # Lightning calls callbacks before the module's hook, so the flush of this step includes these values.
            elapsed = max(now - self._mark, 1e-9)
            pl_module.accumulate(images_per_s=self._images / elapsed, data_wait=self._waited / elapsed)
            self._mark, self._waited, self._images = now, 0.0, 0

    def on_validation_start(self, trainer: Trainer, pl_module) -> None:
        self._started = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module) -> None:
        self._mark += time.perf_counter() - self._started  # leave validation time out
        pl_module.batch_ended = None


class ValidationPictures(Callback):
    """Saves a task's pictures of held-out images as PNG after every validation, and sends them to the loggers."""

    needs_whole_network = True

    def __init__(self, task: Task):
        self.task = task

    def on_validation_end(self, trainer: Trainer, pl_module) -> None:
        if not trainer.is_global_zero:
            return
        for name, picture in self.task.validation_pictures():
            path = self.task.cfg.folder / f"pictures/step-{trainer.global_step:06d}{f'-{name}' if name else ''}.png"
            grids.save(picture, path)
            for logger in trainer.loggers:
                if hasattr(logger, "log_image"):  # W&B, TensorBoard
                    logger.log_image(f"pictures/{name or 'main'}", [str(path)], step=trainer.global_step)
