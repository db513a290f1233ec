"""What a comparison found: numbers, tables, pictures, and whether they are what pre-training promises."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from beit_pretrain.data.manifest import read_manifest
from beit_pretrain.examples.report import last_value, machine
from beit_pretrain.examples.settings import CompareSettings
from beit_pretrain.settings import to_dict
from beit_pretrain.tables import table
from beit_pretrain.visualization.plots import bars_plot, curves_plot, layers_plot

UNTRAINED = "not trained"  # what "from scratch" means to a probe
KINDS = {"pretrained": "pre-trained", "control": "control: shuffled targets", "scratch": "from scratch"}
MEASURES = {"accuracy": "top-1", "top5_accuracy": "top-5"}


def report(cfg: CompareSettings, run_dir: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """Write `results.json`, `RESULTS.md` and the pictures of a finished comparison; print the tables."""
    numbers = collected(cfg, run_dir, seeds)
    (run_dir / "results.json").write_text(json.dumps(numbers, indent=2) + "\n")
    names = {kind: name.split(":")[0] for kind, name in KINDS.items()}
    accuracies = {name: numbers["fine_tuned"][kind]["accuracy"] for kind, name in names.items()}
    title = f"fine-tuned on {numbers['labelled_images']} labelled images, {len(seeds)} seeds"
    bars_plot(accuracies, 1 / numbers["classes"], run_dir / "accuracy.png", title)
    names["scratch"] = UNTRAINED
    by_start = {names[k]: {m: mean_of(rows) for m, rows in found.items()} for k, found in numbers["layers"].items()}
    layers_plot(by_start, run_dir / "layers.png")
    files = {f"{kind} {seeds[0]}": run_dir / f"seed-{seeds[0]}/finetune-{kind}/metrics.csv" for kind in KINDS}
    curves_plot(files, run_dir / "curves.png")
    text = tables(numbers)
    (run_dir / "RESULTS.md").write_text(text, "utf-8", "backslashreplace")
    print(f"\n{text}\nwrote {run_dir}: RESULTS.md, results.json, accuracy.png, layers.png, curves.png", flush=True)
    return numbers


def collected(cfg: CompareSettings, run_dir: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """Every number of the comparison, a list over the seeds each."""
    folders = [run_dir / f"seed-{seed}" for seed in seeds]
    counts, held_out = (read_manifest(run_dir / "data" / split)["class_counts"] for split in ("train", "val"))

    def last(run: str, metric: str) -> list[float | None]:
        return [last_value(folder / run / "metrics.csv", f"val/{metric}") for folder in folders]

    return {
        "settings": to_dict(cfg),
        "seeds": list(seeds),
        "classes": len(counts),
        "training_images": sum(counts),
        "labelled_images": sum(min(count, cfg.labels_per_class) for count in counts),
        "held_out_images": min(sum(held_out), cfg.val_images),
        "fine_tuned": {kind: {m: last(f"finetune-{kind}", m) for m in MEASURES} for kind in KINDS},
        "layers": {kind: by_layer([f / f"probe-{kind}/layers.csv" for f in folders]) for kind in KINDS},
        "masked_token_accuracy": {kind: last(kind, "masked_token_accuracy") for kind in ("pretrained", "control")},
        "majority_token_accuracy": last("pretrained", "majority_token_accuracy"),
        "stages": stages(run_dir),
        **machine(cfg.threads),
    }


def by_layer(files: Sequence[Path]) -> dict[str, list[list[float]]]:
    """{"linear probe": a list for each seed of accuracies by layer, "kNN": the same}."""
    found: dict[str, list[list[float]]] = {"linear probe": [], "kNN": []}
    for file in files:
        with file.open(newline="") as opened:
            rows = list(csv.DictReader(opened))
        found["linear probe"].append([float(row["linear"]) for row in rows])
        found["kNN"].append([float(row["knn"]) for row in rows])
    return found


def stages(run_dir: Path) -> dict[str, dict[str, float]]:
    """Seconds, and seconds of CPU time, of each kind of stage: the mean over the seeds."""
    taken: dict[str, list[dict[str, float]]] = {}
    file = run_dir / "stages.jsonl"
    for line in file.read_text().splitlines() if file.is_file() else ():
        entry = json.loads(line)
        taken.setdefault(entry["stage"].rpartition("/")[2], []).append(entry)
    return {
        name: {key: statistics.fmean(e[key] for e in entries) for key in ("seconds", "cpu_seconds")}
        for name, entries in taken.items()
    }


def mean_of(rows: Sequence[Sequence[float]]) -> list[float]:
    """Means over the seeds of what each has by layer."""
    return [statistics.fmean(column) for column in zip(*rows, strict=True)]


def promises(numbers: dict[str, Any]) -> list[tuple[str, bool]]:
    """What pre-training is to show, and whether it did: the gain and the control, against the spread of the seeds."""
    found = {kind: numbers["fine_tuned"][kind]["accuracy"] for kind in KINDS}
    mean = {kind: statistics.fmean(values) for kind, values in found.items()}
    spread = {kind: max(values) - min(values) for kind, values in found.items()}
    widest = max(spread["pretrained"], spread["scratch"])
    gain, other = mean["pretrained"] - mean["scratch"], mean["control"] - mean["scratch"]
    allowed = max(spread["control"], spread["scratch"])
    beats = f"pre-training beats training from scratch by {100 * gain:.2f} points, more than the spread of the seeds"
    control = f"the control does not help: {100 * other:+.2f} points against training from scratch"
    return [
        (f"{beats} ({100 * widest:.2f} points between the best and the worst)", gain > widest),
        (f"{control}, within the spread of {100 * allowed:.2f}, or below", other <= allowed),
    ]


def tables(numbers: dict[str, Any]) -> str:
    """The results as a page of Markdown."""
    tuned, layers, settings = numbers["fine_tuned"], numbers["layers"], numbers["settings"]
    accuracies, by_layer = [], []
    for kind, name in KINDS.items():
        by_seed = ", ".join(f"{100 * value:.2f}" for value in tuned[kind]["accuracy"])
        accuracies.append([name, *(shown(tuned[kind][measure]) for measure in MEASURES), by_seed])
        start = UNTRAINED if kind == "scratch" else name
        for measure, rows in layers[kind].items():
            by_layer.append([start, measure, *(shown(column) for column in zip(*rows, strict=True))])
    tokens = {**numbers["masked_token_accuracy"], "the most frequent token": numbers["majority_token_accuracy"]}
    found = (f"{kind} {', '.join(f'{value:.1%}' for value in values)}" for kind, values in tokens.items())
    times = numbers["stages"].items()
    took = (f"{name} {t['seconds']:.0f} s ({t['cpu_seconds']:.0f} s of CPU)" for name, t in times)
    conditions = (
        f"{numbers['training_images']:,} training images of {numbers['classes']} classes, "
        f"{numbers['labelled_images']:,} of them with labels for fine-tuning ({settings['labels_per_class']} a class); "
        f"{numbers['held_out_images']:,} held-out images; seeds {', '.join(map(str, numbers['seeds']))}.\n"
        f"{numbers['device']}, {numbers['threads']} thread(s), torch {numbers['torch']}, precision "
        f"{settings['precision']}; steps: {', '.join(f'{k} {v:,}' for k, v in settings['steps'].items())}.\n"
        f"A stage took, mean over the seeds: {'; '.join(took)}."
    )
    depth = len(layers["pretrained"]["linear probe"][0])
    parts = (
        conditions,
        table(["fine-tuning", *(f"{m}, mean +- sd" for m in MEASURES.values()), "top-1 by seed"], accuracies),
        "\n".join(f"* {'yes' if kept else '**NO**'}: {text}." for text, kept in promises(numbers)),
        "Frozen features, top-1 by layer (mean +- sd over the seeds):",
        table(["", "measure", *map(str, range(1, depth + 1))], by_layer),
        f"Masked tokens of held-out images that were found, by seed: {'; '.join(found)}.",
    )
    return "\n\n".join(parts) + "\n"


def shown(values: Sequence[float]) -> str:
    """Mean and sample standard deviation in per cent."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.fmean(values):.2f} +- {100 * deviation:.2f}"
