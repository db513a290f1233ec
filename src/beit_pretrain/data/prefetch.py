"""Fetching remote shards before they are needed: a thread in each loader worker.

The order says which shards the next windows read. Each worker's thread takes its share of them, so that a process has
as many transfers at once as workers, and renews what is here already, so that what is needed again stays in the cache.
"""

from __future__ import annotations

import threading
import time
from typing import Protocol

from torch.utils.data import get_worker_info

from beit_pretrain.data.reader import ShardReader

ROUND = 5.0  # seconds between two looks at what is needed
AFTER_FAILURE = 60.0  # seconds in which a shard that failed is left to whoever needs it


class Wanted(Protocol):
    """Which shards are needed soon (`order.Order`, `mixture.Mixture`)."""

    def upcoming_shards(self, position: int, rank: int = 0, world: int = 1, windows: int = 2) -> list[int]: ...


class ShardPrefetcher:
    """The thread of one worker; it ends when this object does.

    Args:
        reader, order: of the training images.
        rank, world: of the training process.
        position: where the run begins.
    """

    def __init__(self, reader: ShardReader, order: Wanted, rank: int, world: int, position: int):
        worker = get_worker_info()
        share = (worker.id, worker.num_workers) if worker else (0, 1)
        self._state = _State(position)
        # The thread knows the state and not this object, which could not end otherwise.
        arguments = (self._state, reader, order, rank, world, *share)
        threading.Thread(target=_run, args=arguments, name="fetch ahead", daemon=True).start()

    def at(self, position: int) -> None:
        """Say where the run is."""
        self._state.position = position

    def __del__(self) -> None:
        self._state.ended.set()


class _State:
    def __init__(self, position: int):
        self.position, self.ended = position, threading.Event()


def _run(
    state: _State, reader: ShardReader, order: Wanted, rank: int, world: int, worker: int, num_workers: int
) -> None:
    failed: dict[int, float] = {}
    while not state.ended.is_set():
        for shard in order.upcoming_shards(state.position, rank, world):
            if state.ended.is_set():
                return
            if shard % num_workers == worker and time.monotonic() - failed.get(shard, -AFTER_FAILURE) >= AFTER_FAILURE:
                try:
                    reader.fetch_ahead(shard)
                except Exception:  # whoever needs the shard will meet the error, and say it
                    failed[shard] = time.monotonic()
        state.ended.wait(ROUND)
