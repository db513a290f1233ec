"""On a GPU: snapshots during training, and an exchange between processes that never blocks the host."""

from __future__ import annotations

import time

import pytest
import torch
from torch import distributed

from beit_pretrain.engine.background_checkpoint import BackgroundCheckpointIO, Snapshot
from beit_pretrain.engine.step_exchange import Agreed, StepExchange
from beit_pretrain.models.checkpoints.files import read

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
BUSY = 10**9  # cycles of a GPU: about half a second


@pytest.fixture
def group(tmp_path):
    """A process group of one process over NCCL."""
    device = torch.device("cuda", 0)
    store = f"file://{tmp_path / 'store'}"
    distributed.init_process_group("nccl", init_method=store, rank=0, world_size=1, device_id=device)
    distributed.all_reduce(torch.zeros(1, device=device))  # the first one makes the communicator
    torch.cuda.synchronize()
    yield device
    distributed.destroy_process_group()


class TestSnapshot:
    def test_is_isolated_and_asynchronous(self):
        """The device is busy before the copy and changes the tensors after it."""
        weight, snapshot = torch.zeros(2**20, device="cuda"), Snapshot()
        snapshot.take({"weight": weight})  # allocates
        torch.cuda.synchronize()
        torch.cuda._sleep(BUSY)
        weight.fill_(1)
        began = time.monotonic()
        copied, complete = snapshot.take({"weight": weight})
        weight.fill_(2)
        assert time.monotonic() - began < 0.1
        assert not complete.query()
        complete.synchronize()
        assert copied["weight"].eq(1).all()
        assert copied["weight"].is_pinned()
        assert copied["weight"].device.type == "cpu"

    def test_reuses_pinned_memory(self):
        state, snapshot = {"a": torch.rand(1000, device="cuda"), "b": torch.rand(10)}, Snapshot()
        first, _ = snapshot.take(state)
        places = {name: tensor.data_ptr() for name, tensor in first.items()}
        second, _ = snapshot.take(state)
        assert {name: tensor.data_ptr() for name, tensor in second.items()} == places
        assert not second["b"].is_pinned()


def test_checkpoint_holds_cpu_tensors(tmp_path):
    """Readers need no GPU, and the writer thread waits for nothing but the copy."""
    io, model = BackgroundCheckpointIO(), torch.nn.Linear(8, 8, device="cuda")
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.ones(1, 8, device="cuda")).sum().backward()
    optimizer.step()
    expected = model.weight.detach().cpu().clone()
    torch.cuda._sleep(BUSY)
    io.save_checkpoint({"state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "last.ckpt")
    with torch.no_grad():
        model.weight.zero_()
    io.wait()
    found = torch.load(tmp_path / "last.ckpt", weights_only=True)  # as stored, not mapped to the CPU
    assert found["state_dict"]["weight"].device.type == "cpu"
    assert torch.equal(found["state_dict"]["weight"], expected)
    assert read(tmp_path / "last.ckpt")["optimizer"]["state"][0]["exp_avg"].abs().sum() > 0


def test_exchange_does_not_block_host(group):
    """All exchanges of a step are queued while the device is busy, and give the right sums later."""
    exchange, masked = StepExchange(), torch.tensor(75, device=group)
    for number in (1, 2):  # allocates
        exchange.start(Agreed(number), masked, group)
        exchange.finish()
        exchange.read()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(BUSY)
        began = time.monotonic()
        exchange.start(Agreed(3, save=True), masked * 2, group)
        exchange.finish()
        scale = 10 / exchange.masked.double()
        assert exchange.read() == Agreed(2)  # that of the step before, which is there already
        assert time.monotonic() - began < 0.1
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert scale.item() == 10 / 150
    exchange.start(Agreed(4), masked, group)
    exchange.finish()
    assert exchange.read() == Agreed(3, save=True)
