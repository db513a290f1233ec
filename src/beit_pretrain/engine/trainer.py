"""Builds Lightning's Trainer for a run: steps, micro-batches, processes, precision."""

from __future__ import annotations

import logging
import warnings

import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from beit_pretrain.engine import distributed as cluster
from beit_pretrain.engine.background_checkpoint import BackgroundCheckpointIO
from beit_pretrain.engine.settings import FitSettings
from beit_pretrain.engine.task import find_task
from beit_pretrain.errors import AllRanksError, first_line
from beit_pretrain.settings import to_dict


def total_steps(cfg: FitSettings, samples: int | None) -> int:
    """Optimiser steps of the run, from `steps` or `epochs`.

    Raises AllRanksError unless exactly one of them is set, and if epochs are of an unknown number of images.
    """
    if (cfg.steps is None) == (cfg.epochs is None):
        raise AllRanksError("set the length of the run by either steps=N or epochs=N")
    if cfg.steps is None and samples is None:
        raise AllRanksError(
            f"epochs={cfg.epochs:g} needs data.samples=N, the images of an epoch, which a stream does not know; or set "
            "steps=N"
        )
    steps = cfg.steps if cfg.steps is not None else int((cfg.epochs or 0) * (samples or 0) / cfg.global_batch_size)
    if steps < 1:
        raise AllRanksError(
            f"the run has {steps} steps: {samples} images make no global batch of {cfg.global_batch_size}"
        )
    return int(steps)


def micro_batches(global_batch_size: int, batch_size: int, world: int) -> int:
    """Micro-batches per process and optimiser step. Raises AllRanksError if the sizes do not divide."""
    share = global_batch_size // world
    if global_batch_size % world or share == 0 or share % min(batch_size, share):
        raise AllRanksError(
            f"global_batch_size={global_batch_size} is not a multiple of batch_size={batch_size} times {world} "
            "processes"
        )
    return share // min(batch_size, share)


def make_trainer(cfg: FitSettings, steps: int, callbacks: list[Callback]) -> Trainer:
    """Lightning's Trainer. It runs the loop; this package handles gradients, batches, metrics and signals itself.

    `steps`: optimiser steps; 0 = validation only.
    Raises AllRanksError if they need a package that is not installed; other wrong values raise Lightning's errors.
    """
    compression = cfg.gradient_compression if steps else None  # validation has no gradients
    settings = cluster.resolve_trainer_args(to_dict(cfg.trainer), cfg.timeout_minutes, compression)
    settings["plugins"].append(BackgroundCheckpointIO())
    if settings["precision"] == "auto":
        gpu = wanted_gpu(settings["accelerator"]) and torch.cuda.is_bf16_supported()
        settings["precision"] = "bf16-mixed" if gpu else "32-true"
    # torch has no synchronised batch norm on CPUs.
    settings["sync_batchnorm"] = find_task(cfg.task).sync_batchnorm and wanted_gpu(settings["accelerator"])
    try:
        trainer = Trainer(
            **settings,
            max_steps=steps,
            logger=False,
            callbacks=callbacks,
            # True without a ModelCheckpoint in `callbacks` makes Lightning add one, which saves at the end.
            enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
            default_root_dir=cfg.run_dir,
            use_distributed_sampler=False,  # the data module assigns batches to processes by position
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            enable_model_summary=False,
            log_every_n_steps=1,  # avoids a warning; `log_every` sets when metrics are written
        )
    except ImportError as error:  # a precision, strategy or accelerator of a package that is not installed
        chosen = ", ".join(
            f"trainer.{key}={getattr(cfg.trainer, key)}" for key in ("precision", "strategy", "accelerator")
        )
        raise AllRanksError(f"{chosen}: {first_line(error)}") from error
    # Lightning's signal handler would exit with code 0 or, with several processes, block while it waits for the others.
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    # Without it, Lightning's broadcast of SIGTERM, which blocks before every micro-batch, is not needed either.
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
    if steps:  # for validation the global batch size need not be divisible by the number of processes
        accumulate = micro_batches(cfg.global_batch_size, cfg.batch_size, trainer.world_size)
        trainer.accumulate_grad_batches = accumulate
        trainer.val_check_interval = min(cfg.val_every, steps) * accumulate
    return trainer


def wanted_gpu(accelerator: str) -> bool:
    """Whether a run with this accelerator uses a CUDA GPU."""
    return accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()


def silence_warnings() -> None:
    """Silence Lightning's tips, and warnings about intended behaviour."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (
        "LeafSpec",
        "does not have many workers",
        "Checkpoint directory .* exists",
        "dataloader is not resumable",
        "Total length of",
        "Your `IterableDataset` has `__len__` defined",
        "You defined a `validation_step` but have no `val_dataloader`",
    ):
        warnings.filterwarnings("ignore", f".*{message}")
