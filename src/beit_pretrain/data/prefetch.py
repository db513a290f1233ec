"""Prefetches remote shards, in a thread of each loader worker.

The order gives the shards of the next blocks. Each worker's thread takes a share of them, so that a process has one
transfer per worker. It also marks cached shards that will be needed as used, so that they are not evicted.
"""

from __future__ import annotations

import threading
import time
from typing import Protocol

from torch.utils.data import get_worker_info

from beit_pretrain.data.reader import ShardReader

ROUND = 5.0  # seconds between two checks of which shards are needed
AFTER_FAILURE = 60.0  # seconds before a failed shard is tried again


class Wanted(Protocol):
    """Gives the shards that are needed soon (`order.Order`, `mixture.Mixture`)."""

    def upcoming_shards(self, position: int, rank: int = 0, world: int = 1, windows: int = 2) -> list[int]: ...


class ShardPrefetcher:
    """The prefetching thread of one worker; it ends when this object is deleted.

    Args:
        reader, order: of the training images.
        rank, world: of the training process.
        position: start of the run.
    """

    def __init__(self, reader: ShardReader, order: Wanted, rank: int, world: int, position: int):
        worker = get_worker_info()
        share = (worker.id, worker.num_workers) if worker else (0, 1)
        self._state = _State(position)
        # The thread holds the state and not this object, which could otherwise never be deleted.
        arguments = (self._state, reader, order, rank, world, *share)
        threading.Thread(target=_run, args=arguments, name="fetch ahead", daemon=True).start()

    def at(self, position: int) -> None:
        """Set the run's current position."""
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
                except Exception:  # a worker that needs the shard will report the error
                    failed[shard] = time.monotonic()
        state.ended.wait(ROUND)
