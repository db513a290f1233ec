"""What a run watches: steps without a finite gradient, leaps of the loss, a codebook that collapses."""

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

REMEMBERED = 256  # skipped steps that are told apart between two looks at the device
COLLAPSED = 0.01  # of the vocabulary: a smaller perplexity is pointed out


class NonFiniteGuard:
    """Skips the update of a step whose gradient is not finite, and counts it, without waiting for the device.

    A fused optimiser leaves weights, moments and step counts alone when `found_inf` is set; the schedule goes on.

    Args:
        path: list of the skipped steps and their positions; None = warnings alone.
        max_nonfinite_steps: so many steps in a row stop the run.
        global_batch_size: positions of a step.
        sharded: the optimiser's tensors are in parts (FSDP), which the flag is not: it waits for the device, and the
            optimiser passes over parameters without a gradient.
    """

    def __init__(self, path: Path | None, max_nonfinite_steps: int, global_batch_size: int, sharded: bool = False):
        self.path, self.max_nonfinite_steps, self.global_batch_size, self.sharded = (
            path,
            max_nonfinite_steps,
            global_batch_size,
            sharded,
        )
        self._counts = torch.zeros(2, dtype=torch.int64)  # in a row now; since the last look
        self._longest = torch.zeros((), dtype=torch.int64)  # row since the last look
        self._steps = torch.zeros(REMEMBERED, dtype=torch.int64)
        self._losses: deque[float] = deque(maxlen=20)
        self._collapsed = False

    def check(self, norm: Tensor, optimizer: Any, step: int) -> Tensor:
        """Make the optimiser skip this step if the gradient's norm is not finite. Returns 1 if it does, else 0."""
        bad = (~norm.isfinite()).long()
        self._counts, self._longest, self._steps = (
            tensor.to(norm.device) for tensor in (self._counts, self._longest, self._steps)
        )
        slot = torch.arange(REMEMBERED, device=norm.device) == self._counts[1] % REMEMBERED
        self._steps = torch.where(slot & (bad == 1), step, self._steps)
        self._counts = torch.stack([(self._counts[0] + 1) * bad, self._counts[1] + bad])
        self._longest = torch.maximum(self._longest, self._counts[0])
        if not self.sharded:
            optimizer.found_inf = bad.float()
        elif bad:
            optimizer.zero_grad(set_to_none=True)
        return bad

    def report(self, metrics: dict[str, float], step: int, vocab_size: int | None, first: bool) -> None:
        """Report what happened since the last look. Raises AllRanksError after too many skipped steps in a row.

        `first`: this is the process that writes.
        """
        longest = int(self._longest)
        self.write(step, first)
        self._longest = self._counts[0].clone()
        if longest >= self.max_nonfinite_steps:
            raise AllRanksError(
                f"{longest} steps in a row had no finite gradient and were skipped, up to step {step}"
                f"{f'; their positions are in {self.path}' if self.path else ''}; the weights are those from before, "
                "and so is the last checkpoint. A lower optim.lr, or trainer.precision=32-true, may help"
            )
        if first:
            for line in self.warnings(metrics, vocab_size):
                tqdm.write(f"warning: step {step}: {line}", file=sys.stderr)

    def warnings(self, metrics: dict[str, float], vocab_size: int | None) -> list[str]:
        """Lines about a loss that leaps above its recent course, and a codebook that is hardly used."""
        lines = []
        loss, use = metrics.get("train/loss", math.nan), metrics.get("train/codebook_perplexity", math.nan)
        if len(self._losses) >= 5:
            usual, spread = statistics.fmean(self._losses), statistics.pstdev(self._losses)
            if loss > max(self._losses) + max(4 * spread, 0.1 * abs(usual)):
                lines.append(f"the loss leaps to {loss:.4g}, from about {usual:.4g}")
        if math.isfinite(loss):
            self._losses.append(loss)
        collapsed = bool(vocab_size) and use < max(2.0, COLLAPSED * (vocab_size or 0))
        if collapsed and not self._collapsed:
            lines.append(f"the codebook collapses: {use:.3g} of {vocab_size} tokens are in use (perplexity)")
        self._collapsed = collapsed  # said once, until it recovers
        return lines

    def write(self, now: int, first: bool) -> None:
        """List what was skipped since the last look (before every checkpoint too: a killed run must not lose it)."""
        skipped = int(self._counts[1])
        self._counts[1] = 0
        if not skipped or not first:
            return
        steps = sorted(self._steps[: min(skipped, REMEMBERED)].tolist())  # counted from 0
        tqdm.write(
            f"warning: step {now}: {skipped} update{'s were' if skipped > 1 else ' was'} skipped, not finite gradients"
            f"{f' (listed in {self.path})' if self.path else ''}",
            file=sys.stderr,
        )
        if self.path is not None:
            with self.path.open("a") as file:
                for step in steps:
                    positions = [step * self.global_batch_size, (step + 1) * self.global_batch_size - 1]
                    file.write(json.dumps({"step": step + 1, "positions": positions}) + "\n")
