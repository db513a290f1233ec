"""Seconds of pieces of work: by CUDA events on a GPU, by the clock of the bench elsewhere."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from beit_pretrain.bench.inputs import Bench

EVENT_SAMPLES = 30  # of one call each, where Triton's own timer is not installed


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
    """Median seconds of a short piece of work on a GPU, warmed up, the L2 cache cleared before each call."""
    if importlib.util.find_spec("triton") is not None:
        from triton.testing import do_bench

        return float(do_bench(work, return_mode="median")) / 1000
    for _ in range(5):
        work()
    torch.cuda.synchronize()
    return float(np.median([event_seconds(work) for _ in range(EVENT_SAMPLES)]))
