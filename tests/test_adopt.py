"""Existing WebDataset shards get an index and a manifest, and are not touched."""

import os
from pathlib import Path

import pytest
from test_image_reading import encoded
from test_sources import tar_bytes, write_folder

from beit_pretrain.data.order import Sample
from beit_pretrain.data.reader import ShardReader
from beit_pretrain.errors import UserError
from beit_pretrain.shards.adopt import index_shards
from beit_pretrain.shards.manifest import read_manifest, verify_shards


@pytest.fixture
def foreign(tmp_path) -> Path:
    """Two tars of another hand: text labels, a caption, one sample without a label."""
    first = {"a.jpg": encoded(0), "a.cls": b"2", "b.png": encoded(1, kind="PNG"), "b.cls": b"0", "b.txt": b"a bee"}
    return write_folder(tmp_path / "src", {"x-0.tar": tar_bytes(first), "x-1.tar": tar_bytes({"c.jpg": encoded(2)})})


@pytest.mark.parametrize("elsewhere", [False, True])
def test_index(foreign, elsewhere, tmp_path):
    before = {path.name: path.read_bytes() for path in foreign.iterdir()}
    folder = index_shards(foreign, tmp_path / "out" if elsewhere else None, workers=1)
    assert {name: (foreign / name).read_bytes() for name in before} == before
    assert len(os.listdir(foreign)) == (2 if elsewhere else 6)
    manifest = read_manifest(folder)
    assert (manifest["samples"], manifest["classes"], manifest["class_counts"]) == (3, ["0", "1", "2"], [1, 0, 1])
    assert verify_shards(folder, progress=False) == []
    reader = ShardReader(folder)
    assert reader.read(Sample(0, 0))[:2] == (encoded(0), 2)
    assert reader.read(Sample(1, 0))[:2] == (encoded(2), -1)
    with pytest.raises(UserError, match=r"has a manifest\.json already"):
        index_shards(foreign, tmp_path / "out" if elsewhere else None, workers=1)


def test_class_names(foreign, tmp_path):
    (tmp_path / "names").write_text("ant\nbee\ncat\ndog\n")
    assert read_manifest(index_shards(foreign, tmp_path / "out", tmp_path / "names", 1))["classes"][2:] == [
        "cat",
        "dog",
    ]
    (tmp_path / "names").write_text("ant\n")
    with pytest.raises(UserError, match="names 1 classes, but the shards have the number 2"):
        index_shards(foreign, tmp_path / "other", tmp_path / "names", 1)


def test_what_is_refused(foreign, tmp_path):
    write_folder(tmp_path, {"none/a.txt": b"x", "text/a.tar": tar_bytes({"a.txt": b"x"}), "bad/a.tar": b"x" * 600})
    write_folder(tmp_path, {"word/a.tar": tar_bytes({"a.jpg": b"x", "a.cls": b"dog"})})
    write_folder(tmp_path, {"minus/a.tar": tar_bytes({"a.jpg": b"x", "a.cls": b"-7"}), "taken/x-0.tar": b"mine"})
    for name, words in (
        ("none", "holds no tars"),
        ("missing", "holds no tars"),
        ("text", "holds no image"),
        ("bad", "not a readable uncompressed tar"),
        ("word", "class number"),
        ("minus", "class number -7"),
    ):
        with pytest.raises(UserError, match=words):
            index_shards(tmp_path / name, workers=1)
    with pytest.raises(UserError, match="exists already"):
        index_shards(foreign, tmp_path / "taken", workers=1)
    assert (tmp_path / "taken/x-0.tar").read_bytes() == b"mine"
