"""Checkpoints on the Hugging Face Hub, by id or as hf://OWNER/NAME, as local folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from beit_pretrain.fileio import expand_home


def local_copy(source: str | Path, revision: str | None = None, names: Sequence[str] = ()) -> Path:
    """The path of a checkpoint on this machine."""
    return expand_home(source)
