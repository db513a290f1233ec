"""WebDataset tars without a manifest: told from tars of classes, indexed into the cache, changed under their index."""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from test_image_io import encoded
from test_listed_folder import assert_same, two_epochs
from test_sources import class_files, tar_bytes, write_folder

from beit_pretrain.data import local_tars
from beit_pretrain.data.listed_folder import ListedFolder
from beit_pretrain.data.local_tars import LocalTars
from beit_pretrain.data.order import Sample
from beit_pretrain.data.reader import ShardReader
from beit_pretrain.data.settings import SourceSettings
from beit_pretrain.data.write.make_shards import make_shards
from beit_pretrain.errors import UserError


@pytest.fixture
def tars(tmp_path) -> Path:
    """Three shards with labels, and no manifest."""
    source = write_folder(tmp_path / "photos", class_files())
    (made,) = make_shards(source, tmp_path / "shards", num_workers=1, samples_per_shard=7)
    folder = tmp_path / "tars"
    folder.mkdir()
    for tar in made.glob("*.tar"):
        shutil.copy2(tar, folder)
    return folder


def opened(source, **settings) -> LocalTars:
    (folder,) = ShardReader(source, SourceSettings(**settings)).folders
    assert isinstance(folder, LocalTars)
    return folder


def test_same_batches_as_the_shard_folder(tars, tmp_path):
    assert_same(two_epochs(tars), two_epochs(tmp_path / "shards" / "train"))
    assert opened(tars).about["class_counts"] == [6, 6, 6]


@pytest.mark.parametrize(
    ("files", "shards"),
    [
        ({"x-000.tar": {"a.jpg": b""}, "x-001.tar": {"b.jpg": b""}}, True),  # numbers that follow each other
        ({"c0.tar": {"a.jpg": b""}, "c1.tar": {"b.jpg": b""}}, False),
        ({"n01440764.tar": {"a.jpg": b""}, "n01443537.tar": {"b.jpg": b""}}, False),
        ({"n01440764.tar": {"a.jpg": b"", "a.json": b""}, "cat.tar": {"b.jpg": b""}}, False),
        ({"cat.tar": {"a.jpg": b"", "a.cls": b"0"}, "dog.tar": {"b.jpg": b"", "b.cls": b"1"}}, True),
        ({"one.tar": {"a/1.jpg": b"", "b/1.jpg": b""}}, False),
        ({"00000.tar": {"000.jpg": b"", "000.txt": b"a cat", "000.json": b"{}"}}, True),
        ({"x-000.tar": {"a.jpg": b""}, "x-001.tar": {"b.jpg": b""}, "loose.jpg": None}, False),
    ],
    ids=[
        "numbered",
        "numbered classes",
        "wnids",
        "companions, but not in the first",
        "classes in .cls",
        "one tar",
        "captions",
        "images beside",
    ],
)
def test_tells_shards_from_tars_of_classes(tmp_path, files, shards):
    """The first tar by name decides, where numbers do not."""
    for name, members in files.items():
        data = encoded(0) if members is None else tar_bytes({n: d or encoded(len(n)) for n, d in members.items()})
        (tmp_path / name).write_bytes(data)
    (folder,) = ShardReader(tmp_path).folders
    assert type(folder) is (LocalTars if shards else ListedFolder)


def test_index_is_made_once_and_again_for_what_changed(tars, monkeypatch):
    scanned, scan = [], local_tars.scan_shard
    monkeypatch.setattr(local_tars, "scan_shard", lambda path, *of: (scanned.append(path.name), scan(path, *of))[1])
    opened(tars)
    opened(tars)
    assert len(scanned) == 3
    tar = tars / "shard-000001.tar"
    tar.write_bytes(tar_bytes({"a.jpg": encoded(1), "a.cls": b"4"}))
    folder = opened(tars)
    assert scanned[3:] == [tar.name]
    assert [shard.samples for shard in folder.shards] == [7, 1, 4]
    assert folder.about["classes"] == ["0", "1", "2", "3", "4"]


def test_starts_at_once_index_once(tars, monkeypatch):
    scanned, scan = [], local_tars.scan_shard
    monkeypatch.setattr(local_tars, "scan_shard", lambda path, *of: (scanned.append(path.name), scan(path, *of))[1])
    with ThreadPoolExecutor(4) as pool:
        assert [len(folder.shards) for folder in pool.map(opened, [tars] * 4)] == [3] * 4
    assert len(scanned) == 3


def test_tar_that_changes_under_its_index(tars):
    reader = ShardReader(tars)
    reader.key(Sample(1, 0))  # its file is open
    tar = tars / "shard-000001.tar"
    os.utime(tar)
    with pytest.raises(UserError, match=r"shard-000001\.tar has changed since it was indexed; rerun the same command"):
        reader.read(Sample(1, 0))
    tar.unlink()
    with pytest.raises(UserError, match=r"shard-000001\.tar cannot be read: No such file"):
        LocalTars([str(tar)], "it", SourceSettings())


def test_moved_tars_are_the_same_data(tars, tmp_path):
    before = [shard.sha256 for shard in opened(tars).shards]
    assert [shard.sha256 for shard in opened(tars.rename(tmp_path / "elsewhere")).shards] == before


def test_classes(tars, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("ant\nbee\ncat\ndog\n")
    assert opened(tars, classes=str(names)).about["classes"] == ["ant", "bee", "cat", "dog"]
    assert opened(tars, classes=5).about["class_counts"] == [6, 6, 6, 0, 0]
    with pytest.raises(UserError, match=r"data\.classes=2 are 2 classes, but there is the class number 2"):
        opened(tars, classes=2)


def test_other_members(tmp_path, capfd):
    members = {"a.jpg": encoded(1), "a.png": encoded(2, kind="PNG"), "a.txt": b"caption", "a.json": b"{}"}
    (tmp_path / "x-0.tar").write_bytes(tar_bytes({**members, "b.json": b"{}"}))
    assert opened(tmp_path).about["samples"] == [1]
    assert "further image" in capfd.readouterr().err
    reader = ShardReader(tmp_path, SourceSettings(image_key=["png"]))
    assert reader.read(Sample(0, 0)).data == members["a.png"]
    (tmp_path / "x-0.tar").write_bytes(tar_bytes({"a.txt": b"", "a.json": b""}))
    with pytest.raises(UserError, match="holds no image"):
        opened(tmp_path)
