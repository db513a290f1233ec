"""The stage `curves`: the loss over some hundred steps on the fast and on the plain path, same weights, same data.

Images are smooth and their tokens follow from the colours, so there is something to learn. Both paths drop the same
branches. A second run of the fast path on other data says how far two curves are apart by chance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit_pretrain.benchmarks.gpu.report import Report
from beit_pretrain.benchmarks.gpu.setup import Setup
from beit_pretrain.benchmarks.gpu.step import SPARE
from beit_pretrain.benchmarks.inputs import Bench, configured, make_bench, make_masks
from beit_pretrain.benchmarks.peers import PlainModel
from beit_pretrain.benchmarks.step import backward, facts, forward
from beit_pretrain.transforms.jitter import normalise

RATE, WARM_UP = 5e-4, 20  # learning rate of these small batches, and the steps until it is reached
LEVELS = 8  # of each colour that tokens tell apart
MASKS = 8  # different batches of masks

Batch = dict[str, Tensor]  # as of a loader, and the `view` (B, C, H, W) in [0, 1]


class GivenDrop(nn.Module):
    """Drop path with decisions from outside: `keep_B`, 0 for a dropped branch, else 1 / (1 - rate)."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate
        self.keep_B: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        assert self.keep_B is not None
        return x * self.keep_B.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


def curves(setup: Setup, report: Report) -> None:
    """Losses of the fast and the plain path on the same data, and of the fast one on other data."""
    cfg = setup.config(f"batch_size={setup.sizes.base}", f"optim.lr={RATE}")
    bench = make_bench(cfg)
    report(about=facts(bench, cfg))
    start = {name: tensor.clone() for name, tensor in bench.module.model.state_dict().items()}
    losses: dict[str, list[float]] = {}
    for name, path, seed in (("fast", fast, 0), ("plain", plain, 0), ("fast, other data", fast, 1)):
        with report.part(name):
            losses[name] = trained(setup, bench, path(bench, start), seed)
            report(losses={name: losses[name]})
    report(**differences(losses))


def differences(losses: dict[str, list[float]]) -> dict[str, Any]:
    """Over the second half: how far the plain path is from the fast one, and other data from it."""
    fast = losses.get("fast", [])
    found: dict[str, Any] = {}
    for name, label in (("plain", "difference"), ("fast, other data", "noise")):
        steps = min(len(fast), len(losses.get(name, [])))
        if steps > 1:
            half = slice(steps // 2, steps)
            gap = np.array(losses[name][half]) - np.array(fast[half])
            sizes = abs(gap)
            found[label] = {"mean": gap.mean(), "mean_size": sizes.mean(), "largest": sizes.max()}
    return found


def trained(setup: Setup, bench: Bench, step: Callable[[Batch, float], Tensor], seed: int) -> list[float]:
    """Losses of the steps for which there is time."""
    found: list[Tensor] = []
    for number, batch in zip(range(setup.sizes.curve), stream(bench, seed), strict=False):
        found.append(step(batch, RATE * min(1.0, (number + 1) / WARM_UP)))
        if number % 10 == 9 and setup.left() < SPARE:
            break
    return torch.stack(found).tolist()


def stream(bench: Bench, seed: int) -> Iterator[Batch]:
    """Batches without end, the same for the same seed."""
    draw = torch.Generator(bench.device).manual_seed(seed)
    masks = [make_masks(bench, MASKS * seed + number) for number in range(MASKS)]
    (height, width), patch = bench.module.model.grid, bench.architecture["patch_size"]
    size = [height * patch, width * patch]
    number = 0
    while True:
        view = smooth_images(bench, size, draw)
        colour = (F.avg_pool2d(view, patch) * LEVELS).long().clamp_(max=LEVELS - 1).flatten(2)
        places = LEVELS ** torch.arange(min(3, view.shape[1]), device=bench.device).view(-1, 1)
        tokens = (colour[:, :3] * places).sum(1) % bench.tokenizer.vocab_size
        mask, index = (tensor.to(bench.device) for tensor in masks[number % MASKS])
        positions = torch.arange(bench.batch_size, device=bench.device) + number * bench.batch_size
        yield {"mask": mask, "mask_index": index, "view": view, "tokens": tokens, "position": positions}
        number += 1


def smooth_images(bench: Bench, size: list[int], draw: torch.Generator) -> Tensor:
    """Images (B, C, H, W) in [0, 1] of a few colours that run into each other, channels innermost as a loader's."""
    shape = (bench.batch_size, bench.architecture["in_chans"], 4, 4)
    coarse = torch.rand(shape, generator=draw, device=bench.device)
    image = F.interpolate(coarse, size, mode="bicubic", align_corners=False).clamp_(0, 1)
    return image.contiguous(memory_format=torch.channels_last)


def fast(bench: Bench, start: dict[str, Tensor]) -> Callable[[Batch, float], Tensor]:
    """Our step from these weights."""
    bench.module.model.load_state_dict(start)
    optimizer = configured(bench.module.model, bench.module.optim)

    def step(batch: Batch, rate: float) -> Tensor:
        found = forward(bench, batch, batch["view"], batch["tokens"])
        loss = (found.loss_sum / found.masked).detach().clone()
        backward(bench, batch, found)
        at_rate(optimizer, rate)
        return loss

    return step


def plain(bench: Bench, start: dict[str, Tensor]) -> Callable[[Batch, float], Tensor]:
    """The release's step, uncompiled, from the same weights."""
    network = PlainModel(bench.architecture, bench.tokenizer.vocab_size, fused=False, all_patches=False)
    renamed = {n if n.startswith(("mask_token", "lm_head")) else f"body.{n}": tensor for n, tensor in start.items()}
    network.load_state_dict(renamed)
    network.to(bench.device).train()
    drops = with_given_drops(network)
    optimizer = configured(network, bench.module.optim)

    def step(batch: Batch, rate: float) -> Tensor:
        uniform_BR = bench.module.drop_path_noise(batch)
        for place, drop in enumerate(drops):
            if drop is not None and uniform_BR is not None:
                drop.keep_B = (uniform_BR[:, place] >= drop.rate) / (1 - drop.rate)
        image = normalise(batch["view"], bench.module.mean, bench.module.std)
        with bench.precision():
            loss = network(image, batch["mask"], batch["tokens"][batch["mask"]])
        loss.backward()
        if bench.module.optim.clip is not None:
            nn.utils.clip_grad_norm_(network.parameters(), bench.module.optim.clip)
        at_rate(optimizer, rate)
        return loss.detach()

    return step


def with_given_drops(network: PlainModel) -> list[GivenDrop | None]:
    """Put `GivenDrop` in place of timm's drop path. Those of all branches, in order; None where nothing is dropped."""
    drops: list[GivenDrop | None] = []
    block: Any
    for block in network.body.blocks:
        for name in ("drop_path1", "drop_path2"):
            rate = float(getattr(getattr(block, name), "drop_prob", 0.0) or 0.0)
            drops.append(GivenDrop(rate) if rate else None)
            if rate:
                setattr(block, name, drops[-1])
    return drops


def at_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Take the optimiser's step at a learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()
