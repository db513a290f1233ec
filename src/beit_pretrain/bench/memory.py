"""`bench memory`: the largest batch of a process, with and without activation checkpointing.

On a GPU batches are tried, larger and larger, until one does not fit. Elsewhere it is reckoned, without computing
anything: weights, gradients and moments, and what a forward pass keeps, which grows with the batch in a straight line.
"""

from __future__ import annotations

import gc
import json
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf
from torch._subclasses.fake_tensor import FakeTensorMode

from beit_pretrain.bench.cost import kept_bytes, state_bytes
from beit_pretrain.bench.inputs import Bench, make_batch, make_bench
from beit_pretrain.bench.step import our_steps
from beit_pretrain.errors import UserError
from beit_pretrain.networks.backbone import SIZES as NETWORKS
from beit_pretrain.runs.trainer import wanted_gpu
from beit_pretrain.tables import table

SIZES = ("base", "large")
MOST = 1 << 14  # images of a batch
GIB = 2**30
WORKSPACE = 0.05  # of the memory: what is left for kernels' own needs where the batch is reckoned


class Fits(NamedTuple):
    """The largest batch, and what it takes in bytes."""

    batch: int
    used: int
    measured: bool


def largest(fits: Any, most: int = MOST) -> int:
    """The largest number for which `fits` holds, which holds for all below it; 0 if for none."""
    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, high * 2
    while high - low > max(1, low // 16):  # within a sixteenth
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def tried(cfg: DictConfig, limit: int) -> Fits:
    """On a GPU, by real steps with known tokens. A batch fits if two steps go through below `limit` bytes."""
    peaks: dict[int, int] = {}

    def fits(batch: int) -> bool:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        try:
            bench = make_bench(with_batch(cfg, batch))
            step = our_steps(bench)["ours_cached"]
            for number in range(2):
                step(make_batch(bench, number))
            bench.wait()
        except torch.OutOfMemoryError:
            return False
        peaks[batch] = torch.cuda.max_memory_reserved()
        return peaks[batch] <= limit

    batch = largest(fits)
    return Fits(batch, peaks.get(batch, 0), True)


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
            way = "measured" if fits.measured else "reckoned"
            rows.append([size, how, str(fits.batch), f"{fits.used / GIB:.1f}", way])
    print(table(["network", "activation checkpointing", "largest batch", "GiB", "how"], rows))
    print(json.dumps({"bench": "memory", "memory_bytes": limit, "precision": cfg.trainer.precision, **found}))
