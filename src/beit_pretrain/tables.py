"""Tables: as text for people, as CSV for programs."""

from __future__ import annotations

import csv
from pathlib import Path

from beit_pretrain.fileio import atomic_path


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table with aligned columns: it reads well in a terminal and can be pasted into a page."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def write_csv(path: Path, header: tuple[str, ...], rows: list[tuple]) -> None:
    """Write a table atomically, and its folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary, temporary.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])
