"""Indexes existing WebDataset tars: an index for each and a manifest; the tars are not copied or changed.

A sample of such a tar is an image with a `.cls` (class number) of the same key, if it is labelled
(`manifest.scan_shard`). Nothing is decoded: images that do not decode are handled in training.
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

from beit_pretrain.data import manifest
from beit_pretrain.data.manifest import MANIFEST, REJECTED
from beit_pretrain.data.sources import COMPRESSED, COMPRESSED_TARS
from beit_pretrain.data.write.labels import read_class_names
from beit_pretrain.errors import UserError
from beit_pretrain.fileio import discard, publish
from beit_pretrain.processes import cores, in_order
from beit_pretrain.transforms.image_io import MAX_PIXELS


def index_shards(
    src: str | Path, out: str | Path | None = None, classes: str | Path | None = None, num_workers: int | None = None
) -> Path:
    """Write indices and manifest for the tars in the folder `src`, and return the folder that holds them.

    `out`: a folder for indices, manifest and links to the tars; None = beside the tars. `classes`: file with the class
    names, a line each, in the order of their numbers; None = the numbers themselves. `num_workers`: None = all cores.

    The manifest comes last: rerun the same command after a kill; a failure leaves nothing behind. Images that are left
    out (empty, or further ones of a sample) are counted in a warning. Raises UserError for a folder that holds no such
    tars or a manifest already, for a tar that cannot be read, named in a manifest or holds no sample, and if the folder
    cannot be written.
    """
    src = Path(src).expanduser()
    tars = _tars(src)
    folder = src if out is None else Path(out).expanduser()
    if (folder / MANIFEST).exists():
        raise UserError(f"{folder} has a {MANIFEST} already; see: shards verify src={folder}")
    with _staged(folder) as temporary:
        with in_order(min(num_workers or cores(), len(tars))) as run:
            found = run(partial(_index, folder, temporary), tars)
            done = [*tqdm(found, total=len(tars), unit=" shards", desc="index")]
        entries, each_labels, masks, left_out = zip(*done, strict=True)
        labels = np.concatenate(each_labels)
        names = _class_names(int(labels.max()) + 1, classes)
        (temporary / REJECTED).write_text("")
        made_from = {"source": src.resolve().name, "settings": {"max_pixels": MAX_PIXELS}}
        manifest.write_manifest(temporary, list(entries), labels, names, segmentation=any(masks), **made_from)
    if omitted := sum(left_out):
        print(f"warning: left out {omitted:,} images: empty, or further ones of a sample", file=sys.stderr)
    return folder


def _tars(src: Path) -> list[Path]:
    """The tars in a folder, by name. Raises UserError if there are none, or one whose name no manifest may have."""
    files = [path for path in sorted(src.iterdir()) if not path.name.startswith(".")] if src.is_dir() else []
    tars = [path for path in files if path.suffix == ".tar" and path.is_file()]
    if not tars:
        said = "give the folder of the WebDataset shards"
        if compressed := [path for path in files if path.name.lower().endswith(COMPRESSED_TARS)]:
            said = f"{compressed[0].name} {COMPRESSED}"
        elif inner := [path for path in files if path.is_dir() and any(path.glob("*.tar"))]:
            said = f"its folder {inner[0].name} does: give src={inner[0]}"
        raise UserError(f"src={src} holds no tars; {said}")
    if wrong := [path for path in tars if not manifest.SHARD_NAME.fullmatch(path.name)]:
        rule = "begins with a letter, a digit or _ and has no colon, backslash or control character"
        raise UserError(f"{str(wrong[0])!r} must be renamed: the name of a shard {rule}")
    return tars


@contextmanager
def _staged(folder: Path) -> Iterator[Path]:
    """Lend a temporary folder whose files go into `folder`, the manifest last, if the block succeeds.

    If not, nothing is left, neither of folders that did not exist. An OSError becomes a UserError.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    temporary = folder / ".indexing"
    try:
        discard(temporary)  # left by a process that was killed
        temporary.mkdir(parents=True)
        yield temporary
        publish(temporary, folder, last=MANIFEST)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            discard(temporary)
            for path in made:
                path.rmdir()  # unless it holds the files


def _index(folder: Path, temporary: Path, tar: Path) -> tuple[dict[str, Any], np.ndarray, bool, int]:
    """Link (if `folder` is another) and index a tar: its entry, labels, whether it has masks, images left out."""
    shard = folder / tar.name
    if folder.resolve() != tar.parent.resolve():
        ours = shard.is_symlink() and shard.resolve() == tar.resolve()
        if not ours and (shard.is_symlink() or shard.exists()):
            raise UserError(f"{shard} exists already; choose another out=")
        (temporary / tar.name).symlink_to(tar.resolve())
    rows, left_out = manifest.scan_shard(tar)
    if not len(rows):
        raise UserError(f"{tar} holds no image with a name that says so (.jpg, .png, ...)")
    manifest.write_index(temporary / tar.name, rows)
    masks = bool(rows["segmentation_size"].any())
    return manifest.shard_entry(tar, len(rows)), rows["label"].copy(), masks, left_out


def _class_names(count: int, file: str | Path | None) -> list[str]:
    """Names of the classes 0, 1, ... Raises UserError as `read_class_names` does, and for too few."""
    if file is None:
        return [str(number) for number in range(count)]
    names = read_class_names(file)
    if len(names) < count:
        raise UserError(f"labels={file} names {len(names)} classes, but the shards have the number {count - 1}")
    return names
