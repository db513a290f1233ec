"""Counts the images that were replaced, lists them in the run folder, and stops a run that has too many."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import distributed
from tqdm import tqdm

from beit_pretrain.errors import AllRanksError
from beit_pretrain.fileio import atomic_write

WINDOW = 1_000_000  # images after which counting restarts, so that a good start does not hide a bad end


class CorruptImages(Callback):
    """Collects the bad images that batches report (`dataset.ShardDataset`).

    Logs their share as `train/replaced`. Writes one line per bad image to `path`, unless that is None, and one warning
    for all since the last metrics. Stops the run when there are clearly more than `max_corrupt_fraction` allows: four
    standard deviations plus three images more, so that a single bad image at the start does not stop a run.
    """

    def __init__(self, path: Path | None, max_corrupt_fraction: float):
        self.path, self.max_corrupt_fraction = path, max_corrupt_fraction
        self._where = f"; listed in {path}" if path else ""
        self._new: list[dict[str, Any]] = []
        self._last: dict[str, Any] = {}
        self._listed: set[tuple[str, str]] = set()  # held-out images, which every validation reads again
        self._images = self._bad = 0  # since the last metrics, in this process
        self._seen = self._seen_bad = 0  # in this window, over all processes

    def on_train_batch_end(self, trainer: Trainer, pl_module, outputs, batch: dict, batch_idx: int) -> None:
        records, images = batch.get("bad", []), len(batch["position"])
        replaced = len({record["position"] for record in records})  # neighbours may be bad too
        self._images, self._bad = self._images + images, self._bad + replaced
        step = batch_idx // trainer.accumulate_grad_batches + 1  # the optimiser step of this batch
        self._new += [{"step": step, "split": "train", **record} for record in records]
        pl_module.accumulate(images, replaced=replaced / images)
        last_micro_batch = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if last_micro_batch and (step % pl_module.log_every == 0 or step == trainer.max_steps):
            self._report(trainer, pl_module)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module, outputs, batch: dict, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        for record in batch.get("bad", []):
            if (address := (record["shard"], record["key"])) not in self._listed:
                self._listed.add(address)
                self._new.append({"step": trainer.global_step, "split": "val", **record})

    def on_validation_end(self, trainer: Trainer, pl_module) -> None:
        self._write(gathered(self._new, trainer), trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == TrainerFn.FITTING:  # so that a resumed run has listed them
            self._write(gathered(self._new, trainer), trainer)

    def on_exception(self, trainer: Trainer, pl_module, exception: BaseException) -> None:
        self._write(self._new, trainer)  # the other processes may be gone

    def _report(self, trainer: Trainer, pl_module) -> None:
        counts = torch.tensor([self._images, self._bad], dtype=torch.float64, device=pl_module.device)
        images, bad = (int(count) for count in pl_module.sum_over_processes(counts).tolist())
        self._images = self._bad = 0
        self._seen, self._seen_bad = self._seen + images, self._seen_bad + bad
        if bad:
            self._write(gathered(self._new, trainer), trainer)
            if self._seen_bad > allowed(self.max_corrupt_fraction, self._seen):
                last = self._last
                raise AllRanksError(
                    f"{self._seen_bad:,} of {self._seen:,} training images had to be replaced, more than "
                    f"data.max_corrupt_fraction={self.max_corrupt_fraction:g} allows; the last: {last['key']} of "
                    f"{last['shard']} ({last['reason']}){self._where}"
                )
        if self._seen >= WINDOW:
            self._seen = self._seen_bad = 0

    def _write(self, records: list[dict[str, Any]], trainer: Trainer) -> None:
        self._new, self._last = [], records[-1] if records else self._last
        if not records or not trainer.is_global_zero:
            return
        last = self._last
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(record) + "\n" for record in records)
        count = f"{len(records)} image{'s' * (len(records) > 1)} could not be decoded, neighbours stand in"
        said = f"warning: {count} (last: {last['key']} of {last['shard']}: {last['reason']}){self._where}"
        tqdm.write(said, file=sys.stderr)


def allowed(share: float, images: int) -> float:
    """Largest number of bad images among `images` that is still consistent with a true share of `share`."""
    return share * images + 4 * math.sqrt(share * images) + 3 if share else 0


def gathered(records: list[dict[str, Any]], trainer: Trainer) -> list[dict[str, Any]]:
    """The records of all processes, sorted by position. All processes must call it."""
    if trainer.world_size == 1:
        return records
    parts: list[list[dict[str, Any]]] = [[] for _ in range(trainer.world_size)]
    distributed.all_gather_object(parts, records)
    return sorted((record for part in parts for record in part), key=lambda record: record["position"])


def truncate_after(path: Path, step: int) -> None:
    """Remove the list's entries after `step`, where the run resumes, and damaged lines."""
    if not path.is_file():
        return
    kept, damaged = [], 0
    for line in path.read_bytes().split(b"\n")[:-1]:  # a crash can leave an incomplete last line
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + b"\n")
        except (ValueError, LookupError, TypeError):
            damaged += 1
    if damaged:
        which = "a damaged line is" if damaged == 1 else f"{damaged} damaged lines are"
        print(f"warning: {path}: {which} left out from here on", file=sys.stderr, flush=True)
    atomic_write(path, b"".join(kept))
