"""The training images of a run: in position order where every tar's length is known, else a stream."""

from __future__ import annotations

from pathlib import Path

from beit_pretrain.data.listing.labels import named_classes
from beit_pretrain.data.open_source import find_source, indexed
from beit_pretrain.data.read_tars import listed, records_of
from beit_pretrain.data.reader import ShardReader
from beit_pretrain.data.settings import DataSettings
from beit_pretrain.data.shard_folder import ShardFolder
from beit_pretrain.data.split_info import TarSet
from beit_pretrain.data.stream import StreamSource

READ_ONCE = 1e9  # bytes of a set of unknown lengths that is read once before the run, not streamed


def open_training(settings: DataSettings) -> ShardReader | StreamSource:
    """Open `data.train`. Raises UserError."""
    train = [settings.train] if isinstance(settings.train, str | Path) else list(settings.train)
    split, stream = settings.split or "train", settings.order == "stream"
    found = [find_source(str(source), settings, split, stream) for source in train]
    if not stream:
        folders = [_indexed(one, str(source), settings) for one, source in zip(found, train, strict=True)]
        if None not in folders:
            return ShardReader([folder for folder in folders if folder is not None], settings)
    sets = [one.addresses() if isinstance(one, ShardFolder) else one.urls for one in found]
    counts = [_samples(one) for one in found]
    samples = None if None in counts else sum(count for count in counts if count is not None)
    return StreamSource(sets, settings, samples, _classes(found, settings))


def _indexed(found: ShardFolder | TarSet, source: str, settings: DataSettings) -> ShardFolder | None:
    """A source with the lengths of its shards; None if nobody knows them, and reading its tars takes long."""
    folder = indexed(found, source, settings, read=settings.order == "position")
    if folder is None and isinstance(found, TarSet) and not any(url.startswith("pipe:") for url in found.urls):
        records = records_of(found.urls, settings)  # of other tars in these folders too
        known = listed(found.urls, settings, records)
        sizes = [known[key].bytes for key in records.keys]
        if None not in sizes and sum(size or 0 for size in sizes) <= READ_ONCE:
            return indexed(found, source, settings)
    return folder


def _samples(found: ShardFolder | TarSet) -> int | None:
    if isinstance(found, ShardFolder):
        return sum(shard.samples for shard in found.shards)
    return found.samples if found.lengths is None else sum(found.lengths)


def _classes(found: list[ShardFolder | TarSet], settings: DataSettings) -> list[str]:
    """The classes of a stream: data.classes, else those of its sets, if they are known and the same."""
    if settings.classes is not None:
        return named_classes(settings.classes, 0)
    named: list[list[str]] = [one.about["classes"] if isinstance(one, ShardFolder) else [] for one in found]
    return named[0] if all(names == named[0] for names in named) else []
