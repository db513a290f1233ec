"""What the processes of a run tell one another at every step, in one all-reduce beside the last backward pass.

Every process adds how many patches it has masked, which signal it was sent, and whether its clock says that a
checkpoint or a validation is due. Sums of integers are exact, in whatever order they are added.

The masked patches are needed before the gradients are clipped: there the device waits for the sum, not the host. The
host reads the rest one step later, from a copy in pinned memory, when the device has long got there: so it never waits
for the step in hand, and all processes act on the same values after the same step.
"""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import torch
from torch import Tensor, distributed

from beit_pretrain.engine.preemption import SIGNALS

MASKED, SAVE, VALIDATE, FIRST_SIGNAL = 0, 1, 2, 3  # places in the sums; a count for each signal stands at the end
LOOK = 5e-4  # seconds between two looks whether a copy has arrived; loader workers need the core meanwhile
PLACES = FIRST_SIGNAL + len(SIGNALS)


class Agreed(NamedTuple):
    """What all processes know of one another, the same on all of them."""

    step: int = 0  # during which they said it
    signum: int = 0  # a signal that one of them was sent; 0 = none
    save: bool = False  # one of their clocks says that a checkpoint is due
    validate: bool = False  # the same of a validation


class _Buffers:
    """What one exchange needs. Two take turns: one is still read while the next is under way."""

    def __init__(self, device: torch.device):
        on_gpu = device.type == "cuda"
        self.step = 0
        self.given, self.read = (torch.zeros(PLACES, dtype=torch.int64, pin_memory=on_gpu) for _ in range(2))
        self.sums = torch.zeros(PLACES, dtype=torch.int64, device=device)
        self.copied = torch.cuda.Event() if on_gpu else None


class StepExchange:
    """The exchange of every step: `start` before the last backward pass, `finish` before the clip, `read` at the end.

    Without other processes it is not used.
    """

    def __init__(self) -> None:
        self.patience = math.inf  # seconds to wait for the others
        self._buffers: tuple[_Buffers, _Buffers] | None = None
        self._work: distributed.Work | None = None
        self._now = 0  # which of the two buffers is the current step's
        self._steps = 0  # how many exchanges there have been

    def start(self, given: Agreed, masked: Tensor | int, device: torch.device) -> None:
        """Begin to add up what every process has to say during a step; `masked` patches may be on the device."""
        if self._buffers is None:
            self._buffers = _Buffers(device), _Buffers(device)
        self._now, self._steps = 1 - self._now, self._steps + 1
        buffers = self._buffers[self._now]
        buffers.step = given.step
        said = [0, int(given.save), int(given.validate), *(int(given.signum == signum) for signum in SIGNALS)]
        buffers.given.copy_(torch.tensor(said))  # pinned memory: the host would wait for any other copy to a GPU
        buffers.sums.copy_(buffers.given, non_blocking=True)
        buffers.sums[MASKED] += masked
        self._work = distributed.all_reduce(buffers.sums, async_op=True)

    def finish(self) -> None:
        """Have the device wait for the sums, on a CPU the host."""
        assert self._buffers is not None
        assert self._work is not None
        self._work.wait()
        self._work = None
        buffers = self._buffers[self._now]
        buffers.read.copy_(buffers.sums, non_blocking=True)
        if buffers.copied is not None:
            buffers.copied.record()

    def _wait_for(self, buffers: _Buffers) -> None:
        """Wait until a copy has arrived; in Python, which can obey a signal meanwhile, and give up by itself.

        NCCL, which gives up at the run's time-out, would end the process without a word. Raises RuntimeError.
        """
        deadline = time.monotonic() + self.patience
        while buffers.copied is not None and not buffers.copied.query():
            if time.monotonic() > deadline:
                raise RuntimeError(f"the exchange of step {buffers.step} timed out")
            time.sleep(LOOK)

    @property
    def masked(self) -> Tensor:
        """Masked patches of all processes in the step whose exchange is finished, int64, on the device."""
        assert self._buffers is not None
        return self._buffers[self._now].sums[MASKED]

    def read(self) -> Agreed:
        """What was said during the step before the last one that is finished; nothing at the first step."""
        if self._buffers is None or self._steps < 2:
            return Agreed()
        buffers = self._buffers[1 - self._now]
        self._wait_for(buffers)
        sums = buffers.read.tolist()
        signum = max((s for s, count in zip(SIGNALS, sums[FIRST_SIGNAL:], strict=True) if count), default=0)
        return Agreed(buffers.step, int(signum), sums[SAVE] > 0, sums[VALIDATE] > 0)
