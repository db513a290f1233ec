"""Prepares the next batch on a separate CUDA stream during the current step (`device_prefetch=true`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

PREPARED = ("image", "token_image", "jitter_factors", "jitter_order", "jitter_tiles", "tokens")  # inputs of `prepare`


class DevicePrefetcher:
    """Wraps a loader: copies, jitters and tokenizes the next batch while the step uses the current one.

    On a GPU this runs on a side stream. The batches are the same as without prefetching.

    Args:
        loader: yields batches (dictionaries); for a GPU in pinned memory, since other copies block the host.
        prepare: batch on the device -> the backbone's view (B, C, H, W) in [0, 1] and tokens (B, N).
        device: target device.
    """

    def __init__(self, loader: Any, prepare: Callable[[dict], tuple[Tensor, Tensor]], device: torch.device):
        self.loader, self.prepare, self.device = loader, prepare, device

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[dict]:
        stream = None
        if self.device.type == "cuda":
            stream = torch.cuda.Stream(self.device)
            # Once: the tokenizer's weights, which `prepare` reads, were written on the current stream.
            stream.wait_stream(torch.cuda.current_stream(self.device))
        current: tuple[dict, torch.cuda.Event | None] | None = None
        for batch in self.loader:
            following = self._prepared(batch, stream)
            if current is not None:
                yield self._handed_over(*current)
            current = following
        if current is not None:
            yield self._handed_over(*current)

    @torch.no_grad()
    def _prepared(self, batch: dict, stream: torch.cuda.Stream | None) -> tuple[dict, torch.cuda.Event | None]:
        """Queue the copy, view and tokens of a batch on the side stream.

        Returns the batch on the device, and the event after which it may be used (None on a CPU).
        """
        with torch.cuda.stream(stream):
            moved = {
                name: value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value
                for name, value in batch.items()
            }
            view, tokens = self.prepare(moved)
            event = None if stream is None else stream.record_event()
        kept = {name: value for name, value in moved.items() if name not in PREPARED}
        return kept | {"view": view, "tokens": tokens}, event

    def _handed_over(self, batch: dict, event: torch.cuda.Event | None) -> dict:
        """Make the current stream wait for the batch's event, and return the batch.

        It does not wait for the whole side stream: the next batch is already queued there, and waiting for it would
        remove the overlap.
        """
        if event is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(event)
            for value in batch.values():
                if isinstance(value, Tensor):
                    value.record_stream(stream)  # keeps the allocator from reusing the memory during the step
        return batch
