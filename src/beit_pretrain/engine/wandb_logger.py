"""Weights & Biases as a logger: offline unless the user configured an account, the same run after a restart.

W&B is a process of its own. A signal to all processes of a run must not end it, and a run must not end with it.
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
from beit_pretrain.engine.settings import FitSettings
from beit_pretrain.errors import UserError, first_line
from beit_pretrain.settings import to_dict


def mode(asked: str | None) -> str:
    """`asked`, else $WANDB_MODE, else "online" if an account is configured, else "offline"."""
    if asked or os.environ.get("WANDB_MODE"):
        return asked or os.environ["WANDB_MODE"]
    netrc = Path.home() / ".netrc"
    account = os.environ.get("WANDB_API_KEY") or (netrc.is_file() and "wandb" in netrc.read_text())
    return "online" if account else "offline"


def same_id(path: Path, first: bool) -> str:
    """W&B's id of a run: the one in a file of the run's folder, else a new one, which the first process writes there.

    It travels in the checkpoints too; the file is for a run that is killed before its first one.
    """
    if path.is_file() and (known := path.read_text("utf-8").strip()):
        return known
    run_id = uuid.uuid4().hex[:8]
    if first:
        path.write_text(f"{run_id}\n", "utf-8")
    return run_id


class WeightsAndBiases(WandbLogger):
    """Lightning's logger; if W&B breaks down, it says so once, and the run goes on without it."""

    lost = False

    @rank_zero_only
    def begin(self, rows: dict[int, dict[str, float]]) -> None:
        """Start W&B, and give an offline run the metrics that it had before it was ended: {step: {metric: value}}.

        Offline, W&B begins a new folder at every start, and a kill may have torn the last one. So each folder has the
        run as a whole, every step once, and the newest one is all that has to be synced.
        Raises UserError if W&B does not start.
        """
        try:
            with blocked_for_children():
                self.experiment  # noqa: B018 (it starts W&B)
        except Exception as error:  # W&B's own, and those of the network
            raise UserError(
                f"W&B does not start ({first_line(error)[:160]}); logger.mode=offline needs none"
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
        """At the very end of a run ("finished", "stopped") have everything written; the next one is another to W&B."""
        import wandb

        if status in ("finished", "stopped"):
            self._outlive(wandb.finish, exit_code=PREEMPTED if status == "stopped" else 0)
        else:  # Lightning's, after the loop
            super().finalize(status)

    def _outlive(self, call: Callable, *args: Any, **kwargs: Any) -> None:
        if self.lost:
            return
        try:
            call(*args, **kwargs)
        except Exception as error:  # its connection, its server, its bugs
            import wandb

            self.lost = True
            said = f"warning: W&B has broken down ({first_line(error)[:160]}); metrics.csv has all metrics"
            tqdm.write(said, file=sys.stderr)
            with suppress(Exception):
                wandb.teardown()


@contextmanager
def blocked_for_children() -> Iterator[None]:
    """Processes that are started inside do not get the signals that end a run."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def wandb_logger(cfg: FitSettings, run_id: str) -> WeightsAndBiases:
    """The logger of a run, with its composed config."""
    how = mode(cfg.logger.mode)
    logger = WeightsAndBiases(
        name=cfg.name,
        project=cfg.logger.project,
        save_dir=cfg.run_dir,
        id=run_id,
        mode=how,
        resume=None if how == "offline" else "allow",
        config=to_dict(cfg),
    )
    logger._wandb_init.pop("anonymous", None)  # W&B warns of it, at every start
    return logger
