"""Checkpoints written by a thread: the training loop waits for a copy in host memory, not for the disk.

One write at a time: the next save first waits for the one before. Errors of a write are raised in the main thread.
"""

from __future__ import annotations

import copy
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from beit_pretrain.errors import first_line
from beit_pretrain.models.checkpoints.files import AtomicCheckpointIO

PATIENCE = 1.0  # seconds for a cancelled write to end
_open: set[int] = set()  # descriptors of files that are being written


def _close_in_child() -> None:
    """A loader worker forked during a write would keep the file's space on the disk as long as it runs."""
    for descriptor in _open:
        os.close(descriptor)


os.register_at_fork(after_in_child=_close_in_child)


class Snapshot:
    """Copies of checkpoints in host memory, one at a time, in buffers that are used again; pinned for GPU tensors."""

    def __init__(self) -> None:
        self._buffers: dict[tuple, Tensor] = {}  # by the names that lead to a tensor, and the device that it is on

    def take(self, content: dict[str, Any]) -> tuple[dict[str, Any], torch.cuda.Event | None]:
        """(a copy, valid until the next one is taken; the event after which it is complete, None without a GPU)."""
        before, self._buffers = self._buffers, {}
        copied = self._copied(content, (), before)
        if not any(place[-1] == "cuda" for place in self._buffers):
            return copied, None
        event = torch.cuda.Event(blocking=True)
        event.record()
        return copied, event

    def _copied(self, value: Any, place: tuple, before: dict[tuple, Tensor]) -> Any:
        if isinstance(value, Tensor):
            place = (*place, value.device.type)
            buffer = before.get(place)
            if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
                buffer = host_memory_like(value)
            self._buffers[place] = buffer
            return buffer.copy_(value.detach(), non_blocking=True)
        if isinstance(value, dict):
            held = copy.copy(value)  # a state dict has an attribute, the versions of its modules
            for key, item in value.items():
                held[key] = self._copied(item, (*place, key), before)
            return held
        if type(value) in (list, tuple):
            return type(value)(self._copied(item, (*place, number), before) for number, item in enumerate(value))
        return copy.deepcopy(value)


def host_memory_like(value: Tensor) -> Tensor:
    """Host memory for a copy: pinned for a tensor on a GPU, unless the system refuses so much of it."""
    if value.is_cuda:
        try:
            return torch.empty_like(value, device="cpu", pin_memory=True, requires_grad=False)
        except RuntimeError as error:
            print(f"warning: the memory for checkpoints is not pinned ({first_line(error)})", file=sys.stderr)
    return torch.empty_like(value, device="cpu", requires_grad=False)


class BackgroundCheckpointIO(AtomicCheckpointIO):
    """Writes like `AtomicCheckpointIO`, in a thread, from a snapshot that is taken before `save_checkpoint` returns.

    After `teardown`, `save_checkpoint` writes the file itself. The thread calls `on_written(path, content)` after each
    write; its errors count as errors of the write.
    """

    def __init__(self) -> None:
        self.on_written: Callable[[Path, dict[str, Any]], None] = lambda path, content: None
        self._snapshot: Snapshot | None = Snapshot()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._cancelled = threading.Event()

    def save_checkpoint(self, checkpoint, path, storage_options=None) -> None:
        """Raises UserError if the write before this one has failed."""
        self.wait()
        if self._snapshot is None:
            self._write(checkpoint, None, Path(path))
            self.wait()
            return
        content, complete = self._snapshot.take(checkpoint)
        # A daemon, since Python would wait at its end for any other thread, and a second Ctrl-C does not.
        self._thread = threading.Thread(target=self._write, args=(content, complete, Path(path)), daemon=True)
        self._thread.start()

    def _write(self, content: dict[str, Any], complete: torch.cuda.Event | None, path: Path) -> None:
        try:
            if complete is not None:
                with torch.cuda.device(complete.device):  # else a thread's device is the first, which may be another's
                    complete.synchronize()
            super().save_checkpoint(content, path)
            self.on_written(path, content)
        except BaseException as error:
            self._error = error

    def wait(self) -> None:
        """Wait until everything is on the disk. Raises UserError if a write has failed."""
        if self._thread is not None:
            try:
                self._thread.join()
            except KeyboardInterrupt:  # a second Ctrl-C
                self.cancel()
                raise
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def check(self) -> None:
        """Raise UserError if a write has failed, without waiting for one that has not finished."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def cancel(self) -> None:
        """Stop a write because the process is about to end; the checkpoint before it stays.

        Python kills threads at exit, and C++ code in the middle of a write would then abort the process.
        """
        self._cancelled.set()
        if self._thread is not None:
            self._thread.join(PATIENCE)

    def remove_checkpoint(self, path) -> None:
        self.wait()
        super().remove_checkpoint(path)

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        self.wait()
        return super().load_checkpoint(*args, **kwargs)

    def teardown(self) -> None:
        """Called by Lightning after the loop, also after a second Ctrl-C: does not wait."""
        self._snapshot = None

    @contextmanager
    def target(self, file: BinaryIO) -> Iterator[Any]:
        descriptor = file.fileno()
        _open.add(descriptor)
        try:
            yield Cancellable(file, self._cancelled)
        finally:
            _open.discard(descriptor)


class Cancellable:
    """A file for `torch.save` whose writes fail once `cancelled` is set."""

    def __init__(self, file: BinaryIO, cancelled: threading.Event):
        self._file, self._cancelled = file, cancelled
        self.flush = file.flush

    def write(self, data: Any) -> int:
        if self._cancelled.is_set():
            raise InterruptedError("the process is ending")
        return self._file.write(data)
