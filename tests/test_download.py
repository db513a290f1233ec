"""Downloads: resumed where that is safe, started over where it is not, and never half a file under its name."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from loopback import Answer, serving

from beit_pretrain.data import storage as module
from beit_pretrain.data.storage import DownloadError, download
from beit_pretrain.errors import UserError

DATA = bytes(range(256)) * 80  # 20 KiB
OTHER = DATA[::-1]


@pytest.fixture
def server():
    with serving() as server:
        server.files["/f.bin"] = DATA
        yield server


@pytest.fixture(autouse=True)
def pauses(monkeypatch) -> list[float]:
    """No waiting between attempts; how long it would have been."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    result: list[float] = []
    monkeypatch.setattr(module, "sleep", result.append)
    monkeypatch.setattr(module, "JITTER", (1.0, 1.0))
    return result


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "f.bin"


def partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def is_clean(path: Path) -> bool:
    """Nothing lies in the folder but the file."""
    return os.listdir(path.parent) == [path.name]


def ranges(server) -> list[str | None]:
    return [asked[1] for asked in server.asked]


def refusal(*words, **settings) -> str:
    with pytest.raises(UserError) as caught:
        download(*words, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def stop_after(server, path: Path, size: int) -> None:
    """A first download that ends with `size` bytes."""
    server.next = [Answer(cut=size), Answer(status=404)]
    refusal(f"{server.url}/f.bin", path)
    assert not path.exists()
    assert partial(path).read_bytes() == server.files["/f.bin"][:size]
    server.asked.clear()


def test_a_file_arrives_and_nothing_else(server, path):
    download(f"{server.url}/f.bin", path)
    assert path.read_bytes() == DATA
    assert is_clean(path)
    assert ranges(server) == [None]


def test_existing_files_are_not_downloaded(server, path):
    path.write_bytes(b"mine")
    download(f"{server.url}/f.bin", path)
    assert path.read_bytes() == b"mine"
    assert not server.asked


@pytest.mark.parametrize("data", [b"", b"x"])
def test_small_files(data, server, path):
    server.files["/f.bin"] = data
    download(f"{server.url}/f.bin", path)
    assert path.read_bytes() == data
    assert is_clean(path)


def test_a_connection_that_breaks_several_times_is_resumed(server, path, pauses):
    server.next = [Answer(cut=5000), Answer(cut=3000), Answer(reset=True), Answer(cut=1)]
    download(f"{server.url}/f.bin", path, attempts=2)  # what makes progress does not count
    assert path.read_bytes() == DATA
    assert ranges(server) == [None, "bytes=5000-", "bytes=8000-", "bytes=8000-", "bytes=8001-"]
    assert {asked[2] for asked in server.asked[1:]} == {'"1"'}
    assert pauses == [1, 1, 1, 1]


def test_a_later_call_resumes(server, path):
    stop_after(server, path, 7000)
    download(f"{server.url}/f.bin", path)
    assert path.read_bytes() == DATA
    assert ranges(server) == ["bytes=7000-"]
    assert is_clean(path)


def test_a_killed_process_is_resumed(server, path):
    server.next = [Answer(slow=0.1)]
    code = f"download({server.url + '/f.bin'!r}, Path({str(path)!r}))"
    code = f"from pathlib import Path; from beit_pretrain.data.storage import download; {code}"
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    limit = time.monotonic() + 30
    while not (server.asked and partial(path).exists() and partial(path).stat().st_size) and time.monotonic() < limit:
        threading.Event().wait(0.02)
        if process.poll() is not None:
            break
    process.kill()
    process.wait()
    assert not path.exists()
    size = partial(path).stat().st_size
    assert 0 < size < len(DATA)
    download(f"{server.url}/f.bin", path)
    assert ranges(server) == [None, f"bytes={size}-"]
    assert path.read_bytes() == DATA
    assert is_clean(path)


def test_a_server_without_ranges_sends_it_all_again(server, path):
    server.ranges = False
    server.next = [Answer(cut=5000), Answer(cut=6000)]
    download(f"{server.url}/f.bin", path)
    assert path.read_bytes() == DATA
    assert ranges(server) == [None, "bytes=5000-", "bytes=6000-"]


@pytest.mark.parametrize("etag", ['"1"', 'W/"1"', None])
@pytest.mark.parametrize("heeds", [True, False])
@pytest.mark.parametrize("after", [OTHER, OTHER + b"longer", OTHER[:6999], OTHER[:7000]])
def test_a_file_that_changes_in_between_is_not_mixed(after, heeds, etag, server, path):
    if etag is None and len(after) == len(DATA):
        server.modified = "Mon, 01 Jan 2024 00:00:00 GMT"  # else nothing tells them apart
    server.etag, server.heeds_if_range = etag, heeds
    stop_after(server, path, 7000)
    server.files["/f.bin"] = after
    server.etag = etag and etag.replace("1", "2")
    server.modified = server.modified and server.modified.replace("2024", "2025")
    download(f"{server.url}/f.bin", path)
    assert path.read_bytes() == after
    assert ranges(server)[0] == "bytes=7000-"


def test_a_weak_etag_is_no_if_range(server, path):
    server.etag = 'W/"1"'
    stop_after(server, path, 7000)
    download(f"{server.url}/f.bin", path)
    assert server.asked == [("/f.bin", "bytes=7000-", None)]
    assert path.read_bytes() == DATA


def test_a_whole_file_that_lacks_only_its_name(server, path):
    stop_after(server, path, 7000)
    partial(path).write_bytes(DATA)
    download(f"{server.url}/f.bin", path)
    assert path.read_bytes() == DATA
    assert not server.asked


@pytest.mark.parametrize("note", ["", "{", "[]", "{}", '{"url": 3, "bytes": 9}', None])
def test_bytes_without_a_note_are_not_trusted(note, server, path):
    partial(path).write_bytes(b"who knows")
    if note is not None:
        path.with_name(".f.bin.partial.json").write_text(note)
    download(f"{server.url}/f.bin", path)
    assert path.read_bytes() == DATA
    assert ranges(server) == [None]


def test_bytes_of_another_address_or_too_many_are_not_trusted(server, path):
    stop_after(server, path, 7000)
    server.files["/g.bin"] = OTHER
    download(f"{server.url}/g.bin", path)
    assert path.read_bytes() == OTHER
    path.unlink()
    stop_after(server, path, 7000)
    partial(path).write_bytes(DATA + b"more")
    download(f"{server.url}/f.bin", path)
    assert path.read_bytes() == DATA


def test_errors_that_pass(server, path, pauses):
    server.next = [Answer(status=503), Answer(status=429, headers={"Retry-After": "7"}), Answer(status=500)]
    server.next += [Answer(status=503, headers={"Retry-After": "99999"}), Answer(reset=True)]
    download(f"{server.url}/f.bin", path, attempts=6)
    assert path.read_bytes() == DATA
    assert pauses == [1, 7, 4, 60, 16]


def test_errors_that_do_not_pass_in_time(server, path, pauses):
    server.next = [Answer(status=503)] * 3
    said = refusal(f"{server.url}/f.bin", path, attempts=3)
    assert said == f"{server.url}/f.bin cannot be downloaded (3 tries): HTTP 503 Service Unavailable"
    assert pauses == [1, 2]
    assert not os.listdir(path.parent)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 416])
def test_errors_that_do_not_pass(status, server, path, pauses):
    server.next = [Answer(status=status)]
    assert f"cannot be downloaded: HTTP {status}" in refusal(f"{server.url}/f.bin", path)
    assert len(server.asked) == 1
    assert not os.listdir(path.parent)
    download(f"{server.url}/f.bin", path)  # and once it is there, all is well
    assert path.read_bytes() == DATA


def test_an_answer_without_a_byte_leaves_nothing(server, path):
    server.next = [Answer(cut=0)] * 2
    refusal(f"{server.url}/f.bin", path, attempts=2)
    assert not os.listdir(path.parent)


def test_half_a_file_is_never_accepted(server, path):
    server.next = [Answer(cut=len(DATA) // 2)] + [Answer(cut=0, reset=True)] * 2
    said = refusal(f"{server.url}/f.bin", path, attempts=2)
    assert "cannot be downloaded" in said
    assert not path.exists()
    assert partial(path).stat().st_size == len(DATA) // 2


def test_a_length_that_is_larger_than_the_file(server, path):
    server.next = [Answer(headers={"Content-Length": str(len(DATA) + 1)})] * 9
    server.length = False
    said = refusal(f"{server.url}/f.bin", path, attempts=2)
    assert f"{len(DATA):,} of {len(DATA) + 1:,} bytes" in said
    assert not path.exists()


def test_a_file_of_unknown_length(server, path):
    server.length = False
    assert "does not say how long the file is" in refusal(f"{server.url}/f.bin", path)
    assert not os.listdir(path.parent)


def test_a_chunked_answer(server, path):
    server.next = [Answer(chunked=True, cut=5000), Answer(chunked=True)]
    download(f"{server.url}/f.bin", path)
    assert path.read_bytes() == DATA
    assert ranges(server) == [None, "bytes=5000-"]


def test_a_file_that_fails_its_check_is_deleted(server, path):
    def check(file: Path) -> None:
        assert file.read_bytes() == DATA
        raise UserError("not this")

    assert refusal(f"{server.url}/f.bin", path, check=check) == "not this"
    assert not os.listdir(path.parent)


def test_files_of_this_machine(path, tmp_path):
    source = tmp_path / "a folder" / "ä.bin"
    source.parent.mkdir()
    source.write_bytes(DATA)
    download(source.as_uri(), path)
    assert path.read_bytes() == DATA
    path.unlink()
    source.unlink()
    assert "No such file" in refusal(source.as_uri(), path)
    assert not path.exists()


@pytest.mark.parametrize(
    "url",
    ["", "f.bin", "ftp://host/f", "http://", "http:///f", "data:,x", "http://a b/f", "http://h:x/f", "http://[/f"],
)
def test_no_address(url, path):
    assert "is no address to download from" in refusal(url, path)
    assert not os.listdir(path.parent)


def test_nobody_answers(path, pauses):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(DownloadError, match="Connection refused"):
        download(f"http://127.0.0.1:{port}/f.bin", path, attempts=4)
    assert pauses == [1, 2, 4]


def test_a_server_that_says_nothing(path):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        start = time.monotonic()
        said = refusal(f"http://127.0.0.1:{silent.getsockname()[1]}/f.bin", path, timeout=0.1, attempts=2)
        assert time.monotonic() - start < 5
    assert "stalled" in said


def test_answers_that_are_not_http_are_refused(path):
    def answer() -> None:
        connection, _ = strange.accept()
        with connection:
            connection.recv(1000)
            connection.sendall(b"220 mail.example ESMTP\r\n")

    with socket.socket() as strange:
        strange.bind(("127.0.0.1", 0))
        strange.listen()
        threading.Thread(target=answer, daemon=True).start()
        assert "220 mail" in refusal(f"http://127.0.0.1:{strange.getsockname()[1]}/f.bin", path, attempts=1)


def test_a_full_disk_is_no_broken_connection(path, server):
    """A limit on the size of files stands for the disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            download(f"{server.url}/f.bin", path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(server.asked) == 1


def test_two_at_once(server, path):
    server.next = [Answer(slow=0.005)]
    threads = [threading.Thread(target=download, args=(f"{server.url}/f.bin", path)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() == DATA
    assert len(server.asked) == 1
    assert is_clean(path)
