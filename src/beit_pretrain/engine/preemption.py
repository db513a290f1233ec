"""Preemption: SIGTERM and SIGUSR1 (from a scheduler) and Ctrl-C save and end a run.

Inside the training loop a signal takes effect after the current step (`engine.checkpointing.CheckpointManager` checks
for it). Outside the loop it ends the process at once, if necessary from a thread: Python runs signal handlers only in
the main thread, which may wait for other processes in C++ code for up to `timeout_minutes`.
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
PATIENCE = 1.0  # seconds for the main thread to handle a signal outside the loop
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Preempted(BaseException):
    """A signal stopped the run. Not an Exception: some code treats any Exception as a damaged file.

    `signum`: the signal; `step`: the step whose checkpoint is on disk, None = no step was in progress.
    """

    def __init__(self, signum: int, step: int | None = None):
        after = f"after step {step}" if step is not None else "with no step in hand"
        super().__init__(f"stopped by {signal.Signals(signum).name} {after}")
        self.signum, self.step = signum, step


class PreemptionSignals:
    """Handles the signals inside a `with` block.

    Args:
        on_exit: prints the last message and returns the exit code. Called here only if the main thread does not
            handle the signal in time.
        exits: whether the process ends with the run. If not, as in a notebook, the handlers from before are restored
            also after a signal, and a busy main thread is waited for.

    `told`: the first signal received while `looping`, else 0. `saved_at`: step of the last checkpoint on disk.
    """

    def __init__(self, on_exit: Callable[[Preempted], int] | None = None, exits: bool = True) -> None:
        self.told = 0
        self.looping = False
        self.saved_at: int | None = None
        self._on_exit, self._exits = on_exit or (lambda _: PREEMPTED), exits
        self._leaving = False  # Preempted has been raised
        self._heard = threading.Event()  # the main thread has run the handler
        self._before: dict[int, Any] = {}
        self._pipe: tuple[int, int] | None = None
        self._wakeup_before = -1

    def __enter__(self) -> PreemptionSignals:
        if threading.current_thread() is threading.main_thread():  # Python allows signal handlers only there
            if self._exits:
                self._pipe = os.pipe()
                os.set_blocking(self._pipe[1], False)
                self._wakeup_before = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
                threading.Thread(target=self._insist, args=self._pipe[:1], daemon=True, name="signals").start()
            self._before = {signum: signal.signal(signum, self._receive) for signum in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for signum, handler in self._before.items():
            # Schedulers may send a signal twice: the second one must not change the exit code.
            leaving = self._exits and kind is not None and issubclass(kind, Preempted) and signum != signal.SIGINT
            signal.signal(signum, signal.SIG_IGN if leaving else handler)
        self._before = {}
        if self._pipe is not None:
            signal.set_wakeup_fd(self._wakeup_before)
            os.close(self._pipe[1])  # ends the thread
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
                os._exit(self._on_exit(Preempted(number[0], self.saved_at)))
        os.close(reader)


@contextmanager
def early_signals(program: str) -> Iterator[None]:
    """Handle SIGTERM and SIGUSR1 during the imports, before the run handles them: exit with code 75."""

    def leave(signum: int, _: FrameType | None) -> None:
        os.write(1, f"{program}: {Preempted(signum)}; rerun the same command\n".encode())
        os._exit(PREEMPTED)

    before: dict[int, Any] = {}
    with suppress(ValueError):  # not in the main thread
        before = {signum: signal.signal(signum, leave) for signum in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            if signal.getsignal(signum) is leave:  # a preempted run has set SIG_IGN, which must stay
                signal.signal(signum, handler)
