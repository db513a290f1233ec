"""What a source of images is, by looking at it: shards with a manifest, tars, tables, or images in place."""

from __future__ import annotations

from pathlib import Path

from beit_pretrain.data import layout
from beit_pretrain.data.listed_folder import ListedFolder
from beit_pretrain.data.local_tars import LocalTars, are_shards
from beit_pretrain.data.manifest import MANIFEST
from beit_pretrain.data.settings import SourceSettings
from beit_pretrain.data.shard_folder import LocalFolder, RemoteFolder, ShardFolder
from beit_pretrain.data.storage import is_remote
from beit_pretrain.errors import UserError
from beit_pretrain.fileio import expand_home
from beit_pretrain.transforms.image_io import IMAGE_EXTENSIONS

ADVICE = "give shards, tars, a folder of images, or parquet files (data/README.md)"


def open_source(source: str, settings: SourceSettings, split: str) -> ShardFolder:
    """The shards of a source. `split`: its part, if it has parts. Raises UserError."""
    if is_remote(source):
        return RemoteFolder(source, settings)
    path = expand_home(source)
    if not (path.is_file() or path.is_dir()):
        raise UserError(f"{source} {'is a pipe or a device' if path.exists() else 'does not exist'}; {ADVICE}")
    if path.is_dir():
        if (path / MANIFEST).is_file():
            return LocalFolder(path)
        made = {p.parent.name: p.parent.name for p in path.glob(f"*/{MANIFEST}")}
        parts = {name: (layout.role_of(name) or (name,))[0] for name in made}
        if parts:
            try:
                return LocalFolder(path / layout.of_split(parts, split)[0])
            except UserError as error:
                raise UserError(f"{source} {error}") from None
    tars = [path] if path.suffix.lower() == ".tar" else _tars_alone(path) if path.is_dir() else []
    if tars and are_shards(tars):
        return LocalTars([str(tar) for tar in tars], source, settings)
    return ListedFolder(path, settings, split)


def _tars_alone(folder: Path) -> list[Path]:
    """The tars of a folder that holds no folders and no images beside them, by name; else none."""
    tars = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.suffix.lower() == ".tar":
            tars.append(path)
        elif path.is_dir() or layout.stem_of(path.name)[1] in IMAGE_EXTENSIONS:
            return []
    return tars
