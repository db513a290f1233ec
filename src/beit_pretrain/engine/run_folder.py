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

from beit_pretrain import fileio
from beit_pretrain.engine.checkpointing import BEST, LAST, PREVIOUS
from beit_pretrain.errors import UserError, first_line
from beit_pretrain.settings import Settings, group_of, renamed

CONFIG = "config.yaml"  # of a run: its settings
FINISHED = "finished.json"  # of a run: written when it has done all its steps
REPLACED = "replaced.jsonl"  # of a run: images that could not be decoded
SKIPPED = "skipped.jsonl"  # of a run: steps without a finite gradient
WANDB_ID = ".wandb_id"  # of a run: what W&B calls it
LOCK = ".lock"


def read_config(path: Path) -> dict[str, Any]:
    """The settings in a run's `config.yaml`, under today's names. Raises UserError for anything else."""
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read as the settings of a run: {first_line(error)}") from None
    if not isinstance(content, dict) or "task" not in content:
        raise UserError(f"{path} cannot be read as the settings of a run: it names no task")
    return renamed(content)


def may_change(model: type[Settings], key: str) -> tuple[bool, type[Settings] | None]:
    """(Whether a setting may differ when a run is resumed, the group that it is)."""
    field = next((f for name, f in model.model_fields.items() if key in (name, f.alias)), None)
    if field is None:
        return False, None
    return bool((field.json_schema_extra or {}).get("may_change")), group_of(field.annotation)  # type: ignore[union-attr]


def differences(old: Any, new: Any, model: type[Settings] | None, path: str = "") -> list[str]:
    """Settings that differ, as "key: old -> new", less those that may change."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [f"{path}: {old} -> {new}"]
    found = []
    for key in sorted(old.keys() | new.keys()):
        free, group = may_change(model, key) if model else (False, None)
        if not free:
            found += differences(old.get(key), new.get(key), group, f"{path}.{key}" if path else key)
    return found


def resume_config(settings: dict[str, Any], model: type[Settings] | None) -> dict[str, Any]:
    """The settings less those that may change: what a checkpoint says of its run."""
    result = {}
    for key, value in settings.items():
        free, group = may_change(model, key) if model else (False, None)
        if not free:
            result[key] = resume_config(value, group) if isinstance(value, dict) else value
    return result


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
