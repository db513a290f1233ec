"""Reads a file from its beginning to its end while it is still being received; nothing is written to a disk.

A thread receives ahead into a bounded queue, by the transports and with the retries of other downloads: a broken
connection is continued in the middle of the file. If the server cannot do that and the file comes again from its
beginning, the bytes that were already read are compared (their checksum) and skipped.
"""

from __future__ import annotations

import io
import threading
import weakref
import zlib
from collections import deque
from pathlib import Path
from typing import Any, BinaryIO, cast

from beit_pretrain.data.settings import RemoteOptions
from beit_pretrain.data.storage import is_remote, receive, without_secrets
from beit_pretrain.data.transfer import SLOWEST, PermanentError, Transfer
from beit_pretrain.errors import UserError, first_line
from beit_pretrain.fileio import expand_home

AHEAD = 8 << 20  # bytes that are received ahead of the reader
BLOCK = 1 << 17  # bytes that the reader takes at once; larger ones leave the CPU's cache before they are parsed
CHANGED = "the file has changed on the server while it was read"


def open_stream(url: str, options: RemoteOptions) -> BinaryIO:
    """The file at an address (http(s), hf, s3, gs, file, `pipe:COMMAND`) or a path, to be read once and in order.

    `close` ends the transfer, its connection or its command. `read` raises UserError, one line with the address but
    without its secrets, if the file cannot be received to its end or has changed meanwhile; OSError for a local file.
    Raises UserError if a local file cannot be opened.
    """
    if is_remote(url):
        return io.BufferedReader(_Received(url, options), BLOCK)
    path = expand_home(Path(url))
    try:
        return path.open("rb", buffering=BLOCK)
    except OSError as error:
        raise UserError(f"{path} cannot be opened: {error.strerror or error}") from None


class _Queue:
    """The bytes between the receiving thread and the reader; for the transfer, the file that it writes."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.chunks: deque[memoryview] = deque()
        self.waiting = 0  # bytes in the queue
        self.delivered = 0  # bytes of the file that have come into the queue
        self.checksum = 0  # of those
        self.position = 0  # in the file, of the next byte that comes; below `delivered` after a restart
        self.repeated = 0  # checksum of the bytes that came again
        self.first: tuple[int | None, str | None] | None = None  # size and version of the file when it began
        self.ended = threading.Event()  # the reader has closed it
        self.done = False
        self.error: UserError | None = None

    # What `Transfer` needs of a file.

    def tell(self) -> int:
        return self.position

    def seek(self, position: int) -> None:
        assert position == 0
        self.position = self.repeated = 0

    def flush(self) -> None:
        pass

    def begin(self, total: int | None, version: str | None) -> None:
        """Called before the first byte of each try from the beginning. Raises PermanentError for another file."""
        if self.first is None or not self.delivered:
            self.first = total, version
        elif any(old and new and old != new for old, new in zip(self.first, (total, version))):
            raise PermanentError(CHANGED)

    def write(self, data: bytes) -> None:
        """Add a chunk when there is room, without the bytes that came before. Raises OSError if nobody reads it."""
        chunk = memoryview(data)
        again = min(self.delivered - self.position, len(chunk))
        if again:
            self.repeated = zlib.crc32(chunk[:again], self.repeated)
            self.position += again
            if self.position == self.delivered and self.repeated != self.checksum:
                raise PermanentError(CHANGED)
            chunk = chunk[again:]
        if not chunk:
            return
        with self.changed:
            self.changed.wait_for(self.room)
            if self.ended.is_set():
                raise OSError("nobody reads it any more")
            self.checksum = zlib.crc32(chunk, self.checksum)
            self.chunks.append(chunk)
            self.waiting += len(chunk)
            self.position += len(chunk)
            self.delivered = self.position
            self.changed.notify_all()

    def room(self) -> bool:
        return self.waiting < AHEAD or self.ended.is_set()

    # The reader's side.

    def take(self, into: memoryview) -> int:
        """Fill `into` as far as bytes are there, at least one; 0 at the end. Raises the error of the transfer."""
        with self.changed:
            self.changed.wait_for(lambda: self.chunks or self.done)
            if not self.chunks and self.error is not None:
                raise self.error
            filled = 0
            while self.chunks and filled < len(into):
                chunk = self.chunks.popleft()
                part = chunk[: len(into) - filled]
                into[filled : filled + len(part)] = part
                filled += len(part)
                if len(part) < len(chunk):
                    self.chunks.appendleft(chunk[len(part) :])
            self.waiting -= filled
            self.changed.notify_all()
            return filled

    def end(self, error: UserError | None = None) -> None:
        """No more bytes will come."""
        with self.changed:
            self.done, self.error = True, error
            self.changed.notify_all()

    def give_up(self) -> None:
        """Nobody will read on."""
        with self.changed:
            self.ended.set()
            self.chunks.clear()
            self.changed.notify_all()


def _fill(url: str, options: RemoteOptions, queue: _Queue) -> None:
    """Receive the file into the queue; in a thread, which must not hold the file object that its owner closes."""
    transfer = Transfer(cast(Any, queue), options.timeout, begin=queue.begin, room=queue.room, ended=queue.ended)
    failure = f"{without_secrets(url)} cannot be fetched"
    try:
        how: dict[str, Any] = {"progress_counts": True, "speed": SLOWEST, "wait": queue.ended.wait}
        receive(url, transfer, options.retries + 1, lambda: None, failure, **how)
        queue.end()
    except UserError as error:
        queue.end(error)
    except BaseException as error:
        queue.end(UserError(f"{failure}: {type(error).__name__}: {first_line(error)}"))


class _Received(io.RawIOBase):
    """A remote file as an unbuffered, readable file."""

    def __init__(self, url: str, options: RemoteOptions):
        self._queue = _Queue()
        weakref.finalize(self, self._queue.give_up)
        name = f"receives {without_secrets(url)}"
        threading.Thread(target=_fill, args=(url, options, self._queue), name=name, daemon=True).start()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._queue.take(memoryview(buffer).cast("B"))

    def close(self) -> None:
        if not self.closed:
            self._queue.give_up()
        super().close()
