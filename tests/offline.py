"""Reads the history that W&B wrote offline: a `.wandb` file in LevelDB's log format with protobuf records."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

from tiny import comparable, last_checkpoint, rows_of
from wandb.proto.wandb_internal_pb2 import Record

BLOCK, HEADER, FULL, FIRST, LAST = 32768, 7, 1, 2, 4


def history(folder: Path) -> list[dict[str, float]]:
    """The rows of an offline run's folder in the order of logging."""
    (file,) = folder.glob("*.wandb")
    rows = []
    for data in records(file.read_bytes()):
        record = Record.FromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


def records(data: bytes) -> Iterator[bytes]:
    """The records of a log file up to its end, or to where a kill truncated it."""
    place, parts = HEADER, b""
    while place + HEADER <= len(data):
        if BLOCK - place % BLOCK < HEADER:  # the rest of a block
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        part = data[place + HEADER : place + HEADER + length]
        if not kind or len(part) < length:
            return
        parts = part if kind in (FULL, FIRST) else parts + part
        if kind in (FULL, LAST):
            yield parts
        place += HEADER + length


def folders(run: Path) -> list[Path]:
    """The offline folders of a run, one for each start, oldest first."""
    return sorted((run / "wandb").glob("offline-run-*"))


def same_history(run: Path) -> int:
    """Assert that the newest offline folder of W&B has every step once, with the numbers of metrics.csv."""
    ids = {folder.name.rpartition("-")[2] for folder in folders(run)}
    assert ids == {last_checkpoint(run)["beit_pretrain"]["wandb_id"]}
    found: dict[int, dict[str, float]] = {}
    for row in history(folders(run)[-1]):
        step = int(row["trainer/global_step"])
        metrics = comparable(row)
        assert not found.setdefault(step, {}).keys() & metrics.keys(), f"twice at step {step}"
        found[step] |= metrics
    assert found == rows_of(run)
    return len(found)
