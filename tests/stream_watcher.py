"""A Lightning callback that tests of streams install: it records the classes of the images of every step.

SEEN=FILE: a JSON line for every micro-batch: finished steps before it, and the labels, which tell the images apart.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

from lightning import Callback


def callbacks() -> list[Callback]:
    return [Seen()] if "SEEN" in os.environ else []


class Seen(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        line = json.dumps({"step": trainer.global_step, "labels": batch["label"].tolist()}) + "\n"
        file = os.open(os.environ["SEEN"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.write(file, line.encode())  # in one piece, whichever process
        os.close(file)


def installed(package: Path, record: Path) -> dict[str, str]:
    """The environment in which `fit` takes the callback; Lightning finds it as those of any installed package."""
    about = package / "stream_watcher-0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: stream_watcher\nVersion: 0\n")
    (about / "entry_points.txt").write_text("[lightning.pytorch.callbacks_factory]\nseen = stream_watcher:callbacks\n")
    (package / "stream_watcher.py").write_text(Path(__file__).read_text())
    path = os.pathsep.join([str(package), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {"PYTHONPATH": path, "SEEN": str(record)}


def used(record: Path, lives: list[int]) -> Counter:
    """How often each image was used in a run whose starts resumed after the steps `lives`; their lines follow a mark.

    Steps that were lost with the process, and trained again, count once.
    """
    parts = [part.splitlines() for part in record.read_text().split("--- start\n")[1:]]
    found: Counter = Counter()
    for part, end in zip(parts, [*lives[1:], 10**9], strict=True):
        for line in part:
            entry = json.loads(line)
            if entry["step"] < end:
                found.update(entry["labels"])
    return found


def due(places: list[dict], tars: list[list[int]], seed: int) -> Counter:
    """How often each image must have been used by the place of the stream in a checkpoint; `tars`: classes of each."""
    from beit_pretrain.data.stream_order import Place, TarOrder

    place, order = Place.unpacked(places[0]), TarOrder(len(tars), seed)
    found: Counter = Counter()
    for entry in range(place.next):
        found.update(tars[order.at(entry)[0]])
    for part in place.backlog:
        labels = tars[order.at(part.entry)[0]]
        found.subtract(labels[part.start :] + [labels[row] for row in part.rows])
    return +found
