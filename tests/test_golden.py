"""Golden curves: every task, tiny and deterministic, must give the metrics that it gave before.

A refactor must not move a digit. `golden/NAME.json` holds the metrics of every step in full, and the machine they were
computed on. On the same kind of CPU, with the same versions, they are compared exactly; elsewhere within `TOLERANCE`,
since other vector instructions and kernels round differently.

After a deliberate change of the method: WRITE_GOLDEN=1 python -m pytest tests/test_golden.py
"""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import scrambled
from tiny import DVAE, MIM, comparable, read_rows, write_checkpoint

from beit_pretrain.models.backbone import MaskedImageModel
from beit_pretrain.tokenizers.dvae import DiscreteVAE

GOLDEN = Path(__file__).parent / "golden"
# Absolute and relative. Other instruction sets (ATEN_CPU_CAPABILITY=default, MKL_CBWR=COMPATIBLE) differ by 3e-7.
TOLERANCE = 1e-5
PACKAGES = ("torch", "torchvision", "numpy", "pillow", "simplejpeg", "timm", "lightning")

COMMON = (
    "fit data.train={train} data.val={val} image_size=32 global_batch_size=8 batch_size=4 "
    "data.num_workers=0 log_every=1 "
    "threads=1 trainer.accelerator=cpu optim.lr=1e-2 "
)
NETWORK = COMMON + "patch_size=8 model.embed_dim=32 model.num_heads=2 model.depth=2 "
NEWER = "collapse=null dense_knn=null "  # metrics that did not exist when the files were written
PRETRAIN = NETWORK + "+experiment=demo_pretrain mask.max_patches=6 mask.min_block=1 data.val_images=8 " + NEWER
# Name of the golden file -> the command. {train} and {val} are shards; {tokenizer} (which names one token only),
# {varied_tokenizer} and {backbone} are checkpoints.
RUNS = {
    "pretrain": PRETRAIN + "tokenizer.path={tokenizer} steps=6 val_every=6 optim.warmup_steps=2",
    "pretrain_options": PRETRAIN
    + "tokenizer.path={varied_tokenizer} steps=4 val_every=2 optim.warmup_steps=1 seed=3 batch_size=2 "
    "data.train=[{train},{val}] data.weights=[.7,.3] data.jitter=[.4,.4,.4] data.shuffle_block_size=24 "
    "data.shuffle_streams=2 "
    "model.rel_pos_bias=per_layer model.abs_pos_emb=true model.drop_path_rate=.2",
    "tokenizer": COMMON + "+experiment=demo_tokenizer model={{vocab_size:32,width:8,blocks:1,code_dim:8}} steps=5 "
    "val_every=5 relaxation.kl_weight=.01 optim.warmup_steps=1",
    "finetune": NETWORK + "+experiment=demo_finetune init_from={backbone} steps=6 val_every=3 optim.warmup_steps=2 "
    "optim.clip=1 ema=.9 model.drop_path_rate=.2 data.labels_per_class=4 data.val_images=12 "
    "regularisation={{label_smoothing:.1,mixup:.8,cutmix:1,erasing:.5}} data.auto_augment=rand-m9-mstd0.5-inc1",
    "probe": COMMON
    + "+experiment=probe_1k logger=csv init_from={backbone} epochs=null recipe=null steps=5 val_every=5",
    "segment": NETWORK + "+experiment=demo_segment init_from={backbone} steps=5 val_every=5 optim.warmup_steps=1 "
    "data.distort=true data.val_images=6 decoder.channels=8 decoder.aux_channels=4 model.drop_path_rate=.2 "
    "test={{stride:.5,scales:[.75,1],flip:true}}",
    "mae": COMMON + "+experiment=mae_base_1k logger=csv epochs=null recipe=null steps=6 val_every=3 patch_size=8 "
    "model.size=null +model.embed_dim=32 +model.depth=2 +model.num_heads=2 model.decoder_embed_dim=24 "
    "model.decoder_depth=1 model.decoder_num_heads=3 optim.warmup_epochs=null optim.warmup_steps=2 data.val_images=8 "
    + NEWER,
}


def words(name: str, **files: Path) -> list[str]:
    """The command of a golden run."""
    return [word.format(**files) for word in RUNS[name].split()]


@pytest.fixture(scope="session")
def files(shards, dvae_checkpoint, tmp_path_factory) -> dict[str, Path]:
    """What the golden runs read. Every weight is random: zeros, as fresh networks have, would hide a change."""
    folder = tmp_path_factory.mktemp("golden")
    varied, backbone = scrambled(DiscreteVAE(**DVAE)), scrambled(MaskedImageModel(**MIM))
    with torch.no_grad():
        for name, parameter in varied.named_parameters():
            parameter.mul_(0 if name.endswith("bias") else 1)  # tokens depend only on the image
    about = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}
    return {
        "train": shards / "train",
        "val": shards / "val",
        "tokenizer": dvae_checkpoint,
        "varied_tokenizer": write_checkpoint(folder / "dvae.ckpt", "tokenizer", varied),
        "backbone": write_checkpoint(folder / "mim.ckpt", "mim", backbone, **about),
    }


def machine() -> dict[str, str]:
    """What rounding depends on: the kind of CPU and the versions of what computes on it."""
    facts = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    kinds = ("model name", "cpu family", "model", "CPU implementer", "CPU part")
    said = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in facts)}
    cpu = " ".join([platform.machine(), *(said[kind] for kind in kinds if kind in said)])
    instructions = torch.backends.cpu.get_cpu_capability()
    return {"cpu": cpu, "instructions": instructions, **{package: version(package) for package in PACKAGES}}


def describe(rows: dict[int, dict[str, float]]) -> dict[str, dict[str, float]]:
    """A run's metrics by step, as they are written: every digit."""
    return {str(step): dict(sorted(comparable(row).items())) for step, row in rows.items()}


def flat(value: Any, name: str = "") -> dict[str, float]:
    """Numbers in nested dictionaries and lists, by their path."""
    if not isinstance(value, dict | list):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {path: number for key, part in items for path, number in flat(part, f"{name}/{key}").items()}


def agree(found: Any, file: Path, *part: str, tolerance: float = TOLERANCE) -> None:
    """Assert that numbers are those of a part of a golden file: exactly on its kind of machine, else nearly."""
    golden = expected = json.loads(file.read_text())
    for name in part:
        expected = expected[name]
    if golden["machine"] == machine():
        assert found == expected
    assert flat(found) == pytest.approx(flat(expected), abs=tolerance, rel=tolerance)


@pytest.mark.parametrize("name", RUNS)
def test_metrics_are_those_of_before(name, files, run_cli, tmp_path):
    code, _, stderr = run_cli(*words(name, **files), f"run_dir={tmp_path / 'run'}")
    assert code == 0, stderr
    found = describe(read_rows(tmp_path / "run/metrics.csv")[1])
    file = GOLDEN / f"{name}.json"
    if os.environ.get("WRITE_GOLDEN"):
        file.write_text(json.dumps({"machine": machine(), "metrics": found}, indent=1) + "\n")
    agree(found, file, "metrics")
