"""Results of a measurement, collected piece by piece. Imports nothing heavy.

In a stage of `bench gpu` every piece is written to the disk at once, so that a killed stage keeps its results.
"""

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
    """Collects findings piece by piece, in `found`.

    Args:
        path: a file to which each piece is appended, for `read`. With it an error costs only its part of the work.
    """

    def __init__(self, path: Path | None = None):
        self.path = path
        self.found: dict[str, Any] = {}
        self.errors: dict[str, str] = {}  # of parts

    def __call__(self, **found: Any) -> None:
        """Add results; dictionaries are merged with earlier ones of the same name."""
        merge(self.found, found)
        self.write(found=found)

    def write(self, **piece: Any) -> None:
        """Append to the file: `found`, `errors`, a `headline`, at the end of a stage its `error` or its `seconds`."""
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(compact(piece)) + "\n")

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A part of the work. With a file, its errors are reported and the work continues after it."""
        try:
            yield
        except Exception as error:
            if self.path is None:
                raise
            traceback.print_exc()
            self.errors[name] = short(error)
            self.write(errors={name: self.errors[name]})
        if torch := sys.modules.get("torch"):
            gc.collect()
            if torch.cuda.is_initialized():
                with suppress(RuntimeError):  # the error may have left the process without its GPU
                    torch.cuda.empty_cache()


def read(path: Path) -> dict[str, Any]:
    """All pieces of a report's file, merged."""
    whole: dict[str, Any] = {}
    for piece in json_lines(path):
        merge(whole, piece)
    return whole


def json_lines(path: Path) -> Iterator[Any]:
    """What the lines of a file hold; none without the file, nor of a line in whose middle its writer was killed."""
    for line in path.read_text().splitlines() if path.is_file() else ():
        with suppress(ValueError):
            yield json.loads(line)


def merge(whole: dict[str, Any], piece: dict[str, Any]) -> None:
    """Put a dictionary into another, level by level."""
    for key, value in piece.items():
        if isinstance(value, dict) and isinstance(whole.get(key), dict):
            merge(whole[key], value)
        else:
            whole[key] = value


def compact(value: Any) -> Any:
    """Round numbers to six digits; convert what JSON does not know to text."""
    if isinstance(value, dict):
        return {str(key): compact(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [compact(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    return value if value is None or isinstance(value, (int, str)) else str(value)


def short(error: BaseException) -> str:
    """The kind of an error and the first lines of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' | '.join(lines[:3])}"[:400]
