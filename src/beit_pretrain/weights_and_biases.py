"""Weights & Biases as a logger: offline unless the user configured an account, and the same run after a restart."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

from lightning.pytorch.loggers import WandbLogger
from omegaconf import DictConfig, OmegaConf


def mode(asked: str | None) -> str:
    """`asked`, else $WANDB_MODE, else "online" if an account is configured, else "offline"."""
    if asked or os.environ.get("WANDB_MODE"):
        return asked or os.environ["WANDB_MODE"]
    netrc = Path.home() / ".netrc"
    account = os.environ.get("WANDB_API_KEY") or (netrc.is_file() and "wandb" in netrc.read_text())
    return "online" if account else "offline"


def run_id(run_dir: Path) -> str:
    """The W&B id of the run in this folder; made at first use and kept in `wandb_id`."""
    file = run_dir / "wandb_id"
    if not file.is_file():
        run_dir.mkdir(parents=True, exist_ok=True)
        file.write_text(uuid.uuid4().hex[:8])
    return file.read_text().strip()


def wandb_logger(cfg: DictConfig, run_dir: Path) -> WandbLogger:
    """The logger of a run, with its composed config."""
    os.environ["WANDB_MODE"] = mode(cfg.logger.mode)
    return WandbLogger(
        name=cfg.name,
        project=cfg.logger.project,
        save_dir=run_dir,
        id=run_id(run_dir),
        resume="allow",
        offline=os.environ["WANDB_MODE"] == "offline",
        config=OmegaConf.to_container(cfg, resolve=True),
    )
