"""show: every picture of every kind of run, several runs in one, and what cannot be drawn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from test_finetune import finetune_words

from beit_pretrain.engine import visualize as show
from beit_pretrain.visualization import grids
from beit_pretrain.visualization.attention_maps import CELL, NOTE, attention_sheet, heat
from beit_pretrain.visualization.overlays import palette
from beit_pretrain.visualization.plots import bars_plot, curves_plot
from beit_pretrain.visualization.token_maps import token_map

TINY = (
    "image_size=32 patch_size=8 mask.max_patches=6 mask.min_block=1 global_batch_size=8 "
    "data.num_workers=0 num_visualizations=2 "
    "model.embed_dim=32 model.num_heads=2 model.depth=2 data.val_images=8 log_every=1 threads=1 steps=2 val_every=2"
).split()


@pytest.fixture(scope="module")
def run(shards, dvae_checkpoint, tmp_path_factory):
    """A finished pre-training."""
    from beit_pretrain.config import compose
    from beit_pretrain.engine.fit import fit

    folder = tmp_path_factory.mktemp("shown") / "pretrain"
    given = [f"data.train={shards / 'train'}", f"data.val={shards / 'val'}", f"tokenizer.path={dvae_checkpoint}"]
    fit(compose("fit", ["+experiment=demo_pretrain", *given, *TINY, f"run_dir={folder}"]))
    return folder


def test_a_run_draws_its_pictures_while_it_trains(run):
    names = {path.name for path in (run / "pictures").glob("step-*")}
    assert names == {"step-000002.png", "step-000002-attention.png", "step-000002-tokens.png"}


def test_draws_all_pictures_of_a_run(run, run_cli):
    code, stdout, stderr = run_cli("visualize", f"run={run}", "images=3")
    assert code == 0, stderr
    for name in ("masked", "attention", "tokens", "curves"):
        assert f"{name}.png" in stdout
        with Image.open(run / "pictures" / f"{name}.png") as picture:
            assert min(picture.size) > 100
            assert len(np.unique(np.asarray(picture))) > 20


def test_chosen_patches_layers_heads_and_photos(run, photos, run_cli, tmp_path):
    words = [
        "visualize",
        "attention",
        f"run={run}",
        f"photos={photos / 'cats'}",
        "images=1",
        f"out={tmp_path / 'a.png'}",
    ]
    code, _, stderr = run_cli(*words, "layers=[2]", "heads=[1]", "patches=[[0,0],[3,1]]")
    assert code == 0, stderr
    with Image.open(tmp_path / "a.png") as picture:  # two patches x one layer; image, mean, one head
        assert abs(picture.width - (64 + 3 * (CELL + 4))) < 10
        words = grids.note(NOTE, picture.width).height
        assert words > 16
        assert abs(picture.height - (16 + 2 * (CELL + 4)) - words) < 10


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["attention", "layers=[3]"], "3 is outside 1 to 2"),
        (["attention", "heads=[5]"], "5 is outside 1 to 2"),
        (["attention", "patches=[[4,0]]"], "[4, 0] is outside the 4 x 4 patches"),
        (["attention", "patches=[4]"], "patches must be"),
        (["attention", "photos=nowhere"], "nowhere does not exist"),
        (["faces"], "what must be null or one of masked"),
        (["layers"], "is a mim; it has no picture of layers"),
        (["curves", "metrics=[val/nothing]"], "none of val/nothing is in the metrics"),
        (["out=x.csv"], "must end with .png"),
        (["split=test"], "split=test: the run has train, val"),
        (["masked", "runs=[a]"], "a is not the folder of a run"),
    ],
)
def test_reports_pictures_that_cannot_be_drawn(words, said, run, run_cli):
    code, _, stderr = run_cli("visualize", *words, f"run={run}")
    assert code == 2
    assert said in stderr
    assert stderr.count("\n") == 1


def test_a_run_must_be_named(run_cli):
    code, _, stderr = run_cli("visualize", "curves")
    assert code == 2
    assert "run is missing" in stderr


def test_curves_of_several_runs_in_one_picture(run, shards, run_cli, tmp_path):
    assert run_cli(*finetune_words(shards, tmp_path / "tuned", "steps=2"))[0] == 0
    code, stdout, stderr = run_cli("visualize", "curves", f"runs=[{run},{tmp_path / 'tuned'}]", "out=both.png")
    assert code == 0, stderr
    assert "wrote both.png" in stdout
    code, _, stderr = run_cli("visualize", f"run={tmp_path / 'tuned'}")
    assert code == 0, stderr
    assert (tmp_path / "tuned/pictures/attention.png").is_file()
    assert not (tmp_path / "tuned/pictures/masked.png").exists()


def test_each_run_has_a_colour_and_a_name(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    for name, start in (("a", 3.0), ("b", 2.0)):
        (tmp_path / f"{name}.csv").write_text(f"step,train/loss,val/loss\n1,{start},\n2,{start - 1},{start - 0.5}\n")
    drawn = []
    plot = Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, *args, **kw: drawn.append((args, kw)) or plot(self, *args, **kw))
    curves_plot({name: tmp_path / f"{name}.csv" for name in "ab"}, tmp_path / "both.png")
    assert [(args[1], kw["color"], kw["linestyle"]) for args, kw in drawn] == [
        ([3.0, 2.0], "C0", "-"),
        ([2.5], "C0", "--"),
        ([2.0, 1.0], "C1", "-"),
        ([1.5], "C1", "--"),
    ]
    assert [kw["label"] for _, kw in drawn] == ["a: loss", None, "b: loss", None]
    bars_plot({"a": [0.1, 0.2], "b": [0.3]}, 0.01, tmp_path / "bars.png", "title")
    assert (tmp_path / "bars.png").stat().st_size > 1000


def test_curves_of_one_label_are_of_one_measure(tmp_path, monkeypatch):
    """A tokenizer's error is drawn for both; a segmenter has pixels of training and mIoU, so both are named."""
    from matplotlib.axes import Axes

    columns = {
        "tokenizer": "train/loss,train/reconstruction,val/reconstruction",
        "segmenter": "train/loss,train/accuracy,val/miou",
        "trains": "train/loss,train/reconstruction,train/accuracy",
    }
    for name, metrics in columns.items():
        (tmp_path / f"{name}.csv").write_text(f"step,{metrics}\n1,1,2,3\n")
    drawn = []
    plot = Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, *args, **kw: drawn.append((args, kw)) or plot(self, *args, **kw))
    curves_plot({name: tmp_path / f"{name}.csv" for name in columns}, tmp_path / "all.png")
    assert [(args[1], kw["label"], kw["linestyle"]) for args, kw in drawn] == [
        ([2.0], "tokenizer: reconstruction", "-"),
        ([3.0], None, "--"),
        ([1.0], "segmenter: loss", "-"),
        ([1.0], "trains: loss", "-"),
        ([2.0], "segmenter: accuracy", "-"),
        ([3.0], "segmenter: miou", "--"),
        ([3.0], "trains: accuracy", "-"),
    ]


def test_shows_the_pictures_that_a_run_has(shards, dvae_checkpoint, run_cli, tmp_path):
    """Without held-out images those of training; before the first checkpoint curves alone; before both a word."""
    given = [f"data.train={shards / 'train'}", f"tokenizer.path={dvae_checkpoint}", f"run_dir={tmp_path / 'run'}"]
    assert run_cli("fit", "+experiment=demo_pretrain", *TINY, *given, "data.val=null")[0] == 0
    pictures = [f"wrote {tmp_path}/run/pictures/{name}.png" for name in ("curves", "masked", "attention", "tokens")]
    code, stdout, stderr = run_cli("visualize", f"run={tmp_path / 'run'}", "images=2")
    assert code == 0, stderr
    assert stdout.splitlines() == pictures
    code, _, stderr = run_cli("visualize", "masked", f"run={tmp_path / 'run'}")
    assert (code, "split=val: the run has train" in stderr) == (2, True)
    (tmp_path / "run/checkpoints/last.ckpt").unlink()
    code, stdout, stderr = run_cli("visualize", f"run={tmp_path / 'run'}")
    assert code == 0, stderr
    assert stdout.splitlines() == pictures[:1]
    (tmp_path / "run/metrics.csv").unlink()
    code, _, stderr = run_cli("visualize", f"run={tmp_path / 'run'}")
    assert code == 2
    assert "neither metrics nor a checkpoint" in stderr


def test_a_token_map_shows_every_token_in_its_colour():
    ids = torch.tensor([0, 1, 2, 1])
    hidden = torch.tensor([False, False, False, True])
    picture = np.asarray(token_map(ids, 3, cell=100, hidden_N=hidden))
    corners = [picture[3, 3], picture[3, 97], picture[97, 3], picture[97, 97]]
    assert [c.tolist() for c in corners] == [*palette(3).tolist(), [128, 128, 128]]


def test_a_heat_map_is_brightest_where_the_patch_looks():
    map_N = torch.zeros(16)
    map_N[5] = 0.5
    picture = np.asarray(heat(map_N, (4, 4))).astype(int).sum(-1)
    row, column = np.unravel_index(picture[: CELL - 20].argmax(), picture[: CELL - 20].shape)
    assert (row * 4 // CELL, column * 4 // CELL) == (1, 1)
    maps = {2: torch.full((2, 17, 17), 1 / 17)}
    sheet = attention_sheet(torch.rand(3, 32, 32), maps, [(0, 0), (3, 3)], [1, 2], (4, 4))
    assert sheet.size == (64 + 4 * (CELL + grids.GAP) + grids.GAP, 16 + grids.GAP + 2 * (CELL + grids.GAP))


def test_pictures_go_into_the_runs_logger(run, run_cli, monkeypatch):
    handed = []
    monkeypatch.setattr(show, "log_pictures", lambda run, drawn: handed.extend(path.name for path in drawn))
    assert run_cli("visualize", "tokens", f"run={run}", "images=1")[0] == 0
    assert handed == ["tokens.png"]


@pytest.mark.long
def test_pictures_go_into_an_offline_run_of_wandb(shards, dvae_checkpoint, run_cli, tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    given = [f"data.train={shards / 'train'}", f"data.val={shards / 'val'}", f"tokenizer.path={dvae_checkpoint}"]
    words = ["fit", "+experiment=demo_pretrain", *given, *TINY, f"run_dir={tmp_path / 'run'}", "logger=wandb"]
    assert run_cli(*words)[0] == 0
    code, _, stderr = run_cli("visualize", "attention", f"run={tmp_path / 'run'}")
    assert code == 0, stderr
    kept = [path.name for path in (tmp_path / "run/wandb").rglob("*.png")]
    for picture in ("pictures/main", "pictures/attention", "pictures/tokens", "visualize/attention"):
        assert any(name.startswith(picture.split("/")[1]) for name in kept), (picture, kept)
