"""When a run saves, and what it goes on from.

A checkpoint is taken after everything of its step is done and its metrics are written, and before a validation that is
due then (it says so, and whoever goes on from it validates first). So nothing is repeated and nothing is missed.
"""

from __future__ import annotations

import os
import shutil
import time
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import WeightAveraging

from beit_pretrain.checkpoints import files as checkpoint
from beit_pretrain.errors import UserError
from beit_pretrain.training.metrics import CsvMetrics
from beit_pretrain.training.signals import Signals, Stopped

LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"
# What a run needs to go on.
OF_A_RUN = {"state_dict": dict, "global_step": int, "optimizer_states": list, "loops": dict, "beit_pretrain": dict}
ASK_EVERY = 10  # validation batches between two questions to the other processes whether one of them was told to stop


class Keeper:
    """Saves `last.ckpt` (the one before becomes `previous.ckpt`), and `step-....ckpt` of every M-th step for good.

    Args:
        folder: of the checkpoints.
        every: optimiser steps between two of them.
        minutes: save also when so many have passed since the last one; None = by steps alone.
        keep_every: optimiser steps between two that are kept for good; None = none is.
        signals: whether the run is told to stop.
    """

    def __init__(
        self,
        folder: Path,
        every: int,
        minutes: float | None = None,
        keep_every: int | None = None,
        signals: Signals | None = None,
    ):
        self.folder, self.every, self.minutes, self.keep_every = folder, every, minutes, keep_every
        self.signals = signals or Signals()
        self.saved_at: int | None = None  # the step of the newest checkpoint of this process
        self._clock = time.monotonic()

    def begin(self) -> None:
        """The loop begins: signals wait for the step in hand from here on."""
        self._clock = time.monotonic()
        self.signals.looping = True

    def end(self) -> None:
        """The loop has ended."""
        self.signals.looping = False

    def after_step(self, module: Any) -> None:
        """Called when an optimiser step and its metrics are done. Raises Stopped after saving, if told to."""
        step = module.trainer.global_step
        late, signum = self._agreed(module)
        if signum or step % self.every == 0 or late or (self.keep_every and step % self.keep_every == 0):
            self.save(module)
        if signum:
            raise Stopped(signum, step)

    def after_validation_batch(self, module: Any, number: int) -> None:
        """Called after every batch of a validation, which need not be finished: it is repeated. May raise Stopped."""
        if any(isinstance(callback, WeightAveraging) for callback in module.trainer.callbacks):
            return  # the averaged weights stand in the network's place
        if module.trainer.world_size == 1 or (number + 1) % ASK_EVERY == 0:
            self._stop_if_told(module)

    def after_validation(self, module: Any) -> None:
        """Called when a validation and its metrics are done. Raises Stopped after saving, if told to."""
        self._stop_if_told(module)

    def _stop_if_told(self, module: Any) -> None:
        _, signum = self._agreed(module)
        if signum:
            self.save(module)
            raise Stopped(signum, module.trainer.global_step)

    def _agreed(self, module: Any) -> tuple[bool, int]:
        """(whether the minutes are over, the signal if one came), the same on all processes."""
        late = self.minutes is not None and time.monotonic() - self._clock > 60 * self.minutes
        if module.trainer.world_size == 1:
            return late, self.signals.told
        told = torch.tensor([float(late), float(self.signals.told)], device=module.device)
        torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)
        return bool(told[0]), int(told[1])

    def save(self, module: Any) -> None:
        """Write `last.ckpt`, and keep it for good if its step is one of those."""
        trainer = module.trainer
        if self.saved_at == trainer.global_step:
            return
        for logger in trainer.loggers:
            if isinstance(logger, CsvMetrics):
                logger.sync()  # a power cut must not leave a checkpoint without the metrics that lead to it
        trainer.save_checkpoint(self.folder / LAST, weights_only=False)
        self.saved_at = self.signals.saved_at = trainer.global_step
        self._clock = time.monotonic()
        if self.keep_every and trainer.global_step % self.keep_every == 0 and trainer.is_global_zero:
            checkpoint.link(self.folder / LAST, self.folder / f"step-{trainer.global_step:08d}.ckpt")


def newest_good(folder: Path) -> tuple[Path | None, list[str]]:
    """(the newest checkpoint that can be read, a line for each newer one that cannot).

    Raises UserError if there are checkpoints, but none is good.
    """
    found = (path for path in (*folder.glob("step-*.ckpt"), folder / BEST) if path.is_file())
    others = sorted(found, key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True)
    there = [path for path in (folder / LAST, folder / PREVIOUS) if path.is_file()] + others
    problems: list[str] = []
    for path in there:
        try:
            content = checkpoint.read(path)
            held = {name: content.get(name) for name in OF_A_RUN}
            missing = [n for n, kind in OF_A_RUN.items() if not isinstance(held[n], kind) or held[n] in ([], {})]
            if missing:
                raise UserError(f"{path} is no checkpoint of a run ({', '.join(missing)} missing)")
            with zipfile.ZipFile(path) as archive:  # torch itself does not look at the checksums
                if broken := archive.testzip():
                    raise UserError(f"{path} is damaged: the checksum of {broken} is another")
            return path, problems
        except UserError as error:
            problems.append(str(error))
    if there:
        raise UserError(f"none of the {len(there)} checkpoints in {folder} can be read ({problems[0]})")
    return None, []


def check_space(
    folder: Path, parameters: int, states: int = 3, best: bool = False, kept: int = 0, cleared: bool = False
) -> str:
    """A line about the disk for checkpoints. Raises UserError if it cannot be written or is too small.

    Args:
        folder: of the checkpoints; it need not exist yet.
        parameters: of the network.
        states: float32 numbers a checkpoint has for each: the weights, AdamW's two moments, an average.
        best: whether there is a `best.ckpt`, beside the last one, the one before, and the one that is being written.
        kept: how many are kept for good. A disk too small for these is pointed out and not refused.
        cleared: the run starts over, which removes what an earlier one kept for good.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{existing} is no folder that can be written to; choose another run_dir=")
    one, count = parameters * states * 4, 3 + best
    if not cleared:
        kept = max(0, kept - len(list(folder.glob("step-*.ckpt"))))
    free = shutil.disk_usage(existing).free + room(folder, cleared)
    if free < count * one:
        raise UserError(
            f"{folder} has {size(free)} free, {count} checkpoints need {size(count * one)}; choose another run_dir="
        )
    line = f"{size(free)} free in {os.path.relpath(existing)}, {count} checkpoints need {size(count * one)}"
    if kept:
        line += f", {kept} more to keep {size(kept * one)}"
        line += " (warning: more than there is)" * (free < (count + kept) * one)
    return line


def room(folder: Path, cleared: bool) -> int:
    """Bytes that come free when a run overwrites the checkpoints of an earlier part, or all of them are `cleared`.

    A file may have several names, and one that is kept for good under any of them stays.
    """
    for_good = list(folder.glob("step-*.ckpt"))
    going = [path for name in (LAST, PREVIOUS, BEST) if (path := folder / name).is_file()]
    going, staying = (going + for_good, []) if cleared else (going, for_good)
    sizes = {file.stat().st_ino: file.stat().st_size for file in going}
    for file in staying:
        sizes.pop(file.stat().st_ino, None)
    return sum(sizes.values())


def size(count: int) -> str:
    """Bytes in a unit that leaves something to read."""
    return f"{count / 1e6:.3g} MB" if count < 1e8 else f"{count / 1e9:.2f} GB"
