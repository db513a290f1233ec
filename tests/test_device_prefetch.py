"""The device prefetcher: same batches, and stream operations in an order that lets work overlap."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from beit_pretrain.engine.device_prefetch import DevicePrefetcher


def test_next_batch_is_prepared_before_current_is_used():
    order = []

    def prepare(batch):
        order.append(f"prepared {batch['position']}")
        return torch.zeros(1), torch.zeros(1)

    batches = [{"position": n, "image": torch.zeros(1)} for n in range(3)]
    prefetcher = DevicePrefetcher(batches, prepare, torch.device("cpu"))
    for batch in prefetcher:
        assert batch.keys() == {"position", "view", "tokens"}
        order.append(f"used {batch['position']}")
    assert order == ["prepared 0", "prepared 1", "used 0", "prepared 2", "used 1", "used 2"]
    assert len(prefetcher) == 3


@pytest.mark.parametrize("count", [0, 1])
def test_short_loader(count):
    batches = [{"position": n} for n in range(count)]
    prefetcher = DevicePrefetcher(batches, lambda batch: (batch["position"],) * 2, torch.device("cpu"))
    assert [batch["view"] for batch in prefetcher] == list(range(count))


class Recorded(torch.Tensor):
    """A CPU tensor that records that it was copied to a GPU and which stream reads it."""

    def to(self, device, non_blocking=False):
        assert non_blocking
        assert device.type == "cuda"
        Streams.log.append(f"copy on {Streams.now}")
        return self

    def record_stream(self, stream):
        Streams.log.append(f"used by {stream.name}")


class Streams:
    """Fake CUDA streams that record the calls."""

    log: list[str] = []
    now = "current"

    class Stream:
        def __init__(self, name):
            self.name = name if isinstance(name, str) else "side"
            self.events = 0

        def wait_stream(self, other):
            Streams.log.append(f"{self.name} waits for {other.name}")

        def record_event(self):
            self.events += 1
            Streams.log.append(f"event {self.events} on {self.name}")
            return f"event {self.events}"

        def wait_event(self, event):
            Streams.log.append(f"{self.name} waits for {event}")


@pytest.fixture
def streams(monkeypatch):
    @contextmanager
    def stream(chosen):
        Streams.now, before = chosen.name, Streams.now
        yield
        Streams.now = before

    current = Streams.Stream("current")
    monkeypatch.setattr(Streams, "log", [])
    monkeypatch.setattr(torch.cuda, "Stream", Streams.Stream)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    return Streams.log


def test_step_waits_only_for_its_own_batch(streams):
    """Batch 2 is queued on the side stream before the step on batch 1 waits, and that wait is for batch 1's event."""

    def prepare(batch):
        streams.append(f"prepare on {Streams.now}")
        return batch["image"], batch["image"]

    batches = [{"image": torch.zeros(1).as_subclass(Recorded)} for _ in range(3)]
    for _ in DevicePrefetcher(batches, prepare, torch.device("cuda")):
        streams.append(f"step on {Streams.now}")
    queued = ["copy on side", "prepare on side"]
    handed_over = ["used by current", "used by current", "step on current"]  # view and tokens
    assert streams == [
        "side waits for current",  # once
        *queued,
        "event 1 on side",
        *queued,
        "event 2 on side",
        "current waits for event 1",
        *handed_over,
        *queued,
        "event 3 on side",
        "current waits for event 2",
        *handed_over,
        "current waits for event 3",
        *handed_over,
    ]
