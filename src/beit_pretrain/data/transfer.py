"""A file being downloaded: where its bytes go, how far it is, and when it counts as stalled or failed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import BinaryIO

from tqdm import tqdm

CHUNK = 1 << 20  # bytes
GLANCE = 0.2  # seconds between two looks whether a transfer has been given up
SLOWEST = 1000  # bytes per second below which a transfer counts as stalled


class PermanentError(Exception):
    """A failure that a retry cannot fix."""


class TooLargeError(PermanentError):
    """The file is larger than `Transfer.limit`."""


class TransientError(OSError):
    """A failure that a retry may fix. `pause`: seconds that the server asks to wait."""

    def __init__(self, reason: str, pause: float = 0.0):
        super().__init__(reason)
        self.pause = pause


class LocalWriteError(Exception):
    """Writing the local file failed. Its argument is the OSError."""


@dataclass
class Transfer:
    """A file being downloaded."""

    out: BinaryIO  # the local file, written from its current position on
    timeout: float  # seconds without a byte after which the transfer has stalled
    limit: int | None = None  # largest size in bytes; None = the size that the server sends, which is then required
    total: int | None = None  # size of the whole file in bytes, if known
    version: str | None = None  # ETag or date of the file, if known
    begin: Callable[[int | None, str | None], object] = lambda total, version: None  # called before the first byte
    bar: tqdm = field(default_factory=lambda: tqdm(disable=True))
    room: Callable[[], bool] = lambda: True  # whether `out` takes a chunk now; HTTP waits for it, others in `out.write`
    ended: threading.Event = field(default_factory=threading.Event)  # set to give the transfer up

    def __post_init__(self) -> None:
        self.position = self.out.tell()
        self.forgiven = 0.0  # seconds that `out` took
        self._mark = (time.monotonic(), self.position)

    def restart(self) -> None:
        """Start over: the next bytes are the first of the file."""
        self.out.seek(0)
        self.position, self.total, self.version = 0, None, None

    def resume(self, start: int, total: int | None = None, version: str | None = None) -> None:
        """Declare that the next bytes begin at `start` in a file of `total` bytes.

        Starts over and raises TransientError if they do not continue the bytes received so far.
        """
        known = [(self.total, total), (self.version, version)]
        if start == 0:
            self.restart()
            self.version = version
            self.begin(total, version)
        elif start != self.position or any(old and new and old != new for old, new in known):
            self.restart()
            raise TransientError("the file has changed on the server")
        self.total = total or self.total
        self._mark = (time.monotonic(), self.position)
        self.bar.reset(self.total)
        self.bar.update(self.position)

    def write(self, chunk: bytes) -> None:
        if self.limit is not None and self.position + len(chunk) > self.limit:
            raise TooLargeError(f"it has more than {self.limit:,} bytes")
        before = time.monotonic()
        try:
            self.out.write(chunk)
        except OSError as error:
            raise LocalWriteError(error) from None
        self.forgive(time.monotonic() - before)
        self.position += len(chunk)
        self.bar.update(len(chunk))
        since, position = self._mark
        if (passed := time.monotonic() - since) > self.timeout:
            if self.position - position < SLOWEST * passed:
                raise TimeoutError(f"slower than {SLOWEST} bytes/s")
            self._mark = (time.monotonic(), self.position)

    def forgive(self, seconds: float) -> None:
        """Leave time that `out` took out of the server's speed."""
        since, position = self._mark
        self.forgiven, self._mark = self.forgiven + seconds, (since + seconds, position)

    def check_ended(self) -> None:
        """Raise LocalWriteError if the transfer has been given up."""
        if self.ended.is_set():
            raise LocalWriteError(OSError("given up"))

    def finish(self) -> None:
        """End the transfer. Raises TransientError if bytes are missing."""
        try:
            self.out.flush()
        except OSError as error:
            raise LocalWriteError(error) from None
        if self.total is not None and self.position != self.total:
            raise TransientError(f"broke off after {self.position:,} of {self.total:,} bytes")
