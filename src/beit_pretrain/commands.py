"""The small verbs: shards, predict, show. Each takes its composed config."""

from __future__ import annotations

from pathlib import Path

import torch
from omegaconf import DictConfig

from beit_pretrain.errors import UserError


def shards(cfg: DictConfig) -> None:
    """make: write shards; index: take over existing ones; verify: check them, exit code 2 if anything is wrong; show:
    summary and contact sheet."""
    from beit_pretrain.shards.adopt import index_shards
    from beit_pretrain.shards.make import make_shards
    from beit_pretrain.shards.manifest import contact_sheet, summary, verify_shards

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
    from beit_pretrain.runs.fit import building, load_run
    from beit_pretrain.training import pictures
    from beit_pretrain.training.callbacks import first_images, masked_picture, segmentation_picture
    from beit_pretrain.training.dvae import TokenizerTraining, reconstruction_picture
    from beit_pretrain.training.pretrain import Pretraining
    from beit_pretrain.training.segment import Segmentation

    with building():
        _, task = load_run(cfg.run)
    if cfg.split not in task.data.readers:
        raise UserError(f"split={cfg.split}: the run has {', '.join(task.data.readers)}")
    module = task.module.eval()
    if isinstance(module, Segmentation):
        picture = segmentation_picture(module, task.data, cfg.images, cfg.split)
    elif isinstance(module, (Pretraining, TokenizerTraining)):
        batch = first_images(task.data.eval_dataset(cfg.split), cfg.images, torch.device("cpu"))
        if isinstance(module, Pretraining):
            picture = masked_picture(module, batch)
        else:
            picture = reconstruction_picture(module.model, batch["image"].float() / 255)
    else:
        raise UserError(f"{cfg.run} is a {module.kind}; show draws backbones, tokenizers and segmenters")
    out = Path(cfg.out or Path(cfg.run) / "pictures" / "show.png")
    if out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(f"out={out} must end with .png, .jpg or .webp")
    pictures.save(picture, out)
    print(f"wrote {out}")
