"""Indexes existing WebDataset tars, local or remote: an index for each and a manifest; the tars are not changed.

A sample of such a tar is an image with a `.cls` (class number) of the same key, if it is labelled
(`shard_index.scan_shard`). Nothing is decoded: images that do not decode are handled in training.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from beit_pretrain.data import layout, manifest, shard_index
from beit_pretrain.data.left_out import LEFT_OUT, LeftOut
from beit_pretrain.data.listing.labels import read_class_names
from beit_pretrain.data.manifest import MANIFEST, REJECTED
from beit_pretrain.data.read_tars import each_read, listed, records_of
from beit_pretrain.data.remote_tars import RemoteTars
from beit_pretrain.data.settings import RemoteOptions, SourceSettings
from beit_pretrain.data.sources import nothing_in
from beit_pretrain.data.split_info import split_address, tars_of_location
from beit_pretrain.data.storage import is_remote, without_secrets
from beit_pretrain.data.tar_specs import expand, is_tar_spec
from beit_pretrain.errors import UserError
from beit_pretrain.fileio import discard, expand_home, publish
from beit_pretrain.processes import cores, in_order
from beit_pretrain.transforms.image_io import IMAGE_EXTENSIONS, MAX_PIXELS

LOOSE = "an image beside the tars; shards make reads folders of images"
NO_SAMPLE = "a tar without an image"
PARTS = "tars of several parts (train, val) become one set; give each part a folder of its own, links will do"
NAME_RULE = "begins with a letter, a digit or _, has no colon, backslash or control character, and ends with .tar"
STAGED = ".indexing"
INNER = "a folder with tars of its own; index it by itself"


class _Scanned(NamedTuple):
    """A tar that has been read: its name, entry in the manifest (None = it has no sample), labels, whether it has label
    maps, and what is left out."""

    name: str
    entry: dict[str, Any] | None
    labels: np.ndarray
    label_maps: bool
    left_out: LeftOut


def index_shards(
    src: str | Path | Sequence[str],
    out: str | Path | None = None,
    classes: str | Path | None = None,
    num_workers: int | None = None,
    image_key: Sequence[str] = (),
    split: str = "train",
    access: RemoteOptions | None = None,
) -> Path:
    """Write indices and manifest for tars of one folder, and return the folder that holds them.

    Args:
        src: a folder, or a specification of tars (tar_specs.py), or several, local or remote. Remote tars are read
            once, by way of the cache; `out` gets indices and manifest, for whoever uploads them beside the tars.
        out: a folder for indices, manifest and links to local tars; None = beside the tars.
        classes: file with the class names, a line each, in the order of their numbers; None = the numbers themselves.
        num_workers: processes for local tars; None = all cores.
        image_key: extensions of the member that is a sample's image, where it has several (`shard_index.scan_shard`).
        split: the part of a remote location with parts.
        access: cache and retries of remote tars.

    The manifest comes last: rerun the same command after a kill; a failure leaves nothing behind. What is left out is
    counted and listed in left_out.jsonl. Raises UserError for a folder that holds no such tars or a manifest already,
    for a tar that cannot be read or named in a manifest, if there is no sample, and if the folder cannot be written.
    """
    left_out, key, access = LeftOut(), tuple(image_key), access or RemoteOptions()
    place, tars = _find(src, split, left_out, access)
    if isinstance(place, str) and out is None:
        raise UserError("shards index of remote tars needs out=FOLDER for the indices and the manifest")
    folder = expand_home(place if out is None else out)
    if (folder / MANIFEST).exists():
        raise UserError(f"{folder} has a {MANIFEST} already; see: shards verify src={folder}")
    with _staged(folder) as temporary:
        if isinstance(place, str):
            done = _scan_remote(tars, temporary, key, access)
        else:
            with in_order(min(num_workers or cores(), len(tars))) as run:
                found = run(partial(_index, folder, temporary, key), map(Path, tars))
                done = [*tqdm(found, total=len(tars), unit=" shards", desc="index")]
        for scanned in done:
            left_out.update(scanned.left_out)
            if scanned.entry is None:
                left_out.add(scanned.name, NO_SAMPLE)
        if not (entries := [scanned.entry for scanned in done if scanned.entry is not None]):
            raise nothing_in(place, "no member of its tars has a name that says so (.jpg, .png, ...)", left_out)
        labels = np.concatenate([scanned.labels for scanned in done])
        names = _class_names(int(labels.max()) + 1, classes)
        (temporary / REJECTED).write_text("")
        left_out.write(temporary / LEFT_OUT)
        settings = {"max_pixels": MAX_PIXELS} | ({"image_key": list(key)} if key else {})
        name = place.rstrip("/").rpartition("/")[2] if isinstance(place, str) else place.resolve().name
        about = {"source": name, "settings": settings, "left_out": left_out.counts()}
        maps = any(scanned.label_maps for scanned in done)
        manifest.write_manifest(temporary, entries, labels, names, segmentation=maps, **about)
    left_out.warn(f"all in {LEFT_OUT}")
    return folder


def _find(
    src: str | Path | Sequence[str], split: str, left_out: LeftOut, access: RemoteOptions
) -> tuple[Path | str, list[str]]:
    """The folder (or the address of the folder, without secrets) of the tars, and their paths (or addresses)."""
    sources = [str(src)] if isinstance(src, str | Path) else [*src]
    if len(sources) == 1 and not is_remote(sources[0]) and not is_tar_spec(sources[0]):
        local = expand_home(sources[0])
        if not local.is_file():
            return local, [*map(str, _tars(local, left_out))]
    tars = [tar for source in sources for tar in _expand(source, split, access)]
    remote = {is_remote(tar) for tar in tars}
    places = [split_address(tar) if is_remote(tar) else os.path.split(tar) for tar in tars]
    folders, names = {folder for folder, _ in places}, [name for _, name in places]
    if len(remote) > 1 or len(folders) > 1 or len({*names}) < len(names):
        shown = " and ".join(without_secrets(folder) for folder in sorted(folders)[:2])
        raise UserError(f"shards index takes tars of one folder, not of {shown}; index one folder after the other")
    if wrong := [name for name in names if not manifest.SHARD_NAME.fullmatch(name)]:
        raise UserError(f"{wrong[0][:200]!r} cannot be named in a manifest: the name of a shard {NAME_RULE}")
    (folder,) = folders
    return (without_secrets(folder) if True in remote else Path(folder or ".")), tars


def _expand(source: str, split: str, access: RemoteOptions) -> list[str]:
    found = None
    if is_remote(source) and not is_tar_spec(source):
        found = tars_of_location(source, split, access)
    return found.urls if found is not None else expand(source)


def _scan_remote(urls: list[str], temporary: Path, image_key: tuple[str, ...], access: RemoteOptions) -> list[_Scanned]:
    """Read every tar once, write its index, and note what is in it for readers of the same tars."""
    remote = {name: getattr(access, name) for name in RemoteOptions.model_fields}
    settings = SourceSettings(image_key=list(image_key) or None, **remote)
    records = records_of(urls, settings)
    known, keys = listed(urls, settings, records, anew=True), records.keys
    tars = RemoteTars(urls, keys, [known[key]._replace(samples=None) for key in keys], records, settings)

    def scan(number: int) -> _Scanned:
        file, name, left_out = tars.opened(number), split_address(urls[number])[1], LeftOut()
        path = Path(f"/dev/fd/{file.descriptor}")
        try:
            rows = shard_index.scan_shard(path, image_key, left_out, name)
        except UserError as error:
            raise tars.named(number, error) from None
        tars.note_rows(number, file, rows)
        entry = None
        if len(rows):
            manifest.write_index(temporary / name, rows)
            entry = manifest.shard_entry(path, len(rows)) | {"name": name}
        return _Scanned(name, entry, rows["label"].copy(), bool(rows["segmentation_size"].any()), left_out)

    return [scanned for _, scanned in sorted(each_read(tars, scan), key=itemgetter(0))]


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
        raise UserError(f"{str(wrong[0])!r} must be renamed: the name of a shard {NAME_RULE}")
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


def _index(folder: Path, temporary: Path, image_key: tuple[str, ...], tar: Path) -> _Scanned:
    """Link (if `folder` is another) and index a local tar."""
    shard, left_out = folder / tar.name, LeftOut()
    rows = shard_index.scan_shard(tar, image_key, left_out)
    if not len(rows):
        return _Scanned(tar.name, None, np.empty(0, np.int64), False, left_out)
    if folder.resolve() != tar.parent.resolve():
        ours = shard.is_symlink() and shard.resolve() == tar.resolve()
        if not ours and (shard.is_symlink() or shard.exists()):
            raise UserError(f"{shard} exists already; choose another out=")
        (temporary / tar.name).symlink_to(tar.resolve())
    manifest.write_index(temporary / tar.name, rows)
    maps = bool(rows["segmentation_size"].any())
    return _Scanned(tar.name, manifest.shard_entry(tar, len(rows)), rows["label"].copy(), maps, left_out)


def _class_names(count: int, file: str | Path | None) -> list[str]:
    """Names of the classes 0, 1, ... Raises UserError as `read_class_names` does, and for too few."""
    if file is None:
        return [str(number) for number in range(count)]
    names = read_class_names(file)
    if len(names) < count:
        raise UserError(f"labels={file} names {len(names)} classes, but the shards have the number {count - 1}")
    return names
