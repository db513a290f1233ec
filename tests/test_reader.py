"""The shard reader: same samples from a folder, a server and a pipe; hostile manifests are refused."""

from __future__ import annotations

import json
import os
import pickle
import shutil

import numpy as np
import pytest
from tiny import labels, spoil

from beit_pretrain.data import storage
from beit_pretrain.data.order import Sample
from beit_pretrain.data.reader import ShardReader
from beit_pretrain.data.settings import RemoteOptions
from beit_pretrain.errors import UserError


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(storage, "LONGEST_PAUSE", 0.01)


@pytest.fixture
def access(tmp_path) -> RemoteOptions:
    return RemoteOptions(cache_dir=str(tmp_path / "cache"), retries=2, timeout=0.5)


@pytest.fixture
def folder(shards, tmp_path):
    return shutil.copytree(shards / "train", tmp_path / "train")


def everything(reader: ShardReader) -> list:
    return [reader.read(Sample(shard, row)) for shard, size in enumerate(reader.sizes) for row in range(size)]


@pytest.fixture(scope="module")
def expected(shards):
    return everything(ShardReader(shards / "train"))


def test_http_equals_local_folder(shards, serve, access, expected):
    server = serve(shards)
    reader = ShardReader(f"{server.url}/train", access)
    assert reader.remote
    assert everything(reader) == expected
    assert labels(reader).tolist() == [record.label for record in expected]
    assert reader.key(Sample(1, 0)) == ShardReader(shards / "train").key(Sample(1, 0)) != ""
    assert {name for name, count in server.requests.items() if count == 1} == set(server.requests)  # each file once
    again = ShardReader(f"{server.url}/train/", access)
    assert everything(again) == expected
    assert server.requests["train/manifest.json"] == 2
    assert sum(server.requests.values()) == len(reader.sizes) + 2
    assert everything(pickle.loads(pickle.dumps(again))) == expected


def test_pipe_equals_local_folder(shards, access, expected):
    assert everything(ShardReader(f"pipe:cat {shards}/train/{{name}}", access)) == expected


def test_several_folders(shards, serve, access, expected):
    server = serve(shards)
    reader = ShardReader([str(shards / "val"), f"{server.url}/train"], access)
    val = ShardReader(shards / "val")
    assert everything(reader) == everything(val) + expected
    assert reader.parts() == [val.sizes, ShardReader(shards / "train").sizes]
    assert reader.where(len(val.sizes)) == f"{server.url}/train/shard-000000.tar"
    assert reader.classes == val.classes
    assert [reader.is_remote(shard) for shard in (0, len(val.sizes))] == [False, True]


def test_labels_are_dropped_if_classes_differ(shards, folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["classes"][0] = "another"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    reader = ShardReader([shards / "train", folder])
    assert reader.classes_differ
    assert reader.classes == []
    assert set(labels(reader)) == {-1}


class TestHostile:
    """For a hostile remote manifest nothing is fetched and nothing is written outside the cache."""

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            *(("name", n) for n in ("../../evil.tar", "/etc/evil.tar", "http://h/evil.tar", "pipe:touch evil.tar")),
            *(("name", n) for n in ("a/b.tar", "..tar", ".tar", ".hidden.tar", "a\0.tar", "a\n.tar", "-rf.tar", "a")),
            *(("name", n) for n in ("a\\b.tar", "$(touch evil).tar", "C:evil.tar", 5, None, "")),
            *(("sha256", h) for h in ("../../../evil", "", "0" * 63, "G" * 64, None)),
            *(("samples", n) for n in (-1, 1.5, "9", True, 2**60)),
            *(("bytes", n) for n in (-1, None, 2**70)),
        ],
    )
    @pytest.mark.parametrize("local", [True, False])
    def test_hostile_manifest(self, folder, serve, access, tmp_path, key, value, local):
        manifest = json.loads((folder / "manifest.json").read_text())
        entry = manifest["shards"][1]
        if key in manifest and type(value) is int:
            manifest[key] += value - entry[key]
        entry[key] = value
        (folder / "manifest.json").write_text(json.dumps(manifest))
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(UserError, match=r"manifest\.json.* is damaged"):
            ShardReader(folder if local else f"{serve(folder).url}", access)
        assert sorted(tmp_path.rglob("*")) == before

    @pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff\xfe", b"[" * 100_000, b"<html>login</html>"])
    def test_invalid_manifest(self, folder, serve, access, content):
        (folder / "manifest.json").write_bytes(content)
        with pytest.raises(UserError, match=r"manifest\.json of http.* is damaged"):
            ShardReader(serve(folder).url, access)

    def test_duplicate_shard(self, folder):
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["shards"][1]["name"] = manifest["shards"][0]["name"]
        (folder / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(UserError, match="same name"):
            ShardReader(folder)

    @pytest.mark.parametrize("field", ["image_offset", "image_size", "label"])
    @pytest.mark.parametrize("value", [2**40, 2**62])
    def test_hostile_index(self, folder, field, value):
        path = folder / "shard-000000.index.npy"
        index = np.load(path)
        index[3][field] = value
        np.save(path, index)
        with pytest.raises(UserError, match=r"shard-000000\.tar (points outside|has labels beyond)"):
            ShardReader(folder).read(Sample(0, 0))

    def test_index_of_wrong_dtype(self, folder):
        for wrong in (np.zeros(12), np.zeros((0,), "<u8"), np.load(folder / "shard-000000.index.npy")[:-1]):
            np.save(folder / "shard-000000.index.npy", wrong)
            with pytest.raises(UserError, match="does not fit its manifest"):
                ShardReader(folder).read(Sample(0, 0))
        np.save(folder / "shard-000000.index.npy", np.array([{}]), allow_pickle=True)
        with pytest.raises(UserError, match="is missing or damaged"):
            ShardReader(folder).read(Sample(0, 0))


class TestServers:
    @pytest.mark.parametrize("trouble", ["drop", "half", "stall", "flip", 503])
    def test_retries_transient_errors(self, shards, serve, access, expected, trouble):
        server = serve(shards / "train")
        server.trouble = lambda name, number: trouble if number == 0 and "shard" in name else None
        assert everything(ShardReader(server.url, access)) == expected

    @pytest.mark.parametrize(
        ("trouble", "said"),
        [("drop", "3 tries"), ("stall", "stalled"), ("flip", "SHA-256"), (503, "HTTP 503"), (404, "HTTP 404")],
    )
    def test_permanent_error_names_shard(self, shards, serve, access, tmp_path, trouble, said):
        server = serve(shards / "train")
        server.ranges = False
        server.trouble = lambda name, number: trouble if name == "shard-000002.tar" else None
        reader = ShardReader(server.url, access)
        reader.read(Sample(1, 0))
        with pytest.raises(UserError, match=rf"^shard-000002\.tar of {server.url} cannot be fetched.*{said}"):
            reader.read(Sample(2, 0))
        assert len(list((tmp_path / "cache").glob("*.tar"))) == 1
        assert not list((tmp_path / "cache").glob("*.partial"))

    def test_unreachable_manifest(self, shards, serve, access):
        with pytest.raises(UserError, match=r"^manifest\.json of .*/nowhere cannot be fetched: HTTP 404"):
            ShardReader(f"{serve(shards).url}/nowhere", access)

    def test_truncated_manifest_is_retried(self, shards, serve, access, expected):
        """From a server that sends no Content-Length."""
        server = serve(shards / "train")
        server.trouble = lambda name, number: "unsaid" if name == "manifest.json" and number < 2 else None
        assert everything(ShardReader(server.url, access)) == expected
        assert server.requests["manifest.json"] == 3
        server.trouble = lambda name, number: "unsaid" if name == "manifest.json" else None
        with pytest.raises(UserError, match=r"manifest\.json of .* cannot be fetched \(3 tries\): broke off after"):
            ShardReader(server.url, access)

    def test_shard_with_other_checksum(self, shards, serve, access, folder):
        server = serve(folder)
        reader = ShardReader(server.url, access)
        spoil(folder, 0, [0])  # changed on the server since the run began
        with pytest.raises(UserError, match=r"shard-000000\.tar.*another SHA-256"):
            reader.read(Sample(0, 0))


def test_deleted_local_shard(folder):
    reader = ShardReader(folder)
    reader.read(Sample(0, 0))
    os.truncate(folder / "shard-000000.tar", 600)
    with pytest.raises(UserError, match=r"shard-000000\.tar is shorter than its index says"):
        reader.read(Sample(0, 5))
    (folder / "shard-000001.tar").unlink()
    with pytest.raises(UserError, match=r"shard-000001\.tar cannot be read: No such file"):
        reader.read(Sample(1, 0))


def test_damaged_local_shard(folder):
    reader = ShardReader(folder)
    for shard in range(len(reader.sizes)):
        reader.check_content(shard)
    data = bytearray((folder / "shard-000001.tar").read_bytes())
    data[700] ^= 1
    (folder / "shard-000001.tar").write_bytes(data)
    reader.check_content(0)
    with pytest.raises(UserError, match=r"shard-000001\.tar cannot be used: its content is not what its manifest says"):
        reader.check_content(1)
    (folder / "shard-000002.tar").unlink()
    with pytest.raises(UserError, match=r"shard-000002\.tar cannot be used: No such file"):
        reader.check_content(2)


def test_unlabelled_images_are_counted(shards):
    reader = ShardReader(shards / "train")
    assert reader.without_class == 0
    assert reader.samples == len(labels(reader))
