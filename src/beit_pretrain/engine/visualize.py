"""The verb `show`: pictures of what a run learned, into its folder and its logger.

masked      masked | predicted tokens decoded | original (of a tokenizer original | decoded, of a segmenter overlays)
attention   where chosen patches look, for layers and heads
tokens      token maps: which visual token stands for which patch
curves      loss and accuracy of one or several runs in one picture
layers      accuracy of linear probes by layer
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import Tensor

from beit_pretrain.data.sources import list_images, read_candidate
from beit_pretrain.engine.callbacks import first_images, masked_picture, segmentation_picture
from beit_pretrain.engine.checkpointing import LAST
from beit_pretrain.errors import UserError, stop_if_memory_was_short
from beit_pretrain.tables import curve, read_rows
from beit_pretrain.tasks.finetune import Finetuning
from beit_pretrain.tasks.linear_probe import Probing
from beit_pretrain.tasks.pretrain import Pretraining
from beit_pretrain.tasks.segment import Segmentation
from beit_pretrain.tasks.tokenizer import TokenizerTraining, reconstruction_picture
from beit_pretrain.transforms.image_io import open_image, reason
from beit_pretrain.transforms.jitter import normalise
from beit_pretrain.transforms.views import centre_view, to_array
from beit_pretrain.visualization import grids
from beit_pretrain.visualization.attention_maps import attention_picture
from beit_pretrain.visualization.plots import PANELS, curves_plot, layers_plot
from beit_pretrain.visualization.token_maps import token_sheet

METRICS, CHECKPOINT = "metrics.csv", f"checkpoints/{LAST}"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def show(cfg: DictConfig) -> None:
    """Draw `cfg.what`, or all that the run has, into its `pictures/` (or `cfg.out`), and hand it to its logger."""
    given = cfg.runs if cfg.runs is not None else cfg.run
    if given is None:
        raise UserError("run is missing: the folder of a run, such as runs/base_22k; or runs=[A,B] for their curves")
    runs = [Path(run) for run in ([given] if isinstance(given, str) else given)]
    for run in runs:
        if not (run / "config.yaml").is_file():
            raise UserError(f"{run} is not the folder of a run (it has no config.yaml)")
    out = None if cfg.out is None else Path(cfg.out)
    if out is not None and out.suffix.lower() not in SUFFIXES:
        raise UserError(f"out={out} must end with .png, .jpg or .webp")
    if cfg.what not in (None, *PICTURES):
        raise UserError(f"show {cfg.what}: there are {', '.join(PICTURES)}")
    if cfg.runs is not None:
        if cfg.what not in (None, "curves"):
            raise UserError(f"show {cfg.what} draws one run=; several in one picture are show curves runs=[A,B]")
        together = "-".join(run.name for run in runs)[:80]
        pictures = iter([curves(runs, cfg, out or runs[0] / "pictures" / f"curves-{together}.png")])
    else:
        pictures = draw(runs[0], cfg, out)
    drawn = []
    for path in pictures:
        print(f"wrote {path}", flush=True)
        drawn.append(path)
    if not drawn:
        raise UserError(f"{runs[0]} has neither metrics nor a checkpoint yet: there is nothing to show")
    log_pictures(runs[0], drawn)


def draw(run: Path, cfg: DictConfig, out: Path | None) -> Iterator[Path]:
    """The pictures of one run, one after the other, as they are written.

    Those that the run does not have are left out unless one is asked for; held-out images that it does not have are
    those of training then.
    """
    folder, what = run / "pictures", cfg.what or ("masked" if out is not None else None)
    if what == "curves" or (what is None and has_curves(run)):
        yield curves([run], cfg, out or folder / "curves.png")
    if what == "curves" or (what is None and not (run / CHECKPOINT).is_file()):
        return
    module, data = loaded(run)
    if what is None and cfg.split == "val" and "val" not in data.readers:
        cfg = cast(DictConfig, OmegaConf.merge(cfg, {"split": "train"}))
    for name in ("masked", "attention", "tokens", "layers"):
        if what not in (None, name):
            continue
        picture = PICTURES[name](module, data, cfg, run)
        if picture is None:
            if what is not None:
                raise UserError(f"{run} is a {module.kind}; it has no picture of {name}")
            continue
        path = out or folder / ("show.png" if name == "masked" else f"{name}.png")
        if isinstance(picture, Image.Image):
            grids.save(picture, path)
        else:
            picture(path)
        yield path


def has_curves(run: Path) -> bool:
    """Whether a run has measured anything that is drawn without being asked for."""
    columns = read_rows(run / METRICS)[0] if (run / METRICS).is_file() else []
    return any(column.split("/")[-1] in names for column in columns for names in PANELS.values())


def loaded(run: Path) -> tuple[Any, Any]:
    """The module of a run, in eval mode, and its data."""
    from beit_pretrain.engine.resume import load_run
    from beit_pretrain.engine.trainer import as_user_errors

    with as_user_errors():
        _, task = load_run(run)
    return task.module.eval(), task.data


def masked(module: Any, data: Any, cfg: DictConfig, run: Path) -> Image.Image | None:
    """What the run was trained for, on held-out images."""
    check_split(data, cfg)
    if isinstance(module, Segmentation):
        return segmentation_picture(module, data, cfg.images, cfg.split)
    if isinstance(module, Pretraining):
        return masked_picture(module, batch_of(data, cfg)) if module.tokenizer is not None or cfg.what else None
    if isinstance(module, TokenizerTraining):
        return reconstruction_picture(module.model, batch_of(data, cfg)["image"].float() / 255)
    return None


def attention(module: Any, data: Any, cfg: DictConfig, run: Path) -> Image.Image | None:
    """Attention maps of a backbone, whatever head it has."""
    if not isinstance(module, (Pretraining, Finetuning, Segmentation, Probing)):
        return None
    model = module.backbone if isinstance(module, Probing) else module.model
    shown = chosen_images(module, data, cfg, model, count=min(cfg.images, 2))
    normalised = normalise(shown, module.mean, module.std)
    patches = None if cfg.patches is None else [list(patch) for patch in cfg.patches]
    return attention_picture(model, normalised, shown, cfg.layers, cfg.heads, patches)


def tokens(module: Any, data: Any, cfg: DictConfig, run: Path) -> Image.Image | None:
    """Token maps of the run's tokenizer."""
    if isinstance(module, Pretraining) and module.tokenizer is not None:
        image, ids_BN = module.image_and_tokens(batch_of(data, cfg))
        return token_sheet(image, module.tokenizer.decode(ids_BN), ids_BN, module.tokenizer.vocab_size)
    if isinstance(module, TokenizerTraining):
        image = batch_of(data, cfg)["image"].float() / 255
        with torch.no_grad():
            ids_Bhw = module.model.logits(image).argmax(1)
            decoded = module.model.decode(ids_Bhw).clamp(0, 1)
        return token_sheet(image, decoded, ids_Bhw.flatten(1), module.model.vocab_size)
    return None


def layers(module: Any, data: Any, cfg: DictConfig, run: Path) -> Callable[[Path], Path] | None:
    """Accuracy of a probe's layers, as last measured."""
    if not isinstance(module, Probing):
        return None
    last = {n: curve(run / METRICS, f"val/accuracy_layer_{n:02d}")[1] for n in module.model.layers}
    if not all(last.values()):
        if cfg.what is None:
            return None
        raise UserError(
            f"{run / METRICS} has no held-out accuracy by layer: the run had no data.val, or has not validated"
        )
    found = {run.name: {"linear probe": [values[-1] for values in last.values()]}}
    return lambda path: layers_plot(found, path, module.model.layers)


def curves(runs: Sequence[Path], cfg: DictConfig, path: Path) -> Path:
    """Curves of some runs, called by their folders' names."""
    names = [run.name for run in runs]
    called = {(run.name if names.count(run.name) == 1 else str(run)): run / METRICS for run in runs}
    for file in called.values():
        if not file.is_file():
            raise UserError(f"{file} does not exist: the run has no metrics yet")
    try:
        return curves_plot(called, path, cfg.metrics)
    except ValueError as error:
        raise UserError(str(error)) from error


PICTURES: dict[str, Callable] = {
    "masked": masked,
    "attention": attention,
    "tokens": tokens,
    "layers": layers,
    "curves": curves,
}


def check_split(data: Any, cfg: DictConfig) -> None:
    """Raise UserError for a split that the run does not have."""
    if cfg.split not in data.readers:
        raise UserError(f"split={cfg.split}: the run has {', '.join(data.readers)}")


def batch_of(data: Any, cfg: DictConfig) -> dict[str, Tensor]:
    """The first images of the split, as the run sees them."""
    check_split(data, cfg)
    return first_images(data.eval_dataset(cfg.split), cfg.images, torch.device("cpu"))


def chosen_images(module: Any, data: Any, cfg: DictConfig, model: Any, count: int) -> Tensor:
    """(B, C, H, W) in [0, 1], of the network's size: the user's own images (`photos`), else the split's first."""
    height, width = (side * model.config["patch_size"] for side in model.grid)
    channels = model.config["in_chans"]
    if cfg.photos is None:
        check_split(data, cfg)
        files = [
            data.readers[cfg.split].read(data.eval_dataset(cfg.split).order.sample_at(i)).data for i in range(count)
        ]
    else:
        files = [read_candidate(candidate) for candidate in list_images(cfg.photos)[: cfg.images]]
    arrays = []
    for number, file in enumerate(files):
        try:
            with open_image(file) as image:
                view = centre_view(image, max(height, width), 1.0, channels)
        except Exception as error:  # Pillow's decoders raise nearly everything on broken files
            stop_if_memory_was_short(error, f"image {number} of {cfg.photos or cfg.split}")
            raise UserError(f"image {number} of {cfg.photos or cfg.split} cannot be read: {reason(error)}") from error
        arrays.append(torch.from_numpy(to_array(view.crop((0, 0, width, height)))))
    return torch.stack(arrays).float() / 255


def log_pictures(run: Path, drawn: Sequence[Path]) -> None:
    """Hand the pictures to the run's W&B run, if it has one."""
    from beit_pretrain.engine.run_folder import CONFIG, read_config

    cfg = read_config(run / CONFIG)
    if OmegaConf.select(cfg, "logger.kind") != "wandb" or not (run / CHECKPOINT).is_file():
        return
    from beit_pretrain.engine.wandb_logger import wandb_logger
    from beit_pretrain.models.checkpoints.files import read

    about = read(run / CHECKPOINT).get("beit_pretrain", {})
    if "wandb_id" not in about:
        return
    logger = wandb_logger(cfg, about["wandb_id"])
    for path in drawn:
        logger.log_image(f"show/{path.stem}", [str(path)])
    logger.experiment.finish()
