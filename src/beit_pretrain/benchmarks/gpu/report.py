"""What a stage has found so far, on the disk at once: a stage that is ended still leaves it. Imports nothing heavy."""

from __future__ import annotations

import gc
import json
import math
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

PARTIAL = ".partial.jsonl"  # end of the name of a running stage's file


class Report:
    """Appends to a file what a stage finds, piece by piece.

    Args:
        path: of the file; `read` puts the pieces together.
    """

    def __init__(self, path: Path):
        self.path = path

    def __call__(self, **found: Any) -> None:
        """Add findings; dictionaries are merged with what was found under the same names before."""
        self._append({"found": found})

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A part of the stage: what it raises is reported, and the rest of the stage goes on without it."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self._append({"errors": {name: short(error)}})
        if "torch" in sys.modules:
            import torch

            gc.collect()
            if torch.cuda.is_initialized():
                with suppress(RuntimeError):  # what failed may have left the process without its GPU
                    torch.cuda.empty_cache()

    def took(self, seconds: float) -> None:
        """The stage has ended."""
        self._append({"seconds": round(seconds, 1)})

    def failed(self, error: BaseException) -> None:
        """The stage ends with this error."""
        self._append({"error": short(error)})

    def _append(self, piece: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(compact(piece)) + "\n")


def read(path: Path) -> dict[str, Any]:
    """All pieces of a file as one: "found", "errors", "error" and "seconds", each where there is one."""
    whole: dict[str, Any] = {}
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            merge(whole, json.loads(line))
        except ValueError:  # the process was killed in the middle of a line
            break
    return whole


def merge(whole: dict[str, Any], piece: dict[str, Any]) -> None:
    """Put a dictionary into another, level by level."""
    for key, value in piece.items():
        if isinstance(value, dict) and isinstance(whole.get(key), dict):
            merge(whole[key], value)
        else:
            whole[key] = value


def compact(value: Any) -> Any:
    """Numbers of six digits, so that lines stay short; what JSON does not know as text."""
    if isinstance(value, dict):
        return {str(key): compact(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [compact(each) for each in value]
    if isinstance(value, bool) or value is None or isinstance(value, (int, str)):
        return value
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    return str(value)


def short(error: BaseException) -> str:
    """The kind of an error and the first lines of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' | '.join(lines[:3])}"[:400]
