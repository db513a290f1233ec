"""predict, validate, show: their output, and how they treat bad files."""

from __future__ import annotations

import csv

import pytest
from PIL import Image
from tiny import SIZE, fit_words, seeded, write_checkpoint

from beit_pretrain.inference import image_stream as images
from beit_pretrain.models.backbone import Classifier
from beit_pretrain.transforms.jitter import HALF


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """An untrained classifier of the photos' three classes."""
    model = seeded(Classifier, 3, **SIZE)
    about = {"mean": list(HALF), "std": list(HALF), "classes": ["boats", "cats", "dogs"]}
    return write_checkpoint(tmp_path_factory.mktemp("classifier") / "last.ckpt", "classifier", model, **about)


def rows(path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_predict_lists_every_image_and_its_top_classes(classifier, photos, run_cli, tmp_path):
    code, stdout, stderr = run_cli("predict", f"init_from={classifier}", f"src={photos}", f"out={tmp_path / 'p.csv'}")
    assert code == 0, stderr
    table = rows(tmp_path / "p.csv")
    assert len(table) == 18 * 3
    assert len({row["file"] for row in table}) == 18
    assert {row["class"] for row in table} == {"boats", "cats", "dogs"}
    for name in {row["file"] for row in table}:
        chances = [float(row["probability"]) for row in table if row["file"] == name]
        assert sum(chances) == pytest.approx(1, abs=1e-4)
        assert chances == sorted(chances, reverse=True)


def test_predict_skips_unreadable_files(classifier, run_cli, tmp_path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    Image.new("RGB", (40, 40), "red").save(folder / "good, with a comma.png")
    (folder / "text.jpg").write_text("no image")
    (folder / "cut.png").write_bytes((folder / "good, with a comma.png").read_bytes()[:60])
    code, stdout, _ = run_cli("predict", f"init_from={classifier}", f"src={folder}", "out=p.csv", "top=1")
    assert code == 0
    assert "1 images, 2 could not be read" in stdout
    assert "text.jpg" in stdout
    assert [row["file"] for row in rows(tmp_path / "p.csv")] == ["good, with a comma.png"]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("src=nowhere", "nowhere"),
        ("src={empty}", "holds no image"),
        ("top=0", "top must be"),
        ("src={text}", "could be read"),
    ],
)
def test_predict_errors(word, said, classifier, photos, refused, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.jpg").write_text("no image")
    given = word.format(empty=tmp_path / "empty", text=tmp_path / "text.jpg")
    assert said in refused("predict", f"init_from={classifier}", f"src={photos}", "out=p.csv", given)
    assert not (tmp_path / "p.csv").exists()


def test_predict_single_file(classifier, photos, run_cli, tmp_path):
    file = next(photos.rglob("*.jpg"))
    assert run_cli("predict", f"init_from={classifier}", f"src={file}", "out=p.csv", "top=1")[0] == 0
    assert len(rows(tmp_path / "p.csv")) == 1


def test_validate_and_show_without_init_from_file(shards, dvae_checkpoint, mim_checkpoint, run_cli, tmp_path):
    backbone = tmp_path / "moved.ckpt"
    backbone.write_bytes(mim_checkpoint.read_bytes())
    words = [f"init_from={backbone}", "steps=1", "val_every=1", f"run_dir={tmp_path / 'run'}"]
    code, _, stderr = run_cli(*fit_words("finetune", shards, *words))
    assert code == 0, stderr
    backbone.unlink()
    code, stdout, stderr = run_cli("validate", f"run={tmp_path / 'run'}")
    assert code == 0, stderr
    assert "val/accuracy" in stdout
    assert "has no picture of masked" in run_cli("visualize", "masked", f"run={tmp_path / 'run'}")[2]


def test_shards_verify_and_show(shards, run_cli, tmp_path):
    assert "fine" in run_cli("shards", "verify", f"src={shards / 'val'}")[1]
    assert run_cli("shards", "show", f"src={shards / 'val'}", f"out={tmp_path / 'sheet.png'}")[0] == 0
    assert Image.open(tmp_path / "sheet.png").width > 100
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in (shards / "val").iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    tar = next(broken.glob("*.tar"))
    data = bytearray(tar.read_bytes())
    data[len(data) // 2] ^= 1
    tar.write_bytes(data)
    code, stdout, _ = run_cli("shards", "verify", f"src={broken}")
    assert code == 2
    assert tar.name in stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("shards verify src=[a,b]", "shards verify takes one source as src=, not a list"),
        ("shards show src=[a,b]", "shards show takes one source as src=, not a list"),
        ("shards index src=[a,b]", "a does not exist"),
        ("shards make src=a out=b split=null", "split must be a plain folder name, got null"),
        ("bench loader src=a image_size=null", "image_size must be a whole number of at least 1"),
    ],
)
def test_errors_are_one_line(words, said, refused):
    assert refused(*words.split()).startswith(f"error: {said}")


def test_predict_raises_out_of_memory(classifier, photos, run_cli, monkeypatch):
    def short(*args, **settings):
        raise MemoryError

    monkeypatch.setattr(images, "open_image", short)
    code, _, stderr = run_cli("predict", f"init_from={classifier}", f"src={photos}", "out=p.csv", "num_workers=0")
    assert code == 2
    assert stderr.splitlines()[-1].startswith("error: not enough memory to decode ")
