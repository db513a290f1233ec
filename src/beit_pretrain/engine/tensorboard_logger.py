"""TensorBoard logger: a resumed run shows each step once.

Events lie in `tensorboard/` of the run's folder. A checkpoint flushes them (`sync`), so a killed run has all metrics up
to the step from which it resumes; what came after is purged.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from beit_pretrain.engine.settings import FitSettings, TensorBoardSettings
from beit_pretrain.errors import UserError

FOLDER, EVENTS = "tensorboard", "events.out.tfevents.*"


def check_installed() -> None:
    """Raise UserError without the package tensorboard."""
    if find_spec("tensorboard") is None:
        raise UserError("logger=tensorboard needs a package: pip install 'beit_pretrain[tensorboard]'")


class TensorBoard(TensorBoardLogger):
    """Lightning's logger, in the run's folder.

    Args:
        start, validation_due: the step from which the run resumes (0 = a new run), and whether its validation is due
            again. What was logged later is purged.
        part: a folder inside, for events beside those of the training: of several files in one folder that are written
            at a time, TensorBoard reads only one.
    """

    def __init__(self, cfg: FitSettings, start: int = 0, validation_due: bool = False, part: str = ""):
        asked = cfg.logger.tensorboard or TensorBoardSettings()
        # Events of `purge` and later steps are hidden.
        purge = start + (not validation_due) if start else None
        super().__init__(cfg.run_dir, FOLDER, "", flush_secs=asked.flush_secs, purge_step=purge)
        self.part, self.repeated = part, start if validation_due else None

    @property
    def log_dir(self) -> str:
        """Lightning's, but for variables and ~ in the path, which are read as they are."""
        return str(Path(self.root_dir, self.part))

    @rank_zero_only
    def begin(self, rows: dict[int, dict[str, float]]) -> None:
        """Log the rows of metrics.csv, {step: {metric: value}}, that are purged; all, if there is no file yet."""
        new = not any(Path(self.log_dir).glob(EVENTS))
        for step, row in sorted(rows.items()):
            if new or step == self.repeated:
                self.log_metrics(row, step)

    def save(self) -> None:
        """Nothing: config.yaml has the settings that Lightning would write here."""

    @rank_zero_only
    def sync(self) -> None:
        """Write what has been logged into the file."""
        self.experiment.flush()

    @rank_zero_only
    def log_image(self, key: str, images: list[str], step: int | None = None) -> None:
        """Log picture files, as `WandbLogger.log_image` does."""
        for path in images:
            with Image.open(path) as image:
                self.experiment.add_image(key, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the file at the end of a run; Lightning calls this after the loop, before the last validation."""
        if status in ("finished", "stopped"):
            self.experiment.close()
        else:
            self.sync()
