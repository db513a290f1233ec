"""`bench all`: every measurement of a training step, and of the loader if there are photos, on one page with a plot."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from beit_pretrain.bench.loader import bench_loader
from beit_pretrain.bench.loop import bench_loop
from beit_pretrain.bench.memory import bench_memory
from beit_pretrain.bench.step import bench_step
from beit_pretrain.compose import compose

PAGE, RESULTS, PLOT = "page.md", "results.json", "images_per_s.png"


class Copied(io.StringIO):
    """What is printed, kept as well as shown."""

    def write(self, text: str) -> int:
        sys.__stdout__.write(text)  # type: ignore[union-attr]
        return super().write(text)


def measured(action: Callable[[DictConfig], None], cfg: DictConfig) -> tuple[str, dict[str, Any]]:
    """The tables that an action prints, and what its last line says."""
    with redirect_stdout(Copied()) as printed:
        action(cfg)
    *lines, last = printed.getvalue().strip().splitlines()
    return "\n".join(lines), json.loads(last)


def bench_all(cfg: DictConfig) -> None:
    """Measure everything and write the page, the plot and all figures into the folder `bench.out`."""
    out = Path(cfg.bench.out)
    out.mkdir(parents=True, exist_ok=True)
    words = f"+experiment={cfg.name} batch_size={cfg.batch_size} bench.rounds={cfg.bench.rounds}"
    parts: dict[str, tuple[Callable[[DictConfig], None], DictConfig]] = {
        f"step {words}": (bench_step, cfg),
        f"loop {words}": (bench_loop, cfg),
    }
    if torch.cuda.is_available() or cfg.bench.memory_gb:
        parts[f"memory {words}"] = (bench_memory, cfg)
    if cfg.bench.src is not None:
        loader = compose("bench", ["action=loader", f"src='{cfg.bench.src}'", f"seed={cfg.seed}"])
        parts["loader src=PHOTOS"] = (bench_loader, loader)
    page, results = ["# Measured\n"], {}
    for command, (action, settings) in parts.items():
        tables, found = measured(action, settings)
        results[found["bench"]] = found
        page += [f"## bench {found['bench']}\n", f"    python -m beit_pretrain bench {command}\n", tables + "\n"]
    about = results["step"]
    page.insert(1, f"{about['device']}, {about['threads']} threads, torch {about['torch']}, {about['precision']}.\n")
    plot(results["step"], out / PLOT)
    page.append(f"![images a second of every variant]({PLOT})\n")
    (out / PAGE).write_text("\n".join(page))
    (out / RESULTS).write_text(json.dumps(results, indent=1) + "\n")
    print(f"wrote {out / PAGE}")
    print(json.dumps({"bench": "all", "page": str(out / PAGE), **{k: v for k, v in about.items() if k != "seconds"}}))


def plot(step: dict[str, Any], path: Path) -> None:
    """Bars of images/s, with what nine of ten steps took."""
    from matplotlib.figure import Figure

    names = list(step["seconds"])[::-1]
    rates = [step[name] for name in names]
    figure = Figure(figsize=(8, 0.5 * len(names) + 1.2), layout="constrained")
    axes = figure.add_subplot()
    own = ["tab:blue" if name.startswith("ours") else "silver" for name in names]
    axes.barh(names, rates, color=own)
    for place, name in enumerate(names):
        each = sorted(step["batch_size"] / seconds for seconds in step["seconds"][name])
        axes.plot([each[len(each) // 20], each[-1 - len(each) // 20]], [place, place], color="black")
        axes.text(rates[place], place + 0.25, f" {rates[place]:.4g}", va="bottom", fontsize=8)
    axes.set_xlabel(f"images/s (medians; lines: 90 % of the rounds), batch of {step['batch_size']}, {step['device']}")
    axes.set_title(f"A training step of {step['experiment']}")
    figure.savefig(path, dpi=120)
