"""The verb `compare`: pre-train, fine-tune, probe, and train from scratch, over several seeds, with a control.

Every stage is a verb that a user would type, with a small experiment, and is not repeated once it has finished: the
same command resumes it. The tokenizer is shared, everything else is trained anew for each seed.

* pretrained: masked image modelling, then fine-tuning on few labels.
* control: the same with shuffled targets (`tokenizers.shuffled`): as much computing, nothing to learn of an image.
* scratch: fine-tuning alone, with the same labels, steps and batches.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from beit_pretrain.config import compose
from beit_pretrain.data.manifest import read_manifest
from beit_pretrain.data.write.make_shards import make_shards
from beit_pretrain.engine.fit import fit
from beit_pretrain.engine.run_folder import FINISHED
from beit_pretrain.errors import UserError
from beit_pretrain.evaluation.probe_layers import probe
from beit_pretrain.examples.compare_results import KINDS, report
from beit_pretrain.examples.settings import CompareSettings
from beit_pretrain.models.backbone import MaskedImageModel
from beit_pretrain.models.checkpoints.files import AtomicCheckpointIO, read_own
from beit_pretrain.overrides import quoted
from beit_pretrain.settings import renamed, to_dict

MARK = "compare.yaml"  # its config; says that the folder is a comparison's
STAGES = "stages.jsonl"  # time that each finished stage took
FREE = ("precision", "threads", "num_workers", "seeds", "probe_images")  # may differ when a comparison resumes


def compare(cfg: CompareSettings) -> dict:
    """Run what is not finished yet, and write `results.json`, `RESULTS.md`, `accuracy.png` and `layers.png`.

    Returns what `results.json` holds. Raises UserError for settings other than the folder's.
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
    """The comparison's folder. Raises UserError if it holds a comparison of other settings, or anything else.

    A comparison that has not made a file yet, for instance of a source that is not there, is none.
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
    """Make the shards, if they are not there; returns the settings that point to them."""
    make_shards(cfg.src, out)
    make_shards(cfg.held_out or cfg.src, out, split="val")
    return {"data.train": out / "train", "data.val": out / "val"}


def check_classes(cfg: CompareSettings, data: dict[str, Path]) -> None:
    """Raise UserError for classes that cannot be told apart, or that are other ones in the held-out images."""
    train, val = (read_manifest(folder)["classes"] for folder in data.values())
    if len(train) < 2:
        raise UserError(f"src={cfg.src} has {len(train)} classes; a comparison needs at least 2")
    if val != train:
        raise UserError(f"held_out={cfg.held_out} has other classes than src={cfg.src}")


def run_seed(cfg: CompareSettings, folder: Path, kind: str, seed: int, data: dict[str, Path]) -> None:
    """Pre-training, where this kind has one, and fine-tuning."""
    start: dict = {"from_scratch": True, "optim.layer_decay": None}  # there is nothing for a layer decay to protect
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
    """Linear probes and kNN of every layer; from scratch, of the network before any training."""

    def work() -> None:
        checkpoint = folder / kind / "checkpoints/last.ckpt"
        if kind == "scratch":
            checkpoint = untrained(folder / "pretrained/checkpoints/last.ckpt", folder / "untrained.ckpt", seed)
        settings: dict[str, Any] = {"init_from": checkpoint, "out": out, "seed": seed, "threads": cfg.threads, **data}
        settings |= {"train_images": cfg.probe_images, "data.val_images": cfg.probe_images, "data.crop_ratio": 1.0}
        settings |= {"data.num_workers": cfg.num_workers}
        probe(compose("probe", [f"{key}={quoted(value)}" for key, value in settings.items()]))

    out = folder / f"probe-{kind}"
    run_stage(cfg, out, out / "layers.csv", work)


def untrained(like: Path, path: Path, seed: int) -> Path:
    """Write a network of the same architecture that has learned nothing."""
    architecture, _, about = read_own(like, "mim")
    torch.manual_seed(seed)
    model = MaskedImageModel(**architecture)
    said = {"kind": "mim", "model": dict(model.config), "mean": about["mean"], "std": about["std"]}
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    AtomicCheckpointIO().save_checkpoint({"beit_pretrain": said, "state_dict": state, "global_step": 0}, path)
    return path


def train(cfg: CompareSettings, experiment: str, folder: Path, **settings) -> None:
    """One run of `fit`, unless it has finished."""
    common = {"name": f"{cfg.name}/{folder.relative_to(cfg.run_dir).as_posix()}", "run_dir": folder}
    common |= {"seed": cfg.seed, "threads": cfg.threads, "data.num_workers": cfg.num_workers}
    given = {**common, "trainer.precision": cfg.precision, **settings}
    words = [f"+experiment={experiment}", *(f"{key}={quoted(value)}" for key, value in given.items())]
    run_stage(cfg, folder, folder / FINISHED, lambda: fit(compose("fit", words)))


def run_stage(cfg: CompareSettings, folder: Path, finished: Path, work: Callable[[], object]) -> None:
    """Do the work of a stage unless its last file exists; add its seconds, wall and CPU, to `stages.jsonl`."""
    stage = folder.relative_to(cfg.run_dir).as_posix()
    if finished.is_file():
        print(f"== {stage}: finished before", flush=True)
        return
    print(f"\n== {stage} ==", flush=True)
    wall, processor = time.perf_counter(), time.process_time()
    work()
    took = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - processor}
    with (Path(cfg.run_dir) / STAGES).open("a") as file:
        file.write(json.dumps({"stage": stage, **took}) + "\n")
