"""TensorBoard and several loggers: each step once after a crash, the numbers of metrics.csv, pictures, old settings."""

from __future__ import annotations

import math
from importlib import util
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import comparable, fit_words, refusal

from beit_pretrain.config import compose
from beit_pretrain.engine.settings import LoggerSettings
from beit_pretrain.engine.tensorboard_logger import check_installed
from beit_pretrain.settings import to_dict
from beit_pretrain.tables import read_rows


@pytest.fixture
def words(shards, dvae_checkpoint, tmp_path):
    more = [f"tokenizer.path={dvae_checkpoint}", f"run_dir={tmp_path / 'run'}", "logger=tensorboard", "steps=4"]
    return fit_words(
        "pretrain",
        shards,
        *more,
        "val_every=2",
        "save_every=2",
        "num_visualizations=1",
        "collapse=null",
        "dense_knn=null",
    )


def read(run: Path, part: str = "") -> EventAccumulator:
    board = EventAccumulator(str(run / "tensorboard" / part), {"images": 0, "scalars": 0})
    board.Reload()
    return board


def logged(run: Path) -> dict[int, dict[str, float]]:
    """Metrics by step, asserted to be logged once each."""
    rows: dict[int, dict[str, float]] = {}
    board = read(run)
    for tag in board.Tags()["scalars"]:
        for event in board.Scalars(tag):
            assert tag not in rows.setdefault(event.step, {}), (tag, event.step)
            rows[event.step][tag] = event.value
    return rows


def same_as_csv(run: Path) -> list[int]:
    """Assert that TensorBoard has exactly the rows of metrics.csv; returns the steps."""
    expected, found = read_rows(run / "metrics.csv")[1], logged(run)
    assert found.keys() == expected.keys()
    for step, row in expected.items():
        wanted = {name: value for name, value in comparable(row).items() if value != "nan"}
        given = {name: value for name, value in comparable(found[step]).items() if value != "nan"}
        assert given == pytest.approx(wanted, rel=1e-6)
    return sorted(found)


def test_each_step_once_after_a_crash(words, run_cli, crash, tmp_path):
    crash(3, *words)  # one step after the checkpoint; the validation of the checkpoint's step was logged
    assert same_as_csv(tmp_path / "run") == [1, 2, 3]
    assert run_cli(*words)[0] == 0
    assert same_as_csv(tmp_path / "run") == [1, 2, 3, 4]
    pictures = read(tmp_path / "run").Images("pictures/main")
    assert [event.step for event in pictures] == [2, 4]
    assert len(list((tmp_path / "run/tensorboard").iterdir())) == 2  # one file a start


@pytest.mark.long
def test_logger_that_joins_later_and_a_new_start(words, run_cli, crash, tmp_path):
    crash(3, *words, "logger=csv")
    assert not (tmp_path / "run/tensorboard").exists()
    assert run_cli(*words, "logger=[csv,tensorboard]")[0] == 0
    assert same_as_csv(tmp_path / "run") == [1, 2, 3, 4]
    code, _, stderr = run_cli("visualize", "masked", f"run={tmp_path / 'run'}", "images=1")
    assert code == 0, stderr
    assert read(tmp_path / "run", "visualize").Tags()["images"] == ["visualize/masked"]
    assert same_as_csv(tmp_path / "run") == [1, 2, 3, 4]
    assert run_cli(*words, "resume=never", "steps=1")[0] == 0
    assert same_as_csv(tmp_path / "run") == [1]


@pytest.mark.long
def test_together_with_wandb(words, run_cli, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    code, _, stderr = run_cli(*words, "steps=2", "logger=[wandb,tensorboard]", "logger.mode=offline")
    assert code == 0, stderr
    assert same_as_csv(tmp_path / "run") == [1, 2]
    assert len(list((tmp_path / "run/wandb").glob("offline-run-*"))) == 1


def test_missing_package(words, refused, tmp_path, monkeypatch):
    found = util.find_spec
    monkeypatch.setattr(
        "beit_pretrain.engine.tensorboard_logger.find_spec", lambda name: None if name == "tensorboard" else found(name)
    )
    expected = "logger=tensorboard needs a package: pip install 'beit_pretrain[tensorboard]'"
    assert refused(*words) == f"error: {expected}"
    assert refusal(check_installed) == expected
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], {"csv": True}),
        (["logger=csv"], {"csv": True}),
        (["logger.kind=csv"], {"csv": True}),
        (["logger=tensorboard"], {"tensorboard": {"flush_secs": 30}}),
        (["logger=wandb", "logger.mode=offline"], {"wandb": {"project": "beit_pretrain", "mode": "offline"}}),
        (["logger.kind=wandb", "logger.project=p"], {"wandb": {"project": "p", "mode": None}}),
        (
            ["logger=[csv,wandb,tensorboard]", "logger.wandb.mode=online", "logger.tensorboard.flush_secs=3"],
            {"csv": True, "wandb": {"project": "beit_pretrain", "mode": "online"}, "tensorboard": {"flush_secs": 3}},
        ),
    ],
)
def test_words_choose_loggers(words, expected):
    cfg = compose("fit", ["+experiment=demo_tokenizer", "data.train=x", *words])
    assert to_dict(cfg.logger) == expected
    assert LoggerSettings.validated(to_dict(cfg.logger)) == cfg.logger


@pytest.mark.parametrize(
    ("old", "expected"),
    [
        ({"kind": "csv"}, {}),
        ({"kind": "wandb", "project": "p", "mode": None}, {"wandb": {"project": "p", "mode": None}}),
        ({"kind": "wandb"}, {"wandb": {"project": "beit_pretrain", "mode": None}}),
    ],
)
def test_settings_of_earlier_runs(old, expected):
    assert to_dict(LoggerSettings.validated(old)) == expected


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        *((f"logger={value}", f"logger={value}: choose one of csv, tensorboard, wandb, or several: logger=[wandb,")
          for value in ("null", "[]", "paper", "[csv,paper]", "csv,wandb", "[[csv]]", "1", "{csv:true}")),
        ("logger.kind=paper", "logger=paper: choose one of"),
        ("logger.mode=offline", "logger.wandb.mode needs logger=wandb"),
        ("logger.tensorboard.flush_secs=1", "logger.tensorboard.flush_secs needs logger=tensorboard"),
        ("+logger.wandb.mode=paper", "logger.wandb.mode must be null or one of online"),
        ("+logger.csv=false", "logger.csv"),
    ],
)  # fmt: skip
def test_wrong_loggers(word, expected):
    assert expected in refusal(compose, "fit", ["+experiment=demo_tokenizer", "data.train=x", word])


def test_path_of_the_folder_is_read_as_it_is(shards, run_cli, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    words = fit_words("tokenizer", shards, "steps=1", "logger=tensorboard", "run_dir=a$HOME/~")
    assert run_cli(*words)[0] == 0
    assert math.isfinite(logged(tmp_path / "a$HOME/~")[1]["train/loss"])
