"""A run's folder: what it says of the run, whether its settings are those of another call, and whose it is just now."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from beit_pretrain import fileio
from beit_pretrain.engine.checkpointing import BEST, LAST, PREVIOUS
from beit_pretrain.errors import UserError, first_line

CONFIG = "config.yaml"  # of a run: its settings
FINISHED = "finished.json"  # of a run: written when it has done all its steps
REPLACED = "replaced.jsonl"  # of a run: images that could not be decoded
SKIPPED = "skipped.jsonl"  # of a run: steps without a finite gradient
WANDB_ID = ".wandb_id"  # of a run: what W&B calls it
LOCK = ".lock"

# What may differ when a run is continued: how it is executed and watched, not what it computes.
FREE_TO_CHANGE = (
    *(
        "activation_checkpointing",
        "compile",
        "attention",
        "device_prefetch",
        "deterministic",
        "profile",
        "resume",
        "preflight",
    ),
    *("trainer", "logger", "batch_size", "threads", "run_dir", "timeout_minutes", "num_visualizations", "knn", "test"),
    *("max_nonfinite_steps", "log_every", "val_every", "val_minutes", "save_every", "save_minutes", "keep_every"),
    *("gradient_compression", "optimize_ddp"),
    *("data.num_workers", "data.val_batch", "data.cache_dir", "data.cache_gb", "data.retries", "data.timeout"),
    *(
        "data.max_corrupt_fraction",
        "data.train",
        "data.val",
    ),  # what lies there is compared, wherever it lies (`resume.goes_on`)
)


def read_config(path: Path) -> DictConfig:
    """The settings of a run, as its `config.yaml` says them. Raises UserError for anything else."""
    try:
        said = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (yaml.YAMLError, ValueError, OmegaConfBaseException, OSError) as error:
        raise UserError(f"{path} cannot be read as the settings of a run: {first_line(error)}") from None
    if not isinstance(said, dict) or "task" not in said:
        raise UserError(f"{path} cannot be read as the settings of a run: it names no task")
    return OmegaConf.create(said)


def differences(old, new, path: str = "") -> list[str]:
    """Settings that differ, as "key: old -> new", less those that are free to change."""
    if path in FREE_TO_CHANGE:
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [d for k in keys for d in differences(old.get(k), new.get(k), f"{path}.{k}" if path else k)]
    return [] if old == new else [f"{path}: {old} -> {new}"]


def resume_config(settings: dict[str, Any], path: str = "") -> dict[str, Any]:
    """The settings less those that are free to change: what a checkpoint says of its run."""
    named = {key: f"{path}.{key}" if path else key for key in settings}
    return {
        key: resume_config(value, named[key]) if isinstance(value, dict) else value
        for key, value in settings.items()
        if named[key] not in FREE_TO_CHANGE
    }


def mark_finished(folder: Path, step: int) -> None:
    """Say in a run's folder that it has done all its steps."""
    fileio.atomic_write(folder / FINISHED, json.dumps({"step": step}) + "\n")


def finished_step(folder: Path) -> int | None:
    """The step after which a run was finished (early stopping may come before the last one); None if it is not."""
    try:
        return int(json.loads((folder / FINISHED).read_bytes())["step"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def clear(folder: Path, another: bool) -> None:
    """Remove what an earlier run left; nothing else is touched, whatever the folder is.

    `another`: the new run is another one to W&B too, and not one that was killed before its first checkpoint.
    """
    ours = [f"checkpoints/{name}" for name in (LAST, PREVIOUS, BEST, "step-*.ckpt", "*.ckpt.damaged", ".*.partial")]
    ours += [FINISHED, "pictures/step-*.png", "metrics.csv", REPLACED, SKIPPED, *([WANDB_ID] if another else [])]
    for pattern in ours:
        for file in folder.glob(pattern):
            file.unlink()


def set_aside(resume: Path) -> None:
    """Make the folder of checkpoints ready for a run that goes on from one of them.

    Newer ones, which are damaged, get another name, since the next one would make them its predecessor. What a kill
    left half-written goes.
    """
    for half in resume.parent.glob(".*.ckpt.partial"):
        half.unlink()
    for name in (LAST, PREVIOUS):
        if resume.name == name:
            break
        damaged = resume.with_name(name)
        if damaged.is_file():
            damaged.replace(damaged.with_name(f"{name}.damaged"))


@contextmanager
def exclusive_lock(folder: Path, first: bool) -> Iterator[None]:
    """Hold a run's folder, so that no second run writes into it. Raises UserError if another process holds it.

    The lock ends with its process, however that ends, and child processes do not hold it. A process that holds it may
    ask again. `first`: this is the process that writes.
    """
    if not first or fileio.is_held(folder / LOCK):
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    refusal = (
        f"another process is training in {folder} ({{holder}}); wait for it, or choose another name=. If it is gone "
        f"with its machine, delete {folder / LOCK}"
    )
    with fileio.exclusive_lock(folder / LOCK, refusal) as file:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
