"""Prepares the next batch on a stream of its own while the current one trains (`device_prefetch=true`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

PREPARED = ("image", "token_image", "jitter_factors", "jitter_order", "jitter_tiles", "tokens")  # used up by `prepare`


class Prepared(NamedTuple):
    """A batch on the device, and the event after which it may be used; None where there are no streams."""

    batch: dict
    event: torch.cuda.Event | None


class DevicePrefetcher:
    """A loader whose next batch is copied, jittered and tokenized while the step works on the current one.

    On a GPU this happens on a side stream. Everywhere, the batches are those of the loader and of `prepare`.

    Args:
        loader: yields batches (dictionaries), in pinned memory on a GPU, or the copies would wait.
        prepare: batch on the device -> backbone's view (B, C, H, W) in [0, 1] and tokens (B, N).
        device: where to.
    """

    def __init__(self, loader: Any, prepare: Callable[[dict], tuple[Tensor, Tensor]], device: torch.device):
        self.loader, self.prepare, self.device = loader, prepare, device

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[dict]:
        stream = None
        if self.device.type == "cuda":
            stream = torch.cuda.Stream(self.device)
            # Once: what `prepare` reads (the tokenizer's weights) was written on the current stream.
            stream.wait_stream(torch.cuda.current_stream(self.device))
        current: Prepared | None = None
        for batch in self.loader:
            following = self._prepared(batch, stream)
            if current is not None:
                yield self._handed_over(current)
            current = following
        if current is not None:
            yield self._handed_over(current)

    @torch.no_grad()
    def _prepared(self, batch: dict, stream: torch.cuda.Stream | None) -> Prepared:
        """Queue copy, views and tokens of a batch on the side stream, and an event behind them."""
        with torch.cuda.stream(stream):
            moved = {
                name: value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value
                for name, value in batch.items()
            }
            view, tokens = self.prepare(moved)
            event = None if stream is None else stream.record_event()
        kept = {name: value for name, value in moved.items() if name not in PREPARED}
        return Prepared(kept | {"view": view, "tokens": tokens}, event)

    def _handed_over(self, prepared: Prepared) -> dict:
        """The batch, once the current stream waits for its event.

        For its own event, not for the side stream: there the batch after it is queued already, and waiting for that
        would put one after the other what is meant to run side by side.
        """
        if prepared.event is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(prepared.event)
            for value in prepared.batch.values():
                if isinstance(value, Tensor):
                    value.record_stream(stream)  # the allocator must not reuse its memory while the step reads it
        return prepared.batch
