"""The demo's report: one self-contained HTML page and one JSON file, with what was measured and what it promises.

`python -m beit_pretrain.examples.report runs/demo/report.json` checks the promises of a written report (exit code 1
if one is broken): continuous integration catches a broken demo by it.
"""

from __future__ import annotations

import base64
import html
import io
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any, NamedTuple

from beit_pretrain.tables import curve, read_rows
from beit_pretrain.visualization.plots import figure


class AcceptanceCheck(NamedTuple):
    """One thing the demo is to show, and whether it did. `kept` is None where it does not apply."""

    text: str
    kept: bool | None


def promises(numbers: dict) -> list[AcceptanceCheck]:
    """What the demo's numbers are held against."""
    masked = numbers["masked_token_accuracy"]
    majority, copy = numbers["majority_token_accuracy"], numbers["copy_token_accuracy"]
    kept: list[bool | None] = [None, None]
    if numbers.get("finetune_accuracy") is not None:
        tuned, scratch, chance = (numbers[f"{kind}_accuracy"] for kind in ("finetune", "scratch", "chance"))
        kept = [tuned > scratch, min(tuned, scratch) >= 2 * chance]
    return [
        AcceptanceCheck(
            f"masked-token accuracy {masked:.1%} is at least 3 x the majority's {majority:.1%}", masked >= 3 * majority
        ),
        AcceptanceCheck(
            f"... and at least 1.25 x that of copying the nearest visible token, {copy:.1%}", masked >= 1.25 * copy
        ),
        AcceptanceCheck(
            f"codebook perplexity {numbers['codebook_perplexity']:.0f} is at least a quarter of "
            f"{numbers['vocab_size']} tokens",
            numbers["codebook_perplexity"] >= 0.25 * numbers["vocab_size"],
        ),
        AcceptanceCheck("fine-tuned accuracy is above that from scratch", kept[0]),
        AcceptanceCheck("both are at least twice chance", kept[1]),
    ]


def summary(numbers: dict) -> str:
    """The numbers as a person reads them on the terminal."""
    lines = [
        f"masked-token accuracy {numbers['masked_token_accuracy']:.1%} on held-out images "
        f"(most frequent token {numbers['majority_token_accuracy']:.1%}, nearest visible token "
        f"{numbers['copy_token_accuracy']:.1%})",
        f"codebook perplexity {numbers['codebook_perplexity']:.0f} of {numbers['vocab_size']} tokens",
    ]
    if numbers.get("finetune_accuracy") is None:
        lines.append(f"fine-tuning skipped: {numbers.get('finetune_note', 'no labels')}")
    else:
        lines.append(
            f"fine-tuned {numbers['finetune_accuracy']:.1%}, from scratch {numbers['scratch_accuracy']:.1%}, chance "
            f"{numbers['chance_accuracy']:.1%} (mean of {len(numbers['finetune_accuracies'])} seeds, "
            f"{numbers['labelled_images']} labelled images of {numbers['classes']} classes)"
        )
    marks = {True: "yes", False: "NO", None: "-"}
    lines += [f"  [{marks[p.kept]:>3}] {p.text}" for p in promises(numbers)]
    return "\n".join([*lines, f"{numbers['seconds']:.0f} seconds, seed {numbers['seed']}"])


def last_value(path: Path, metric: str) -> float | None:
    """The last value of a metric of a run, None if it was never measured."""
    values = curve(path, metric)[1] if path.is_file() else []
    return values[-1] if values else None


def machine(threads: int | None) -> dict:
    """Where the numbers were measured."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine() + " CPU"
    return {"device": device, "cores": os.cpu_count(), "threads": threads, "torch": torch.__version__}


def write(numbers: dict, run_dir: Path) -> Path:
    """Write `report.json` and `report.html` into the run folder; returns the page's path."""
    (run_dir / "report.json").write_text(json.dumps(numbers, indent=2) + "\n")
    page = run_dir / "report.html"
    page.write_text(render(numbers, run_dir))
    return page


def render(numbers: dict, run_dir: Path) -> str:
    """The HTML page; pictures are inside it as data."""
    sections = [
        ("Held against its promises", checklist(numbers)),
        ("What was measured", table(numbers)),
        ("The images", picture(run_dir / "data/contact-sheet.png", "training images from the shards")),
        (
            "The tokenizer",
            picture(run_dir / "tokenizer/pictures/masked.png", "held-out images and what their tokens keep"),
        ),
        ("Pre-training", curves(run_dir / "pretrain/metrics.csv")),
        ("", picture(run_dir / "pretrain/pictures/masked.png", "held-out images after the last step")),
        ("Fine-tuning", bars(numbers) + finetune_curves(run_dir)),
    ]
    body = "\n".join((f"<h2>{title}</h2>" if title else "") + content for title, content in sections)
    return PAGE.format(source=html.escape(str(numbers["source"])), body=body)


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>beit_pretrain: demo</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
h1 {{ font-size: 1.6rem; }} h2 {{ font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd; }}
table {{ border-collapse: collapse; }} td {{ padding: .15rem 1.2rem .15rem 0; vertical-align: top; }}
td + td {{ font-variant-numeric: tabular-nums; }} .yes {{ color: #18733a; }} .no {{ color: #b3261e; font-weight: 600; }}
img, svg {{ max-width: 100%; height: auto; }} figure {{ margin: 1rem 0; }} figcaption {{ color: #666; }}
</style></head><body>
<h1>Masked image modelling, from images to a classifier: {source}</h1>
{body}
</body></html>
"""


def checklist(numbers: dict) -> str:
    """The promises as a list."""
    words = {True: ("yes", "kept"), False: ("no", "broken"), None: ("", "does not apply")}
    rows = [f'<li class="{words[p.kept][0]}">{words[p.kept][1]}: {html.escape(p.text)}</li>' for p in promises(numbers)]
    return f"<ul>{''.join(rows)}</ul>"


def table(numbers: dict) -> str:
    """Every number of report.json, as it stands there."""

    def shown(value) -> str:
        if isinstance(value, list):
            return ", ".join(shown(v) for v in value)
        if isinstance(value, dict):
            return ", ".join(f"{html.escape(str(k))} {shown(v)}" for k, v in value.items())
        return f"{value:.4g}" if isinstance(value, float) else html.escape(str(value))

    rows = "".join(f"<tr><td>{html.escape(name)}</td><td>{shown(value)}</td></tr>" for name, value in numbers.items())
    return f"<table>{rows}</table>"


def picture(path: Path, caption: str) -> str:
    """An image file, inside the page."""
    if not path.is_file():
        return f"<p>({html.escape(path.name)} was not drawn)</p>"
    data = base64.b64encode(path.read_bytes()).decode()
    image = f'<img alt="" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _svg(drawn: Any) -> str:
    buffer = io.StringIO()
    drawn.savefig(buffer, format="svg")
    return "<figure>" + buffer.getvalue().split("?>", 1)[-1].split(">", 1)[-1] + "</figure>"


def curves(metrics: Path) -> str:
    """Loss, token accuracy against the two guesses, and kNN accuracy over the steps of pre-training."""
    names, _ = read_rows(metrics)
    drawn, (loss, accuracy, knn) = figure(3, 4.2, 3.0)
    for metric, label in (("train/loss", "training"), ("val/loss", "held out")):
        loss.plot(*curve(metrics, metric), label=label, marker="o" if metric.startswith("val") else None)
    for metric, label in (
        ("train/masked_token_accuracy", "training"),
        ("val/masked_token_accuracy", "held out"),
        ("val/copy_token_accuracy", "nearest visible"),
        ("val/majority_token_accuracy", "most frequent"),
    ):
        accuracy.plot(
            *curve(metrics, metric), label=label, linestyle="--" if "visible" in label or "most" in label else "-"
        )
    if "val/knn_accuracy" in names:
        knn.plot(*curve(metrics, "val/knn_accuracy"), marker="o")
    for axes, title in ((loss, "loss (nats)"), (accuracy, "masked-token accuracy"), (knn, "kNN accuracy of features")):
        axes.set(title=title, xlabel="step")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    return _svg(drawn)


def bars(numbers: dict) -> str:
    """Accuracy of every fine-tuning run."""
    if numbers.get("finetune_accuracy") is None:
        return f"<p>Skipped: {html.escape(numbers.get('finetune_note', 'no labels'))}.</p>"
    drawn, (axes,) = figure(1, 4.2, 3.0)
    for x, (kind, label) in enumerate((("finetune", "pre-trained"), ("scratch", "from scratch"))):
        values = numbers[f"{kind}_accuracies"]
        axes.bar(x, sum(values) / len(values), width=0.6, label=label)
        axes.plot([x] * len(values), values, "k.", markersize=8)
    axes.axhline(numbers["chance_accuracy"], color="grey", linestyle=":", label="chance")
    axes.set(
        title="accuracy on held-out images", ylim=(0, 1), xticks=[0, 1], xticklabels=["pre-trained", "from scratch"]
    )
    text = (
        f"<p>{numbers['labelled_images']} labelled images of {numbers['classes']} classes, "
        f"{numbers['held_out_images']} held-out images, {len(numbers['finetune_accuracies'])} seeds (dots). "
        "The network from scratch has the same labels and steps, and no layer decay.</p>"
    )
    return text + _svg(drawn)


def finetune_curves(run_dir: Path) -> str:
    """Training loss of the fine-tuning runs."""
    files = sorted(run_dir.glob("finetune-*/metrics.csv"))
    if not files:
        return ""
    drawn, (axes,) = figure(1, 4.2, 3.0)
    for file in files:
        scratch = "scratch" in file.parent.name
        axes.plot(*curve(file, "train/loss"), color="C1" if scratch else "C0", label=file.parent.name.split("-", 1)[1])
    axes.set(title="training loss (nats)", xlabel="step")
    axes.legend(fontsize=8)
    return _svg(drawn)


def check(path: str) -> int:
    """0 if the report at `path` keeps every promise, 1 if not."""
    numbers = json.loads(Path(path).read_text())
    print(summary(numbers))
    return int(any(p.kept is False for p in promises(numbers)))


if __name__ == "__main__":
    sys.exit(check(sys.argv[1]))
