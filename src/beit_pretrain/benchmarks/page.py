"""`bench all`: step, loop, attention and memory, and the loader if there are photos, on one page with a plot.

What has been measured is written after every part: a later one that fails, hours on, costs nothing but itself.
"""

from __future__ import annotations

import io
import json
import shlex
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from beit_pretrain.benchmarks.attention import bench_attention
from beit_pretrain.benchmarks.loader import bench_loader
from beit_pretrain.benchmarks.loop import bench_loop
from beit_pretrain.benchmarks.memory import bench_memory
from beit_pretrain.benchmarks.photos import read_photos
from beit_pretrain.benchmarks.plots import bars
from beit_pretrain.benchmarks.step import bench_step
from beit_pretrain.config import compose, quoted
from beit_pretrain.engine.trainer import wanted_gpu

PAGE, RESULTS, PLOT = "page.md", "results.json", "images_per_s.png"


class Tee(io.StringIO):
    """What is printed, kept as well as shown."""

    def write(self, text: str) -> int:
        sys.__stdout__.write(text)  # type: ignore[union-attr]
        return super().write(text)


def measured(action: Callable[[DictConfig], None], cfg: DictConfig) -> tuple[str, dict[str, Any]]:
    """The tables that an action prints, and what its last line says."""
    with redirect_stdout(Tee()) as printed:
        action(cfg)
    *lines, last = printed.getvalue().strip().splitlines()
    return "\n".join(lines), json.loads(last)


def bench_all(cfg: DictConfig) -> None:
    """Measure everything and write the page, the plot and all figures into the folder `bench.out`.

    Memory on a GPU, or where `bench.memory_gb` says of what; the loader where `bench.src` names photos.
    """
    out = Path(cfg.bench.out)
    out.mkdir(parents=True, exist_ok=True)
    words = shlex.join(word for word in sys.argv[1:] if word not in ("bench", "all", "action=all"))
    parts: dict[str, tuple[Callable[[DictConfig], None], DictConfig]] = {
        f"step {words}": (bench_step, cfg),
        f"loop {words}": (bench_loop, cfg),
        f"attention {words}": (bench_attention, cfg),
    }
    if wanted_gpu(cfg.trainer.accelerator) or cfg.bench.memory_gb:
        parts[f"memory {words}"] = (bench_memory, cfg)
    if cfg.bench.src is not None:
        given = [f"src={quoted(cfg.bench.src)}", f"seed={cfg.seed}"]
        loader = compose("bench", ["action=loader", *given])
        read_photos(loader.src, loader.images)  # what is wrong with them is said now, not after hours
        parts[f"loader {shlex.join([f'src={cfg.bench.src}', given[1]])}"] = (bench_loader, loader)
    page, results = ["# Measured\n"], {}
    for command, (action, settings) in parts.items():
        tables, found = measured(action, settings)
        results[found["bench"]] = found
        page += [f"## bench {found['bench']}\n", f"    python -m beit_pretrain bench {command}\n", tables + "\n"]
        if found["bench"] == "step":  # the first
            facts = f"{found['device']}, {found['threads']} threads, torch {found['torch']}, {found['precision']}.\n"
            page.insert(1, facts)
            bars(found, out / PLOT)
            page.append(f"![images a second of every variant]({PLOT})\n")
        (out / PAGE).write_text("\n".join(page))
        (out / RESULTS).write_text(json.dumps(results, indent=1) + "\n")
    about = {name: value for name, value in results["step"].items() if name != "seconds"}
    print(f"wrote {out / PAGE}")
    print(json.dumps({**about, "bench": "all", "page": str(out / PAGE)}))
