"""Resuming a run: refuses a folder whose settings or data are others, restores the folder and the loggers."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from lightning import Trainer

from beit_pretrain.data.corrupt_images import truncate_after
from beit_pretrain.engine.checkpointing import LAST, newest_good
from beit_pretrain.engine.metrics import CsvMetrics, is_first_process
from beit_pretrain.engine.module import TrainedModule
from beit_pretrain.engine.run_folder import (
    CONFIG,
    REPLACED,
    SKIPPED,
    WANDB_ID,
    clear,
    differences,
    read_config,
    resume_config,
    set_aside,
)
from beit_pretrain.engine.settings import FitSettings
from beit_pretrain.engine.task import Task, find_task
from beit_pretrain.errors import UserError
from beit_pretrain.fileio import atomic_write
from beit_pretrain.models.checkpoints import files as checkpoint
from beit_pretrain.settings import merged, renamed, to_dict


class ResumeState(NamedTuple):
    """The state from which a run resumes, read from its checkpoint."""

    path: Path | None = None  # the checkpoint; None = a new run
    step: int = 0  # finished optimiser steps
    validation_due: bool = False  # after that step
    about: dict = {}  # the checkpoint's metadata
    rows: int = 0  # rows of metrics.csv written by then
    images: dict[str, str] = {}  # split -> digest of the data that it was trained on


def find_resume(cfg: FitSettings, folder: Path) -> ResumeState:
    """Find the newest readable checkpoint of the run's folder and check that the settings match.

    Raises UserError if the folder holds a run with other settings, or only unreadable checkpoints.
    """
    begun = any(folder.glob("*.ckpt"))
    # Before the first checkpoint, other ranks might read a config.yaml that rank 0 has just written. They skip this:
    # `RankConsistencyCheck` compares them with rank 0.
    if cfg.resume == "never" or not (begun or is_first_process()):
        return ResumeState()
    old, lost = settings_of_folder(Path(cfg.run_dir), begun)
    if old is not None:
        same_settings(old, cfg)
    newest, content, problems = newest_good(folder)
    warn(f"{problem}; resuming from {newest}" for problem in problems)
    if newest is None:
        return ResumeState()
    if old is None:
        saved = content.get("settings")
        warn([f"{lost}; {newest} has {'them' if saved else 'none either, so they are not compared'}"])
        same_settings(renamed(saved or to_dict(cfg)), cfg)
    return ResumeState(
        newest,
        step=int(content.get("global_step", 0)),
        validation_due=bool(content.get("validation_due")),
        about=content.get("beit_pretrain", {}),
        rows=int(content.get("rows", 0)),
        images=content.get("images", {}),
    )


def settings_of_folder(run_dir: Path, begun: bool) -> tuple[dict | None, str]:
    """(settings from the run's config.yaml or None, reason for None).

    Raises UserError for an unreadable config.yaml without checkpoints (`begun` is false).
    """
    if not (run_dir / CONFIG).is_file():
        return None, f"{run_dir} has no {CONFIG} with its settings"
    try:
        return read_config(run_dir / CONFIG), ""
    except UserError as error:
        if not begun:
            raise UserError(f"{error}; resume=never starts over") from None
        return None, str(error)


def same_settings(old: dict, cfg: FitSettings) -> None:
    """Raise UserError if the run in the folder has other settings than `cfg`."""
    different = differences(resume_config(old, type(cfg)), resume_config(to_dict(cfg), type(cfg)))
    if different:
        raise UserError(
            f"{cfg.run_dir} holds a run with other settings ({'; '.join(different[:3])}"
            f"{'; ...' if len(different) > 3 else ''}); choose another name=, or resume=never to start over"
        )


def warn(warnings: Iterable[str]) -> None:
    """Print warnings to stderr, on rank 0 only."""
    for warning in warnings if is_first_process() else ():
        print(f"warning: {warning}", file=sys.stderr, flush=True)


def write_config(cfg: FitSettings) -> None:
    text = yaml.safe_dump(to_dict(cfg), sort_keys=False, allow_unicode=True)
    atomic_write(Path(cfg.run_dir) / CONFIG, text)  # other processes may read it meanwhile


def restore_config(cfg: FitSettings) -> None:
    """Rewrite the run's config.yaml if it is missing or damaged."""
    try:
        read_config(Path(cfg.run_dir) / CONFIG)
    except UserError:
        write_config(cfg)


def open_folder(cfg: FitSettings, trainer: Trainer, module: TrainedModule, start: ResumeState) -> None:
    """Restore the run's folder to its state at `start`, write config.yaml and attach the loggers."""
    run_dir = Path(cfg.run_dir)
    module.settings = resume_config(to_dict(cfg), type(cfg))
    if is_first_process():  # the trainer does not know its rank before it has launched its processes
        if start.path:
            set_aside(start.path)
            for name in (REPLACED, SKIPPED):
                truncate_after(run_dir / name, start.step)
        elif find_resume(cfg, run_dir / "checkpoints").path:  # the first check ran before the folder existed
            raise UserError(f"another process has trained in {run_dir} meanwhile; rerun the same command to resume")
        else:
            clear(run_dir, another=cfg.resume == "never")
        write_config(cfg)
    metrics = CsvMetrics(run_dir / "metrics.csv")
    if start.path:
        metrics.truncate_after(start.step, start.validation_due)
        lost = start.rows - len(metrics.rows)
        if lost > 0:
            warn([f"{metrics.path} lacks {lost} of the {start.rows} rows that were written up to step {start.step}"])
    trainer.loggers = [metrics]
    if cfg.logger.wandb:
        from beit_pretrain.engine.wandb_logger import WeightsAndBiases, same_id

        run_id = start.about.get("wandb_id") or same_id(run_dir / WANDB_ID, is_first_process())
        module.about["wandb_id"] = run_id
        wandb = WeightsAndBiases(cfg, run_id)
        trainer.loggers.append(wandb)
        wandb.begin(metrics.rows)
    if cfg.logger.tensorboard:
        from beit_pretrain.engine.tensorboard_logger import TensorBoard

        tensorboard = TensorBoard(cfg, start.step, start.validation_due)
        trainer.loggers.append(tensorboard)
        tensorboard.begin(metrics.rows)


def load_run(run: str | Path, overrides: dict[str, Any] | None = None) -> tuple[FitSettings, Task]:
    """Load a finished (or running) run: its config, and its task with the weights of the last checkpoint.

    Raises UserError if the folder is not a run's folder or the checkpoint does not fit.
    """
    run = Path(run)
    if not (run / CONFIG).is_file():
        raise UserError(f"{run} is not the folder of a run (it has no {CONFIG})")
    content = read_config(run / CONFIG)
    kind = find_task(content["task"])
    for group in (overrides or {}).keys() - kind.settings.model_fields.keys():
        raise UserError(f"{run} is a run of task {content['task']}, which has no settings {group}.*")
    cfg = kind.settings.validated(merged(content, overrides or {}))
    last = run / "checkpoints" / LAST
    task = kind(kind.resumed(cfg, last))
    _, state, about = checkpoint.read_own(last, task.module.kind)
    same_backbone(task.module, about, last)
    checkpoint.load_exactly(task.module.model, state, last)
    return cfg, task


def same_backbone(module: TrainedModule, about: dict, last: Path) -> None:
    """Raise UserError if the probes in a checkpoint were trained on another backbone than the current one."""
    if about.get("backbone") != module.about.get("backbone"):
        raise UserError(f"{last} was trained on another backbone than {module.about.get('init_from')} holds now")


def check_same_data(module: TrainedModule, start: ResumeState) -> None:
    """Raise UserError if the data, or the probes' backbone, changed since the checkpoint."""
    if start.path:
        same_backbone(module, start.about, start.path)
    images = module.images  # digests: the same shards may have moved
    for split in sorted({*images, *start.images}) if start.images else ():
        was, now = start.images.get(split, ""), images.get(split, "")
        order, current = ("stream" if digest.startswith("stream") else "position" for digest in (was, now))
        if was and now and order != current:  # data.order=auto may choose anew
            raise UserError(
                f"{start.path} was trained with data.order={order}, and data.{split} is now read with {current}; add "
                f"data.order={order} to resume it, or resume=never to start over"
            )
        if was != now:
            raise UserError(
                f"{start.path} was trained with other images than data.{split} holds now; give it the same shards "
                "(they may lie elsewhere), or choose another name=, or resume=never to start over"
            )
