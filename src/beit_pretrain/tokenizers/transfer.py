"""Resumable downloads: a file arrives under its name whole and checked, or not at all.

What has come so far lies beside it as `.NAME.partial`, with the address, the size and the version that the server named
in `.NAME.partial.json`: a later attempt, also of another process, goes on from there if the server still has that
version, and from the start otherwise.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import sleep
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm

from beit_pretrain import __version__
from beit_pretrain.errors import UserError, first_line

BLOCK = 2**18  # bytes read at a time
LONGEST_PAUSE = 60.0  # seconds between two attempts, whatever the server asks for
PASSING = (408, 425, 429)  # answers that a later attempt may change, as all from 500 on


class DownloadError(UserError):
    """An address that gave no file: no network, no such file, or a connection that breaks again and again."""


class Interrupted(Exception):
    """An attempt that failed in a way that the next may not. `pause`: seconds that the server asks to wait."""

    def __init__(self, reason: str, pause: float = 0.0):
        super().__init__(reason)
        self.pause = pause


def download(
    url: str,
    path: Path,
    *,
    check: Callable[[Path], None] | None = None,
    timeout: float = 30.0,
    attempts: int = 5,
) -> None:
    """Put the file at `url` (http, https, file) under the name `path`, unless there is one already.

    Safe to call from several processes at once: one downloads, the others wait for it.

    Args:
        check: called with the whole file before it gets its name; raises UserError for a file that must not be kept.
        timeout: seconds to wait for a connection, or for the next bytes.
        attempts: how often in a row may fail without a byte of progress; pauses of 1, 2, 4, ... seconds lie between.

    Raises:
        Unreachable: the address gave no whole file. What came is kept for the next call.
        UserError: no address that can be read, or what `check` raises; nothing is kept then.
    """
    if not re.match(r"https?://[^/]|file:///", url):
        raise UserError(f"{url!r} is no address to download from; it starts with http://, https:// or file:///")
    with alone(path.with_name(f".{path.name}.lock")):
        partial = Partial(path.with_name(f".{path.name}.partial"))
        if path.exists():
            partial.discard()  # of an attempt before someone put the file there
            return
        with tqdm(desc=path.name, unit="B", unit_scale=True, unit_divisor=1024) as bar:
            _receive(url, partial, timeout, attempts, bar)
        try:
            if check is not None:
                check(partial.path)
        except UserError:
            partial.discard()
            raise
        publish(partial.path, path)
        partial.discard()


@contextmanager
def alone(lock_file: Path) -> Iterator[None]:
    """Hold a lock between processes; it ends with the process, however that ends."""
    lock = FileLock(lock_file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"{lock_file.parent}: waiting for another process that writes there", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        with suppress(OSError):  # while it is held: who waits for it sees that the file is gone, and makes a new one
            lock_file.unlink()
        lock.release()


def publish(temporary: Path, path: Path) -> None:
    """Flush a file to the disk, then rename it: `path` never holds half a file, even after a power cut."""
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    flush_folder(path.parent)


def flush_folder(folder: Path) -> None:
    """Have the names in a folder on the disk, where its file system can be asked for that."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class Partial:
    """What has come of a file so far, and the note of where from."""

    def __init__(self, path: Path):
        self.path = path
        self.note_file = path.with_name(f"{path.name}.json")

    def size(self) -> int:
        """Bytes that have come."""
        return self.path.stat().st_size if self.path.exists() else 0

    def note(self, url: str) -> dict[str, Any] | None:
        """{"url", "bytes", "etag", "modified"} of what has come; None if it is not known to be from `url`."""
        try:
            note = json.loads(self.note_file.read_text())
            known = note["url"] == url and isinstance(note["bytes"], (int, type(None)))
            return note if known and {"etag", "modified"} <= note.keys() else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def begin(self, note: dict[str, Any]) -> None:
        """Start over. The old bytes go first: a new note must never stand beside them."""
        self.discard()
        self.note_file.write_text(json.dumps(note))

    def discard(self) -> None:
        """Forget what has come."""
        self.path.unlink(missing_ok=True)
        self.note_file.unlink(missing_ok=True)


def _receive(url: str, partial: Partial, timeout: float, attempts: int, bar: tqdm) -> None:
    """Attempts until the file is whole. Those that brought the file further than any before do not count."""
    furthest, failed = partial.size(), 0
    while True:
        try:
            return _attempt(url, partial, timeout, bar)
        except Interrupted as error:
            failed = 0 if partial.size() > furthest else failed + 1
            furthest = max(furthest, partial.size())
            if failed >= attempts:
                raise DownloadError(f"{url} cannot be downloaded: {error} ({failed} attempts)") from error
            bar.set_postfix_str(str(error))
            sleep(min(max(2.0 ** min(max(failed - 1, 0), 6), error.pause), LONGEST_PAUSE))


def _attempt(url: str, partial: Partial, timeout: float, bar: tqdm) -> None:
    """One request for what is missing. Raises Interrupted if it does not make the file whole."""
    note, size = None if url.startswith("file:") else partial.note(url), partial.size()
    if note is None or (note["bytes"] is not None and size > note["bytes"]):
        partial.discard()
        note, size = None, 0
    elif size and size == note["bytes"]:
        return  # whole: an earlier process ended before the file got its name
    response = _open(url, note, size, timeout)
    with response:
        headers = response.headers
        tags = {"etag": headers.get("ETag"), "modified": headers.get("Last-Modified")}
        if response.status in (206, 416) and note is not None:  # 416: it ends before `size`, so it has become shorter
            start, total = _content_range(headers.get("Content-Range", ""))
            known = {"bytes": total, **tags}
            if start != size or any(note[k] != known[k] for k in known if note[k] and known[k]):
                partial.discard()
                raise Interrupted("the file has changed on the server")
            total = note["bytes"] or total
        elif response.status in (200, None):  # None: file://
            size, total = 0, _length(url, headers)
            partial.begin({"url": url, "bytes": total, **tags})
        else:
            raise DownloadError(f"{url} cannot be downloaded: the server answers with {response.status}")
        bar.reset(total)
        bar.update(size)
        with partial.path.open("ab") as file:
            for block in _blocks(response):
                file.write(block)
                bar.update(len(block))
    if total is not None and partial.size() != total:
        raise Interrupted(f"the connection ended after {partial.size()} of {total} bytes")


def _open(url: str, note: dict[str, Any] | None, size: int, timeout: float):
    """The server's answer to a request for the bytes from `size` on, of the version in the note."""
    headers = {"User-Agent": f"beit_pretrain/{__version__}"}
    if size and note is not None:
        headers["Range"] = f"bytes={size}-"
        etag = note["etag"] or ""
        # A weak ETag may not stand here (RFC 9110, 13.1.5): then the answer's own headers are compared.
        if version := note["modified"] if etag.startswith("W/") else etag or note["modified"]:
            headers["If-Range"] = version
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code == 416 and size:
            return error  # itself an answer
        with error:
            said = f"the server answers with {error.code} {error.reason}".strip()
            if error.code in PASSING or error.code >= 500:
                pause = error.headers.get("Retry-After") or ""
                raise Interrupted(said, float(pause) if re.fullmatch(r"\d{1,9}", pause) else 0.0) from error
            raise DownloadError(f"{url} cannot be downloaded: {said}") from error
    except urllib.error.URLError as error:
        reason = error.reason if isinstance(error.reason, OSError) else error
        said = reason.strerror or first_line(reason) if isinstance(reason, OSError) else first_line(reason)
        if url.startswith("file:") or isinstance(reason, ssl.SSLCertVerificationError):
            raise DownloadError(f"{url} cannot be read: {said}") from error
        raise Interrupted(said) from error
    except (http.client.InvalidURL, ValueError) as error:
        raise UserError(f"{url!r} is no address to download from: {first_line(error)}") from error
    except (OSError, http.client.HTTPException) as error:
        raise Interrupted(first_line(error)) from error


def _length(url: str, headers) -> int | None:
    """Bytes of the whole file; None if the connection itself marks the end. Without either, half would look whole."""
    if re.fullmatch(r"\d{1,18}", headers.get("Content-Length") or ""):
        return int(headers["Content-Length"])
    if "chunked" in (headers.get("Transfer-Encoding") or "").lower():
        return None
    raise DownloadError(f"{url} cannot be downloaded: the server does not say how long the file is")


def _content_range(text: str) -> tuple[int, int | None]:
    """(first byte, bytes of the whole file if known) of `bytes 5-9/10`; (-1, None) for anything else."""
    found = re.fullmatch(r"bytes (\d{1,18})-\d{1,18}/(\d{1,18}|\*)", text.strip())
    return (int(found[1]), None if found[2] == "*" else int(found[2])) if found else (-1, None)


def _blocks(response) -> Iterator[bytes]:
    """The blocks of an answer. A broken connection raises Interrupted; a full disk, outside, stays an OSError."""
    while True:
        try:
            block = response.read1(BLOCK)
        except (OSError, http.client.HTTPException) as error:
            raise Interrupted(first_line(error)) from error
        if not block:
            return
        yield block
