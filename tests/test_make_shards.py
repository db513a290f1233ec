"""shards make: round trips, reproducible bytes, mixed order, splits, bad input."""

import io
import itertools
import json
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from test_image_io import bomb, encoded
from test_image_io import png as png_of
from test_sources import CLASSES, class_files, damaged_tar, tar_bytes, write_folder
from test_tiff import DEEP, RAMP, SENSOR, THUMBNAIL, WHOLE, page, tiff

from beit_pretrain.data.manifest import read_manifest, summary, verify_shards
from beit_pretrain.data.order import Sample
from beit_pretrain.data.reader import ShardReader
from beit_pretrain.data.sources import list_images
from beit_pretrain.data.write import make_shards as shards
from beit_pretrain.data.write import sample_encoder as members
from beit_pretrain.data.write.make_shards import make_shards
from beit_pretrain.errors import UserError
from beit_pretrain.transforms.grey_values import label_ids
from beit_pretrain.transforms.image_io import EXTENSIONS, TURNS, open_image, to_channels, to_rgb
from beit_pretrain.transforms.segmentation import SegmentationEvalTransform
from beit_pretrain.transforms.views import TwoViewTransform


def make(src, out: Path, **options) -> Path:
    return make_shards(src, out, **{"num_workers": 1, "samples_per_shard": 5} | options)[-1]


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


def test_what_is_left_out_is_listed_and_counted(tmp_path, capsys):
    files = {"cat/1.jpg": encoded(0), "cat/2.jpg": encoded(1), "dog/3.jpg": encoded(2), "cat/1.txt": b"x"}
    files |= {"dog.zip": b"x", "cat/._1.jpg": b"x", "cat/@eaDir/1.jpg/S.jpg": b"x"}
    make_shards(write_folder(tmp_path / "src", files), tmp_path / "out", num_workers=1, val=0.4)
    for part in ("train", "val"):
        folder = tmp_path / "out" / part
        lines = [json.loads(line) for line in (folder / "left_out.jsonl").read_text().splitlines()]
        counts = {"dog.zip": 1, "cat/._1.jpg": 2, "cat/1.txt": 1}
        assert {line["key"]: line["files"] for line in lines} == counts
        assert sum(read_manifest(folder)["left_out"].values()) == 4
        assert "left out: 2 (a by-product" in summary(folder)
    said = capsys.readouterr().err
    assert said.count("warning") == said.count("warning: left out dog.zip: an archive") == 1


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


def test_same_bytes_for_any_number_of_workers(source, tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "x.jpg").write_bytes(b"no image")
    sources = [source, tmp_path / "broken"]
    first = make(sources, tmp_path / "first", val=0.3).parent
    again = make(sources, tmp_path / "again", val=0.3).parent
    spread = make(sources, tmp_path / "spread", val=0.3, num_workers=2).parent
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


def test_warns_of_many_rejected_files(tmp_path, capsys):
    files = {f"{i:03d}.png": encoded(i, (4, 4), "PNG") for i in range(200)} | {"000.png": b"x", "001.png": b"x"}
    make(write_folder(tmp_path / "src", files), tmp_path / "few")
    assert "warning" not in capsys.readouterr().err  # one in a hundred
    write_folder(tmp_path / "src", {"002.png": b"x", "003.png": encoded(3, (4, 4), "PNG")[:60]})
    make(tmp_path / "src", tmp_path / "many")
    said = "4 of 200 files for train are no usable images (not an image in a known format, and others); see its"
    assert f"warning: {said} rejected.jsonl" in capsys.readouterr().err


def test_a_shard_without_samples_is_left_out(tmp_path):
    src = write_folder(tmp_path / "src", {f"a/{i}": encoded(i) if i == 3 else b"no image" for i in range(6)})
    folder = make(src, tmp_path / "out", samples_per_shard=1)
    assert len(list(folder.glob("*.tar"))) == len(list(folder.glob("*.npy"))) == len(read_back(folder)) == 1
    assert verify_shards(folder, progress=False) == []


def test_bombs_are_refused_before_decoding(tmp_path, monkeypatch):
    files = {"good.png": encoded(0, (10, 10), "PNG"), "over.png": encoded(1, (11, 10), "PNG"), "bomb.png": bomb(60000)}
    open_image: list[tuple[int, int]] = []

    def watched(image: Image.Image) -> Image.Image:
        open_image.append(image.size)
        return to_rgb(image)

    monkeypatch.setattr(members, "to_rgb", watched)
    limit = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folder = make(write_folder(tmp_path / "src", files), tmp_path / "out", max_pixels=100)
    assert open_image == [(10, 10)]
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


def pictures(folder: Path) -> dict[str, Image.Image]:
    """The stored images by their source's name, decoded."""
    extensions = set(EXTENSIONS.values())
    return {
        s["about"]["source"]: Image.open(io.BytesIO(next(data for key, data in s.items() if key in extensions)))
        for s in read_back(folder)
    }


def gradient(size: tuple[int, int] = (60, 40)) -> Image.Image:
    """A smooth RGBA image whose alpha is 0, then runs to 255: what resizing does to it is nearly nothing."""
    x, y = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    return Image.fromarray(np.stack([x, y, 255 - x, np.maximum(0, 2 * x - 255)], -1).astype(np.uint8), "RGBA")


def with_alpha(src: Path) -> None:
    """Every kind of file that carries alpha, and one that only has the channel."""
    src.mkdir()
    image = gradient()
    image.save(src / "rgba.png")
    image.convert("LA").save(src / "la.png")
    image.save(src / "rgba.webp", lossless=True)
    palette = image.convert("RGB").convert("P")
    palette.save(src / "palette.png", transparency=bytes(range(256)))
    grey = image.convert("L")
    grey.save(src / "colour_key.png", transparency=grey.getextrema()[0])
    image.putalpha(255)
    image.save(src / "opaque.png")


def test_resizing_keeps_alpha(tmp_path):
    with_alpha(tmp_path / "src")
    folder = make(tmp_path / "src", tmp_path / "out", resize=20)
    made = pictures(folder)
    for name, image in made.items():
        assert (image.format, image.size) == ("JPEG" if name == "opaque.png" else "PNG", (30, 20))
        with Image.open(tmp_path / "src" / name) as source:
            alpha = np.asarray(source.convert("RGBA").resize((30, 20), Image.Resampling.LANCZOS))[..., 3].astype(int)
            colours = np.asarray(to_rgb(source).resize((30, 20), Image.Resampling.LANCZOS)).astype(int)
        if name != "opaque.png":  # colours as in the kept file, also where they are transparent: RGB is without alpha
            assert np.abs(np.asarray(to_rgb(image)).astype(int) - colours).max() <= 1
        assert np.abs(np.asarray(to_channels(image, 4))[..., 3] - alpha).max() <= 1
    assert made["la.png"].mode == "LA"
    reader = ShardReader(folder)
    views = TwoViewTransform(16, 8, channels=4)
    with open_image(reader.read(Sample(0, 0)).data) as image:
        assert views(image, np.random.default_rng(0))["image"].shape == (4, 16, 16)


def test_window_applies_to_every_grey_image(tmp_path):
    """Grey with alpha, of a grey palette, of one bit, and of 16 bits with alpha; colours are left alone."""
    with_alpha(src := tmp_path / "src")
    grey = np.tile(np.arange(0, 240, 4, dtype=np.uint8), (40, 1))
    Image.fromarray(grey).convert("P").save(src / "grey_palette.png")
    Image.fromarray(grey).convert("RGB").save(src / "colours.png")
    Image.fromarray(grey > 100).save(src / "bits.png")
    deep = png_of_16_bits(grey.astype(np.uint16) * 16, alpha := grey.astype(np.uint16) * 256)
    (src / "deep.png").write_bytes(deep)
    (src / "deep_laced.png").write_bytes(interlaced(deep))
    folder = make(src, tmp_path / "out", window=[50, 100])
    made = pictures(folder)
    about = {s["about"]["source"]: s["about"] for s in read_back(folder)}
    expected = np.rint(np.clip((grey.astype(float) - 50) / 50, 0, 1) * 255)
    assert np.array_equal(np.asarray(made["grey_palette.png"]), expected)
    assert np.array_equal(np.asarray(made["bits.png"]), np.where(grey > 100, 255, 0))
    assert made["la.png"].mode == made["colour_key.png"].mode == "LA"
    alpha_before = np.asarray(gradient())[..., 3]
    assert np.array_equal(np.asarray(made["la.png"])[..., 1], alpha_before)
    assert about["la.png"]["window"] == about["bits.png"]["window"] == [50, 100]
    for name in ("rgba.png", "palette.png", "colours.png"):
        assert "window" not in about[name]
        assert (src / name).read_bytes() in [s.get("png") for s in read_back(folder)]
    wide = pictures(make(src, tmp_path / "wide", window=[800, 1600]))
    for name in ("deep.png", "deep_laced.png"):  # as Pillow reads it, sixteen levels would be left of 60
        pixels = np.asarray(wide[name])
        assert np.array_equal(pixels[..., 0], expected)
        assert np.array_equal(pixels[..., 1], alpha >> 8)
    own = np.asarray(pictures(make(src, tmp_path / "own", percentiles=[0, 100]))["deep.png"])[..., 0]
    assert (own.min(), own.max(), len(np.unique(own))) == (0, 255, 60)


def test_colours_of_16_bits_are_counted(tmp_path):
    values = np.random.default_rng(0).integers(0, 4096, (6, 8, 3)).astype(np.uint16)
    files = {"deep.png": png_of_16_bits(*values.transpose(2, 0, 1)), "plain.png": encoded(0, kind="PNG")}
    folder = make(write_folder(tmp_path / "src", files), tmp_path / "out")
    about = {s["about"]["source"]: s["about"] for s in read_back(folder)}
    assert about["deep.png"]["bits"] == 16
    assert "bits" not in about["plain.png"]
    assert read_manifest(folder)["deep_colours"] == 1
    assert "1 images have 16 bits a colour, of which the upper 8 are read" in summary(folder)


def png_of_16_bits(*channels: np.ndarray) -> bytes:
    """A PNG of two (grey and alpha) or three channels (H, W) of 16 bits."""
    pixels = np.stack(channels, -1).astype(">u2")
    lines = b"".join(b"\0" + line.tobytes() for line in pixels)
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, {2: 4, 3: 2}[len(channels)], 0, 0, 0)
    return png(header, lines)


def png(header: bytes, lines: bytes) -> bytes:
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b""))
    packed = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def interlaced(data: bytes) -> bytes:
    """A PNG of four bytes a pixel, all lines unfiltered, in the seven passes of Adam7."""
    width, height = struct.unpack(">II", data[16:24])
    length = struct.unpack(">I", data[33:37])[0]
    lines = np.frombuffer(zlib.decompress(data[41 : 41 + length]), np.uint8).reshape(height, 1 + 4 * width)
    pixels = lines[:, 1:].reshape(height, width, 4)
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    rows = [row for y, x, down, right in passes for row in pixels[y::down, x::right] if row.size]
    return png(data[16:28] + b"\x01", b"".join(b"\0" + row.tobytes() for row in rows))


@pytest.mark.parametrize(("side", "kind"), [(70_000, "JPEG"), (80_000, "PNG")])
def test_images_too_long_for_jpeg_become_png(side, kind, tmp_path):
    Image.new("RGB", (side, 10), "red").save(tmp_path / "strip.png")
    (image,) = pictures(make(tmp_path / "strip.png", tmp_path / "out", resize=9)).values()
    assert (image.format, image.size) == (kind, (side * 9 // 10, 9))


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
    train, val = make_shards(src, tmp_path / "out", val=0.25, num_workers=1)
    assert (train.name, val.name) == ("train", "val")
    assert read_manifest(train)["classes"] == read_manifest(val)["classes"] == list(sizes)
    assert read_manifest(train)["class_counts"] == [1, 1, 15, 5]
    assert read_manifest(val)["class_counts"] == [0, 1, 5, 2]
    parts = [{s["about"]["source"] for s in read_back(folder)} for folder in (train, val)]
    assert not parts[0] & parts[1]
    assert parts[0] | parts[1] == set(files)
    extreme = make_shards(src, tmp_path / "extreme", val=0.99, num_workers=1)
    assert read_manifest(extreme[0])["class_counts"] == [1, 1, 1, 1]
    assert (
        make_shards("synthetic", tmp_path / "s", val=0.5, images=20, size=16, num_workers=1)[1]
        == tmp_path / "s" / "val"
    )


def test_val_of_images_alone_in_their_class(tmp_path):
    files = {f"class{i}/{i}.png": encoded(i, (2, 2), "PNG") for i in range(400)}
    src = write_folder(tmp_path / "src", files)
    chosen = []
    for seed in (0, 1):
        train, val = make_shards(src, tmp_path / str(seed), val=0.1, num_workers=1, seed=seed)
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
    train, val = make_shards(write_folder(tmp_path / "src", files), tmp_path / "out", val=0.3, num_workers=1)
    sources = [s["about"]["source"] for s in read_back(val)]
    assert sum(name.startswith("ant/") for name in sources) == 3
    assert len(sources) == 3 + 3
    assert read_manifest(train)["samples"] == 14


@pytest.mark.parametrize("names", [("a/a.jpg", "b/b.jpg"), ("a.jpg", "b.jpg"), ("a/a.jpg", "b.jpg")])
@pytest.mark.parametrize("val", [0.01, 0.99])
def test_val_takes_from_the_pool_if_there_is_nothing_else(names, val, tmp_path):
    src = write_folder(tmp_path / "src", {name: encoded(i) for i, name in enumerate(names)})
    folders = make_shards(src, tmp_path / "out", val=val, num_workers=1)
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
    {"split": None},
    {"samples_per_shard": 0},
    {"seed": -1},
    {"resize": 0},
    {"quality": 0},
    {"num_workers": 0},
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


def test_sources_that_overlap(source, tmp_path):
    write_folder(tmp_path / "src", {"deep/er/a.jpg": encoded(0), "x.tar": tar_bytes({"b.jpg": encoded(1)})})
    os.symlink(tmp_path / "src" / "deep", tmp_path / "link")
    for inner in ("src/deep", "src/deep/er", "src/x.tar", "link"):
        for sources in ([tmp_path / "src", tmp_path / inner], [tmp_path / inner, tmp_path / "src"]):
            with pytest.raises(UserError, match=r"lies inside src=.*; its images would count twice"):
                make(sources, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="twice"):
        make([tmp_path / "link", tmp_path / "src/deep"], tmp_path / "out")


def test_sources_of_one_name_get_distinct_keys(tmp_path):
    for number, place in enumerate(("a/photos", "b/photos", "c/d/photos", "other")):
        write_folder(tmp_path / place, {"ant/x.jpg": encoded(number)})
    places = [tmp_path / place for place in ("a/photos", "b/photos", "c/d/photos", "other")]
    folder = make(places, tmp_path / "out")
    keys = {"a/photos/ant/x.jpg", "b/photos/ant/x.jpg", "d/photos/ant/x.jpg", "other/ant/x.jpg"}
    assert {s["about"]["source"] for s in read_back(folder)} == keys
    assert read_manifest(folder)["source"] == "a/photos, b/photos, d/photos, other"
    assert read_manifest(folder)["classes"] == ["ant"]


def test_each_of_several_tars_is_a_class(tmp_path):
    """As in a folder of these tars."""
    tars = write_folder(tmp_path / "tars", class_tars())
    listed = [tars / f"{name}.tar" for name in CLASSES[:2]]
    folder = make(listed, tmp_path / "out")
    assert read_manifest(folder)["classes"] == list(CLASSES[:2])
    assert {s["about"]["source"] for s in read_back(folder)} == {
        f"{c}.tar/{c}_{i}.jpg" for c in CLASSES[:2] for i in range(6)
    }
    (tmp_path / "again").mkdir()
    os.rename(tars / "bee.tar", tmp_path / "again/ant.tar")
    folder = make([tars / "ant.tar", tmp_path / "again/ant.tar"], tmp_path / "same")
    assert read_manifest(folder)["class_counts"] == [12]
    assert {s["about"]["source"].split("/")[0] for s in read_back(folder)} == {"tars", "again"}


def test_refuses_a_folder_above_images_and_label_maps(tmp_path):
    """ADE20K's layout, one folder too high: the label maps are no photos."""
    files = {f"above/ADE/images/{p}/{i}.jpg": encoded(i) for p in ("training", "validation") for i in range(2)}
    write_folder(tmp_path, files | {"above/ADE/annotations/training/0.png": encoded(0, kind="PNG", mode="L")})
    write_folder(tmp_path, {"parts/train/images/0.jpg": encoded(0), "parts/val/images/0.jpg": encoded(0)})
    write_folder(tmp_path, {"parts/train/annotations/0.png": encoded(0, kind="PNG", mode="L")})
    for src, inner in (("above", "above/ADE"), ("parts", "parts/train"), ("", "above/ADE")):
        said = rf"{inner}/annotations holds label maps, no photos; give {tmp_path / inner}, or for the photos alone"
        with pytest.raises(UserError, match=said):
            make(tmp_path / src, tmp_path.parent / "refused")
    photos = make(tmp_path / "above/ADE/images/training", tmp_path / "photos")
    assert read_manifest(photos)["samples"] == 2
    write_folder(tmp_path, {"boxes/set/images/0.jpg": encoded(0), "boxes/set/annotations/0.xml": b"<x/>"})
    assert read_manifest(make(tmp_path / "boxes", tmp_path / "out"))["samples"] == 1


@pytest.mark.timeout(20)
def test_refuses_pipes(tmp_path):
    for name in ("pipe", "pipe.tar", "cifar-100-python.tar.gz"):
        os.mkfifo(tmp_path / name)
        for sources in (tmp_path / name, [tmp_path / name]):
            with pytest.raises(UserError, match="is a pipe or a device; give a folder"):
                make(sources, tmp_path / "out")
        with pytest.raises(UserError, match="is a pipe or a device; give an image"):
            list_images(tmp_path / name)
    images = write_folder(tmp_path / "src", {"a.jpg": encoded(0)})
    with pytest.raises(UserError, match="pipe: it is a pipe or a device"):
        make(images, tmp_path / "out", labels=tmp_path / "pipe")


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
def test_a_failed_run_publishes_nothing_and_can_be_resumed(failure, source, tmp_path, monkeypatch):
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


BACK = {turn: TURNS[{6: 8, 8: 6}.get(turn, turn)] for turn in TURNS}  # from upright to stored


def annotated(orientation: int, size: tuple[int, int], kind: str = "JPEG", map_is_upright: bool = True) -> dict:
    """A photo stored in an EXIF orientation, its label map: the top half of the upright photo is red and class 1."""
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[: size[1] // 2] = 250, 10, 10
    ids = np.full(size[::-1], 2, np.uint8)
    ids[: size[1] // 2] = 1
    photo, label_map, exif, buffer = Image.fromarray(pixels), Image.fromarray(ids), Image.Exif(), io.BytesIO()
    exif[274] = orientation
    if orientation > 1:
        photo = photo.transpose(BACK[orientation])
        label_map = label_map if map_is_upright else label_map.transpose(BACK[orientation])
    photo.save(buffer, kind, exif=exif, quality=95)
    drawn = io.BytesIO()
    label_map.save(drawn, "PNG")
    return {"photo": buffer.getvalue(), "map": drawn.getvalue()}


@pytest.mark.parametrize("resize", [None, 24])
def test_photos_agree_with_their_label_maps(resize, tmp_path):
    """All orientations; maps of the upright photo and, where only that fits, of the stored one."""
    made = {f"{o}_{w}": annotated(o, (w, 40)) for o in range(1, 9) for w in (40, 48)}
    made |= {f"stored_{o}": annotated(o, (48, 40), map_is_upright=False) for o in (5, 6, 7, 8)}
    made |= {"png": annotated(6, (48, 40), "PNG"), "webp": annotated(3, (48, 40), "WEBP")}
    kinds = {"png": "png", "webp": "webp"}
    files = {f"images/{name}.{kinds.get(name, 'jpg')}": both["photo"] for name, both in made.items()}
    files |= {f"annotations/{name}.png": both["map"] for name, both in made.items()}
    folder = make(write_folder(tmp_path / "src", files), tmp_path / "out", resize=resize)
    samples = read_back(folder)
    assert len(samples) == len(made)
    view = SegmentationEvalTransform(24, 2)
    for sample in samples:
        name = Path(sample["about"]["source"]).stem
        data = next(sample[kind] for kind in ("jpg", "png", "webp") if kind in sample)
        with open_image(data) as image, open_image(sample["seg.png"]) as label_map:
            turned = sample["about"].get("turned", 1)
            assert turned == (
                1 if name.startswith(("1", "stored")) else {"png": 6, "webp": 3}.get(name) or int(name[0])
            )
            assert image.getexif().get(274, 1) == 1 or name.startswith("stored")
            red, top = np.asarray(to_rgb(image))[..., 0] > 120, label_ids(label_map) == 1
            assert (red == top).mean() > 0.95, name
            seen = view(image, None, label_map)
        assert seen["target"].shape == image.size[::-1] or name.startswith("stored")
        if turned == 1 and resize is None:
            assert data in [both["photo"] for both in made.values()]


def test_readers_turn_photos_of_other_shards_too():
    for orientation in TURNS:
        both = annotated(orientation, (48, 40))
        with open_image(both["photo"]) as photo, open_image(both["map"]) as label_map:
            seen = SegmentationEvalTransform(40, 2)(photo, None, label_map)
        assert ((seen["scale_0"][0] > 120) == (seen["target"] == 0)).mean() > 0.95
    both = annotated(6, (48, 30))
    other = Image.new("L", (31, 48))
    with open_image(both["photo"]) as photo, pytest.raises(ValueError, match="31 x 48 pixels, not 30 x 48"):
        SegmentationEvalTransform(40, 2)(photo, None, other)


@pytest.mark.parametrize("resize", [None, 16])
def test_label_maps_keep_their_ids(resize, tmp_path):
    """PNGs of 1, 2, 4, 8 and 16 bits, with a palette or without, and TIFFs."""
    ids = np.kron(np.arange(8 * 10).reshape(8, 10), np.ones((4, 4), int))
    maps = {f"grey{bits}.png": (png_of(ids % 2**bits, bits), ids % 2**bits) for bits in (1, 2, 4, 8, 16)}
    maps |= {f"palette{bits}.png": (png_of(ids % 2**bits, bits, 3), ids % 2**bits) for bits in (1, 2, 4, 8)}
    few = (ids % 4).astype(np.uint8)
    maps |= {f"tiff{bits}.tif": (tiff(page(few, bits=bits)), few) for bits in (2, 4, 8)}
    maps["white.tif"] = tiff(page(few, 0)), few
    maps["signed.tif"] = tiff(page((ids * 100).astype(np.int32))), ids * 100
    holes = np.where(ids == 7, -9999, ids)
    maps["nodata.tif"] = tiff(page(holes.astype(np.int16), t42113=(2, b"-9999\0"))), np.where(ids == 7, 255, ids)
    files = {f"annotations/{name}": data for name, (data, _) in maps.items()}
    files |= {f"images/{Path(name).stem}.png": encoded(0, (40, 32), "PNG") for name in maps}
    files |= {f"annotations/{Path(name).stem}.png": files.pop(f"annotations/{name}") for name in maps}
    folder = make(write_folder(tmp_path / "src", files), tmp_path / "out", resize=resize)
    samples = {Path(sample["about"]["source"]).stem: sample for sample in read_back(folder)}
    assert rejected(folder) == {}
    for name, (_, expected) in maps.items():
        with open_image(samples[Path(name).stem]["seg.png"]) as label_map:
            found = label_ids(label_map)
        wanted = expected if resize is None else expected[1::2, 1::2]
        np.testing.assert_array_equal(found, wanted, err_msg=name)


def test_label_maps_of_other_numbers_are_refused(tmp_path):
    below, beyond = np.full((8, 8), -1, np.int16), np.full((8, 8), 70000, np.int32)
    maps = {"below": tiff(page(below)), "beyond": tiff(page(beyond)), "colours": encoded(0, (8, 8), "PNG")}
    maps["fine"] = png_of(np.zeros((8, 8), int), 1)
    files = {f"annotations/{name}.png": data for name, data in maps.items()}
    files |= {f"images/{name}.png": encoded(1, (8, 8), "PNG") for name in maps}
    reasons = rejected(make(write_folder(tmp_path / "src", files), tmp_path / "out"))
    assert {Path(key).stem: reason.partition("label map ")[2] for key, reason in reasons.items()} == {
        "below": "has ids from -1 to -1, not from 0 to 65535",
        "beyond": "has ids from 70000 to 70000, not from 0 to 65535",
        "colours": "is of mode RGB, not one number per pixel",
    }


@pytest.mark.parametrize("resize", [None, 20])
def test_samples_say_what_of_a_tiff_is_not_read(resize, tmp_path):
    holes = (RAMP * 3).astype(np.float32)
    holes[:5, :9] = -9999
    five = np.rint(np.stack([RAMP] * 5, axis=2) * 65535).astype(np.uint16)
    files = {
        "pages.tif": tiff(THUMBNAIL, WHOLE),
        "deep_page.tif": tiff(THUMBNAIL, DEEP),
        "camera.nef": tiff(THUMBNAIL, SENSOR),
        "satellite.tif": tiff(page(five, 1, t338=(3, [0] * 4))),
        "five.tif": tiff(page(five, 2, planar=2, t338=(3, [0, 0]))),
        "heights.tif": tiff(page(holes, t42113=(2, b"-9999\0"))),
        "film.tif": tiff(page(np.rint(RAMP * 4095).astype(np.uint16), 0)),
    }
    folder = make(write_folder(tmp_path / "src", files), tmp_path / "out", resize=resize)
    about = {s["about"]["source"]: s["about"] for s in read_back(folder)}
    assert sorted(rejected(folder)) == ["camera.nef", "satellite.tif"]
    assert about["pages.tif"]["page"] == about["deep_page.tif"]["page"] == 2
    assert (about["five.tif"]["bits"], about["five.tif"]["bands_left_out"]) == (16, 2)
    assert about["heights.tif"]["nodata"] == [-9999]
    assert about["heights.tif"]["window"][0] > 0
    assert about["film.tif"]["window"][0] > about["film.tif"]["window"][1]
    assert np.asarray(pictures(folder)["film.tif"])[0, 0] > 250
    stored = {s["about"]["source"]: s for s in read_back(folder)}["pages.tif"]
    with open_image(stored["tiff" if resize is None else "jpg"]) as image:
        assert image.size == ((40, 30) if resize is None else (27, 20))


def test_predictions_see_the_pixels_of_shards(tmp_path):
    """What readers see of a file is what they see of the sample made of it."""
    white, two = np.rint(RAMP * 60000).astype(np.uint16), np.rint(RAMP * 2**31).astype(np.uint32)
    five = np.rint(np.stack([RAMP] * 5, axis=2) * 65535).astype(np.uint16)
    files = {"white.tif": tiff(page(white, 0)), "unsigned.tif": tiff(page(two)), "pages.tif": tiff(THUMBNAIL, WHOLE)}
    files |= {"five.tif": tiff(page(five, 2, t338=(3, [0, 2])))}
    files |= {"deep.png": png_of(np.stack([white, white[::-1]], axis=2).astype(int), 16, 4)}
    folder = make(write_folder(tmp_path / "src", files), tmp_path / "out")
    for sample in read_back(folder):
        stored = next(sample[kind] for kind in ("png", "tiff") if kind in sample)
        with open_image(stored) as made, open_image(files[sample["about"]["source"]]) as file:
            np.testing.assert_array_equal(to_channels(made, 4), to_channels(file, 4))
