"""What a comparison found: numbers, tables, pictures, and whether they are what pre-training promises."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from beit_pretrain.training.metrics import curve


def last_value(path: Path, metric: str) -> float | None:
    """The last value of a metric of a run, None if it was never measured."""
    values = curve(path, metric)[1] if path.is_file() else []
    return values[-1] if values else None


def report(cfg: DictConfig, run_dir: Path, seeds: list[int]) -> dict:
    out = {}
    for k in ("pretrained", "control", "scratch"):
        out[k] = [last_value(run_dir / f"seed-{s}" / f"finetune-{k}" / "metrics.csv", "val/accuracy") for s in seeds]
    print(out)
    return out
