"""The verb `predict`: the top classes of every image, or label maps from a segmentation model."""

from __future__ import annotations

from pathlib import Path

import torch
from omegaconf import DictConfig
from tqdm import tqdm

from beit_pretrain.checkpoints.formats import read_checkpoint
from beit_pretrain.errors import UserError
from beit_pretrain.images.reading import opened, reason
from beit_pretrain.predict.maps import predict_maps
from beit_pretrain.shards.sources import list_images, read_candidate
from beit_pretrain.tables import write_csv
from beit_pretrain.training.finetune import ImageClassifier


def predict(cfg: DictConfig) -> None:
    """Write the top classes of every image as CSV: file, rank, class, probability. Bad files are listed, not fatal.

    With a segmentation model, label maps instead.
    """
    source = read_checkpoint(cfg.init_from)
    if source.kind == "segmenter":
        predict_maps(cfg, source)
        return
    out = Path(cfg.out or "predictions.csv")
    if out.is_dir():
        raise UserError(f"out={out} is a folder; a file is needed, such as predictions.csv")
    classifier = ImageClassifier(source)
    files = list_images(cfg.src)
    rows, bad = [], []
    for start in tqdm(range(0, len(files), cfg.batch_size), desc="predicting", unit="batch"):
        images, names = [], []
        for candidate in files[start : start + cfg.batch_size]:
            try:
                with opened(read_candidate(candidate)) as image:
                    images.append(classifier.view(image))
                names.append(candidate.key)
            except Exception as error:  # Pillow's decoders raise nearly everything on broken files
                bad.append(f"{candidate.key}: {reason(error)}")
        if images:
            for name, best in zip(names, classifier.classify(torch.stack(images), cfg.top), strict=True):
                rows += [(name, rank, label, f"{p:.6f}") for rank, (label, p) in enumerate(best, start=1)]
    if not rows:
        raise UserError(f"none of the {len(files)} files in {cfg.src} could be read as an image ({bad[0]})")
    write_csv(out, ("file", "rank", "class", "probability"), rows)
    print(f"wrote {out}: {len(files) - len(bad)} images" + (f", {len(bad)} could not be read:" if bad else ""))
    print("\n".join(bad[:20]))
