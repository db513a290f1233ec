"""What a source of images is, by looking at it: shards with a manifest, tars, tables, or images in place."""

from __future__ import annotations

from pathlib import Path

from beit_pretrain.data import layout
from beit_pretrain.data.listed_folder import ListedFolder
from beit_pretrain.data.local_tars import LocalTars, are_shards
from beit_pretrain.data.manifest import MANIFEST
from beit_pretrain.data.read_tars import open_tars
from beit_pretrain.data.settings import SourceSettings
from beit_pretrain.data.shard_folder import LocalFolder, RemoteFolder, ShardFolder
from beit_pretrain.data.split_info import TarSet, tars_of_folder, tars_of_location
from beit_pretrain.data.storage import MissingError, is_remote, without_secrets
from beit_pretrain.data.table_folder import open_tables
from beit_pretrain.data.tar_specs import expand, is_tar_spec
from beit_pretrain.errors import UserError
from beit_pretrain.fileio import expand_home
from beit_pretrain.transforms.image_io import IMAGE_EXTENSIONS

ADVICE = "give shards, tars, a folder of images, or parquet files (data/README.md)"


def open_source(source: str, settings: SourceSettings, split: str) -> ShardFolder:
    """The shards of a source. `split`: its part, if it has parts. Remote tars of unknown lengths are read once.

    Raises UserError.
    """
    found = find_source(source, settings, split)
    if isinstance(found, ShardFolder):
        return found
    tars = open_tars(found.urls, settings, found.lengths)
    assert tars is not None
    tars.note = found.note or tars.note
    return tars


def find_source(source: str, settings: SourceSettings, split: str) -> ShardFolder | TarSet:
    """A source as `open_source` opens it, or the addresses of its tars. Raises UserError."""
    if is_tar_spec(source):
        return _tars(TarSet(expand(source), None), source, settings)
    if (tables := open_tables(source, settings, split)) is not None:
        return tables
    return _at_location(source, settings, split) if is_remote(source) else _on_disk(source, settings, split)


def _tars(tars: TarSet, source: str, settings: SourceSettings) -> ShardFolder | TarSet:
    """Local tars with their index; others, and mixtures, as they are."""
    remote = [is_remote(url) for url in tars.urls]
    if any(remote) and not all(remote):
        raise UserError(f"{without_secrets(source)} mixes local tars with others; give a list of two sources")
    return tars if any(remote) else LocalTars(tars.urls, source, settings)


def _at_location(source: str, settings: SourceSettings, split: str) -> ShardFolder | TarSet:
    try:
        return RemoteFolder(source, settings)
    except MissingError as missing:
        if (tars := tars_of_location(source, split, settings)) is not None:
            return tars
        raise UserError(
            f"{missing}; it has no {MANIFEST}, no _info.json and no tars that can be listed: name the tars, such as "
            f"{without_secrets(source).rstrip('/')}/x-{{0000..0099}}.tar"
        ) from None


def _on_disk(source: str, settings: SourceSettings, split: str) -> ShardFolder | TarSet:
    path = expand_home(source)
    if not (path.is_file() or path.is_dir()):
        raise UserError(f"{source} {'is a pipe or a device' if path.exists() else 'does not exist'}; {ADVICE}")
    if path.is_file():
        shard = path.suffix.lower() == ".tar" and are_shards([path])
        return LocalTars([str(path)], source, settings) if shard else ListedFolder(path, settings, split)
    if (path / MANIFEST).is_file():
        return LocalFolder(path)
    parts = {found.parent.name: (layout.role_of(found.parent.name) or ("",))[0] for found in path.glob(f"*/{MANIFEST}")}
    if parts:
        try:
            return LocalFolder(path / layout.of_split(parts, split)[0])
        except UserError as error:
            raise UserError(f"{source} {error}") from None
    tars = _shards_in(path, split)
    return ListedFolder(path, settings, split) if tars is None else LocalTars(tars.urls, source, settings, tars.note)


def _shards_in(folder: Path, split: str) -> TarSet | None:
    """The WebDataset shards of a split in a folder; None if it has images, or tars that are classes."""
    names = [path.name for path in folder.iterdir() if not path.name.startswith(".")]
    if any(layout.stem_of(name)[1] in IMAGE_EXTENSIONS for name in names):
        return None
    found = tars_of_folder(folder, split)
    return found if found is not None and are_shards([Path(url) for url in found.urls]) else None
