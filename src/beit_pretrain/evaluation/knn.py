"""Weighted kNN on frozen features (Wu et al. 2018, section 3.4) for several k and temperatures.

Shapes: Q queries, M images of the bank, D width, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch.nn.functional as F
from torch import Tensor

QUERIES = 256  # compared with the bank at once
TEMPERATURE = 0.07


def sweep(
    bank_MD: Tensor,
    bank_labels_M: Tensor,
    queries_QD: Tensor,
    labels_Q: Tensor,
    classes: int,
    ks: Sequence[int],
    temperatures: Sequence[float],
) -> dict[tuple[int, float], float]:
    """Top-1 accuracy of the kNN vote for every (k, temperature); see `votes`."""
    hits = dict.fromkeys(((k, t) for k in ks for t in temperatures), 0)
    for some, found in votes(bank_MD, bank_labels_M, queries_QD, classes, ks, temperatures):
        for pair, label in found.items():
            hits[pair] += int((label == labels_Q[some]).sum())
    return {pair: count / len(queries_QD) for pair, count in hits.items()}


def votes(
    bank_MD: Tensor,
    bank_labels_M: Tensor,
    queries_QD: Tensor,
    classes: int,
    ks: Sequence[int],
    temperatures: Sequence[float],
) -> Iterator[tuple[slice, dict[tuple[int, float], Tensor]]]:
    """The classes of some queries after the others, for every (k, temperature).

    A neighbour's vote has weight exp(cosine / temperature). The bank's mean is subtracted from all features first: this
    common part would dominate the cosine. A `k` larger than the bank uses the whole bank.
    """
    centre = bank_MD.mean(0)
    bank = F.normalize(bank_MD - centre, dim=1)
    for first in range(0, len(queries_QD), QUERIES):
        some = slice(first, first + QUERIES)
        query = F.normalize(queries_QD[some] - centre, dim=1)
        similarity, index = (query @ bank.T).topk(min(max(ks), len(bank)), dim=1)
        found = {}
        for k, temperature in ((k, t) for k in ks for t in temperatures):
            # Relative to the nearest neighbour: exp(1 / .01) overflows float32.
            weight = ((similarity[:, :k] - similarity[:, :1]) / temperature).exp()
            summed = weight.new_zeros(len(query), classes).scatter_add_(1, bank_labels_M[index[:, :k]], weight)
            found[k, temperature] = summed.argmax(1)
        yield some, found
