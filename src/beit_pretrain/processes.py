"""Worker processes that keep the order of their jobs, hold only a few results at a time and die with their parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

from beit_pretrain.errors import UserError

Job = TypeVar("Job")
Result = TypeVar("Result")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def in_order(
    num_workers: int, inline: int = 0
) -> Iterator[Callable[[Callable[[Job], Result], Iterable[Job]], Iterator[Result]]]:
    """Lend a `map` over `workers` processes: results in the order of the jobs, at most four jobs a worker ahead.

    The first `inline` jobs are done in this process, since a few small ones are not worth starting others.
    Raises UserError, from the map, if a process dies.
    """
    if num_workers < 2:
        yield map
        return
    pool = ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn"), _attach_to_parent)

    def mapped(function: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[Result]:
        waiting: deque[Future[Result]] = deque()
        jobs = iter(jobs)
        yield from map(function, islice(jobs, inline))
        try:
            for job in jobs:
                waiting.append(pool.submit(function, job))
                if len(waiting) >= 4 * num_workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise UserError("a worker process died, as a rule for want of memory; set fewer num_workers=") from None

    try:
        yield mapped
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _attach_to_parent() -> None:
    """Leave Ctrl-C to the parent, and end with it if it is killed: workers would wait for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:

        def watch() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()


def end_with_parent(worker: int = 0) -> None:
    """`worker_init_fn` of a DataLoader: end with the process that started it, if that is killed.

    torch's own workers would end too, but for one that is just writing more into its pipe than fits: it holds the
    reading end itself, and so waits for ever, with all its memory.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
