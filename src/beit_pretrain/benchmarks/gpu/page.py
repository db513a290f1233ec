"""The page of `bench gpu`, made from the lines of `gpu.jsonl` alone: on the machine itself, or later on another one.

Of each stage the newest line that has findings counts. Imports nothing heavy; plots are drawn where matplotlib is.
"""

from __future__ import annotations

import base64
import html
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from beit_pretrain import fileio
from beit_pretrain.benchmarks.gpu.blocks import BARS, CURVES, Block, Line, blocks_of, restored, summary
from beit_pretrain.benchmarks.gpu.plan import STAGES
from beit_pretrain.benchmarks.gpu.report import PARTIAL, read
from beit_pretrain.errors import UserError, first_line
from beit_pretrain.tables import table

LINES, PAGE, HTML = "gpu.jsonl", "page.md", "page.html"
HELD: dict[str, Any] = {"stage": str, "status": str, "seconds": (int, float)}  # what every line has


def lines_of(out: Path) -> list[Line]:
    """The lines of a folder's gpu.jsonl; a torn last one is left out. Raises UserError if there is none."""
    try:
        text = (out / LINES).read_text()
    except OSError:
        raise UserError(f"{out / LINES} does not exist; bench gpu writes it") from None
    found = []
    for line in text.splitlines():
        try:
            parsed = json.loads(line)
        except ValueError:
            continue
        if isinstance(parsed, dict) and all(isinstance(parsed.get(name), kind) for name, kind in HELD.items()):
            found.append(parsed)
    if not found:
        raise UserError(f"{out / LINES} has no line of a stage")
    return found


def newest(lines: list[Line]) -> dict[str, Line]:
    """Stage -> its newest line that has findings, else its newest line; in the order of the stages."""
    found: dict[str, Line] = {}
    for line in lines:
        if line.get("found") or not found.get(line["stage"], {}).get("found"):
            found[line["stage"]] = line
    order = [stage.name for stage in STAGES]
    return dict(sorted(found.items(), key=lambda pair: order.index(pair[0]) if pair[0] in order else len(order)))


def append(path: Path, line: dict[str, Any]) -> str:
    """Append a line of JSON and have it on the disk. Returns it."""
    text = json.dumps(line)
    with path.open("a") as file:
        file.write(text + "\n")
        fileio.flush(file)
    return text


def keep_leftovers(out: Path) -> None:
    """Make lines of what stages of a run had found that was killed itself."""
    for path in sorted(out.glob(f"*{PARTIAL}")):
        found = read(path)
        if found:
            name = path.name.removesuffix(PARTIAL)
            append(out / LINES, {"run": "earlier", "stage": name, "status": "cut short", "seconds": 0.0, **found})
        path.unlink()


def bench_page(cfg: DictConfig) -> None:
    """Write the page of the folder `bench.out` once more. Raises UserError if it has no lines."""
    out = Path(cfg.bench.out)
    keep_leftovers(out)
    write_page(out)
    print(as_markdown(summary(newest(lines_of(out)).values())))
    print(f"wrote {out / PAGE}")


def write_page(out: Path, plots: bool = True) -> None:
    """Write page.md and page.html (and the plots) of a folder's gpu.jsonl."""
    stages = newest(lines_of(out))
    if plots and importlib.util.find_spec("matplotlib"):
        try:
            draw(stages, out)
        except Exception as error:  # the tables matter more
            print(f"warning: a plot was not drawn: {type(error).__name__}: {first_line(error)}", file=sys.stderr)
    abouts = {stage.name: stage.about for stage in STAGES}
    overview = summary(stages.values())
    text, body = ["# bench gpu\n", as_markdown(overview) + "\n"], [as_html(overview, out)]
    for name, line in stages.items():
        title = f"{name}: {abouts.get(name, '')} ({line['status']}, {line.get('run', '')})"
        text.append(f"## {title}\n")
        body.append(f"<h2>{html.escape(title)}</h2>")
        for block in blocks_of(line):
            if not block.plot or (out / block.plot).is_file():
                text.append(as_markdown(block) + "\n")
                body.append(as_html(block, out))
    (out / PAGE).write_text("\n".join(text))
    (out / HTML).write_text(HTML_PAGE.format(body="\n".join(body)))


def draw(stages: dict[str, Line], out: Path) -> None:
    """The plots for which there are findings."""
    from beit_pretrain.benchmarks.plots import bars, curves

    found = stages.get("base", {}).get("found", {})
    if found.get("seconds") and found.get("about"):
        bars({**found["about"], **found["images_per_s"], "seconds": found["seconds"]}, out / BARS)
    losses = stages.get("curves", {}).get("found", {}).get("losses")
    if losses:
        curves(restored(losses), out / CURVES)


def as_markdown(block: Block) -> str:
    if block.rows:
        return table(list(block.head), block.rows)
    if block.plot:
        return f"![{block.plot}]({block.plot})"
    return f"```\n{block.code}\n```" if block.code else block.text


HTML_PAGE = """<!doctype html><meta charset="utf-8"><title>bench gpu</title>
<style>body {{ font: 14px sans-serif; margin: 2em }}
td, th {{ padding: 2px 10px; text-align: left; vertical-align: top }}
tr:nth-child(even) {{ background: #eee }}</style><h1>bench gpu</h1>
{body}
"""


def as_html(block: Block, out: Path) -> str:
    if block.rows:
        return of_table(block)
    if block.plot:
        picture = base64.b64encode((out / block.plot).read_bytes()).decode()
        return f'<img alt="{block.plot}" src="data:image/png;base64,{picture}">'
    return f"<pre>{html.escape(block.code)}</pre>" if block.code else f"<p>{html.escape(block.text)}</p>"


def of_table(block: Block) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in block.head)
    rows = ("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in block.rows)
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"
