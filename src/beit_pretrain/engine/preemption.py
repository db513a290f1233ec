"""Signals that end a run with all saved: SIGTERM and SIGUSR1 of a scheduler, a person's Ctrl-C.

Inside the training loop a signal is noted, and obeyed after the step in hand (`keeping.CheckpointManager` asks).
Before and after
it there is nothing in hand, and a signal ends the process at once, from a thread if need be: Python hands a signal to
the main thread alone, which may be waiting for other processes in torch's C++, for as long as `timeout_minutes`.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

PREEMPTED = 75  # exit code after SIGTERM or SIGUSR1: "temporary failure, try again" (sysexits.h)
PATIENCE = 1.0  # seconds that the main thread has to obey a signal when nothing is in hand
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Preempted(BaseException):
    """The run was told to stop. Not an Exception, since it is also raised where any of those means a damaged file.

    `signum`: by which signal; `step`: the step whose checkpoint is on the disk, None = nothing was in hand.
    """

    def __init__(self, signum: int, step: int | None = None):
        after = f"after step {step}" if step is not None else "with no step in hand"
        super().__init__(f"stopped by {signal.Signals(signum).name} {after}")
        self.signum, self.step = signum, step


class PreemptionSignals:
    """Takes over the signals in a `with` block.

    Args:
        farewell: what is said when a signal has ended the run; gives the exit code. Called here only if the main thread
            does not come to it.

    `told`: the first signal that came while `looping`, else 0. `saved_at`: the step of the last checkpoint.
    """

    def __init__(self, on_exit: Callable[[Preempted], int] | None = None) -> None:
        self.told = 0
        self.looping = False
        self.saved_at: int | None = None
        self._farewell = on_exit or (lambda _: PREEMPTED)
        self._leaving = False  # a Stopped is on its way
        self._heard = threading.Event()  # by the main thread
        self._before: dict[int, Any] = {}
        self._pipe: tuple[int, int] | None = None
        self._wakeup_before = -1

    def __deepcopy__(self, memo: dict) -> PreemptionSignals:
        return self  # a module that is copied (averaged weights) is in the same process

    def __enter__(self) -> PreemptionSignals:
        if threading.current_thread() is threading.main_thread():  # else whoever runs us there handles signals
            self._pipe = os.pipe()
            os.set_blocking(self._pipe[1], False)
            self._wakeup_before = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
            threading.Thread(target=self._insist, args=self._pipe[:1], daemon=True, name="signals").start()
            self._before = {signum: signal.signal(signum, self._receive) for signum in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for signum, handler in self._before.items():
            # Schedulers repeat themselves: whoever is leaving already must not lose its exit code to a second signal.
            leaving = kind is not None and issubclass(kind, Preempted) and signum != signal.SIGINT
            signal.signal(signum, signal.SIG_IGN if leaving else handler)
        self._before = {}
        if self._pipe is not None:
            signal.set_wakeup_fd(self._wakeup_before)
            os.close(self._pipe[1])  # which ends the thread
            self._pipe = None

    def _receive(self, signum: int, _: FrameType | None) -> None:
        self._heard.set()
        if signum == signal.SIGINT and (self.told == signal.SIGINT or self._leaving):  # a second Ctrl-C does not wait
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt
        if self.looping:
            self.told = self.told or signum
        elif not (self.told or self._leaving):
            self._leaving = True
            raise Preempted(signum, self.saved_at)

    def _insist(self, reader: int) -> None:
        while number := os.read(reader, 1):
            if number[0] in SIGNALS and not self.looping and not self._heard.wait(PATIENCE):
                os._exit(self._farewell(Preempted(number[0], self.saved_at)))
        os.close(reader)


@contextmanager
def early_signals(program: str) -> Iterator[None]:
    """Until a run takes them over, which is after seconds of imports: a scheduler's signals end the process, to be
    started again."""

    def leave(signum: int, _: FrameType | None) -> None:
        os.write(1, f"{program}: {Preempted(signum)}; the same command starts again\n".encode())
        os._exit(PREEMPTED)

    before: dict[int, Any] = {}
    with suppress(ValueError):  # not in the main thread
        before = {signum: signal.signal(signum, leave) for signum in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            if signal.getsignal(signum) is leave:  # else a run that is leaving ignores it
                signal.signal(signum, handler)
