"""When a run saves, and what it goes on from.

A checkpoint is taken after everything of its step is done and its metrics are written, and before a validation that is
due then (it says so, and whoever goes on from it validates first). So nothing is repeated and nothing is missed. The
loop waits for a copy in memory; a thread writes it (`engine/background_checkpoint.py`), and whatever ends the run
waits for that.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import WeightAveraging

from beit_pretrain import fileio
from beit_pretrain.engine.background_checkpoint import BackgroundCheckpointIO
from beit_pretrain.engine.metrics import CsvMetrics
from beit_pretrain.engine.preemption import Preempted, PreemptionSignals
from beit_pretrain.engine.step_exchange import Agreed
from beit_pretrain.errors import UserError, first_line
from beit_pretrain.models.checkpoints import files as checkpoint

LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"
# What a run needs to go on.
OF_A_RUN = {"state_dict": dict, "global_step": int, "optimizer_states": list, "loops": dict, "beit_pretrain": dict}
ASK_EVERY = 10  # validation batches between two questions to the other processes whether one of them was told to stop


class CheckpointManager:
    """Saves `last.ckpt` (the one before becomes `previous.ckpt`), and `step-....ckpt` of every M-th step for good.

    Args:
        folder: of the checkpoints.
        every: optimiser steps between two of them.
        minutes: save also when so many have passed since the last one; None = by steps alone.
        keep_every: optimiser steps between two that are kept for good; None = none is.
        signals: whether the run is told to stop.
        val_minutes: validate also when so many have passed since the last validation; None = by steps alone.
    """

    def __init__(
        self,
        folder: Path,
        every: int,
        minutes: float | None = None,
        keep_every: int | None = None,
        signals: PreemptionSignals | None = None,
        val_minutes: float | None = None,
    ):
        self.folder, self.every, self.minutes, self.keep_every = folder, every, minutes, keep_every
        self.val_minutes = val_minutes
        self.signals = signals or PreemptionSignals()
        self.saved_at: int | None = None  # the step of the newest checkpoint; `signals.saved_at`: of that on the disk
        self.validated_at = 0  # the step of the newest validation of this process
        self.prepare_view = False
        self._saved = self._validated = time.monotonic()
        self._writer: BackgroundCheckpointIO | None = None

    def __deepcopy__(self, memo: dict) -> CheckpointManager:
        return self  # a module that is copied (averaged weights) is of the same run

    def begin(self, trainer: Any) -> None:
        """The loop begins: signals wait for the step in hand from here on."""
        self._watch(trainer)  # it also writes `best.ckpt`, perhaps before any `last.ckpt`
        self._saved = self._validated = time.monotonic()
        self.prepare_view = self.signals.looping = True

    def _watch(self, trainer: Any) -> None:
        """Wait for this run's writer from here on, and hear of what it has written."""
        self._writer = trainer.strategy.checkpoint_io
        self._writer.on_written = self._written

    def end(self) -> None:
        """The loop has ended."""
        self.signals.looping = False

    @contextmanager
    def ending(self) -> Iterator[None]:
        """Whatever ends the run waits for the checkpoint that is being written; a second Ctrl-C does not."""
        try:
            yield
        except (KeyboardInterrupt, SystemExit):  # SystemExit is Lightning's answer to a KeyboardInterrupt
            if self._writer is not None:
                self._writer.cancel()
            self.end()
            raise
        except BaseException:
            try:
                self.wait()
            except Exception as error:  # beside what ends the run
                print(f"warning: {first_line(error)}", file=sys.stderr, flush=True)
            self.end()
            raise

    def status(self, step: int) -> Agreed:
        """What this process says of itself during a step: its signal, and what its clock says."""
        now = time.monotonic()
        save = self.minutes is not None and now - self._saved > 60 * self.minutes
        validate = self.val_minutes is not None and now - self._validated > 60 * self.val_minutes
        return Agreed(step, self.signals.told, save, validate)

    def after_step(self, module: Any) -> None:
        """Called when an optimiser step and its metrics are done. Raises Stopped after saving, if told to.

        Raises UserError if the last checkpoint could not be written.
        """
        step, last = module.trainer.global_step, module.trainer.max_steps
        if self._writer is not None:
            self._writer.check()
        agreed = self.status(step) if module.trainer.world_size == 1 else module.exchange.read()
        # What was said before the last checkpoint, or the last validation, is over.
        late = agreed.save and agreed.step > (self.saved_at or 0)
        validate = agreed.validate and agreed.step > self.validated_at and module.has_validation
        module.validation_due = module.validation_due or validate
        for_good = self.keep_every is not None and step % self.keep_every == 0
        if agreed.signum or late or validate or for_good or step % self.every == 0 or step == last:
            self.save(module)
        # One that came while the last write was waited for: it need not cost another step, and another write.
        signum = self.signals.told if module.trainer.world_size == 1 and self.saved_at == step else agreed.signum
        if signum:
            self._stop(module, signum)

    def after_validation_batch(self, module: Any, number: int) -> None:
        """Called after every batch of a validation, which need not be finished: it is repeated. May raise Stopped."""
        if any(isinstance(callback, WeightAveraging) for callback in module.trainer.callbacks):
            return  # the averaged weights stand in the network's place
        if module.trainer.world_size == 1 or (number + 1) % ASK_EVERY == 0:
            self._stop_if_told(module)

    def after_validation(self, module: Any) -> None:
        """Called when a validation and its metrics are done. Raises Stopped after saving, if told to."""
        self.validated_at, self._validated = module.trainer.global_step, time.monotonic()
        if module.trainer.should_stop:  # early: this was the last step
            self.save(module)
        self._stop_if_told(module)

    def _stop_if_told(self, module: Any) -> None:
        if signum := self.agreed_signal(module.trainer):
            self.save(module)
            self._stop(module, signum)

    def _stop(self, module: Any, signum: int) -> None:
        self.settle(module.trainer)
        raise Preempted(signum, module.trainer.global_step)

    def agreed_signal(self, trainer: Any) -> int:
        """The signal that one of the processes was sent, the same on all of them; all must ask. 0 = none."""
        if trainer.world_size == 1:
            return self.signals.told
        told = torch.tensor(self.signals.told, device=trainer.strategy.root_device)
        torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)
        return int(told)

    def save(self, module: Any) -> None:
        """Take a snapshot of the run for `last.ckpt`, unless that is of this step already.

        Raises UserError if the last checkpoint could not be written.
        """
        trainer = module.trainer
        if self.saved_at == trainer.global_step:
            return
        self._watch(trainer)  # a run that has no step to take has not begun
        self.wait()  # the metrics would be flushed behind it anyway
        for logger in trainer.loggers:
            if isinstance(logger, CsvMetrics):
                logger.sync()  # a power cut must not leave a checkpoint without the metrics that lead to it
        trainer.save_checkpoint(self.folder / LAST, weights_only=False)
        self.saved_at = trainer.global_step
        if not trainer.is_global_zero:
            self.signals.saved_at = self.saved_at
        self._saved = time.monotonic()

    def _written(self, path: Path, content: dict[str, Any]) -> None:
        """Called by the thread when a checkpoint is on the disk: keep it for good if its step is one of those."""
        if path != self.folder / LAST:
            return
        step = int(content["global_step"])
        if self.keep_every and step % self.keep_every == 0:
            fileio.link(path, self.folder / f"step-{step:08d}.ckpt")
        self.signals.saved_at = step

    def wait(self) -> None:
        """Wait until the last checkpoint is on the disk. Raises UserError if it could not be written."""
        if self._writer is not None:
            self._writer.wait()

    def settle(self, trainer: Any) -> None:
        """The same on all processes: none ends before, since launchers end all when one has ended."""
        self.wait()
        trainer.strategy.barrier()


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
