"""One all-reduce per step between the processes of a run, overlapped with the last backward pass.

Each process contributes its number of masked patches, the signal it received, and whether a checkpoint or a validation
is due by its clock. The values are integers, so their sum does not depend on the order.

The number of masked patches is needed before the gradients are clipped; there the device waits for the sum, not the
host. The host reads the other values one step later, from a copy in pinned memory. So it never waits for the current
step, and all processes act on the same values after the same step.
"""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import torch
from torch import Tensor, distributed

from beit_pretrain.engine.preemption import SIGNALS

MASKED, SAVE, VALIDATE, FIRST_SIGNAL = 0, 1, 2, 3  # indices in the sums; from FIRST_SIGNAL on a count per signal
LOOK = 5e-4  # seconds between two checks for a finished copy; sleeping leaves the core to loader workers
PLACES = FIRST_SIGNAL + len(SIGNALS)


class Agreed(NamedTuple):
    """The result of an exchange, equal on all processes (or one process's contribution to it)."""

    step: int = 0  # the step of the exchange
    signum: int = 0  # a signal that any process received; 0 = none
    save: bool = False  # a checkpoint is due by the clock of any process
    validate: bool = False  # a validation is due by the clock of any process


class _Buffers:
    """Buffers of one exchange. Two alternate: one is read while the next exchange runs."""

    def __init__(self, device: torch.device):
        on_gpu = device.type == "cuda"
        self.step = 0
        self.given, self.read = (torch.zeros(PLACES, dtype=torch.int64, pin_memory=on_gpu) for _ in range(2))
        self.sums = torch.zeros(PLACES, dtype=torch.int64, device=device)
        self.copied = torch.cuda.Event() if on_gpu else None


class StepExchange:
    """The exchange of each step: `start` before the last backward pass, `finish` before clipping, `read` at the end.

    Not used in runs with one process.
    """

    def __init__(self) -> None:
        self.patience = math.inf  # seconds to wait for the other processes
        self._buffers: tuple[_Buffers, _Buffers] | None = None
        self._work: distributed.Work | None = None
        self._now = 0  # index of the current step's buffers
        self._steps = 0  # number of exchanges so far

    def start(self, given: Agreed, masked: Tensor | int, device: torch.device) -> None:
        """Start the all-reduce of this process's values; `masked` patches may be a tensor on the device."""
        if self._buffers is None:
            self._buffers = _Buffers(device), _Buffers(device)
        self._now, self._steps = 1 - self._now, self._steps + 1
        buffers = self._buffers[self._now]
        buffers.step = given.step
        values = [0, int(given.save), int(given.validate), *(int(given.signum == signum) for signum in SIGNALS)]
        buffers.given.copy_(torch.tensor(values))  # pinned memory: other copies to a GPU block the host
        buffers.sums.copy_(buffers.given, non_blocking=True)
        buffers.sums[MASKED] += masked
        self._work = distributed.all_reduce(buffers.sums, async_op=True)

    def finish(self) -> None:
        """Make the device (on a CPU, the host) wait for the sums, and start their copy to the host."""
        assert self._buffers is not None
        assert self._work is not None
        self._work.wait()
        self._work = None
        buffers = self._buffers[self._now]
        buffers.read.copy_(buffers.sums, non_blocking=True)
        if buffers.copied is not None:
            buffers.copied.record()

    @property
    def masked(self) -> Tensor:
        """Masked patches of all processes in the last finished exchange: an int64 scalar on the device."""
        assert self._buffers is not None
        return self._buffers[self._now].sums[MASKED]

    def read(self) -> Agreed:
        """The result of the exchange before the last one; empty at the first step.

        Waits for its copy to the host in Python, so that signals are handled meanwhile. Raises RuntimeError after
        `patience`, before NCCL's time-out, which aborts without a message.
        """
        if self._buffers is None or self._steps < 2:
            return Agreed()
        buffers = self._buffers[1 - self._now]
        deadline = time.monotonic() + self.patience
        while buffers.copied is not None and not buffers.copied.query():
            if time.monotonic() > deadline:
                raise RuntimeError(f"the exchange of step {buffers.step} timed out")
            time.sleep(LOOK)
        sums = buffers.read.tolist()
        signum = max((s for s, count in zip(SIGNALS, sums[FIRST_SIGNAL:], strict=True) if count), default=0)
        return Agreed(buffers.step, int(signum), sums[SAVE] > 0, sums[VALIDATE] > 0)
