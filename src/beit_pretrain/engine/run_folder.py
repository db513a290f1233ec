"""A run's folder: its config.yaml, how two configs differ, clean-up, and the lock against a second run."""

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

CONFIG = "config.yaml"  # settings of the run
FINISHED = "finished.json"  # written when all steps are done
REPLACED = "replaced.jsonl"  # images that could not be decoded
SKIPPED = "skipped.jsonl"  # steps with a non-finite gradient
WANDB_ID = ".wandb_id"  # the run's ID at W&B
LOCK = ".lock"


def read_config(path: Path) -> dict[str, Any]:
    """Read the settings from a run's `config.yaml`, with old names replaced. Raises UserError for other content."""
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read as the settings of a run: {first_line(error)}") from None
    if not isinstance(content, dict) or "task" not in content:
        raise UserError(f"{path} cannot be read as the settings of a run: it names no task")
    return renamed(content)


def resume_config(settings: dict[str, Any], model: type[Settings] | None) -> dict[str, Any]:
    """The settings without those that may change on resume; `model`: theirs, None for those of an unknown group."""
    kept: dict[str, Any] = {}
    for key, value in settings.items():
        fields = model.model_fields if model else {}
        field: Any = next((field for name, field in fields.items() if key in (name, field.alias)), None)
        if field is None or not (field.json_schema_extra or {}).get("may_change"):
            group = None if field is None else group_of(field.annotation)
            kept[key] = resume_config(value, group) if isinstance(value, dict) else value
    return kept


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Settings that differ, as "key: old -> new"."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if new in (old, at_home(old)) else [f"{path}: {old} -> {new}"]
    found = []
    for key in sorted(old.keys() | new.keys()):
        found += differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    return found


def at_home(value: Any) -> Any:
    """A path with the home folder in place of `~`, which earlier versions wrote into config.yaml."""
    if isinstance(value, list):
        return [at_home(item) for item in value]
    return fileio.expanded(value) if isinstance(value, str) and value.startswith("~/") else value


def mark_finished(folder: Path, step: int) -> None:
    """Write `finished.json`: the run has done all its steps."""
    fileio.atomic_write(folder / FINISHED, json.dumps({"step": step}) + "\n")


def finished_step(folder: Path) -> int | None:
    """The step after which the run finished (with early stopping not its last one); None if it is not finished."""
    try:
        return int(json.loads((folder / FINISHED).read_bytes())["step"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def clear(folder: Path, another: bool) -> None:
    """Remove the files of an earlier run, and no others.

    `another`: also remove the W&B ID, so that W&B sees a new run. False for a run killed before its first checkpoint.
    """
    ours = [f"checkpoints/{name}" for name in (LAST, PREVIOUS, BEST, "step-*.ckpt", "*.ckpt.damaged", ".*.partial")]
    ours += [FINISHED, "pictures/step-*.png", "metrics.csv", "tensorboard/**/events.out.tfevents.*", REPLACED, SKIPPED]
    ours += [WANDB_ID] if another else []
    for pattern in ours:
        for file in folder.glob(pattern):
            file.unlink()


def set_aside(resume: Path) -> None:
    """Prepare the folder of checkpoints for resuming from `resume`.

    Renames newer, damaged checkpoints, so that the next save does not make them `previous.ckpt`, and removes partly
    written files.
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
    """Lock a run's folder against a second run. Raises UserError if another process holds the lock.

    The lock is released when its process exits, in any way; child processes do not inherit it; it is re-entrant.
    `first`: whether this is rank 0; other ranks take no lock.
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
