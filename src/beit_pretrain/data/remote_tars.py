"""WebDataset tars at addresses, read in exact order: each is fetched whole into the cache when it is used.

That needs the number of samples of every tar. In this order: what earlier runs noted (tar_records.py), the set's own
info files (split_info.py), reading every tar once (read_tars.py).
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from os.path import commonprefix
from typing import Any, BinaryIO
from urllib.parse import unquote

import numpy as np

from beit_pretrain.data.cache import Shard, ShardCache, name_and_size
from beit_pretrain.data.http_transport import without_weakness
from beit_pretrain.data.listing.labels import named_classes
from beit_pretrain.data.settings import SourceSettings
from beit_pretrain.data.shard_folder import FileFolder, OpenFile, cache_folder
from beit_pretrain.data.storage import MissingError, fetch_file, without_secrets
from beit_pretrain.data.tar_records import TarRecord, TarRecords, class_counts, pack_labels
from beit_pretrain.data.transfer import PermanentError, TooLargeError, Transfer
from beit_pretrain.errors import UserError

UNKNOWN_SIZE = 256 << 20  # bytes that are reserved in the cache for a tar whose server does not say its size
UNREAD = -1  # samples of a tar that has not been read
_SHA256 = re.compile(r"[0-9a-f]{64}")


class RemoteTars(FileFolder):
    """Tars at `urls`, with their keys and what is known of each; those without samples are left out.

    `stated`: who says the lengths of tars that have not been read, for messages. `note`: a line for the user, or "".
    """

    remote = True
    made_of = "remote tars"

    def __init__(
        self,
        urls: Sequence[str],
        keys: Sequence[str],
        known: Sequence[TarRecord],
        records: TarRecords,
        settings: SourceSettings,
        stated: str = "",
        note: str = "",
    ):
        full = [number for number, record in enumerate(known) if record.samples != 0]
        self.urls, self.keys = [urls[number] for number in full], [keys[number] for number in full]
        self.known = [known[number] for number in full]
        self.records, self.stated, self.note = records, stated, note
        self.retries, self.timeout = settings.retries, settings.timeout
        self.image_key = tuple(settings.image_key or ())
        self.cache = ShardCache(cache_folder(settings), int(settings.cache_gb * 1e9))
        plain = [without_secrets(url) for url in self.urls]
        self.folder = commonprefix(plain).rpartition("/")[0]  # noqa: RUF071 -- up to a slash
        estimate = min(max([r.bytes or 0 for r in self.known], default=0) or UNKNOWN_SIZE, self.cache.limit // 4)
        shards = zip(plain, self.keys, self.known, strict=True)
        self.shards = [self._shard(url, key, record, estimate) for url, key, record in shards]
        self.index_at = f"lengths in {records.path}"
        self.about = _about(self.known, self.image_key, settings.classes)
        self.known = [record._replace(labels="") for record in self.known]  # which loader workers need not get

    def __str__(self) -> str:
        return self.folder or "remote tars"

    def where(self, number: int) -> str:
        return without_secrets(self.urls[number])

    def addresses(self) -> list[str]:
        return list(self.urls)

    def opened(self, number: int) -> OpenFile:
        """The file of a tar; if it is not in the cache, it is downloaded first."""
        return OpenFile(self._in_cache(number, self.cache.open))

    def rows(self, number: int) -> np.ndarray:
        return self._rows(number, self.opened(number))

    def _rows(self, number: int, file: OpenFile) -> np.ndarray:
        try:
            return self.cache.index(self._entry(number), file.descriptor, self.image_key)
        except UserError as error:
            raise self.named(number, error) from None

    def read_record(self, number: int) -> TarRecord:
        """Read a tar, and note what is in it."""
        file = self.opened(number)
        return self.note_rows(number, file, self._rows(number, file))

    def note_rows(self, number: int, file: OpenFile, rows: np.ndarray) -> TarRecord:
        """Note what is in a tar, whose file and index these are."""
        size, maps = os.fstat(file.descriptor).st_size, bool(rows["segmentation_size"].any())
        labels = pack_labels(rows["label"])
        record = self.known[number]._replace(size=size, samples=len(rows), label_maps=maps, labels=labels)
        self.records.add({self.keys[number]: record})
        return record

    def index(self, number: int) -> np.ndarray:
        rows, samples = self.rows(number), self.shards[number].samples
        if len(rows) != samples:
            who = "the index of an earlier reading says" if self.known[number].size is not None else self.stated
            advice = "shards index with the same tars as src= counts them"
            raise UserError(f"{self.where(number)} holds {len(rows):,} samples, {who} {samples:,}; {advice}")
        return rows

    def fetch_ahead(self, number: int) -> None:
        self._in_cache(number, self.cache.fetch_ahead)

    def named(self, number: int, error: UserError) -> UserError:
        """An error that names the tar's address in place of its file in the cache."""
        file = re.escape(f"{self.cache.folder}/{self.shards[number].stored}")
        said = re.sub(rf"{file}\.\w+|/dev/fd/\d+", lambda _: self.where(number), str(error))
        return type(error)(said)

    def _in_cache(self, number: int, use: Callable[[Shard, Callable[[BinaryIO], None]], Any]) -> Any:
        try:
            return use(self._entry(number), partial(self._fetch, number))
        except UserError as error:
            raise self.named(number, error) from None

    def _entry(self, number: int) -> Shard:
        """The tar as the cache takes it, whose samples are counted by this class."""
        shard = self.shards[number]
        return shard._replace(name=self.where(number), samples=UNREAD if not shard.exact else shard.samples)

    def _shard(self, url: str, key: str, record: TarRecord, estimate: int) -> Shard:
        name = url[len(self.folder) :].lstrip("/")
        size = record.bytes if record.bytes is not None else record.size
        samples = UNREAD if record.samples is None else record.samples
        stored = hashlib.sha256(f"{key}\n{record.bytes}\n{record.version}".encode()).hexdigest()
        return Shard(
            name,
            samples,
            size or estimate,
            name_and_size(name_of(url), samples, size or 0),
            stored,
            record.bytes is not None,
        )

    def _fetch(self, number: int, file: BinaryIO) -> None:
        url, record = self.urls[number], self.known[number]
        stated = record.bytes

        def begin(total: int | None, version: str | None) -> None:
            found = without_weakness(version) if url.lower().startswith("http") else None
            if total is not None and stated is not None and total != stated:
                raise self._changed(number, f"{total:,} bytes, {stated:,} then")
            if found and record.version and found != record.version:
                raise self._changed(number, "another version")

        def whole() -> None:
            if stated is not None and file.tell() != stated:
                raise OSError(f"broke off after {file.tell():,} of {stated:,} bytes")
            if url.startswith("hf:") and _SHA256.fullmatch(record.version or ""):
                end, _ = file.tell(), file.seek(0)
                if hashlib.file_digest(_Limited(file, end), "sha256").hexdigest() != record.version:
                    raise OSError("its content has another SHA-256 than the Hub says")
                file.seek(end)

        transfer = Transfer(file, self.timeout, self.cache.limit if stated is None else stated, begin=begin)
        try:
            fetch_file(url, transfer, self.retries, whole)
        except MissingError as error:
            if isinstance(error.__context__, TooLargeError):  # than stated: it has changed
                self.records.add({self.keys[number]: None})
            raise

    def _changed(self, number: int, how: str) -> PermanentError:
        self.records.add({self.keys[number]: None})
        return PermanentError(
            f"it has changed on the server since it was listed ({how}); the same command reads it anew"
        )


class _Limited:
    """The first `left` bytes of a file, for hashing."""

    def __init__(self, file: BinaryIO, left: int):
        self.file, self.left = file, left

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.file.read(min(len(buffer), self.left))
        buffer[: len(data)] = data
        self.left -= len(data)
        return len(data)


def name_of(address: str) -> str:
    """The file name of a tar at an address without secrets, or in a command."""
    names = re.findall(r"[^\s/'\"]+\.tar\b", address) if address.startswith("pipe:") else []
    return names[-1] if names else unquote(address.rpartition("/")[2])


def _about(known: Sequence[TarRecord], image_key: Sequence[str], given: int | str | None) -> dict[str, Any]:
    """What a manifest would say. Raises UserError for `given` classes that are fewer than the tars have."""
    read = [record for record in known if record.size is not None]
    counts = class_counts(record.labels for record in read)
    names = [*map(str, range(len(counts)))] if len(read) == len(known) else []
    if given is not None:
        names = named_classes(given, len(counts))
    counts = np.pad(counts, (0, len(names) - len(counts))) if len(names) >= len(counts) else np.zeros(0, np.int64)
    if names and len(read) < len(known):  # not counted: as if every sample had a class, and all classes as many
        samples = sum(record.samples or 0 for record in known)
        counts = np.diff(np.arange(len(names) + 1) * samples // len(names))
    return {
        "classes": names,
        "class_counts": counts.tolist(),
        "segmentation": any(record.label_maps for record in read),
        "segmentation_classes": [],
        "settings": {"image_key": list(image_key)} if image_key else {},
    }
