"""Seconds, operations and bytes of pieces of work; how two compare; and how fast matrix products are at best."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from beit_pretrain.models.cpu_kernels import ONEDNN, linear

CALLS, SAMPLES, WARM_UP = 5, 20, 3  # of `kernel_seconds`: calls of a sample, samples, calls before them
CYCLES = 2e9  # of a GPU in a second, at the most
HOST_MARGIN = 1.5  # times the host's time to queue the calls for which the GPU is kept busy
OUTSIDE = 0.025  # probability that the true median lies below an interval, and above
Clock = Callable[[], float]  # seconds
Result = TypeVar("Result")


def seconds_of(work: Callable[[], object], device: torch.device, now: Clock = time.perf_counter) -> float:
    """Seconds of some work, between two CUDA events on an idle GPU, by the clock `now` elsewhere."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return event_seconds(work)
    start = now()
    work()
    return now() - start


def event_seconds(work: Callable[[], object]) -> float:
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    work()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1000


def kernel_seconds(work: Callable[[], object]) -> float:
    """Median seconds of a short piece of work on a GPU, warmed up.

    Several calls are timed together and queued while the GPU is kept busy, so that the host's time for a call, which
    for some kernels is longer than the GPU's, does not count; in a compiled step it would not either.
    """

    def calls(count: int = CALLS) -> None:
        for _ in range(count):
            work()

    calls(WARM_UP)
    torch.cuda.synchronize()
    start = time.perf_counter()
    calls()
    cycles = int(CYCLES * HOST_MARGIN * (time.perf_counter() - start))
    torch.cuda.synchronize()
    samples = []
    for _ in range(SAMPLES):
        torch.cuda._sleep(cycles)
        samples.append(event_seconds(calls) / CALLS)
    return float(np.median(samples))


def in_turn(
    work: Mapping[str, Callable[[int], Result]], rounds: int, warm_up: int = 0, seed: int = 0
) -> Iterator[dict[str, list[Result]]]:
    """Run all work in a new random order every round, so that other load on the machine slows all of it alike.

    `work` gets the number of the round, warm-up included. Yields all results so far after every round but warm-up.
    """
    found: dict[str, list[Result]] = {name: [] for name in work}
    order = np.random.default_rng(seed)
    for number in tqdm(range(warm_up + rounds), desc="measuring", unit=" rounds"):
        results = {name: work[name](number) for name in order.permutation(list(work))}
        if number >= warm_up:
            for name, result in results.items():
                found[name].append(result)
            yield found


def compared(slow: Sequence[float], fast: Sequence[float]) -> dict[str, Any]:
    """How many times as fast the second is, from pairs of seconds measured one after the other.

    `low` and `high` are the 95 % confidence interval of the `median`, from order statistics of the ratios: the number
    of ratios below the true median is binomial, whatever their distribution. Of fewer than six `pairs` it is the range.
    """
    values = np.sort(np.asarray(slow, float) / np.asarray(fast, float))
    pairs, below, outside = len(values), 1, 0  # of 2^pairs outcomes, those with at most `outside` below
    while below < OUTSIDE * 2**pairs:
        outside += 1
        below += math.comb(pairs, outside)
    low = max(0, outside - 1)
    ends = {"low": float(values[low]), "high": float(values[pairs - 1 - low])}
    return {"median": float(np.median(values)), **ends, "pairs": pairs}


def ratios(seconds: dict[str, list[float]], pairs: Sequence[tuple[str, str]]) -> dict[str, dict[str, Any]]:
    """How many times as fast the first of each pair is as the second, where both were measured."""
    return {f"{a}/{b}": compared(seconds[b], seconds[a]) for a, b in pairs if a in seconds and b in seconds}


def counted_flops(step: Callable[[], Any]) -> int:
    """Floating-point operations of the matrix products and convolutions that a call really does."""

    def of_onednn(x_shape: Any, weight_shape: Any, *_: Any, **__: Any) -> int:
        return 2 * x_shape[0] * x_shape[1] * weight_shape[0]

    with FlopCounterMode(display=False, custom_mapping={ONEDNN: of_onednn} if ONEDNN else None) as counter:
        step()
    return int(counter.get_total_flops())


def kept_bytes(forward: Callable[[], Any]) -> int:
    """Bytes that a forward pass keeps for its backward pass, parameters not counted; each storage once."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = forward()  # noqa: F841 (the graph must live until all is counted)
    return sum(storages.values())


def state_bytes(model: nn.Module) -> int:
    """Bytes of weights, gradients and AdamW's two moments, in single precision."""
    return 4 * 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)


def peak_bytes(device: torch.device, work: Callable[[], object]) -> int:
    """The most bytes in use on the GPU during some work."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def matmul_rate(
    device: torch.device, dtype: torch.dtype, side: int, now: Clock = time.perf_counter, seconds: float | None = None
) -> float:
    """FLOP/s of products of square random matrices: the best of a few samples, or the mean over so many `seconds`."""
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    calls, samples = (2 if device.type == "cpu" else 20), 3
    if seconds is not None:
        calls, samples = max(3, min(500, int(seconds * matmul_rate(device, dtype, side, now) / (2 * side**3)))), 1

    def products() -> None:
        for _ in range(calls):
            linear(a, b)

    return 2 * side**3 * calls / min(seconds_of(products, device, now) for _ in range(samples))


def measured_peak(device: torch.device, bf16: bool, now: Clock) -> float:
    """FLOP/s of the fastest of some large matrix products in the precision of training; `now` counts the seconds."""
    sides = (1024, 2048) if device.type == "cpu" else (4096, 8192)
    return max(matmul_rate(device, torch.bfloat16 if bf16 else torch.float32, side, now) for side in sides)
