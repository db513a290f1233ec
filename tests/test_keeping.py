"""Killed, told to stop, damaged: runs of the shipped command go on as if nothing had been (and say so)."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from beit_pretrain.errors import UserError
from beit_pretrain.training.guards import Guard
from beit_pretrain.training.keeping import check_space, newest_good
from beit_pretrain.training.metrics import read_rows


@pytest.fixture
def words(shards, dvae_checkpoint, tmp_path):
    """A small run with everything that real ones have: workers, a tokenizer, drop path, accumulation, offline W&B."""
    words = ["fit", "+experiment=demo_pretrain", f"data.train={shards / 'train'}", f"data.val={shards / 'val'}"]
    words += [f"tokenizer.path={dvae_checkpoint}", "image_size=32", "mask.max_patches=6", "mask.min_block=1"]
    words += ["model.embed_dim=32", "model.depth=2", "model.num_heads=2", "model.drop_path_rate=0.1", "threads=1"]
    words += ["global_batch=8", "batch_size=4", "log_every=1", "val_every=5", "save_every=4", "steps=20"]
    return [*words, "data.workers=1", "logger=wandb", "logger.mode=offline", "pictures=0", "optim.warmup_steps=2"]


def process(words: list[str], folder: Path, *more: str) -> subprocess.Popen:
    environment = {**os.environ, "WANDB_SILENT": "true", "OMP_NUM_THREADS": "1", "WANDB_DIR": str(folder.parent)}
    command = [sys.executable, "-m", "beit_pretrain", *words, f"run_dir={folder}", *more]
    return subprocess.Popen(
        command, cwd=folder.parent, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


def finished(words: list[str], folder: Path, *more: str) -> tuple[int, str, str]:
    running = process(words, folder, *more)
    stdout, stderr = running.communicate(timeout=240)
    return running.returncode, stdout, stderr


def same_run(one: Path, other: Path) -> None:
    """Every step once, every number to the last bit, and the same weights."""
    rows = [read_rows(run / "metrics.csv")[1] for run in (one, other)]
    timings = ("train/images_per_s", "train/data_wait")
    rows = [{step: {k: v for k, v in row.items() if k not in timings} for step, row in r.items()} for r in rows]
    assert rows[0] == rows[1]
    states = [torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (one, other)]
    for name, tensor in states[0]["state_dict"].items():
        assert torch.equal(tensor, states[1]["state_dict"][name]), name
    moments = [state["optimizer_states"][0]["state"] for state in states]
    for number, entry in moments[0].items():
        assert all(torch.equal(value, moments[1][number][key]) for key, value in entry.items())


def steps_written(folder: Path) -> int:
    try:
        return max(read_rows(folder / "metrics.csv")[1], default=0)
    except (OSError, ValueError, KeyError):
        return 0


@pytest.mark.long
def test_killed_at_random_moments(words, tmp_path):
    """SIGKILL, whole process group, wherever it happens to be; six times here, thirty in `make soak`."""
    assert finished(words, tmp_path / "whole")[0] == 0
    folder, rng, kills = tmp_path / "killed", random.Random(0), 0
    while kills < 6:
        running = process(words, folder)
        wanted = min(19, steps_written(folder) + rng.randrange(1, 6))
        deadline = time.monotonic() + 120
        while running.poll() is None and steps_written(folder) < wanted and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(rng.random() * 0.2)
        if running.poll() is None:
            os.killpg(running.pid, signal.SIGKILL)
            kills += 1
        running.communicate()
        if steps_written(folder) >= 20:
            break
    code, stdout, stderr = finished(words, folder)
    assert code == 0, stderr
    assert kills >= 3
    same_run(tmp_path / "whole", folder)


@pytest.mark.long
@pytest.mark.parametrize(("signum", "expected"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_told_to_stop(signum, expected, words, tmp_path):
    """The step in hand is finished and saved, the exit code says what it was, and the run goes on bit by bit."""
    assert finished(words, tmp_path / "whole")[0] == 0
    folder = tmp_path / "stopped"
    running = process(words, folder)
    while running.poll() is None and steps_written(folder) < 6:
        time.sleep(0.02)
    before = steps_written(folder)
    running.send_signal(signum)
    stdout, stderr = running.communicate(timeout=60)
    assert running.returncode == expected, stderr
    assert f"stopped by {signal.Signals(signum).name} after step" in stdout
    assert "the same command goes on from there" in stdout
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert before <= saved <= steps_written(folder) == saved
    code, stdout, stderr = finished(words, folder)
    assert code == 0, stderr
    assert f"after step {saved}" in stdout
    same_run(tmp_path / "whole", folder)


def in_process(words: list[str]) -> list[str]:
    return [word for word in words if not word.startswith(("logger", "data.workers"))] + ["data.workers=0"]


def test_checkpoints_of_a_run(words, run_cli, tmp_path):
    assert run_cli(*in_process(words), f"run_dir={tmp_path / 'run'}", "keep_every=6")[0] == 0
    names = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert names == {"last.ckpt", "previous.ckpt", "step-00000006.ckpt", "step-00000012.ckpt", "step-00000018.ckpt"}
    step = {
        name: torch.load(tmp_path / "run" / "checkpoints" / name, weights_only=True)["global_step"] for name in names
    }
    assert step["last.ckpt"] == 20
    assert step["previous.ckpt"] == 18
    assert step["step-00000006.ckpt"] == 6


def test_saving_by_the_clock_changes_no_number(words, run_cli, tmp_path):
    """A checkpoint between two rows of metrics holds the sums that are not written yet."""
    words = [*in_process(words), "log_every=5", "steps=10"]
    assert run_cli(*words, f"run_dir={tmp_path / 'whole'}")[0] == 0
    often = [*words, f"run_dir={tmp_path / 'often'}", "save_minutes=1e-9"]
    assert run_cli(*often)[0] == 0
    same_run(tmp_path / "whole", tmp_path / "often")
    last = tmp_path / "often" / "checkpoints" / "previous.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 9
    assert "loss" in torch.load(last, weights_only=True)["unwritten"]
    # Going on from the one in between gives the same row.
    (tmp_path / "often" / "checkpoints" / "last.ckpt").unlink()
    code, stdout, stderr = run_cli(*often)
    assert "continuing demo/pretrain after step 9" in stdout, stderr
    same_run(tmp_path / "whole", tmp_path / "often")


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "flipped"])
def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(damage, words, run_cli, tmp_path):
    words = [*in_process(words), f"run_dir={tmp_path / 'run'}", "steps=8"]
    assert run_cli(*words)[0] == 0
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    whole = last.read_bytes()
    last.unlink()
    middle = len(whole) // 2
    last.write_bytes(
        {
            "cut": whole[: int(0.7 * len(whole))],
            "empty": b"",
            "text": b"no checkpoint",
            "flipped": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
        }[damage]
    )
    code, stdout, stderr = run_cli(*words)
    assert code == 0, stderr
    assert "last.ckpt is damaged" in stderr or "last.ckpt cannot be read" in stderr
    assert "going on from" in stderr
    assert "after step 4" in stdout


def test_every_length_of_a_cut_checkpoint(words, run_cli, tmp_path):
    assert run_cli(*in_process(words), f"run_dir={tmp_path / 'run'}", "steps=4")[0] == 0
    folder = tmp_path / "run" / "checkpoints"
    whole = (folder / "last.ckpt").read_bytes()
    rng = random.Random(1)
    for _ in range(50):
        (folder / "last.ckpt").unlink()
        (folder / "last.ckpt").write_bytes(whole[: rng.randrange(len(whole))])
        with pytest.raises(UserError, match="can be read"):
            newest_good(folder)


def test_no_good_checkpoint_at_all(words, run_cli, tmp_path):
    words = [*in_process(words), f"run_dir={tmp_path / 'run'}", "steps=4"]
    assert run_cli(*words)[0] == 0
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        path.write_bytes(b"damaged")
    code, _, stderr = run_cli(*words)
    assert code == 2
    assert "none of the" in stderr
    assert stderr.count("\n") == 1


def test_preflight(words, run_cli, tmp_path):
    words = [*in_process(words), f"run_dir={tmp_path / 'run'}"]
    code, stdout, stderr = run_cli(*words, "preflight=only")
    assert code == 0, stderr
    for said in ("20 steps of 8", "a sample of train and val decodes", "different tokens in", "GB free", "32-true"):
        assert said in stdout
    assert not (tmp_path / "run").exists()


def test_space(tmp_path, monkeypatch):
    assert "GB free" in check_space(tmp_path / "not" / "yet", 1000)
    with pytest.raises(UserError, match="two checkpoints need"):
        check_space(tmp_path, 10**15)


class Poison:
    """Makes the gradients of some steps NaN, after they are reduced."""

    def __init__(self, monkeypatch, steps):
        from beit_pretrain.training import optim

        clip = optim.clip_gradients
        self.calls = 0

        def poisoned(parameters, limit, scale=1.0):
            parameters = list(parameters)
            if self.calls in steps:
                parameters[0].grad.fill_(float("nan"))
            self.calls += 1
            return clip(parameters, limit, scale)

        monkeypatch.setattr(optim, "clip_gradients", poisoned)


def test_a_step_without_a_finite_gradient_is_skipped(words, run_cli, tmp_path, monkeypatch):
    """Weights, moments and their count end as if the step's update had never been; the schedule goes on."""
    words = [*in_process(words), "steps=10"]
    with monkeypatch.context() as patch:
        Poison(patch, {7})
        code, stdout, stderr = run_cli(*words, f"run_dir={tmp_path / 'nan'}")
    assert code == 0, stderr
    assert "1 updates were skipped" in stderr
    assert '{"step": 7, "positions": [56, 63]}' in (tmp_path / "nan" / "skipped.jsonl").read_text()
    rows = read_rows(tmp_path / "nan" / "metrics.csv")[1]
    assert [rows[step]["train/skipped"] for step in range(1, 11)] == [0] * 7 + [1, 0, 0]
    assert all(torch.isfinite(torch.tensor(row["train/loss"])) for row in rows.values() if "train/loss" in row)

    def leave_out(self, norm, optimizer, step):
        optimizer.found_inf = torch.tensor(float(step == 7))
        return torch.tensor(int(step == 7))

    with monkeypatch.context() as patch:
        patch.setattr(Guard, "examine", leave_out)
        assert run_cli(*words, f"run_dir={tmp_path / 'left out'}")[0] == 0
    one, other = (torch.load(tmp_path / n / "checkpoints/last.ckpt", weights_only=True) for n in ("nan", "left out"))
    for name, tensor in one["state_dict"].items():
        assert torch.equal(tensor, other["state_dict"][name])
    assert {float(entry["step"]) for entry in one["optimizer_states"][0]["state"].values()} == {9.0}


def test_nan_for_good_stops_in_time(words, run_cli, tmp_path, monkeypatch):
    words = [*in_process(words), f"run_dir={tmp_path / 'run'}", "steps=20", "max_skipped=3"]
    with monkeypatch.context() as patch:
        Poison(patch, set(range(6, 100)))
        code, _, stderr = run_cli(*words)
    assert code == 2
    assert "3 steps in a row had no finite gradient" in stderr
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert all(tensor.isfinite().all() for tensor in saved["state_dict"].values())
    assert saved["global_step"] <= 8
    assert len((tmp_path / "run" / "skipped.jsonl").read_text().splitlines()) >= 3
    code, stdout, stderr = run_cli(*words)  # whoever mended it goes on
    assert code == 0, stderr


class TestWarnings:
    def test_a_leap_of_the_loss(self):
        guard = Guard(None, 5, 8)
        for i in range(10):
            assert guard.warnings({"train/loss": 6.0 - 0.01 * i}, None) == []
        (line,) = guard.warnings({"train/loss": 8.0}, None)
        assert "leaps to 8, from about 5.9" in line

    def test_a_noisy_loss_is_no_leap(self):
        guard, rng = Guard(None, 5, 8), random.Random(0)
        assert not [w for _ in range(500) for w in guard.warnings({"train/loss": 6 + rng.gauss(0, 0.1)}, None)]

    def test_a_collapsing_codebook(self):
        guard = Guard(None, 5, 8)
        assert guard.warnings({"train/codebook_perplexity": 900.0}, 8192) == []
        for _ in range(2):
            (line,) = guard.warnings({"train/codebook_perplexity": 20.0}, 8192)
            assert "20 of 8192 tokens" in line
            assert guard.warnings({"train/codebook_perplexity": 21.0}, 8192) == []  # said once ...
            assert guard.warnings({"train/codebook_perplexity": 900.0}, 8192) == []  # ... until it recovers
