"""Whole runs of the shipped `fit`: resume, changed settings, precision, W&B offline, a step of the paper's size."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from tiny import fit_words, state_of

from beit_pretrain.data.write.make_shards import make_shards
from beit_pretrain.engine import distributed as cluster
from beit_pretrain.models.checkpoints import files as checkpoint
from beit_pretrain.tables import curve
from beit_pretrain.tasks.pretrain import Pretraining


@pytest.fixture
def words(shards, dvae_checkpoint, tmp_path):
    more = [f"tokenizer.path={dvae_checkpoint}", "batch_size=4", f"run_dir={tmp_path / 'run'}"]
    return fit_words("pretrain", shards, *more)


def test_resume_after_crash_is_bit_identical(words, run_cli, crash, tmp_path):
    words = [*words, "steps=6", "val_every=3", "save_every=2"]
    assert run_cli(*words, f"run_dir={tmp_path / 'whole'}")[0] == 0
    crash(5, *words)
    code, stdout, _ = run_cli(*words)
    assert code == 0
    assert "resuming demo/pretrain after step 4" in stdout
    whole, resumed = (curve(tmp_path / name / "metrics.csv", "train/loss") for name in ("whole", "run"))
    assert resumed == whole  # every step once, the same numbers to the last bit
    states = [state_of(tmp_path / name) for name in ("whole", "run")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 2), (8, 1)])
def test_resume_with_other_batch_size(before, after, words, run_cli, crash, tmp_path, monkeypatch):
    """Same global batches: no position twice, none missing."""
    words = [*words, "steps=6", "val_every=6", "save_every=1"]
    seen: list[int] = []
    step = Pretraining.training_step

    def watching(self, batch, batch_idx):
        seen.extend(batch["position"].tolist())
        return step(self, batch, batch_idx)

    monkeypatch.setattr(Pretraining, "training_step", watching)
    crash(3, *words, f"batch_size={before}")
    assert run_cli(*words, f"batch_size={after}")[0] == 0
    assert seen == list(range(6 * 8))
    assert curve(tmp_path / "run/metrics.csv", "train/loss")[0] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
@pytest.mark.parametrize("task", ["pretrain", "tokenizer", "finetune"])
def test_every_task_in_every_precision(task, precision, shards, dvae_checkpoint, run_cli, tmp_path):
    more = {
        "pretrain": [f"tokenizer.path={dvae_checkpoint}"],
        "tokenizer": [],
        "finetune": ["from_scratch=true", "regularisation.mixup=.8", "regularisation.erasing=.5"],
    }[task]
    words = fit_words(task, shards, "steps=2", "val_every=2", "global_batch_size=4", *more)
    code, _, stderr = run_cli(*words, f"run_dir={tmp_path / 'run'}", f"trainer.precision={precision}")
    assert code == 0, stderr
    assert all(0 < loss < 10 for loss in curve(tmp_path / "run/metrics.csv", "train/loss")[1])


@pytest.mark.parametrize(
    "word",
    [
        *(f"precision={name}" for name in ("transformer-engine", "transformer-engine-float16", "fp16", "half", "1e3")),
        *(f"strategy={name}" for name in ("xla", "deepspeed", "dp", "fsdp_cpu_offload")),
        *(f"accelerator={name}" for name in ("tpu", "hpu", "foo")),
    ],
)
def test_trainer_values_that_cannot_be_used_are_one_line(word, shards, refused, tmp_path):
    words = fit_words("finetune", shards, "from_scratch=true", "steps=2", f"run_dir={tmp_path / 'run'}")
    if word.endswith(("engine", "float16", "xla", "tpu")):
        assert f"trainer.{word}" in refused(*words, f"trainer.{word}")
    else:
        refused(*words, f"trainer.{word}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("log_every", [1, 2, 3])
def test_progress_bar_shows_the_metrics_of_the_last_interval(log_every, words, run_cli, tmp_path):
    """After 4 steps, whatever the interval: with 3, of the fourth step alone."""
    code, stdout, stderr = run_cli(*words, "steps=4", "val_every=4", "save_every=4", f"log_every={log_every}")
    assert code == 0, stderr
    for name in ("images_per_s", "loss"):
        steps, values = curve(tmp_path / "run/metrics.csv", f"train/{name}")
        assert steps[-1] == 4
        shown = re.findall(rf"[ ,]{name}=([0-9.e+]+)", stdout)
        assert float(shown[-1]) == pytest.approx(values[-1], rel=0.01)


@pytest.mark.parametrize(
    ("task", "bias"),
    [("pretrain", "shared"), ("pretrain", "per_layer"), ("pretrain", "none"), ("finetune", "per_layer")],
)
def test_network_of_one_head(task, bias, shards, dvae_checkpoint, run_cli, tmp_path):
    more = {"pretrain": f"tokenizer.path={dvae_checkpoint}", "finetune": "from_scratch=true"}[task]
    words = fit_words(task, shards, "steps=2", "val_every=2", more, f"+model.rel_pos_bias={bias}", "model.num_heads=1")
    code, _, stderr = run_cli(*words, f"run_dir={tmp_path / 'run'}")
    assert code == 0, stderr


def test_gradient_norm_excludes_loss_scale(words, run_cli, tmp_path, monkeypatch):
    """trainer.precision=16-mixed, which Lightning allows only on a GPU: norm and clip are of the unscaled gradient."""
    words = [*words, "steps=4", "val_every=4", "optim.warmup_steps=1"]
    assert run_cli(*words, f"run_dir={tmp_path / 'full'}")[0] == 0
    arranged = cluster.resolve_trainer_args

    def halved(*settings) -> dict:
        found = arranged(*settings)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        return {**found, "precision": None, "plugins": [*found["plugins"], MixedPrecision("16-mixed", "cpu", scaler)]}

    monkeypatch.setattr(cluster, "resolve_trainer_args", halved)
    code, _, stderr = run_cli(*words, f"run_dir={tmp_path / 'half'}")
    assert code == 0, stderr
    for metric in ("train/loss", "train/gradient_norm"):
        full, half = (curve(tmp_path / name / "metrics.csv", metric)[1] for name in ("full", "half"))
        assert half == pytest.approx(full, rel=1e-2), metric
    states = [state_of(tmp_path / name) for name in ("full", "half")]
    change = max((states[0][name] - states[1][name]).abs().max() for name in states[0])
    assert change < 2e-3  # three steps of 3e-3 each


def long_run(words: list[str], folder: Path, *more: str) -> subprocess.Popen:
    """A run in its own process, since pytest handles SIGINT itself."""
    command = [sys.executable, "-m", "beit_pretrain", *map(str, words), f"run_dir={folder}", *more]
    log = (folder.parent / f"{folder.name}.log").open("w")
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, text=True)


@pytest.mark.long
def test_ctrl_c_exits_with_130(words, tmp_path):
    process = long_run(words, tmp_path / "run", "steps=100000", "save_every=5")
    last = tmp_path / "run/checkpoints/last.ckpt"
    deadline = time.monotonic() + 90
    while not last.is_file() and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    said = (tmp_path / "run.log").read_text()
    assert "interrupted" in said
    assert "Traceback" not in said
    assert checkpoint.read(last)["global_step"] >= 5


@pytest.mark.long
def test_two_processes_equal_one(words, tmp_path):
    words = [*words, "steps=4", "val_every=4", "trainer.accelerator=cpu"]
    assert long_run(words, tmp_path / "one").wait(120) == 0
    assert long_run(words, tmp_path / "two", "trainer.devices=2", "trainer.strategy=ddp").wait(200) == 0
    for metric in ("train/loss", "train/gradient_norm", "val/loss", "val/masked_token_accuracy"):
        one, two = (curve(tmp_path / name / "metrics.csv", metric)[1] for name in ("one", "two"))
        assert two == pytest.approx(one, rel=1e-4), metric


def test_changed_settings_are_refused(words, run_cli, refused):
    assert run_cli(*words, "steps=2")[0] == 0
    assert "optim.lr: 0.003 -> 0.001" in refused(*words, "steps=2", "optim.lr=1e-3")
    assert run_cli(*words, "steps=2", "log_every=2")[0] == 0  # how a run is watched may change
    assert run_cli(*words, "steps=2", "optim.lr=1e-3", "resume=never")[0] == 0


def test_resume_needs_same_images(words, shards, run_cli, refused, tmp_path):
    """Their location may change; another content of the same folder is refused."""
    data = tmp_path / "data"
    shutil.copytree(shards, data)
    here = [f"data.train={data / 'train'}", f"data.val={data / 'val'}"]
    assert run_cli(*words, "steps=2", "val_every=2")[0] == 0
    code, stdout, stderr = run_cli(*words, *here, "steps=2", "val_every=2")
    assert code == 0, stderr
    assert "already finished" in stdout
    shutil.rmtree(data)
    make_shards("synthetic", data, images=60, size=48, val=0.2, samples_per_shard=12, num_workers=1, seed=1)
    assert "was trained with other images than data.train holds now" in refused(*words, *here, "steps=2", "val_every=2")
    assert "data.val" in refused(*words, "data.val=null", "steps=2", "val_every=2")


def test_resume_never_keeps_foreign_files(words, run_cli, tmp_path):
    precious = tmp_path / "run/pictures/holiday.png"
    precious.parent.mkdir(parents=True)
    precious.write_text("mine")
    assert run_cli(*words, "steps=1", "resume=never")[0] == 0
    assert precious.read_text() == "mine"


def test_tokenizer_is_not_saved(words, run_cli, tmp_path):
    assert run_cli(*words, "steps=1")[0] == 0
    content = checkpoint.read(tmp_path / "run/checkpoints/last.ckpt")
    assert all(name.startswith("model.") for name in content["state_dict"])
    groups = content["optimizer_states"][0]["param_groups"]
    assert sum(len(group["params"]) for group in groups) == len(content["state_dict"])


def test_logged_metrics_and_files(words, run_cli, tmp_path):
    assert run_cli(*words, "steps=2", "val_every=2")[0] == 0
    columns = (tmp_path / "run/metrics.csv").read_text().splitlines()[0].split(",")
    train = "loss masked_token_accuracy codebook_perplexity masked_ratio lr gradient_norm images_per_s data_wait"
    val = "loss masked_token_accuracy majority_token_accuracy copy_token_accuracy codebook_perplexity knn_accuracy"
    assert {f"train/{name}" for name in train.split()} | {f"val/{name}" for name in val.split()} <= set(columns)
    assert (tmp_path / "run/pictures/step-000002.png").is_file()
    assert (tmp_path / "run/config.yaml").is_file()


def test_wandb_is_offline_without_api_key(words, run_cli, tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    code, _, stderr = run_cli(*words, "steps=2", "val_every=2", "logger=wandb")
    assert code == 0, stderr
    about = checkpoint.read(tmp_path / "run/checkpoints/last.ckpt")["beit_pretrain"]
    runs_written = [path.name for path in (tmp_path / "run/wandb").glob("offline-run-*")]
    assert len(runs_written) == 1
    assert runs_written[0].endswith(about["wandb_id"])


@pytest.mark.long
def test_base_22k_step_on_cpu(shards, openai_files_full, run_cli, tmp_path):
    """The shipped experiment with a smaller batch: 224 px, 8192 tokens, the encoder of the dall_e package."""
    words = ["fit", "+experiment=base_22k", f"data.train={shards / 'train'}", f"tokenizer.path={openai_files_full}"]
    words += [
        "logger=csv",
        "epochs=null",
        "steps=1",
        "global_batch_size=2",
        "data.num_workers=0",
        "log_every=1",
        "threads=2",
    ]
    code, _, stderr = run_cli(*words, f"run_dir={tmp_path / 'run'}")
    assert code == 0, stderr
    _, (loss,) = curve(tmp_path / "run/metrics.csv", "train/loss")
    # ln 8192 + sigma^2 / 2 = 9.056 for even targets (see test_backbone); an untrained encoder names only a few tokens.
    assert loss == pytest.approx(9.056, abs=0.5)
