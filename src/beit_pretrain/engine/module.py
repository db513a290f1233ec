"""What every LightningModule of the project shares: optimiser, gradient norm and clip, metrics, what a checkpoint says.

Metrics stay on the device, as they are, and are read all at once every `log_every` optimiser steps, as means over all
micro-batches and processes since then, so that the training loop never waits for the device to print a number.
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

from beit_pretrain.engine import distributed as cluster
from beit_pretrain.engine import optim as optimisation
from beit_pretrain.engine.checkpointing import CheckpointManager
from beit_pretrain.engine.metrics import CsvMetrics
from beit_pretrain.engine.nonfinite_guard import NonFiniteGuard
from beit_pretrain.engine.settings import OptimSettings
from beit_pretrain.engine.speed import CUDA_GRAPHS
from beit_pretrain.engine.step_exchange import Agreed, StepExchange
from beit_pretrain.models.drop_path import uniforms

MOST_KEPT = 1024  # values of a metric that wait to be read
PROGRESS_BAR = ("loss", "masked_token_accuracy", "accuracy", "images_per_s")


class TrainedModule(LightningModule):
    """A network, its optimiser settings and its metrics.

    Args:
        model: the network; its `config` (plain keyword arguments) goes into the checkpoint.
        optim: optimiser settings.
        seed: of the run; drop path and mixing are drawn from it and the positions.
    """

    model: Any
    kind: str  # what a checkpoint of this module holds: "mim", "classifier", "segmenter", "probe" or "tokenizer"

    def __init__(self, model: nn.Module, optim: OptimSettings, seed: int = 0):
        super().__init__()
        self.seed = seed
        self.model = model
        self.optim = optim
        self.about: dict = {}  # plain facts for whoever reads the checkpoint: classes, normalisation, tokenizer
        self.settings: dict = {}  # of the run, less those that are free to change
        self.images: dict[str, str] = {}  # split -> the contents of the data, to go on with the same
        self.log_every = 50
        self.batch_ended: float | None = None
        self.keeper: CheckpointManager | None = None
        self.exchange = StepExchange()
        self.guard: NonFiniteGuard | None = None
        self.validation_due = False  # of the step in hand: a checkpoint says so
        self._kept: dict[str, list[tuple[Tensor | float, Tensor | float]]] = {}  # values and weights, not yet read
        self._sums: dict[str, Tensor] = {}  # (2,) float64 on the CPU: sum of value x weight, sum of weights
        self.compile_mode: str | None = None  # of `fast`; None = nothing is compiled
        self._compiled: dict[str, Callable] = {}
        self.shown: dict[str, float] = {}  # what the progress bar shows

    def configure_model(self) -> None:
        if self.trainer.precision == "64-true":  # Lightning does it later, and would load a checkpoint into float32
            self.double()
        if self._device_mesh is not None:  # trainer.strategy=fsdp
            cluster.shard(self.model, self._device_mesh["data_parallel"])

    def configure_optimizers(self):
        depth = len(self.model.blocks) if hasattr(self.model, "blocks") else 0
        return optimisation.configure(self.model, self.optim, int(self.trainer.max_steps), depth)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        """Rescale and clip here and not by Lightning: its clip refuses fused AdamW under bf16, and knows no scale."""
        if self.trainer.world_size > 1:
            self.exchange.finish()
        loss_scale = self.loss_scale()
        clip = None if self.optim.clip is None else self.optim.clip * loss_scale
        norm = optimisation.clip_gradients(self.model.parameters(), clip, self.gradient_scale()) / loss_scale
        self.accumulate(gradient_norm=norm, lr=optimizer.param_groups[-1]["lr"])
        if self.guard is not None:
            self.accumulate(skipped=self.guard.check(norm, optimizer, self.trainer.global_step))

    def drop_path_noise(self, batch: dict) -> Tensor | None:
        """Drop path's numbers (B, R) for the positions of a batch; None where nothing would be dropped."""
        if not self.model.config.get("drop_path_rate"):
            return None
        return uniforms(self.seed, batch["position"], self.model.branches)

    def loss_scale(self) -> Tensor | float:
        """What trainer.precision=16-mixed has multiplied the loss by; the fused optimiser takes it out again."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is None:
            return 1.0
        scale = scaler._get_scale_async()  # on the device: `get_scale` waits for it, at every step
        return scaler.get_scale() if scale is None else scale

    def masked_patches(self) -> Tensor | int:
        """Of this process in this step, for a loss that is normalised by those of the global batch."""
        return 0

    def on_before_backward(self, loss: Tensor) -> None:
        """Before the last backward pass of a step, beside which the processes tell one another how things stand."""
        trainer = self.trainer
        if trainer.world_size > 1 and (trainer.fit_loop.batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            step = trainer.global_step + 1
            given = self.keeper.status(step) if self.keeper is not None else Agreed(step)
            self.exchange.start(given, self.masked_patches(), self.device)

    def gradient_scale(self) -> Tensor | float:
        """Factor for the gradients of this step (a loss that is normalised over the global batch overrides it)."""
        return 1.0

    def maybe_compile(self, function: Callable, **options: Any) -> Callable:
        """The function, compiled if this run compiles: once for each, with shapes that never change."""
        if self.compile_mode is None:
            return function
        key = getattr(function, "__qualname__", repr(function))
        if key not in self._compiled:
            self._compiled[key] = torch.compile(function, dynamic=False, mode=self.compile_mode, **options)
        return self._compiled[key]

    @property
    def compiles(self) -> bool:
        """Whether anything has been compiled."""
        return bool(self._compiled)

    def on_train_batch_start(self, batch: dict, batch_idx: int) -> None:
        if self.compile_mode in CUDA_GRAPHS:  # what the graphs of the last micro-batch gave may be overwritten now
            torch.compiler.cudagraph_mark_step_begin()

    def accumulate(self, weight: Tensor | float = 1.0, **metrics: Tensor | float) -> None:
        """Add values to the weighted means that the next flush writes as `train/<name>`; reads nothing yet."""
        weight = weight.detach() if isinstance(weight, Tensor) else weight
        for name, value in metrics.items():
            kept = self._kept.setdefault(name, [])
            kept.append((value.detach() if isinstance(value, Tensor) else value, weight))
            if len(kept) >= MOST_KEPT:
                self._read()

    def _read(self) -> None:
        """Read what is kept, with one wait for the device, and add it up in the order in which it came.

        So the sums do not depend on when they were read: a run that is continued writes the same means.
        """
        everything = [x for pairs in self._kept.values() for pair in pairs for x in pair]
        numbers = read_numbers(everything)
        at = 0
        for name, pairs in self._kept.items():
            total, weights = self._sums.get(name, torch.zeros(2)).tolist()
            for value, weight in zip(numbers[at : at + 2 * len(pairs) : 2], numbers[at + 1 : at + 2 * len(pairs) : 2]):
                if math.isfinite(value):  # a skipped step is counted, and does not hide the others' mean
                    total, weights = total + value * weight, weights + weight
            at += 2 * len(pairs)
            self._sums[name] = torch.tensor([total, weights], dtype=torch.float64)
        self._kept = {}

    def on_train_batch_end(self, outputs, batch, batch_idx: int) -> None:
        step = self.trainer.global_step
        last_micro_batch = (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0
        if last_micro_batch and (step % self.log_every == 0 or step == self.trainer.max_steps):
            self.flush()
        if last_micro_batch and self.keeper is not None:
            every = int(self.trainer.val_check_interval)
            self.validation_due = self.has_validation and (batch_idx + 1) % every == 0
            self.keeper.after_step(self)
        self.batch_ended = time.perf_counter()  # the last thing of a step: from here on it waits for data

    @property
    def has_validation(self) -> bool:
        """Whether there are held-out images."""
        return "val" in getattr(getattr(self.trainer, "datamodule", None), "readers", ())

    def flush(self) -> None:
        """Write the means since the last flush to the loggers and the progress bar."""
        self._read()
        names = sorted(self._sums)
        if not names:
            return
        sums, weights = self.sum_over_processes(torch.stack([self._sums[n] for n in names], dim=1).to(self.device))
        self._sums = {}
        metrics = {f"train/{name}": value for name, value in zip(names, (sums / weights).tolist(), strict=True)}
        # Numbers of the host: those that Lightning logs are tensors on the device, read at every refresh of the bar.
        self.shown = {n.split("/")[1]: metrics[n] for n in metrics if n.split("/")[1] in PROGRESS_BAR}
        self.log_metrics(metrics)
        if self.guard is not None:
            vocab_size = getattr(self.model, "vocab_size", None)
            self.guard.report(metrics, self.trainer.global_step, vocab_size, self.trainer.is_global_zero)

    def on_train_start(self) -> None:
        if self.keeper is not None:
            self.keeper.begin(self.trainer)
            # Lightning's loop asks after every step, and knows of steps or of minutes, but not of both.
            loop: Any = self.trainer.fit_loop.epoch_loop
            loop._should_check_val_fx = lambda data_fetcher: self.validation_due
        if self.validation_due:  # the run was ended before or during it
            self.validate_now()

    def validate_now(self) -> None:
        """Validate between two steps, as Lightning's loop does by itself."""
        loop = self.trainer.fit_loop.epoch_loop.val_loop
        loop.restarting = False
        self.trainer.validating = True
        loop.run()
        self.trainer.training = True

    def on_validation_batch_end(self, outputs, batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        if self.keeper is not None:
            self.keeper.after_validation_batch(self, batch_idx)

    def on_validation_end(self) -> None:
        self.validation_due = False
        if self.keeper is not None and self.trainer.state.fn == TrainerFn.FITTING:
            self.keeper.after_validation(self)

    def log_validation(self, metrics: dict[str, Tensor | float]) -> None:
        """Write `val/<name>`: to the loggers, and to Lightning for callbacks that watch a metric."""
        values = {f"val/{name}": float(value) for name, value in metrics.items()}
        self.log_dict(values, logger=False, sync_dist=True)  # equal on all processes already; it silences a warning
        if not self.trainer.sanity_checking:
            self.log_metrics(values)

    def log_metrics(self, metrics: dict[str, float]) -> None:
        """Hand metrics to every logger, at the number of optimiser steps taken so far."""
        for logger in self.loggers:
            logger.log_metrics(metrics, step=self.trainer.global_step)

    def sum_over_processes(self, values: Tensor | None) -> Tensor:
        """The sum over all processes (the tensor itself in a run of one)."""
        assert values is not None
        if self.trainer.world_size == 1:
            return values
        total = values.clone()
        distributed.all_reduce(total)  # Lightning's own `reduce` has a barrier in front
        return total

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Count micro-batches anew: a run may go on with other micro-batches or processes than it was saved with.

        Or for more steps: the whole run is one epoch to Lightning, which is in its middle wherever the run goes on. A
        loop that has come to the end of its epoch would begin the next one for ever, without a batch.
        """
        loop = checkpoint.get("loops", {}).get("fit_loop", {})
        done = int(checkpoint.get("global_step", 0)) * self.trainer.accumulate_grad_batches
        for name, count in (("epoch_loop.batch_progress", done), ("epoch_loop.val_loop.batch_progress", 0)):
            for counts in (loop[name]["total"], loop[name]["current"]) if name in loop else ():
                counts.update(dict.fromkeys(counts, count))
            if name in loop:
                loop[name]["is_last_batch"] = False
        for counts in loop.get("epoch_progress", {}).values():
            counts.update(ready=1, started=1, processed=0, completed=0)
        self.validation_due = bool(checkpoint.get("validation_due"))
        if self.trainer.is_global_zero:
            self._sums = dict(checkpoint.get("unwritten", {}))

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Say in plain containers what the file holds, so that `checkpoint.read_own` can rebuild the network."""
        checkpoint["beit_pretrain"] = {"kind": self.kind, "model": dict(self.model.config), **self.about}
        checkpoint["settings"] = self.settings
        checkpoint["images"] = dict(self.images)
        checkpoint["unwritten"] = self.unwritten()
        checkpoint["rows"] = sum(len(logger.rows) for logger in self.loggers if isinstance(logger, CsvMetrics))
        checkpoint["validation_due"] = self.validation_due
        if self.guard is not None:
            self.guard.write(self.trainer.global_step, self.trainer.is_global_zero)

    def unwritten(self) -> dict[str, Tensor]:
        """Sums since the last flush, over all processes: a checkpoint between two flushes loses none of them.

        From here on the first process holds them for all, as it will after a restart.
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
    """Scalars as Python numbers, in their order, with one transfer from the device."""
    numbers = [0.0 if isinstance(value, Tensor) else float(value) for value in values]
    places: dict[torch.dtype, list[int]] = {}
    for place, value in enumerate(values):
        if isinstance(value, Tensor):
            places.setdefault(value.dtype, []).append(place)
    parts = [torch.stack([cast(Tensor, values[p]) for p in of_kind]).double() for of_kind in places.values()]
    read = torch.cat(parts).tolist() if parts else []
    for place, number in zip([p for of_kind in places.values() for p in of_kind], read, strict=True):
        numbers[place] = number
    return numbers
