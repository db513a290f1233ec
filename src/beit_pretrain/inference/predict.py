"""The verb `predict`: the top classes of every image, or label maps from a segmentation model."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from beit_pretrain.errors import UserError
from beit_pretrain.fileio import atomic_path
from beit_pretrain.inference.classifier import ImageClassifier, Prediction
from beit_pretrain.inference.image_stream import Views, no_predictor, nothing, source_of, stream, summary, write_bad
from beit_pretrain.inference.label_maps import predict_maps
from beit_pretrain.inference.settings import PredictSettings
from beit_pretrain.models.checkpoints.formats import read_checkpoint
from beit_pretrain.transforms.views import centre_view, to_array

HEADER = ("file", "rank", "class", "probability", "index")
JSON_LINES = (".jsonl", ".ndjson")


def predict(cfg: PredictSettings) -> None:
    """Write the top classes of every image, as CSV or JSON lines. Bad files are listed, not fatal.

    With a segmentation model, label maps instead.
    """
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    source = read_checkpoint(cfg.init_from)
    if source.kind == "segmenter":
        predict_maps(cfg, source)
        return
    if source.kind != "classifier":
        raise no_predictor(cfg.init_from, source.kind)
    out = Path(cfg.out or "predictions.csv")
    if out.is_dir() or out.suffix.lower() not in (".csv", *JSON_LINES):
        raise UserError(f"out={out}: a file is needed, predictions.csv or predictions.jsonl")
    classifier = ImageClassifier(source)
    images = source_of(cfg.src)
    # A function of plain settings: the processes that read ahead need no network.
    see = partial(apply, size=classifier.image_size, crop_ratio=classifier.crop_ratio, channels=classifier.channels)
    views = Views(images, see, cfg.batch_size)
    done, bad = 0, list[tuple[str, str]]()
    with writing(out) as write, tqdm(total=len(images), desc="predicting", unit=" images") as bar:
        for items in stream(views, cfg.num_workers):
            good = [item for item in items if item.problem is None]
            if good:
                found = classifier.classify(torch.stack([item.views[0] for item in good]), cfg.top)
                for item, best in zip(good, found, strict=True):
                    write(item.name, best)
            done += len(good)
            bad += [(item.name, item.problem) for item in items if item.problem is not None]
            bar.update(len(items))
        if not done:
            raise nothing(cfg.src, bad)
    print(summary(out, f"{done} images", bad, write_bad(out.with_name(f"{out.stem}.bad.jsonl"), bad)))


def apply(image: Image.Image, size: int, crop_ratio: float | None, channels: int) -> list[np.ndarray]:
    """The evaluation view (C, H, W) uint8."""
    return [to_array(centre_view(image, size, crop_ratio, channels))]


@contextmanager
def writing(out: Path) -> Iterator[Callable[[str, list[Prediction]], Any]]:
    """Lend a function that writes an image's predictions. The file gets its name when the block has ended well."""
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
