"""Where predictions come from: files, folders, tars and shards as one stream of images with names, read ahead.

An image that cannot be read is an entry of the stream too, with its reason: no file of a person ends a prediction.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from beit_pretrain.data.manifest import MANIFEST
from beit_pretrain.data.order import Order
from beit_pretrain.data.reader import ShardReader
from beit_pretrain.data.sources import Candidate, list_images, read_candidate
from beit_pretrain.data.storage import is_remote
from beit_pretrain.errors import UserError, stop_if_memory_was_short
from beit_pretrain.processes import cores, end_with_parent
from beit_pretrain.transforms.image_io import open_image, reason

PROCESSES = 8  # that read ahead, at most
WORTH_IT = 64  # images for which a process is started


class Item(NamedTuple):
    """One image of the stream: its view (or views), or why it has none."""

    name: str
    views: list[Tensor]
    size: tuple[int, int]  # height and width, pixels; of the image itself
    problem: str | None


class FileSource:
    """Candidates of files, folders and tars."""

    def __init__(self, src: Sequence[str | Path]):
        self.candidates: list[Candidate] = []
        for source in src:
            found = list_images(source)
            several = len(src) > 1  # names of several sources must not meet
            prefix = f"{source}/" if several and Path(source).is_dir() else ""
            self.candidates += [c._replace(key=f"{prefix}{c.key}") for c in found]

    def __len__(self) -> int:
        return len(self.candidates)

    def name(self, number: int) -> str:
        return self.candidates[number].key

    def read(self, number: int) -> bytes:
        return read_candidate(self.candidates[number])


class ShardSource:
    """The samples of shard folders, here or elsewhere, by shard and key."""

    def __init__(self, src: Sequence[str | Path]):
        self.reader = ShardReader(list(src))
        self.order = Order(self.reader.sizes, shuffle=False)

    def __len__(self) -> int:
        return self.reader.samples

    def name(self, number: int) -> str:
        sample = self.order.sample_at(number)
        return f"{Path(self.reader.where(sample.shard)).stem}/{self.reader.key(sample)}"

    def read(self, number: int) -> bytes:
        return self.reader.read(self.order.sample_at(number)).data


def source_of(src: str | Sequence[str]) -> FileSource | ShardSource:
    """What `src` names: shards if a folder has a manifest or lies elsewhere, else files, folders and tars.

    Raises UserError for what does not exist or holds no image, and for shards mixed with files.
    """
    sources = [src] if isinstance(src, str) else list(src)
    shards = [is_remote(s) or (Path(s).expanduser() / MANIFEST).is_file() for s in sources]
    if any(shards) and not all(shards):
        raise UserError(f"src={list(sources)} mixes shard folders with files; predict them one after the other")
    return ShardSource(sources) if all(shards) else FileSource(sources)


class Views(Dataset):
    """Batch n of a source: a list of `Item`. `seen` makes the views (uint8) of an opened image."""

    def __init__(self, source: FileSource | ShardSource, apply: Callable[[Image.Image], list[np.ndarray]], batch: int):
        self.source, self.apply, self.batch = source, apply, batch

    def __len__(self) -> int:
        return -(-len(self.source) // self.batch)

    def __getitem__(self, number: int) -> list[Item]:
        first = number * self.batch
        return [self.item(n) for n in range(first, min(first + self.batch, len(self.source)))]

    def item(self, number: int) -> Item:
        name = self.source.name(number)
        try:
            with open_image(self.source.read(number)) as image:
                width, height = image.size
                return Item(name, [torch.from_numpy(view) for view in self.apply(image)], (height, width), None)
        except UserError:
            raise  # the shard itself
        except Exception as error:  # Pillow's decoders raise nearly everything on broken files
            stop_if_memory_was_short(error, name)
            return Item(name, [], (0, 0), reason(error))


def stream(views: Views, num_workers: int | None) -> Iterator[list[Item]]:
    """All batches in order, read ahead by some processes (None: as many as are worth it)."""
    if num_workers is None:
        num_workers = min(cores(), PROCESSES, len(views.source) // WORTH_IT)
    yield from DataLoader(
        views, batch_size=None, num_workers=num_workers, collate_fn=same, worker_init_fn=end_with_parent
    )


def same(items: list[Item]) -> list[Item]:
    """What a worker made, as it is."""
    return items


def write_bad(out: Path, bad: Sequence[tuple[str, str]]) -> Path | None:
    """List the files that could not be read, with their reasons, as JSON lines; removes an older list if all could."""
    if not bad:
        out.unlink(missing_ok=True)
        return None
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps({"file": name, "reason": why}) + "\n" for name, why in bad))
    return out


def summary(out: Path, done: str, bad: Sequence[tuple[str, str]], listed: Path | None) -> str:
    """The last lines of a prediction: what was written, and the first files that could not be read."""
    lines = [f"wrote {out}: {done}" + (f", {len(bad)} could not be read (all in {listed}):" if bad else "")]
    lines += [f"{name}: {why}" for name, why in bad[:20]]
    return "\n".join(lines)


def no_predictor(path: Any, kind: str) -> UserError:
    """The error for a checkpoint that answers nothing about an image."""
    return UserError(f"{path} holds a {kind}; a classifier or a segmentation model is needed")


def nothing(src: Any, bad: Sequence[tuple[str, str]]) -> UserError:
    """The error for a source of which no file is an image."""
    return UserError(f"none of the {len(bad)} files in {src} could be read as an image ({bad[0][0]}: {bad[0][1]})")
