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


def new_id() -> str:
    """A fresh W&B run id; it travels in the checkpoint, so that a resumed run continues its curves."""
    return uuid.uuid4().hex[:8]


def wandb_logger(cfg: DictConfig, run_id: str) -> WandbLogger:
    """The logger of a run, with its composed config."""
    os.environ["WANDB_MODE"] = mode(cfg.logger.mode)
    return WandbLogger(
        name=cfg.name,
        project=cfg.logger.project,
        save_dir=cfg.run_dir,
        id=run_id,
        resume="allow",
        offline=os.environ["WANDB_MODE"] == "offline",
        config=OmegaConf.to_container(cfg, resolve=True),
    )
