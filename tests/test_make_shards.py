"""Shards: what goes in comes out, the same bytes every time, in a mixed order, split as asked."""

import io
import itertools
import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from test_image_reading import bomb, encoded
from test_sources import CLASSES, class_files, damaged_tar, tar_bytes, write_folder

from beit_pretrain.errors import UserError
from beit_pretrain.images.reading import to_rgb
from beit_pretrain.shards import make as shards
from beit_pretrain.shards import packing
from beit_pretrain.shards.make import make_shards
from beit_pretrain.shards.manifest import read_manifest, verify_shards


def make(src, out: Path, **options) -> Path:
    return make_shards(src, out, **{"workers": 1, "samples_per_shard": 5} | options)[-1]


def read_back(folder: Path) -> list[dict]:
    """The samples of a split as WebDataset reads them, in order, with their source and class name."""
    manifest = read_manifest(folder)
    urls = [str(folder / entry["name"]) for entry in manifest["shards"]]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    for sample in samples:
        sample["about"] = json.loads(sample["json"])
        sample["class"] = manifest["classes"][int(sample["cls"])] if "cls" in sample else None
    return samples


def rejected(folder: Path) -> dict[str, str]:
    lines = (folder / "rejected.jsonl").read_text().splitlines()
    return {entry["key"]: entry["reason"] for entry in map(json.loads, lines)}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("source"), class_files())


def as_folder(root: Path) -> Path:
    return write_folder(root / "images", class_files() | {"notes.txt": b"no image", "ant/.hidden.jpg": b"no image"})


def as_tar(root: Path) -> Path:
    extra = {"./__MACOSX/ant/._ant_0.jpg": b"no image"}
    return write_folder(
        root, {"images.tar": tar_bytes({f"./top/{k}": v for k, v in class_files().items()} | extra)}
    ) / ("images.tar")


def class_tars() -> dict[str, bytes]:
    files = class_files()
    return {f"{c}.tar": tar_bytes({k.split("/")[1]: v for k, v in files.items() if k.startswith(c)}) for c in CLASSES}


def as_class_tars(root: Path) -> Path:
    return write_folder(root / "tars", class_tars())


def as_tar_of_tars(root: Path) -> Path:
    return write_folder(root, {"all.tar": tar_bytes(class_tars())}) / "all.tar"


@pytest.mark.parametrize("build", [as_folder, as_tar, as_class_tars, as_tar_of_tars])
def test_round_trip(build, tmp_path):
    folder = make(build(tmp_path), tmp_path / "out")
    files = {name.split("/")[1]: data for name, data in class_files().items()}
    samples = read_back(folder)
    assert {s["about"]["source"].rsplit("/")[-1]: s["jpg"] for s in samples} == files
    assert all(s["about"]["source"].rsplit("/")[-1].startswith(s["class"]) for s in samples)
    assert [s["__key__"] for s in samples] == [f"{i:09d}" for i in range(18)]
    manifest = read_manifest(folder)
    assert manifest["classes"] == list(CLASSES)
    assert manifest["class_counts"] == [6, 6, 6]
    assert [entry["samples"] for entry in manifest["shards"]] == [5, 5, 5, 3]
    assert manifest["rejected"] == 0
    assert not manifest["segmentation"]
    assert str(tmp_path) not in json.dumps(manifest)
    assert verify_shards(folder, progress=False) == []


def test_synthetic_has_masks_and_all_classes(tmp_path):
    folder = make("synthetic", tmp_path / "out", images=7, size=32, seed=3)
    manifest = read_manifest(folder)
    assert manifest["segmentation"]
    assert len(manifest["classes"]) == 10
    assert manifest["source"] == "synthetic"
    for sample in read_back(folder):
        mask = np.asarray(Image.open(io.BytesIO(sample["seg.png"])))
        assert set(np.unique(mask)) <= {0, int(sample["cls"]) + 1}
        assert {"shape", "background", "source"} == set(sample["about"])
        assert Image.open(io.BytesIO(sample["jpg"])).size == (32, 32)


def test_same_bytes_whatever_the_workers(source, tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "x.jpg").write_bytes(b"no image")
    sources = [source, tmp_path / "broken"]
    first = make(sources, tmp_path / "first", val=0.3).parent
    again = make(sources, tmp_path / "again", val=0.3).parent
    spread = make(sources, tmp_path / "spread", val=0.3, workers=2).parent
    other = make(sources, tmp_path / "other", val=0.3, seed=1).parent
    assert contents(first) == contents(again) == contents(spread) != contents(other)
    assert len(contents(first)) > 10


def test_order_is_mixed(source, tmp_path):
    classes = [sample["class"] for sample in read_back(make(source, tmp_path / "out"))]
    assert len(set(classes[:5])) > 1
    assert sum(a != b for a, b in itertools.pairwise(classes)) > 5  # sorted classes would change twice


def test_unlabelled_images(tmp_path):
    (tmp_path / "flat.tar").write_bytes(tar_bytes({"a.jpg": encoded(0), "b.jpg": encoded(1)}))
    write_folder(tmp_path / "flat", {"c.jpg": encoded(2)})
    folder = make([tmp_path / "flat.tar", tmp_path / "flat"], tmp_path / "out")
    assert read_manifest(folder)["classes"] == []
    assert read_manifest(folder)["class_counts"] == []
    samples = read_back(folder)
    assert {s["about"]["source"] for s in samples} == {"flat.tar/a.jpg", "flat.tar/b.jpg", "flat/c.jpg"}
    assert not any("cls" in s for s in samples)
    assert np.load(folder / "shard-000000.index.npy")["label"].tolist() == [-1, -1, -1]


def test_broken_files_are_listed_not_fatal(tmp_path):
    broken = {
        "ant/cut.jpg": encoded(0)[:-200],
        "ant/text": b"no image",
        "bee/empty.png": b"",
        "bee/eps": b"%!PS-Adobe-3.0 EPSF",
    }
    src = write_folder(tmp_path / "src", class_files(2) | broken)
    os.symlink(tmp_path / "nowhere", src / "ant" / "dangling.jpg")
    folder = make(src, tmp_path / "out")
    reasons = rejected(folder)
    assert set(reasons) == {*broken, "ant/dangling.jpg"}
    assert all(reasons.values())
    assert "truncated" in reasons["ant/cut.jpg"]
    assert str(tmp_path) not in str(reasons)  # or the listing would differ from machine to machine
    assert read_manifest(folder)["rejected"] == 5
    assert read_manifest(folder)["samples"] == 6
    assert verify_shards(folder, progress=False) == []


def test_a_shard_without_samples_is_left_out(tmp_path):
    src = write_folder(tmp_path / "src", {f"a/{i}": encoded(i) if i == 3 else b"no image" for i in range(6)})
    folder = make(src, tmp_path / "out", samples_per_shard=1)
    assert len(list(folder.glob("*.tar"))) == len(list(folder.glob("*.npy"))) == len(read_back(folder)) == 1
    assert verify_shards(folder, progress=False) == []


def test_bombs_are_refused_before_decoding(tmp_path, monkeypatch):
    files = {"good.png": encoded(0, (10, 10), "PNG"), "over.png": encoded(1, (11, 10), "PNG"), "bomb.png": bomb(60000)}
    opened: list[tuple[int, int]] = []

    def watched(image: Image.Image) -> Image.Image:
        opened.append(image.size)
        return to_rgb(image)

    monkeypatch.setattr(packing, "to_rgb", watched)
    limit = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folder = make(write_folder(tmp_path / "src", files), tmp_path / "out", max_pixels=100)
    assert opened == [(10, 10)]
    assert set(rejected(folder)) == {"over.png", "bomb.png"}
    assert all("max_pixels=100" in reason for reason in rejected(folder).values())
    assert limit == Image.MAX_IMAGE_PIXELS


def test_formats_and_resize(tmp_path):
    files = {
        "a.jpg": encoded(0, (40, 30)),
        "small.jpg": encoded(1, (90, 16)),
        "b.JPG": encoded(2, (40, 30), "PNG"),  # ImageNet has such files
        "c.webp": encoded(3, (16, 16), "WEBP"),
        "d.tif": encoded(4, (16, 16), "TIFF", "CMYK"),
    }
    src = write_folder(tmp_path / "src", files)
    kept = {s["about"]["source"]: s for s in read_back(make(src, tmp_path / "kept"))}
    for name, extension in zip(files, ("jpg", "jpg", "png", "webp", "tiff"), strict=True):
        assert kept[name][extension] == files[name]
    shrunk = {s["about"]["source"]: s for s in read_back(make(src, tmp_path / "shrunk", resize=16))}
    assert shrunk["small.jpg"]["jpg"] == files["small.jpg"]
    assert shrunk["c.webp"]["webp"] == files["c.webp"]
    for name in ("a.jpg", "b.JPG"):
        image = Image.open(io.BytesIO(shrunk[name]["jpg"]))
        assert (image.format, image.size) == ("JPEG", (21, 16))


def test_grey_images_of_more_than_8_bits_are_stored_with_their_contrast(tmp_path):
    ramp = np.linspace(1000, 5000, 40 * 40).reshape(40, 40)
    src = tmp_path / "src"
    src.mkdir()
    Image.fromarray(ramp.astype(np.uint16)).save(src / "deep.tif")
    Image.fromarray(ramp.astype(np.float32)).save(src / "float.tif")
    Image.fromarray(ramp.astype(np.int32)).save(src / "integer.tif")
    Image.fromarray((ramp / 20).astype(np.uint8)).save(src / "grey.png")
    for name, options, low, high in (("own", {}, 1020, 4980), ("window", {"window": [2000, 3000]}, 2000, 3000)):
        samples = {s["about"]["source"]: s for s in read_back(make(src, tmp_path / name, **options))}
        for file in ("deep.tif", "float.tif", "integer.tif"):
            pixels = np.asarray(Image.open(io.BytesIO(samples[file]["png"])))  # as any reader sees it
            np.testing.assert_allclose(pixels, np.clip((ramp - low) / (high - low), 0, 1) * 255, atol=1)
            np.testing.assert_allclose(samples[file]["about"]["window"], [low, high], atol=2)
        if not options:
            assert samples["grey.png"]["png"] == (src / "grey.png").read_bytes()
    dark = {s["about"]["source"]: s for s in read_back(make(src, tmp_path / "grey", window=[50, 100]))}
    pixels = np.asarray(Image.open(io.BytesIO(dark["grey.png"]["png"])))
    assert (pixels.min(), pixels.max()) == (0, 255)


def test_a_window_of_samples_is_a_fair_mix_of_classes(tmp_path):
    src = tmp_path / "src"
    for c in range(10):  # class-sorted on disk, as ImageNet comes
        write_folder(src, {f"class{c}.tar": tar_bytes({f"{i}.png": encoded(i, (1, 1), "PNG") for i in range(100)})})
    folder = make(src, tmp_path / "out", samples_per_shard=100)
    for entry in read_manifest(folder)["shards"]:
        labels = np.load(folder / entry["name"].replace(".tar", ".index.npy"))["label"]
        counts = np.bincount(labels, minlength=10)
        # 100 draws without replacement of 10 classes: 10 +- 2.9 each; chi-square over 9 classes stays below 30.
        assert ((counts - 10) ** 2 / 10).sum() < 30
        assert counts.min() > 0


def test_validation_split(tmp_path):
    sizes = {"ant": 1, "bee": 2, "cat": 20, "dog": 7}
    files = {f"{c}/{c}{i}.jpg": encoded(100 * k + i) for k, (c, n) in enumerate(sizes.items()) for i in range(n)}
    src = write_folder(tmp_path / "src", files)
    train, val = make_shards(src, tmp_path / "out", val=0.25, workers=1)
    assert (train.name, val.name) == ("train", "val")
    assert read_manifest(train)["classes"] == read_manifest(val)["classes"] == list(sizes)
    assert read_manifest(train)["class_counts"] == [1, 1, 15, 5]
    assert read_manifest(val)["class_counts"] == [0, 1, 5, 2]
    parts = [{s["about"]["source"] for s in read_back(folder)} for folder in (train, val)]
    assert not parts[0] & parts[1]
    assert parts[0] | parts[1] == set(files)
    extreme = make_shards(src, tmp_path / "extreme", val=0.99, workers=1)
    assert read_manifest(extreme[0])["class_counts"] == [1, 1, 1, 1]
    assert make_shards("synthetic", tmp_path / "s", val=0.5, images=20, size=16, workers=1)[1] == tmp_path / "s" / "val"


def test_val_of_images_alone_in_their_class(tmp_path):
    files = {f"class{i}/{i}.png": encoded(i, (2, 2), "PNG") for i in range(400)}
    src = write_folder(tmp_path / "src", files)
    chosen = []
    for seed in (0, 1):
        train, val = make_shards(src, tmp_path / str(seed), val=0.1, workers=1, seed=seed)
        assert (read_manifest(train)["samples"], read_manifest(val)["samples"]) == (360, 40)
        assert len(read_manifest(train)["classes"]) == len(read_manifest(val)["classes"]) == 400
        parts = [{s["about"]["source"] for s in read_back(folder)} for folder in (train, val)]
        assert parts[0] | parts[1] == set(files)
        chosen.append(parts[1])
    assert chosen[0] != chosen[1]


def test_val_pools_single_and_unlabelled_images(tmp_path):
    files = {f"ant/{i}.png": encoded(i, (2, 2), "PNG") for i in range(10)}
    files |= {f"alone{i}/{i}.png": encoded(20 + i, (2, 2), "PNG") for i in range(6)}
    files |= {f"{i}.png": encoded(40 + i, (2, 2), "PNG") for i in range(4)}
    train, val = make_shards(write_folder(tmp_path / "src", files), tmp_path / "out", val=0.3, workers=1)
    sources = [s["about"]["source"] for s in read_back(val)]
    assert sum(name.startswith("ant/") for name in sources) == 3
    assert len(sources) == 3 + 3
    assert read_manifest(train)["samples"] == 14


@pytest.mark.parametrize("names", [("a/a.jpg", "b/b.jpg"), ("a.jpg", "b.jpg"), ("a/a.jpg", "b.jpg")])
@pytest.mark.parametrize("val", [0.01, 0.99])
def test_val_takes_from_the_pool_if_there_is_nothing_else(names, val, tmp_path):
    src = write_folder(tmp_path / "src", {name: encoded(i) for i, name in enumerate(names)})
    folders = make_shards(src, tmp_path / "out", val=val, workers=1)
    assert [read_manifest(folder)["samples"] for folder in folders] == [1, 1]


def test_val_needs_two_images(tmp_path):
    src = write_folder(tmp_path / "src", {"a/a.jpg": encoded(0)})
    with pytest.raises(UserError, match="only one image"):
        make(src, tmp_path / "out", val=0.5)


def test_a_later_split_takes_the_classes_of_train(source, tmp_path):
    make(source, tmp_path / "out")
    some = write_folder(tmp_path / "some", {"cat/x.jpg": encoded(7)})
    folder = make(some, tmp_path / "out", split="val")
    assert folder == tmp_path / "out" / "val"
    assert read_manifest(folder)["classes"] == list(CLASSES)
    assert [s["class"] for s in read_back(folder)] == ["cat"]
    write_folder(some, {"yak/x.jpg": encoded(8)})
    with pytest.raises(UserError, match="'yak'"):
        make(some, tmp_path / "out", split="test")
    assert sorted(os.listdir(tmp_path / "out")) == ["train", "val"]


BAD_OPTIONS = [
    {"val": 1.0},
    {"val": -0.1},
    {"val": float("nan")},
    {"val": 0.1, "split": "val"},
    {"split": "a/b"},
    {"split": ".x"},
    {"split": ""},
    {"samples_per_shard": 0},
    {"seed": -1},
    {"resize": 0},
    {"quality": 0},
    {"workers": 0},
    {"window": [5, 5]},
    {"percentiles": [99, 1]},
    {"percentiles": [-1, 50]},
    {"max_pixels": 0},
]


@pytest.mark.parametrize("options", BAD_OPTIONS, ids=str)
def test_bad_options(options, source, tmp_path):
    with pytest.raises(UserError, match=next(iter(options))) as caught:
        make(source, tmp_path / "deep" / "out", **options)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("options", [{"images": 0}, {"size": 15}, {"resize": 8}], ids=str)
def test_bad_options_of_the_synthetic_set(options, tmp_path):
    with pytest.raises(UserError, match=next(iter(options))):
        make("synthetic", tmp_path / "out", **options)
    assert os.listdir(tmp_path) == []


BAD_SOURCES = {
    "missing": (None, "does not exist"),
    "empty": ({}, "holds no image"),
    "only text": ({"a.txt": b"x", "b.json": b"{}"}, "holds no image"),
    "no image": ({"a.jpg": b"x", "b": b"y"}, "none of the . files"),
    "no tar": ({"a.tar": b"x" * 2000}, "not a readable uncompressed tar"),
    "empty tar": ({"a.tar": b""}, "not a readable uncompressed tar"),
    "damaged tar": ({"a.tar": damaged_tar()}, "damaged at byte"),
    "cut tar": ({"a.tar": tar_bytes(class_files(2))[:3000]}, "not a readable uncompressed tar"),
    "damaged inner tar": ({"a.tar": tar_bytes({"b.tar": damaged_tar()})}, "damaged at byte"),
    "compressed": ({"a.tar.gz": b"x", "b.txt": b"x"}, "decompress"),
}


@pytest.mark.parametrize(("files", "words"), BAD_SOURCES.values(), ids=BAD_SOURCES)
@pytest.mark.parametrize("val", [0, 0.5])
def test_bad_sources(files, words, val, tmp_path):
    src = tmp_path / "src"
    if files is not None:
        src.mkdir()
        write_folder(src, files)
    with pytest.raises(UserError, match=words) as caught:
        make(src, tmp_path / "deep" / "out", val=val)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "deep").exists()


def test_bad_single_files_and_lists(source, tmp_path):
    write_folder(tmp_path, {"a.tgz": b"x", "a.txt": b"x", "a.zip": b"PK", "a.jpg": b"x"})
    for src, words in (
        (tmp_path / "a.tgz", "decompress"),
        (tmp_path / "a.txt", "holds no image"),
        (tmp_path / "a.zip", "holds no image"),
        (tmp_path / "a.jpg", "none of the 1 files"),
        ([], "src is empty"),
        ([source, source], "twice"),
        (["synthetic", source], "mixed"),
    ):
        with pytest.raises(UserError, match=words):
            make(src, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_targets(source, tmp_path):
    with pytest.raises(UserError, match="lies inside"):
        make(source, source / "shards")
    write_folder(tmp_path / "out", {"val/mine.txt": b"x"})
    with pytest.raises(UserError, match="not empty"):
        make(source, tmp_path / "out", val=0.5)
    assert contents(tmp_path) == {"out/val/mine.txt": b"x"}
    with pytest.raises(UserError, match="cannot write"):
        make(source, tmp_path / "out" / "val" / "mine.txt")
    write_folder(tmp_path / "out", {".making/train/shard-000000.tar": b"left by a run killed before its plan"})
    (tmp_path / "out" / "train").mkdir()
    folder = make(source, tmp_path / "out")
    assert verify_shards(folder, progress=False) == []
    assert sorted(os.listdir(tmp_path / "out")) == ["train", "val"]


@pytest.mark.parametrize(
    "failure", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "ctrl-c"]
)
def test_a_failure_on_the_way_publishes_nothing_and_is_gone_on_with(failure, source, tmp_path, monkeypatch):
    write = shards.write_manifest

    def fail_on_val(folder: Path, *rest, **more) -> None:
        if "val" in folder.name:
            raise failure
        write(folder, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "write_manifest", fail_on_val)
        with pytest.raises((UserError, KeyboardInterrupt)) as caught:
            make(source, tmp_path / "out", val=0.5)
    assert os.listdir(tmp_path / "out") == [".making"]
    assert isinstance(failure, KeyboardInterrupt) or "No space left" in str(caught.value)
    monkeypatch.setattr(shards, "write_shard", None)  # all are there
    make(source, tmp_path / "out", val=0.5)
    assert sorted(os.listdir(tmp_path / "out")) == ["train", "val"]
