"""The demo: the main job from images to a classifier, on two cores in a quarter of an hour, ending with a report.

Shards -> dVAE -> masked image modelling -> fine-tuning on few labels, beside the same network from scratch with the
same labels and steps. Every stage is the verb that a user would type, with a small experiment. The same command goes on
with a demo that was stopped.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from beit_pretrain.config import compose
from beit_pretrain.data.reader import ShardReader
from beit_pretrain.data.sources import check_sources
from beit_pretrain.data.write.contact_sheet import contact_sheet
from beit_pretrain.data.write.make_shards import make_shards
from beit_pretrain.engine.fit import fit
from beit_pretrain.engine.visualize import visualize
from beit_pretrain.errors import UserError
from beit_pretrain.examples import report
from beit_pretrain.examples.settings import DemoSettings
from beit_pretrain.fileio import atomic_write
from beit_pretrain.overrides import quoted
from beit_pretrain.settings import to_dict

MARK = "demo.yaml"  # its config; says that the folder is a demo's
STAGES = "stages.json"  # seconds in every stage
FOLDERS = ("data", "tokenizer", "pretrain", report.PICTURES)
ACCURACIES = tuple(f"{name}_token_accuracy" for name in ("masked", "majority", "copy"))


def demo(cfg: DemoSettings) -> dict:
    """Run all stages and write `report.html` and `report.json` into the run folder. Returns the report's numbers.

    A demo of the same settings that was stopped goes on: finished stages are kept, a half-done one resumes.
    """
    check_sources([cfg.src] if isinstance(cfg.src, str) else cfg.src)  # a typo must not cost the last demo's results
    run_dir = open_folder(cfg)
    spent = Stopwatch(run_dir / STAGES)
    try:
        with spent.stage("1/4 shards", "shards"):
            data = write_shards(cfg, run_dir / "data")
    except UserError:  # sources that list but do not decode: leave nothing behind
        if {file.name for file in run_dir.iterdir()} <= {MARK, STAGES}:
            shutil.rmtree(run_dir)
        raise
    tokenizer_cfg = stage_config(cfg, "demo_tokenizer", "tokenizer", steps=cfg.steps.tokenizer, **data)
    with spent.stage("2/4 tokenizer: a dVAE", "tokenizer"):
        fit(tokenizer_cfg)
    path = run_dir / "tokenizer/checkpoints/last.ckpt"
    with spent.stage("3/4 pre-training: predict the tokens of masked patches", "pretrain"):
        steps = {"steps": cfg.steps.pretrain, "tokenizer.path": path}
        fit(stage_config(cfg, "demo_pretrain", "pretrain", **steps, **data))
    with spent.stage("4/4 fine-tuning on few labels, and the same from scratch", "finetune"):
        classes = finetune_both_ways(cfg, run_dir, data)
        for name in ("tokenizer", "pretrain"):  # pictures that no run has drawn by itself
            visualize(compose("visualize", ["what=masked", f"run={quoted(run_dir / name)}", "images=6"]))
    pretrained = run_dir / "pretrain/metrics.csv"
    shards = ShardReader(data["data.train"])
    numbers = {
        "source": shards.manifest["source"],
        "training_images": shards.samples,
        **{name: report.measured(pretrained, f"val/{name}") for name in (*ACCURACIES, "codebook_perplexity")},
        "codebook_distinct": int(report.measured(pretrained, "val/codebook_distinct")),
        "vocab_size": int(tokenizer_cfg.model.vocab_size),
        "reconstruction_mse": report.measured(run_dir / "tokenizer/metrics.csv", "val/reconstruction"),
        "knn_accuracy": report.last_value(pretrained, "val/knn_accuracy"),
        **classes,
        "seed": int(cfg.seed),
        "steps": to_dict(cfg.steps),
        "stage_starts_s": {name: round(seconds, 1) for name, seconds in spent.starts().items()},
        "seconds": round(spent.total(), 1),
        **report.machine(cfg.threads),
    }
    page = report.write(numbers, run_dir)
    print(f"\n{report.summary(numbers)}\n\nreport: {page}", flush=True)
    return numbers


class Stopwatch:
    """Seconds in every stage, over all calls of a demo that was stopped; kept in a JSON file."""

    def __init__(self, file: Path):
        self.file = file
        try:
            self.seconds: dict[str, float] = {n: float(s) for n, s in json.loads(file.read_bytes()).items()}
        except (OSError, ValueError, AttributeError, TypeError):  # a new demo, or a damaged file
            self.seconds = {}

    def total(self) -> float:
        return sum(self.seconds.values())

    def starts(self) -> dict[str, float]:
        """The start of every stage and the end, in seconds since the start, without what lay between two calls."""
        return dict(zip([*self.seconds, "end"], accumulate([0.0, *self.seconds.values()]), strict=True))

    @contextmanager
    def stage(self, title: str, name: str) -> Iterator[None]:
        """Print the title of a stage, and add the time that its block takes, also if it is stopped."""
        print(f"\n== {title} ({self.total():.0f} s since the start) ==", flush=True)
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
            atomic_write(self.file, json.dumps(self.seconds))


def open_folder(cfg: DemoSettings) -> Path:
    """The run folder, with the stages of a demo of the same settings, and without those of another demo.

    Raises UserError if the folder holds anything else.
    """
    run_dir, settings = Path(cfg.run_dir), to_dict(cfg)
    if (run_dir / MARK).is_file():
        for old in (run_dir / "report.json", run_dir / "report.html"):  # a demo that fails must not seem to have ended
            old.unlink(missing_ok=True)
        if without_machine(settings) == without_machine(read_settings(run_dir / MARK)):
            print(f"going on with the demo in {run_dir}", flush=True)
        else:
            for old in [run_dir / name for name in FOLDERS] + sorted(run_dir.glob("finetune-*")):
                shutil.rmtree(old, ignore_errors=True)
            (run_dir / STAGES).unlink(missing_ok=True)
    elif run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        raise UserError(f"run_dir={run_dir} exists and is not from an earlier demo; choose another name=")
    run_dir.mkdir(parents=True, exist_ok=True)
    atomic_write(run_dir / MARK, yaml.safe_dump(settings, sort_keys=False))
    return run_dir


def read_settings(file: Path) -> dict[str, Any]:
    """The settings of the demo that a folder holds; empty if the file is damaged."""
    try:
        content = yaml.safe_load(file.read_bytes())
    except (yaml.YAMLError, ValueError):
        content = None
    return content if isinstance(content, dict) else {}


def without_machine(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings on which the results depend."""
    return {name: value for name, value in settings.items() if name not in ("threads", "num_workers")}


def write_shards(cfg: DemoSettings, out: Path) -> dict[str, Path]:
    """Make the shards; returns the settings that point to them."""
    if cfg.src == "synthetic":
        images = cfg.images + cfg.val_images
        make_shards("synthetic", out, images=images, val=cfg.val_images / images, seed=cfg.seed, size=cfg.resize)
    else:
        make_shards(cfg.src, out, val=0.1, seed=cfg.seed, resize=cfg.resize)
    contact_sheet(out / "train", out / "contact-sheet.png")
    return {"data.train": out / "train", "data.val": out / "val"}


def stage_config(cfg: DemoSettings, experiment: str, stage: str, **settings) -> Any:
    """The composed config of one stage, with a folder of its own inside the demo's."""
    common = {
        "name": f"{cfg.name}/{stage}",
        "run_dir": Path(cfg.run_dir) / stage,
        "seed": cfg.seed,
        "threads": cfg.threads,
        "data.num_workers": cfg.num_workers,
    }
    words = [f"{key}={quoted(value)}" for key, value in {**common, **settings}.items()]
    return compose("fit", [f"+experiment={experiment}", *words])


def finetune_both_ways(cfg: DemoSettings, run_dir: Path, data: dict[str, Path]) -> dict:
    """Fine-tune with and without pre-training, over the seeds. None for accuracies where the labels do not allow it."""
    train, val = (ShardReader(data[f"data.{split}"]) for split in ("train", "val"))
    classes, loose = len(train.classes), train.without_class + val.without_class
    counts, held_out = (reader.manifest["class_counts"] for reader in (train, val))
    if loose or np.count_nonzero(np.minimum(counts, held_out)) < 2:
        note = f"{loose} images have no class" if loose else "fewer than two classes have images in both splits"
        note += ": nothing to fine-tune on"
        print(note)
        nothing = {"finetune_accuracy": None, "scratch_accuracy": None, "labelled_images": 0}
        return {**nothing, "classes": classes, "finetune_note": note}
    labels_per_class = max(1, min(cfg.labels_per_class, cfg.max_labelled // classes))
    settings = {**data, "data.labels_per_class": labels_per_class, "data.val_images": cfg.val_images}
    settings["steps"] = cfg.steps.finetune
    accuracies: dict[str, list[float]] = {"finetune": [], "scratch": []}
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        for kind, extra in (
            ("finetune", {"init_from": run_dir / "pretrain/checkpoints/last.ckpt"}),
            # From scratch there is nothing for a layer decay to protect: without it the baseline is stronger.
            ("scratch", {"from_scratch": True, "optim.layer_decay": None}),
        ):
            run = stage_config(cfg, "demo_finetune", f"finetune-{kind}-{seed}", seed=seed, **settings, **extra)
            fit(run)
            accuracies[kind].append(report.measured(run.folder / "metrics.csv", "val/accuracy"))
    return {
        **{f"{kind}_accuracy": float(np.mean(values)) for kind, values in accuracies.items()},
        **{f"{kind}_accuracies": values for kind, values in accuracies.items()},
        "chance_accuracy": 1 / classes,
        "classes": classes,
        "labelled_images": sum(min(count, labels_per_class) for count in counts),
        "held_out_images": min(val.samples, cfg.val_images),
    }
