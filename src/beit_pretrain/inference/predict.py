"""The verb `predict`: writes the top classes of every image, or label maps with a segmentation model."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from beit_pretrain.data.left_out import LeftOut
from beit_pretrain.errors import UserError
from beit_pretrain.fileio import atomic_path
from beit_pretrain.inference.image_stream import ImageDataset, nothing, report, source_of, stream
from beit_pretrain.inference.label_maps import predict_maps
from beit_pretrain.inference.predictor import ImageSegmenter, Prediction, image_network
from beit_pretrain.inference.settings import PredictSettings
from beit_pretrain.models.checkpoints.formats import read_checkpoint

HEADER = ("file", "rank", "class", "probability", "index")
JSON_LINES = (".jsonl", ".ndjson")


def predict(cfg: PredictSettings) -> None:
    """Write the top classes of every image, as CSV or JSON lines; with a segmentation model, label maps instead."""
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    network = image_network(read_checkpoint(cfg.init_from), cfg.test)
    if isinstance(network, ImageSegmenter):
        predict_maps(cfg, network)
        return
    out = Path(cfg.out or "predictions.csv")
    if out.is_dir() or out.suffix.lower() not in (".csv", *JSON_LINES):
        raise UserError(f"out={out}: a classifier writes a file, such as out=predictions.csv or out=predictions.jsonl")
    left_out = LeftOut()
    dataset = ImageDataset(source_of(cfg.src, left_out), network.apply)
    done, bad = 0, list[tuple[str, str]]()
    with writing(out) as write:
        for items in stream(dataset, cfg.batch_size, cfg.num_workers, "predicting", bad):
            found = network.classify(torch.stack([item.views[0] for item in items]), cfg.top)
            for item, best in zip(items, found, strict=True):
                write(item.name, best)
            done += len(items)
        if not done:
            raise nothing(cfg.src, bad)
    report(out, f"{done} images", bad, out.with_name(f"{out.stem}.bad.jsonl"), left_out)


@contextmanager
def writing(out: Path) -> Iterator[Callable[[str, list[Prediction]], Any]]:
    """Give a function that writes an image's predictions. The file gets its name only if the block succeeds."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with (
        atomic_path(out) as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        if out.suffix.lower() in JSON_LINES:
            yield lambda name, best: file.write(json_line(name, best))
        else:
            rows = csv.writer(file, lineterminator="\n")
            rows.writerow(HEADER)
            yield lambda name, best: rows.writerows(
                (name, rank, p.name, f"{p.probability:.6f}", p.number) for rank, p in enumerate(best, start=1)
            )


def json_line(name: str, best: list[Prediction]) -> str:
    """One image as a line of JSON."""
    top = [{"class": p.name, "probability": round(p.probability, 6), "index": p.number} for p in best]
    return json.dumps({"file": name, "top": top}) + "\n"
