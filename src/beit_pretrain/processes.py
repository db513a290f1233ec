"""Worker processes: an ordered, bounded `map`, and workers that end with the process that started them."""

from __future__ import annotations

import codecs
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from io import TextIOWrapper
from itertools import islice
from typing import Any, TypeVar

from beit_pretrain.errors import UserError

Job = TypeVar("Job")
Result = TypeVar("Result")


def print_any_name() -> None:
    """Let stdout and stderr print characters that they cannot encode, such as names that are no UTF-8, as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if not isinstance(stream, TextIOWrapper):
            continue
        if stream.errors != "surrogateescape" or codecs.lookup(stream.encoding).name != "utf-8":
            stream.reconfigure(errors="backslashreplace")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def in_order(
    num_workers: int, inline: int = 0, small: Callable[[Any], bool] = lambda job: False
) -> Iterator[Callable[[Callable[[Job], Result], Iterable[Job]], Iterator[Result]]]:
    """Lend a `map` over `num_workers` processes: results in the order of the jobs, at most four jobs per worker ahead.

    The first `inline` jobs, and those that are `small`, run in this process: starting others would take longer.
    Raises UserError, from the map, if a process dies.
    """
    if num_workers < 2:
        yield map
        return

    def mapped(function: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[Result]:
        waiting: deque[Future[Result]] = deque()
        jobs = iter(jobs)
        yield from map(function, islice(jobs, inline))
        try:
            for job in jobs:
                if small(job):
                    done: Future[Result] = Future()
                    waiting.append(done)
                    done.set_result(function(job))
                else:
                    waiting.append(pool.submit(function, job))
                while waiting and waiting[0].done():
                    yield waiting.popleft().result()
                if len(waiting) >= 4 * num_workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise UserError("a worker process died, usually for lack of memory; set a smaller num_workers=") from None

    pool = ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn"), _start_worker)
    try:
        yield mapped
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and end with it if it is killed: workers would wait forever."""
    print_any_name()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if (parent := multiprocessing.parent_process()) is not None:
        _end_after(parent.join)


def end_with_parent(worker: int = 0) -> None:
    """`worker_init_fn` of a DataLoader: end if the process that started it is killed.

    torch's own workers do so too, except one that is writing more into its pipe than fits: it holds the reading end
    itself, so it would wait forever, with all its memory.
    """
    parent = os.getppid()

    def wait() -> None:
        while os.getppid() == parent:
            time.sleep(1)

    _end_after(wait)


def _end_after(wait: Callable[[], object]) -> None:
    """End this process once `wait` returns, in a thread of its own."""
    threading.Thread(target=lambda: (wait(), os._exit(1)), daemon=True).start()
