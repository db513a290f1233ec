"""Health checks of a run: skips steps with a non-finite gradient, warns of loss spikes and codebook collapse."""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections import deque
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from beit_pretrain.errors import AllRanksError

MOST_KEPT = 1024  # steps whose flag has not been read, before all are read early
COLLAPSED = 0.01  # fraction of the vocabulary; a smaller perplexity gives a warning


class NonFiniteGuard:
    """Skips and counts the updates of steps whose gradient is not finite, without waiting for the device.

    With `found_inf` set, a fused optimiser leaves weights, moments and step counts unchanged. The learning-rate
    schedule still advances.

    Args:
        path: file for the list of skipped steps and their positions; None = warnings only.
        max_nonfinite_steps: number of skipped steps in a row that stops the run.
        global_batch_size: positions per step.
        sharded: FSDP, whose sharded tensors do not work with the flag `found_inf`. The guard then waits for the device
            and removes the gradients, and the optimiser skips parameters without one.
    """

    def __init__(self, path: Path | None, max_nonfinite_steps: int, global_batch_size: int, sharded: bool = False):
        self.path, self.max_nonfinite_steps = path, max_nonfinite_steps
        self.global_batch_size, self.sharded = global_batch_size, sharded
        self._unread: list[tuple[int, Tensor]] = []  # steps, and whether they were skipped
        self._skipped: list[int] = []  # steps that `write` has not listed yet
        self._row = self._longest = 0  # skipped steps in a row: now; at most since the last report
        self._losses: deque[float] = deque(maxlen=20)
        self._collapsed = False

    def check(self, norm: Tensor, optimizer: Any, step: int) -> Tensor:
        """Make the optimiser skip this step if the gradient norm is not finite. Returns 1 if so, else 0 (a tensor)."""
        bad = (~norm.isfinite()).long()
        self._unread.append((step, bad))
        if len(self._unread) >= MOST_KEPT:
            self._read()
        if not self.sharded:
            optimizer.found_inf = bad.float()
        elif bad:
            optimizer.zero_grad(set_to_none=True)
        return bad

    def _read(self) -> None:
        """Read the flags of the steps since the last read, with one device sync."""
        flags = torch.stack([bad for _, bad in self._unread]).tolist() if self._unread else []
        for (step, _), bad in zip(self._unread, flags, strict=True):
            self._row = self._row + 1 if bad else 0
            self._longest = max(self._longest, self._row)
            self._skipped += [step] if bad else []
        self._unread = []

    def report(self, metrics: dict[str, float], step: int, vocab_size: int | None, first: bool) -> None:
        """Write and print the events since the last report. Raises AllRanksError after too many skipped steps in a row.

        `first`: whether this is rank 0, which writes.
        """
        self.write(step, first)
        longest, self._longest = self._longest, self._row
        if longest >= self.max_nonfinite_steps:
            raise AllRanksError(
                f"{longest} steps in a row had no finite gradient and were skipped, up to step {step}"
                f"{f'; their positions are in {self.path}' if self.path else ''}; the weights and the last checkpoint "
                "are those from before. A lower optim.lr, or trainer.precision=32-true, may help"
            )
        if first:
            for line in self.warnings(metrics, vocab_size):
                tqdm.write(f"warning: step {step}: {line}", file=sys.stderr)

    def warnings(self, metrics: dict[str, float], vocab_size: int | None) -> list[str]:
        """Warnings, as lines: the loss is far above its recent values; the codebook is hardly used."""
        lines = []
        loss, use = metrics.get("train/loss", math.nan), metrics.get("train/codebook_perplexity", math.nan)
        if len(self._losses) >= 5:
            usual, spread = statistics.fmean(self._losses), statistics.pstdev(self._losses)
            if loss > max(self._losses) + max(4 * spread, 0.1 * abs(usual)):
                lines.append(f"the loss jumps to {loss:.4g}, from about {usual:.4g}")
        if math.isfinite(loss):
            self._losses.append(loss)
        collapsed = bool(vocab_size) and use < max(2.0, COLLAPSED * (vocab_size or 0))
        if collapsed and not self._collapsed:
            lines.append(f"the codebook collapses: {use:.3g} of {vocab_size} tokens are in use (perplexity)")
        self._collapsed = collapsed  # warn once, until it recovers
        return lines

    def write(self, now: int, first: bool) -> None:
        """List the steps skipped since the last call; called before every checkpoint too, so that a kill loses none."""
        self._read()
        steps, self._skipped = self._skipped, []  # counted from 0
        if not steps or not first:
            return
        skipped = f"{len(steps)} update{'s were' if len(steps) > 1 else ' was'} skipped"
        tqdm.write(
            f"warning: step {now}: {skipped}, not finite gradients{f' (listed in {self.path})' if self.path else ''}",
            file=sys.stderr,
        )
        if self.path is not None:
            with self.path.open("a") as file:
                for step in steps:
                    positions = [step * self.global_batch_size, (step + 1) * self.global_batch_size - 1]
                    file.write(json.dumps({"step": step + 1, "positions": positions}) + "\n")
