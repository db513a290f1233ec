"""Finds the list of classes that lies with the images: metadata.csv, .jsonl or .parquet, as Hugging Face's imagefolder.

Its column `file_name` holds paths below the folder that it lies in. It is used if another column has a usual name of
classes (label_columns.py); with captions alone the classes are those of the folders.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

from beit_pretrain.data import layout
from beit_pretrain.data.columns import class_names_of
from beit_pretrain.data.listing.label_columns import CLASS_COLUMNS, CLASS_IDS, plain
from beit_pretrain.data.listing.settings import LabelSettings
from beit_pretrain.data.table_rows import parquet
from beit_pretrain.errors import UserError, first_line

NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
FILE_NAME = "file_name"


def with_metadata(sources: list[str], split: str | None, labels: LabelSettings) -> LabelSettings:
    """The settings with `path` set to the metadata of a source that is a folder of images; says so. Else unchanged.

    The list is looked for in the folder, and in that of the part `split`. Raises UserError for one in parquet that
    cannot be read.
    """
    if labels.path is not None or len(sources) != 1 or not Path(sources[0]).is_dir():
        return labels
    folder = Path(sources[0])
    inner = sorted(path.name for path in folder.iterdir() if path.is_dir())
    parts = layout.parts_of(inner) or ({inner[0]: inner[0]} if len(inner) == 1 and layout.is_part(inner[0]) else {})
    of_part = layout.of_split(parts, split) if len(parts) > 1 and split else [*parts]
    for path in (place / name for place in [folder, *(folder / part for part in of_part)] for name in NAMES):
        if path.is_file() and _has_classes(path, labels.class_column):
            print(f"classes are those of {path}")
            return LabelSettings(**{**dict(labels), "path": str(path)})
    return labels


def parquet_rows(path: Path, file_column: str | None, class_column: str | None) -> Iterator[tuple[str, str]]:
    """Yield (file name, class) of every row that has a class. Raises ValueError for columns that are not there."""
    reader = parquet()
    file = reader.ParquetFile(path)
    schema = file.schema_arrow
    name = file_column or FILE_NAME
    kind = class_column or next((column for column in schema.names if _is_class(column) and column != name), None)
    if kind is None or name not in schema.names or kind not in schema.names:
        raise ValueError(f"it has no columns {name} and {kind or 'label'}; it has {', '.join(schema.names)}")
    numbered = class_names_of(schema, kind)
    for batch in file.iter_batches(columns=[name, kind]):
        for image, value in zip(batch.column(name).to_pylist(), batch.column(kind).to_pylist(), strict=True):
            if image and value is not None and value != -1:
                yield str(image), numbered[value] if numbered else str(value)


def _has_classes(path: Path, class_column: str | None) -> bool:
    columns = _columns(path)
    return FILE_NAME in columns and any(
        name == class_column if class_column else _is_class(name) for name in columns if name != FILE_NAME
    )


def _columns(path: Path) -> list[str]:
    """The names of a file's columns; none if it cannot be read as such."""
    if path.suffix == ".parquet":
        reader = parquet()
        try:
            return list(reader.read_schema(path).names)
        except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
            raise UserError(f"{path} cannot be read: {first_line(error)}") from None
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        line = file.readline(1 << 16)
    if path.suffix == ".csv":
        return next(csv.reader([line]), [])
    try:
        first = json.loads(line)
    except ValueError:
        return []
    return list(first) if isinstance(first, dict) else []


def _is_class(column: str) -> bool:
    return plain(column) in CLASS_COLUMNS | CLASS_IDS
