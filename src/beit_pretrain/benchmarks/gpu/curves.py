"""The stage `curves`: the loss over some hundred steps on the fast and on the plain path, same weights, same data.

Images are smooth and their tokens follow from the colours, so there is something to learn. Both paths drop the same
branches. A second run of the fast path on other data shows how far two curves differ by chance (`noise`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit_pretrain.benchmarks.gpu.plan import Setup
from beit_pretrain.benchmarks.inputs import Bench, make_masks
from beit_pretrain.benchmarks.peers import PlainModel, learn
from beit_pretrain.benchmarks.report import Report
from beit_pretrain.benchmarks.step import SPARE, take_step
from beit_pretrain.transforms.jitter import normalise

RATE, WARM_UP = 5e-4, 20  # learning rate of these small batches, and the steps until it is reached
LEVELS = 8  # of each colour that tokens tell apart
MASKS = 8  # different batches of masks
LAST = 20  # steps of which the mean loss is reported

Batch = dict[str, Tensor]  # as of a loader, and the `view` (B, C, H, W) in [0, 1]
Path = tuple[Callable[[Batch], Tensor], torch.optim.Optimizer]  # a step, which gives the loss before it


def curves(setup: Setup, report: Report) -> None:
    """Losses of the fast and the plain path on the same data, and of the fast one on other data."""
    bench = setup.bench(report, "base", f"optim.lr={RATE}")
    start = {name: tensor.clone() for name, tensor in bench.model.state_dict().items()}
    losses: dict[str, list[float]] = {}
    for name, path, seed in (("fast", fast_path, 0), ("plain", plain_path, 0), ("fast, other data", fast_path, 1)):
        with report.part(name):
            bench.model.load_state_dict(start)
            losses[name] = trained(setup, bench, path(bench), seed)
            report(losses={name: losses[name]}, last_losses={name: float(np.mean(losses[name][-LAST:]))})
    found = differences(losses)
    report(**found)
    report.write(headline=", ".join(f"{name} {each['mean_size']:.2g}" for name, each in found.items()))


def differences(losses: dict[str, list[float]]) -> dict[str, Any]:
    """Mean and largest difference from the fast path over the second half: of the plain path, and of other data."""
    fast = losses.get("fast", [])
    found: dict[str, Any] = {}
    for name, label in (("plain", "difference"), ("fast, other data", "noise")):
        steps = min(len(fast), len(losses.get(name, [])))
        if steps > 1:
            gap = np.array(losses[name][steps // 2 : steps]) - np.array(fast[steps // 2 : steps])
            found[label] = {"mean": gap.mean(), "mean_size": abs(gap).mean(), "largest": abs(gap).max()}
    return found


def trained(setup: Setup, bench: Bench, path: Path, seed: int) -> list[float]:
    """Losses of all steps, or of those for which there is time."""
    step, optimizer = path
    found: list[Tensor] = []
    for number, batch in zip(range(setup.sizes.curve), stream(bench, seed), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (number + 1) / WARM_UP)
        found.append(step(batch))
        if number % 10 == 9 and setup.left() < SPARE:
            break
    return torch.stack(found).tolist()


def stream(bench: Bench, seed: int) -> Iterator[Batch]:
    """An endless stream of batches, determined by the seed."""
    rng = torch.Generator(bench.device).manual_seed(seed)
    masks = [make_masks(bench, MASKS * seed + number) for number in range(MASKS)]
    patch, number = bench.model.config["patch_size"], 0
    while True:
        view = smooth_images(bench, patch, rng)
        colour = (F.avg_pool2d(view, patch) * LEVELS).long().clamp_(max=LEVELS - 1).flatten(2)
        places = LEVELS ** torch.arange(min(3, view.shape[1]), device=bench.device).view(-1, 1)
        tokens = (colour[:, :3] * places).sum(1) % bench.tokenizer.vocab_size
        mask, index = (tensor.to(bench.device) for tensor in masks[number % MASKS])
        positions = torch.arange(bench.batch_size, device=bench.device) + number * bench.batch_size
        yield {"mask": mask, "mask_index": index, "view": view, "tokens": tokens, "position": positions}
        number += 1


def smooth_images(bench: Bench, patch: int, rng: torch.Generator) -> Tensor:
    """Images (B, C, H, W) in [0, 1] of smooth colour gradients, channels last as from a loader."""
    coarse = torch.rand((bench.batch_size, bench.model.config["in_chans"], 4, 4), generator=rng, device=bench.device)
    size = [side * patch for side in bench.model.grid]
    image = F.interpolate(coarse, size, mode="bicubic", align_corners=False).clamp_(0, 1)
    return image.contiguous(memory_format=torch.channels_last)


def fast_path(bench: Bench) -> Path:
    optimizer = bench.optimizer()

    def step(batch: Batch) -> Tensor:
        found = take_step(bench, optimizer, batch, batch["view"], batch["tokens"])
        return (found.loss_sum / found.masked).detach()

    return step, optimizer


def plain_path(bench: Bench) -> Path:
    """The release's step, uncompiled, from the same weights."""
    network = PlainModel(bench.model).to(bench.device).train()
    block: Any
    for number, block in enumerate(network.body.blocks):
        for place, name in enumerate(("drop_path1", "drop_path2")):
            if rate := float(getattr(getattr(block, name), "drop_prob", 0.0) or 0.0):
                setattr(block, name, GivenDrop(rate, 2 * number + place))
    optimizer = bench.optimizer(network)

    def step(batch: Batch) -> Tensor:
        GivenDrop.uniform_BR = bench.module.drop_path_noise(batch)
        image = normalise(batch["view"], bench.module.mean, bench.module.std)
        return learn(bench, network, optimizer, image, batch["mask"], batch["tokens"][batch["mask"]])

    return step, optimizer


class GivenDrop(nn.Module):
    """Drop path of one residual branch that takes its random numbers `uniform_BR` in [0, 1) from our network."""

    uniform_BR: Tensor | None = None  # of all branches

    def __init__(self, rate: float, branch: int):
        super().__init__()
        self.rate, self.branch = rate, branch

    def forward(self, x: Tensor) -> Tensor:
        assert self.uniform_BR is not None
        keep_B = (self.uniform_BR[:, self.branch] >= self.rate) / (1 - self.rate)
        return x * keep_B.to(x.dtype).view(-1, *[1] * (x.ndim - 1))
