"""The input of `predict` and `embed`: files, folders, tars and shards as one stream of named images, read ahead.

Unreadable images are listed with the reason and do not stop the prediction.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from beit_pretrain.data.left_out import LEFT_OUT, LeftOut, summary
from beit_pretrain.data.listing.folder_classes import classes_of
from beit_pretrain.data.manifest import MANIFEST
from beit_pretrain.data.order import Order
from beit_pretrain.data.reader import ShardReader
from beit_pretrain.data.sources import Candidate, distinct_names, list_images, read_candidate
from beit_pretrain.data.storage import is_remote
from beit_pretrain.data.table_files import SUFFIXES
from beit_pretrain.data.table_rows import TableFile
from beit_pretrain.data.tar_specs import is_tar_spec
from beit_pretrain.errors import UserError, stop_if_memory_was_short
from beit_pretrain.fileio import expand_home
from beit_pretrain.processes import cores, end_with_parent
from beit_pretrain.transforms.image_io import open_image, reason

MOST_WORKERS = 8
IMAGES_PER_WORKER = 64  # with fewer images, starting a process does not pay off
NamedImage = tuple[str, Callable[[], bytes]]  # its name, and a function that reads its bytes
BAD_SHOWN = 20  # unreadable files that the summary names


class Item(NamedTuple):
    """One image of the stream: its views, or the reason why it cannot be read."""

    number: int  # its place in the source
    name: str
    views: list[Tensor]
    size: tuple[int, int]  # height and width, pixels; of the image itself
    problem: str | None


class ShardSource:
    """The samples of shards, tars or tables, named by shard and key; of several sources by their names too."""

    def __init__(self, src: Sequence[str]):
        self.reader = ShardReader(list(src))
        self.order = Order(self.reader.sizes, shuffle=False)
        several = len(src) > 1
        starts = [f"{name}/" if several else "" for name in distinct_names([Path(source) for source in src])]
        # By shard: the start of its names.
        self.start = [start for start, part in zip(starts, self.reader.parts(), strict=True) for _ in part]

    def __len__(self) -> int:
        return self.reader.samples

    def __getitem__(self, number: int) -> NamedImage:
        sample = self.order.sample_at(number)
        shard = self.start[sample.shard] + Path(self.reader.where(sample.shard)).stem
        return f"{shard}/{self.reader.key(sample)}", lambda: self.reader.read(sample).data

    def labels(self) -> list[str | None]:
        """The class of every image."""
        names = [*self.reader.classes, None]  # the label without a class is -1
        return [names[label] for shard in range(len(self.reader.sizes)) for label in self.reader.labels(shard)]

    def digest(self) -> str:
        """SHA-256 that changes with the images, or with the date of a local file; a tar's size alone says little."""
        dated = [(*shard[:5], _date(self.reader.where(n))) for n, shard in enumerate(self.reader.shards)]
        shards = [(start, *shard) for start, shard in zip(self.start, dated, strict=True)]
        return hashlib.sha256(json.dumps(shards).encode(errors="surrogateescape")).hexdigest()


class FileSource:
    """Images in files, tars and tables as they lie there, by name."""

    def __init__(self, images: Sequence[tuple[str, Candidate]]):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> NamedImage:
        name, image = self.images[number]
        return name, partial(read_candidate, image)

    def labels(self) -> list[str | None]:
        """The class of every image: its folder's name (folder_classes.py), or what the table says."""
        folders = list(dict.fromkeys(image.class_name or "" for _, image in self.images))
        class_of = dict(zip(folders, classes_of(folders)[0], strict=True))
        tables = {path: _classes_of_table(path) for path in {i.path for _, i in self.images if i.kind == "table"}}
        return [
            tables[image.path][image.offset] if image.kind == "table" else class_of[image.class_name or ""]
            for _, image in self.images
        ]

    def digest(self) -> str:
        """SHA-256 over names, places, sizes and dates of the files."""
        date = cache(_date)  # of a tar once
        found = hashlib.sha256()
        for name, image in self.images:
            found.update(json.dumps([name, image.offset, image.size, date(image.path)]).encode())
        return found.hexdigest()


def _date(path: str) -> int:
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return -1  # reading it will fail with a reason


def _classes_of_table(path: str) -> list[str | None]:
    table = TableFile(path, path)
    return table.classes(table.facts(None, None).columns)


Source = FileSource | ShardSource


def source_of(src: str | Sequence[str], left_out: LeftOut | None = None) -> Source:
    """The images of `src`: files, folders, tars and tables as they lie there; else what `open_source` opens.

    An image's name is its path in the source; of several sources it begins with as much of the source's path as tells
    them apart. What is left out goes into `left_out`.
    Raises UserError for a source that does not exist or has no image, and for shards mixed with files.
    """
    sources = [src] if isinstance(src, str) else list(src)
    shards = [is_remote(s) or is_tar_spec(s) or (expand_home(s) / MANIFEST).is_file() for s in sources]
    if any(shards) and not all(shards):
        raise UserError(f"src={list(sources)} mixes shard folders with files; predict them one after the other")
    if all(shards):
        return ShardSource(sources)
    images: list[tuple[str, Candidate]] = []
    paths = [Path(os.path.abspath(expand_home(source))) for source in sources]
    for source, path, name in zip(sources, paths, distinct_names(paths), strict=True):
        listed = list_images(source, left_out=left_out)
        alone = not path.is_dir() and path.suffix.lower() not in (".tar", *SUFFIXES)
        for image in listed:
            key = image.key if len(sources) == 1 else name if alone else f"{name}/{image.key}"
            images.append((key, image))
    return FileSource(images)


class ImageDataset(Dataset):
    """Image n of a source as an `Item`. `apply` makes the views (uint8) of an opened image."""

    def __init__(self, source: Source, apply: Callable[[Image.Image], list[np.ndarray]]):
        self.source, self.apply = source, apply

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, number: int) -> Item:
        name, read = self.source[number]
        try:
            with open_image(read()) as image:
                width, height = image.size
                return Item(number, name, [torch.from_numpy(view) for view in self.apply(image)], (height, width), None)
        except UserError:
            raise  # the shard itself
        except Exception as error:  # Pillow's decoders raise nearly everything on broken files
            stop_if_memory_was_short(error, name)
            return Item(number, name, [], (0, 0), reason(error))


def stream(
    dataset: ImageDataset,
    batch_size: int,
    num_workers: int | None,
    verb: str,
    bad: list[tuple[str, str]],
    start: int = 0,
) -> Iterator[list[Item]]:
    """Yield the readable images in batches, in order, with a progress bar; append (name, reason) of others to `bad`.

    When a batch is yielded, `bad` has all unreadable images of it and of the batches before.

    Args:
        num_workers: processes that read ahead; None = one per `IMAGES_PER_WORKER` images, at most `MOST_WORKERS`.
        start: the first image.
    """
    left = len(dataset) - start
    if num_workers is None:
        num_workers = min(cores(), MOST_WORKERS, left // IMAGES_PER_WORKER)
    loader = DataLoader(
        dataset,
        batch_size,
        sampler=range(start, len(dataset)),
        num_workers=num_workers,
        collate_fn=list,
        worker_init_fn=end_with_parent,
    )
    with tqdm(total=len(dataset), initial=start, desc=verb, unit=" images") as bar:
        for items in loader:
            bad += [(item.name, item.problem) for item in items if item.problem is not None]
            if good := [item for item in items if item.problem is None]:
                yield good
            bar.update(len(items))


def report(out: Path, done: str, bad: Sequence[tuple[str, str]], list_of_bad: Path, left_out: LeftOut) -> None:
    """Print what was written and the first unreadable files; list all of these with reasons in `list_of_bad` (JSONL).

    What was left out is listed beside it. Removes the lists of an earlier prediction if all files could be read.
    """
    list_of_others = list_of_bad.with_name(list_of_bad.name.replace("bad.jsonl", LEFT_OUT))
    left_out.write(list_of_others)
    left_out.warn(f"all in {list_of_others}")
    list_of_bad.unlink(missing_ok=True)
    if bad:
        list_of_bad.write_text("".join(json.dumps({"file": name, "reason": why}) + "\n" for name, why in bad))
    print(f"wrote {out}: {done}" + (f", {len(bad)} could not be read (all in {list_of_bad}):" if bad else ""))
    for name, why in bad[:BAD_SHOWN]:
        print(f"{name}: {why}")
    if counts := left_out.counts():
        print(f"{summary(counts)}; all in {list_of_others}")


def nothing(src: Any, bad: Sequence[tuple[str, str]]) -> UserError:
    """The error for a source without a readable image."""
    return UserError(f"none of the {len(bad)} files in {src} could be read as an image ({bad[0][0]}: {bad[0][1]})")
