"""Base class of the project's LightningModules: optimiser, gradient norm and clip, metrics, checkpoint metadata.

Metrics stay on the device and are read together every `log_every` optimiser steps, as means over all micro-batches and
processes since the last read, so the training loop does not wait for the device at each step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from lightning import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, distributed, nn

from beit_pretrain.data.stream import STATE
from beit_pretrain.engine import distributed as cluster
from beit_pretrain.engine import optim as optimisation
from beit_pretrain.engine.checkpointing import CheckpointManager
from beit_pretrain.engine.metrics import CsvMetrics
from beit_pretrain.engine.nonfinite_guard import NonFiniteGuard
from beit_pretrain.engine.settings import OptimSettings
from beit_pretrain.engine.speed import CUDA_GRAPHS
from beit_pretrain.engine.step_exchange import Agreed, StepExchange
from beit_pretrain.models.drop_path import uniforms

MOST_KEPT = 8192  # unread values, before they are read early
PROGRESS_BAR = ("loss", "masked_token_accuracy", "accuracy", "images_per_s")


class TrainedModule(LightningModule):
    """A network, its optimiser settings and its metrics.

    The network's `config` (plain keyword arguments) is saved in the checkpoint. Drop path and mixing depend on the
    run's `seed` and on the positions.
    """

    model: Any
    totals_shape: tuple[int, ...] = ()  # of `totals`
    totals: Tensor  # float64: what a validation adds up over this process's held-out images
    kind: str  # what a checkpoint of this module holds: "mim", "classifier", "segmenter", "probe" or "tokenizer"

    def __init__(self, model: nn.Module, optim: OptimSettings, seed: int = 0):
        super().__init__()
        self.seed = seed
        self.model = model
        self.optim = optim
        self.about: dict = {}  # metadata for readers of the checkpoint: classes, normalisation, tokenizer
        self.settings: dict = {}  # the run's settings, without those that may change on resume
        self.images: dict[str, str] = {}  # split -> digest of its data; must be equal on resume
        self.log_every = 50
        self.batch_ended: float | None = None
        self.keeper: CheckpointManager | None = None
        self.exchange = StepExchange()
        self.guard: NonFiniteGuard | None = None
        self.validation_due = False  # after the current step; saved in the checkpoint
        self._kept: list[tuple[str, Tensor | float, Tensor | float]] = []  # unread values: (name, value, weight)
        self._sums: dict[str, Tensor] = {}  # (2,) float64 on the CPU: sum of value x weight, sum of weights
        self.compile_mode: str | None = None  # for `maybe_compile`; None = no compilation
        self._compiled: dict[str, Callable] = {}
        self.shown: dict[str, float] = {}  # metrics in the progress bar

    def configure_model(self) -> None:
        if self.trainer.precision == "64-true":  # Lightning converts only after loading a checkpoint into float32
            self.double()
        if self._device_mesh is not None:  # trainer.strategy=fsdp
            cluster.shard(self.model, self._device_mesh["data_parallel"])

    def configure_optimizers(self):
        depth = len(self.model.blocks) if hasattr(self.model, "blocks") else 0
        return optimisation.configure(self.model, self.optim, int(self.trainer.max_steps), depth)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        """Rescale and clip the gradients. Lightning's clip rejects fused AdamW under bf16 and cannot rescale."""
        if self.trainer.world_size > 1:
            self.exchange.finish()
        loss_scale = self.loss_scale()
        clip = None if self.optim.clip is None else self.optim.clip * loss_scale
        norm = optimisation.clip_gradients(self.model.parameters(), clip, self.gradient_scale()) / loss_scale
        self.accumulate(gradient_norm=norm, lr=optimizer.param_groups[-1]["lr"])
        if self.guard is not None:
            self.accumulate(skipped=self.guard.check(norm, optimizer, self.trainer.global_step))

    def drop_path_noise(self, batch: dict) -> Tensor | None:
        """Drop path's uniform numbers (B, R) for the positions of a batch; None without drop path."""
        if not self.model.config.get("drop_path_rate"):
            return None
        return uniforms(self.seed, batch["position"], self.model.branches)

    def loss_scale(self) -> Tensor | float:
        """The loss scale of trainer.precision=16-mixed, else 1; the fused optimiser divides by it."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is None:
            return 1.0
        scale = scaler._get_scale_async()  # on the device; `get_scale` would wait for the device at each step
        return scaler.get_scale() if scale is None else scale

    def masked_patches(self) -> Tensor | int:
        """Masked patches of this process in this step, for a loss normalised over the global batch."""
        return 0

    def on_before_backward(self, loss: Tensor) -> None:
        """Start the step exchange before the last backward pass of a step, so that the two overlap."""
        trainer = self.trainer
        if trainer.world_size > 1 and (trainer.fit_loop.batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            step = trainer.global_step + 1
            given = self.keeper.status(step) if self.keeper is not None else Agreed(step)
            self.exchange.start(given, self.masked_patches(), self.device)

    def gradient_scale(self) -> Tensor | float:
        """Factor for the gradients of this step; overridden for a loss normalised over the global batch."""
        return 1.0

    def maybe_compile(self, function: Callable) -> Callable:
        """The function, compiled (once, with static shapes) if this run compiles."""
        if self.compile_mode is None:
            return function
        key = function.__qualname__
        if key not in self._compiled:
            self._compiled[key] = torch.compile(function, dynamic=False, mode=self.compile_mode)
        return self._compiled[key]

    @property
    def compiles(self) -> bool:
        """Whether anything has been compiled."""
        return bool(self._compiled)

    def on_train_batch_start(self, batch: dict, batch_idx: int) -> None:
        if self.compile_mode in CUDA_GRAPHS:  # outputs of the last micro-batch's graphs may be overwritten now
            torch.compiler.cudagraph_mark_step_begin()

    def accumulate(self, weight: Tensor | float = 1.0, **metrics: Tensor | float) -> None:
        """Add values to the weighted means that the next flush writes as `train/<name>`, without a device sync."""
        weight = weight.detach() if isinstance(weight, Tensor) else weight
        for name, value in metrics.items():
            self._kept.append((name, value.detach() if isinstance(value, Tensor) else value, weight))
        if len(self._kept) >= MOST_KEPT:
            self._read()

    def _read(self) -> None:
        """Read the kept values with one device sync, and add them in their order.

        So the sums do not depend on when they were read: a resumed run writes the same means.
        """
        numbers = read_numbers([number for _, *pair in self._kept for number in pair])
        for (name, _, _), value, weight in zip(self._kept, numbers[::2], numbers[1::2], strict=True):
            sums = self._sums.get(name, torch.zeros(2, dtype=torch.float64))
            if math.isfinite(value):  # a skipped step must not make the mean of the others NaN
                sums = sums + torch.tensor([value * weight, weight], dtype=torch.float64)
            self._sums[name] = sums
        self._kept = []

    def on_train_batch_end(self, outputs, batch, batch_idx: int) -> None:
        if STATE in batch:  # before a checkpoint is saved
            cast(Any, self.trainer).datamodule.note_used(batch)
        step = self.trainer.global_step
        last_micro_batch = (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0
        if last_micro_batch and (step % self.log_every == 0 or step == self.trainer.max_steps):
            self.flush()
        if last_micro_batch and self.keeper is not None:
            every = int(self.trainer.val_check_interval)
            self.validation_due = self.has_validation and (batch_idx + 1) % every == 0
            self.keeper.after_step(self)
        self.batch_ended = time.perf_counter()  # end of the step: from here on it waits for data

    @property
    def has_validation(self) -> bool:
        """Whether there are held-out images."""
        return "val" in getattr(getattr(self.trainer, "datamodule", None), "readers", ())

    def flush(self) -> None:
        """Write the means since the last flush to the loggers and the progress bar."""
        totals, self._sums = self.unwritten(), {}
        if not totals:
            return
        metrics = {f"train/{name}": (total / weight).item() for name, (total, weight) in totals.items()}
        # Python numbers: values logged through Lightning are device tensors, read at each refresh of the bar.
        self.shown = {n.split("/")[1]: metrics[n] for n in metrics if n.split("/")[1] in PROGRESS_BAR}
        if (show := getattr(self.trainer.progress_bar_callback, "show_metrics", None)) is not None:
            show(self.trainer, self)
        self.log_metrics(metrics)
        if self.guard is not None:
            vocab_size = getattr(self.model, "vocab_size", None)
            self.guard.report(metrics, self.trainer.global_step, vocab_size, self.trainer.is_global_zero)

    def on_train_start(self) -> None:
        if self.keeper is not None:
            self.keeper.begin(self.trainer)
            # Lightning's loop can validate by steps or by minutes, but not by both.
            loop: Any = self.trainer.fit_loop.epoch_loop
            loop._should_check_val_fx = lambda data_fetcher: self.validation_due
        if self.validation_due:  # the run ended before or during this validation; now as Lightning's loop does it
            val_loop = self.trainer.fit_loop.epoch_loop.val_loop
            val_loop.restarting = False
            self.trainer.validating = True
            val_loop.run()
            self.trainer.training = True

    def on_validation_epoch_start(self) -> None:
        self.totals = torch.zeros(self.totals_shape, dtype=torch.float64, device=self.device)

    def on_validation_batch_end(self, outputs, batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        if self.keeper is not None:
            self.keeper.after_validation_batch(self, batch_idx)

    def on_validation_end(self) -> None:
        self.validation_due = False
        if self.keeper is not None and self.trainer.state.fn == TrainerFn.FITTING:
            self.keeper.after_validation(self)

    def log_validation(self, metrics: dict[str, Tensor | float]) -> None:
        """Log `val/<name>` to the loggers, and to Lightning for callbacks that monitor a metric."""
        values = {f"val/{name}": float(value) for name, value in metrics.items()}
        self.log_dict(values, logger=False, sync_dist=True)  # already equal on all processes; avoids a warning
        self.log_metrics(values)

    def log_metrics(self, metrics: dict[str, float]) -> None:
        """Send metrics to every logger, at the current optimiser step."""
        for logger in self.loggers:
            logger.log_metrics(metrics, step=self.trainer.global_step)

    def sum_over_processes(self, values: Tensor) -> Tensor:
        """The sum over all processes; with one process, the tensor itself."""
        if self.trainer.world_size == 1:
            return values
        total = values.clone()
        distributed.all_reduce(total)  # Lightning's `reduce` adds a barrier
        return total

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Reset Lightning's micro-batch counters: a run may resume with other micro-batches, processes or steps.

        For Lightning the whole run is one epoch, so a resumed run is always inside it. With a loop at the end of its
        epoch Lightning would start new epochs forever, without a batch.
        """
        loop = checkpoint.get("loops", {}).get("fit_loop", {})
        done = int(checkpoint.get("global_step", 0)) * self.trainer.accumulate_grad_batches
        for name, count in (("epoch_loop.batch_progress", done), ("epoch_loop.val_loop.batch_progress", 0)):
            if name in loop:
                for counts in (loop[name]["total"], loop[name]["current"]):
                    counts.update(dict.fromkeys(counts, count))
                loop[name]["is_last_batch"] = False
        for counts in loop.get("epoch_progress", {}).values():
            counts.update(ready=1, started=1, processed=0, completed=0)
        self.validation_due = bool(checkpoint.get("validation_due"))
        if self.trainer.is_global_zero:
            self._sums = dict(checkpoint.get("unwritten", {}))

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Add the metadata (plain containers) from which `models.checkpoints.files.read_own` rebuilds the network."""
        checkpoint["beit_pretrain"] = {"kind": self.kind, "model": dict(self.model.config), **self.about}
        checkpoint["settings"] = self.settings
        checkpoint["images"] = dict(self.images)
        checkpoint["unwritten"] = self.unwritten()
        checkpoint["rows"] = sum(len(logger.rows) for logger in self.loggers if isinstance(logger, CsvMetrics))
        checkpoint["validation_due"] = self.validation_due
        if self.guard is not None:
            self.guard.write(self.trainer.global_step, self.trainer.is_global_zero)

    def unwritten(self) -> dict[str, Tensor]:
        """Metric sums since the last flush, over all processes, for a checkpoint between two flushes.

        Afterwards rank 0 holds the sums of all processes, as it does after a resume.
        """
        self._read()
        names = sorted(self._sums)
        if not names:
            return {}
        total = self.sum_over_processes(torch.stack([self._sums[name] for name in names]).to(self.device)).cpu()
        mine = total if self.trainer.is_global_zero else torch.zeros_like(total)
        self._sums = dict(zip(names, mine.unbind(0), strict=True))
        return dict(zip(names, total.unbind(0), strict=True))


def read_numbers(values: Sequence[Tensor | float]) -> list[float]:
    """Scalars as Python floats, in order, with one transfer from the device."""
    on_device = [value.double() for value in values if isinstance(value, Tensor)]
    read = iter(torch.stack(on_device).tolist() if on_device else [])
    return [next(read) if isinstance(value, Tensor) else float(value) for value in values]
