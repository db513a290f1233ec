"""Sources of predictions (files, folders, tars, shards), JSON lines, the list of bad files, and the Python call."""

from __future__ import annotations

import csv
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_image_io import encoded
from test_sources import tar_bytes, write_folder
from tiny import seeded, write_checkpoint

from beit_pretrain import Predictor
from beit_pretrain.data.order import Sample
from beit_pretrain.data.reader import ShardReader
from beit_pretrain.data.write.index_existing import index_shards
from beit_pretrain.errors import UserError
from beit_pretrain.inference.image_stream import source_of
from beit_pretrain.inference.label_maps import free_name
from beit_pretrain.inference.settings import SlidingWindow
from beit_pretrain.inference.sliding_window import label_maps
from beit_pretrain.models.backbone import Classifier
from beit_pretrain.transforms.jitter import HALF

SIZE = {"image_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
ABOUT = {"mean": list(HALF), "std": list(HALF), "classes": ["boats", "cats", "dogs"]}
ODD = Path(os.environ.get("ODD_IMAGES", Path(__file__).parents[2] / "shared/data/odd-images"))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    path = tmp_path_factory.mktemp("classifier") / "last.ckpt"
    return write_checkpoint(path, "classifier", seeded(Classifier, 3, **SIZE), **ABOUT)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_json_lines_equal_csv(classifier, photos, run_cli, tmp_path):
    for name in ("p.csv", "p.jsonl"):
        code, _, stderr = run_cli("predict", f"init_from={classifier}", f"src={photos}", f"out={name}", "top=2")
        assert code == 0, stderr
    with (tmp_path / "p.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    flat = [
        {"file": line["file"], "rank": str(rank), "class": best["class"], "index": str(best["index"]),
         "probability": f"{best['probability']:.6f}"}
        for line in lines(tmp_path / "p.jsonl") for rank, best in enumerate(line["top"], 1)
    ]  # fmt: skip
    assert flat == rows
    assert {ABOUT["classes"][int(row["index"])] == row["class"] for row in rows} == {True}


@pytest.mark.parametrize("names", [["ant", "", "ant"], ["", "", ""]])
def test_empty_and_repeated_class_names_can_be_read(names, photos, run_cli, tmp_path):
    path = tmp_path / "last.ckpt"
    write_checkpoint(path, "classifier", seeded(Classifier, 3, **SIZE), **ABOUT | {"classes": names})
    code, _, stderr = run_cli("predict", f"init_from={path}", f"src={photos}", "out=p.jsonl", "top=3")
    assert code == 0, stderr
    assert all([names[best["index"]] for best in line["top"]] == [best["class"] for best in line["top"]]
               for line in lines(tmp_path / "p.jsonl"))  # fmt: skip


def test_a_tar_and_files_are_sources_too(classifier, photos, run_cli, tmp_path):
    with tarfile.open(tmp_path / "cats.tar", "w") as tar:
        for path in sorted((photos / "cats").iterdir()):
            tar.add(path, path.name)
    files = sorted((photos / "cats").iterdir())[:2]
    found = {}
    for name, src in {"tar": tmp_path / "cats.tar", "files": f"[{files[0]},{files[1]}]"}.items():
        code, _, stderr = run_cli("predict", f"init_from={classifier}", f"src={src}", f"out={name}.jsonl")
        assert code == 0, stderr
        found[name] = {line["file"]: line["top"] for line in lines(tmp_path / f"{name}.jsonl")}
    assert len(found["tar"]) == 6
    assert found["files"].keys() == {path.name for path in files}
    assert all(found["tar"][name] == top for name, top in found["files"].items())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_shards_are_a_source(num_workers, shards, classifier, run_cli, tmp_path):
    words = ["predict", f"init_from={classifier}", f"src={shards / 'val'}", "out=p.jsonl", "batch_size=5"]
    code, stdout, stderr = run_cli(*words, f"num_workers={num_workers}")
    assert code == 0, stderr
    assert "10 images" in stdout
    reader, predictor = ShardReader(shards / "val"), Predictor(classifier)
    for number, line in enumerate(lines(tmp_path / "p.jsonl")):
        assert line["file"] == f"shard-000000/{reader.key(Sample(0, number))}"
        (tmp_path / "one.png").write_bytes(reader.read(Sample(0, number)).data)
        with Image.open(tmp_path / "one.png") as image:
            assert predictor(image)[0].probability == pytest.approx(line["top"][0]["probability"], abs=2e-6)


@pytest.mark.parametrize(
    ("sources", "names"),
    [
        (["a/cats.tar", "a/dogs.tar"], ["cats.tar/1.jpg", "dogs.tar/1.jpg"]),
        (["x/1.jpg", "y/1.jpg"], ["x/1.jpg", "y/1.jpg"]),
        (["x", "deep/x"], ["top/x/1.jpg", "deep/x/1.jpg"]),
        (["a/cats.tar", "x"], ["cats.tar/1.jpg", "x/1.jpg"]),
        (["a/cats.tar", "b/cats.tar"], ["a/cats.tar/1.jpg", "b/cats.tar/1.jpg"]),
        (["mine", "more"], ["mine/x.1/one.2", "mine/x.1/one.3", "more/x.1/one.2", "more/x.1/one.3"]),
    ],
)
def test_images_of_several_sources_have_names_of_their_own(sources, names, tmp_path):
    one = tar_bytes({"1.jpg": encoded(0)})
    top = write_folder(tmp_path / "top", {f"{n}.tar": one for n in ("a/cats", "a/dogs", "b/cats")})
    write_folder(top, {f"{folder}/1.jpg": encoded(0) for folder in ("x", "y", "deep/x")})
    for folder in ("mine", "more"):
        dotted = tar_bytes({"one.2.jpg": encoded(0), "one.3.jpg": encoded(1)})
        index_shards(write_folder(top / folder, {"x.1.tar": dotted}), num_workers=1)
    source = source_of([str(top / name) for name in sources])
    assert [source[number][0] for number in range(len(source))] == names


def test_label_maps_of_long_and_dotted_names():
    taken = set[Path]()
    long = [f"{'x' * 300}{n}.jpg" for n in (1, 2)]
    first, second = (free_name(name, taken) for name in long)
    assert first.stem[:200] == second.stem[:200] == "x" * 200
    assert first != second
    assert free_name(long[1], set()) == second  # whatever else there is
    assert [str(free_name(name, taken)) for name in ("v1.0/scan.001", "v1.0/scan.002")] == [
        "v1.0/scan.001.png",
        "v1.0/scan.002.png",
    ]


def test_predict_lists_what_it_leaves_out(classifier, run_cli, tmp_path):
    files = {"images/1.jpg": encoded(0), "masks/1.png": encoded(1), "images/._1.jpg": b"x", "more.zip": b"x"}
    write_folder(tmp_path / "src", files)
    code, stdout, stderr = run_cli("predict", f"init_from={classifier}", "src=src", "out=p.jsonl")
    assert code == 0, stderr
    assert [line["file"] for line in lines(tmp_path / "p.jsonl")] == ["images/1.jpg"]
    listed = {line["key"] for line in lines(tmp_path / "p.left_out.jsonl")}
    assert listed == {"images/._1.jpg", "masks/", "more.zip"}
    assert "warning: left out masks/: a label map" in stderr
    assert "warning: left out more.zip: an archive" in stderr
    assert "1 (a by-product" in stdout


def test_refuses_shards_mixed_with_files(shards, classifier, photos, run_cli):
    code, _, stderr = run_cli("predict", f"init_from={classifier}", f"src=[{shards / 'val'},{photos}]", "out=p.csv")
    assert code == 2
    assert "mixes shard folders with files" in stderr


def test_every_bad_file_is_listed(classifier, run_cli, tmp_path):
    (tmp_path / "src").mkdir()
    Image.new("RGB", (40, 40), "red").save(tmp_path / "src/good.png")
    for i in range(25):
        (tmp_path / f"src/bad{i:02d}.jpg").write_text("no image")
    words = ["predict", f"init_from={classifier}", f"src={tmp_path / 'src'}", "out=p.csv"]
    code, stdout, _ = run_cli(*words)
    assert code == 0
    assert "25 could not be read (all in p.bad.jsonl)" in stdout
    assert stdout.count("not an image") == 20
    bad = lines(tmp_path / "p.bad.jsonl")
    assert len(bad) == 25
    assert bad[0] == {"file": "bad00.jpg", "reason": "not an image in a known format"}
    for path in (tmp_path / "src").glob("bad*"):
        path.unlink()
    assert run_cli(*words)[0] == 0
    assert not (tmp_path / "p.bad.jsonl").exists()  # it would tell of another prediction


@pytest.mark.skipif(not ODD.is_dir(), reason="ODD_IMAGES names no folder of odd images")
@pytest.mark.parametrize("kind", ["classifier", pytest.param("segmenter", marks=pytest.mark.long)])
def test_odd_images(kind, classifier, segmenter_checkpoint, run_cli, tmp_path):
    """Every file is predicted or listed with its reason, and the prediction ends."""
    checkpoint, out = (classifier, "p.jsonl") if kind == "classifier" else (segmenter_checkpoint, "maps")
    code, _, stderr = run_cli("predict", f"init_from={checkpoint}", f"src={ODD}", f"out={out}", "num_workers=0")
    assert code == 0, stderr
    names = {path.name for path in ODD.iterdir()} - {"manifest.tsv"}
    if kind == "classifier":
        predicted = {line["file"] for line in lines(tmp_path / "p.jsonl")}
        bad = lines(tmp_path / "p.bad.jsonl")
        assert predicted | {line["file"] for line in bad} == names
    else:
        predicted = {path.name for path in (tmp_path / "maps/labels").iterdir()}
        bad = lines(tmp_path / "maps/bad.jsonl")
    assert len(predicted) + len(bad) == len(names)
    assert all(line["reason"] for line in bad)
    assert len(predicted) >= 60


def test_a_classifier_of_one_image_and_of_a_list(classifier):
    predictor = Predictor(classifier)
    images = [Image.new(mode, size, 90) for mode, size in (("RGB", (50, 30)), ("L", (9, 200)), ("I;16", (40, 40)))]
    one = predictor(images[0], top=2)
    assert [len(one), one[0].name in ABOUT["classes"], predictor.classes] == [2, True, ABOUT["classes"]]
    many = predictor(images * 4, batch_size=5)
    assert len(many) == 12
    assert [p.probability for p in many[0][:2]] == pytest.approx([p.probability for p in one], abs=1e-5)
    assert all(sum(p.probability for p in found) == pytest.approx(1, abs=1e-5) for found in many)


def test_predictors_take_pil_images(classifier):
    predictor = Predictor(classifier)
    for wrong in ("photo.jpg", [torch.zeros(3, 8, 8)]):
        with pytest.raises(TypeError, match="a PIL image is needed, not a"):
            predictor(wrong)
    with pytest.raises(ValueError, match="top must be at least 1, got 0"):
        predictor(Image.new("RGB", (9, 9)), top=0)


def test_a_predictor_does_not_change_the_images(classifier, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)).save(tmp_path / "photo.jpg")
    predictor = Predictor(classifier)
    with Image.open(tmp_path / "photo.jpg") as image:
        first, second = predictor(image), predictor([image, image])
        assert image.size == (400, 300)
        assert second == [first, first]
        assert np.asarray(image).shape == (300, 400, 3)


def test_a_segmenter_answers_at_the_size_of_the_image(segmenter_checkpoint):
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)) for h, w in ((30, 50), (64, 33), (20, 90))]
    predictor = Predictor(segmenter_checkpoint, SlidingWindow(flip=True))
    many = predictor(images, batch_size=2)
    assert [found.shape for found in many] == [(30, 50), (64, 33), (20, 90)]
    for image, found in zip(images, many, strict=True):
        assert (predictor(image) == found).mean() > 0.999  # windows in other batches: rounding
    assert predictor(images[0], sizes=[(10, 12)]).shape == (10, 12)
    assert predictor.overlay(images[0], many[0]).size == images[0].size


def test_predictors_need_a_classifier_or_a_segmenter(mim_checkpoint, photos, run_cli):
    code, _, stderr = run_cli("predict", f"init_from={mim_checkpoint}", f"src={photos}")
    assert (code, stderr.count("\n")) == (2, 1)
    assert "holds a mim; a classifier or a segmentation model is needed" in stderr
    with pytest.raises(UserError, match="a classifier or a segmentation model is needed"):
        Predictor(mim_checkpoint)


def test_label_maps_equal_transformers_post_processing():
    from transformers import BeitImageProcessor
    from transformers.models.beit.modeling_beit import SemanticSegmenterOutput

    logits, sizes = torch.randn(3, 7, 16, 16), [(33, 50), (16, 16), (100, 20)]
    expected = BeitImageProcessor().post_process_semantic_segmentation(SemanticSegmenterOutput(logits=logits), sizes)
    for mine, theirs in zip(label_maps(logits, sizes), expected, strict=True):
        assert torch.equal(mine, theirs)
    plain = BeitImageProcessor().post_process_semantic_segmentation(SemanticSegmenterOutput(logits=logits))
    assert all(torch.equal(a, b) for a, b in zip(label_maps(logits), plain, strict=True))
    with pytest.raises(ValueError, match="2 sizes for 3 images"):
        label_maps(logits, sizes[:2])
