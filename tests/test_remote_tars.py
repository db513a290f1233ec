"""Tars at addresses: read in exact order, each fetched once; servers that lie, fail, stall or change are one line."""

from __future__ import annotations

import hashlib
import json
import pickle
import shlex
import threading
import time

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry
from loopback import Answer, Server, serving
from test_hub import hub  # noqa: F401 -- a fixture
from test_image_io import encoded
from test_sources import tar_bytes

from beit_pretrain.data import storage, training_source, transports
from beit_pretrain.data.local_tars import LocalTars
from beit_pretrain.data.manifest import read_manifest, verify_shards
from beit_pretrain.data.order import Sample
from beit_pretrain.data.read_tars import listed, open_tars, records_of
from beit_pretrain.data.reader import ShardReader
from beit_pretrain.data.remote_listing import stat_files
from beit_pretrain.data.remote_tars import name_of
from beit_pretrain.data.settings import DataSettings, SourceSettings
from beit_pretrain.data.split_info import tars_of_location
from beit_pretrain.data.tar_records import TarRecord, TarRecords, class_counts, pack_labels
from beit_pretrain.data.tar_specs import expand
from beit_pretrain.data.write.index_existing import index_shards
from beit_pretrain.errors import UserError


def tar(number: int) -> bytes:
    """A tar of number + 1 samples, of the classes 0, 1, ..., with captions."""
    files = {}
    for row in range(number + 1):
        files |= {
            f"{number}-{row}.jpg": encoded(row),
            f"{number}-{row}.cls": str(row).encode(),
            f"{number}-{row}.txt": b"x",
        }
    return tar_bytes(files)


TARS = {f"/x-{number}.tar": tar(number) for number in range(4)}
LENGTHS = [1, 2, 3, 4]
INFO = {
    "splits": {
        "train": {"name": "train", "num_samples": 10, "filenames": [n[1:] for n in TARS], "shard_lengths": LENGTHS}
    }
}


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(storage, "LONGEST_PAUSE", 0.01)


@pytest.fixture
def server():
    with serving(Server(files=dict(TARS), head=True)) as running:
        yield running


@pytest.fixture
def settings(tmp_path):
    return SourceSettings(cache_dir=str(tmp_path / "cache"), cache_gb=0.1, retries=1, timeout=10)


def urls_of(server: Server, query: str = "") -> list[str]:
    return [f"{server.url}{name}{query}" for name in TARS]


def gets(server: Server) -> list[str]:
    """Names of the files that were asked for as a whole."""
    return [path.partition("?")[0] for path, wanted, _ in server.asked if wanted is None]


def images(tars) -> list[list[tuple[bytes, int]]]:
    """Image and label of every sample."""
    reader = ShardReader([tars])
    return [[tuple(reader.read(Sample(n, row))) for row in range(size)] for n, size in enumerate(reader.sizes)]


EXPECTED = [[(encoded(row), row) for row in range(number + 1)] for number in range(4)]


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("length", [True, False])
def test_read_once_then_known(server, settings, ranges, head, length, capsys):
    server.ranges, server.head, server.length = ranges, head, length
    urls = urls_of(server)
    assert open_tars(urls, settings, read=False) is None
    server.asked.clear()
    tars = open_tars(urls, settings)
    assert "reading 4 tars once" in capsys.readouterr().err
    assert [shard.samples for shard in tars.shards] == LENGTHS
    assert (tars.about["classes"], tars.about["class_counts"]) == (["0", "1", "2", "3"], [4, 3, 2, 1])
    assert images(tars) == EXPECTED
    whole = [name for name in gets(server) if name.endswith(".tar")]
    assert sorted(whole) == sorted([*TARS] * (1 + head))  # HEAD and GET, each tar once
    server.asked.clear()
    again = open_tars(urls, settings, read=False)
    assert (again.about, again.shards) == (tars.about, tars.shards)
    assert images(again) == EXPECTED
    assert server.asked == []  # neither the server nor the tars


def test_stated_lengths_need_no_reading(server, settings):
    server.files["/_info.json"] = json.dumps(INFO).encode()
    tars = open_tars(urls_of(server), settings, read=False)
    assert [shard.samples for shard in tars.shards] == LENGTHS
    assert [shard.bytes for shard in tars.shards] == [len(data) for data in TARS.values()]
    assert (tars.about["classes"], tars.about["class_counts"]) == ([], [])
    assert gets(server) == ["/_info.json", *gets(server)[1:]]
    server.asked.clear()
    row = tars.index(2)[1]
    assert tars.read(2, 1, int(row["image_offset"]), int(row["image_size"])) == encoded(1)
    assert gets(server) == ["/x-2.tar"]
    given = SourceSettings(**settings.model_dump() | {"classes": 5})
    about = open_tars(urls_of(server), given, LENGTHS, read=False).about
    assert (about["classes"], sum(about["class_counts"])) == (["0", "1", "2", "3", "4"], 10)


def test_classes_are_given(server, settings, tmp_path):
    (tmp_path / "names.txt").write_text("ape\nbee\ncat\ndog\nelk\n")
    named = SourceSettings(**settings.model_dump() | {"classes": str(tmp_path / "names.txt")})
    about = open_tars(urls_of(server), named).about
    assert (about["classes"], about["class_counts"]) == (["ape", "bee", "cat", "dog", "elk"], [4, 3, 2, 1, 0])
    with pytest.raises(UserError, match=r"data.classes=3 are 3 classes, but there is the class number 3"):
        open_tars(urls_of(server), SourceSettings(**settings.model_dump() | {"classes": 3}))


def test_wrong_stated_lengths_are_said(server, settings):
    wrong = {"splits": {"train": INFO["splits"]["train"] | {"shard_lengths": [1, 2, 5, 2]}}}
    server.files["/_info.json"] = json.dumps(wrong).encode()
    tars = open_tars(urls_of(server, "?sign=secret"), settings)
    assert len(tars.index(0)) == 1
    with pytest.raises(
        UserError, match=r"^http://.*/x-2.tar holds 3 samples, its _info.json says 5; shards index"
    ) as caught:
        tars.index(2)
    assert "secret" not in str(caught.value)


def test_an_interrupted_reading_goes_on(server, settings):
    server.files["/x-3.tar"] = b"no tar" * 1000
    with pytest.raises(UserError, match=r"^http://.*/x-3.tar is not a readable uncompressed tar") as caught:
        open_tars(urls_of(server), settings)
    assert str(settings.cache_dir) not in str(caught.value)
    deadline = time.monotonic() + 5
    records = TarRecords(settings_folder(settings), urls_of(server), ())
    while sum(record.samples is not None for record in records.load().values()) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    server.files["/x-3.tar"] = TARS["/x-3.tar"]
    server.etag = '"2"'
    server.asked.clear()
    with pytest.raises(UserError, match=r"x-3.tar cannot be fetched: it has changed on the server"):
        open_tars(urls_of(server), settings)
    tars = open_tars(urls_of(server), settings)
    assert {name for name in gets(server) if name.endswith(".tar")} == {"/x-3.tar"}
    assert images(tars) == EXPECTED


def settings_folder(settings):
    from beit_pretrain.data.shard_folder import cache_folder

    return cache_folder(settings)


@pytest.mark.parametrize("same_size", [True, False])
def test_a_changed_tar_is_said_and_read_anew(server, settings, same_size, tmp_path):
    open_tars(urls_of(server), settings)
    for path in (tmp_path / "cache").glob("*.tar"):
        path.unlink()
    tars = open_tars(urls_of(server), settings)
    server.etag = '"2"'
    server.files["/x-1.tar"] = TARS["/x-1.tar"] if same_size else TARS["/x-3.tar"]
    with pytest.raises(
        UserError,
        match=r"^http://.*/x-1.tar cannot be fetched: it has changed on the server .*the same command",
    ):
        tars.opened(1)
    server.asked.clear()
    again = open_tars(urls_of(server), settings)
    assert {name for name in gets(server) if name.endswith(".tar")} == {"/x-1.tar"}
    assert len(again.index(1)) == (2 if same_size else 4)
    assert (again.shards[1].sha256 == tars.shards[1].sha256) == same_size
    assert again.shards[1].stored != tars.shards[1].stored


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ([Answer(cut=700)] * 2, r"cannot be fetched \(2 tries\): broke off after"),
        ([Answer(status=503)] * 2, r"cannot be fetched \(2 tries\): HTTP 503"),
        ([Answer(reset=True)] * 2, r"cannot be fetched \(2 tries\)"),
        ([Answer(slow=9)] * 2, r"cannot be fetched \(2 tries\): it stalled"),
        ([Answer(status=404)], r"cannot be fetched: HTTP 404"),
        ([Answer(status=403)], r"cannot be fetched: HTTP 403"),
    ],
)
def test_failing_servers(server, settings, answers, said):
    settings = SourceSettings(**settings.model_dump() | {"timeout": 0.3})
    tars = open_tars(urls_of(server, "?sign=secret"), settings, LENGTHS)
    server.next = list(answers)
    start = time.monotonic()
    with pytest.raises(UserError, match=rf"^http://.*/x-3.tar {said}") as caught:
        tars.opened(3)
    assert time.monotonic() - start < 4
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)
    server.next = []
    assert len(tars.index(3)) == 4  # the records are as they were


def test_a_lying_length(server, settings):
    server.stated, server.ranges = 10**6, False
    tars = open_tars(urls_of(server), settings, LENGTHS)
    with pytest.raises(
        UserError, match=r"x-0.tar cannot be fetched \(2 tries\): broke off after .* of 1,000,000 bytes"
    ):
        tars.opened(0)
    server.stated = 1024
    # What lies behind the stated length may arrive first: aiohttp then reports that.
    changed = r"it has changed on .* .1,024 bytes, 1,000,000 then|\(2 tries\): Data after .Connection: close"
    with pytest.raises(UserError, match=rf"x-0.tar cannot be fetched(: | )({changed})"):
        tars.opened(0)
    short = open_tars(urls_of(server), settings, LENGTHS)  # what is left of the tar is no tar
    with pytest.raises(
        UserError, match=r"^http.*x-0.tar (is not a readable|holds 0 samples|cannot be fetched)"
    ) as caught:
        short.index(0)
    assert len(str(caught.value)) < 400


def test_what_is_missing_is_named(server, settings):
    del server.files["/x-2.tar"]
    start = time.monotonic()
    with pytest.raises(UserError, match=r"^http://127.0.0.1:\d+/x-2.tar cannot be found: HTTP 404 Not Found$"):
        open_tars(urls_of(server, "?sign=secret"), settings, LENGTHS)
    assert time.monotonic() - start < 2
    with pytest.raises(UserError, match=r"http://host/a.tar: names and passwords in an address are not sent"):
        open_tars(["http://me:secret@host/a.tar"], settings, [1])


def test_no_secret_is_written(server, settings, tmp_path):
    tars = open_tars(urls_of(server, "?signature=secret"), settings)
    images(tars)
    for path in (tmp_path / "cache").rglob("*"):
        assert "secret" not in path.name
        assert path.is_dir() or b"secret" not in path.read_bytes()
    assert "secret" not in f"{tars}{tars.shards}{tars.where(0)}{tars.about}"
    server.asked.clear()
    images(open_tars(urls_of(server, "?signature=other"), settings, read=False))  # what is signed anew is known
    assert server.asked == []


def test_queries_that_name_files(settings):
    with serving() as server:
        server.files = {f"/get?file={number}": data for number, data in enumerate(TARS.values())}
        tars = open_tars([f"{server.url}{name}" for name in server.files], settings)
        assert images(tars) == EXPECTED
        for name, expected in zip(server.files, EXPECTED, strict=True):  # as sets of their own
            assert images(open_tars([f"{server.url}{name}"], settings)) == [expected]


def test_workers_get_a_copy(server, settings):
    labelled = SourceSettings(**settings.model_dump() | {"classes": 4})
    tars = pickle.loads(pickle.dumps(open_tars(urls_of(server), labelled, LENGTHS)))
    tars.fetch_ahead(3)
    server.asked.clear()
    assert len(tars.index(3)) == 4
    assert server.asked == []
    assert images(tars) == EXPECTED


def test_a_small_cache_evicts(server, settings, tmp_path):
    small = SourceSettings(**settings.model_dump() | {"cache_gb": 50_000 / 1e9})
    tars = open_tars(urls_of(server), small)
    assert images(tars) == EXPECTED
    assert sum(path.stat().st_size for path in (tmp_path / "cache").iterdir() if path.is_file()) <= 50_000


def test_pipes(settings, tmp_path):
    for name, data in TARS.items():
        (tmp_path / name[1:]).write_bytes(data)
    urls = [f"pipe:cat {shlex.quote(str(tmp_path))}{name}" for name in TARS]
    tars = open_tars(urls, settings)
    assert images(tars) == EXPECTED
    assert images(open_tars(urls, settings, read=False)) == EXPECTED
    assert tars.where(0) == urls[0]
    with pytest.raises(UserError, match=r"its command ended with exit code 1"):
        open_tars(["pipe:exit 1"], settings)


def test_processes_of_a_machine_read_once_together(server, settings):
    found, server.head = [], False
    threads = [threading.Thread(target=lambda: found.append(open_tars(urls_of(server), settings))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert [tars.about["class_counts"] for tars in found] == [[4, 3, 2, 1]] * 4
    assert sorted(path for path in gets(server) if path.endswith(".tar")) == sorted(TARS)
    assert sorted(path for path, wanted, _ in server.asked if wanted == "bytes=0-0") == sorted(TARS)


def test_only_tars_of_the_set_count_against_reading_once(server, settings, monkeypatch):
    train = urls_of(server)[0]
    monkeypatch.setattr(training_source, "READ_ONCE", len(TARS["/x-0.tar"]))
    listed(urls_of(server), settings, records_of(urls_of(server), settings))  # others of the folder are known too
    chosen = DataSettings(train=train, cache_dir=settings.cache_dir)
    assert isinstance(training_source.open_training(chosen), ShardReader)


def test_tars_without_images_are_left_out(server, settings):
    server.files["/x-1.tar"] = tar_bytes({"a.txt": b"a"})
    tars = open_tars(urls_of(server), settings)
    assert [shard.samples for shard in tars.shards] == [1, 3, 4]
    assert images(tars) == [EXPECTED[number] for number in (0, 2, 3)]
    assert [shard.samples for shard in open_tars(urls_of(server), settings, read=False).shards] == [1, 3, 4]


def test_image_key_has_records_of_its_own(settings):
    two = tar_bytes({"a.rgb.jpg": encoded(0), "a.nir.jpg": encoded(1)})
    with serving(Server(files={"/a.tar": two})) as server:
        for key, number in (("rgb.jpg", 0), ("nir.jpg", 1)):
            tars = open_tars([f"{server.url}/a.tar"], SourceSettings(**settings.model_dump() | {"image_key": [key]}))
            assert images(tars) == [[(encoded(number), -1)]]
            assert tars.about["settings"] == {"image_key": [key]}


def test_tars_may_move(server, settings, tmp_path):
    moved = Server(files={f"/elsewhere{name}": data for name, data in TARS.items()}, etag=None, head=True)
    with serving(moved):
        there = open_tars([f"{moved.url}/elsewhere{name}" for name in TARS], settings)
        here = open_tars(urls_of(server), settings)
    assert [shard.sha256 for shard in there.shards] == [shard.sha256 for shard in here.shards]
    (tmp_path / "x-0.tar").write_bytes(TARS["/x-0.tar"])
    assert LocalTars([tmp_path / "x-0.tar"], "here", settings).shards[0].sha256 == here.shards[0].sha256
    assert name_of("pipe:curl -s http://h/a/x-0.tar | cat") == name_of("http://h/b/x-0.tar") == "x-0.tar"


class TestIndex:
    def test_remote_tars_get_a_manifest(self, server, settings, tmp_path, run_cli, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        code, said, _ = run_cli("shards", "index", f"src={server.url}/x-{{0..3}}.tar?sign=secret", "out=index")
        assert (code, "10 samples in 4 shards" in said) == (0, True)
        manifest = read_manifest(tmp_path / "index")
        assert (manifest["samples"], manifest["classes"]) == (10, ["0", "1", "2", "3"])
        assert not any(b"secret" in path.read_bytes() for path in (tmp_path / "index").iterdir())
        for name, data in TARS.items():
            (tmp_path / "index" / name[1:]).write_bytes(data)
        assert verify_shards(tmp_path / "index", progress=False) == []
        server.asked.clear()
        default = SourceSettings()
        assert images(open_tars(urls_of(server), default, read=False)) == EXPECTED
        assert server.asked == []

    def test_local_tars_by_braces(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for name, data in TARS.items():
            (tmp_path / name[1:]).write_bytes(data)
        folder = index_shards("x-{0..2}.tar", tmp_path / "index", num_workers=1)
        assert read_manifest(folder)["samples"] == 6
        assert verify_shards(folder, progress=False) == []
        assert read_manifest(index_shards(["x-3.tar", "x-0.tar"], tmp_path / "two", num_workers=1))["samples"] == 5

    def test_errors(self, server, tmp_path, refused):
        url = server.url
        for words, said in (
            ((f"src={url}/x-{{0..3}}.tar",), "shards index of remote tars needs out=FOLDER"),
            ((f"src=[{url}/a/x.tar,{url}/b/x.tar]", "out=o"), "takes tars of one folder, not of http.*/a and http.*/b"),
            ((f"src={url}/get?file={{0..1}}", "out=o"), "takes tars of one folder"),
            ((f"src={url}/x-{{0..4}}.tar", "out=o"), r"x-4.tar cannot be found: HTTP 404"),
            ((f"src={url}/.x.tar", "out=o"), "cannot be named in a manifest"),
        ):
            assert_match(said, refused("shards", "index", *words))
            assert not (tmp_path / "o").exists()


def assert_match(said: str, text: str) -> None:
    import re

    assert re.search(said, text), text


class TestRecords:
    def test_round_trip(self, tmp_path):
        urls = ["http://h/a/0.tar", "http://h/a/1.tar"]
        records = TarRecords(tmp_path, urls, ())
        first, second = records.keys
        labels = np.array([5, 3, 5, -1, 100_000])
        records.add({first: TarRecord(10, '"1"', 10, 5, False, pack_labels(labels)), second: TarRecord(None, None)})
        loaded = TarRecords(tmp_path, urls[:1], ()).load()  # a part of the set has the same file
        assert loaded[second] == TarRecord(None, None)
        counts = class_counts([loaded[first].labels, "", loaded[first].labels])
        assert {label: int(counts[label]) for label in np.flatnonzero(counts)} == {3: 2, 5: 4, 100_000: 2}
        records.add({first: None})
        assert first not in records.load()
        assert TarRecords(tmp_path, urls, ("jpg",)).load() == {}

    def test_a_line_that_was_cut_is_ignored(self, tmp_path):
        records = TarRecords(tmp_path, ["http://h/0.tar"], ())
        records.add({"a": TarRecord(1, None)})
        with records.path.open("ab") as file:
            file.write(b'["b", 2, nu')
        records.add({"c": TarRecord(3, None)})
        assert records.load() == {"a": TarRecord(1, None), "c": TarRecord(3, None)}


class TestListing:
    def test_buckets(self, monkeypatch, settings):
        monkeypatch.setitem(_registry, "s3", MemoryFileSystem)
        monkeypatch.setattr(MemoryFileSystem, "protocol", ("memory", "s3"))
        strip = classmethod(lambda cls, path: "/" + path.split("://")[-1].strip("/"))
        monkeypatch.setattr(MemoryFileSystem, "_strip_protocol", strip)
        transports._file_system.cache_clear()
        for name, data in TARS.items():
            with fsspec.open(f"memory://tars/set{name}", "wb") as file:
                file.write(data)
        urls = [f"s3://tars/set{name}" for name in TARS]
        assert [file[:2] for file in stat_files(urls, settings)] == [
            (u, len(d)) for u, d in zip(urls, TARS.values(), strict=True)
        ]
        with pytest.raises(UserError, match=r"^s3://tars/set/y.tar does not exist$"):
            stat_files(["s3://tars/set/y.tar"], settings)
        assert images(open_tars(urls, settings)) == EXPECTED
        transports._file_system.cache_clear()

    def test_failures_that_pass_are_tried_again(self, server, settings):
        server.next = [Answer(status=503), Answer(status=503), Answer(reset=True)]
        assert [file.bytes for file in stat_files(urls_of(server), settings)] == [len(data) for data in TARS.values()]
        server.next = [Answer(status=503)] * 40
        with pytest.raises(UserError, match=r"x-\d.tar does not answer \(2 tries\): HTTP 503"):
            stat_files(urls_of(server), settings)

    def test_stalling(self, server, settings):
        quick = SourceSettings(**settings.model_dump() | {"timeout": 0.2, "retries": 0})
        server.http.socket.listen(0)
        server.answer = lambda handler: time.sleep(1)
        with pytest.raises(UserError, match=r"does not answer \(1 try\): it stalled"):
            stat_files(urls_of(server)[:1], quick)


@pytest.fixture
def hub_tars(hub):  # noqa: F811
    """A data set of timm's layout on the Hub, whose large files have a SHA-256."""
    files = {name[1:]: data for name, data in TARS.items()}
    entries = [entry(name, data, large=True) for name, data in files.items()]
    info = json.dumps(INFO).encode()
    listing = json.dumps([*entries, entry("_info.json", info, large=False)]).encode()
    hub.files["/api/datasets/owner/name/tree/main?recursive=false&expand=false"] = listing
    for name, data in {**files, "_info.json": info}.items():
        hub.store.files[f"/main/{name}"] = data
    return hub


def entry(name: str, data: bytes, large: bool) -> dict:
    lfs = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return {"type": "file", "path": name, "size": len(data), "oid": "0" * 40} | ({"lfs": lfs} if large else {})


class TestHub:
    LOCATION = "hf://datasets/owner/name"

    def test_tars_of_a_split(self, hub_tars, settings):
        found = tars_of_location(self.LOCATION, "train", settings)
        assert found.urls == [f"{self.LOCATION}{name}" for name in TARS]
        assert found.lengths == LENGTHS
        labelled = SourceSettings(**settings.model_dump() | {"classes": 4})
        assert images(open_tars(found.urls, labelled, found.lengths)) == EXPECTED
        assert expand(f"{self.LOCATION}/x-*.tar") == expand(self.LOCATION) == found.urls
        listings = [path for path, *_ in hub_tars.asked if "/tree/" in path]
        assert len(listings) <= 5

    def test_content_is_checked(self, hub_tars, settings):
        tars = open_tars(expand(f"{self.LOCATION}/x-{{0..3}}.tar"), settings, LENGTHS)
        data = bytearray(TARS["/x-1.tar"])
        data[600] ^= 1
        hub_tars.store.files["/main/x-1.tar"] = bytes(data)
        with pytest.raises(UserError, match=r"x-1.tar cannot be fetched \(2 tries\): its content has another SHA-256"):
            tars.index(1)
        assert len(tars.index(2)) == 3

    def test_what_is_not_there(self, hub_tars, settings):
        with pytest.raises(UserError, match=r"^hf://datasets/owner/none cannot be listed: .*not found"):
            tars_of_location("hf://datasets/owner/none", "train", settings)
        with pytest.raises(UserError, match=r"^hf://datasets/owner/name/y.tar does not exist$"):
            stat_files([f"{self.LOCATION}/y.tar"], settings)
