"""Take over existing WebDataset tars as they are: an index beside each and a manifest, without writing them again.

A sample of such a tar is an image with a `.cls` (class number) of the same key, if it is labelled
(`manifest.scan_shard`). Nothing is decoded: what does not decode shows in training.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from beit_pretrain.data.manifest import (
    MANIFEST,
    REJECTED,
    SHARD_NAME,
    ShardScan,
    index_path,
    scan_shard,
    shard_entry,
    write_manifest,
)
from beit_pretrain.data.sources import COMPRESSED_TARS
from beit_pretrain.data.write.shard_writer import write_index
from beit_pretrain.errors import UserError
from beit_pretrain.processes import cores, in_order
from beit_pretrain.transforms.image_io import MAX_PIXELS


def index_shards(
    src: str | Path, out: str | Path | None = None, classes: str | Path | None = None, num_workers: int | None = None
) -> Path:
    """Write indices and manifest for the tars in the folder `src`, and return the folder that holds them.

    `out`: a folder for indices, manifest and links to the tars; None = beside the tars. `classes`: file with the class
    names, a line each, in the order of their numbers; None = the numbers themselves. `workers`: None = all cores.

    The manifest comes last: a killed run is started again; a failed one leaves nothing behind. Images that are left out
    (empty, or further ones of a sample) are counted in a warning. Raises UserError for a folder that holds no such tars
    or a manifest already, for a tar that cannot be read, named in a manifest or holds no sample, and if the folder
    cannot be written.
    """
    src = Path(src).expanduser()
    tars = _tars(src)
    folder = src if out is None else Path(out).expanduser()
    if (folder / MANIFEST).exists():
        raise UserError(f"{folder} has a {MANIFEST} already; see: shards verify src={folder}")
    with _undone(folder, tars):
        folder.mkdir(parents=True, exist_ok=True)
        entries, labels, masks, left_out = [], [], False, 0
        with in_order(min(num_workers or cores(), len(tars))) as run:
            found = run(partial(_index, folder), tars)
            for entry, (index, omitted) in tqdm(found, total=len(tars), unit=" shards", desc="index"):
                entries.append(entry)
                labels.append(index["label"].astype(np.int64))
                masks |= bool(index["segmentation_size"].any())
                left_out += omitted
        names = _class_names(max(int(label.max()) for label in labels) + 1, classes)
        (folder / REJECTED).write_text("")
        write_manifest(
            folder,
            entries,
            np.concatenate(labels),
            names,
            segmentation=masks,
            seed=0,
            source=src.resolve().name,
            settings={"max_pixels": MAX_PIXELS},
        )
    if left_out:
        print(f"warning: left out {left_out:,} images: empty, or further ones of a sample", file=sys.stderr)
    return folder


def _tars(src: Path) -> list[Path]:
    """The tars in a folder, by name. Raises UserError if there are none, or one whose name no manifest may have."""
    files = [path for path in sorted(src.iterdir()) if not path.name.startswith(".")] if src.is_dir() else []
    tars = [path for path in files if path.suffix == ".tar" and path.is_file()]
    if not tars:
        said = "give the folder of the WebDataset shards"
        if compressed := [path for path in files if path.name.lower().endswith(COMPRESSED_TARS)]:
            said = f"{compressed[0].name} is compressed, which allows no random access; decompress it first"
        elif inner := [path for path in files if path.is_dir() and any(path.glob("*.tar"))]:
            said = f"its folder {inner[0].name} does: give src={inner[0]}"
        raise UserError(f"src={src} holds no tars; {said}")
    for tar in tars:
        if not SHARD_NAME.fullmatch(tar.name):
            rule = "begins with a letter, a digit or _ and has no colon, backslash or control character"
            raise UserError(f"{str(tar)!r} must be renamed: the name of a shard {rule}")
    return tars


@contextmanager
def _undone(folder: Path, tars: list[Path]) -> Iterator[None]:
    """Remove what the block has written, and the folders that it has made, if it fails.

    Raises UserError, with the folder's name, if it fails since that cannot be written.
    """
    ours = [folder / name for name in (REJECTED, MANIFEST, *(tar.name for tar in tars))]
    ours += [index_path(folder / tar.name) for tar in tars]
    new = [path for path in ours if not path.exists() and not path.is_symlink()]
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except BaseException as error:
        with suppress(OSError):  # what went wrong first is what counts
            for path in new:
                path.unlink(missing_ok=True)
            for path in made:
                path.rmdir()
        if isinstance(error, OSError):
            raise UserError(f"cannot write to {folder}: {error.strerror or error}") from None
        raise


def _index(folder: Path, tar: Path) -> tuple[dict[str, Any], ShardScan]:
    """Link (if `folder` is another) and index a tar; its entry in the manifest, and what was found in it."""
    shard = folder / tar.name
    if folder.resolve() != tar.parent.resolve() and not (shard.is_symlink() and shard.resolve() == tar.resolve()):
        if shard.is_symlink() or shard.exists():
            raise UserError(f"{shard} exists already; choose another out=")
        shard.symlink_to(tar.resolve())
    found = scan_shard(shard)
    if not len(found.rows):
        raise UserError(f"{tar} holds no image with a name that says so (.jpg, .png, ...)")
    write_index(shard, found.rows)
    return shard_entry(shard, len(found.rows)), found


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
