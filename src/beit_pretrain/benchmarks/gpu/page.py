"""The page of `bench gpu`, made from the lines of `gpu.jsonl` alone: on the machine itself, or later on another one.

Of each stage it shows the newest line with results. Imports nothing heavy; plots need matplotlib.
"""

from __future__ import annotations

import html
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from beit_pretrain.benchmarks import blocks
from beit_pretrain.benchmarks.blocks import Findings, as_markdown, summary
from beit_pretrain.benchmarks.gpu.plan import STAGES
from beit_pretrain.benchmarks.report import PARTIAL, json_lines, read
from beit_pretrain.errors import UserError, first_line
from beit_pretrain.fileio import flush

LINES, PAGE, HTML = "gpu.jsonl", "page.md", "page.html"
HELD: dict[str, Any] = {"stage": str, "status": str, "seconds": (int, float)}  # what every line has
HEAD = """<!doctype html><meta charset="utf-8"><title>bench gpu</title>
<style>body { font: 14px sans-serif; margin: 2em }
td, th { padding: 2px 10px; text-align: left; vertical-align: top }
tr:nth-child(even) { background: #eee }</style><h1>bench gpu</h1>
"""


def newest(out: Path) -> dict[str, Findings]:
    """Stage -> its newest line with results in a folder's gpu.jsonl, else its newest line; in the order of the stages.

    Torn lines are skipped. Raises UserError if no line is left.
    """
    if not (out / LINES).is_file():
        raise UserError(f"{out / LINES} does not exist; bench gpu writes it")
    found: dict[str, Findings] = {stage.name: {} for stage in STAGES}
    for line in json_lines(out / LINES):
        held = isinstance(line, dict) and all(isinstance(line.get(key), kind) for key, kind in HELD.items())
        if held and (line.get("found") or not found.get(line["stage"], {}).get("found")):
            found[line["stage"]] = line
    if not any(found.values()):
        raise UserError(f"{out / LINES} has no line of a stage")
    return {stage: line for stage, line in found.items() if line}


def append(path: Path, line: dict[str, Any]) -> str:
    """Append a line of JSON and flush it to the disk; returns it."""
    text = json.dumps(line)
    with path.open("a") as file:
        file.write(text + "\n")
        flush(file)
    return text


def keep_leftovers(out: Path) -> None:
    """Turn partial results of a killed run into lines."""
    for path in sorted(out.glob(f"*{PARTIAL}")):
        if found := read(path):
            line = {"run": "earlier", "stage": path.name.removesuffix(PARTIAL), "status": "cut short", "seconds": 0.0}
            append(out / LINES, {**line, **found})
        path.unlink()


def bench_page(cfg: Any) -> None:
    """Write the page of the folder `bench.out` once more. Raises UserError if it has no lines."""
    out = Path(cfg.bench.out)
    keep_leftovers(out)
    write_page(out)
    print(f"{summary(newest(out).values()).markdown()}\nwrote {out / PAGE}")


def write_page(out: Path, plots: bool = True) -> None:
    """Write page.md and page.html (and the plots) of a folder's gpu.jsonl."""
    stages = newest(out)
    if plots and importlib.util.find_spec("matplotlib"):
        try:
            draw_plots(stages, out)
        except Exception as error:  # the tables matter more
            print(f"warning: a plot was not drawn: {type(error).__name__}: {first_line(error)}", file=sys.stderr)
    abouts = {stage.name: stage.about for stage in STAGES}
    overview = summary(stages.values())
    text, page = f"# bench gpu\n\n{overview.markdown()}\n", HEAD + overview.html(out)
    for name, line in stages.items():
        title = f"{name}: {abouts.get(name, '')} ({line['status']}, {line.get('run', '')})"
        shown = [block for block in blocks.blocks_of(line) if not block.plot or (out / block.plot).is_file()]
        text += f"\n## {title}\n\n{as_markdown(shown)}\n"
        page += "\n".join([f"\n<h2>{html.escape(title)}</h2>", *(block.html(out) for block in shown)])
    (out / PAGE).write_text(text)
    (out / HTML).write_text(page + "\n")


def draw_plots(stages: dict[str, Findings], out: Path) -> None:
    found = stages.get("base", {}).get("found", {})
    if found.get("seconds") and found.get("about"):
        step = {**found["about"], **found["images_per_s"], "seconds": found["seconds"]}
        blocks.bars(step, out / blocks.BARS)
    if losses := stages.get("curves", {}).get("found", {}).get("losses"):
        blocks.plot_curves(losses, out / blocks.CURVES)
