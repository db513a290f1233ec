"""A CSV logger that continues its file on resume.

Lightning's CSVLogger deletes its file when a run is started again. This one appends, after removing the rows later than
the step from which the run resumes.
"""

from __future__ import annotations

import csv
from pathlib import Path

from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from beit_pretrain import fileio
from beit_pretrain.tables import read_rows


class CsvMetrics(Logger):
    """One row per step, one column per metric; new metrics add columns."""

    def __init__(self, path: str | Path):
        super().__init__()
        self.path = Path(path)
        self.rows: dict[int, dict[str, float]] = {}
        self.columns: list[str] = ["step"]
        if is_first_process() and self.path.is_file():
            self.columns, self.rows = read_rows(self.path)
            self._rewrite()

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    @property
    @rank_zero_experiment
    def experiment(self) -> CsvMetrics:
        return self

    @rank_zero_only
    def log_hyperparams(self, params, *args, **kwargs) -> None:
        """Does nothing: config.yaml has the settings."""

    @rank_zero_only
    def truncate_after(self, step: int, validation_due: bool = False) -> None:
        """Remove the rows after `step` and, if its validation is due (again), its validation metrics."""
        self.rows = {s: row for s, row in self.rows.items() if s <= step}
        if validation_due and step in self.rows:
            self.rows[step] = {k: v for k, v in self.rows[step].items() if not k.startswith("val/")}
        self._rewrite()

    @rank_zero_only
    def sync(self) -> None:
        """Flush the file to disk (fsync)."""
        if self.path.is_file():
            with self.path.open("rb") as file:
                fileio.flush(file)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        known = step in self.rows
        row = self.rows.setdefault(step, {})
        row.update({name: float(value) for name, value in metrics.items()})
        new = [name for name in metrics if name not in self.columns]
        self.columns += new
        if new or known or not self.path.is_file():
            self._rewrite()
        else:
            with self.path.open("a", newline="") as file:
                self._writer(file).writerow({"step": step, **row})

    def _writer(self, file) -> csv.DictWriter:
        return csv.DictWriter(file, self.columns, restval="", lineterminator="\n")

    def _rewrite(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with fileio.atomic_path(self.path, durable=True) as temporary, temporary.open("w", newline="") as file:
            writer = self._writer(file)
            writer.writeheader()
            writer.writerows({"step": step, **row} for step, row in sorted(self.rows.items()))


def last_metrics(path: Path) -> dict[str, float]:
    """The last value of every metric in metrics.csv, and the last step; empty if the file does not exist."""
    if not path.is_file():
        return {}
    values: dict[str, float] = {}
    for step, row in sorted(read_rows(path)[1].items()):
        values.update(row, step=step)
    return values


def is_first_process() -> bool:
    """Whether this is rank 0; works also before the trainer has launched its processes."""
    return getattr(rank_zero_only, "rank", 0) == 0
