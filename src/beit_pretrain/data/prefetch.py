"""Prefetches remote shards, in a thread of each loader worker.

The order gives the shards of the next blocks. Each worker's thread takes a share of them, so that a process has one
transfer per worker. It also marks cached shards that will be needed as used, so that they are not evicted.
"""

from __future__ import annotations

import threading
import time

from torch.utils.data import get_worker_info

from beit_pretrain.data.mixture import Mixture
from beit_pretrain.data.order import Order
from beit_pretrain.data.reader import ShardReader

ROUND = 5.0  # seconds between two checks of which shards are needed
AFTER_FAILURE = 60.0  # seconds before a failed shard is tried again


class ShardPrefetcher(threading.Thread):
    """The prefetching thread of one worker, from the run's `position` on, which its owner updates, until `ended`.

    It must not hold its owner, which could otherwise never be deleted and end it.
    """

    def __init__(self, reader: ShardReader, order: Order | Mixture, rank: int, world: int, position: int):
        super().__init__(name="fetch ahead", daemon=True)
        worker = get_worker_info()
        self.worker, self.num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        self.reader, self.order, self.rank, self.world, self.position = reader, order, rank, world, position
        self.ended = threading.Event()
        self.start()

    def run(self) -> None:
        failed: dict[int, float] = {}
        while not self.ended.is_set():
            for shard in self.order.upcoming_shards(self.position, self.rank, self.world):
                if self.ended.is_set():
                    return
                waited = time.monotonic() - failed.get(shard, -AFTER_FAILURE)
                if shard % self.num_workers == self.worker and waited >= AFTER_FAILURE:
                    try:
                        self.reader.fetch_ahead(shard)
                    except Exception:  # a worker that needs the shard will report the error
                        failed[shard] = time.monotonic()
            self.ended.wait(ROUND)
