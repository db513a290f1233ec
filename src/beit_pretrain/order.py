"""Which sample stands at position k of a run, and the randomness that belongs to it.

A run consumes positions 0, 1, 2, ...; everything about position k is a pure function of `(seed, manifest, k)`:

* the sample: every epoch permutes the shards, cuts their concatenation into `streams` equal runs of samples, deals
  positions to the streams in turn, and shuffles each stream inside windows (so reads stay near one another and a
  cache of remote shards stays small);
* crop, flip, jitter and mask: drawn from a counter-based generator keyed by `(seed, k)`.

So batches are bit-identical whatever the number of workers, processes or restarts, an epoch has every sample exactly
once, and resuming is arithmetic. A global batch of G holds positions [step * G, (step + 1) * G); of these rank r of W
takes every W-th, beginning with the r-th, which are whole streams when W divides `streams`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from beit_pretrain.errors import UserError

# What the counter-based generator is drawn for: a purpose of its own for each, so that one more draw for the crop
# can never move the mask.
VIEW, MASK, SHUFFLE_SHARDS, SHUFFLE_WINDOW = range(4)


def generator(seed: int, position: int, purpose: int) -> np.random.Generator:
    """The random numbers of one position for one purpose (Philox: counter-based, equal on every machine)."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, position], np.uint64), counter=[0, 0, 0, purpose]))


class Sample(NamedTuple):
    """A sample's address: number of its shard in the manifest, and its row in the index of the shard."""

    shard: int
    row: int


class Order:
    """The order of a run over shards of the given sizes.

    Args:
        sizes: samples of each shard, in the manifest's order.
        seed: the run's seed.
        window: samples that are shuffled among each other (a few shards' worth). Two shuffled windows per
            stream are kept in memory: 8 bytes a sample.
        streams: canonical streams (up to 4096); at most one per shard are used.
        shuffle: False gives the samples as they stand in the shards, every epoch alike (validation).
    """

    def __init__(self, sizes: list[int], seed: int = 0, window: int = 4096, streams: int = 64, shuffle: bool = True):
        if not sizes or min(sizes) < 0 or sum(sizes) == 0:
            raise ValueError("an order needs at least one sample")
        if window < 1 or not 1 <= streams <= 4096:
            raise UserError(f"data.window={window} must be 1 or more, data.streams={streams} between 1 and 4096")
        self.sizes = np.asarray(sizes, np.int64)
        self.seed, self.window, self.shuffle = seed, window, shuffle
        self.samples = int(self.sizes.sum())
        self.streams = max(1, min(streams, len(sizes))) if shuffle else 1
        self._shards_of_epoch = lru_cache(maxsize=2)(self._permute_shards)
        self._window = lru_cache(maxsize=2 * self.streams)(self._permute_window)

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k not in ("_shards_of_epoch", "_window")}

    def __setstate__(self, state: dict) -> None:  # caches cannot travel to a spawned worker: it starts with empty ones
        self.__dict__.update(state)
        self._shards_of_epoch = lru_cache(maxsize=2)(self._permute_shards)
        self._window = lru_cache(maxsize=2 * self.streams)(self._permute_window)

    def sample_at(self, position: int) -> Sample:
        """The sample at `position` (>= 0, endless: epoch e holds positions [e * samples, (e + 1) * samples))."""
        epoch, k = divmod(position, self.samples)
        if self.shuffle:
            stream, k = k % self.streams, k // self.streams
            # The first `samples % streams` streams are one sample longer than the others.
            base, longer = divmod(self.samples, self.streams)
            start = stream * base + min(stream, longer)
            length = base + (stream < longer)
            number, offset = divmod(k, self.window)
            begin = number * self.window
            k = start + begin + int(self._window(epoch, stream, number, min(self.window, length - begin))[offset])
        shards, ends = self._shards_of_epoch(epoch if self.shuffle else 0)
        i = int(np.searchsorted(ends, k, side="right"))
        shard = int(shards[i])
        return Sample(shard, int(k - (ends[i] - self.sizes[shard])))

    def _permute_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Shards in the epoch's order, and where each ends in the concatenation."""
        shards = np.arange(len(self.sizes))
        if self.shuffle:
            generator(self.seed, epoch, SHUFFLE_SHARDS).shuffle(shards)
        return shards, np.cumsum(self.sizes[shards])

    def _permute_window(self, epoch: int, stream: int, number: int, length: int) -> np.ndarray:
        # Epoch, stream and window share the 64-bit half of the key: 24, 12 and 28 bits of it.
        key = (epoch << 40) | (stream << 28) | number
        return generator(self.seed, key, SHUFFLE_WINDOW).permutation(length)


def positions(step: int, rank: int, world: int, global_batch: int) -> range:
    """Positions that `rank` of `world` processes consumes in global step `step`."""
    if global_batch % world:
        raise ValueError(f"the global batch {global_batch} cannot be dealt evenly to {world} processes")
    return range(step * global_batch + rank, (step + 1) * global_batch, world)
