"""A small demo: all stages, the report, and the bounds that it is checked against."""

from __future__ import annotations

import json

import pytest
from tiny import Crash

from beit_pretrain.config import compose
from beit_pretrain.engine import fit as fit_module
from beit_pretrain.errors import UserError
from beit_pretrain.examples import demo as demo_module
from beit_pretrain.examples import report
from beit_pretrain.examples.demo import demo

BRIEF = (
    "images=60 val_images=20 labels_per_class=2 seeds=2 steps={tokenizer:3,pretrain:3,finetune:2} "
    "num_workers=0 threads=1"
).split()
KEYS = {
    "masked_token_accuracy",
    "majority_token_accuracy",
    "copy_token_accuracy",
    "codebook_perplexity",
    "vocab_size",
    "finetune_accuracy",
    "scratch_accuracy",
    "labelled_images",
    "seed",
    "seconds",
}


def run_demo(folder, *words) -> dict:
    return demo(compose("demo", [*BRIEF, f"run_dir='{folder}'", *words]))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("a demo, with=odd name") / "run"
    return folder, run_demo(folder)


def test_report_is_complete_and_self_contained(finished):
    folder, numbers = finished
    assert json.loads((folder / "report.json").read_text()) == numbers
    assert numbers.keys() >= KEYS
    assert numbers["labelled_images"] == 20
    assert len(numbers["finetune_accuracies"]) == 2
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert page.count("<svg") == 3
    assert "was not drawn" not in page
    assert 'src="http' not in page
    assert "href=" not in page.replace("xlink:href", "")


def test_finished_demo_reports_again(finished):
    folder, numbers = finished
    again = run_demo(folder)
    assert {k: v for k, v in again.items() if k not in TIMES} == {k: v for k, v in numbers.items() if k not in TIMES}


TIMES = ("seconds", "stage_starts_s", "source")


def stopped(folder, monkeypatch, at: int, how: type[BaseException], *words) -> None:
    """Run a demo that is stopped when its at-th stage begins: 0 = the shards, then the runs in turn."""
    calls = []

    def stop(function):
        def wrapped(*given, **settings):
            calls.append(function)
            if len(calls) > at:
                raise how
            return function(*given, **settings)

        return wrapped

    with monkeypatch.context() as patch:
        for name in ("make_shards", "fit"):
            patch.setattr(f"beit_pretrain.examples.demo.{name}", stop(getattr(demo_module, name)))
        with pytest.raises(how):
            run_demo(folder, *words)


@pytest.mark.long
def test_stopped_demo_goes_on(finished, tmp_path, monkeypatch, capsys):
    """Stopped at every stage, and within one: finished runs are kept; the numbers are those of a demo in one go."""
    run, fitted = tmp_path / "run", []
    train = fit_module.train
    monkeypatch.setattr(fit_module, "train", lambda task, *more: fitted.append(task.cfg.run_dir) or train(task, *more))
    for at, how in enumerate((KeyboardInterrupt, SystemExit, KeyboardInterrupt, SystemExit, KeyboardInterrupt)):
        stopped(run, monkeypatch, at, how)
        assert not (run / "report.json").exists()
    make = fit_module.make_trainer
    with monkeypatch.context() as patch:
        patch.setattr(fit_module, "make_trainer", lambda cfg, n, calls: make(cfg, n, [*calls, Crash(1)]))
        with pytest.raises(RuntimeError, match="power cut"):
            run_demo(run)
    numbers = run_demo(run, "threads=1", "num_workers=0")
    assert len(fitted) == len(set(fitted)) + 1 == 7  # six runs; the one that crashed twice
    expected = finished[1]
    assert {k: v for k, v in numbers.items() if k not in TIMES} == {k: v for k, v in expected.items() if k not in TIMES}
    assert list(numbers["stage_starts_s"]) == ["shards", "tokenizer", "pretrain", "finetune", "end"]
    assert numbers["seconds"] == pytest.approx(numbers["stage_starts_s"]["end"], abs=0.1)
    assert (run / "report.html").is_file()
    run_demo(run)
    assert len(fitted) == 7
    capsys.readouterr()


def test_other_settings_start_anew(tmp_path, monkeypatch):
    run = tmp_path / "run"
    stopped(run, monkeypatch, 1, KeyboardInterrupt)
    marker = run / "data/train/manifest.json"
    before = marker.stat().st_mtime_ns
    stopped(run, monkeypatch, 1, KeyboardInterrupt)
    assert marker.stat().st_mtime_ns == before
    stopped(run, monkeypatch, 1, KeyboardInterrupt, "seed=3")
    assert json.loads(marker.read_text())["seed"] == 3
    (run / "demo.yaml").write_text("[")
    (run / "stages.json").write_text("{")
    stopped(run, monkeypatch, 1, KeyboardInterrupt)
    assert json.loads(marker.read_text())["seed"] == 0


def test_photos_without_enough_labels_skip_fine_tuning(photos, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, path in enumerate(sorted(p for p in photos.rglob("*") if p.is_file())):
        (flat / f"{i}{path.suffix}").write_bytes(path.read_bytes())
    numbers = run_demo(tmp_path / "run", f"src='{flat}'")
    assert numbers["finetune_accuracy"] is None
    assert "nothing to fine-tune on" in numbers["finetune_note"]
    assert "Skipped" in (tmp_path / "run/report.html").read_text()


GOOD = {
    "masked_token_accuracy": 0.20,
    "majority_token_accuracy": 0.03,
    "copy_token_accuracy": 0.10,
    "codebook_perplexity": 90.0,
    "vocab_size": 128,
    "finetune_accuracy": 0.8,
    "scratch_accuracy": 0.6,
    "chance_accuracy": 0.1,
    "finetune_accuracies": [0.8, 0.8],
    "labelled_images": 100,
    "classes": 10,
    "seconds": 700,
    "seed": 0,
}


@pytest.mark.parametrize(
    "bad",
    [
        {},
        {"masked_token_accuracy": 0.08},
        {"copy_token_accuracy": 0.19},
        {"codebook_perplexity": 20.0},
        {"finetune_accuracy": 0.55},
        {"scratch_accuracy": 0.15},
    ],
)
def test_check_fails_below_any_bound(bad, tmp_path):
    (tmp_path / "report.json").write_text(json.dumps(GOOD | bad))
    assert report.check(str(tmp_path / "report.json")) == bool(bad)


def test_refuses_folder_of_something_else(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "precious.txt").write_text("mine")
    with pytest.raises(UserError, match="not from an earlier demo"):
        run_demo(tmp_path)
    assert (tmp_path / "data" / "precious.txt").read_text() == "mine"


def test_missing_source_creates_no_folder(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        run_demo(tmp_path / "run", "src=nowhere")
    assert not (tmp_path / "run").exists()


def test_missing_source_keeps_previous_demo(finished):
    folder, _ = finished
    with pytest.raises(UserError, match="nowhere"):
        run_demo(folder, "src=nowhere")
    assert (folder / "report.html").is_file()
    assert (folder / "pretrain/checkpoints/last.ckpt").is_file()


def test_undecodable_source_creates_no_folder(tmp_path):
    (tmp_path / "cats").mkdir()
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / "cats" / name).write_text("no image")
    with pytest.raises(UserError):
        run_demo(tmp_path / "run", f"src='{tmp_path / 'cats'}'")
    assert not (tmp_path / "run").exists()
