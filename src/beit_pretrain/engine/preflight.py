"""Preflight checks and the summary that is printed before a run starts."""

from __future__ import annotations

import math
import re
from contextlib import suppress
from pathlib import Path

import torch
from lightning import Trainer
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.callbacks import WeightAveraging

from beit_pretrain.data.dataset import BatchSchedule
from beit_pretrain.engine.checkpointing import check_space
from beit_pretrain.engine.optim import configure
from beit_pretrain.engine.settings import FitSettings
from beit_pretrain.engine.task import Task, find_task, task_names
from beit_pretrain.engine.tensorboard_logger import check_installed
from beit_pretrain.errors import UserError
from beit_pretrain.fileio import size

# ImageNet's photos with a shorter side of 288 pixels, for views of 224: 43 kB (data/README.md).
SHRUNK_SIDE, SHRUNK_BYTES = 288, 43_000
PAYS = 2  # times fewer bytes
MUCH = 1e9  # bytes of shards that a run fetches before it can begin


def preflight(cfg: FitSettings, task: Task, trainer: Trainer, steps: int) -> list[str]:
    """Check data, tokenizer, disk, memory and precision before the run's folder is changed; one line per check.

    Raises UserError for problems that would stop the run later.
    """
    on_gpu = isinstance(trainer.accelerator, CUDAAccelerator)
    if cfg.logger.tensorboard:
        check_installed()
    given = f"global_batch_size={cfg.global_batch_size} on {trainer.world_size} processes, batch_size={cfg.batch_size}"
    task.check_micro_batch(images_at_once(cfg, trainer), trainer.world_size, on_gpu, given)
    task.data.train_dataset(BatchSchedule(cfg.global_batch_size)).sample(0)
    if "val" in task.data.readers:
        task.data.eval_dataset("val").sample(0)
    configure(task.module.model, task.module.optim, total_steps=1)
    lines = [f"  data: a sample of {' and '.join(task.data.readers)} decodes"]
    lines += task.preflight()
    space = check_space(
        cfg.folder / "checkpoints",
        sum(p.numel() for p in task.module.model.parameters()),
        states=numbers_kept(task),
        best=bool(trainer.checkpoint_callbacks),
        kept=steps // cfg.keep_every if cfg.keep_every else 0,
        cleared=cfg.resume == "never",
    )
    lines.append(f"  disk: {space}")
    lines.append(f"  memory: {memory(task, on_gpu)}")
    if "bf16" in str(trainer.precision) and on_gpu and not torch.cuda.is_bf16_supported():
        raise UserError(f"trainer.precision={trainer.precision}: this GPU has no bf16; take 16-mixed or 32-true")
    lines.append(f"  precision: {trainer.precision} on {type(trainer.accelerator).__name__}")
    return lines


def sources(task: Task) -> list[str]:
    """What was found in each source of images, and where shards would pay."""
    lines = []
    for split, reader in task.data.readers.items():
        lines += [f"  data.{split}: {text}" for text in reader.descriptions()]
        for folder in reader.in_place:
            side, each = task.cfg.image_size, folder.total_bytes / sum(shard.samples for shard in folder.shards)
            if each > max(SHRUNK_BYTES, PAYS * shrunk_bytes(side)):
                make = f"shards make src={folder} out=FOLDER resize={round(side * SHRUNK_SIDE / 224)}"
                lines.append(
                    f"  note: its images have {each / 1e3:,.0f} kB on average; of shards made by {make}, "
                    f"{each / shrunk_bytes(side):.0f} times fewer bytes would be read"
                )
    shards, size_of_all = task.data.read_at_once(0, range(1), 1)
    if size_of_all > MUCH:
        at_once = f"{shards:,} shards of {size(size_of_all)} are read from at once, by all processes together"
        lines.append(f"  note: {at_once}; fewer data.shuffle_streams need less")
    if shared := shared_images(task):
        lines.append(
            f"  warning: data.val reads {shared:,} images that data.train reads too; give other images, "
            "or hold some out: shards make val=0.1"
        )
    return lines


def shared_images(task: Task) -> int:
    """Held-out images in files that are training data too, or in the same list of images; of a stream 0."""
    known = {shard.sha256 for shard in task.data.readers["train"].shards}
    held_out = task.data.readers["val"].shards if "val" in task.data.readers else []
    return sum(shard.samples for shard in held_out if shard.sha256 in known)


def shrunk_bytes(image_size: int) -> float:
    """Usual bytes of a photo that `shards make resize=` shrank for a view of `image_size` pixels."""
    return SHRUNK_BYTES * (image_size / 224) ** 2


def images_at_once(cfg: FitSettings, trainer: Trainer) -> int:
    """Images per micro-batch: `batch_size`, or the process's share of the global batch if that is smaller."""
    return cfg.global_batch_size // trainer.world_size // trainer.accumulate_grad_batches


def numbers_kept(task: Task) -> int:
    """Float32 values per parameter in a checkpoint: weight, AdamW's two moments and, if used, an average."""
    return 3 + any(isinstance(callback, WeightAveraging) for callback in task.callbacks)


def memory(task: Task, pinned: bool) -> str:
    """A line on the host memory for the checkpoint snapshot.

    `pinned`: whether it is pinned memory, whose size torch rounds up to a power of two per tensor.
    """
    sizes = (4 * p.numel() for p in task.module.model.parameters())
    needed = numbers_kept(task) * sum(1 << (size - 1).bit_length() if pinned else size for size in sizes)
    line = f"a checkpoint is copied to {size(needed)} of the first process's memory before it is written"
    with suppress(OSError):  # not on Linux
        available = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
        if available and needed > 1024 * int(available[1]):
            line += f" (warning: {size(1024 * int(available[1]))} are available)"
    return line


def run_summary(cfg: FitSettings, task: Task, steps: int, trainer: Trainer) -> str:
    """The lines printed before a run starts: parameters, data, steps, optimiser, folder, hints."""
    parameters = sum(p.numel() for p in task.module.model.parameters())
    settings = task.module.optim
    accumulate, share = trainer.accumulate_grad_batches, images_at_once(cfg, trainer)
    samples = task.data.samples
    images = "a stream of training images" if samples is None else f"{samples:,} training images"
    epochs = "" if samples is None else f"{steps * cfg.global_batch_size / samples:.4g} epochs, "
    return "\n".join(
        (
            f"{cfg.task} {cfg.name}: {parameters:,} parameters, {images}",
            f"  {steps:,} steps of {cfg.global_batch_size} ({trainer.world_size} processes x {share} images x "
            f"{accumulate}), {epochs}precision {trainer.precision}",
            f"  learning rate {settings.lr:g} -> {settings.min_lr:g}, warm-up {settings.warmup_steps:,} steps, "
            f"weight decay {settings.weight_decay:g}, clip {settings.clip}, layer decay {settings.layer_decay}",
            *([f"  from {task.origin}"] if task.origin else []),
            f"  folder {cfg.run_dir}",
            *lr_hint(cfg),
            *(["  note: the run is shorter than its warm-up"] if settings.warmup_steps >= steps else []),
        )
    )


def lr_hint(cfg: FitSettings) -> list[str]:
    """A hint on the learning rate if the global batch size differs from the recipe's; else an empty list."""
    recipe = cfg.recipe
    if recipe is None or cfg.global_batch_size == recipe.global_batch_size:
        return []
    ratio = cfg.global_batch_size / recipe.global_batch_size
    if math.isclose(cfg.optim.lr, recipe.lr * ratio, rel_tol=0.01):
        return []
    return [
        f"  note: the recipe's global batch is {recipe.global_batch_size} (learning rate {recipe.lr:g}), this one is "
        f"{cfg.global_batch_size}; suggested: optim.lr={recipe.lr * ratio:.3g} (linear rule; square root: "
        f"{recipe.lr * math.sqrt(ratio):.3g})"
    ]


def fit_for_fsdp(cfg: FitSettings, task: Task, world: int) -> None:
    """Raise UserError for tasks, settings and data that need the whole network on one process (FSDP shards it)."""
    if not task.fsdp:
        able = [name for name in task_names() if find_task(name).fsdp]
        raise UserError(f"trainer.strategy=fsdp is for {' and '.join(able)}, not for {cfg.task}")
    if getattr(cfg, "ema", None) is not None:
        raise UserError("trainer.strategy=fsdp and ema exclude each other: set ema=null")
    data = task.data
    if "val" in data.readers:
        samples = data.readers["val"].samples
        images = min(data.settings.val_images or samples, samples)
        if images < world:
            raise UserError(f"trainer.strategy=fsdp: {images} held-out images are fewer than {world} processes")
