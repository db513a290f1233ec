"""One try to download a remote file: HTTP, the Hugging Face Hub, the file systems of fsspec, pipes.

Each transport writes into a `Transfer`, from its current position if the server supports that, else from the start.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import tempfile
import time
from functools import cache
from typing import Any
from urllib.parse import unquote, urlsplit

from beit_pretrain.data.http_transport import receive_http, refuse, run_async
from beit_pretrain.data.transfer import CHUNK, GLANCE, LocalWriteError, PermanentError, Transfer, TransientError
from beit_pretrain.errors import first_line


def receive_once(url: str, transfer: Transfer) -> None:
    """Try once. Raises PermanentError, TransientError, LocalWriteError, or OSError for other failures."""
    scheme = url.partition(":")[0].lower()
    transfer.check_ended()
    try:
        if scheme == "pipe":
            _from_pipe(url[5:], transfer)
        elif scheme in ("http", "https", "hf"):
            run_async(receive_http(*_hub_address(url) if scheme == "hf" else (url, {}), transfer), transfer.check_ended)
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
