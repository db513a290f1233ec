"""Tables: as text for people, as CSV for programs."""

from __future__ import annotations

import csv
from pathlib import Path

from beit_pretrain.errors import UserError, first_line
from beit_pretrain.fileio import atomic_path


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table with aligned columns: it reads well in a terminal and can be pasted into a page."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def read_rows(path: str | Path) -> tuple[list[str], dict[int, dict[str, float]]]:
    """Columns, and {step: {metric: value}} of a run's metrics.csv; empty cells are left out.

    Raises UserError if the file is damaged or holds something else.
    """
    try:
        text = Path(path).read_text("utf-8")
        reader = csv.DictReader(text[: text.rfind("\n") + 1].splitlines())  # without a last line that a crash has torn
        rows = {int(r["step"]): {k: float(v) for k, v in r.items() if k != "step" and v} for r in reader}
        return list(reader.fieldnames or ["step"]), rows
    except (ValueError, LookupError, TypeError, csv.Error) as error:
        raise UserError(f"{path} is damaged ({first_line(error)}); move it away to resume") from None


def curve(path: str | Path, metric: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric of a run's metrics.csv."""
    points = [(step, row[metric]) for step, row in sorted(read_rows(path)[1].items()) if metric in row]
    return [step for step, _ in points], [value for _, value in points]


def write_csv(path: Path, header: tuple[str, ...], rows: list[tuple]) -> None:
    """Write a table atomically, and its folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        atomic_path(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        csv.writer(file, lineterminator="\n").writerows([header, *rows])
