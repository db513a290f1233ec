"""`bench memory`: the largest batch of a process, with and without activation checkpointing.

On a GPU the peaks of two small batches are measured, in uncompiled steps; the straight line through them predicts the
largest batch, which is then tried. Elsewhere it is reckoned, without computing anything: weights, gradients and
moments, and what a forward pass keeps, which grows with the batch in a straight line too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf
from torch._subclasses.fake_tensor import FakeTensorMode

from beit_pretrain.benchmarks.cost import kept_bytes, peak_bytes, state_bytes
from beit_pretrain.benchmarks.inputs import Bench, make_batch, make_bench
from beit_pretrain.benchmarks.step import our_steps
from beit_pretrain.engine.trainer import wanted_gpu
from beit_pretrain.errors import UserError
from beit_pretrain.models.backbone import SIZES as NETWORKS
from beit_pretrain.tables import table

SIZES = ("base", "large")
MOST = 1 << 14  # images of a batch
GIB = 2**30
WORKSPACE = 0.05  # of the memory: left for kernels' own needs and for gaps between tensors
PAIRS = ((8, 24), (1, 3))  # images of the two batches that are measured: the first pair that fits
TRIES, SMALLER = 4, 0.93  # of the predicted batch; each next one is so much smaller


class Fits(NamedTuple):
    """The largest batch, what it takes in bytes, and whether that was measured."""

    batch: int
    used: int
    measured: bool


def predicted(peak_of: Callable[[int], int | None], limit: int) -> Fits:
    """The largest batch by the line through two measured peaks, tried out; a little smaller where it does not fit.

    `peak_of`: batch -> the most bytes in use, or None if it does not fit.
    """
    for small, large in PAIRS:
        peaks = peak_of(small), peak_of(large)
        if peaks[0] is not None and peaks[1] is not None:
            each = max(1.0, (peaks[1] - peaks[0]) / (large - small))
            fixed = peaks[0] - small * each
            batch = min(MOST, int((limit * (1 - WORKSPACE) - fixed) // each))
            for _ in range(TRIES):
                if batch <= large:  # known to fit
                    return Fits(large, peaks[1], True)
                if (used := peak_of(batch)) is not None:
                    return Fits(batch, used, True)
                batch = int(batch * SMALLER)
            return Fits(large, peaks[1], True)
    one = peak_of(1)
    return Fits(0, 0, True) if one is None else Fits(1, one, True)


def tried(cfg: DictConfig, limit: int) -> Fits:
    """On a GPU, by real steps with known tokens, uncompiled: compiling at every size would take minutes."""

    def peak_of(batch: int) -> int | None:
        def two_steps() -> None:
            bench = make_bench(OmegaConf.merge(cfg, {"batch_size": batch, "compile": False}))  # type: ignore[arg-type]
            step = our_steps(bench)["ours_cached"]
            for number in range(2):
                step(make_batch(bench, number))

        try:
            return peak_bytes(torch.device("cuda"), two_steps)
        except torch.OutOfMemoryError:
            return None

    with memory_limit(limit):
        return predicted(peak_of, limit)


@contextmanager
def memory_limit(limit: int) -> Iterator[None]:
    """Let this process have no more of the GPU than so many bytes: as if it were a smaller one."""
    share = min(1.0, limit / torch.cuda.get_device_properties(0).total_memory)
    torch.cuda.set_per_process_memory_fraction(share)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def reckoned(cfg: DictConfig, limit: int) -> Fits:
    """Without computing: from what batches of 1 and 2 would keep, and the largest that comes and goes."""
    bench = make_bench(with_batch(cfg, 1))
    model = bench.module.model
    one, two = kept(bench), kept(bench._replace(batch_size=2))
    each, fixed = two - one, 2 * one - two
    if cfg.activation_checkpointing:  # and what one block keeps while it is computed again
        model.set_grad_checkpointing(False)
        each += (kept(bench) - one) // len(model.blocks)
    each += 4 * bench.masking.max_patches * model.vocab_size  # the largest gradient of an activation: of the logits
    state = state_bytes(bench.module.model)
    room = limit * (1 - WORKSPACE) - state - fixed
    batch = max(0, int(room // each))
    return Fits(batch, state + fixed + batch * each, False)


def kept(bench: Bench) -> int:
    """Bytes that the backward pass of a batch would need: of shapes alone, on fake tensors."""
    batch = make_batch(bench, 0)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, bench.precision():
        names = ("mask", "mask_index", "tokens")
        given = [mode.from_tensor(tensor) for tensor in (batch.view, *(batch.ours[name] for name in names))]
        # Without drop path, which keeps next to nothing but looks at numbers.
        return kept_bytes(lambda: bench.module.objective(*given))


def with_size(cfg: DictConfig, size: str, checkpointing: bool) -> DictConfig:
    """The experiment with a network of a named size, whatever shape it sets for itself: that would win."""
    own: Any = OmegaConf.to_container(cfg)
    shape = {name: value for name, value in own["model"].items() if name not in NETWORKS[size]}
    own |= {"model": {**shape, "size": size}, "activation_checkpointing": checkpointing}
    return OmegaConf.create(own)


def with_batch(cfg: DictConfig, batch: int) -> DictConfig:
    merged: Any = OmegaConf.merge(cfg, {"batch_size": batch})
    return merged


def bench_memory(cfg: DictConfig) -> None:
    """Print the largest batches for base and large, and the same as JSON."""
    on_gpu = wanted_gpu(cfg.trainer.accelerator)
    if cfg.bench.memory_gb is None and not on_gpu:
        raise UserError("bench memory on a CPU needs bench.memory_gb=, such as 24")
    limit = int(cfg.bench.memory_gb * GIB) if cfg.bench.memory_gb else torch.cuda.get_device_properties(0).total_memory
    rows, found = [], {}
    for size in SIZES:
        for checkpointing in (False, True):
            fits = (tried if on_gpu else reckoned)(with_size(cfg, size, checkpointing), limit)
            found[f"{size}{'_checkpointing' if checkpointing else ''}"] = fits._asdict()
            how = "yes" if checkpointing else "no"
            way = "measured, uncompiled" if fits.measured else "reckoned"
            rows.append([size, how, str(fits.batch), f"{fits.used / GIB:.1f}", way])
    print(table(["network", "activation checkpointing", "largest batch", "GiB", "how"], rows))
    print(json.dumps({"bench": "memory", "memory_bytes": limit, "precision": cfg.trainer.precision, **found}))
