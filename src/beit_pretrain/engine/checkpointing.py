"""When a run saves a checkpoint, which is the newest one that can be read, and how much room they need.

A checkpoint is taken when its step is complete and the metrics are written, before a validation that is due at that
step. The checkpoint records that validation as due, and a resumed run validates first, so nothing is repeated or
skipped. The training loop waits only for a copy in memory; a thread writes it to disk
(`engine/background_checkpoint.py`), and the run does not exit before the write is complete.
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
from beit_pretrain.engine.preemption import Preempted, PreemptionSignals
from beit_pretrain.engine.settings import FitSettings
from beit_pretrain.engine.step_exchange import Agreed
from beit_pretrain.errors import UserError, first_line
from beit_pretrain.fileio import size
from beit_pretrain.models.checkpoints import files as checkpoint

LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"
# Entries that a checkpoint must have to resume from it.
OF_A_RUN = {"state_dict": dict, "global_step": int, "optimizer_states": list, "loops": dict, "beit_pretrain": dict}
ASK_EVERY = 10  # validation batches between two checks whether any process received a stop signal


class CheckpointManager:
    """Saves `last.ckpt` (its predecessor becomes `previous.ckpt`) and, every `keep_every` steps, `step-NNNNNNNN.ckpt`.

    `folder`: of the checkpoints; `signals`: the stop signals of this process.
    """

    def __init__(self, folder: Path, cfg: FitSettings, signals: PreemptionSignals | None = None):
        self.folder, self.cfg = folder, cfg
        self.signals = signals or PreemptionSignals()
        self.saved_at: int | None = None  # step of the newest snapshot; `signals.saved_at`: newest checkpoint on disk
        self.validated_at = 0  # step of this process's newest validation
        self.begun = False
        self._saved = self._validated = time.monotonic()
        self._writer: BackgroundCheckpointIO | None = None

    def __deepcopy__(self, memo: dict) -> CheckpointManager:
        return self  # copies of the module (averaged weights) belong to the same run

    def begin(self, trainer: Any) -> None:
        """Call at the start of the loop: from here on a signal takes effect after the current step."""
        self._watch(trainer)  # the writer also writes `best.ckpt`, possibly before the first `last.ckpt`
        self._saved = self._validated = time.monotonic()
        self.begun = self.signals.looping = True

    def _watch(self, trainer: Any) -> None:
        """Use this run's writer, and have it call `_written` after each write."""
        self._writer = trainer.strategy.checkpoint_io
        self._writer.on_written = self._written

    def end(self) -> None:
        """Call at the end of the loop: signals take effect at once again."""
        self.signals.looping = False

    @contextmanager
    def ending(self) -> Iterator[None]:
        """Wait for the current checkpoint write before an error or signal ends the run; a second Ctrl-C cancels it."""
        try:
            yield
        except (KeyboardInterrupt, SystemExit):  # Lightning turns KeyboardInterrupt into SystemExit
            if self._writer is not None:
                self._writer.cancel()
            self.end()
            raise
        except BaseException:
            try:
                self.wait()
            except Exception as error:  # the error that ends the run is raised below
                print(f"warning: {first_line(error)}", file=sys.stderr, flush=True)
            self.end()
            raise

    def status(self, step: int) -> Agreed:
        """This process's part of the step exchange: the signal it received, and what is due by its clock."""
        now = time.monotonic()
        save = self.cfg.save_minutes is not None and now - self._saved > 60 * self.cfg.save_minutes
        validate = self.cfg.val_minutes is not None and now - self._validated > 60 * self.cfg.val_minutes
        return Agreed(step, self.signals.told, save, validate)

    def after_step(self, module: Any) -> None:
        """Save if due; call after an optimiser step and its metrics.

        Raises Preempted, after saving, if a process received a signal; UserError if the last write failed.
        """
        step, last = module.trainer.global_step, module.trainer.max_steps
        if self._writer is not None:
            self._writer.check()
        agreed = self.status(step) if module.trainer.world_size == 1 else module.exchange.read()
        # Requests from before the last checkpoint or validation are already served.
        late = agreed.save and agreed.step > (self.saved_at or 0)
        validate = agreed.validate and agreed.step > self.validated_at and module.has_validation
        module.validation_due = module.validation_due or validate
        for_good = self.cfg.keep_every is not None and step % self.cfg.keep_every == 0
        if agreed.signum or late or validate or for_good or step % self.cfg.save_every == 0 or step == last:
            self.save(module)
        # A signal that arrived during the save: this step is saved, so stop now instead of after one more step.
        signum = self.signals.told if module.trainer.world_size == 1 and self.saved_at == step else agreed.signum
        if signum:
            self._stop(module, signum)

    def after_validation_batch(self, module: Any, number: int) -> None:
        """Call after every validation batch. Raises Preempted on a signal; the resumed run repeats the validation."""
        if any(isinstance(callback, WeightAveraging) for callback in module.trainer.callbacks):
            return  # the network holds the averaged weights now, so saving would be wrong
        if module.trainer.world_size == 1 or (number + 1) % ASK_EVERY == 0:
            self._stop_if_told(module)

    def after_validation(self, module: Any) -> None:
        """Call after a validation and its metrics. Raises Preempted, after saving, if a process received a signal."""
        self.validated_at, self._validated = module.trainer.global_step, time.monotonic()
        if module.trainer.should_stop:  # early stopping: this was the last step
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
        """The signal that any process received, equal on all processes; 0 = none. A collective: all must call it."""
        if trainer.world_size == 1:
            return self.signals.told
        signum = torch.tensor(self.signals.told, device=trainer.strategy.root_device)
        torch.distributed.all_reduce(signum, torch.distributed.ReduceOp.MAX)
        return int(signum)

    def save(self, module: Any) -> None:
        """Take a snapshot for `last.ckpt`, unless this step is already saved.

        Raises UserError if the last write failed.
        """
        trainer = module.trainer
        if self.saved_at == trainer.global_step:
            return
        self._watch(trainer)  # `begin` is not called if no steps are left
        self.wait()  # syncing the metrics would wait for the disk anyway
        for logger in trainer.loggers:
            if hasattr(logger, "sync"):
                logger.sync()  # a power cut must not leave a checkpoint without its earlier metrics
        trainer.save_checkpoint(self.folder / LAST, weights_only=False)
        self.saved_at = trainer.global_step
        if not trainer.is_global_zero:
            self.signals.saved_at = self.saved_at
        self._saved = time.monotonic()

    def _written(self, path: Path, content: dict[str, Any]) -> None:
        """Called by the writer thread after a write: link `last.ckpt` as `step-NNNNNNNN.ckpt` if it must be kept."""
        if path != self.folder / LAST:
            return
        step = int(content["global_step"])
        if self.cfg.keep_every and step % self.cfg.keep_every == 0:
            fileio.link(path, self.folder / f"step-{step:08d}.ckpt")
        self.signals.saved_at = step

    def wait(self) -> None:
        """Wait until the last checkpoint is on disk. Raises UserError if the write failed."""
        if self._writer is not None:
            self._writer.wait()

    def settle(self, trainer: Any) -> None:
        """Wait on all processes: launchers end all processes as soon as one exits."""
        self.wait()
        trainer.strategy.barrier()


def newest_good(folder: Path) -> tuple[Path | None, dict[str, Any], list[str]]:
    """Find the checkpoint to resume from.

    Returns the newest readable checkpoint (None without checkpoints), its content, and one line per newer, unreadable
    one. Raises UserError if there are checkpoints but none is readable.
    """
    kept = (path for path in (*folder.glob("step-*.ckpt"), folder / BEST) if path.is_file())
    others = sorted(kept, key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True)
    candidates = [path for path in (folder / LAST, folder / PREVIOUS) if path.is_file()] + others
    problems: list[str] = []
    for path in candidates:
        try:
            content = checkpoint.read(path)
            held = {name: content.get(name) for name in OF_A_RUN}
            missing = [n for n, kind in OF_A_RUN.items() if not isinstance(held[n], kind) or held[n] in ([], {})]
            if missing:
                raise UserError(f"{path} is not the checkpoint of a run ({', '.join(missing)} missing)")
            with zipfile.ZipFile(path) as archive:  # torch does not verify the checksums
                if broken := archive.testzip():
                    raise UserError(f"{path} is damaged: the checksum of {broken} does not match")
            return path, content, problems
        except UserError as error:
            problems.append(str(error))
    if candidates:
        raise UserError(f"none of the {len(candidates)} checkpoints in {folder} can be read ({problems[0]})")
    return None, {}, []


def check_space(
    folder: Path, parameters: int, states: int = 3, best: bool = False, kept: int = 0, cleared: bool = False
) -> str:
    """Check the disk space for checkpoints; returns one line for the user.

    Raises UserError if the folder is not writable or the disk is too small.

    Args:
        folder: of the checkpoints; need not exist yet.
        parameters: of the network.
        states: float32 values per parameter in a checkpoint: weight, AdamW's two moments, average.
        best: whether the run writes `best.ckpt`, besides the last, the previous and the currently written checkpoint.
        kept: number of permanently kept checkpoints. Too little space for these is only a warning.
        cleared: whether the run starts over, which removes the checkpoints of an earlier run.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{existing} is not a writable folder; choose another run_dir=")
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
        line += " (warning: more than is free)" * (free < (count + kept) * one)
    return line


def room(folder: Path, cleared: bool) -> int:
    """Bytes freed when a run overwrites old checkpoints, or removes all of them (`cleared`).

    A file with several hard links counts once, and not at all if one of its names is kept.
    """
    for_good = list(folder.glob("step-*.ckpt"))
    going = [path for name in (LAST, PREVIOUS, BEST) if (path := folder / name).is_file()]
    going, staying = (going + for_good, []) if cleared else (going, for_good)
    sizes = {file.stat().st_ino: file.stat().st_size for file in going}
    for file in staying:
        sizes.pop(file.stat().st_ino, None)
    return sum(sizes.values())
