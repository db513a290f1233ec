"""Files from elsewhere: every trouble of a server is mended or said in one line, in bounded time."""

from __future__ import annotations

import io
import multiprocessing
import os
import shutil
import ssl
import subprocess
import threading
import time

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry
from loopback import Answer, serving

from beit_pretrain.data import storage, transports
from beit_pretrain.data.storage import Remote, is_remote
from beit_pretrain.data.transfer import Transfer
from beit_pretrain.errors import UserError

CONTENT = bytes(range(256)) * 2000


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(storage, "LONGEST_PAUSE", 0.01)


@pytest.fixture
def server(serve, tmp_path):
    (tmp_path / "files").mkdir()
    (tmp_path / "files/a.tar").write_bytes(CONTENT)
    return serve(tmp_path / "files")


def check() -> None:
    """Nothing to say against the content."""


def fetched(place: Remote, limit: int = len(CONTENT), check=check) -> bytes:
    out = io.BytesIO()
    place.fetch("a.tar", out, limit, check)
    return out.getvalue()


def test_which_sources_are_remote(tmp_path):
    assert all(map(is_remote, ("http://h/a", "https://h", "HTTPS://h", "s3://b/c", "gs://b", "pipe:cat {name}")))
    assert not any(map(is_remote, ("data/photos", "/data", "C:\\data", "a:b", tmp_path, "2024")))
    with pytest.raises(UserError, match="not ftp"):
        is_remote("ftp://host/folder")


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("trouble", [None, "drop", "half", "stall", "drip", "header", "long", 503, 500, 429, 408])
def test_transient_failures_are_retried(server, trouble, ranges):
    server.ranges = ranges
    server.trouble = lambda name, number: trouble if number < 2 and trouble != "long" else None
    assert fetched(Remote(server.url, retries=2, timeout=0.3)) == CONTENT
    assert server.requests["a.tar"] == (3 if trouble not in (None, "long") else 1)


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        ("drop", "3 tries"),
        ("stall", "stalled"),
        ("drip", "stalled"),
        ("header", "stalled .the header of its answer does not end"),
        ("loop", "HTTP 302, again and again"),
        (503, "3 tries.*HTTP 503"),
        (404, "HTTP 404"),
        (403, "HTTP 403"),
        ("long", "has more than 512,000 bytes"),
    ],
)
def test_lasting_failures_are_one_line(server, trouble, said):
    server.trouble, server.ranges = lambda name, number: trouble, False
    start = time.monotonic()
    with pytest.raises(UserError, match=rf"^a\.tar of {server.url} cannot be fetched.*{said}") as caught:
        fetched(Remote(server.url, retries=2, timeout=0.2))
    assert "\n" not in str(caught.value)
    assert time.monotonic() - start < 5
    if trouble != "loop":  # which is followed a few times
        assert server.requests["a.tar"] == (1 if trouble in (404, 403, "long") else 3)


def test_a_disk_that_is_full_is_no_trouble_of_the_server(server):
    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        Remote(server.url, retries=3).fetch("a.tar", Full(), len(CONTENT), check)
    assert server.requests["a.tar"] == 1


def test_half_of_the_rest_again_and_again(server):
    server.trouble = lambda name, number: "half" if number < 5 else None
    assert fetched(Remote(server.url, retries=5)) == CONTENT
    server.requests.clear()
    with pytest.raises(UserError, match=r"broke off after 496,000 of 512,000 bytes"):  # it went on, not anew
        fetched(Remote(server.url, retries=4))


def test_a_file_that_fails_its_check_is_downloaded_again(server):
    answers = iter([OSError("another SHA-256"), None])

    def check():
        if error := next(answers):
            raise error

    assert fetched(Remote(server.url, retries=1), check=check) == CONTENT
    assert server.requests["a.tar"] == 2

    def never():
        raise OSError("another SHA-256")

    with pytest.raises(UserError, match=r"2 tries.*another SHA-256"):
        fetched(Remote(server.url, retries=1), check=never)


def test_a_file_that_shrinks_between_tries(server, tmp_path):
    """What a longer first answer left behind is not read."""
    server.trouble = lambda name, number: "half" if number == 0 else None
    server.ranges = False
    assert Remote(server.url, retries=1).read("a.tar", 10**6) == CONTENT
    (tmp_path / "files/b").write_bytes(b"x" * 1000)

    def shrink(name, number):
        if number == 0:
            return "half"
        (tmp_path / "files/b").write_bytes(b"y" * 10)
        return None

    server.trouble = shrink
    assert Remote(server.url, retries=1).read("b", 10**6) == b"y" * 10


def test_nobody_there():
    with pytest.raises(UserError, match=r"1 try.*refused"):
        fetched(Remote("http://127.0.0.1:9", retries=0))


@pytest.mark.parametrize("location", ["http://[broken", "http://h:port/x", "https://"])
def test_invalid_locations_are_refused(location):
    with pytest.raises((UserError, ValueError)):  # a ValueError, too, is one line for whoever builds a run
        fetched(Remote(location, retries=0))


@pytest.mark.parametrize("scheme", ["http", "https", "HTTPS"])
def test_a_password_in_an_address_is_refused_and_not_said(scheme):
    with pytest.raises(UserError, match=r"://host/train: names and passwords in an address are not sent") as caught:
        Remote(f"{scheme}://user:secret@host/train")
    assert "secret" not in str(caught.value)


def test_signed_locations_keep_their_query_and_their_secret(server):
    place = Remote(f"{server.url}/?signature=secret", retries=0)
    assert fetched(place) == CONTENT
    with pytest.raises(UserError) as caught:
        place.read("missing", 10)
    assert "secret" not in str(caught.value)


class TestPipes:
    def test_a_command_writes_the_file(self, tmp_path):
        (tmp_path / "a.tar").write_bytes(CONTENT)
        assert fetched(Remote(f"pipe:cat '{tmp_path}'/{{name}}", retries=0)) == CONTENT

    @pytest.mark.parametrize(
        ("command", "said"),
        [
            ("echo {name} >&2; exit 3", "exit code 3: a.tar"),
            ("sleep 30; echo {name}", "stalled .no bytes for 0.3 s"),
            ("printf {name}; exec >&-; sleep 30", "did not end"),
            ("no-such-command {name}", "exit code 127.*not found"),
            ("head -c 1000 /dev/zero # {name}", "broke off after 1,000 of 512,000"),
            ("cat /dev/zero # {name}", "has more than 512,000"),
        ],
    )
    def test_a_command_that_fails(self, command, said):
        start = time.monotonic()
        with pytest.raises(UserError, match=said) as caught:
            fetched(Remote(f"pipe:{command}", retries=1, timeout=0.3))
        assert "\n" not in str(caught.value)
        assert time.monotonic() - start < 5

    def test_children_of_the_command_are_ended(self, tmp_path):
        """A shell whose child keeps the pipe open."""
        mark = tmp_path / "mark"
        with pytest.raises(UserError, match="stalled"):
            fetched(Remote(f"pipe:(sleep 1; touch {mark}) & : {{name}}", retries=0, timeout=0.2))
        time.sleep(1.3)
        assert not mark.exists()

    def test_names_are_quoted(self, tmp_path):
        place = Remote("pipe:printf %s {name}", retries=0)
        assert place.read("$(touch x); `touch y`.tar", 100) == b"$(touch x); `touch y`.tar"

    def test_a_command_without_the_name_is_refused(self):
        with pytest.raises(UserError, match=r"\{name\}"):
            Remote("pipe:cat shard.tar")


class TestBuckets:
    def test_through_fsspec(self, monkeypatch):
        monkeypatch.setitem(_registry, "s3", MemoryFileSystem)
        with fsspec.open("memory://bucket/train/a.tar", "wb") as file:
            file.write(CONTENT)
        monkeypatch.setattr(MemoryFileSystem, "protocol", ("memory", "s3"))
        monkeypatch.setattr(
            MemoryFileSystem, "_strip_protocol", classmethod(lambda cls, path: "/" + path.split("://")[-1].lstrip("/"))
        )
        assert fetched(Remote("s3://bucket/train", retries=0)) == CONTENT
        with pytest.raises(UserError, match=r"^b\.tar of s3://bucket/train cannot be fetched: FileNotFoundError"):
            Remote("s3://bucket/train", retries=3).read("b.tar", 10)

    def test_without_the_extra(self, monkeypatch):
        def missing(*args, **settings):
            raise ImportError("Install gcsfs to access gs")

        monkeypatch.setattr(fsspec, "filesystem", missing)
        with pytest.raises(UserError, match=r"pip install 'beit_pretrain\[remote\]' \(Install gcsfs"):
            fetched(Remote("gs://bucket", retries=3))


class TestFiles:
    def test_a_folder_by_its_address(self, tmp_path):
        folder = tmp_path / "a folder#1"
        folder.mkdir()
        (folder / "a.tar").write_bytes(CONTENT)
        assert fetched(Remote(folder.as_uri(), retries=0)) == CONTENT
        with pytest.raises(
            UserError, match=r"^b\.tar of file:///.* cannot be fetched: FileNotFoundError: .*No such file"
        ):
            Remote(folder.as_uri(), retries=3).read("b.tar", 10)

    @pytest.mark.parametrize("changed", [False, True])
    def test_resumes_the_same_version_alone(self, tmp_path, changed):
        (tmp_path / "a.tar").write_bytes(CONTENT)
        out = io.BytesIO()
        transfer = Transfer(out, 1.0, len(CONTENT))
        transfer.write = lambda chunk: (_ for _ in ()).throw(OSError("broke off"))
        with pytest.raises(OSError, match="broke off"):
            transports.receive_once((tmp_path / "a.tar").as_uri(), transfer)
        del transfer.write
        transfer.write(b"old")
        if changed:
            (tmp_path / "a.tar").write_bytes(CONTENT[::-1])
        transports.receive_once((tmp_path / "a.tar").as_uri(), transfer)
        assert out.getvalue() == (CONTENT[::-1] if changed else b"old" + CONTENT[3:])


class TestForks:
    """Loader workers are forked from a process that has fetched the manifest, or is just fetching."""

    def child(self, place: Remote) -> None:
        os._exit(0 if fetched(place) == CONTENT else 1)

    @pytest.mark.parametrize("kind", ["http", "file"])
    def test_parent_and_children_fetch_at_once(self, server, tmp_path, kind):
        place = Remote(server.url if kind == "http" else (tmp_path / "files").as_uri(), retries=0, timeout=20)
        server.delay = 0.2
        results: list[bytes] = []
        threads = [threading.Thread(target=lambda: results.append(fetched(place))) for _ in range(3)]
        assert fetched(place) == CONTENT
        for thread in threads:
            thread.start()
        context = multiprocessing.get_context("fork")
        children = [context.Process(target=self.child, args=(place,)) for _ in range(4)]
        for child in children:
            child.start()
        for child in children:
            child.join(20)
        for thread in threads:
            thread.join(20)
        assert [child.exitcode for child in children] == [0] * 4
        assert results == [CONTENT] * 3
        assert fetched(place) == CONTENT


class TestOtherWays:
    def test_a_redirection_is_followed_as_it_is_signed(self):
        with serving() as far:
            far.files["/there?sign=a%2Fb+c%20d"] = CONTENT
            far.next = [Answer(status=302, headers={"Location": f"{far.url}/there?sign=a%2Fb+c%20d"})]
            assert fetched(Remote(far.url, retries=0)) == CONTENT
            far.next = [Answer(status=302, headers={"Location": "ftp://host/secret"})]
            with pytest.raises(UserError, match="or a redirect") as caught:
                fetched(Remote(far.url, retries=3))
            assert "secret" not in str(caught.value)

    def test_through_a_proxy_without_the_passwords_of_netrc(self, monkeypatch, tmp_path):
        (tmp_path / "netrc").write_text("machine files.invalid login me password secret")
        with serving() as proxy:
            proxy.files["http://files.invalid/train/a.tar"] = CONTENT
            monkeypatch.setenv("http_proxy", proxy.url)
            monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
            assert fetched(Remote("http://files.invalid/train", retries=0)) == CONTENT
            assert proxy.authorizations == [None]
            monkeypatch.setenv("no_proxy", "files.invalid")
            with pytest.raises(UserError, match=r"\(1 try\): Name or service not known"):
                fetched(Remote("http://files.invalid/train", retries=0))

    def test_a_certificate_that_is_not_trusted_is_not_asked_again(self, tmp_path):
        words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=127.0.0.1"]
        words += ["-keyout", str(tmp_path / "key"), "-out", str(tmp_path / "certificate")]
        if not shutil.which("openssl") or subprocess.run(words, capture_output=True).returncode:
            pytest.skip("needs openssl")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tmp_path / "certificate", tmp_path / "key")
        with serving() as server:
            server.http.socket = context.wrap_socket(server.http.socket, server_side=True)
            with pytest.raises(UserError, match=r"cannot be fetched: .*certificate verify failed"):
                fetched(Remote(server.url.replace("http:", "https:"), retries=9))
