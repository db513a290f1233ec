"""The verb `visualize`: draws pictures of a run into its folder and its logger.

masked      masked | predicted tokens decoded | original; for a tokenizer original | decoded, for a segmenter overlays
attention   attention maps of chosen patches, by layer and head
tokens      token maps: the visual token of each patch
curves      loss and accuracy of one or several runs in one picture
layers      accuracy of linear probes by layer
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from beit_pretrain.config import as_user_errors
from beit_pretrain.engine.checkpointing import LAST
from beit_pretrain.engine.resume import load_run
from beit_pretrain.engine.run_folder import CONFIG, read_config
from beit_pretrain.engine.settings import LoggerSettings, VisualizeSettings
from beit_pretrain.engine.task import find_task
from beit_pretrain.errors import UserError
from beit_pretrain.tables import read_rows
from beit_pretrain.visualization import grids
from beit_pretrain.visualization.plots import PANELS, curves_plot

METRICS, CHECKPOINT = "metrics.csv", f"checkpoints/{LAST}"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def visualize(cfg: VisualizeSettings) -> None:
    """Draw `cfg.what`, or all pictures that the run has, into `pictures/` or `cfg.out`, and send them to its logger.

    Raises UserError if the run or the picture does not exist.
    """
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
    if cfg.runs is not None:
        if cfg.what not in (None, "curves"):
            raise UserError(f"visualize {cfg.what} draws one run=; several in one picture: visualize curves runs=[A,B]")
        together = "-".join(run.name for run in runs)[:80]
        pictures = iter([curves(runs, cfg, out or runs[0] / "pictures" / f"curves-{together}.png")])
    else:
        pictures = pictures_of(runs[0], cfg, out)
    drawn = []
    for path in pictures:
        print(f"wrote {path}", flush=True)
        drawn.append(path)
    if not drawn:
        raise UserError(f"{runs[0]} has neither metrics nor a checkpoint yet: there is nothing to visualize")
    log_pictures(runs[0], drawn)


def pictures_of(run: Path, cfg: VisualizeSettings, out: Path | None) -> Iterator[Path]:
    """Draw the pictures of one run; yields each path after writing it.

    Without `cfg.what`, pictures that the run does not have are skipped, and training images are used if there are no
    held-out images. Raises UserError if the requested picture does not exist.
    """
    folder, what = run / "pictures", cfg.what or ("masked" if out is not None else None)
    if what == "curves" or (what is None and has_curves(run)):
        yield curves([run], cfg, out or folder / "curves.png")
    if what == "curves" or (what is None and not (run / CHECKPOINT).is_file()):
        return
    with as_user_errors():
        _, task = load_run(run)
    task.module.eval()
    if what is None and cfg.split == "val" and "val" not in task.data.readers:
        cfg = cfg.model_copy(update={"split": "train"})
    for name in ("masked", "attention", "tokens", "layers"):
        if what not in (None, name):
            continue
        picture = task.layers(cfg, run) if name == "layers" else getattr(task, name)(cfg)
        if picture is None:
            if what is not None:
                raise UserError(f"{run} is a {task.module.kind}; it has no picture of {name}")
            continue
        path = out or folder / f"{name}.png"
        if isinstance(picture, Image.Image):
            grids.save(picture, path)
        else:
            picture(path)
        yield path


def has_curves(run: Path) -> bool:
    """Whether metrics.csv has a metric that is drawn by default."""
    columns = read_rows(run / METRICS)[0] if (run / METRICS).is_file() else []
    return any(column.split("/")[-1] in names for column in columns for names in PANELS.values())


def curves(runs: Sequence[Path], cfg: VisualizeSettings, path: Path) -> Path:
    """Draw the curves of runs into one picture, labelled with the names of their folders."""
    names = [run.name for run in runs]
    called = {(run.name if names.count(run.name) == 1 else str(run)): run / METRICS for run in runs}
    for file in called.values():
        if not file.is_file():
            raise UserError(f"{file} does not exist: the run has no metrics yet")
    try:
        return curves_plot(called, path, cfg.metrics)
    except ValueError as error:
        raise UserError(str(error)) from error


def log_pictures(run: Path, drawn: Sequence[Path]) -> None:
    """Send the pictures to the run's loggers."""
    content = read_config(run / CONFIG)
    logger = LoggerSettings.validated(content.get("logger", {}))
    if not (logger.wandb or logger.tensorboard):
        return
    cfg = find_task(content["task"]).settings.validated({**content, "run_dir": run})
    if cfg.logger.tensorboard:
        from beit_pretrain.engine.tensorboard_logger import TensorBoard, check_installed

        check_installed()
        log_images(board := TensorBoard(cfg, part="visualize"), drawn)
        board.finalize("finished")
    if not cfg.logger.wandb or not (run / CHECKPOINT).is_file():
        return
    from beit_pretrain.engine.wandb_logger import WeightsAndBiases
    from beit_pretrain.models.checkpoints.files import read

    about = read(run / CHECKPOINT).get("beit_pretrain", {})
    if "wandb_id" not in about:
        return
    wandb = WeightsAndBiases(cfg, about["wandb_id"])
    log_images(wandb, drawn)
    wandb.experiment.finish()


def log_images(logger: Any, drawn: Sequence[Path]) -> None:
    for path in drawn:
        logger.log_image(f"visualize/{path.stem}", [str(path)])
