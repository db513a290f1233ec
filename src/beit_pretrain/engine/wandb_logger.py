"""Weights & Biases logger: offline unless the user configured an account; a resumed run keeps its W&B run.

W&B runs in a separate process. A signal to all processes of a run must not end it; its failure must not end the run.
"""

from __future__ import annotations

import os
import signal
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from tqdm import tqdm

from beit_pretrain.engine.preemption import PREEMPTED, SIGNALS
from beit_pretrain.engine.settings import FitSettings, WandbSettings
from beit_pretrain.errors import UserError, first_line
from beit_pretrain.settings import to_dict


def mode(asked: str | None) -> str:
    """W&B's mode: `asked`, else $WANDB_MODE, else "online" if an account is configured, else "offline"."""
    if asked or os.environ.get("WANDB_MODE"):
        return asked or os.environ["WANDB_MODE"]
    netrc = Path.home() / ".netrc"
    account = os.environ.get("WANDB_API_KEY") or (netrc.is_file() and "wandb" in netrc.read_text())
    return "online" if account else "offline"


def same_id(path: Path, first: bool) -> str:
    """W&B's ID of a run: read from a file in its folder, else a new one, which rank 0 (`first`) writes there.

    Checkpoints hold it too; the file is for a run that is killed before its first checkpoint.
    """
    if path.is_file() and (known := path.read_text("utf-8").strip()):
        return known
    run_id = uuid.uuid4().hex[:8]
    if first:
        path.write_text(f"{run_id}\n", "utf-8")
    return run_id


class WeightsAndBiases(WandbLogger):
    """Lightning's logger, with a run's config; if W&B fails, it prints one warning and the run continues without it."""

    lost = False

    def __init__(self, cfg: FitSettings, run_id: str):
        asked = cfg.logger.wandb or WandbSettings()
        how = mode(asked.mode)
        resume = None if how == "offline" else "allow"
        names: dict[str, Any] = {"name": cfg.name, "project": asked.project, "save_dir": cfg.run_dir}
        super().__init__(**names, id=run_id, mode=how, resume=resume, config=to_dict(cfg))
        self._wandb_init.pop("anonymous", None)  # W&B would print a warning about it at each start

    @rank_zero_only
    def begin(self, rows: dict[int, dict[str, float]]) -> None:
        """Start W&B and, offline, log the metrics from before the resume: {step: {metric: value}}.

        Offline, W&B makes a new folder at each start, and a kill may have damaged the last one. So each folder gets the
        whole run, and only the newest one needs to be synced. Raises UserError if W&B does not start.
        """
        try:
            with blocked_for_children():
                self.experiment  # noqa: B018 (it starts W&B)
        except Exception as error:  # from W&B or the network
            raise UserError(
                f"W&B does not start ({first_line(error)[:160]}); logger.wandb.mode=offline needs no network"
            ) from error
        if self._wandb_init["mode"] == "offline":
            for step, row in sorted(rows.items()):
                self.log_metrics(row, step)

    def log_metrics(self, metrics, step=None) -> None:
        self._outlive(super().log_metrics, metrics, step)

    def log_image(self, key, images, step=None, **kwargs) -> None:
        self._outlive(super().log_image, key, images, step, **kwargs)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """At the end of a run (status "finished" or "stopped"), finish the W&B run."""
        import wandb

        if status in ("finished", "stopped"):
            self._outlive(wandb.finish, exit_code=PREEMPTED if status == "stopped" else 0)
        else:  # called by Lightning after the loop
            super().finalize(status)

    def _outlive(self, call: Callable, *args: Any, **kwargs: Any) -> None:
        if self.lost:
            return
        try:
            call(*args, **kwargs)
        except Exception as error:  # the connection, the server, or a bug in W&B
            import wandb

            self.lost = True
            message = f"warning: W&B has failed ({first_line(error)[:160]}); metrics.csv has all metrics"
            tqdm.write(message, file=sys.stderr)
            with suppress(Exception):
                wandb.teardown()


@contextmanager
def blocked_for_children() -> Iterator[None]:
    """Block the stop signals for processes started in this context."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
