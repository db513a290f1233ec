"""Plots of measurements. matplotlib is imported when one is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

OF_CLOCK = {"wall": "", "cpu": " of processor time"}  # of `bench.clock`: what follows "a second" in a unit


def bars(step: dict[str, Any], path: Path) -> None:
    """Bars of images/s of every variant of `bench step`, with what nine of ten rounds took."""
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
    unit = f"images/s{OF_CLOCK[step['clock']]}"
    axes.set_xlabel(f"{unit} (medians; lines: 90 % of the rounds), batch of {step['batch_size']}, {step['device']}")
    axes.set_title(f"A training step of {step['experiment']}")
    figure.savefig(path, dpi=120)


def curves(losses: dict[str, list[float]], path: Path) -> None:
    """The loss at every step, a line for each path."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, values in losses.items():
        axes.plot(range(1, len(values) + 1), values, label=name, linewidth=1)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.legend()
    figure.savefig(path, dpi=120)
