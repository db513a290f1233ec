"""Results as tables and plots, in Markdown and HTML. Imports nothing heavy: `bench page` runs without torch.

Steps and attention kernels have tables of their own; other stages of `bench gpu` get a list of names and values.
"""

from __future__ import annotations

import base64
import html
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from beit_pretrain.tables import table
from beit_pretrain.visualization.plots import figure, save

BARS, CURVES = "images_per_s.png", "curves.png"  # plots
OF_CLOCK = {"wall": "", "cpu": " of processor time"}  # of `bench.clock`: what follows "a second" in a unit
INTERVAL = 6  # pairs, of which the smallest and the largest ratio make an interval of 95 % (`measure.compared`)
Findings = dict[str, Any]


class Block(NamedTuple):
    """A table, a text (of several lines: code), or a plot, which is a file beside the page."""

    head: tuple[str, ...] = ()
    rows: list[list[str]] = []
    text: str = ""
    plot: str = ""

    def markdown(self) -> str:
        if self.rows:
            return table(list(self.head), self.rows)
        if self.plot:
            return f"![{self.plot}]({self.plot})"
        return f"```\n{self.text}\n```" if "\n" in self.text else self.text

    def html(self, folder: Path) -> str:
        if self.plot:
            picture = base64.b64encode((folder / self.plot).read_bytes()).decode()
            return f'<img alt="{self.plot}" src="data:image/png;base64,{picture}">'
        if not self.rows:
            tag = "pre" if "\n" in self.text else "p"
            return f"<{tag}>{html.escape(self.text)}</{tag}>"
        lines = [("th", self.head), *(("td", row) for row in self.rows)]
        rows = ("".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) for tag, row in lines)
        return f"<table>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"


Results = tuple[list[Block], Findings]  # of an action of `bench`: tables for people, one JSON object for programs


def as_markdown(blocks: Iterable[Block]) -> str:
    return "\n\n".join(text for block in blocks if (text := block.markdown()))


def milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.4g}"


def tera(value: float) -> str:
    return f"{value / 1e12:.4g}"


def shown(value: Any) -> str:
    """A number to four digits, a large one with its prefix; of a long list its length and its last value."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {shown(each)}" for name, each in value.items())
    if isinstance(value, list):
        return ", ".join(map(shown, value)) if len(value) < 4 else f"{len(value)} values, the last {shown(value[-1])}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if size <= abs(value) < 1e15:
            return f"{value / size:.4g} {prefix}"
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def listed(found: Findings, path: tuple[str, ...] = ()) -> Iterator[list[str]]:
    """Rows of names and values: one row for each value of the two outer levels, one for each group below."""
    single = {name: value for name, value in found.items() if not isinstance(value, dict)}
    if len(path) < 2:
        yield from ([", ".join((*path, name)), shown(value)] for name, value in single.items())
    elif single:
        yield [", ".join(path), shown(single)]
    for name, value in found.items():
        if isinstance(value, dict):
            yield from listed(value, (*path, name))


def other_blocks(found: Findings) -> list[Block]:
    """A list of names and values; texts of several lines follow it."""
    texts = {name: value for name, value in found.items() if isinstance(value, str) and "\n" in value}
    rows = list(listed({name: value for name, value in found.items() if name not in texts}))
    return [Block(("what", "value"), rows), *(Block(text=text) for text in texts.values())]


def utilisation(found: Findings, name: str) -> float | None:
    """Share of the measured matrix-product peak; only for steps whose operations were counted."""
    rate, operations, peak = found["images_per_s"].get(name), found.get("flops_per_image"), found.get("peak_flops")
    return rate * operations / peak if name in ("ours", "ours_cached") and rate and operations and peak else None


def outer_cuts(values: list[float], parts: int) -> tuple[float, float]:
    """The lowest and the highest quantile that cut values into equal parts: 10 % and 90 % for 10 parts."""
    cuts = statistics.quantiles(values, n=parts, method="inclusive") if len(values) > 1 else values
    return cuts[0], cuts[-1]


def interval(ratio: Findings) -> str:
    """What `low` and `high` of a ratio are called in a table."""
    return "95 % interval" if ratio.get("pairs", 0) >= INTERVAL else "range"


def step_blocks(found: Findings) -> list[Block]:
    """Variants of a training step, how many times as fast ours are, memory and operations."""
    about, rows = found.get("about", {}), []
    of_clock = OF_CLOCK[about.get("clock", "wall")]
    for name, first in found.get("started", {}).items():
        row = ["", "", "", ""]
        if values := found.get("seconds", {}).get(name):
            used, (low, high) = utilisation(found, name), map(milliseconds, outer_cuts(values, 10))
            row = [f"{found['images_per_s'][name]:.5g}", milliseconds(statistics.median(values)), f"{low} to {high}"]
            row.append(f"{used:.1%}" if used else "")
        counts = [str(first[count]) for count in ("graphs", "graph_breaks", "recompilations") if count in first]
        rows.append([name, *row, f"{first['first_step']:.1f}", " / ".join(counts)])
    head = ("variant", f"images/s{of_clock}", "ms a step", "10 % to 90 %", "of the peak", "first step, s")
    blocks = [Block(text=shown(about)), Block((*head, "graphs / breaks / recompilations"), rows)]
    ratios = found.get("ratios", {})
    rows = [[p, f"{r['median']:.3f}", f"{r['low']:.3f} to {r['high']:.3f}", str(r["pairs"])] for p, r in ratios.items()]
    blocks.append(Block(("times as fast", "median", interval(next(iter(ratios.values()), {})), "pairs"), rows))
    memory = ", ".join(f"{name} {size / 2**30:.2f} GiB" for name, size in found.get("memory", {}).items())
    facts = [f"Memory: {memory}."] if memory else []
    if "flops_per_image" in found and "peak_flops" in found:
        operations = f"{found['flops_per_image'] / 1e9:.1f} GFLOP an image"
        facts.append(f"{operations}; large matrix products run at {tera(found['peak_flops'])} TFLOP/s{of_clock}.")
    if off := found.get("numbers"):
        facts.append(f"Both settings, a step: loss apart by {off['loss']:.2g}, gradients by {off['gradients']:.2g}.")
    return [*blocks, Block(text=" ".join(facts))]


def attention_blocks(found: Findings) -> list[Block]:
    """Kernels on each case; TFLOP/s of its matrix products, forward and backward."""
    blocks = [Block(text=shown(found.get("about", {})))]
    for queries, kernels in found["queries"].items():
        rows, eager = [], sum(kernels.get("eager", {}).get(part, 0) for part in ("forward", "backward"))
        for name, each in kernels.items():
            if "failed" in each:
                rows.append([name, "", "", "", "", each["failed"][:80]])
                continue
            whole = each["forward"] + each["backward"]
            times = (milliseconds(each[part]) for part in ("forward", "backward"))
            errors = ", ".join(f"{key} {float(value):.1e}" for key, value in each.get("errors", {}).items())
            ratio = f"{eager / whole:.2f}" if eager else ""
            rows.append([name, *times, tera(found["operations"][queries] / whole), ratio, errors])
        head = (f"{queries} queries", "ms forward", "ms backward", "TFLOP/s", "times eager")
        blocks.append(Block((*head, "relative error from float64"), rows))
    return blocks


PLOTS = {"base": BARS, "curves": CURVES}


def blocks_of(line: Findings) -> list[Block]:
    """The page's section on a stage."""
    errors = [["the stage", line["error"]]] if line.get("error") else []
    errors += [[name, error] for name, error in line.get("errors", {}).items()]
    blocks = [Block(("went wrong", "how"), errors)]
    if found := line.get("found"):
        try:
            of_step, of_kernels = "images_per_s" in found and "started" in found, "queries" in found
            blocks += (step_blocks if of_step else attention_blocks if of_kernels else other_blocks)(found)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:  # of a stage that was cut short
            blocks.append(Block(text=f"Not all of it can be shown ({type(error).__name__}: {error})."))
        blocks.append(Block(plot=PLOTS.get(line["stage"], "")))
    return [block for block in blocks if block.rows or block.text or block.plot]


def summary(lines: Iterable[Findings]) -> Block:
    """One row for each stage, with its headline."""
    rows = []
    for line in lines:
        failed = f"failed: {', '.join(line['errors'])}" if line.get("errors") else ""
        said = line.get("error", "")[:100] or "; ".join(filter(None, [line.get("headline"), failed]))
        rows.append([line["stage"], line["status"], f"{line['seconds']:.0f}", said])
    return Block(("stage", "status", "s", "what"), rows)


def bars(step: Findings, path: Path) -> None:
    """Plot images/s of every variant of `bench step`, with what nine of ten rounds took."""
    names = list(step["seconds"])[::-1]
    made, (axes,) = figure(1, 8, 0.5 * len(names) + 1.2)
    axes.barh(names, [step[name] for name in names], color=["tab:blue" if "ours" in n else "silver" for n in names])
    for place, name in enumerate(names):
        ends = [step["batch_size"] / seconds for seconds in outer_cuts(step["seconds"][name], 20)]
        axes.plot(ends, [place, place], color="black")
        axes.text(step[name], place + 0.25, f" {step[name]:.4g}", va="bottom", fontsize=8)
    unit = f"images/s{OF_CLOCK[step['clock']]}"
    axes.set_xlabel(f"{unit} (medians; lines: 90 % of the rounds), batch of {step['batch_size']}, {step['device']}")
    axes.set_title(f"A training step of {step['experiment']}")
    save(made, path)


def plot_curves(losses: dict[str, list[Any]], path: Path) -> None:
    """Plot the loss at every step, a line for each path."""
    made, (axes,) = figure(1, 8, 4)
    for name, values in losses.items():
        axes.plot(range(1, len(values) + 1), list(map(float, values)), label=name, linewidth=1)
    axes.set(xlabel="step", ylabel="loss")
    axes.legend()
    save(made, path)
