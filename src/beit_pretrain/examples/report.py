"""The demo's report: one self-contained HTML page and one JSON file, with what was measured and what it promises.

`python -m beit_pretrain.examples.report runs/demo/report.json` checks the promises of a written report (exit code 1
if one is broken): continuous integration catches a broken demo by it.
"""

from __future__ import annotations

import base64
import html
import json
import os
import platform
import sys
from pathlib import Path

from beit_pretrain.errors import UserError
from beit_pretrain.tables import curve
from beit_pretrain.visualization.plots import bars_plot, curves_plot, figure, save

PICTURES = "pictures"  # folder
CURVES = {  # of pre-training: title -> metric -> label and style
    "loss (nats)": {"train/loss": ("training", "-"), "val/loss": ("held out", "-o")},
    "masked-token accuracy": {
        "train/masked_token_accuracy": ("training", "-"),
        "val/masked_token_accuracy": ("held out", "-"),
        "val/copy_token_accuracy": ("nearest visible", "--"),
        "val/majority_token_accuracy": ("most frequent", "--"),
    },
    "kNN accuracy of features": {"val/knn_accuracy": ("held out", "-o")},
}


def promises(numbers: dict) -> list[tuple[str, bool | None]]:
    """What the demo is to show, and whether it did: None where that does not apply."""
    masked = numbers["masked_token_accuracy"]
    majority, copy = numbers["majority_token_accuracy"], numbers["copy_token_accuracy"]
    kept: list[bool | None] = [None, None]
    if numbers.get("finetune_accuracy") is not None:
        tuned, scratch, chance = (numbers[f"{kind}_accuracy"] for kind in ("finetune", "scratch", "chance"))
        kept = [tuned > scratch, min(tuned, scratch) >= 2 * chance]
    perplexity, tokens = numbers["codebook_perplexity"], numbers["vocab_size"]
    return [
        (f"masked-token accuracy {masked:.1%} is at least 3 x the majority's {majority:.1%}", masked >= 3 * majority),
        (f"... and at least 1.25 x that of copying the nearest visible token, {copy:.1%}", masked >= 1.25 * copy),
        (f"codebook perplexity {perplexity:.0f} is at least a quarter of {tokens} tokens", perplexity >= 0.25 * tokens),
        ("fine-tuned accuracy is above that from scratch", kept[0]),
        ("both are at least twice chance", kept[1]),
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
    lines += [f"  [{marks[kept]:>3}] {text}" for text, kept in promises(numbers)]
    return "\n".join([*lines, f"{numbers['seconds']:.0f} seconds, seed {numbers['seed']}"])


def last_value(path: Path, metric: str) -> float | None:
    """The last value of a metric of a run, None if it was never measured."""
    values = curve(path, metric)[1] if path.is_file() else []
    return values[-1] if values else None


def measured(path: Path, metric: str) -> float:
    """`last_value` of a metric that the run must have. Raises UserError if it has not."""
    if (value := last_value(path, metric)) is None:
        raise UserError(f"{path} has no {metric}; delete the folder of this run to repeat it")
    return value


def machine(threads: int | None) -> dict:
    """Where the numbers were measured."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine() + " CPU"
    return {"device": device, "cores": os.cpu_count(), "threads": threads, "torch": torch.__version__}


def write(numbers: dict, run_dir: Path) -> Path:
    """Write `report.json` and `report.html` into the run folder; returns the page's path."""
    (run_dir / "report.json").write_text(json.dumps(numbers, indent=2) + "\n")
    page = run_dir / "report.html"
    page.write_text(render(numbers, run_dir), "utf-8", "backslashreplace")  # names may be no UTF-8
    return page


def render(numbers: dict, run_dir: Path) -> str:
    """The HTML page; pictures are inside it as data."""
    masked = "pictures/masked.png"
    sections = [
        ("Held against its promises", checklist(numbers)),
        ("What was measured", table(numbers)),
        ("The images", picture(run_dir / "data/contact-sheet.png", "training images from the shards")),
        ("The tokenizer", picture(run_dir / "tokenizer" / masked, "held-out images and what their tokens keep")),
        ("Pre-training", curves(run_dir)),
        ("", picture(run_dir / "pretrain" / masked, "held-out images after the last step")),
        ("Fine-tuning", finetuning(numbers, run_dir)),
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
    words = {True: ("yes", "kept"), False: ("no", "broken"), None: ("", "does not apply")}
    checked = ((*words[kept], html.escape(text)) for text, kept in promises(numbers))
    rows = [f'<li class="{style}">{word}: {text}</li>' for style, word, text in checked]
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


def picture(path: Path, caption: str = "") -> str:
    """An image file, inside the page."""
    if not path.is_file():
        return f"<p>({html.escape(path.name)} was not drawn)</p>"
    if path.suffix == ".svg":
        image = "<svg" + path.read_text("utf-8").partition("<svg")[2]  # without the header of a file
    else:
        image = f'<img alt="" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'
    return f"<figure>{image}<figcaption>{html.escape(caption)}</figcaption></figure>"


def curves(run_dir: Path) -> str:
    """Loss, token accuracy against the two guesses, and kNN accuracy over the steps of pre-training."""
    drawn, row = figure(len(CURVES), 4.2, 3.0)
    for axes, (title, lines) in zip(row, CURVES.items(), strict=True):
        for metric, (label, style) in lines.items():
            axes.plot(*curve(run_dir / "pretrain/metrics.csv", metric), style, label=label)
        axes.set(title=title, xlabel="step")
        axes.legend(fontsize=8)
    return picture(save(drawn, run_dir / PICTURES / "pretraining.svg"))


def finetuning(numbers: dict, run_dir: Path) -> str:
    """Accuracy and training loss of every fine-tuning run."""
    if numbers.get("finetune_accuracy") is None:
        return f"<p>Skipped: {html.escape(numbers.get('finetune_note', 'no labels'))}.</p>"
    accuracies = {"pre-trained": numbers["finetune_accuracies"], "from scratch": numbers["scratch_accuracies"]}
    runs = {file.parent.name.split("-", 1)[1]: file for file in sorted(run_dir.glob("finetune-*/metrics.csv"))}
    bars, losses = run_dir / PICTURES / "accuracy.svg", run_dir / PICTURES / "finetuning.svg"
    bars_plot(accuracies, numbers["chance_accuracy"], bars, "accuracy on held-out images")
    curves_plot(runs, losses, ["train/loss"])
    text = (
        f"<p>{numbers['labelled_images']} labelled images of {numbers['classes']} classes, "
        f"{numbers['held_out_images']} held-out images, {len(numbers['finetune_accuracies'])} seeds (dots). "
        "The network from scratch has the same labels and steps, and no layer decay.</p>"
    )
    return text + picture(bars) + picture(losses)


def check(path: str) -> int:
    """0 if the report at `path` keeps every promise, 1 if not."""
    numbers = json.loads(Path(path).read_text())
    print(summary(numbers))
    return int(any(kept is False for _, kept in promises(numbers)))


if __name__ == "__main__":
    sys.exit(check(sys.argv[1]))
