"""Asynchronous checkpoint writing: the training loop waits for a copy to host memory, not for the disk.

One write at a time: a save first waits for the previous write. Write errors are raised in the main thread.
"""

from __future__ import annotations

import copy
import os
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from beit_pretrain.errors import first_line
from beit_pretrain.models.checkpoints.files import AtomicCheckpointIO

PATIENCE = 1.0  # seconds to wait for a cancelled write to end
_open: set[int] = set()  # file descriptors of checkpoints being written


def _close_in_child() -> None:
    """Close open checkpoint files in a forked loader worker: it would keep their disk space in use while it runs."""
    for descriptor in _open:
        os.close(descriptor)


os.register_at_fork(after_in_child=_close_in_child)


class Snapshot:
    """A copy of a checkpoint in host memory, in reused buffers (pinned for GPU tensors); one copy at a time."""

    def __init__(self) -> None:
        self._buffers: dict[tuple, list[Tensor]] = defaultdict(list)  # keys: see `take`

    def take(self, content: dict[str, Any]) -> tuple[dict[str, Any], torch.cuda.Event | None]:
        """Copy a checkpoint.

        Returns the copy, valid until the next `take`, and the CUDA event after which it is complete (None without GPU
        tensors).
        """
        free, self._buffers = self._buffers, defaultdict(list)
        copies: dict[int, Any] = {}
        for tensor in tree_leaves(content):
            if isinstance(tensor, Tensor):
                kind = (tensor.device.type, tensor.dtype, tensor.shape, tensor.stride())
                buffer = free[kind].pop(0) if free[kind] else host_memory_like(tensor)
                self._buffers[kind].append(buffer)
                copies[id(tensor)] = buffer.copy_(tensor.detach(), non_blocking=True)
        copied = copy.deepcopy(content, copies)  # of a tensor in `copies` it takes that copy
        if not any(device == "cuda" for device, *_ in self._buffers):
            return copied, None
        event = torch.cuda.Event(blocking=True)
        event.record()
        return copied, event


def host_memory_like(value: Tensor) -> Tensor:
    """An empty host tensor of the same shape and dtype, pinned for a GPU tensor if the system allows it."""
    if value.is_cuda:
        try:
            return torch.empty_like(value, device="cpu", pin_memory=True, requires_grad=False)
        except RuntimeError as error:
            print(f"warning: the memory for checkpoints is not pinned ({first_line(error)})", file=sys.stderr)
    return torch.empty_like(value, device="cpu", requires_grad=False)


class BackgroundCheckpointIO(AtomicCheckpointIO):
    """Writes like `AtomicCheckpointIO`, but in a thread, from a snapshot taken before `save_checkpoint` returns.

    After `teardown`, `save_checkpoint` writes synchronously. `on_written(path, content)` is called after each write, in
    the thread; its errors are treated as write errors.
    """

    def __init__(self) -> None:
        self.on_written: Callable[[Path, dict[str, Any]], None] = lambda path, content: None
        self._snapshot: Snapshot | None = Snapshot()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._cancelled = threading.Event()

    def save_checkpoint(self, checkpoint, path, storage_options=None) -> None:
        """Take a snapshot and start writing it. Raises UserError if the previous write failed."""
        self.wait()
        if self._snapshot is None:
            self._write(checkpoint, None, Path(path))
            self.wait()
            return
        content, complete = self._snapshot.take(checkpoint)
        # A daemon thread: at exit Python waits for all others, and a second Ctrl-C must not wait.
        self._thread = threading.Thread(target=self._write, args=(content, complete, Path(path)), daemon=True)
        self._thread.start()

    def _write(self, content: dict[str, Any], complete: torch.cuda.Event | None, path: Path) -> None:
        try:
            if complete is not None:
                with torch.cuda.device(complete.device):  # a new thread starts on device 0
                    complete.synchronize()
            super().save_checkpoint(content, path)
            self.on_written(path, content)
        except BaseException as error:
            self._error = error

    def wait(self) -> None:
        """Wait until the checkpoint is on disk. Raises UserError if a write failed."""
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
        """Raise UserError if a write failed, without waiting for an unfinished one."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def cancel(self) -> None:
        """Cancel the current write because the process is about to exit; the previous checkpoint stays intact.

        Python kills daemon threads at exit; C++ code in the middle of a write would then abort the process.
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
        """Switch to synchronous writes. Lightning calls this after the loop, also after a second Ctrl-C: no waiting."""
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
