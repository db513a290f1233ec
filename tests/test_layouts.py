"""Layouts of data sets as people have them: the table in data/README.md, a test for each of its rows."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from table_makers import image_table, write
from test_cifar import NAMES, archive, as_python2, batch
from test_file_index import mask
from test_image_io import encoded
from test_make_shards import make, read_back, rejected
from test_sources import tar_bytes, write_folder
from test_tiff import page, tiff

from beit_pretrain.data.left_out import LEFT_OUT, LeftOut
from beit_pretrain.data.manifest import read_manifest
from beit_pretrain.data.reader import ShardReader
from beit_pretrain.data.write.index_existing import index_shards


class Layout(NamedTuple):
    """How a set lies, and what is read of it."""

    files: dict[str, bytes]
    classes: dict[str, str | None]  # source of every image that is read -> its class
    left_out: set[str] = set()  # first keys of what is left out with a warning
    src: str = ""
    options: dict[str, Any] = {}  # of shards make
    masks: bool = False


def photos(*names: str) -> dict[str, bytes]:
    return {name: encoded(number) for number, name in enumerate(names)}


def maps(*names: str) -> dict[str, bytes]:
    return dict.fromkeys(names, mask((24, 18)))


def values16() -> np.ndarray:
    return np.linspace(0, 4095, 24 * 18).reshape(18, 24).astype(np.uint16)


LAYOUTS: dict[str, Callable[[], Layout]] = {
    "class folders": lambda: Layout(
        photos("train/cat/1.jpg", "train/dog/1.jpg", "val/cat/2.jpg"),
        {"train/cat/1.jpg": "cat", "train/dog/1.jpg": "dog"},
    ),
    "nested folders": lambda: Layout(
        photos("pets/cat/1.jpg", "pets/dog/1.jpg", "cars/van/1.jpg"),
        {"pets/cat/1.jpg": "pets/cat", "pets/dog/1.jpg": "pets/dog", "cars/van/1.jpg": "cars/van"},
        options={"labels": {"folder": "path"}},
    ),
    "flat + CSV": lambda: Layout(
        photos("set/1.jpg", "set/2.jpg") | {"train.csv": b"id,width,label\n1,24,cat\n2,24,dog\n"},
        {"1.jpg": "cat", "2.jpg": "dog"},
        src="set",
        options={"labels": "train.csv"},
    ),
    "Pascal VOC": lambda: Layout(
        photos("JPEGImages/1.jpg", "JPEGImages/2.jpg")
        | maps("SegmentationClass/1.png", "SegmentationObject/1.png")
        | {"Annotations/1.xml": b"<a/>", "ImageSets/Main/train.txt": b"1\n"},
        {"JPEGImages/1.jpg": None, "JPEGImages/2.jpg": None},
        {"SegmentationClass/", "SegmentationObject/"},
    ),
    "COCO": lambda: Layout(
        photos("train2017/1.jpg", "train2017/2.jpg", "val2017/3.jpg") | {"annotations/instances_train2017.json": b"{}"},
        {"train2017/1.jpg": None, "train2017/2.jpg": None},
    ),
    "ADE20K": lambda: Layout(
        photos("images/training/1.jpg", "images/validation/2.jpg")
        | maps("annotations/training/1.png", "annotations/validation/2.png"),
        {"images/training/1.jpg": None},
        masks=True,
    ),
    "CUB-200-2011": lambda: Layout(
        photos("images/001.Albatross/A_1.jpg", "images/002.Auk/B_1.jpg")
        | maps("segmentations/001.Albatross/A_1.png", "segmentations/002.Auk/B_1.png")
        | {"images.txt": b"1 001.Albatross/A_1.jpg\n", "classes.txt": b"1 001.Albatross\n"},
        {"images/001.Albatross/A_1.jpg": "001.Albatross", "images/002.Auk/B_1.jpg": "002.Auk"},
        {"segmentations/"},
    ),
    "Tiny ImageNet": lambda: Layout(
        photos("train/n01/images/1.JPEG", "train/n02/images/2.JPEG", "val/images/val_0.JPEG", "test/images/t.JPEG")
        | {
            "train/n01/n01_boxes.txt": b"",
            "val/val_annotations.txt": b"val_0.JPEG\tn02\t0\t0\t9\t9\n",
            "wnids.txt": b"",
        },
        {"train/n01/images/1.JPEG": "n01", "train/n02/images/2.JPEG": "n02"},
    ),
    "Tiny ImageNet, val": lambda: Layout(
        photos("val/images/val_0.JPEG") | {"val/val_annotations.txt": b"val_0.JPEG\tn02\t0\t0\t9\t9\n"},
        {"images/val_0.JPEG": "n02"},
        src="val",
        options={"split": "val", "labels": "val/val_annotations.txt"},
    ),
    "ImageNet": lambda: Layout(
        {"train.tar": tar_bytes({f"n0{i}.tar": tar_bytes(photos(f"n0{i}_1.JPEG")) for i in (1, 2)})},
        {"n01.tar/n01_1.JPEG": "n01", "n02.tar/n02_1.JPEG": "n02"},
        src="train.tar",
    ),
    "Caltech-101": lambda: Layout(
        photos("101_ObjectCategories/ant/image_0001.jpg", "101_ObjectCategories/crab/image_0001.jpg")
        | {"Annotations/ant/annotation_0001.mat": b"x"},
        {
            "101_ObjectCategories/ant/image_0001.jpg": "ant",
            "101_ObjectCategories/crab/image_0001.jpg": "crab",
        },
    ),
    "medical, 16 bits": lambda: Layout(
        {
            "NORMAL/1.tif": tiff(page(values16())),
            "PNEUMONIA/2.tif": tiff(page(values16()[::-1])),
            "PNEUMONIA/2.dcm": b"\0" * 128 + b"DICM",
        },
        {"NORMAL/1.tif": "NORMAL", "PNEUMONIA/2.tif": "PNEUMONIA"},
    ),
    "satellite, many bands": lambda: Layout(
        {
            "field/1.tif": tiff(page(np.stack([values16() // 16] * 4, 2).astype(np.uint8), 2, t338=(3, [0]))),
            "field/2.tif": tiff(page(np.stack([values16()] * 13, 2))),
        },
        {"field/1.tif": "field"},
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_make(name, tmp_path):
    expected = LAYOUTS[name]()
    write_folder(tmp_path / "set", expected.files)
    options = dict(expected.options)
    if isinstance(options.get("labels"), str):
        options["labels"] = tmp_path / "set" / options["labels"]
    folder = make(tmp_path / "set" / expected.src, tmp_path / "out", **options)
    samples = read_back(folder)
    assert {s["about"]["source"]: s["class"] for s in samples} == expected.classes
    assert all(("seg.png" in s) == expected.masks for s in samples)
    warned = {
        key for key, why in LeftOut.read(folder / LEFT_OUT).examples() if key.endswith("/") and "by its name" in why
    }
    assert warned == expected.left_out
    kept = {*expected.classes, *rejected(folder)}
    assert not kept & {key for key in expected.files if key.endswith((".txt", ".csv", ".json", ".xml"))}


def test_what_cannot_be_read_rightly_is_rejected(tmp_path):
    write_folder(tmp_path / "set", LAYOUTS["satellite, many bands"]().files)
    assert "13 bands" in rejected(make(tmp_path / "set", tmp_path / "out"))["field/2.tif"]
    write_folder(tmp_path / "medical", LAYOUTS["medical, 16 bits"]().files)
    assert "not an image" in rejected(make(tmp_path / "medical", tmp_path / "other"))["PNEUMONIA/2.dcm"]


def test_cifar(tmp_path):
    parts = {"train": as_python2(batch(4, 0)), "test": as_python2(batch(2, 1))}
    meta = as_python2({b"fine_label_names": NAMES, b"coarse_label_names": []})
    source = archive(tmp_path / "cifar-100-python.tar.gz", **parts, meta=meta)
    assert [s["class"] for s in read_back(make(source, tmp_path / "out", split="val"))] in (
        ["apple", "bear"],
        ["bear", "apple"],
    )


def test_img2dataset(tmp_path, capsys):
    """Captions are ignored; a shard of which no download succeeded is no reason to stop."""
    members = {
        f"00000000{i}.{e}": d for i in range(2) for e, d in (("jpg", encoded(i)), ("txt", b"x"), ("json", b"{}"))
    }
    files = {
        "00000.tar": tar_bytes(members),
        "00001.tar": tar_bytes({}),
        "00000.parquet": b"PAR1",
        "00000_stats.json": b"{}",
    }
    write_folder(tmp_path / "set", files)
    manifest = read_manifest(index_shards(tmp_path / "set", tmp_path / "index", num_workers=1))
    assert (manifest["samples"], manifest["classes"]) == (2, [])
    assert "left out 00001.tar: a tar without an image" in capsys.readouterr().err
    made = make(tmp_path / "set", tmp_path / "out")
    assert {s["about"]["source"]: s["class"] for s in read_back(made)} == {
        f"00000.tar/00000000{i}.jpg": None for i in range(2)
    }


def test_timm_webdataset(tmp_path, capsys):
    members = {f"n01_{i}.{e}": d for i in range(2) for e, d in (("jpg", encoded(i)), ("cls", b"%d" % i))}
    files = {"imagenet1k-train-0000.tar": tar_bytes(members), "_info.json": json.dumps({"splits": {}}).encode()}
    write_folder(tmp_path / "set", files)
    manifest = read_manifest(index_shards(tmp_path / "set", tmp_path / "index", num_workers=1))
    assert (manifest["samples"], manifest["class_counts"]) == (2, [1, 1])
    make(tmp_path / "set", tmp_path / "out")  # has classes by folders alone
    assert "a class number of WebDataset; for these classes give the folder" in capsys.readouterr().err
    assert read_manifest(tmp_path / "out/train")["classes"] == []


def test_hugging_face_imagefolder(tmp_path):
    """Also in place."""
    names = "file_name,label\n" + "".join(f"{i}.jpg,{'cat' if i % 2 else 'ant'}\n" for i in range(4))
    files = {f"set/train/{i}.jpg": encoded(i) for i in range(4)} | {"set/train/metadata.csv": names.encode()}
    write_folder(tmp_path, files)
    made = make(tmp_path / "set", tmp_path / "out")
    assert {s["about"]["source"]: s["class"] for s in read_back(made)} == {
        f"train/{i}.jpg": "cat" if i % 2 else "ant" for i in range(4)
    }
    assert ShardReader(tmp_path / "set").labels(0).tolist() == ShardReader(made).labels(0).tolist()


def test_hugging_face_parquet(tmp_path):
    write(tmp_path / "set/data/train-00000-of-00001.parquet", image_table(5))
    write(tmp_path / "set/data/validation-00000-of-00001.parquet", image_table(2))
    assert sorted(s["class"] for s in read_back(make(tmp_path / "set", tmp_path / "out"))) == [
        *["cat"] * 2,
        *["dog"] * 2,
        "emu",
    ]
    reader = ShardReader(tmp_path / "set")
    assert (reader.labels(0).tolist(), reader.classes) == ([0, 1, 2, 0, 1], ["cat", "dog", "emu"])


ELSEWHERE = {
    "CIFAR-100": test_cifar,
    "img2dataset": test_img2dataset,
    "timm's WebDataset": test_timm_webdataset,
    "Hugging Face imagefolder": test_hugging_face_imagefolder,
    "Hugging Face parquet": test_hugging_face_parquet,
}


def test_every_row_of_the_table_has_a_test():
    text = (Path(__file__).parents[1] / "data/README.md").read_text()
    table = text.partition("## Layouts")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ([^|]+?) \|", table, re.MULTILINE)[1:]
    assert rows == [*LAYOUTS, *ELSEWHERE]
