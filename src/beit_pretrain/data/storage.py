"""Files that are no local paths, through fsspec: http(s)://, s3://, gs://, hf:// and file://; and pipe:COMMAND.

A location stands for a folder: the manifest and the shards lie below it. A `pipe:` location is a shell command that
writes the file `{name}` to its standard output, such as `pipe:ssh host cat /data/train/{name}`. Locations come from the
config alone, never from a manifest, whose names are plain file names. Credentials come from the environment (HF_TOKEN,
AWS_*, ...), and messages show no address's query or password.

What may pass (a dropped or stalled connection, half a file, HTTP 408, 425, 429, 5xx) is tried again with growing
pauses, resuming in the file where the server has the same version of it. A transfer has stalled if nothing comes for
`timeout` seconds, or less than 1 kB/s, or if the header of an HTTP answer is not complete after so long.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import re
import shlex
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from time import sleep
from typing import BinaryIO
from urllib.parse import quote, urlsplit, urlunsplit

from tqdm import tqdm

from beit_pretrain import fileio
from beit_pretrain.data.transports import LocalWriteError, PermanentError, Transfer, receive_once
from beit_pretrain.errors import UserError, first_line

SCHEMES = ("http", "https", "s3", "gs", "hf", "file", "pipe")
PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds before the second try, doubled before each further one up to the longest
JITTER = (0.5, 1.0)  # of a pause, so that many processes do not ask again at once
_random = random.Random()  # of its own: the global one belongs to the views


class DownloadError(UserError):
    """A file that cannot be had: no network, no such file, or a connection that breaks again and again."""


LASTING = (PermanentError, FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


def is_remote(source: object) -> bool:
    """Whether a source is a location and not a path. Raises UserError for an unknown scheme."""
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
        return without_secrets(self.location)

    def read(self, name: str, limit: int, check: Callable[[bytes], object] = len) -> bytes:
        """The content of a small file of at most `limit` bytes. Raises DownloadError.

        `check` raises OSError for content that is incomplete: not every server says how long a file is.
        """
        buffer = io.BytesIO()
        transfer = Transfer(buffer, self.timeout, limit, begin=lambda total, version: buffer.truncate())
        self._receive(name, transfer, lambda: check(buffer.getvalue()))
        return buffer.getvalue()

    def fetch(self, name: str, out: BinaryIO, size: int, check: Callable[[], None]) -> None:
        """Write the file `name`, of just `size` bytes, to the beginning of `out`.

        `check` looks at what was written, and raises OSError if it is to be fetched again.
        Raises DownloadError if the file cannot be had, OSError if `out` cannot be written.
        """

        def whole() -> None:
            if out.tell() != size:
                raise OSError(f"broke off after {out.tell():,} of {size:,} bytes")
            check()

        self._receive(name, Transfer(out, self.timeout, size), whole)

    def _receive(self, name: str, transfer: Transfer, check: Callable[[], object]) -> None:
        _receive(self._address(name), transfer, self.retries + 1, check, f"{name} of {self} cannot be fetched")

    def _address(self, name: str) -> str:
        if self.location.startswith("pipe:"):
            return self.location.replace("{name}", shlex.quote(name))
        if not self.location.lower().startswith(("http", "file")):
            return f"{self.location.rstrip('/')}/{name}"
        parts = urlsplit(self.location)
        return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}"))


def download(
    url: str,
    path: Path,
    *,
    check: Callable[[Path], None] | None = None,
    timeout: float = 30.0,
    attempts: int = 5,
) -> None:
    """Put the file at `url` (any scheme but pipe) under the name `path`, unless there is one already.

    It arrives under its name whole and checked, or not at all. What has come so far lies beside it as `.NAME.partial`,
    with a note of its version in `.NAME.partial.json`: a later attempt, also of another process, resumes there if the
    server still has that version. Safe to call from several processes at once: one downloads, the others wait for it.

    Args:
        check: called with the whole file before it gets its name; raises UserError for a file that must not be kept.
        timeout: seconds to wait for a connection, or for the next bytes.
        attempts: how often in a row may fail without a byte of progress; pauses of 1, 2, 4, ... seconds lie between.

    Raises:
        DownloadError: the address gave no whole file. What came is kept for the next call.
        UserError: no address that can be read, or what `check` raises; nothing is kept then.
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
    """Complete the file `partial`. The note says of which version of which address its bytes are."""
    address = hashlib.sha256(url.encode()).hexdigest()  # which may hold a secret
    with partial.open("ab") as out, tqdm(desc=name, unit="B", unit_scale=True, unit_divisor=1024) as bar:

        def begin(total: int | None, version: str | None) -> None:
            out.truncate(0)  # first: a new note must never stand beside old bytes
            note.write_text(json.dumps([address, total, version]))

        try:
            noted, total, version = json.loads(note.read_text())
        except (OSError, ValueError, TypeError):
            noted = None
        if noted != address or (total is not None and out.tell() > total):
            out.truncate(0)
            out.seek(0)
            total = version = None
        if total is None or out.tell() < total:  # else an earlier process ended before the file got its name
            transfer = Transfer(out, timeout, None, total, version, begin, bar)
            failure = f"{without_secrets(url)} cannot be downloaded"
            _receive(url, transfer, attempts, lambda: None, failure, progress_counts=True)


def _receive(
    url: str, transfer: Transfer, tries: int, check: Callable[[], object], failure: str, progress_counts: bool = False
) -> None:
    """Try until the file is whole and `check` raises no OSError.

    `progress_counts`: tries that bring the file further than any before are not counted.
    """
    failed, furthest = 0, transfer.position
    while True:
        try:
            receive_once(url, transfer)
            check()
            return
        except LocalWriteError as error:
            raise error.args[0] from None
        except (PermanentError, OSError) as error:
            failed = 0 if progress_counts and transfer.position > furthest else failed + 1
            furthest = max(furthest, transfer.position)
            why, asked = _reason(error), getattr(error, "pause", 0.0)
            if isinstance(error, LASTING):
                raise DownloadError(f"{failure}: {why}") from None
            if failed >= tries:
                raise DownloadError(f"{failure} ({tries} {'tries' if tries > 1 else 'try'}): {why}") from None
            if transfer.limit is not None and transfer.position >= transfer.limit:  # whole, but not as it should be
                transfer.restart()
        transfer.bar.set_postfix_str(why)
        pause = min(LONGEST_PAUSE, PAUSE * 2.0 ** min(max(failed - 1, 0), 10))
        sleep(max(pause * _random.uniform(*JITTER), min(asked, LONGEST_PAUSE)))


def _reason(error: Exception) -> str:
    """A failure in a few words, without the queries of addresses."""
    said = first_line(error)
    if isinstance(error, TimeoutError):
        said = f"it stalled ({said})"
    elif isinstance(error, LASTING) and not isinstance(error, PermanentError):
        said = f"{type(error).__name__}: {said}"
    return re.sub(r"(\w://[^\s?'\"]*)\?[^\s'\"]*", r"\1", said)
