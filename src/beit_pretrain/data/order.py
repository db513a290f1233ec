"""The order of a run: which sample is at position k, and the random numbers of that position.

A run consumes positions 0, 1, 2, ...; everything about position k is a pure function of `(seed, manifest, k)`:

* the sample: every epoch permutes the shards, cuts their concatenation into `streams` equal parts, deals positions to
  the streams in turn, and shuffles each stream inside blocks (so reads stay close together, and a cache of remote
  shards stays small);
* crop, flip, jitter and mask: drawn from a counter-based generator keyed by `(seed, k)`.

So batches are bit-identical for any number of workers, processes and restarts, an epoch has every sample exactly once,
and resuming only needs the position. A global batch of size G holds positions [step * G, (step + 1) * G); rank r of W
takes every W-th of them, from the r-th on. These are whole streams if W divides `streams`.

`mixture.Mixture` mixes the orders of several data sets by weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

# Purposes of the counter-based generator. Each has its own numbers, so that an extra draw for the crop cannot change
# the mask.
VIEW, MASK, SHUFFLE_SHARDS, SHUFFLE_WINDOW, SHUFFLE_MIXTURE, CACHED_VIEW, MIX_STREAMS = range(7)


def generator(seed: int, position: int, purpose: int) -> np.random.Generator:
    """The random numbers of one position for one purpose (Philox: counter-based, equal on every machine)."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, position], np.uint64), counter=[0, 0, 0, purpose]))


def permutation(count: int, seed: int, position: int, purpose: int) -> np.ndarray:
    """An order of 0 ... count - 1, int64 (count,): the same under every version of NumPy."""
    # Sorts raw draws: NumPy guarantees these across versions, but not the result of Generator.permutation.
    return np.argsort(generator(seed, position, purpose).bit_generator.random_raw(count), kind="stable")


class MethodCache:
    """`lru_cache` of a method or function, as an attribute; pickled with its object, it starts empty."""

    def __init__(self, function: Callable, maxsize: int):
        self.function, self.maxsize = function, maxsize
        self._cached = lru_cache(maxsize)(function)

    def __call__(self, *arguments: Any) -> Any:
        return self._cached(*arguments)

    def __reduce__(self) -> tuple:  # the cached results are not pickled
        return MethodCache, (self.function, self.maxsize)


class Sample(NamedTuple):
    """A sample's address: number of its shard in the manifest, and row in that shard's index."""

    shard: int
    row: int


class Order:
    """The order of a run over shards of the given sizes.

    Args:
        block_size: samples that are shuffled together (a few shards). Two shuffled blocks per stream stay in
            memory, with 8 bytes a sample.
        streams: number of streams (up to 4096); at most one per shard is used.
        shuffle: False keeps the order of the shards in every epoch (validation).
    """

    def __init__(self, sizes: list[int], seed: int = 0, block_size: int = 1, streams: int = 1, shuffle: bool = True):
        if not sizes or min(sizes) < 0 or sum(sizes) == 0:
            raise ValueError("an order needs at least one sample")
        self.sizes = np.asarray(sizes, np.int64)
        self.seed, self.block_size, self.shuffle = seed, block_size, shuffle
        self.samples = int(self.sizes.sum())
        self.streams = max(1, min(streams, len(sizes))) if shuffle else 1
        self._shards_of_epoch = MethodCache(self._permute_shards, 2)
        self._window = MethodCache(permutation, 2 * self.streams)

    def sample_at(self, position: int) -> Sample:
        """The sample at `position` (>= 0; epoch e holds positions [e * samples, (e + 1) * samples))."""
        return Sample(*self.samples_at(range(position, position + 1))[0].tolist())

    def samples_at(self, positions: range | np.ndarray) -> np.ndarray:
        """Addresses (n, 2) int64, shard and row, of the samples at n positions."""
        epoch, k = np.divmod(np.asarray(positions, np.int64), self.samples)
        if self.shuffle:
            k = self._unshuffled(epoch, k)
        else:
            epoch = np.zeros_like(epoch)
        addresses = np.empty((len(k), 2), np.int64)
        for number in np.unique(epoch):
            here = epoch == number
            shards, ends = self._shards_of_epoch(int(number))
            i = np.searchsorted(ends, k[here], side="right")
            addresses[here, 0] = shards[i]
            addresses[here, 1] = k[here] - (ends[i] - self.sizes[shards[i]])
        return addresses

    def epoch_of(self, position: int) -> int:
        """How often the sample at `position` has been used before."""
        return position // self.samples if self.shuffle else 0

    def upcoming_shards(self, position: int, rank: int = 0, world: int = 1, windows: int = 2) -> list[int]:
        """Shards that `rank` of `world` reads in its current blocks at `position`, then in the following ones.

        `windows`: number of blocks per stream.
        """
        first = position + (rank - position) % world
        one_of_each_stream = range(first, first + math.lcm(self.streams, world), world)
        found: dict[int, None] = {}  # an ordered set
        for number in range(windows):
            for k in one_of_each_stream:
                epoch, k = divmod(k + number * self.block_size * self.streams, self.samples)
                stream, window = k % self.streams, k // self.streams // self.block_size
                start, length = (int(v) for v in self._stream(np.asarray(stream)))
                begin, end = window * self.block_size, min((window + 1) * self.block_size, length)
                shards, ends = self._shards_of_epoch(epoch if self.shuffle else 0)
                i, j = np.searchsorted(ends, [start + begin, start + end - 1], side="right")
                found |= dict.fromkeys(shards[i : j + 1].tolist())
        return [shard for shard in found if self.sizes[shard]]

    def _stream(self, stream: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Start of streams in the epoch's concatenation, and their lengths."""
        # The first `samples % streams` streams are one sample longer than the others.
        base, longer = divmod(self.samples, self.streams)
        return stream * base + np.minimum(stream, longer), base + (stream < longer)

    def _unshuffled(self, epoch: np.ndarray, k: np.ndarray) -> np.ndarray:
        """Index, in each epoch's concatenation of shards, of the k-th samples of the epochs."""
        stream, k = k % self.streams, k // self.streams
        start, length = self._stream(stream)
        number, offset = np.divmod(k, self.block_size)
        begin = number * self.block_size
        # Epoch, stream and block share one 64-bit half of the key: 24, 12 and 28 bits.
        key = (epoch << 40) | (stream << 28) | number
        moved = np.empty_like(offset)
        for window in np.unique(key):
            here = np.flatnonzero(key == window)
            count = int(min(self.block_size, length[here[0]] - begin[here[0]]))
            moved[here] = self._window(count, self.seed, int(window) % 2**64, SHUFFLE_WINDOW)[offset[here]]
        return start + begin + moved

    def _permute_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Shards in the epoch's order, and the end of each in the concatenation."""
        count = len(self.sizes)
        shards = permutation(count, self.seed, epoch, SHUFFLE_SHARDS) if self.shuffle else np.arange(count)
        return shards, np.cumsum(self.sizes[shards])
