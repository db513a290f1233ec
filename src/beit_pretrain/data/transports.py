"""One try to download a remote file: HTTP, the Hugging Face Hub, the file systems of fsspec, pipes.

Each transport writes into a `Transfer`, from its current position if the server supports that, else from the start.
HTTP is aiohttp's: fsspec's files send two requests per file, do not tell a part from the whole file, and lose the bytes
received before a connection broke.
"""

from __future__ import annotations

import asyncio
import os
import re
import select
import signal
import ssl
import string
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent import futures
from dataclasses import dataclass, field
from functools import cache
from typing import Any, BinaryIO, NoReturn
from urllib.parse import quote, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from tqdm import tqdm

from beit_pretrain import __version__
from beit_pretrain.errors import first_line

CHUNK = 1 << 20  # bytes
GLANCE = 0.2  # seconds between two looks whether a transfer has been given up
POLL = 0.01  # seconds between two looks whether the reader of a stream has made room
SLOWEST = 1000  # bytes per second below which a transfer counts as stalled
PASSING = (408, 425, 429)  # HTTP statuses that are retried, as are all from 500 on


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


def receive_once(url: str, transfer: Transfer) -> None:
    """Try once. Raises PermanentError, TransientError, LocalWriteError, or OSError for other failures."""
    scheme = url.partition(":")[0].lower()
    transfer.check_ended()
    try:
        if scheme == "pipe":
            _from_pipe(url[5:], transfer)
        elif scheme in ("http", "https", "hf"):
            run_async(_http(*_hub_address(url) if scheme == "hf" else (url, {}), transfer), transfer.check_ended)
        else:
            _from_file_system(scheme, url, transfer)
        transfer.finish()
    except (OSError, PermanentError, LocalWriteError, MemoryError):
        raise
    except Exception as error:  # cloud libraries define their own exceptions
        raise TransientError(f"{type(error).__name__}: {first_line(error)}") from None


def _from_pipe(command: str, transfer: Transfer) -> None:
    transfer.resume(0)
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            ["/bin/sh", "-c", command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=said,
            start_new_session=True,  # so that its child processes can be killed too
        )
        assert process.stdout is not None
        try:
            poll = select.poll()
            poll.register(process.stdout, select.POLLIN | select.POLLHUP)
            while True:
                deadline = time.monotonic() + transfer.timeout
                while not poll.poll(max(0, min(GLANCE, deadline - time.monotonic())) * 1000):
                    transfer.check_ended()
                    if time.monotonic() >= deadline:
                        raise TimeoutError(f"no bytes for {transfer.timeout:g} s")
                if not (chunk := os.read(process.stdout.fileno(), CHUNK)):
                    break
                transfer.write(chunk)
            try:
                code = process.wait(transfer.timeout)
            except subprocess.TimeoutExpired:
                raise TimeoutError(f"its command did not end within {transfer.timeout:g} s") from None
            if code:
                said.seek(0)
                words = said.read(2000).decode(errors="replace").split()
                raise OSError(f"its command ended with exit code {code}" + (f": {' '.join(words)}" if words else ""))
        finally:
            process.stdout.close()
            if process.returncode is None:  # not waited for yet, so its process group still exists
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@cache
def _file_system(scheme: str, process: int) -> Any:
    """fsspec's file system of one process (`process` is its id): its thread and connections do not survive a fork."""
    import fsspec

    return fsspec.filesystem(scheme, skip_instance_cache=True)


def file_system(scheme: str) -> Any:
    """fsspec's file system in this process, for s3, gs, hf and file. Raises PermanentError if a package is missing."""
    try:
        return _file_system(scheme, os.getpid())
    except ImportError as error:
        said = f"it needs more packages: pip install 'beit_pretrain[remote]' ({first_line(error)})"
        raise PermanentError(said) from None


def _from_file_system(scheme: str, url: str, transfer: Transfer) -> None:
    """Download s3://, gs:// or file://; timeouts, credentials and endpoints are those of the file system."""
    system = file_system(scheme)
    path = unquote(urlsplit(url).path) if scheme == "file" else system._strip_protocol(url)
    with system.open(path, "rb") as file:
        version = system.ukey(path)
        start = transfer.position if transfer.version == version else 0
        transfer.resume(start, file.size, version)
        file.seek(start)
        while chunk := file.read(CHUNK):
            transfer.write(chunk)


def _hub_address(url: str) -> tuple[str, dict[str, str]]:
    """HTTP address and headers of `hf://[datasets/]OWNER/NAME[@REVISION]/PATH` on the Hugging Face Hub.

    The token comes from the environment (HF_TOKEN) or from `hf auth login`.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import build_hf_headers

    system = file_system("hf")
    try:
        found = system.resolve_path(url)
    except HfHubHTTPError as error:
        refuse(error.response.status_code, error.response.reason_phrase, error.response.headers)
    except (OSError, NotImplementedError, ValueError) as error:  # no such repository, offline mode, invalid address
        raise PermanentError(first_line(error)) from None
    if not hasattr(found, "repo_id"):
        raise PermanentError("hf:// reads data sets and models, not buckets")
    place = {"repo_type": found.repo_type, "revision": found.revision, "endpoint": system.endpoint}
    return hf_hub_url(found.repo_id, found.path_in_repo, **place), build_hf_headers(library_name="beit_pretrain")


@cache
def _event_loop(process: int) -> asyncio.AbstractEventLoop:
    """The event loop of one process (`process` is its id), in a thread, which does not survive a fork."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return loop


def run_async(coroutine: Coroutine[Any, Any, Any], check: Callable[[], object] = lambda: None) -> Any:
    """The result of a coroutine, which runs in the thread of the event loop. `check` is called now and then, and ends
    the wait by raising."""
    future = asyncio.run_coroutine_threadsafe(coroutine, _event_loop(os.getpid()))
    try:
        while not futures.wait([future], GLANCE).done:
            check()
        return future.result()
    finally:
        future.cancel()  # after a Ctrl-C


def http_session(**connector: Any) -> Any:
    """A session of aiohttp; `connector`: settings of its connections."""
    import aiohttp

    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(**connector),
        headers={"User-Agent": f"beit_pretrain/{__version__}", "Accept-Encoding": "identity"},
        auto_decompress=False,
        requote_redirect_url=False,  # signed addresses must not be changed
    )


def http_settings(url: str, timeout: float) -> dict[str, Any]:
    """Settings of a request to an address."""
    import aiohttp

    parts = urlsplit(url)
    return {
        "timeout": aiohttp.ClientTimeout(total=None, sock_read=timeout),
        # Not aiohttp's `trust_env`: it also sends passwords from ~/.netrc, which may be another service's.
        "proxy": None if proxy_bypass(parts.netloc) else getproxies().get(parts.scheme),
    }


def http_address(url: str) -> Any:
    """An address as aiohttp takes it, encoded as it is."""
    from yarl import URL

    return URL(quote(url, safe=string.punctuation), encoded=True)


async def _http(url: str, headers: dict[str, str], transfer: Transfer) -> None:
    import aiohttp

    async def once(request: Any, handler: Any) -> Any:
        try:
            return await handler(request)
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
            raise broken(error) from None  # otherwise aiohttp retries at once

    if transfer.position:
        headers = {**headers, "Range": f"bytes={transfer.position}-"}
        # If-Range must not hold a weak ETag (RFC 9110, 13.1.5): then `resume` compares the answer's headers.
        if transfer.version and not transfer.version.startswith("W/"):
            headers["If-Range"] = transfer.version
    settings = {**http_settings(url, transfer.timeout), "headers": headers, "middlewares": (once,)}
    session = http_session(force_close=True)  # a server may close a connection after a redirect
    try:
        async with session:
            try:
                async with asyncio.timeout(transfer.timeout):
                    response = await session.get(http_address(url), **settings)
            except TimeoutError:
                raise TimeoutError("the header of its answer does not end") from None
            async with response:
                _accept(response, transfer)
                async for chunk in response.content.iter_any():
                    before = time.monotonic()
                    while not transfer.room():  # all transfers of a process share this thread: none may block it
                        await asyncio.sleep(POLL)
                    transfer.forgive(time.monotonic() - before)
                    transfer.write(chunk)
    except aiohttp.ServerTimeoutError:
        raise TimeoutError(f"no bytes for {transfer.timeout:g} s") from None
    except aiohttp.ClientPayloadError:
        transfer.finish()  # raises with the number of missing bytes, if known
        raise TransientError(f"broke off after {transfer.position:,} bytes") from None
    except aiohttp.TooManyRedirects as error:
        raise PermanentError(f"HTTP {error.history[-1].status}, again and again") from None
    except (aiohttp.NonHttpUrlClientError, ValueError):
        raise PermanentError("its address, or a redirect, is not an HTTP address") from None
    except aiohttp.ClientResponseError as error:  # not HTTP
        raise TransientError(" ".join(error.message.split())[:200]) from None
    except aiohttp.ClientError as error:
        raise broken(error) from None


def broken(error: Any) -> Exception:
    """The exception to raise for an aiohttp connection that failed or broke."""
    cause = getattr(error, "os_error", error)
    if isinstance(cause, ssl.SSLCertVerificationError):
        return PermanentError(first_line(cause))
    number = getattr(cause, "errno", None) or 0  # negative for names that cannot be resolved
    return TransientError(os.strerror(number) if number > 0 else getattr(cause, "strerror", None) or first_line(cause))


def _accept(response: Any, transfer: Transfer) -> None:
    """Process the status and headers of an HTTP answer."""
    headers, start, total = response.headers, 0, None
    if response.status == 206 or (response.status == 416 and transfer.position):  # 416: the file has become shorter
        if found := re.fullmatch(r"bytes (\d{1,18})-\d{1,18}/(\d{1,18}|\*)", headers.get("Content-Range", "").strip()):
            start, total = int(found[1]), None if found[2] == "*" else int(found[2])
        else:
            start = -1
    elif response.status != 200:
        refuse(response.status, response.reason, headers)
    if total is None and response.content_length is not None:
        total = start + response.content_length
    if total is None and transfer.limit is None and "chunked" not in headers.get("Transfer-Encoding", "").lower():
        raise PermanentError("the server does not say how long the file is")
    transfer.resume(start, total, headers.get("ETag") or headers.get("Last-Modified"))


def refuse(status: int, reason: str | None, headers: Any) -> NoReturn:
    """Raise the error for the status of an HTTP answer without a file (X-Error-*: headers of the Hugging Face Hub)."""
    said = f"HTTP {status} {headers.get('X-Error-Message') or reason or ''}".strip()
    if status in (401, 403) and "X-Error-Code" in headers:
        said += "; what is private or gated needs HF_TOKEN"
    if status in PASSING or status >= 500:
        pause = headers.get("Retry-After", "")
        raise TransientError(said, float(pause) if re.fullmatch(r"\d{1,9}", pause) else 0.0)
    raise PermanentError(said)


def without_weakness(version: str | None) -> str | None:
    """A version without the mark of a weak ETag, which compression on the way adds and removes."""
    return version and version.removeprefix("W/")
