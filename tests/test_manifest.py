"""Manifest and index: offsets are right, and damage is found."""

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_sources import class_files, tar_bytes, write_folder
from tiny import spoil

from beit_pretrain.data.manifest import read_manifest, summary, verify_shards
from beit_pretrain.data.shard_index import INDEX_DTYPE, index_shard
from beit_pretrain.data.write.contact_sheet import contact_sheet
from beit_pretrain.data.write.make_shards import make_shards
from beit_pretrain.errors import UserError


@pytest.fixture
def split(tmp_path) -> Path:
    """18 images in 4 shards."""
    source = write_folder(tmp_path / "source", class_files())
    return make_shards(source, tmp_path / "out", num_workers=1, samples_per_shard=5)[0]


def test_index_leads_to_the_members(split):
    for entry in read_manifest(split)["shards"]:
        data = (split / entry["name"]).read_bytes()
        index = np.load((split / entry["name"]).with_suffix(".index.npy"))
        assert index.dtype == INDEX_DTYPE
        assert len(index) == entry["samples"]
        for row in index:
            start = int(row["image_offset"])
            Image.open(io.BytesIO(data[start : start + int(row["image_size"])])).load()
            assert row["segmentation_size"] == 0


def test_index_of_a_foreign_shard(tmp_path):
    files = {"d/A.1.png": b"x", "d/A.PNG": b"abc", "d/A.cls": b"7\n", "d/b.txt": b"?", "d/a.jpeg": b"de"}
    (tmp_path / "x.tar").write_bytes(tar_bytes(files))
    index = index_shard(tmp_path / "x.tar")
    assert index["image_size"].tolist() == [3, 2]
    assert index["label"].tolist() == [7, -1]
    (tmp_path / "y.tar").write_bytes(tar_bytes({"a.jpg": b"x", "a.cls": b"dog"}))
    with pytest.raises(UserError, match="class number"):
        index_shard(tmp_path / "y.tar")


def flip(folder: Path) -> str:
    data = bytearray((folder / "shard-000001.tar").read_bytes())
    data[700] ^= 1
    (folder / "shard-000001.tar").write_bytes(data)
    return "shard-000001.tar: its content has changed"


def truncate(folder: Path) -> str:
    os.truncate(folder / "shard-000002.tar", 5000)
    return "shard-000002.tar: has 5000 bytes"


def remove(folder: Path) -> str:
    (folder / "shard-000003.tar").unlink()
    return "shard-000003.tar: missing"


def swap(folder: Path) -> str:
    for ending in ("tar", "index.npy"):
        first, second = folder / f"shard-000000.{ending}", folder / f"shard-000001.{ending}"
        first.rename(folder / "held")
        second.rename(first)
        (folder / "held").rename(second)
    return "shard-000000.tar: "


def swap_index(folder: Path) -> str:
    (folder / "shard-000000.index.npy").write_bytes((folder / "shard-000001.index.npy").read_bytes())
    return "shard-000000.tar: its index shard-000000.index.npy does not fit"


def spoil_index(folder: Path) -> str:
    (folder / "shard-000000.index.npy").write_bytes(b"")
    return "shard-000000.tar: "


def add(folder: Path) -> str:
    (folder / "shard-000009.tar").write_bytes(tar_bytes({}))
    return "shard-000009.tar: not in manifest.json"


def miscount(folder: Path) -> str:
    manifest = read_manifest(folder)
    manifest["class_counts"][0] -= 1
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return "manifest.json: its class_counts"


@pytest.mark.parametrize("damage", [flip, truncate, remove, swap, swap_index, spoil_index, add, miscount])
def test_verify_sees_damage(damage, split):
    expected = damage(split)
    problems = verify_shards(split, progress=False)
    assert len(problems) == (2 if damage is swap else 1)
    assert problems[0].startswith(expected)
    assert "\n" not in problems[0]


def test_manifest_errors(split, tmp_path):
    for folder, words in (
        (tmp_path / "none", "does not exist; make shards with: python -m beit_pretrain shards make"),
        (tmp_path, "has no manifest.json; make shards"),
        (split.parent, f"give {split}"),
    ):
        with pytest.raises(UserError, match=words):
            read_manifest(folder)
    good = read_manifest(split)
    for bad, words in (
        ("{", "damaged"),
        ("[]", "damaged"),
        (json.dumps(good | {"format": "other/2"}), "other/2"),
        (json.dumps(good | {"samples": 1}), "do not add up to its samples"),
        (json.dumps({k: v for k, v in good.items() if k != "classes"}), "classes"),
        (json.dumps(good | {"shards": [1]}), "damaged"),
        (json.dumps(good | {"settings": []}), "damaged"),
    ):
        (split / "manifest.json").write_text(bad)
        with pytest.raises(UserError, match=words) as caught:
            read_manifest(split)
        assert "\n" not in str(caught.value)


def test_summary_and_contact_sheet(split, tmp_path):
    text = summary(split)
    assert "18 samples in 4 shards" in text
    assert "3 classes" in text
    assert "(6)" in text
    contact_sheet(split, tmp_path / "new" / "sheet.png", columns=4, rows=3, cell=24)
    sheet = Image.open(tmp_path / "new" / "sheet.png")
    assert (sheet.format, sheet.size) == ("PNG", (96, 114))
    assert np.asarray(sheet.convert("RGB"))[:18, :].std() > 20
    with pytest.raises(UserError, match="columns"):
        contact_sheet(split, tmp_path / "sheet.png", columns=0)
    spoil(split, 0, [0])
    manifest = read_manifest(split)
    manifest["classes"][0] = "ant\nworker"  # of a file of names, say
    manifest["settings"] = {}  # as others may write it
    (split / "manifest.json").write_text(json.dumps(manifest))
    contact_sheet(split, tmp_path / "odd.png", columns=4, rows=3, cell=24)
    assert Image.open(tmp_path / "odd.png").size == (96, 114)
    (split / "shard-000000.tar").unlink()
    with pytest.raises(UserError, match="is missing or not as its manifest says"):
        contact_sheet(split, tmp_path / "sheet.png")
