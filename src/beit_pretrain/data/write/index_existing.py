"""Indexes existing WebDataset tars: an index for each and a manifest; the tars are not copied or changed.

A sample of such a tar is an image with a `.cls` (class number) of the same key, if it is labelled
(`shard_index.scan_shard`). Nothing is decoded: images that do not decode are handled in training.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from beit_pretrain.data import layout, manifest, shard_index
from beit_pretrain.data.left_out import LEFT_OUT, LeftOut
from beit_pretrain.data.listing.labels import read_class_names
from beit_pretrain.data.manifest import MANIFEST, REJECTED
from beit_pretrain.data.sources import nothing_in
from beit_pretrain.errors import UserError
from beit_pretrain.fileio import discard, expand_home, publish
from beit_pretrain.processes import cores, in_order
from beit_pretrain.transforms.image_io import IMAGE_EXTENSIONS, MAX_PIXELS

LOOSE = "an image beside the tars; shards make reads folders of images"
NO_SAMPLE = "a tar without an image"
PARTS = "tars of several parts (train, val) become one set; give each part a folder of its own, links will do"
STAGED = ".indexing"
INNER = "a folder with tars of its own; index it by itself"


def index_shards(
    src: str | Path,
    out: str | Path | None = None,
    classes: str | Path | None = None,
    num_workers: int | None = None,
    image_key: Sequence[str] = (),
) -> Path:
    """Write indices and manifest for the tars in the folder `src`, and return the folder that holds them.

    `out`: a folder for indices, manifest and links to the tars; None = beside the tars. `classes`: file with the class
    names, a line each, in the order of their numbers; None = the numbers themselves. `num_workers`: None = all cores.
    `image_key`: extensions of the member that is a sample's image, where it has several (`shard_index.scan_shard`).

    The manifest comes last: rerun the same command after a kill; a failure leaves nothing behind. What is left out is
    counted and listed in left_out.jsonl. Raises UserError for a folder that holds no such tars or a manifest already,
    for a tar that cannot be read or named in a manifest, if there is no sample, and if the folder cannot be written.
    """
    src, left_out = expand_home(src), LeftOut()
    tars = _tars(src, left_out)
    folder = src if out is None else expand_home(out)
    if (folder / MANIFEST).exists():
        raise UserError(f"{folder} has a {MANIFEST} already; see: shards verify src={folder}")
    with _staged(folder) as temporary:
        with in_order(min(num_workers or cores(), len(tars))) as run:
            found = run(partial(_index, folder, temporary, tuple(image_key)), tars)
            done = [*tqdm(found, total=len(tars), unit=" shards", desc="index")]
        for tar, (entry, _, _, without) in zip(tars, done, strict=True):
            left_out.update(without)
            if entry is None:
                left_out.add(tar.name, NO_SAMPLE)
        if not (entries := [entry for entry, *_ in done if entry is not None]):
            raise nothing_in(src, "no member of its tars has a name that says so (.jpg, .png, ...)", left_out)
        labels = np.concatenate([some for _, some, *_ in done])
        names = _class_names(int(labels.max()) + 1, classes)
        (temporary / REJECTED).write_text("")
        left_out.write(temporary / LEFT_OUT)
        settings = {"max_pixels": MAX_PIXELS} | ({"image_key": list(image_key)} if image_key else {})
        about = {"source": src.resolve().name, "settings": settings, "left_out": left_out.counts()}
        manifest.write_manifest(temporary, entries, labels, names, segmentation=any(m for _, _, m, _ in done), **about)
    left_out.warn(f"all in {LEFT_OUT}")
    return folder


def _tars(src: Path, left_out: LeftOut) -> list[Path]:
    """The tars in a folder, by name. Raises UserError if there are none, or one whose name no manifest may have."""
    files = sorted(src.iterdir()) if src.is_dir() else []
    for path in [path for path in files if layout.is_by_product(path.name) and path.name != STAGED]:
        left_out.add(path.name, layout.BY_PRODUCT)
    files = [path for path in files if not layout.is_by_product(path.name)]
    tars = [path for path in files if path.suffix.lower() == ".tar" and path.is_file()]
    if not tars:
        said = "give the folder of the WebDataset shards"
        if compressed := [path for path in files if path.name.lower().endswith(layout.COMPRESSED_TARS)]:
            said = f"{compressed[0].name} is {layout.COMPRESSED}"
        elif inner := [path for path in files if path.is_dir() and any(path.glob("*.tar"))]:
            said = f"its folder {inner[0].name} does: give src={inner[0]}"
        raise UserError(f"src={src} holds no tars; {said}")
    if wrong := [path for path in tars if not manifest.SHARD_NAME.fullmatch(path.name)]:
        rule = "begins with a letter, a digit or _, has no colon, backslash or control character, and ends with .tar"
        raise UserError(f"{str(wrong[0])!r} must be renamed: the name of a shard {rule}")
    known_tars = {*tars}
    for path in files:
        if path.is_dir():
            if any(path.glob("*.tar")):
                left_out.add(f"{path.name}/", INNER)
        elif path not in known_tars:
            image = path.suffix.lower().removeprefix(".") in IMAGE_EXTENSIONS
            why = LOOSE if image else layout.why_no_image(path.name)
            of_a_tar = path.with_suffix(".tar") in known_tars  # such as the parquet files of img2dataset
            known = why in (LOOSE, layout.COMPRESSED) or (why == layout.ARCHIVE and not of_a_tar)
            left_out.add(path.name, why if why and known else layout.NO_IMAGE)
    if parts := layout.parts_of(path.stem for path in tars):
        left_out.note(min(parts), PARTS)
    return tars


@contextmanager
def _staged(folder: Path) -> Iterator[Path]:
    """Lend a temporary folder whose files go into `folder`, the manifest last, if the block succeeds.

    If not, nothing is left, neither of folders that did not exist. An OSError becomes a UserError.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    temporary = folder / STAGED
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


def _index(
    folder: Path, temporary: Path, image_key: tuple[str, ...], tar: Path
) -> tuple[dict[str, Any] | None, np.ndarray, bool, LeftOut]:
    """Link (if `folder` is another) and index a tar: its entry (None = it has no sample), labels, whether it has masks,
    what is left out."""
    shard, left_out = folder / tar.name, LeftOut()
    rows = shard_index.scan_shard(tar, image_key, left_out)
    if not len(rows):
        return None, np.empty(0, np.int64), False, left_out
    if folder.resolve() != tar.parent.resolve():
        ours = shard.is_symlink() and shard.resolve() == tar.resolve()
        if not ours and (shard.is_symlink() or shard.exists()):
            raise UserError(f"{shard} exists already; choose another out=")
        (temporary / tar.name).symlink_to(tar.resolve())
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
