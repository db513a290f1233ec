"""Signals that end a run with all saved: SIGTERM and SIGUSR1 of a scheduler, a person's Ctrl-C.

Inside the training loop a signal is noted, and obeyed after the step in hand (`keeping.Keeper` asks). Before and after
it there is nothing in hand, and a signal ends the process at once.
"""

from __future__ import annotations

import signal
from contextlib import suppress
from types import FrameType
from typing import Any

PREEMPTED = 75  # exit code after SIGTERM or SIGUSR1: "temporary failure, try again" (sysexits.h)
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Stopped(BaseException):
    """The run was told to stop. Not an Exception, since it is also raised where any of those means a damaged file.

    `signum`: by which signal; `step`: the step whose checkpoint is on the disk, None = nothing was in hand.
    """

    def __init__(self, signum: int, step: int | None = None):
        after = f"after step {step}" if step is not None else "with no step in hand"
        super().__init__(f"stopped by {signal.Signals(signum).name} {after}")
        self.signum, self.step = signum, step


class Signals:
    """Takes over the signals in a `with` block. `told`: the first one that came while `looping`, else 0."""

    def __init__(self) -> None:
        self.told = 0
        self.looping = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        for signum in SIGNALS:
            with suppress(ValueError):  # not in the main thread: whoever runs us there handles signals
                self._before[signum] = signal.signal(signum, self._receive)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for signum, handler in self._before.items():
            # Schedulers repeat themselves: whoever is leaving already must not lose its exit code to a second signal.
            leaving = kind is not None and issubclass(kind, Stopped) and signum != signal.SIGINT
            signal.signal(signum, signal.SIG_IGN if leaving else handler)
        self._before = {}

    def _receive(self, signum: int, _: FrameType | None) -> None:
        if not self.looping:
            raise Stopped(signum)
        if signum == signal.SIGINT and self.told == signal.SIGINT:  # a second Ctrl-C does not wait
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt
        self.told = self.told or signum
