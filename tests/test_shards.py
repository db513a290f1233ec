"""Shards: what goes in comes out, the same bytes every time, in a mixed order, and damage is seen."""

import io
import itertools
import json
import os
import struct
import tarfile
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from beit_pretrain import shards
from beit_pretrain.errors import UserError
from beit_pretrain.shards import INDEX_DTYPE, index_shard, make_shards, read_manifest, to_rgb, verify_shards

CLASSES = ("ant", "bee", "cat")


def encoded(number: int, size: tuple[int, int] = (24, 18), kind: str = "JPEG", mode: str = "RGB") -> bytes:
    """A small noisy image that differs from every other `number`."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def class_files(per_class: int = 6) -> dict[str, bytes]:
    return {f"{c}/{c}_{i}.jpg": encoded(100 * k + i) for k, c in enumerate(CLASSES) for i in range(per_class)}


def write_folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def tar_bytes(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


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


@pytest.fixture
def split(source, tmp_path) -> Path:
    """18 images in 4 shards."""
    return make(source, tmp_path / "out")


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


def test_order_is_mixed(split):
    classes = [sample["class"] for sample in read_back(split)]
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


def bomb(side: int) -> bytes:
    """A PNG of a few bytes that claims side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0" * 99)) + chunk(b"IEND", b"")
    )


def test_bombs_are_refused_before_decoding(tmp_path, monkeypatch):
    files = {"good.png": encoded(0, (10, 10), "PNG"), "over.png": encoded(1, (11, 10), "PNG"), "bomb.png": bomb(60000)}
    opened = []
    monkeypatch.setattr(shards, "to_rgb", lambda image: opened.append(image.size) or to_rgb(image))
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


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I", "F"])
def test_deep_grey_keeps_its_contrast(mode):
    ramp = np.linspace(1000, 5000, 64 * 64).reshape(64, 64)
    kinds = {"I;16": "<u2", "I;16B": ">u2", "I": "<i4", "F": "<f4"}
    image = Image.frombytes(mode, (64, 64), ramp.astype(kinds[mode]).tobytes())
    if mode == "I;16":  # through a file, as it comes from a scanner
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        image = Image.open(buffer)
    rgb = np.asarray(to_rgb(image)).astype(float)
    assert rgb.shape == (64, 64, 3)
    assert rgb.min() == 0
    assert rgb.max() == 255
    np.testing.assert_allclose(rgb[..., 0], (ramp - 1000) / 4000 * 255, atol=1)


def test_deep_grey_without_range():
    assert np.asarray(to_rgb(Image.new("I;16", (4, 4), 40000))).max() == 0
    holes = Image.fromarray(np.array([[np.nan, 0], [np.inf, 8]], np.float32))
    assert np.asarray(to_rgb(holes))[..., 0].tolist() == [[0, 0], [255, 255]]


def test_to_rgb_follows_pillow_elsewhere():
    colours = Image.open(io.BytesIO(encoded(0, kind="PNG")))
    palette = colours.convert("P")
    palette.info["transparency"] = bytes(range(256))
    cmyk = Image.open(io.BytesIO(encoded(0, kind="JPEG", mode="CMYK")))
    images = [colours.convert(mode) for mode in ("1", "L", "LA", "RGBA", "P")] + [palette, cmyk]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = [np.asarray(image.convert("RGB")) for image in images]
    for image, pixels in zip(images, expected, strict=True):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            np.testing.assert_array_equal(np.asarray(to_rgb(image)), pixels)
    assert np.asarray(to_rgb(cmyk)).std() > 20
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    assert to_rgb(Image.open(buffer)).getpixel((0, 0)) == (255, 0, 0)
    assert min(to_rgb(Image.new("LAB", (1, 1), (255, 128, 128))).getpixel((0, 0))) >= 254  # white is L=100, a=b=0


def test_links_and_loops(tmp_path):
    src = write_folder(tmp_path / "src", {"ant/a.jpg": encoded(0), "bee/b.jpg": encoded(1)})
    os.symlink(src, src / "ant" / "loop")
    os.symlink(src / "bee", src / "again")  # sorts before bee, but the real folder names the class
    write_folder(tmp_path / "elsewhere", {"c.jpg": encoded(2)})
    os.symlink(tmp_path / "elsewhere", src / "cat")
    os.mkfifo(src / "ant" / "pipe.jpg")
    os.symlink(src / "ant" / "pipe.jpg", src / "ant" / "to_pipe.jpg")
    os.symlink(src / "self", src / "self")
    folder = make(src, tmp_path / "out")
    samples = read_back(folder)
    assert set(rejected(folder)) == {"self"}
    assert {s["about"]["source"] for s in samples} == {"ant/a.jpg", "bee/b.jpg", "cat/c.jpg"}


def test_inner_tar_without_end_mark(tmp_path):
    inner = tar_bytes({"a.jpg": encoded(0)})
    inner = inner[: 512 + -(-len(encoded(0)) // 512) * 512]
    (tmp_path / "x.tar").write_bytes(tar_bytes({"ant.tar": inner, "bee/b.jpg": encoded(1)}))
    samples = read_back(make(tmp_path / "x.tar", tmp_path / "out"))
    assert {s["about"]["source"]: s["class"] for s in samples} == {"ant.tar/a.jpg": "ant", "bee/b.jpg": "bee"}


def test_hard_links_and_repeated_members_of_a_tar(tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(tar_bytes({"ant/a.jpg": b"an earlier version", "../up.jpg": encoded(1)}))
    with tarfile.open(path, "a") as tar:
        for name, link in (("ant/a.jpg", None), ("bee/b.jpg", "ant/a.jpg")):
            info = tarfile.TarInfo(name)
            info.type = tarfile.LNKTYPE if link else tarfile.REGTYPE
            info.linkname, info.size = link or "", 0 if link else len(encoded(0))
            tar.addfile(info, io.BytesIO(encoded(0)))
    samples = read_back(make(path, tmp_path / "out"))
    assert {s["about"]["source"]: s["jpg"] for s in samples} == {"ant/a.jpg": encoded(0), "bee/b.jpg": encoded(0)}


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
    ):
        (split / "manifest.json").write_text(bad)
        with pytest.raises(UserError, match=words) as caught:
            read_manifest(split)
        assert "\n" not in str(caught.value)


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


def damaged_tar() -> bytes:
    data = bytearray(tar_bytes(class_files(2)))
    second = 512 + -(-len(next(iter(class_files(2).values()))) // 512) * 512
    data[second + 150] ^= 1  # the checksum of the second header: tarfile alone would stop here without a word
    return bytes(data)


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
    "compressed": ({"a.tar.gz": b"x", "b.jpg": encoded(0)}, "decompress"),
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


def test_val_needs_a_class_of_two(tmp_path):
    src = write_folder(tmp_path / "src", {"a/a.jpg": encoded(0), "b/b.jpg": encoded(1)})
    with pytest.raises(UserError, match="no class has two images"):
        make(src, tmp_path / "out", val=0.5)


def test_targets(source, tmp_path):
    with pytest.raises(UserError, match="lies inside"):
        make(source, source / "shards")
    write_folder(tmp_path / "out", {"val/mine.txt": b"x"})
    with pytest.raises(UserError, match="not empty"):
        make(source, tmp_path / "out", val=0.5)
    assert contents(tmp_path) == {"out/val/mine.txt": b"x"}
    with pytest.raises(UserError, match="cannot write"):
        make(source, tmp_path / "out" / "val" / "mine.txt")
    write_folder(tmp_path / "out", {".train.partial/shard-000000.tar": b"left by a killed run"})
    (tmp_path / "out" / "train").mkdir()
    folder = make(source, tmp_path / "out")
    assert verify_shards(folder, progress=False) == []
    assert sorted(os.listdir(tmp_path / "out")) == ["train", "val"]


@pytest.mark.parametrize(
    "failure", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "ctrl-c"]
)
def test_a_failure_on_the_way_leaves_nothing(failure, source, tmp_path, monkeypatch):
    write = shards._write_manifest

    def fail_on_val(folder: Path, *rest) -> None:
        if "val" in folder.name:
            raise failure
        write(folder, *rest)

    monkeypatch.setattr(shards, "_write_manifest", fail_on_val)
    with pytest.raises((UserError, KeyboardInterrupt)) as caught:
        make(source, tmp_path / "out", val=0.5)
    assert os.listdir(tmp_path) == []
    assert isinstance(failure, KeyboardInterrupt) or "No space left" in str(caught.value)


def test_summary_and_contact_sheet(split, tmp_path):
    text = shards.summary(split)
    assert "18 samples in 4 shards" in text
    assert "3 classes" in text
    assert "(6)" in text
    shards.contact_sheet(split, tmp_path / "new" / "sheet.png", columns=4, rows=3, cell=24)
    sheet = Image.open(tmp_path / "new" / "sheet.png")
    assert (sheet.format, sheet.size) == ("PNG", (96, 114))
    assert np.asarray(sheet.convert("RGB"))[:18, :].std() > 20
    with pytest.raises(UserError, match="columns"):
        shards.contact_sheet(split, tmp_path / "sheet.png", columns=0)
    (split / "shard-000000.tar").unlink()
    with pytest.raises(UserError, match="cannot draw"):
        shards.contact_sheet(split, tmp_path / "sheet.png")
