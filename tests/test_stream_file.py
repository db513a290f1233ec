"""A file read while it is received: broken connections, changed files, slow readers, early closing."""

from __future__ import annotations

import os
import threading
import time

import pytest
from loopback import Answer, serving
from tiny import gone, refusal

from beit_pretrain.data import http_transport, storage, stream_file, transports
from beit_pretrain.data.settings import RemoteOptions
from beit_pretrain.data.stream_file import open_stream

DATA = os.urandom(300_000)
FEW = RemoteOptions(retries=1, timeout=0.5)


@pytest.fixture
def server():
    with serving() as server:
        server.files |= dict.fromkeys(("/t.tar", "/t.tar?token=SECRET"), DATA)
        yield server


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No pauses between tries; little is received ahead."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(storage, "PAUSE", 0.001)
    monkeypatch.setattr(stream_file, "AHEAD", 10_000)
    monkeypatch.setattr(stream_file, "BLOCK", 1000)
    for module in (transports, http_transport):
        monkeypatch.setattr(module, "GLANCE", 0.01)


def read(url: str, options: RemoteOptions = FEW) -> bytes:
    with open_stream(url, options) as file:
        return file.read()


def receiving() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("receives")]


def ended(seconds: float = 5.0) -> bool:
    """Whether the receiving threads end in time."""
    for thread in receiving():
        thread.join(seconds)
    return not receiving()


def test_reads_paths_addresses_and_commands(server, tmp_path):
    path = tmp_path / "t.tar"
    path.write_bytes(DATA)
    for url in (str(path), f"{server.url}/t.tar?token=SECRET", path.as_uri(), f"pipe:cat {path}"):
        assert read(url) == DATA
    with open_stream(f"{server.url}/t.tar", FEW) as file:
        assert [file.read(n) for n in (1, 2, 7000, 0)] == [DATA[:1], DATA[1:3], DATA[3:7003], b""]
    assert ended()
    assert "cannot be opened: No such file" in refusal(open_stream, str(tmp_path / "none.tar"), FEW)


def test_broken_connection_is_continued_in_mid_file(server):
    server.next = [Answer(cut=100_352), Answer(reset=True), Answer(cut=50_176), Answer(status=503)]
    assert read(f"{server.url}/t.tar", RemoteOptions(retries=3, timeout=5)) == DATA
    whole, *continued = [asked[1] for asked in server.asked]
    first, again, second, last = (int(asked.removeprefix("bytes=").removesuffix("-")) for asked in continued)
    # aiohttp drops what came just before the end, where nobody has taken it yet; it is received again.
    assert whole is None
    assert 50_176 < first == again <= 100_352
    assert first < second == last <= first + 50_176


def test_server_without_ranges_sends_the_beginning_again(server):
    server.ranges = False
    server.next = [Answer(cut=100_352), Answer(cut=50_176)]
    assert read(f"{server.url}/t.tar", RemoteOptions(retries=3, timeout=5)) == DATA


@pytest.mark.parametrize(("etag", "ranges"), [('"1"', True), ('"1"', False), (None, False)])
def test_changed_file_is_an_error_not_mixed_bytes(server, ranges, etag):
    """With another ETag; without one, the bytes that come again are others (by ranges, none do)."""
    server.ranges, server.etag, server.modified = ranges, etag, None
    server.next = [Answer(cut=200_704)]
    with open_stream(f"{server.url}/t.tar", FEW) as file:
        assert file.read(1000) == DATA[:1000]
        server.files["/t.tar"] = os.urandom(300_000)
        if etag:
            server.etag = '"2"'
        said = refusal(file.read)
    assert said.endswith("the file has changed on the server while it was read")


def test_failures_are_one_line_without_secrets(server):
    base = f"{server.url}/t.tar?token=SECRET"
    cases = {
        "HTTP 404": ([Answer(status=404)], base),
        "HTTP 500": ([Answer(status=500)] * 2, base),
        "broke off after 1,024 of 300,000": ([Answer(cut=1024)] * 9, base),
        "exit code 3": ([], "pipe:head -c 1000 /dev/zero; exit 3"),
        "stalled": ([], "pipe:head -c 1000 /dev/zero; sleep 60"),
    }
    for why, (answers, url) in cases.items():
        server.next, server.ranges = answers, False
        said = refusal(read, url, RemoteOptions(retries=1, timeout=0.3))
        assert why in said, said
        assert "cannot be fetched" in said
        assert "SECRET" not in said
    assert ended()


def test_stalled_server_ends_the_reading(server):
    server.next = [Answer(slow=3)] * 9  # each gives a kilobyte, and stops
    begin = time.monotonic()
    said = refusal(read, f"{server.url}/t.tar", RemoteOptions(retries=0, timeout=1.1))
    assert "stalled" in said
    assert time.monotonic() - begin < 3


@pytest.mark.parametrize("kind", ["http", "pipe", "file"])
def test_slow_reader_is_not_a_slow_server(server, tmp_path, kind):
    """The reader pauses for longer than the time-out, again and again; 1 kB/s is not reached by far."""
    path = tmp_path / "t.tar"
    path.write_bytes(DATA)
    url = {"http": f"{server.url}/t.tar", "pipe": f"pipe:cat {path}", "file": path.as_uri()}[kind]
    with open_stream(url, RemoteOptions(retries=0, timeout=0.1)) as file:
        got = b""
        for _ in range(3):
            time.sleep(0.25)
            got += file.read(100)
        assert got + file.read() == DATA


def test_several_streams_do_not_block_each_other(server):
    """All HTTP transfers of a process share a thread; one whose queue is full must not stop the others."""
    first = open_stream(f"{server.url}/t.tar", FEW)
    first.read(1)
    assert read(f"{server.url}/t.tar") == DATA
    assert first.read() == DATA[1:]


def test_queue_is_bounded(server):
    with open_stream(f"{server.url}/t.tar", FEW) as file:
        time.sleep(0.2)
        assert file.raw._queue.waiting < 10_000 + 300_000 // 2


def test_closing_early_ends_thread_and_command(server, tmp_path):
    for url in (f"{server.url}/t.tar", f"pipe:echo $$ > {tmp_path / 'pid'}; cat /dev/zero; sleep 60", "pipe:sleep 60"):
        file = open_stream(url, RemoteOptions(retries=5, timeout=60))
        if url[5:] != "sleep 60":
            file.read(1)
        file.close()
        assert ended(), url
    assert gone(int((tmp_path / "pid").read_text()))


def test_forgotten_file_ends_its_thread():
    open_stream("pipe:cat /dev/zero", FEW).read(1)
    assert ended()
