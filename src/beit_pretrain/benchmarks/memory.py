"""`bench memory`: the largest batch of a process, with and without activation checkpointing.

On a GPU the peaks of two small batches are measured, in uncompiled steps; the straight line through them predicts the
largest batch, which is then tried. Elsewhere it is reckoned, without computing anything: weights, gradients and
moments, and what a forward pass keeps, which is linear in the batch size too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from beit_pretrain.benchmarks.blocks import Block, Results
from beit_pretrain.benchmarks.inputs import Bench, make_batch, make_bench
from beit_pretrain.benchmarks.measure import kept_bytes, peak_bytes, state_bytes
from beit_pretrain.benchmarks.step import our_steps
from beit_pretrain.engine.trainer import wanted_gpu
from beit_pretrain.errors import UserError
from beit_pretrain.models.backbone import SIZES as NETWORKS
from beit_pretrain.settings import to_dict

SIZES = ("base", "large")
MOST = 1 << 14  # images of a batch
GIB = 2**30
WORKSPACE = 0.05  # of the memory: left for kernels' own needs and for gaps between tensors
PAIRS = ((8, 24), (1, 3))  # images of the two batches that are measured: the first pair that fits
TRIES, SMALLER = 4, 0.93  # of the predicted batch; each next one is so much smaller


Fits = tuple[int, int]  # the largest batch, and what it takes in bytes


def predicted(peak_of: Callable[[int], int | None], limit: int) -> Fits:
    """The largest batch by the line through two measured peaks, tried out; a little smaller where it does not fit.

    `peak_of`: batch -> the most bytes in use, or None if it does not fit.
    """
    for small, large in PAIRS:
        low, high = peak_of(small), peak_of(large)
        if low is not None and high is not None:
            each = max(1.0, (high - low) / (large - small))
            batch, tries = min(MOST, int((limit * (1 - WORKSPACE) - low) // each) + small), TRIES
            while batch > large and tries:
                if (used := peak_of(batch)) is not None:
                    return batch, used
                batch, tries = int(batch * SMALLER), tries - 1
            return large, high
    return (0, 0) if (one := peak_of(1)) is None else (1, one)


def tried(cfg: Any, limit: int) -> Fits:
    """On a GPU, by real steps with known tokens, uncompiled: compiling at every size would take minutes."""
    device = torch.device("cuda")

    def peak_of(batch: int) -> int | None:
        def two_steps() -> None:
            bench = make_bench(cfg.model_copy(update={"batch_size": batch, "compile": False}))
            step = our_steps(bench)["ours_cached"]
            for number in range(2):
                step(make_batch(bench, number))

        try:
            return peak_bytes(device, two_steps)
        except torch.OutOfMemoryError:
            return None

    # This process gets no more of the GPU than that: as if it were a smaller one.
    share = limit / torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, share))
    try:
        return predicted(peak_of, limit)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def reckoned(cfg: Any, limit: int) -> Fits:
    """Without computing: from what batches of 1 and 2 would keep, and the largest that comes and goes."""
    bench = make_bench(cfg.model_copy(update={"batch_size": 1}))
    one, two = kept(bench), kept(bench._replace(batch_size=2))
    each, fixed = two - one, 2 * one - two + state_bytes(bench.model)
    if cfg.activation_checkpointing:  # and what one block keeps while it is computed again
        bench.model.set_grad_checkpointing(False)
        each += (kept(bench) - one) // len(bench.model.blocks)
    each += 4 * bench.masking.max_patches * bench.model.vocab_size  # the largest gradient of all: of the logits
    batch = max(0, int((limit * (1 - WORKSPACE) - fixed) // each))
    return batch, fixed + batch * each


def kept(bench: Bench) -> int:
    """Bytes that the backward pass of a batch would need, from shapes alone: on fake tensors."""
    batch = make_batch(bench, 0)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, bench.precision():
        given = (batch.view, *(batch.ours[name] for name in ("mask", "mask_index", "tokens")))
        # Without drop path, which keeps next to nothing but looks at numbers.
        return kept_bytes(lambda: bench.module.objective(*map(mode.from_tensor, given)))


def bench_memory(cfg: Any) -> Results:
    """The largest batches of base and large; the experiment's own network shape is dropped, since it would win."""
    on_gpu, rows, found = wanted_gpu(cfg.trainer.accelerator), [], {}
    if cfg.bench.memory_gb is None and not on_gpu:
        raise UserError("bench memory on a CPU needs bench.memory_gb=, such as 24")
    limit = int(cfg.bench.memory_gb * GIB) if cfg.bench.memory_gb else torch.cuda.get_device_properties(0).total_memory
    for size in SIZES:
        for checkpointing in (False, True):
            shape = {name: value for name, value in to_dict(cfg.model).items() if name not in NETWORKS[size]}
            model = type(cfg.model)(**{**shape, "size": size})
            own = cfg.model_copy(update={"model": model, "activation_checkpointing": checkpointing})
            batch, used = (tried if on_gpu else reckoned)(own, limit)
            name = f"{size}{'_checkpointing' if checkpointing else ''}"
            found[name] = {"batch": batch, "used": used, "measured": on_gpu}
            way = "measured, uncompiled" if on_gpu else "reckoned"
            rows.append([size, "yes" if checkpointing else "no", str(batch), f"{used / GIB:.1f}", way])
    head = ("network", "activation checkpointing", "largest batch", "GiB", "how")
    about = {"memory_bytes": limit, "precision": cfg.trainer.precision}
    return [Block(head, rows)], {"bench": "memory", **about, **found}
