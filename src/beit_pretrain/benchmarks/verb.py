"""The verb `bench`: what is measured about this project, one module an action.

Every action prints tables for people and, as its last line, one JSON object for programs. `bench all` also writes what
several of them find on one page, after each: if a later one fails, hours on, nothing else is lost.
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from beit_pretrain.benchmarks.blocks import BARS, Block, Results, as_markdown, bars
from beit_pretrain.config import compose
from beit_pretrain.errors import UserError
from beit_pretrain.overrides import quoted

ACTIONS = {  # action -> module:function, taking the composed config
    "views": "beit_pretrain.benchmarks.views:bench_views",
    "loader": "beit_pretrain.benchmarks.loader:bench_loader",
    "step": "beit_pretrain.benchmarks.step:bench_step",
    "loop": "beit_pretrain.benchmarks.loop:bench_loop",
    "attention": "beit_pretrain.benchmarks.attention:bench_attention",
    "memory": "beit_pretrain.benchmarks.memory:bench_memory",
    "all": "beit_pretrain.benchmarks.verb:bench_all",
    "gpu": "beit_pretrain.benchmarks.gpu.runner:bench_gpu",
    "page": "beit_pretrain.benchmarks.gpu.page:bench_page",
}
PAGE, RESULTS = "page.md", "results.json"


def bench(cfg: Any) -> None:
    if cfg.action not in ACTIONS:
        raise UserError(f"bench {cfg.action}: there are {', '.join(ACTIONS)}")
    if isinstance(getattr(cfg, "src", None), list):
        raise UserError("bench takes one src=: a folder, a tar or a shard folder")
    if outcome := resolve_name(ACTIONS[cfg.action])(cfg):
        blocks, found = outcome
        print(f"{as_markdown(blocks)}\n{json.dumps(found)}")


def bench_all(cfg: Any) -> Results:
    """Write page, plot and all figures of step, loop and attention into the folder `bench.out`.

    And of memory on a GPU, or where `bench.memory_gb` says of what; of the loader where `bench.src` names photos.
    """
    from beit_pretrain.benchmarks.loader import read_photos
    from beit_pretrain.engine.trainer import wanted_gpu

    out = Path(cfg.bench.out)
    out.mkdir(parents=True, exist_ok=True)
    words = shlex.join(word for word in sys.argv[1:] if word not in ("bench", "all", "action=all"))
    parts = dict.fromkeys(("step", "loop", "attention"), (cfg, words))
    if wanted_gpu(cfg.trainer.accelerator) or cfg.bench.memory_gb:
        parts["memory"] = cfg, words
    if cfg.bench.src is not None:
        given = f"seed={cfg.seed}"
        loader = compose("bench", ["action=loader", f"src={quoted(cfg.bench.src)}", given])
        read_photos(loader.src, loader.images)  # what is wrong with them is said now, not after hours
        parts["loader"] = loader, shlex.join([f"src={cfg.bench.src}", given])
    page, results = "# Measured\n", dict[str, Any]()
    for action, (settings, given) in parts.items():
        blocks, results[action] = resolve_name(ACTIONS[action])(settings)
        if action == "step":
            bars(results[action], out / BARS)
            blocks = [*blocks, Block(plot=BARS)]
        text = as_markdown(blocks)
        print(f"{text}\n", flush=True)
        page += f"\n## bench {action}\n\n    python -m beit_pretrain bench {action} {given}\n\n{text}\n"
        (out / PAGE).write_text(page)
        (out / RESULTS).write_text(json.dumps(results, indent=1) + "\n")
    about = {name: value for name, value in results["step"].items() if name != "seconds"}
    return [Block(text=f"wrote {out / PAGE}")], {**about, "bench": "all", "page": str(out / PAGE)}
