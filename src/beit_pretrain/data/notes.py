"""What earlier starts have found out about sources: small JSON files in the cache."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


def digest(*of: Any) -> str:
    """A name for plain values, 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(of).encode(errors="surrogateescape")).hexdigest()


def read_note(path: Path) -> dict[str, Any] | None:
    """The object in a note; None if there is no whole one."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
