"""Downloads remote files: http(s)://, s3://, gs://, hf://, file:// and pipe:COMMAND.

A location is a folder with the manifest and the shards. A `pipe:` location is a shell command that writes the file
`{name}` to its standard output, such as `pipe:ssh host cat /data/train/{name}`. Locations come only from the config,
never from a manifest, whose names are plain file names. Credentials come from the environment (HF_TOKEN, AWS_*, ...);
messages never show the query or password of an address.

Transient failures (a dropped or stalled connection, a truncated file, HTTP 408, 425, 429, 5xx) are retried with growing
pauses. A retry resumes in the middle of the file if the server still has the same version. A transfer has stalled if it
gets no byte for `timeout` seconds, or less than 1 kB/s, or if an HTTP header is incomplete after that time. While
s3://, gs:// and file:// wait for a first answer, and while hf:// looks up an address, their libraries' timeouts apply.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import re
import shlex
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from time import sleep
from typing import Any, BinaryIO, cast
from urllib.parse import quote, urlsplit, urlunsplit

from tqdm import tqdm

from beit_pretrain import fileio
from beit_pretrain.data.transfer import LocalWriteError, PermanentError, Transfer
from beit_pretrain.data.transports import receive_once
from beit_pretrain.errors import UserError, first_line

SCHEMES = ("http", "https", "s3", "gs", "hf", "file", "pipe")
PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds before the first retry, doubled for each further one up to the longest
JITTER = (0.5, 1.0)  # random factor of a pause, so that many processes do not retry at once
_random = random.Random()  # not the global generator, so that views do not change


class DownloadError(UserError):
    """A download failed: no network, no such file, or repeated broken connections."""


class MissingError(DownloadError):
    """There is no such file, or it is refused: trying again would not help."""


LASTING = (PermanentError, FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


def is_remote(source: object) -> bool:
    """Whether a source is a remote location and not a path. Raises UserError for an unknown scheme."""
    if not isinstance(source, str) or not (found := re.match(r"([A-Za-z][A-Za-z0-9+]+):", source)):
        return False
    scheme = found[1].lower()
    if scheme in SCHEMES:
        return True
    if source[len(scheme) :].startswith("://"):
        raise UserError(f"{source}: there are {', '.join(SCHEMES)} and paths, not {scheme}")
    return False


def without_secrets(url: str) -> str:
    """An address without password and query, for messages and records."""
    if url.startswith("pipe:"):
        return url
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def check_address(url: str, end: str = "") -> None:
    """Raise UserError for a password in an address. `end`: of the path of the command that is proposed."""
    if url.lower().startswith("http") and "@" in urlsplit(url).netloc:
        raise UserError(
            f"{without_secrets(url)}: names and passwords in an address are not sent; give a signed address, or a pipe "
            f"such as 'pipe:curl -sf --netrc https://HOST/PATH{end}'"
        )


def join(location: str, name: str) -> str:
    """The address of a file in a folder at an address; the query of the folder is the file's too."""
    if not location.lower().startswith(("http", "file")):
        return f"{location.rstrip('/')}/{name}"
    parts = urlsplit(location)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}"))


def read_file(
    url: str,
    limit: int,
    retries: int,
    timeout: float,
    check: Callable[[bytes], object] = len,
    failure: str = "",
) -> bytes:
    """The content of a small file at an address, of at most `limit` bytes.

    `check` raises OSError for incomplete content, since not every server sends the length of a file. `failure`: begins
    the message. Raises MissingError if there is no such file, DownloadError otherwise.
    """
    buffer = io.BytesIO()
    transfer = Transfer(buffer, timeout, limit, begin=lambda total, version: buffer.truncate())
    failure = failure or f"{without_secrets(url)} cannot be fetched"
    receive(url, transfer, retries + 1, lambda: check(buffer.getvalue()), failure)
    return buffer.getvalue()


def check_json(data: bytes) -> None:
    """Raise OSError for a JSON object that is not whole. Anything else passes: its reader reports it."""
    if data.lstrip()[:1] == b"{":
        try:
            json.loads(data)
        except ValueError:
            raise OSError(f"broke off after {len(data):,} bytes, or is damaged") from None
        except RecursionError:
            pass


def fetch_file(url: str, transfer: Transfer, retries: int, check: Callable[[], object]) -> None:
    """Download the file at an address into a transfer; `check` as of `Remote.fetch`.

    Raises DownloadError if the download fails, OSError if the local file cannot be written.
    """
    receive(url, transfer, retries + 1, check, f"{without_secrets(url)} cannot be fetched")


@dataclass(frozen=True)
class Remote:
    """A remote folder at a location as in the module's docstring."""

    location: str
    retries: int = 5  # after the first try
    timeout: float = 60.0  # seconds without a byte after which a try fails

    def __post_init__(self) -> None:
        if self.location.startswith("pipe:") and "{name}" not in self.location:
            raise UserError(f"{self.location}: a pipe needs {{name}} where the name of the file belongs")
        check_address(self.location, "/{name}")

    def __str__(self) -> str:
        return without_secrets(self.location)

    def read(self, name: str, limit: int, check: Callable[[bytes], object] = len) -> bytes:
        """The content of a small file; arguments and errors as of `read_file`."""
        return read_file(self.address(name), limit, self.retries, self.timeout, check, self._failure(name))

    def read_end(self, name: str, size: int, start: int) -> bytes:
        """The bytes from `start` on of a file of `size` bytes. Raises DownloadError.

        From a server without ranges all bytes come, and those before `start` are dropped.
        """
        tail = _Tail(start)

        def whole() -> None:
            if tail.tell() != size:
                raise OSError(f"broke off after {tail.tell():,} of {size:,} bytes")

        tail.seek(start)
        self._receive(name, Transfer(cast(BinaryIO, tail), self.timeout, size), whole)
        return bytes(tail.kept)

    def fetch(self, name: str, out: BinaryIO, size: int, check: Callable[[], None]) -> None:
        """Download the file `name`, of exactly `size` bytes, to the start of `out`.

        `check` checks the written file and raises OSError if it must be downloaded again.
        Raises DownloadError if the download fails, OSError if `out` cannot be written.
        """

        def whole() -> None:
            if out.tell() != size:
                raise OSError(f"broke off after {out.tell():,} of {size:,} bytes")
            check()

        self._receive(name, Transfer(out, self.timeout, size), whole)

    def _receive(self, name: str, transfer: Transfer, check: Callable[[], object]) -> None:
        receive(self.address(name), transfer, self.retries + 1, check, self._failure(name))

    def _failure(self, name: str) -> str:
        return f"{name} of {self} cannot be fetched"

    def address(self, name: str) -> str:
        """The address of a file in the folder."""
        if self.location.startswith("pipe:"):
            return self.location.replace("{name}", shlex.quote(name))
        return join(self.location, name)


class _Tail(io.RawIOBase):
    """A file that keeps only its bytes from `start` on."""

    def __init__(self, start: int):
        self.start, self.position, self.kept = start, 0, bytearray()

    def tell(self) -> int:
        return self.position

    def seek(self, position: int, whence: int = 0) -> int:
        self.position = position
        del self.kept[max(0, position - self.start) :]
        return position

    def write(self, data: Any) -> int:
        before = max(0, self.start - self.position)
        self.kept += data[before:]
        self.position += len(data)
        return len(data)


def download(
    url: str,
    path: Path,
    *,
    check: Callable[[Path], None] | None = None,
    timeout: float = 30.0,
    attempts: int = 5,
) -> None:
    """Download the file at `url` (any scheme but pipe) to `path`, unless `path` exists.

    The file gets its name only when it is complete and checked. Until then it is `.NAME.partial`, with its version in
    `.NAME.partial.json`; a later call, also from another process, resumes it if the server still has that version.
    Several processes may call this at once: one downloads, the others wait.

    Args:
        check: called with the complete file before it gets its name; raises UserError to reject and delete it.
        timeout: seconds to wait for a connection, or for the next bytes.
        attempts: failures in a row without a byte of progress before giving up, with pauses of 1, 2, 4, ... seconds.

    Raises:
        DownloadError: the file could not be downloaded completely. The partial file is kept for the next call.
        UserError: `url` is not a valid address, or `check` raised; nothing is kept.
    """
    if not _is_address(url):
        raise UserError(f"{url!r} is no address to download from; it starts with https://, hf://, s3:// or file:///")
    message = f"{path.parent}: waiting for another process that writes there"
    partial = fileio.partial_path(path)
    note = partial.with_name(f"{partial.name}.json")
    lock = fileio.exclusive_lock(path.with_name(f".{path.name}.lock"), message, wait=True, remove=True)
    with lock, ExitStack() as leftovers:
        for file in (partial, note):
            leftovers.callback(file.unlink, missing_ok=True)
        if not path.exists():
            try:
                _resume(url, partial, note, path.name, timeout, attempts)
            except BaseException:
                if partial.is_file() and partial.stat().st_size:
                    leftovers.pop_all()  # for the next call
                raise
            if check is not None:
                check(partial)
            fileio.publish(partial, path)


def _is_address(url: str) -> bool:
    try:
        _ = urlsplit(url).port
    except ValueError:
        return False
    return bool(re.match(r"(https?|s3|gs|hf)://[^/\s]+(/|$)|file:///", url))


def _resume(url: str, partial: Path, note: Path, name: str, timeout: float, attempts: int) -> None:
    """Complete the file `partial`. The file `note` holds the address and version that its bytes come from."""
    address = hashlib.sha256(url.encode()).hexdigest()  # hashed, since it may contain a secret
    with partial.open("ab") as out, tqdm(desc=name, unit="B", unit_scale=True, unit_divisor=1024) as bar:

        def begin(total: int | None, version: str | None) -> None:
            out.truncate(0)  # before the note: a new note must never describe old bytes
            note.write_text(json.dumps([address, total, version]))

        try:
            noted, total, version = json.loads(note.read_text())
        except (OSError, ValueError, TypeError):
            noted = None
        if noted != address or (total is not None and out.tell() > total):
            out.truncate(0)
            out.seek(0)
            total = version = None
        if total is None or out.tell() < total:  # else complete: an earlier process ended before renaming it
            transfer = Transfer(out, timeout, None, total, version, begin, bar)
            failure = f"{without_secrets(url)} cannot be downloaded"
            receive(url, transfer, attempts, lambda: None, failure, progress_counts=True)


def receive(
    url: str,
    transfer: Transfer,
    tries: int,
    check: Callable[[], object],
    failure: str,
    progress_counts: bool = False,
    speed: float = 0.0,
    wait: Callable[[float], object] | None = None,
) -> None:
    """Try until the file is whole and `check` raises no OSError.

    `progress_counts`: a try that gets further than any before, by more than `speed` bytes/s, resets the count of
    failures. `wait`: waits so many seconds between two tries.
    Raises DownloadError, which begins with `failure`; OSError if it cannot be written.
    """
    failed, furthest = 0, transfer.position
    while True:
        begun = time.monotonic() - transfer.forgiven
        try:
            receive_once(url, transfer)
            check()
            return
        except LocalWriteError as error:
            raise error.args[0] from None
        except (PermanentError, OSError) as error:
            passed = time.monotonic() - transfer.forgiven - begun
            progress = transfer.position - furthest > speed * passed
            failed = 0 if progress_counts and progress else failed + 1
            furthest = max(furthest, transfer.position)
            why, asked = reason_of(error), getattr(error, "pause", 0.0)
            if isinstance(error, LASTING):
                raise MissingError(f"{failure}: {why}") from None
            if failed >= tries:
                raise DownloadError(f"{failure} ({tries} {'tries' if tries > 1 else 'try'}): {why}") from None
            if transfer.limit is not None and transfer.position >= transfer.limit:  # complete, but wrong
                transfer.restart()
        transfer.bar.set_postfix_str(why)
        (wait or sleep)(pause_before_retry(failed, asked))


def pause_before_retry(failed: int, asked: float = 0.0) -> float:
    """Seconds to wait after `failed` failures in a row. `asked`: seconds that the server asks for."""
    pause = min(LONGEST_PAUSE, PAUSE * 2.0 ** min(max(failed - 1, 0), 10))
    return max(pause * _random.uniform(*JITTER), min(asked, LONGEST_PAUSE))


def reason_of(error: Exception) -> str:
    """A failure in a few words, without the query strings of addresses."""
    said = first_line(error)
    if isinstance(error, TimeoutError):
        said = f"it stalled ({said})"
    elif isinstance(error, LASTING) and not isinstance(error, PermanentError):
        said = f"{type(error).__name__}: {said}"
    return re.sub(r"(\w://[^\s?'\"]*)\?[^\s'\"]*", r"\1", said)
