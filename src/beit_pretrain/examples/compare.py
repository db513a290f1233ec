"""The verb `compare`: compares pre-training with training from scratch and with a control, over several seeds.

Every stage is an ordinary command with a small experiment. Finished stages are skipped: rerun the same command to
resume. All runs share one tokenizer; everything else is trained for each seed.

* pretrained: masked image modelling, then fine-tuning on few labels.
* control: the same with shuffled targets (`tokenizers/shuffled.py`): equal compute, but targets unrelated to the image.
* scratch: only fine-tuning, with the same labels, steps and batches.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from beit_pretrain.config import compose, quoted
from beit_pretrain.data.manifest import MANIFEST
from beit_pretrain.data.write.make_shards import make_shards
from beit_pretrain.engine.fit import fit
from beit_pretrain.errors import UserError
from beit_pretrain.evaluation.probe_layers import probe
from beit_pretrain.examples.compare_results import KINDS, report
from beit_pretrain.examples.settings import CompareSettings
from beit_pretrain.models.backbone import MaskedImageModel
from beit_pretrain.models.checkpoints.files import AtomicCheckpointIO, read_own
from beit_pretrain.settings import renamed, to_dict

MARK = "compare.yaml"  # the config; marks the folder of a comparison
STAGES = "stages.jsonl"  # duration of each finished stage
KINDS = ("pretrained", "control", "scratch")
FREE = ("precision", "threads", "num_workers", "seeds", "probe_images")  # may differ in a resumed comparison


def compare(cfg: CompareSettings) -> dict:
    """Run all unfinished stages; write `results.json`, `RESULTS.md`, `accuracy.png`, `layers.png` and `curves.png`.

    Returns the content of `results.json`. Raises UserError if the settings differ from the folder's.
    """
    run_dir = claim(cfg)
    data = write_shards(cfg, run_dir / "data")
    check_classes(cfg, data)
    tokenizer = run_dir / "tokenizer"
    train(cfg, "compare_tokenizer", tokenizer, steps=cfg.steps.tokenizer, **data)
    seeds = list(range(cfg.seed, cfg.seed + cfg.seeds))
    for seed in seeds:
        for kind in KINDS:
            run_seed(cfg, run_dir / f"seed-{seed}", kind, seed, data)
    for seed in seeds:
        for kind in KINDS:
            probe_features(cfg, run_dir / f"seed-{seed}", kind, seed, data)
    return report(cfg, run_dir, seeds)


def claim(cfg: CompareSettings) -> Path:
    """Create or reuse the comparison's folder. Raises UserError if it holds anything but this comparison.

    A folder with only the config, for instance after a mistyped source, counts as empty.
    """
    run_dir, mark = Path(cfg.run_dir), Path(cfg.run_dir) / MARK
    if mark.is_file() and any(path != mark and not path.is_dir() for path in run_dir.rglob("*")):
        old, new = renamed(yaml.safe_load(mark.read_text())), to_dict(cfg)
        for key in new.keys() - set(FREE):
            if old.get(key) != new[key]:
                raise UserError(f"{run_dir} holds a comparison with {key}={old.get(key)}; choose another name=")
    elif run_dir.exists() and not mark.is_file() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        raise UserError(f"run_dir={run_dir} exists and is not from an earlier comparison; choose another name=")
    run_dir.mkdir(parents=True, exist_ok=True)
    mark.write_text(yaml.safe_dump(to_dict(cfg), sort_keys=False))
    return run_dir


def write_shards(cfg: CompareSettings, out: Path) -> dict[str, Path]:
    """Make the shards if missing; returns the settings that point to them."""
    make_shards(cfg.src, out)
    make_shards(cfg.held_out or cfg.src, out, split="val")
    return {"data.train": out / "train", "data.val": out / "val"}


def check_classes(cfg: CompareSettings, data: dict[str, Path]) -> None:
    """Raise UserError for fewer than two classes, or if the held-out images have other classes."""
    train, val = (json.loads((folder / MANIFEST).read_text())["classes"] for folder in data.values())
    if len(train) < 2:
        raise UserError(f"src={cfg.src} has {len(train)} classes; a comparison needs at least 2")
    if val != train:
        raise UserError(f"held_out={cfg.held_out} has other classes than src={cfg.src}")


def run_seed(cfg: CompareSettings, folder: Path, kind: str, seed: int, data: dict[str, Path]) -> None:
    """Pre-train (unless the kind is scratch) and fine-tune."""
    start: dict = {"from_scratch": True, "optim.layer_decay": None}  # layer decay only helps pre-trained weights
    if kind != "scratch":
        targets = {"tokenizer": "dvae" if kind == "pretrained" else "shuffled"}
        targets["tokenizer.path"] = str(folder.parent / "tokenizer/checkpoints/last.ckpt")
        train(cfg, "compare_pretrain", folder / kind, seed=seed, steps=cfg.steps.pretrain, **targets, **data)
        start = {"init_from": folder / kind / "checkpoints/last.ckpt"}
    settings = {
        "steps": cfg.steps.finetune,
        "data.labels_per_class": cfg.labels_per_class,
        "data.val_images": cfg.val_images,
    }
    train(cfg, "compare_finetune", folder / f"finetune-{kind}", seed=seed, **settings, **start, **data)


def probe_features(cfg: CompareSettings, folder: Path, kind: str, seed: int, data: dict[str, Path]) -> None:
    """Evaluate linear probes and kNN of every layer; for scratch, of the untrained network."""
    out, stage = folder / f"probe-{kind}", f"{folder.name}/probe-{kind}"
    if (out / "layers.csv").is_file():
        print(f"== {stage}: finished before", flush=True)
        return
    print(f"\n== {stage} ==", flush=True)
    checkpoint = folder / kind / "checkpoints/last.ckpt"
    if kind == "scratch":
        checkpoint = untrained(folder / "pretrained/checkpoints/last.ckpt", folder / "untrained.ckpt", seed)
    settings: dict[str, Any] = {"init_from": checkpoint, "out": out, "seed": seed, "threads": cfg.threads, **data}
    settings |= {"train_images": cfg.probe_images, "data.val_images": cfg.probe_images, "data.crop_ratio": 1.0}
    words = [f"{key}={quoted(value)}" for key, value in {**settings, "data.num_workers": cfg.num_workers}.items()]
    clocks = time.perf_counter(), time.process_time()
    probe(compose("probe", words))
    record(cfg, stage, clocks)


def untrained(like: Path, path: Path, seed: int) -> Path:
    """Write a checkpoint of an untrained network of the same architecture."""
    architecture, _, about = read_own(like, "mim")
    torch.manual_seed(seed)
    model = MaskedImageModel(**architecture)
    said = {"kind": "mim", "model": dict(model.config), "mean": about["mean"], "std": about["std"]}
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    AtomicCheckpointIO().save_checkpoint({"beit_pretrain": said, "state_dict": state, "global_step": 0}, path)
    return path


def train(cfg: CompareSettings, experiment: str, folder: Path, **settings) -> None:
    """Run one stage unless it has finished. Appends its duration to `stages.jsonl`."""
    stage = folder.relative_to(cfg.run_dir).as_posix()
    if finished.is_file():
        print(f"== {stage}: finished before", flush=True)
        return
    print(f"\n== {stage} ==", flush=True)
    common = {"name": f"{cfg.name}/{stage}", "run_dir": folder, "seed": cfg.seed, "threads": cfg.threads}
    common |= {"data.num_workers": cfg.num_workers, "trainer.precision": cfg.precision}
    words = [f"{key}={quoted(value)}" for key, value in {**common, **settings}.items()]
    clocks = time.perf_counter(), time.process_time()
    fit(compose("fit", [f"+experiment={experiment}", *words]))
    record(cfg, stage, clocks)


def record(cfg: CompareSettings, stage: str, clocks: tuple[float, float]) -> None:
    """Append the wall-clock and CPU time of a stage since its last start to `stages.jsonl`."""
    took = {"seconds": time.perf_counter() - clocks[0], "cpu_seconds": time.process_time() - clocks[1]}
    with (Path(cfg.run_dir) / STAGES).open("a") as file:
        file.write(json.dumps({"stage": stage, **took}) + "\n")
