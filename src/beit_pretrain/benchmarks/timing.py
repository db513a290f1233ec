"""Seconds of pieces of work: by CUDA events on a GPU, by the clock of the bench elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from beit_pretrain.benchmarks.inputs import Bench

EVENT_SAMPLES, CALLS, WARM_UP_CALLS = 20, 5, 3  # of `kernel_seconds`: samples, calls of one, calls before them
CYCLES = 2e9  # of a GPU in a second, at the most
HOST_MARGIN = 1.5  # how much longer than the host needs to queue the calls the GPU is kept busy


class Clock:
    """Seconds of named pieces of work, each waited for on the device."""

    def __init__(self, bench: Bench):
        self.bench = bench
        self.seconds: dict[str, list[float]] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.bench.wait()
        start = self.bench.now()
        yield
        self.bench.wait()
        self.seconds.setdefault(name, []).append(self.bench.now() - start)

    def medians(self) -> dict[str, float]:
        return {name: float(np.median(values)) for name, values in self.seconds.items()}


def seconds_per_call(bench: Bench, work: Callable[[int], object], calls: int) -> float:
    """Mean seconds of `work(0)`, `work(1)`, ..., one after the other and waited for once, at the end."""

    def all_calls() -> None:
        for number in range(calls):
            work(number)

    bench.wait()
    if bench.device.type == "cuda":
        return event_seconds(all_calls) / calls
    start = bench.now()
    all_calls()
    return (bench.now() - start) / calls


def event_seconds(work: Callable[[], object]) -> float:
    """Seconds between two CUDA events around some work; it may start what it likes on the current stream."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def kernel_seconds(work: Callable[[], object]) -> float:
    """Median seconds of a short piece of work on a GPU, warmed up.

    Several calls are timed together, and queued while the GPU is kept busy: what the host needs for a call, more than
    the GPU for some kernels, does not count. In a compiled step it would not either.
    """
    for _ in range(WARM_UP_CALLS):
        work()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(CALLS):
        work()
    ahead = int(CYCLES * HOST_MARGIN * (time.perf_counter() - start))
    torch.cuda.synchronize()

    def sample() -> float:
        torch.cuda._sleep(ahead)
        return event_seconds(lambda: [work() for _ in range(CALLS)]) / CALLS

    return float(np.median([sample() for _ in range(EVENT_SAMPLES)]))
