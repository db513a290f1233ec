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
    folder = indexed(find_source(source, settings, split), source, settings)
    assert folder is not None
    return folder


def indexed(
    found: ShardFolder | TarSet, source: str, settings: SourceSettings, read: bool = True
) -> ShardFolder | None:
    """Tars with the length of each; None if nobody knows them, and they are remote and must not be `read`."""
    if isinstance(found, ShardFolder):
        return found
    if not is_remote(found.urls[0]):
        return LocalTars(found.urls, source, settings, found.note)
    tars = open_tars(found.urls, settings, found.lengths, read)
    if tars is not None:
        tars.note = found.note or tars.note
    return tars


def find_source(source: str, settings: SourceSettings, split: str, stream: bool = False) -> ShardFolder | TarSet:
    """A source as `open_source` opens it, or the paths or addresses of its tars, all local or all remote.

    `stream`: tars are wanted, whatever is in them. Raises UserError.
    """
    if is_tar_spec(source):
        urls = expand(source)
        if len({is_remote(url) for url in urls}) > 1:
            raise UserError(f"{without_secrets(source)} mixes local tars with others; give a list of two sources")
        return TarSet(urls, None)
    if is_remote(source):
        return open_tables(source, settings, split) or _at_location(source, settings, split)
    path = expand_home(source)
    if not (path.is_file() or path.is_dir()):
        raise UserError(f"{source} {'is a pipe or a device' if path.exists() else 'does not exist'}; {ADVICE}")
    if (found := _with_manifest(path, split) or open_tables(source, settings, split)) is not None:
        return found
    tars = _tars_at(path, split, stream)
    return ListedFolder(path, settings, split) if tars is None else tars


def _at_location(source: str, settings: SourceSettings, split: str) -> ShardFolder | TarSet:
    try:
        return RemoteFolder(source, settings)
    except MissingError as missing:
        if (tars := tars_of_location(source, split, settings)) is not None:
            return tars
        if source.lower().partition("?")[0].endswith(".parquet"):
            raise UserError(f"{without_secrets(source)}: parquet is read from disk and hf://; download it") from None
        raise UserError(
            f"{missing}; it has no {MANIFEST}, no _info.json and no tars that can be listed: name the tars, such as "
            f"{without_secrets(source).rstrip('/')}/x-{{0000..0099}}.tar"
        ) from None


def _with_manifest(path: Path, split: str) -> ShardFolder | None:
    """The shard folder at a path, or that of a split in it; None if there is none."""
    if (path / MANIFEST).is_file():
        return LocalFolder(path)
    found = [manifest.parent.name for manifest in path.glob(f"*/{MANIFEST}")]
    try:
        parts = {name: (layout.role_of(name) or ("",))[0] for name in found}
        return LocalFolder(path / layout.of_split(parts, split)[0]) if found else None
    except UserError as error:
        raise UserError(f"{path} {error}") from None


def _tars_at(path: Path, split: str, stream: bool) -> TarSet | None:
    """The WebDataset shards of a split at a path; None if it has images, or tars that are classes."""
    if path.is_file():
        found = TarSet([str(path)], None) if path.suffix.lower() == ".tar" else None
    else:
        beside = (layout.stem_of(entry.name)[1] for entry in path.iterdir() if not entry.name.startswith("."))
        found = None if IMAGE_EXTENSIONS.intersection(beside) else tars_of_folder(path, split)
    return found if found is not None and (stream or are_shards([Path(url) for url in found.urls])) else None
