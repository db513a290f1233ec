"""Files that an earlier version wrote: shards, tokens, checkpoints and run folders are read, and runs are resumed.

`golden/earlier.tar.xz` was written by 0.1.0 before its settings, modules and classes were renamed. It stands for what
users have on their disks and must never be written again. It holds shards (data/train, data/val), token ids (tokens),
and a run folder for each entry of RUNS, stopped by a crash after the second of four steps. `golden/earlier.json` holds
what the same code computed from them: the metrics of the same runs without the crash, and outputs of the networks.
"""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_golden import GOLDEN, agree, describe
from tiny import read_rows

from beit_pretrain import Predictor, load_pretrained
from beit_pretrain.tokenizers.dvae import DVAETokenizer

EXPECTED = GOLDEN / "earlier.json"
COMMON = (
    "fit data.train=data/train data.val=data/val data.num_workers=0 data.shuffle_block_size=8 "
    "data.shuffle_streams=2 global_batch_size=4 "
    "batch_size=2 image_size=16 threads=1 trainer.accelerator=cpu steps=4 val_every=4 save_every=2 log_every=3 "
    "optim.warmup_steps=1 optim.lr=1e-2 "
)
NETWORK = "patch_size=4 model.embed_dim=8 model.num_heads=2 model.depth=2 "
PRETRAIN = (
    COMMON
    + NETWORK
    + "+experiment=demo_pretrain mask.max_patches=6 mask.min_block=1 num_visualizations=0 data.scale=[.5,1] "
    "collapse=null dense_knn=null "  # which the earlier version did not measure
)
# Name of the run folder -> the command that began it, and resumes it.
RUNS = {
    "tokenizer": COMMON + "+experiment=demo_tokenizer model={vocab_size:16,width:2,blocks:1,code_dim:4}",
    "pretrain": PRETRAIN
    + "tokenizer.path=tokenizer/checkpoints/last.ckpt data.pil_reference=true knn={bank:14,queries:8,k:2}",
    "finetune": COMMON
    + NETWORK
    + "+experiment=demo_finetune init_from=pretrain/checkpoints/last.ckpt data.labels_per_class=1 ema=.9 "
    "regularisation={label_smoothing:.1,mixup:.8,cutmix:1,erasing:.5}",
    "probe": COMMON + "+experiment=probe_1k logger=csv epochs=null init_from=pretrain/checkpoints/last.ckpt",
    "segment": COMMON
    + NETWORK
    + "+experiment=demo_segment init_from=pretrain/checkpoints/last.ckpt num_visualizations=0 "
    "decoder={channels:4,aux_channels:4,pool_scales:[1,2]}",
}


@pytest.fixture(scope="session")
def unpacked(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("earlier")
    with tarfile.open(GOLDEN / "earlier.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture
def earlier(unpacked, run_cli, tmp_path) -> Path:
    """A copy of the earlier files, in the current folder of `run_cli`."""
    shutil.copytree(unpacked, tmp_path, dirs_exist_ok=True)
    return tmp_path


def image(channels: int = 3) -> Image.Image:
    """16 x 16 pixels, the same on every machine."""
    return Image.fromarray((np.arange(16 * 16 * channels) * 37 % 251).astype(np.uint8).reshape(16, 16, channels))


def outputs(folder: Path) -> dict[str, list[float]]:
    """Some numbers that each network of the folder computes from one image, by the public functions."""
    pixels = torch.from_numpy(np.array(image())).permute(2, 0, 1)[None].float() / 255
    x_BCHW, mask_BN = pixels * 2 - 1, (torch.arange(16) % 3 == 0)[None]

    def file(run: str) -> Path:
        return folder / run / "checkpoints/last.ckpt"

    with torch.no_grad():
        features = load_pretrained(file("pretrain"))(x_BCHW)
        found = {
            "mim": load_pretrained(file("pretrain"), head="mim")(x_BCHW, mask_BN).flatten()[:8],
            "features": torch.stack([*features.cls, features.patches[-1][:, 0]])[:, 0, :4].flatten(),
            "resized": load_pretrained(file("pretrain"), image_size=32)(torch.rand(1, 3, 32, 32) * 0).cls[-1].flatten(),
            "classes": load_pretrained(file("finetune"), head="classify")(x_BCHW).flatten(),
            "backbone of a classifier": load_pretrained(file("finetune"))(x_BCHW).cls[-1].flatten(),
            "maps": load_pretrained(file("segment"), head="segment")(x_BCHW).main[0, :, :2, 0].flatten(),
            "tokens": DVAETokenizer(file("tokenizer")).encode(pixels).flatten(),
            "decoded": DVAETokenizer(file("tokenizer")).decode(torch.arange(4)[None]).flatten()[:8],
        }
    answers = Predictor(file("finetune"))(image(), top=3)
    labels = Predictor(file("segment"))(image())
    assert isinstance(labels, np.ndarray)
    found["probabilities"] = torch.tensor([answer.probability for answer in answers])
    found["numbers"] = torch.tensor([answer.number for answer in answers])
    found["labels"] = torch.from_numpy(labels[0])
    return {name: values.tolist() for name, values in found.items()}


def test_checkpoints_give_the_outputs_of_before(unpacked):
    agree(outputs(unpacked), EXPECTED, "outputs")


@pytest.mark.parametrize("name", RUNS)
def test_runs_are_resumed_by_the_same_command(name, earlier, run_cli):
    """They end with the metrics of a run that was not stopped, and are then known as finished."""
    code, stdout, stderr = run_cli(*RUNS[name].split(), f"run_dir={name}")
    assert code == 0, stderr
    assert "after step 2" in stdout
    agree(describe(read_rows(earlier / name / "metrics.csv")[1]), EXPECTED, "metrics", name)
    code, stdout, stderr = run_cli(*RUNS[name].split(), f"run_dir={name}")
    assert code == 0, stderr
    assert "already finished" in stdout


def test_a_checkpoint_has_its_settings_where_config_yaml_is_lost(earlier, run_cli):
    (earlier / "pretrain/config.yaml").unlink()
    code, stdout, stderr = run_cli(*RUNS["pretrain"].split(), "run_dir=pretrain")
    assert code == 0, stderr
    assert "after step 2" in stdout
    assert "has no config.yaml" in stderr


@pytest.mark.parametrize("lost", [False, True])
@pytest.mark.parametrize(
    "changed",
    [
        "data.shuffle_block_size=16",
        "data.shuffle_streams=3",
        "data.pil_reference=false",
        "global_batch_size=8",
        "optim.lr=1e-3",
    ],
)
def test_another_setting_is_refused(changed, lost, earlier, refused):
    if lost:
        (earlier / "pretrain/config.yaml").unlink()
    assert changed.partition("=")[0] in refused(*RUNS["pretrain"].split(), "run_dir=pretrain", changed)


@pytest.mark.parametrize("name", RUNS)
def test_runs_are_validated(name, earlier, run_cli):
    code, stdout, stderr = run_cli("validate", f"run={name}", "trainer.accelerator=cpu")
    assert code == 0, stderr
    found = {line.split()[0]: float(line.split()[1]) for line in stdout.splitlines() if line.startswith("val/")}
    agree(found, EXPECTED, "validated", name, tolerance=1e-4)  # four digits are printed


@pytest.mark.parametrize(
    ("task", "source"),
    [
        *(("finetune", "pretrain"), ("finetune", "finetune"), ("finetune", "segment")),
        *(("segment", "segment"), ("probe", "pretrain"), ("pretrain", "pretrain")),
    ],
)
def test_new_runs_start_from_them(task, source, earlier, run_cli):
    """init_from= of each kind: the loss of the first step."""
    words = f"{RUNS[task]} init_from={source}/checkpoints/last.ckpt steps=1 log_every=1 data.val=null"
    if task == "pretrain":  # also reads earlier token ids
        words += " tokenizer=none data.tokens=tokens data.pil_reference=false new_head=true"
    code, _, stderr = run_cli(*words.split(), "run_dir=new")
    assert code == 0, stderr
    losses = [row["train/loss"] for row in read_rows(earlier / "new/metrics.csv")[1].values()]
    agree(losses, EXPECTED, "first losses", f"{task} from {source}")
