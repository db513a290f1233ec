"""When a run saves, and what it does when it is told to stop.

A checkpoint is taken after everything of its step is done: metrics are written, and a validation that is due has run.
So a run that goes on from it repeats nothing and misses nothing. A signal ends the run after the step in hand.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
import zipfile
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from beit_pretrain.checkpoints import files as checkpoint
from beit_pretrain.errors import UserError

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
PREEMPTED = 75  # exit code after SIGTERM or SIGUSR1: "temporary failure, try again" (sysexits.h)
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
AGREE_EVERY = 10  # steps between two questions to the other processes whether one of them was told to stop


class Stopped(Exception):
    """The run was told to stop, and has saved. `signum`: by which signal."""

    def __init__(self, signum: int, step: int):
        super().__init__(f"stopped by {signal.Signals(signum).name} after step {step}")
        self.signum, self.step = signum, step


class Keeper:
    """Saves `last.ckpt` (the one before becomes `previous.ckpt`), and `step-....ckpt` of every M-th step for good.

    Args:
        folder: of the checkpoints.
        every: optimiser steps between two of them.
        minutes: save also when so many have passed since the last one; None = by steps alone.
        keep_every: optimiser steps between two that are kept for good; None = none is.
    """

    def __init__(self, folder: Path, every: int, minutes: float | None = None, keep_every: int | None = None):
        self.folder, self.every, self.minutes, self.keep_every = folder, every, minutes, keep_every
        self.saved_at: int | None = None  # the step of the newest checkpoint of this process
        self._clock = time.monotonic()
        self._postponed = False
        self._signum = 0
        self._before: dict[int, Any] = {}

    def begin(self) -> None:
        """Take over the signals (Lightning's own handlers end with exit code 0, and in the middle of a step)."""
        self._clock = time.monotonic()
        for signum in SIGNALS:
            with suppress(ValueError):  # not in the main thread: whoever runs us there handles signals
                self._before[signum] = signal.signal(signum, self._told)

    def end(self) -> None:
        """Give the signals back."""
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before = {}

    def _told(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and self._signum == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C does not wait
            raise KeyboardInterrupt
        self._signum = self._signum or signum

    def after_step(self, module: Any, validates: bool) -> None:
        """Called when an optimiser step and its metrics are done. Raises Stopped after saving, if told to."""
        step = module.trainer.global_step
        late, signum = self._agreed(module, ask=step % AGREE_EVERY == 0)
        if signum:
            self.save(module)
            raise Stopped(signum, step)
        if step % self.every == 0 or late or (self.keep_every and step % self.keep_every == 0):
            if validates:
                self._postponed = True
            else:
                self.save(module)

    def after_validation(self, module: Any) -> None:
        """Called when a validation and its metrics are done."""
        _, signum = self._agreed(module, ask=True)
        if self._postponed or signum:
            self.save(module)
        if signum:
            raise Stopped(signum, module.trainer.global_step)

    def _agreed(self, module: Any, ask: bool) -> tuple[bool, int]:
        """(whether the minutes are over, the signal if one came), the same on all processes."""
        late = self.minutes is not None and time.monotonic() - self._clock > 60 * self.minutes
        if module.trainer.world_size == 1:
            return late, self._signum
        if not ask:
            return False, 0
        told = torch.tensor([float(late), float(self._signum)], device=module.device)
        torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)
        return bool(told[0]), int(told[1])

    def save(self, module: Any) -> None:
        """Write `last.ckpt`, and keep it for good if its step is one of those."""
        trainer = module.trainer
        self._postponed = False
        if self.saved_at == trainer.global_step:
            return
        trainer.save_checkpoint(self.folder / LAST, weights_only=False)
        self.saved_at, self._clock = trainer.global_step, time.monotonic()
        if self.keep_every and trainer.global_step % self.keep_every == 0 and trainer.is_global_zero:
            checkpoint.link(self.folder / LAST, self.folder / f"step-{trainer.global_step:08d}.ckpt")


def newest_good(folder: Path) -> tuple[Path | None, list[str]]:
    """(the newest checkpoint that can be read, a line for each newer one that cannot).

    Raises UserError if there are checkpoints, but none is good.
    """
    kept = sorted(folder.glob("step-*.ckpt"), reverse=True)
    there = [path for path in (folder / LAST, folder / PREVIOUS, *kept) if path.is_file()]
    problems: list[str] = []
    for path in there:
        try:
            if "state_dict" not in checkpoint.read(path):
                raise UserError(f"{path} is no checkpoint of a run")
            with zipfile.ZipFile(path) as archive:  # torch itself does not look at the checksums
                if broken := archive.testzip():
                    raise UserError(f"{path} is damaged: the checksum of {broken} is another")
            return path, problems
        except UserError as error:
            problems.append(str(error))
    if there:
        raise UserError(f"none of the {len(there)} checkpoints in {folder} can be read ({problems[0]})")
    return None, []


def space_needed(parameters: int) -> int:
    """Bytes for two checkpoints: weights and AdamW's two moments, in float32."""
    return 2 * parameters * 3 * 4


def check_space(folder: Path, parameters: int) -> str:
    """A line about the disk space for checkpoints. Raises UserError if there is too little."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free, needed = shutil.disk_usage(existing).free, space_needed(parameters)
    if free < needed:
        raise UserError(
            f"{folder} has {free / 1e9:.2f} GB free, two checkpoints need {needed / 1e9:.2f} GB; "
            "choose another run_dir="
        )
    return f"{free / 1e9:.0f} GB free in {os.path.relpath(existing)}, two checkpoints need {needed / 1e9:.2f} GB"
