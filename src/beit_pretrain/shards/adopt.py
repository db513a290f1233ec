"""Take over existing WebDataset tars as they are: an index beside each and a manifest, without writing them again.

A sample of such a tar is an image with a `.cls` (class number) of the same key, if it is labelled. Nothing is decoded:
what does not decode shows in training.
"""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from beit_pretrain.errors import UserError
from beit_pretrain.images.reading import MAX_PIXELS
from beit_pretrain.shards.manifest import MANIFEST, REJECTED, index_path, index_shard, shard_entry, write_manifest
from beit_pretrain.shards.packing import write_atomically
from beit_pretrain.shards.processes import cores, in_order


def index_shards(
    src: str | Path, out: str | Path | None = None, classes: str | Path | None = None, workers: int | None = None
) -> Path:
    """Write indices and manifest for the tars in the folder `src`, and return the folder that holds them.

    `out`: a folder for indices, manifest and links to the tars; None = beside the tars. `classes`: file with the class
    names, a line each, in the order of their numbers; None = the numbers themselves. `workers`: None = all cores.

    The manifest comes last: a killed run is started again. Raises UserError for a folder that holds no such tars
    or a manifest already, and for a tar that cannot be read or holds no sample.
    """
    src = Path(src).expanduser()
    tars = sorted(path for path in src.glob("*.tar") if not path.name.startswith("."))
    if not src.is_dir() or not tars:
        raise UserError(f"src={src} holds no tars; give the folder of the WebDataset shards")
    folder = src if out is None else Path(out).expanduser()
    if (folder / MANIFEST).exists():
        raise UserError(f"{folder} has a {MANIFEST} already; see: shards verify src={folder}")
    folder.mkdir(parents=True, exist_ok=True)
    entries, counts, labels = [], np.zeros(0, np.int64), []
    with in_order(min(workers or cores(), len(tars))) as run:
        found = run(partial(_index, folder), tars)
        for entry, index in tqdm(found, total=len(tars), unit=" shards", desc="index"):
            entries.append(entry)
            labels.append(index["label"].astype(np.int64))
            counts = np.union1d(counts, labels[-1])
    names = _class_names(int(counts.max()) + 1, classes)
    (folder / REJECTED).write_text("")
    write_manifest(
        folder,
        entries,
        np.concatenate(labels),
        names,
        segmentation=any(np.load(index_path(folder / e["name"]))["segmentation_size"].any() for e in entries),
        seed=0,
        source=src.resolve().name,
        settings={"max_pixels": MAX_PIXELS},
    )
    return folder


def _index(folder: Path, tar: Path) -> tuple[dict[str, Any], np.ndarray]:
    """Link (if `folder` is another) and index a tar; its entry in the manifest, and its index."""
    shard = folder / tar.name
    if folder.resolve() != tar.parent.resolve() and not (shard.is_symlink() and shard.resolve() == tar.resolve()):
        if shard.is_symlink() or shard.exists():
            raise UserError(f"{shard} exists already; choose another out=")
        shard.symlink_to(tar.resolve())
    index = index_shard(shard)
    if not len(index):
        raise UserError(f"{tar} holds no image with a name that says so (.jpg, .png, ...)")
    if index["label"].min() < -1:
        raise UserError(f"{tar} has the class number {index['label'].min()}")
    buffer = io.BytesIO()
    np.save(buffer, index)
    write_atomically(index_path(shard), buffer.getvalue())
    return shard_entry(shard, len(index)), index


def _class_names(count: int, file: str | Path | None) -> list[str]:
    """Names of the classes 0, 1, ... Raises UserError if the file names too few."""
    if file is None:
        return [str(number) for number in range(count)]
    try:
        names = Path(file).expanduser().read_text("utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"labels={file} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(names) < count:
        raise UserError(f"labels={file} names {len(names)} classes, but the shards have the number {count - 1}")
    return names
