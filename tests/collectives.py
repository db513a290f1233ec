"""A callback that counts all collectives and blocking collectives of every training step of `fit`.

COLLECTIVES=FILE    each process appends a JSON line for every step: step, rank, blocking and asynchronous collectives

A collective blocks if its caller asked for no handle (`async_op=False`), as every `barrier` and `broadcast` of
Lightning does. Those of DDP's buckets are started by its C++ reducer, which waits for none before the backward pass
ends.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from typing import Any

from lightning import Callback
from torch import distributed

METHODS = (
    *("allreduce", "allreduce_coalesced", "broadcast", "barrier", "monitored_barrier", "reduce", "gather", "scatter"),
    *("allgather", "_allgather_base", "allgather_into_tensor_coalesced", "alltoall", "alltoall_base"),
    *("reduce_scatter", "_reduce_scatter_base", "reduce_scatter_tensor_coalesced"),
)


def callbacks() -> list[Callback]:
    return [Collectives(os.environ["COLLECTIVES"])] if "COLLECTIVES" in os.environ else []


class Collectives(Callback):
    def __init__(self, path: str):
        self.path, self.counts = path, {"blocking": Counter(), "asynchronous": Counter()}

    def setup(self, trainer, pl_module, stage: str) -> None:
        for name in METHODS:
            if hasattr(distributed.ProcessGroup, name):
                setattr(distributed.ProcessGroup, name, self.counted(name))
        distributed._broadcast_coalesced = self.counted("_broadcast_coalesced", distributed)  # DDP's, of buffers

    def counted(self, name: str, owner: Any = distributed.ProcessGroup) -> Any:
        original = getattr(owner, name)

        def call(*args, **kwargs):
            options = [value for value in (*args, *kwargs.values()) if hasattr(value, "asyncOp")]
            kind = "asynchronous" if any(option.asyncOp for option in options) else "blocking"
            self.counts[kind][name] += 1
            return original(*args, **kwargs)

        return call

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx: int) -> None:
        """The first micro-batch of a step ends the previous step, including its hooks and validation."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.write(trainer.global_step, trainer.global_rank)

    def on_train_end(self, trainer, pl_module) -> None:
        self.write(trainer.global_step, trainer.global_rank)

    def write(self, step: int, rank: int) -> None:
        line = json.dumps({"step": step, "rank": rank, **self.counts}) + "\n"
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.write(file, line.encode())  # in one piece, whichever process
        os.close(file)
        for counts in self.counts.values():
            counts.clear()
