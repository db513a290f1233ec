"""The small verbs: shards, predict, show. Each takes its composed config."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import torch
from omegaconf import DictConfig
from tqdm import tqdm

from beit_pretrain.errors import UserError


def shards(cfg: DictConfig) -> None:
    """make: write shards; index: take over existing ones; verify: check them, exit code 2 if anything is wrong; show:
    summary and contact sheet."""
    from beit_pretrain.adopt import index_shards
    from beit_pretrain.manifest import contact_sheet, summary, verify_shards
    from beit_pretrain.shards import make_shards

    if cfg.action == "make":
        if not cfg.out:
            raise UserError("out is missing: the folder for the shards, such as out=data/mine")
        settings = {str(name): value for name, value in cfg.items() if name not in ("action", "src", "out")}
        src = cfg.src if isinstance(cfg.src, str) else list(cfg.src)
        for folder in make_shards(src, cfg.out, **settings):
            print(f"made {folder}\n{summary(folder)}")
    elif cfg.action == "index":
        folder = index_shards(cfg.src, cfg.out, cfg.labels, cfg.workers)
        print(f"indexed {folder}\n{summary(folder)}")
    elif cfg.action == "verify":
        problems = verify_shards(cfg.src, workers=cfg.workers)
        if problems:
            print("\n".join(problems))
            raise UserError(f"{cfg.src}: {len(problems)} problem(s)")
        print(f"{cfg.src}: fine")
    elif cfg.action == "show":
        print(summary(cfg.src))
        sheet = Path(cfg.out or Path(cfg.src) / "contact-sheet.png")
        contact_sheet(cfg.src, sheet)
        print(f"wrote {sheet}")
    else:
        raise UserError(f"shards {cfg.action}: there are make, index, verify and show")


def show(cfg: DictConfig) -> None:
    """Write a picture of what a run learned."""
    from beit_pretrain import pictures
    from beit_pretrain.callbacks import first_images, masked_picture
    from beit_pretrain.dvae import TokenizerTraining, reconstruction_picture
    from beit_pretrain.pretrain import Pretraining
    from beit_pretrain.runs import building, load_run

    with building():
        _, task = load_run(cfg.run)
    if cfg.split not in task.data.readers:
        raise UserError(f"split={cfg.split}: the run has {', '.join(task.data.readers)}")
    module = task.module.eval()
    batch = first_images(task.data.eval_dataset(cfg.split), cfg.images, torch.device("cpu"))
    if isinstance(module, Pretraining):
        picture = masked_picture(module, batch)
    elif isinstance(module, TokenizerTraining):
        picture = reconstruction_picture(module.model, batch["image"].float() / 255)
    else:
        raise UserError(f"{cfg.run} is a classifier; show draws backbones and tokenizers")
    out = Path(cfg.out or Path(cfg.run) / "pictures" / "show.png")
    if out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(f"out={out} must end with .png, .jpg or .webp")
    pictures.save(picture, out)
    print(f"wrote {out}")


def predict(cfg: DictConfig) -> None:
    """Write the top classes of every image as CSV: file, rank, class, probability. Bad files are listed, not fatal."""
    from beit_pretrain.finetune import ImageClassifier
    from beit_pretrain.images import opened, reason
    from beit_pretrain.sources import list_images, read_candidate

    if Path(cfg.out).is_dir():
        raise UserError(f"out={cfg.out} is a folder; a file is needed, such as predictions.csv")
    classifier = ImageClassifier(cfg.init_from)
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
    write_csv(Path(cfg.out), ("file", "rank", "class", "probability"), rows)
    print(f"wrote {cfg.out}: {len(files) - len(bad)} images" + (f", {len(bad)} could not be read:" if bad else ""))
    print("\n".join(bad[:20]))


def write_csv(path: Path, header: tuple[str, ...], rows: list[tuple]) -> None:
    """Write a table under a temporary name, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with temporary.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([header, *rows])
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
