"""Sweeps: parsing, folder names, rerunning failed runs, the summary."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import errors, start, tiny_words

from beit_pretrain.engine.sweep import SweepRun, combine, describe, last_words, members_of, sort_words, summary
from beit_pretrain.errors import UserError
from beit_pretrain.tables import curve


@pytest.fixture
def words(shards, dvae_checkpoint):
    return tiny_words(shards, dvae_checkpoint)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["optim.lr=1e-3,.2", "seed=1,2"], ["lr_0.001_seed_1", "lr_0.001_seed_2", "lr_0.2_seed_1", "lr_0.2_seed_2"]),
        (["seed=range(1,4)", "steps=5"], ["seed_1", "seed_2", "seed_3"]),
        (["seed=choice(1,2)"], ["seed_1", "seed_2"]),
        (["tokenizer=glob(*n*,exclude=s*)"], ["tokenizer_none", "tokenizer_openai"]),
        (["seed=1,2", "seed=3,4"], ["seed_3", "seed_4"]),  # given twice: the last one counts
        (["seed=1,1,2"], ["seed_1", "seed_2"]),
        (["optim.clip=null,3", "data.pil_reference=true,false"], [
            "clip_null_pil_reference_true", "clip_null_pil_reference_false",
            "clip_3_pil_reference_true", "clip_3_pil_reference_false",
        ]),
    ],
)  # fmt: skip
def test_parses_swept_settings(words, expected):
    assert [describe(swept) for swept, _ in combine(words)] == expected


def test_special_characters_reach_runs_unchanged():
    from omegaconf import OmegaConf

    from beit_pretrain.config import compose_raw

    words = ["+experiment=demo_pretrain", "data.train='a b','c,d','e=f'", "data.val=/x=y/$z", "name='one, two'"]
    found = [OmegaConf.to_container(compose_raw("fit", settings)) for _, settings in combine(words[:2] + words[3:])]
    assert [cfg["data"]["train"] for cfg in found] == ["a b", "c,d", "e=f"]
    assert {cfg["name"] for cfg in found} == {"one, two"}
    names = [describe(swept) for swept, _ in combine(words[:2])]
    assert len(set(names)) == 3
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.+-") for name in names)
    (_, settings), *_ = combine(["seed=1,2", words[2]])
    assert compose_raw("fit", ["+experiment=demo_pretrain", *settings]).data.val == "/x=y/$z"


def test_names_are_short_stable_and_unique():
    assert describe({"optim.lr": "0.1", "seed": "1"}) == "lr_0.1_seed_1"
    assert describe({"a.scale": "1", "b.scale": "2"}) == "a.scale_1_b.scale_2"
    assert describe({"data.train": "/a/b"}) != describe({"data.train": "/a-b"})
    assert describe({"data.train": "'..'"}).startswith("train_")
    assert ".." not in describe({"data.train": "'..'"})
    assert len(describe({f"key{i}": "x" * 40 for i in range(20)})) <= 120


def test_runs_have_separate_folders(words):
    folder, members = members_of([*words, "steps=1", "name=mine", "seed=1,2"])
    assert folder == Path("runs/mine")
    assert [member.folder for member in members] == [Path("runs/mine/seed_1"), Path("runs/mine/seed_2")]
    assert "name='mine/seed_1'" in members[0].words
    folder, members = members_of([*words, "steps=1", "run_dir=/elsewhere", "seed=1,2"])
    assert members[1].folder == Path("/elsewhere/seed_2")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["seed=1"], "nothing to sweep"),
        (["name=a,b"], "belong to the whole sweep"),
        (["seed=interval(0,1)"], "no end of values"),
        (["optim.lrr=1,2"], "unknown key"),
        (["optim.lr=-1,-2"], "optim.lr must be"),
    ],
)
def test_invalid_sweeps(more, said, words):
    with pytest.raises(UserError, match=said):
        members_of([*words, "steps=1", *more])


def test_one_invalid_run_does_not_stop_sweep(words):
    assert len(members_of([*words, "steps=1", "optim.lr=-1,1e-3"])[1]) == 2


def test_settings_of_sweep_launcher_and_runs():
    own, launcher, settings = sort_words(
        ["sweep.jobs=2", "hydra/launcher=submitit_slurm", "hydra.launcher.timeout_min=5", "+seed=1,2"]
    )
    assert own == ["jobs=2"]
    assert launcher == ["hydra/launcher=submitit_slurm", "hydra.launcher.timeout_min=5"]
    assert settings == ["+seed=1,2"]
    with pytest.raises(UserError, match=r"hydra\.sweep\.dir"):
        sort_words(["hydra.sweep.dir=x"])


def test_summary_sorts_best_first_failed_last(tmp_path):
    members = [SweepRun(n, tmp_path / n, {"seed": n}, []) for n in ("a", "b", "c")]
    for name, loss in (("a", 2.0), ("b", 1.0), ("c", 0.5)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.csv").write_text(f"step,train/loss,val/loss\n1,3,9\n2,2,{loss}\n")
    header, rows = summary(members, {"c": 1})
    assert header == ("run", "state", "seed", "step", "val/loss")
    assert [row[0] for row in rows] == ["b", "a", "c"]
    assert rows[0] == ("b", "finished", "b", 2, 1.0)
    assert rows[2][1] == "failed (1)"


def test_last_line_of_log(tmp_path):
    log = tmp_path / "log"
    log.write_bytes(b"bar 1%\rbar 2%\rerror: no such thing\nTorch says goodbye\n")
    assert last_words(log) == "error: no such thing"
    log.write_bytes(b"")
    assert last_words(log) == "it printed nothing"


@pytest.mark.soak
@pytest.mark.long
@pytest.mark.timeout(600)
def test_sweep_with_failed_run(words, tmp_path):
    """The sixth run lacks a tokenizer at first; a second call runs only that one."""
    source = next(word.partition("=")[2] for word in words if word.startswith("tokenizer.path="))
    words = [word for word in words if not word.startswith("tokenizer.path=")]
    command = ["fit", "-m", *words, "steps=1", "name=s", "sweep.jobs=2", "data.num_workers=0"]
    command += [f"tokenizer.path={source},{tmp_path / 'late.ckpt'}", "seed=1,2,3"]
    (tmp_path / "late.ckpt").symlink_to(source)
    blocked = tmp_path / "runs/s"
    (blocked / describe({"tokenizer.path": str(tmp_path / "late.ckpt"), "seed": "3"})).mkdir(parents=True)
    broken = blocked / describe({"tokenizer.path": str(tmp_path / "late.ckpt"), "seed": "3"}) / "checkpoints"
    broken.write_text("a file where a folder should be")
    log = tmp_path / "log"
    assert start(command, tmp_path, log).wait(300) == 1
    assert errors(log) == ["error: 1 of 6 runs failed:"]
    rows = list(csv.DictReader((blocked / "sweep.csv").open()))
    assert [row["state"] for row in rows].count("finished") == 5
    assert all(row["val/loss"] for row in rows if row["state"] == "finished")
    broken.unlink()
    assert start(command, tmp_path, log).wait(120) == 0, log.read_text()
    assert "5 finished already" in log.read_text()
    assert log.read_text().count("started") == 1
    assert len(list(blocked.glob("*/checkpoints/last.ckpt"))) == 6


@pytest.mark.soak
@pytest.mark.long
def test_two_process_runs_from_console_script_and_submitit(words, tmp_path):
    script = Path(sys.executable).with_name("beit_pretrain")
    command = ["fit", "-m", *words, "steps=1", "name=odd name", "seed=1,2", "trainer.devices=2", "sweep.jobs=2"]
    command += ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5"]
    before = [script] if script.exists() else [sys.executable, "-m", "beit_pretrain"]
    done = subprocess.run([*before, *command], cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    for seed in (1, 2):
        folder = tmp_path / "runs/odd name" / f"seed_{seed}"
        assert curve(folder / "metrics.csv", "train/loss")[0] == [1]
        assert "2 processes x" in (folder / "log.txt").read_text()


@pytest.mark.soak
@pytest.mark.long
def test_ctrl_c_ends_runs(words, tmp_path):
    sweep = start(["fit", "-m", *words, "steps=100000", "name=s", "seed=1,2"], tmp_path, tmp_path / "log")
    metrics, deadline = tmp_path / "runs/s/seed_1/metrics.csv", time.monotonic() + 60
    while not metrics.is_file() and time.monotonic() < deadline:
        time.sleep(0.2)
    sweep.send_signal(signal.SIGINT)
    assert sweep.wait(60) == 130
    size = metrics.stat().st_size
    time.sleep(2)
    assert metrics.stat().st_size == size
    assert not (tmp_path / "runs/s/seed_2").exists()
    assert os.listdir(tmp_path / "runs/s/seed_1")
