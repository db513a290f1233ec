"""One try to get a file that is no local path: HTTP and the other file systems of fsspec, the Hugging Face Hub, pipes.

Each transport writes into a `Transfer`, from where that stands if the server can, else from the beginning. HTTP goes
through the connections of fsspec's file system, but with requests of our own: its files ask twice for each file, do
not tell a part from the whole, and lose what came before a connection broke.
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
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, BinaryIO, NoReturn
from urllib.parse import quote, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from tqdm import tqdm

from beit_pretrain import __version__
from beit_pretrain.errors import first_line

CHUNK = 1 << 20  # bytes
SLOWEST = 1000  # bytes per second below which a transfer counts as stalled
PASSING = (408, 425, 429)  # HTTP statuses that another try may change, as all from 500 on


class PermanentError(Exception):
    """A failure that another try would not mend."""


class TransientError(OSError):
    """A failure that another try may mend. `pause`: seconds that the server asks to wait."""

    def __init__(self, reason: str, pause: float = 0.0):
        super().__init__(reason)
        self.pause = pause


class LocalWriteError(Exception):
    """Its argument is the OSError of the file that a transfer is written to: it is not the server's."""


@dataclass
class Transfer:
    """A file on its way."""

    out: BinaryIO  # where it is written, from its position on
    timeout: float  # seconds without a byte after which it has stalled
    limit: int | None = None  # bytes that it may have; None = as many as the server says, which then must say it
    total: int | None = None  # bytes of the whole file, and its ETag or date, if they are known
    version: str | None = None
    begin: Callable[[int | None, str | None], object] = lambda total, version: None  # called before the first byte
    bar: tqdm = field(default_factory=lambda: tqdm(disable=True))

    def __post_init__(self) -> None:
        self.position = self.out.tell()
        self._mark = (time.monotonic(), self.position)

    def restart(self) -> None:
        """Take the next bytes as the first ones."""
        self.out.seek(0)
        self.position, self.total, self.version = 0, None, None

    def resume(self, start: int, total: int | None = None, version: str | None = None) -> None:
        """Take the bytes that follow as those from `start` on, of a file of `total` bytes.

        Raises TransientError, and starts over, if they do not continue what is here.
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
        """Take the next bytes."""
        if self.limit is not None and self.position + len(chunk) > self.limit:
            raise PermanentError(f"it has more than {self.limit:,} bytes")
        try:
            self.out.write(chunk)
        except OSError as error:
            raise LocalWriteError(error) from None
        self.position += len(chunk)
        self.bar.update(len(chunk))
        since, position = self._mark
        if (passed := time.monotonic() - since) > self.timeout:
            if self.position - position < SLOWEST * passed:
                raise TimeoutError(f"slower than {SLOWEST} bytes/s")
            self._mark = (time.monotonic(), self.position)

    def finish(self) -> None:
        """Check, when the transport says that nothing more comes. Raises TransientError if bytes are missing."""
        try:
            self.out.flush()
        except OSError as error:
            raise LocalWriteError(error) from None
        if self.total is not None and self.position != self.total:
            raise TransientError(f"broke off after {self.position:,} of {self.total:,} bytes")


def receive_once(url: str, transfer: Transfer) -> None:
    """One try. Raises PermanentError, TransientError, LocalWriteError, or OSError for other troubles."""
    scheme = url.partition(":")[0].lower()
    try:
        if scheme == "pipe":
            _from_pipe(url[5:], transfer)
        elif scheme in ("http", "https", "hf"):
            _from_http(*_hub_address(url) if scheme == "hf" else (url, {}), transfer)
        else:
            _from_file_system(scheme, url, transfer)
        transfer.finish()
    except (OSError, PermanentError, LocalWriteError, MemoryError):
        raise
    except Exception as error:  # the clouds' own libraries have exceptions of their own
        raise TransientError(f"{type(error).__name__}: {first_line(error)}") from None


def _from_pipe(command: str, transfer: Transfer) -> None:
    transfer.resume(0)
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
                if not poll.poll(transfer.timeout * 1000):
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
            if process.returncode is None:  # not waited for, so the number of its group is still its own
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@cache
def _file_system(scheme: str, process: int) -> Any:
    """fsspec's file system of this process (by its number).

    Its thread and its connections do not survive a fork. A parent's stay here unused: to close them in a child would
    disturb the parent's.
    """
    import fsspec.asyn

    settings: dict[str, Any] = {}
    if scheme == "http":
        os.register_at_fork(after_in_child=fsspec.asyn.reset_lock)  # which fsspec leaves as it was at the fork
        settings = {"get_client": _client, "encoded": True}
    return fsspec.filesystem(scheme, skip_instance_cache=True, **settings)


def _from_file_system(scheme: str, url: str, transfer: Transfer) -> None:
    """s3://, gs://, file://: time-outs, credentials and endpoints are those of the file system."""
    try:
        system = _file_system(scheme, os.getpid())
        path = unquote(urlsplit(url).path) if scheme == "file" else system._strip_protocol(url)
        with system.open(path, "rb") as file:
            version = system.ukey(path)
            start = transfer.position if transfer.version == version else 0
            transfer.resume(start, file.size, version)
            file.seek(start)
            while chunk := file.read(CHUNK):
                transfer.write(chunk)
    except ImportError as error:
        said = f"it needs more packages: pip install 'beit_pretrain[remote]' ({first_line(error)})"
        raise PermanentError(said) from None


def _hub_address(url: str) -> tuple[str, dict[str, str]]:
    """The address of `hf://[datasets/]OWNER/NAME[@REVISION]/PATH` on the Hugging Face Hub, and the headers for it.

    The token is that of the environment (HF_TOKEN) or of `hf auth login`.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import build_hf_headers

    system = _file_system("hf", os.getpid())
    try:
        found = system.resolve_path(url)
    except HfHubHTTPError as error:
        _refuse(error.response.status_code, error.response.reason_phrase, error.response.headers)
    except (OSError, NotImplementedError, ValueError) as error:  # no such repository, offline mode, no address
        raise PermanentError(first_line(error)) from None
    if not hasattr(found, "repo_id"):
        raise PermanentError("hf:// reads data sets and models, not buckets")
    place = {"repo_type": found.repo_type, "revision": found.revision, "endpoint": system.endpoint}
    return hf_hub_url(found.repo_id, found.path_in_repo, **place), build_hf_headers(library_name="beit_pretrain")


def _from_http(url: str, headers: dict[str, str], transfer: Transfer) -> None:
    system = _file_system("http", os.getpid())
    future = asyncio.run_coroutine_threadsafe(_http(system, url, headers, transfer), system.loop)
    try:
        future.result()
    finally:
        future.cancel()  # after a Ctrl-C


async def _client(**settings: Any) -> Any:
    """The session of aiohttp for fsspec: each request has a connection of its own, so that a fork finds none idle."""
    import aiohttp

    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(force_close=True),
        headers={"User-Agent": f"beit_pretrain/{__version__}", "Accept-Encoding": "identity"},
        auto_decompress=False,
        requote_redirect_url=False,  # signed addresses are good as they are alone
        **settings,
    )


async def _http(system: Any, url: str, headers: dict[str, str], transfer: Transfer) -> None:
    import aiohttp

    async def once(request: Any, handler: Any) -> Any:
        try:
            return await handler(request)
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
            raise _broken(error) from None  # aiohttp itself would ask again at once

    if transfer.position:
        headers = {**headers, "Range": f"bytes={transfer.position}-"}
        # A weak ETag may not stand in If-Range (RFC 9110, 13.1.5): then the answer's own headers are compared.
        if transfer.version and not transfer.version.startswith("W/"):
            headers["If-Range"] = transfer.version
    parts = urlsplit(url)
    settings = {
        "headers": headers,
        "timeout": aiohttp.ClientTimeout(total=None, sock_read=transfer.timeout),
        "middlewares": (once,),
        # Not aiohttp's `trust_env`, which also takes passwords from ~/.netrc, where they may be another service's.
        "proxy": None if proxy_bypass(parts.netloc) else getproxies().get(parts.scheme),
    }
    try:
        session, address = await system.set_session(), system.encode_url(quote(url, safe=string.punctuation))
        try:
            async with asyncio.timeout(transfer.timeout):
                response = await session.get(address, **settings)
        except TimeoutError:
            raise TimeoutError("the header of its answer does not end") from None
        async with response:
            _accept(response, transfer)
            async for chunk in response.content.iter_any():
                transfer.write(chunk)
    except aiohttp.ServerTimeoutError:
        raise TimeoutError(f"no bytes for {transfer.timeout:g} s") from None
    except aiohttp.ClientPayloadError:
        transfer.finish()  # says how much is missing, if that is known
        raise TransientError(f"broke off after {transfer.position:,} bytes") from None
    except aiohttp.TooManyRedirects as error:
        raise PermanentError(f"HTTP {error.history[-1].status}, again and again") from None
    except (aiohttp.NonHttpUrlClientError, ValueError):
        raise PermanentError("its address, or where that leads to, is none of HTTP") from None
    except aiohttp.ClientResponseError as error:  # not HTTP
        raise TransientError(" ".join(error.message.split())) from None
    except aiohttp.ClientError as error:
        raise _broken(error) from None


def _broken(error: Any) -> Exception:
    """What to raise for an error of aiohttp's: a connection that could not be made, or that broke."""
    cause = getattr(error, "os_error", error)
    if isinstance(cause, ssl.SSLCertVerificationError):
        return PermanentError(first_line(cause))
    number = getattr(cause, "errno", None) or 0  # names that cannot be resolved have one below 0
    return TransientError(os.strerror(number) if number > 0 else getattr(cause, "strerror", None) or first_line(cause))


def _accept(response: Any, transfer: Transfer) -> None:
    """Take the header of an answer."""
    headers, start, total = response.headers, 0, None
    if response.status == 206 or (response.status == 416 and transfer.position):  # 416: it has become shorter
        if found := re.fullmatch(r"bytes (\d{1,18})-\d{1,18}/(\d{1,18}|\*)", headers.get("Content-Range", "").strip()):
            start, total = int(found[1]), None if found[2] == "*" else int(found[2])
        else:
            start = -1
    elif response.status != 200:
        _refuse(response.status, response.reason, headers)
    if total is None and response.content_length is not None:
        total = start + response.content_length
    if total is None and transfer.limit is None and "chunked" not in headers.get("Transfer-Encoding", "").lower():
        raise PermanentError("the server does not say how long the file is")
    transfer.resume(start, total, headers.get("ETag") or headers.get("Last-Modified"))


def _refuse(status: int, reason: str | None, headers: Any) -> NoReturn:
    """Raise the error for the status of an answer without a file. X-Error-* are headers of the Hugging Face Hub."""
    said = f"HTTP {status} {headers.get('X-Error-Message') or reason or ''}".strip()
    if status in (401, 403) and "X-Error-Code" in headers:
        said += "; what is private or gated needs HF_TOKEN"
    if status in PASSING or status >= 500:
        pause = headers.get("Retry-After", "")
        raise TransientError(said, float(pause) if re.fullmatch(r"\d{1,9}", pause) else 0.0)
    raise PermanentError(said)
