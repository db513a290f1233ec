"""Parquet and Arrow files as Hugging Face `datasets` writes them."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

NAMES = ["cat", "dog", "emu"]
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def photo(number: int, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    color = (number * 7 % 256, number * 31 % 256, number * 101 % 256)
    Image.new("RGB", (24 + number % 5, 20), color).save(buffer, kind)
    return buffer.getvalue()


def image_table(
    count: int,
    first: int = 0,
    labels: Sequence[Any] | None = None,
    names: Sequence[str] | None = NAMES,
    label: str = "label",
    **more: pa.Array,
) -> pa.Table:
    """Rows of photos and classes; `names`: those of the classes, None = no features are noted. `more`: columns."""
    images = [{"bytes": photo(first + i, "PNG" if i % 4 == 3 else "JPEG"), "path": f"{i}.jpg"} for i in range(count)]
    numbers = [(first + i) % 3 for i in range(count)] if labels is None else labels
    table = pa.table({"image": pa.array(images, IMAGE), label: pa.array(numbers), **more})
    if names is None:
        return table
    features = {"image": {"_type": "Image"}, label: {"names": list(names), "_type": "ClassLabel"}}
    return noted(table, features)


def table_of(images: Sequence[bytes], labels: Sequence[int], names: Sequence[str]) -> pa.Table:
    """Rows of given image files and classes."""
    column = pa.array([{"bytes": image, "path": None} for image in images], IMAGE)
    features = {"image": {"_type": "Image"}, "label": {"names": list(names), "_type": "ClassLabel"}}
    return noted(pa.table({"image": column, "label": pa.array(labels)}), features)


def noted(table: pa.Table, features: dict[str, Any]) -> pa.Table:
    return table.replace_schema_metadata({b"huggingface": json.dumps({"info": {"features": features}}).encode()})


def write(path: Path, table: pa.Table, **settings: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **{"row_group_size": 100, "compression": "snappy", **settings})
    return path


def save_to_disk(folder: Path, table: pa.Table, files: int = 2, batch: int = 7) -> Path:
    """What `Dataset.save_to_disk` leaves."""
    folder.mkdir(parents=True)
    names = [f"data-{number:05d}-of-{files:05d}.arrow" for number in range(files)]
    share = -(-len(table) // files)
    for number, name in enumerate(names):
        with pa.ipc.new_stream(folder / name, table.schema) as stream:
            stream.write_table(table.slice(number * share, share), max_chunksize=batch)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {}}))
    return folder
