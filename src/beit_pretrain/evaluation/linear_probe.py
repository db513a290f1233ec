"""Trains and evaluates linear probes of all layers at once on stored features (the verb `probe`).

Shapes: L layers, D width, F features of a layer, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from beit_pretrain.evaluation.features import FeatureStore
from beit_pretrain.models.linear_probe import LayerProbes, losses_and_hits

IMAGES = 1024  # read at once in evaluation


def moments(stored: FeatureStore, pool: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (L, F) of the pooled features over the images."""
    total = squares = torch.zeros((), dtype=torch.float64, device=device)
    for first in range(0, len(stored.labels), IMAGES):
        part = torch.from_numpy(np.array(stored.features[first : first + IMAGES])).to(device).double()
        total, squares = total + part.sum(0), squares + part.square().sum(0)
    mean_L2D = total / len(stored.labels)
    std_L2D = (squares / len(stored.labels) - mean_L2D.square()).clamp(min=0).sqrt()
    chosen = {"cls": slice(0, 1), "avg": slice(1, 2), "cls_avg": slice(0, 2)}[pool]
    return mean_L2D[:, chosen].flatten(1).float(), std_L2D[:, chosen].flatten(1).float()


def slices(images: int, batch: int, rng: np.random.Generator) -> Iterator[tuple[int, int]]:
    """An epoch's batches as contiguous slices (first, last), with a random offset and in random order.

    Shards are already shuffled, so a slice is a random sample, and it needs only one read.
    """
    edges = [0, *range(int(rng.integers(1, batch + 1)), images, batch), images]
    for i in rng.permutation(len(edges) - 1):
        yield edges[i], edges[i + 1]


def train_probes(
    stored: FeatureStore,
    classes: int,
    pool: str,
    epochs: int,
    batch: int,
    lr: float,
    weight_decay: float,
    seed: int,
    device: torch.device,
) -> LayerProbes:
    """Train with AdamW and cosine decay to 0 on the images with a class; each probe gets only its own gradient."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    images, layers, _, width = stored.features.shape
    probes = LayerProbes(range(1, layers + 1), width, classes, pool, *moments(stored, pool, device)).to(device)
    optimizer = torch.optim.AdamW(probes.parameters(), lr=lr, weight_decay=weight_decay)
    total, step = epochs * -(-images // batch), 0
    for _ in tqdm(range(epochs), desc="linear probes", unit="epoch"):
        for first, last in slices(images, batch, rng):
            optimizer.param_groups[0]["lr"] = 0.5 * lr * (1 + math.cos(math.pi * min(1.0, step / total)))
            losses, _ = losses_and_hits(*forward(probes, stored, first, last, device))
            optimizer.zero_grad()
            (losses.sum() / batch).backward()
            optimizer.step()
            step += 1
    return probes


@torch.no_grad()
def accuracy(probes: LayerProbes, stored: FeatureStore, device: torch.device) -> list[float]:
    """Top-1 accuracy of every layer over the images that have a class."""
    images, counted = len(stored.labels), int((stored.labels >= 0).sum())
    spans = [(first, min(first + IMAGES, images)) for first in range(0, images, IMAGES)]
    hits = torch.stack([losses_and_hits(*forward(probes, stored, *span, device))[1] for span in spans])
    return (hits.sum(0) / counted).tolist()


def forward(
    probes: LayerProbes, stored: FeatureStore, first: int, last: int, device: torch.device
) -> tuple[list[Tensor], Tensor]:
    """Logits of every layer, and labels, of images `first` to `last` (exclusive)."""
    return probes(stored.batch(first, last, device)), torch.from_numpy(stored.labels[first:last]).to(device)
