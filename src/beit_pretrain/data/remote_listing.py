"""Sizes and versions of many remote files, without reading them, and what folders of s3://, gs:// and hf:// hold.

HTTP answers HEAD requests, many at a time over kept connections; where a server has none, a request for the first byte.
The Hub and buckets list a folder in one call. Failures are retried as in storage.py.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar
from urllib.parse import unquote, urlsplit

from tqdm import tqdm

from beit_pretrain.data.http_transport import (
    PASSING,
    broken,
    http_address,
    http_session,
    http_settings,
    refuse,
    run_async,
    without_weakness,
)
from beit_pretrain.data.settings import RemoteOptions
from beit_pretrain.data.storage import (
    LASTING,
    DownloadError,
    MissingError,
    check_address,
    pause_before_retry,
    reason_of,
    without_secrets,
)
from beit_pretrain.data.transfer import PermanentError, TransientError
from beit_pretrain.data.transports import file_system
from beit_pretrain.errors import first_line

LISTABLE = ("s3", "gs", "hf")  # schemes whose folders can be listed
AT_ONCE = 64  # requests
SILENT = 2.0  # seconds before a progress bar is shown
Result = TypeVar("Result")


class RemoteFile(NamedTuple):
    """A file, its size in bytes and its version (ETag, hash or date), as far as they are known."""

    url: str
    bytes: int | None
    version: str | None


def stat_files(urls: list[str], access: RemoteOptions, progress: bool = True) -> list[RemoteFile]:
    """Size and version of the files at `urls`. Raises MissingError if one does not exist, DownloadError if all tries
    fail."""
    kinds: dict[str, list[str]] = {}
    for url in urls:
        check_address(url)
        kinds.setdefault(url.partition(":")[0].lower(), []).append(url)
    found: dict[str, RemoteFile] = {}
    with tqdm(total=len(urls), unit=" files", desc="sizes", delay=SILENT, disable=not progress) as bar:
        for kind, some in kinds.items():
            if kind in ("http", "https"):
                done = run_async(_stat_http(some, access, bar))
            elif kind in LISTABLE:
                done = _stat_listed(kind, some, access, bar)
            elif kind == "file":
                done = [_stat_path(url) for url in some]
            else:
                done = [RemoteFile(url, None, None) for url in some]
            found.update((file.url, file) for file in done)
    return [found[url] for url in urls]


def _stat_path(url: str) -> RemoteFile:
    try:
        state = os.stat(unquote(urlsplit(url).path))
    except OSError as error:
        raise MissingError(f"{url} cannot be found: {error.strerror}") from None
    return RemoteFile(url, state.st_size, str(state.st_mtime_ns))


# --- s3, gs, hf ----------------------------------------------------------------------------------------------------


def list_folder(address: str, access: RemoteOptions) -> list[RemoteFile]:
    """The files in a folder of a `LISTABLE` scheme, by name. Raises MissingError if there is no such folder."""
    scheme = address.partition(":")[0].lower()

    def listed() -> list[RemoteFile]:
        system = file_system(scheme)
        entries = system.ls(address.rstrip("/"), detail=True, refresh=True)
        files = [entry for entry in entries if entry["type"] == "file"]
        files = [RemoteFile(f"{scheme}://{e['name'].lstrip('/')}", e.get("size"), _version(e)) for e in files]
        return sorted(files)

    return tried(f"{without_secrets(address)} cannot be listed", listed, access)


def glob_remote(pattern: str, access: RemoteOptions | None = None) -> list[str]:
    """The addresses that match a glob of a `LISTABLE` scheme, sorted."""
    scheme = pattern.partition(":")[0].lower()

    def matched() -> list[str]:
        return sorted(f"{scheme}://{name.lstrip('/')}" for name in file_system(scheme).glob(pattern))

    return tried(f"{without_secrets(pattern)} cannot be listed", matched, access or RemoteOptions())


def _stat_listed(scheme: str, urls: list[str], access: RemoteOptions, bar: tqdm) -> list[RemoteFile]:
    folders: dict[str, dict[str, RemoteFile]] = {}
    found = []
    for url in urls:
        folder, _, name = url.rpartition("/")
        if folder not in folders:
            folders[folder] = {file.url.rpartition("/")[2]: file for file in list_folder(folder, access)}
        if name not in folders[folder]:
            raise MissingError(f"{without_secrets(url)} does not exist")
        found.append(folders[folder][name]._replace(url=url))
        bar.update()
    return found


def _version(entry: dict[str, Any]) -> str | None:
    """The version of a file by its entry of fsspec. On the Hub it is the SHA-256 of a large file."""
    large = entry.get("lfs")
    if large:
        return str(large["sha256"])
    keys = ("blob_id", "ETag", "etag", "generation", "LastModified", "mtime", "updated", "created")
    return next((str(entry[key]) for key in keys if entry.get(key)), None)


def tried(failure: str, function: Callable[[], Result], access: RemoteOptions) -> Result:
    """The result of `function`, tried again after failures that may pass. Raises MissingError or DownloadError."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    failed = 0
    while True:
        try:
            try:
                return function()
            except HfHubHTTPError as error:
                refuse(error.response.status_code, error.response.reason_phrase, error.response.headers)
            except (NotImplementedError, ValueError, OfflineModeIsEnabled) as error:
                raise PermanentError(first_line(error)) from None
        except LASTING as error:
            raise MissingError(f"{failure}: {reason_of(error)}") from None
        except Exception as error:  # cloud libraries define their own exceptions
            failed += 1
            if failed > access.retries:
                tries = f"{failed} {'tries' if failed > 1 else 'try'}"
                raise DownloadError(f"{failure} ({tries}): {type(error).__name__}: {reason_of(error)}") from None
            time.sleep(pause_before_retry(failed, getattr(error, "pause", 0.0)))


# --- http ----------------------------------------------------------------------------------------------------------


async def _stat_http(urls: Iterable[str], access: RemoteOptions, bar: tqdm) -> list[RemoteFile]:
    found: list[RemoteFile] = []
    without_head: set[str] = set()  # hosts
    rest = iter(urls)

    async def work(session: Any) -> None:
        for url in rest:
            found.append(await _stat(session, url, access, without_head))
            bar.update()

    async with http_session(limit=AT_ONCE, limit_per_host=AT_ONCE) as session:
        workers = [asyncio.ensure_future(work(session)) for _ in range(AT_ONCE)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
    return found


async def _stat(session: Any, url: str, access: RemoteOptions, without_head: set[str]) -> RemoteFile:
    failed, host = 0, urlsplit(url).netloc
    while True:
        try:
            if host not in without_head and (file := await _asked(session, "HEAD", url, access, without_head)):
                return file
            return await _asked(session, "GET", url, access, without_head) or RemoteFile(url, None, None)
        except PermanentError as error:
            raise MissingError(f"{without_secrets(url)} cannot be found: {reason_of(error)}") from None
        except OSError as error:
            failed += 1
            if failed > access.retries:
                tries = f"{failed} {'tries' if failed > 1 else 'try'}"
                raise DownloadError(f"{without_secrets(url)} does not answer ({tries}): {reason_of(error)}") from None
            await asyncio.sleep(pause_before_retry(failed, getattr(error, "pause", 0.0)))


async def _asked(
    session: Any, method: str, url: str, access: RemoteOptions, without_head: set[str]
) -> RemoteFile | None:
    """One request. None if a HEAD request does not say the size: the server may answer GET. Raises as `refuse` does."""
    import aiohttp

    first = {"Range": "bytes=0-0"} if method == "GET" else {}
    settings = http_settings(url, access.timeout)
    try:
        async with asyncio.timeout(access.timeout):
            request = session.request(method, http_address(url), headers=first, allow_redirects=True, **settings)
            async with request as response:
                return _sized(response, method, url, without_head)
    except aiohttp.TooManyRedirects as error:
        raise PermanentError(f"HTTP {error.history[-1].status}, again and again") from None
    except (aiohttp.NonHttpUrlClientError, ValueError):
        raise PermanentError("its address, or a redirect, is not an HTTP address") from None
    except TimeoutError:
        raise TimeoutError(f"no answer for {access.timeout:g} s") from None
    except aiohttp.ClientResponseError as error:  # not HTTP
        raise TransientError(" ".join(error.message.split())[:200]) from None
    except aiohttp.ClientError as error:
        raise broken(error) from None


def _sized(response: Any, method: str, url: str, without_head: set[str]) -> RemoteFile | None:
    headers, status, size = response.headers, response.status, None
    if method == "HEAD":
        if status in (405, 501):
            without_head.add(urlsplit(url).netloc)
        if status in PASSING:
            refuse(status, response.reason, headers)
        size = response.content_length if status == 200 else None
    else:
        ranged = re.fullmatch(r"bytes (?:0-\d{1,18}|\*)/(\d{1,18}|\*)", headers.get("Content-Range", "").strip())
        if status in (206, 416):
            size = int(ranged[1]) if ranged and ranged[1] != "*" else None
        elif status == 200:
            size = response.content_length
        elif status not in (405, 501):
            refuse(status, response.reason, headers)
        response.close()  # the rest of the file may follow
    if method == "HEAD" and size is None:
        return None
    return RemoteFile(url, size, without_weakness(headers.get("ETag") or headers.get("Last-Modified")))
