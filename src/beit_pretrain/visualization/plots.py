"""Plots: curves of several runs in one picture, accuracy by layer, accuracy of several ways to start.

matplotlib's Figure is used without pyplot: no display is needed, no global state touched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from beit_pretrain.tables import curve, read_rows

# What "loss" and "accuracy" are called in a run's metrics.csv: the first that a run has, if possible of both splits.
PANELS = {"loss": ("loss", "reconstruction"), "accuracy": ("masked_token_accuracy", "accuracy", "miou")}
STYLES: dict[str, dict[str, Any]] = {"train": {"linestyle": "-"}, "val": {"linestyle": "--", "marker": "o"}}


def figure(columns: int, width: float = 5.2, height: float = 3.6) -> tuple[Any, Sequence[Any]]:
    """A figure and its row of axes."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(width * columns, height), layout="constrained", dpi=110)
    return made, made.subplots(1, columns, squeeze=False)[0]


def save(made: Any, path: Path) -> Path:
    """Write a figure as PNG (or as its suffix says), making its folder; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made.savefig(path)
    return path


def curves_plot(runs: Mapping[str, Path], path: Path, metrics: Sequence[str] | None = None) -> Path:
    """Curves of several runs in one picture: {name: its metrics.csv}; a colour for each run.

    `metrics`: one panel for each. None = a panel for the loss and one for the accuracy, of training (solid) and of
    held-out images (dashed); a run without a measure of both shows one of each. Raises ValueError if no run has any of
    the metrics.
    """
    known = {name: read_rows(file)[0] for name, file in runs.items()}
    panels: list[tuple[str, list[tuple[str, ...]]]] = [(metric, [(metric,)]) for metric in metrics or ()]
    if not metrics:
        panels = [(title, [tuple(f"{p}/{n}" for n in names) for p in STYLES]) for title, names in PANELS.items()]
    panels = [(title, groups) for title, groups in panels if any(alike(known[run], groups) for run in runs)]
    if not panels:
        raise ValueError(f"none of {', '.join(metrics or PANELS)} is in the metrics of {', '.join(runs)}")
    made, axes_row = figure(len(panels))
    for axes, (title, groups) in zip(axes_row, panels, strict=True):
        for number, (name, file) in enumerate(runs.items()):
            named = set()
            for metric in alike(known[name], groups):
                label = f"{name}: {metric.split('/')[-1]}"
                style = STYLES["val" if metric.startswith("val/") else "train"] | {"color": f"C{number % 10}"}
                style["label"] = None if label in named else label  # the title tells the two splits apart
                axes.plot(*curve(file, metric), markersize=4, **style)
                named.add(label)
        axes.set(title=title if metrics else f"{title} (solid: training, dashed: held out)", xlabel="step")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return save(made, path)


def alike(columns: Sequence[str], groups: Sequence[Sequence[str]]) -> list[str]:
    """One metric of each group: the first measure that a run has in all groups, else the first that it has in each."""
    for metrics in zip(*groups, strict=True):
        if all(metric in columns for metric in metrics):
            return list(metrics)
    found = [[metric for metric in group if metric in columns] for group in groups]
    return [metrics[0] for metrics in found if metrics]


def layers_plot(
    starts: Mapping[str, Mapping[str, Sequence[float]]], path: Path, numbers: Sequence[int] | None = None
) -> Path:
    """Accuracy by layer: {start: {"linear probe": values, ...}}, a panel for each measure, a line for each start.

    `numbers` of the layers; None = from 1.
    """
    measures = list(dict.fromkeys(measure for found in starts.values() for measure in found))
    made, axes_row = figure(len(measures), width=4.6)
    for axes, measure in zip(axes_row, measures, strict=True):
        lines = {start: found[measure] for start, found in starts.items() if measure in found}
        for number, (start, values) in enumerate(lines.items()):
            places = numbers or range(1, len(values) + 1)
            axes.plot(places, [100 * v for v in values], marker="o", color=f"C{number % 10}", label=start)
        axes.set(title=measure, xlabel="layer", ylabel="top-1 accuracy, %")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return save(made, path)


def bars_plot(groups: Mapping[str, Sequence[float]], chance: float, path: Path, title: str) -> Path:
    """Mean of each group as a bar, its single values as dots, chance as a line."""
    made, (axes,) = figure(1)
    for number, values in enumerate(groups.values()):
        percent = [100 * v for v in values]
        axes.bar(number, sum(percent) / len(percent), width=0.6, color=f"C{number}", alpha=0.7)
        axes.plot([number] * len(percent), percent, "k.", markersize=8)
    axes.axhline(100 * chance, color="grey", linestyle=":", label="chance")
    axes.set(title=title, ylabel="top-1 accuracy, %", xticks=range(len(groups)), xticklabels=list(groups))
    axes.legend(fontsize=8)
    return save(made, path)
