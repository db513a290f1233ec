"""Stub: the integrator takes the file of the branch with the models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from beit_pretrain.errors import UserError


def local_copy(source: str | Path, revision: str | None = None, names: Sequence[str] = ()) -> Path:
    if not Path(source).expanduser().exists():
        raise UserError(f"{source} does not exist")
    return Path(source).expanduser()
