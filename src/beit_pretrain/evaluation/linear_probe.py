"""Linear classifiers on stored features, of all layers at once (RECIPE section 6, on fixed views).

Shapes: n images, B batch, L layers, F features of a layer, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from beit_pretrain.engine.optim import learning_rate
from beit_pretrain.evaluation.features import FeatureStore


class LinearProbes(nn.Module):
    """A linear classifier for each layer, on features that are shifted and scaled by fixed numbers.

    The shift and the scale, those of the training images, only speed up the training: they could be multiplied into
    the classifier, which is as linear in the raw features as one without them.
    """

    def __init__(self, mean_LF: Tensor, std_LF: Tensor, classes: int):
        super().__init__()
        self.mean_LF, self.scale_LF = mean_LF, 1 / std_LF.clamp(min=1e-6)
        layers, width = mean_LF.shape
        self.weight_LFK = nn.Parameter(torch.randn(layers, width, classes, device=mean_LF.device) * 0.01)
        self.bias_LK = nn.Parameter(torch.zeros(layers, classes, device=mean_LF.device))

    def forward(self, x_BLF: Tensor) -> Tensor:
        """Logits (L, B, K)."""
        x_LBF = ((x_BLF - self.mean_LF) * self.scale_LF).transpose(0, 1)
        return torch.baddbmm(self.bias_LK.unsqueeze(1), x_LBF, self.weight_LFK)


def vectors(features_nL2D: np.ndarray, pool: str, device: torch.device) -> Tensor:
    """(n, L, F) float32: [CLS] beside the mean of the patches for "cls_avg", else one of them."""
    chosen = {"cls": features_nL2D[:, :, :1], "avg": features_nL2D[:, :, 1:], "cls_avg": features_nL2D}[pool]
    return torch.from_numpy(np.array(chosen)).to(device).flatten(2).float()


def moments(stored: FeatureStore, pool: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (L, F) over the images."""
    total = squares = torch.zeros((), dtype=torch.float64, device=device)
    for part in np.array_split(np.arange(len(stored.labels)), -(-len(stored.labels) // 1024)):
        x = vectors(stored.features[part[0] : part[-1] + 1], pool, device).double()
        total, squares = total + x.sum(0), squares + x.square().sum(0)
    mean = total / len(stored.labels)
    return mean.float(), (squares / len(stored.labels) - mean.square()).clamp(min=0).sqrt().float()


def slices(images: int, batch: int, rng: np.random.Generator) -> Iterator[tuple[int, int]]:
    """An epoch's batches as runs of neighbours, from another offset each time, in random order.

    Shards stand in a random order over the whole set, so neighbours are a fair sample, and a run is read at once.
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
) -> LinearProbes:
    """AdamW with a cosine to 0 on the images that have a class; no layer's probe sees another's gradient."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    probes = LinearProbes(*moments(stored, pool, device), classes)
    optimizer = torch.optim.AdamW(probes.parameters(), lr=lr, weight_decay=weight_decay)
    images = len(stored.labels)
    total, step = epochs * -(-images // batch), 0
    for _ in tqdm(range(epochs), desc="linear probes", unit="epoch"):
        for first, last in slices(images, batch, rng):
            optimizer.param_groups[0]["lr"] = learning_rate(min(step, total), total, 0, lr, 0.0)
            label = torch.from_numpy(stored.labels[first:last]).to(device)
            logits_LBK = probes(vectors(stored.features[first:last], pool, device))
            losses = [F.cross_entropy(logits, label, ignore_index=-1, reduction="sum") for logits in logits_LBK]
            loss = torch.stack(losses).sum() / batch
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    return probes


@torch.no_grad()
def accuracy(probes: LinearProbes, stored: FeatureStore, pool: str, device: torch.device) -> list[float]:
    """Top-1 accuracy of every layer over the images that have a class."""
    hits, counted = torch.zeros(len(probes.bias_LK), device=device), int((stored.labels >= 0).sum())
    for first in range(0, len(stored.labels), 1024):
        label = torch.from_numpy(stored.labels[first : first + 1024]).to(device)
        found = probes(vectors(stored.features[first : first + 1024], pool, device)).argmax(-1)
        hits += ((found == label) & (label >= 0)).sum(1)
    return (hits / counted).tolist()
