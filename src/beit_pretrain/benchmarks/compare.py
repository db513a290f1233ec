"""Two things measured in turn: how many times as fast one is, with an interval that assumes nothing of the noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.95
FEWEST = 6  # pairs, of which the smallest and the largest ratio make an interval of this confidence


class Ratio(NamedTuple):
    """Median of the ratios of pairs, and an interval that holds the true median with a confidence of 95 %.

    Of fewer than `FEWEST` pairs it is their range, which holds it with less.
    """

    median: float
    low: float
    high: float
    pairs: int

    @property
    def interval(self) -> str:
        """What `low` and `high` are, for the head of a table."""
        return "95 % interval" if self.pairs >= FEWEST else "range"


def compared(slow: Sequence[float], fast: Sequence[float]) -> Ratio:
    """Seconds of pairs, taken one after the other -> how many times as fast the second is.

    The interval is between order statistics of the ratios (exact for any distribution); of fewer than `FEWEST`
    pairs it is all of them, which says less than 95 %.
    """
    ratios = np.sort(np.asarray(slow, float) / np.asarray(fast, float))
    outside = coin_quantile((1 - CONFIDENCE) / 2, len(ratios))
    low, high = max(0, outside - 1), min(len(ratios) - 1, len(ratios) - outside)
    return Ratio(float(np.median(ratios)), float(ratios[low]), float(ratios[high]), len(ratios))


def coin_quantile(share: float, flips: int) -> int:
    """The smallest k for which k heads or fewer of so many flips of a coin have a probability of at least `share`."""
    below, heads = 1, 0  # of the 2^flips outcomes, those with so many heads or fewer
    while below < share * 2**flips:
        heads += 1
        below += math.comb(flips, heads)
    return heads
