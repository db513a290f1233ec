"""Mixes several data sets by weights: maps position k to a data set and a position in that data set's order.

Positions are cut into blocks. In every block each data set has the same number of places, proportional to its weight
and shuffled by a generator keyed by (seed, block). So the mixture is a pure function of the position, counts are exact
at every block's end, and each data set follows its own order: every sample once before any is repeated.

An epoch of a mixture has as many positions as all data sets have samples: a data set of N_d samples and weight w_d is
seen w_d * sum(N) / N_d times in it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from beit_pretrain.data.order import SHUFFLE_MIXTURE, MethodCache, Order, Sample, permutation
from beit_pretrain.errors import UserError

PARTS = 10_000  # other weights than simple fractions are rounded to multiples of 1 / PARTS
BLOCK = 256  # smallest number of positions of a block


class Mixture:
    """The order of a run over several data sets. Shards are numbered consecutively, in the order of the data sets.

    `weights`: shares of the positions, of any sum. Raises UserError if there is not one usable weight per data set.
    """

    def __init__(self, orders: Sequence[Order], weights: Sequence[float], seed: int = 0):
        self.orders, self.seed = list(orders), seed
        self.counts = shares(weights, len(orders))
        self.block = int(self.counts.sum())
        self.samples = sum(order.samples for order in orders)
        self._first_shard = np.cumsum([0] + [len(order.sizes) for order in orders])
        self._pattern = MethodCache(self._shuffled, 64)

    def sample_at(self, position: int) -> Sample:
        return Sample(*self.samples_at(range(position, position + 1))[0].tolist())

    def samples_at(self, positions: range | np.ndarray) -> np.ndarray:
        dataset, own = self.places(positions)
        addresses = np.empty((len(own), 2), np.int64)
        for number in np.unique(dataset):
            here = dataset == number
            addresses[here] = self.orders[number].samples_at(own[here])
            addresses[here, 0] += self._first_shard[number]
        return addresses

    def epoch_of(self, position: int) -> int:
        dataset, own = self.places(range(position, position + 1))
        return int(own[0]) // self.orders[int(dataset[0])].samples

    def places(self, positions: range | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Index of the data set of each position, and the position in that data set's order."""
        block, offset = np.divmod(np.asarray(positions, np.int64), self.block)
        dataset, own = np.empty_like(block), np.empty_like(block)
        for number in np.unique(block):
            here = block == number
            of_place, before = self._pattern(int(number))
            dataset[here] = of_place[offset[here]]
            own[here] = number * self.counts[dataset[here]] + before[offset[here]]
        return dataset, own

    def upcoming_shards(self, position: int, rank: int = 0, world: int = 1, windows: int = 2) -> list[int]:
        """Shards that are read soon, the same for all ranks: any rank can get any place of a data set."""
        block, offset = divmod(position, self.block)
        passed = self._pattern(block)[0][:offset]
        ahead = []
        for number, (order, first) in enumerate(zip(self.orders, self._first_shard.tolist())):
            own = block * int(self.counts[number]) + int((passed == number).sum())
            ahead += [first + shard for shard in order.upcoming_shards(own, windows=windows)]
        return ahead

    def _shuffled(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Data set of each place of a block, and the number of earlier places of that data set in the block."""
        places = permutation(self.block, self.seed, block, SHUFFLE_MIXTURE)
        dataset = np.repeat(np.arange(len(self.counts)), self.counts)[places]
        before = np.empty_like(dataset)
        for number, count in enumerate(self.counts):
            before[dataset == number] = np.arange(count)
        return dataset, before


def shares(weights: Sequence[float], datasets: int) -> np.ndarray:
    """Places (datasets,) int64 of each data set in a block. Raises UserError as `Mixture` does."""
    if len(weights) != datasets:
        raise UserError(f"data.weights has {len(weights)} numbers for {datasets} data sets in data.train")
    exact = np.asarray(weights, np.float64) / np.sum(weights)
    for parts in range(1, PARTS + 1):
        counts = np.rint(exact * parts).astype(np.int64)
        if np.abs(counts - exact * parts).max() < 1e-9 * parts:
            break
    else:  # largest-remainder rounding
        counts = np.floor(exact * PARTS).astype(np.int64)
        counts[np.argsort(counts - exact * PARTS, kind="stable")[: PARTS - counts.sum()]] += 1
    if counts.min() < 1:
        raise UserError(f"data.weights={list(weights)}: a data set has less than 1 of {PARTS:,} parts")
    return counts * -(-BLOCK // int(counts.sum()))
