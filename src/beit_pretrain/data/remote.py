"""Files of a data set that is not on this machine: `http(s)://`, `pipe:`, and `s3://`, `gs://` through fsspec.

A location stands for a folder: the manifest and the shards lie below it. A `pipe:` location is a shell command that
writes the file `{name}` to its standard output, such as `pipe:ssh host cat /data/train/{name}`. Locations come from the
config alone, never from a manifest, whose names are plain file names.

Whatever fails for a reason that may pass (a dropped or stalled connection, half a file, HTTP 408, 425, 429, 5xx) is
tried again with growing pauses, going on in the file where the server allows it. A transfer has stalled when nothing
comes for `timeout` seconds, or less than 1 kB/s, or if after so long the header of an answer is not complete.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import os
import random
import re
import select
import shlex
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import BinaryIO
from urllib.parse import quote, urlsplit, urlunsplit

from beit_pretrain.data.http import opened_in_time
from beit_pretrain.errors import UserError, first_line

SCHEMES = ("http", "https", "pipe", "s3", "gs")
CHUNK = 1 << 20  # bytes
SLOWEST = 1000  # bytes per second below which a transfer counts as stalled
PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds before the second try, doubled before each further one up to the longest
_jitter = random.Random()  # of its own: the global one belongs to the views


class PermanentError(Exception):
    """A failure that another try would not mend."""


class LocalWriteError(Exception):
    """The OSError of the file that a transfer is written to: it is not the server's."""

    def __init__(self, error: OSError):
        super().__init__(error)
        self.error = error


def is_remote(source: object) -> bool:
    """Whether a source is a location and not a path. Raises UserError for a scheme that is not known."""
    if not isinstance(source, str) or not (found := re.match(r"([A-Za-z][A-Za-z0-9+]+):", source)):
        return False
    scheme = found[1].lower()
    if scheme in SCHEMES:
        return True
    if source[len(scheme) :].startswith("://"):
        raise UserError(f"{source}: there are {', '.join(SCHEMES)} and paths, not {scheme}")
    return False


@dataclass(frozen=True)
class Remote:
    """A folder elsewhere.

    Args:
        location: see above.
        retries: further tries after the first.
        timeout: seconds without a byte after which a transfer is given up.
    """

    location: str
    retries: int = 5
    timeout: float = 60.0

    def __post_init__(self) -> None:
        if self.location.startswith("pipe:"):
            if "{name}" not in self.location:
                raise UserError(f"{self.location}: a pipe needs {{name}} where the name of the file belongs")
        elif self.location.lower().startswith("http") and "@" in urlsplit(self.location).netloc:
            raise UserError(
                f"{self}: names and passwords in an address are not sent; give a signed address, or a pipe such as "
                "'pipe:curl -sf --netrc https://HOST/PATH/{name}'"
            )

    def __str__(self) -> str:
        """The location without what may be a secret."""
        if self.location.startswith("pipe:"):
            return self.location
        parts = urlsplit(self.location)
        return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))

    def read(self, name: str, limit: int, check: Callable[[bytes], None] | None = None) -> bytes:
        """The content of a small file of at most `limit` bytes. Raises UserError.

        `check` looks at it, and raises OSError if it is to be gone on with: not every server says how long a file is.
        """
        buffer = io.BytesIO()

        def content() -> bytes:
            return buffer.getvalue()[: buffer.tell()]

        self._transfer(name, buffer, limit, lambda: check(content()) if check else None)
        return content()

    def fetch(self, name: str, out: BinaryIO, size: int, check: Callable[[], None]) -> None:
        """Write the file `name`, of just `size` bytes, to the beginning of `out`.

        `check` looks at what was written, and raises OSError if it is to be fetched again.
        Raises UserError if the file cannot be had, OSError if `out` cannot be written.
        """

        def whole() -> None:
            if out.tell() != size:
                raise OSError(f"broke off after {out.tell():,} of {size:,} bytes")
            check()

        self._transfer(name, out, size, whole)

    def _transfer(self, name: str, out: BinaryIO, limit: int, check: Callable[[], None]) -> None:
        """Write the file `name`, of at most `limit` bytes, to `out`, until `check` raises no OSError any more."""
        for attempt in range(self.retries + 1):
            try:
                self._try(name, out, limit)
                check()
                return
            except LocalWriteError as unwritable:
                raise unwritable.error from None
            except (PermanentError, OSError, http.client.HTTPException) as error:
                why, asked = _reason(error), _retry_after(error)
                if _lasting(error):
                    raise UserError(f"{name} of {self} cannot be fetched: {why}") from None
                if out.tell() >= limit or getattr(error, "code", 0) == 416:  # there is nothing to go on with
                    out.seek(0)
            if attempt < self.retries:
                pause = min(LONGEST_PAUSE, PAUSE * 2**attempt) * _jitter.uniform(0.5, 1)
                time.sleep(max(pause, min(asked, LONGEST_PAUSE)))
        tries = f"{self.retries + 1} tries" if self.retries else "1 try"
        raise UserError(f"{name} of {self} cannot be fetched ({tries}): {why}")

    def _try(self, name: str, out: BinaryIO, limit: int) -> None:
        """One transfer, from where `out` stands if the server can, else from the beginning."""
        mark, since = out.tell(), time.monotonic()
        with contextlib.closing(self._chunks(name, out)) as chunks:
            for chunk in chunks:
                if out.tell() + len(chunk) > limit:
                    raise PermanentError(f"it has more than {limit:,} bytes")
                with _writing():
                    out.write(chunk)
                if (passed := time.monotonic() - since) > self.timeout:
                    if out.tell() - mark < SLOWEST * passed:
                        raise TimeoutError(f"slower than {SLOWEST} bytes/s")
                    mark, since = out.tell(), time.monotonic()
        with _writing():
            out.flush()

    def _chunks(self, name: str, out: BinaryIO) -> Generator[bytes]:
        """The bytes to write at `out`'s position, which is set back to 0 if they are the whole file's."""
        if self.location.startswith("pipe:"):
            out.seek(0)
            return _of_pipe(self.location[5:].replace("{name}", shlex.quote(name)), self.timeout)
        parts = urlsplit(self.location)
        url = urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}"))
        return _of_http(url, out, self.timeout) if parts.scheme in ("http", "https") else _of_bucket(url, out)


@contextlib.contextmanager
def _writing() -> Generator[None]:
    """Tell an OSError of the file that is written from one of the connection."""
    try:
        yield
    except OSError as error:
        raise LocalWriteError(error) from error


def _of_http(url: str, out: BinaryIO, timeout: float) -> Generator[bytes]:
    request = urllib.request.Request(url, headers={"User-Agent": "beit_pretrain", "Accept-Encoding": "identity"})
    if start := out.tell():
        request.add_header("Range", f"bytes={start}-")
    with opened_in_time(request, timeout) as response:
        begins = re.match(r"bytes (\d+)-", response.headers.get("Content-Range") or "")
        if response.status != 206 or not begins or int(begins[1]) != start:
            out.seek(start := 0)
        declared, received = response.headers.get("Content-Length"), 0
        while chunk := response.read1(CHUNK):
            received += len(chunk)
            yield chunk
        if declared and declared.isdigit() and received < int(declared):
            raise OSError(f"broke off after {start + received:,} of {start + int(declared):,} bytes")


def _of_pipe(command: str, timeout: float) -> Generator[bytes]:
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            ["/bin/sh", "-c", command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=said,
            start_new_session=True,  # so that all it started can be ended with it
        )
        assert process.stdout is not None
        try:
            poll = select.poll()
            poll.register(process.stdout, select.POLLIN | select.POLLHUP)
            while True:
                if not poll.poll(timeout * 1000):
                    raise TimeoutError(f"no bytes for {timeout:g} s")
                if not (chunk := os.read(process.stdout.fileno(), CHUNK)):
                    break
                yield chunk
            try:
                code = process.wait(timeout)
            except subprocess.TimeoutExpired:
                raise TimeoutError(f"its command did not end within {timeout:g} s") from None
            if code:
                said.seek(0)
                words = said.read(2000).decode(errors="replace").split()
                raise OSError(f"its command ended with exit code {code}" + (f": {' '.join(words)}" if words else ""))
        finally:
            process.stdout.close()
            if process.returncode is None:  # not waited for, so the number of its group is still its own
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _of_bucket(url: str, out: BinaryIO) -> Generator[bytes]:
    """s3:// and gs://: time-outs, credentials and endpoints are those of s3fs and gcsfs."""
    import fsspec

    try:
        with fsspec.open(url, "rb") as file:
            file.seek(out.tell())
            while chunk := file.read(CHUNK):
                yield chunk
    except ImportError as error:
        raise UserError(
            f"{url} needs more packages: pip install 'beit_pretrain[remote]' ({first_line(error)})"
        ) from None
    except OSError:
        raise
    except Exception as error:  # the clouds' own libraries have exceptions of their own
        raise OSError(f"{type(error).__name__}: {first_line(error)}") from error


def _lasting(error: Exception) -> bool:
    """Whether another try would not mend it."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code < 500 and error.code not in (408, 416, 425, 429)
    return isinstance(error, PermanentError | http.client.InvalidURL | FileNotFoundError | PermissionError)


def _reason(error: Exception) -> str:
    """A failure in a few words."""
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code} {str(error.reason).partition(chr(10))[0]}"  # a loop of redirections has three lines
    if isinstance(error, urllib.error.URLError):
        return first_line(error.reason) if isinstance(error.reason, BaseException) else str(error.reason)
    if isinstance(error, TimeoutError):
        return f"it stalled ({first_line(error)})"
    kind = f"{type(error).__name__}: " if _lasting(error) and not isinstance(error, PermanentError) else ""
    return kind + first_line(error)


def _retry_after(error: Exception) -> float:
    """Seconds for which a server asks to be left alone, 0 if it does not."""
    asked = error.headers.get("Retry-After") if isinstance(error, urllib.error.HTTPError) else None
    return float(asked) if asked and asked.isdigit() else 0.0
