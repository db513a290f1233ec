"""Whole runs of the shipped commands on a GPU: golden losses, resume, files that travel, several GPUs."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import test_golden
import torch
from tiny import data_words, fit_words, read_rows, start, state_of

from beit_pretrain import load_pretrained
from beit_pretrain.tables import curve

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def words(shards, dvae_checkpoint, accelerator) -> list[str]:
    """A tiny pre-training run without steps and run_dir."""
    more = [f"tokenizer.path={dvae_checkpoint}", "batch_size=4", "compile=false", accelerator, "trainer.devices=1"]
    return fit_words("pretrain", shards, *more)


def kind_of(device: torch.device) -> str:
    """The kind of device as a file name: `cpu`, `cuda-nvidia-h100-80gb-hbm3`."""
    if device.type == "cpu":
        return "cpu"
    return "cuda-" + re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")


@pytest.fixture
def golden_words(shards, dvae_checkpoint, accelerator, tmp_path) -> list[str]:
    """The golden pre-training run of `test_golden.py`, on this device and in single precision."""
    files = {"train": shards / "train", "val": shards / "val", "tokenizer": dvae_checkpoint}
    here = [accelerator, "trainer.devices=1", "trainer.precision=32-true", "compile=false"]
    return [*test_golden.words("pretrain", **files), *here, f"run_dir={tmp_path / 'run'}"]


def test_golden_losses(device, golden_words, run_cli, tmp_path):
    """The loss of every step in single precision equals that recorded on this kind of device.

    `WRITE_GOLDEN=1` writes them for a kind that has none yet.
    """
    file = GOLDEN / f"{kind_of(device)}.json"
    if device.type == "cpu":
        pytest.skip("test_golden.py compares those of a CPU")
    if not (file.exists() or os.environ.get("WRITE_GOLDEN")):
        pytest.skip(f"no golden losses of this kind of device yet: WRITE_GOLDEN=1 makes {file.name}")
    code, _, stderr = run_cli(*golden_words, "deterministic=true")
    assert code == 0, stderr
    _, losses = curve(tmp_path / "run/metrics.csv", "train/loss")
    if not file.exists():
        file.write_text(json.dumps({"losses": [round(loss, 5) for loss in losses]}) + "\n")
    assert losses == pytest.approx(json.loads(file.read_text())["losses"], abs=2e-4)


def test_golden_losses_match_cpu(golden_words, run_cli, tmp_path):
    code, _, stderr = run_cli(*golden_words)
    assert code == 0, stderr
    _, losses = curve(tmp_path / "run/metrics.csv", "train/loss")
    of_a_cpu = json.loads((GOLDEN / "pretrain.json").read_text())["metrics"].values()
    assert losses == pytest.approx([metrics["train/loss"] for metrics in of_a_cpu], abs=2e-3)


@pytest.mark.parametrize("deterministic", [True, False])
def test_resume_equals_uninterrupted_run(deterministic, words, run_cli, crash, tmp_path):
    """With deterministic=true to the last bit, else within rounding."""
    words = [*words, f"deterministic={str(deterministic).lower()}", "steps=6", "save_every=2", "val_every=3"]
    assert run_cli(*words, f"run_dir={tmp_path / 'whole'}")[0] == 0
    words = [*words, f"run_dir={tmp_path / 'parts'}"]
    crash(5, *words)
    code, stdout, stderr = run_cli(*words)
    assert code == 0, stderr
    assert "after step 4" in stdout
    rows = [read_rows(tmp_path / name / "metrics.csv")[1] for name in ("whole", "parts")]
    states = [state_of(tmp_path / name) for name in ("whole", "parts")]
    assert [sorted(found) for found in rows] == [[1, 2, 3, 4, 5, 6]] * 2
    if deterministic:
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    losses = [[row["train/loss"] for row in found.values()] for found in rows]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_gpu_checkpoint_loads_on_cpu(words, run_cli, tmp_path):
    assert run_cli(*words, "steps=1", f"run_dir={tmp_path / 'run'}")[0] == 0
    model = load_pretrained(tmp_path / "run/checkpoints/last.ckpt", head="features")
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert all(torch.isfinite(patches).all() for patches in model(torch.rand(1, 3, 32, 32)).patches)


@pytest.mark.parametrize(
    "settings", [["compile=true"], ["compile=true", "device_prefetch=true"], ["activation_checkpointing=true"]]
)
def test_execution_settings_do_not_change_losses(settings, words, run_cli, tmp_path):
    found = {}
    for name, more in (("plain", []), ("other", settings)):
        code, _, stderr = run_cli(*words, *more, "steps=3", f"run_dir={tmp_path / name}", "trainer.precision=32-true")
        assert code == 0, stderr
        found[name] = curve(tmp_path / name / "metrics.csv", "train/loss")[1]
    assert found["other"] == pytest.approx(found["plain"], rel=1e-2)  # a token at a near-tie may be another one


def test_cuda_graphs_in_a_run(cuda, words, run_cli, tmp_path):
    """CUDA graphs need one micro-batch per step."""
    words = [*words, "batch_size=8", "steps=6", "val_every=3"]
    found = {}
    for mode in ("false", "reduce-overhead"):
        code, _, stderr = run_cli(*words, f"compile={mode}", f"run_dir={tmp_path / mode}")
        assert code == 0, stderr
        found[mode] = curve(tmp_path / mode / "metrics.csv", "train/loss")[1]
    assert found["reduce-overhead"] == pytest.approx(found["false"], rel=2e-2)


def test_default_precision_is_bf16(cuda, words, run_cli, tmp_path):
    code, stdout, stderr = run_cli(*words, "steps=2", f"run_dir={tmp_path / 'run'}")
    assert code == 0, stderr
    assert "precision bf16-mixed" in stdout


def test_fp16_with_a_loss_scale(cuda, words, run_cli, tmp_path):
    code, _, stderr = run_cli(*words, "steps=4", f"run_dir={tmp_path / 'run'}", "trainer.precision=16-mixed")
    assert code == 0, stderr
    _, rows = read_rows(tmp_path / "run/metrics.csv")
    assert all(row["train/gradient_norm"] < 100 for row in rows.values())  # of the gradient, not of its scale


def test_finetuning_validation_and_prediction(words, photos, mim_checkpoint, shards, accelerator, run_cli, tmp_path):
    given = [*data_words(shards), f"init_from={mim_checkpoint}"]
    sizes = "image_size=32 global_batch_size=8 data.num_workers=0 epochs=null steps=2 log_every=1 compile=false".split()
    run = tmp_path / "finetune"
    code, _, stderr = run_cli(
        "fit", "+experiment=finetune_own", *given, *sizes, accelerator, "trainer.devices=1", f"run_dir={run}"
    )
    assert code == 0, stderr
    assert run_cli("validate", f"run={run}", accelerator)[0] == 0
    code, _, stderr = run_cli("predict", f"init_from={run / 'checkpoints/last.ckpt'}", f"src={photos}", "num_workers=0")
    assert code == 0, stderr


def test_two_gpus_equal_one(cuda, words, run_cli, tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    words = [word for word in words if not word.startswith("trainer.devices")]
    assert run_cli(*words, "trainer.devices=1", "steps=4", f"run_dir={tmp_path / 'one'}")[0] == 0
    log = tmp_path / "two.log"
    run = start([*words, "trainer.devices=2", "steps=4", f"run_dir={tmp_path / 'two'}"], tmp_path, log)
    assert run.wait(300) == 0, log.read_text()[-3000:]
    losses = [curve(tmp_path / name / "metrics.csv", "train/loss")[1] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
