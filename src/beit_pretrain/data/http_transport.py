"""Downloads over HTTP, by aiohttp: sessions, requests, and what the answers mean.

fsspec's files send two requests per file, do not tell a part from the whole file, and lose the bytes received before a
connection broke.
"""

from __future__ import annotations

import asyncio
import os
import re
import ssl
import string
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent import futures
from functools import cache
from typing import Any, NoReturn
from urllib.parse import quote, urlsplit
from urllib.request import getproxies, proxy_bypass

from beit_pretrain import __version__
from beit_pretrain.data.transfer import GLANCE, PermanentError, Transfer, TransientError
from beit_pretrain.errors import first_line

POLL = 0.01  # seconds between two looks whether the reader of a stream has made room
PASSING = (408, 425, 429)  # HTTP statuses that are retried, as are all from 500 on


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


async def receive_http(url: str, headers: dict[str, str], transfer: Transfer) -> None:
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
