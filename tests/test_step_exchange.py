"""The exchange between processes at every step, here with a group of one; test_two_processes.py has two."""

from __future__ import annotations

import math
import signal

import pytest
import torch
from torch import distributed

from beit_pretrain.engine.step_exchange import Agreed, StepExchange

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def group(tmp_path):
    """A process group of one process."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def step(exchange: StepExchange, given: Agreed, masked: torch.Tensor | int = 0) -> Agreed:
    """What the host reads after one step."""
    exchange.start(given, masked, CPU)
    exchange.finish()
    return exchange.read()


def test_host_reads_flags_one_step_later():
    exchange = StepExchange()
    said = [Agreed(1, signal.SIGTERM), Agreed(2, save=True), Agreed(3, validate=True), Agreed(4)]
    assert [step(exchange, given) for given in said] == [Agreed(), *said[:-1]]


def test_masked_patches_are_of_same_step():
    exchange = StepExchange()
    for masked in (5, 2**40 + 1, 0):  # far beyond what float32 counts
        step(exchange, Agreed(1), torch.tensor(masked))
        assert exchange.masked.tolist() == masked
        assert exchange.masked.dtype == torch.int64


def test_all_reduce_is_asynchronous(monkeypatch):
    waits = []
    reduce = distributed.all_reduce

    def watched(tensor, *args, async_op=False, **kwargs):
        waits.append(not async_op)
        return reduce(tensor, *args, async_op=async_op, **kwargs)

    monkeypatch.setattr(distributed, "all_reduce", watched)
    exchange = StepExchange()
    for number in range(3):
        step(exchange, Agreed(number))
    assert waits == [False] * 3


def test_wait_for_copy_times_out(monkeypatch):
    """Raises an error of one line before NCCL would kill the process silently."""

    class Tee:
        def __init__(self, looks: float):
            self.looks = looks

        def query(self) -> bool:
            self.looks -= 1
            return self.looks < 0

        def record(self) -> None:
            pass

    exchange = StepExchange()
    for number in (1, 2):
        step(exchange, Agreed(number))
    for buffers in exchange._buffers:
        buffers.copied = Tee(3)
    assert step(exchange, Agreed(3)) == Agreed(2)
    for buffers in exchange._buffers:
        buffers.copied = Tee(math.inf)
    exchange.patience = 0.01
    with pytest.raises(RuntimeError, match="the exchange of step 3 timed out"):
        step(exchange, Agreed(4))
