"""Parquet and Arrow files, local or on the Hugging Face Hub, as shards: each file is one, its rows are the samples.

A file is read through the cache (cache.py): at its first use it is fetched, if it is remote, and unpacked row by row
into a plain tar, `00000000.jpg`, `00000000.cls`, ..., from which samples are read as from any shard. What its footer
says (rows, columns, classes) is noted in the cache folder by the file's identity, so that a second start opens no file.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np

from beit_pretrain.data.cache import Shard, ShardCache
from beit_pretrain.data.columns import Columns
from beit_pretrain.data.hub_repository import address_and_split, hub_tables
from beit_pretrain.data.listing.labels import named_classes, read_class_names
from beit_pretrain.data.notes import digest, read_note
from beit_pretrain.data.settings import SourceSettings
from beit_pretrain.data.shard_folder import FileFolder, OpenFile, cache_folder
from beit_pretrain.data.shard_index import MOST_CLASSES
from beit_pretrain.data.storage import DownloadError, Remote, is_remote
from beit_pretrain.data.table_files import local_tables
from beit_pretrain.data.table_rows import Facts, TableFile
from beit_pretrain.data.table_tar import END_BYTES, ROW_BYTES, write_tar
from beit_pretrain.errors import UserError
from beit_pretrain.fileio import atomic_write, expand_home

VERSION = 1  # of the tars and of the noted facts
FOOTER = 1 << 16  # bytes at the end of a remote file that are read first
STREAMS = 16  # footers that are read at once


class TableSource(NamedTuple):
    """A file: where it lies, and what tells it from another version of it."""

    name: str  # path on disk, or in the repository
    size: int  # bytes
    identity: str
    sha256: str = ""  # of a remote file; "" = not known


def open_tables(source: str, access: SourceSettings, split: str | None = None) -> TableFolder | None:
    """The tables of a file, a folder, or an hf:// address; None if the source holds no tables.

    `split`: the part to read of a source with parts; None = train, or the only one. An address may name it (?split=).
    Raises UserError if a table cannot be read, has no column of images, or there is no such part.
    """
    if is_remote(source):
        if not source.lower().startswith("hf://datasets/"):
            return None
        address, split = address_and_split(source, split)
        if (found := _listed_on_hub(address, split or "train", access)) is None:
            return None
        root, files = found
        return TableFolder(address, files, access, Remote(root, access.retries, access.timeout))
    if (paths := local_tables(expand_home(source), split or "train")) is None:
        return None
    return TableFolder(source, [_local(path) for path in paths], access)


def _listed_on_hub(address: str, split: str, access: SourceSettings) -> tuple[str, list[TableSource]] | None:
    """The repository and the files of a part. Offline (HF_HUB_OFFLINE) those of the last time."""
    from huggingface_hub import is_offline_mode

    note = cache_folder(access) / f"hub-{digest(address, split, VERSION)[:16]}.json"
    try:
        found = hub_tables(address, split, access.retries, access.timeout)
    except DownloadError:
        if not (is_offline_mode() and note.is_file()):
            raise
        root, files = json.loads(note.read_text("utf-8"))
        return root, [TableSource(*file) for file in files]
    if found is None:
        return None
    with suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(note, json.dumps(found), unique=True)
    return found[0], [TableSource(*file) for file in found[1]]


class TableFolder(FileFolder):
    """The tables of one source. Raises UserError if one cannot be read, or has other columns or classes than the first.

    `about["class_counts"]` is the number of rows with a class, in one sum.
    """

    remote = True  # local files are unpacked, ahead of need too
    made_of = "tables"

    def __init__(self, source: str, files: Sequence[TableSource], access: SourceSettings, remote: Remote | None = None):
        self.source, self.repository, self.image_key, self.label_key = (
            source,
            remote,
            access.image_key,
            access.label_key,
        )
        self.cache = ShardCache(cache_folder(access), int(access.cache_gb * 1e9))
        facts = self._noted(files)
        self.files = [file for file, fact in zip(files, facts, strict=True) if fact.rows]
        if not self.files:
            raise UserError(f"{self} holds no rows")
        facts = [fact for fact in facts if fact.rows]
        self.columns = facts[0].columns
        for file, fact in zip(self.files, facts, strict=True):
            if fact.columns != self.columns:
                what = "classes" if fact.columns._replace(classes=self.columns.classes) == self.columns else "columns"
                raise UserError(f"{self.name_of(file)} has other {what} than {self.name_of(self.files[0])}")
        classes = self._classes(facts, access.classes)
        if not classes:
            self.columns = Columns(self.columns.image)
        self.names = classes if self.columns.text else None
        self.about: dict[str, Any] = {
            "classes": classes,
            "class_counts": [sum(fact.labelled for fact in facts)] if classes else [],
            "segmentation": False,
            "segmentation_classes": [],
            "settings": {},
        }
        self.shards = [self._shard(*of) for of in zip(self.files, facts, strict=True)]
        self.index_at = f"unpacked into {self.cache.folder}"

    def __str__(self) -> str:
        return str(self.source)

    def where(self, number: int) -> str:
        return self.name_of(self.files[number])

    def name_of(self, file: TableSource) -> str:
        """A file's path or address, for messages."""
        return f"{self.repository}/{file.name}" if self.repository else file.name

    def opened(self, number: int) -> OpenFile:
        """The file of a shard; if it is missing, it is made first."""
        return OpenFile(self.cache.open(self.shards[number], partial(self._unpack, number)))

    def rows(self, number: int) -> np.ndarray:
        file = self.opened(number)  # kept: its descriptor closes with it
        return self.cache.index(self.shards[number], file.descriptor)

    def index(self, number: int) -> np.ndarray:
        return self.rows(number)  # the tar is ours, and its size an estimate

    def fetch_ahead(self, number: int) -> None:
        self.cache.fetch_ahead(self.shards[number], partial(self._unpack, number))

    def _shard(self, file: TableSource, facts: Facts) -> Shard:
        # The same for the same file, wherever it lies.
        content = f"{os.path.basename(file.name)} {facts.rows} {file.size}"
        stored = [self.name_of(file), file.size, file.identity, *self.columns, self.names, VERSION]
        return Shard(
            name=os.path.basename(file.name),
            samples=facts.rows,
            bytes=facts.image_bytes + ROW_BYTES * facts.rows + END_BYTES,
            sha256=hashlib.sha256(content.encode()).hexdigest(),
            stored=digest(*stored),
            exact=False,
            spare=file.size if self.repository else 0,
        )

    def _classes(self, facts: Sequence[Facts], given: int | str | None) -> list[str]:
        """The names of the classes: of the tables, else as the setting `classes` says, else found; [] = none."""
        if self.columns.label is None:
            return []
        if self.columns.classes:
            return list(self.columns.classes)
        if self.columns.text:
            if isinstance(given, str):
                return read_class_names(given, "data.classes")
            if all(fact.names is not None for fact in facts):
                return sorted({name for fact in facts for name in fact.names or ()})
            said = f"the classes are texts in the column {self.columns.label}, many or not read in advance"
            return self._no_classes(f"{said}; classes=FILE gives their names")
        top = max(fact.top for fact in facts)
        if given is not None:
            return named_classes(given, top + 1)
        if top >= MOST_CLASSES:
            return self._no_classes(f"the column {self.columns.label} holds numbers up to {top:,}; label_key= chooses")
        return [str(number) for number in range(top + 1)]

    def _no_classes(self, why: str) -> list[str]:
        print(f"warning: {self} is read without classes: {why}", file=sys.stderr)
        return []

    def _noted(self, files: Sequence[TableSource]) -> list[Facts]:
        """The facts of the files; those that are not noted yet are read."""
        of = [str(self), self.image_key, self.label_key, [file.name for file in files], VERSION]
        note = self.cache.folder / f"tables-{digest(*of)[:16]}.json"
        known = read_note(note) or {}
        keys = [digest(self.name_of(file), file.size, file.identity) for file in files]
        missing = [file for file, key in zip(files, keys, strict=True) if key not in known]
        if missing:
            with ThreadPoolExecutor(STREAMS if self.repository else 1) as pool:
                found = dict(zip(missing, pool.map(self._facts, missing), strict=True))
            known = {k: found[file] if file in found else known[k] for k, file in zip(keys, files, strict=True)}
            with suppress(OSError):
                atomic_write(note, json.dumps(known), unique=True)
        return [_as_facts(known[key]) for key in keys]

    def _facts(self, file: TableSource) -> Facts:
        if self.repository is None:
            return TableFile(file.name, file.name).facts(self.image_key, self.label_key)
        end = _End(self.repository, file)
        return TableFile(end, self.name_of(file)).facts(self.image_key, self.label_key, whole=False)

    def _unpack(self, number: int, out: BinaryIO) -> None:
        """Write the tar of a shard. Raises UserError if its file has changed, is damaged or cannot be fetched."""
        file = self.files[number]
        if self.repository is None:
            if _local(Path(file.name)) != file:
                raise UserError(f"{file.name} has changed since the run began")
            self._write(file.name, number, out)
            return
        with tempfile.TemporaryFile(dir=self.cache.folder) as fetched:  # its bytes are `spare` of the shard

            def check() -> None:
                fetched.seek(0)
                if file.sha256 and hashlib.file_digest(fetched, "sha256").hexdigest() != file.sha256:
                    raise OSError("its content is not what the Hub says (another SHA-256)")

            self.repository.fetch(file.name, cast(BinaryIO, fetched), file.size, check)
            self._write(f"/dev/fd/{fetched.fileno()}", number, out)

    def _write(self, path: str, number: int, out: BinaryIO) -> None:
        where, shard = self.where(number), self.shards[number]
        table = TableFile(path, where)
        if table.rows != shard.samples:
            raise UserError(f"{where} has {table.rows:,} rows and not {shard.samples:,}; it has changed")
        write_tar(self._checked(table, where), out)

    def _checked(self, table: TableFile, where: str) -> Iterable[tuple[Any, int]]:
        classes = len(self.about["classes"])
        for image, label in table.samples(self.columns, self.names):
            if label >= classes > 0:
                raise UserError(f"{where} has the class number {label}, and {classes} classes")
            yield image, label


class _End(io.RawIOBase):
    """A remote file of which the end alone is read: what `pyarrow` needs to open it."""

    def __init__(self, remote: Remote, file: TableSource):
        self.file, self.position = file, 0
        self.start = max(0, file.size - FOOTER)
        self.tail = remote.read_end(file.name, file.size, self.start)
        needed = int.from_bytes(self.tail[-8:-4], "little") + 8
        if self.tail[-4:] == b"PAR1" and len(self.tail) < needed <= file.size:
            self.start = file.size - needed
            self.tail = remote.read_end(file.name, file.size, self.start)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = 0) -> int:
        self.position = offset + (0, self.position, self.file.size)[whence]
        return self.position

    def read(self, size: int | None = -1) -> bytes:
        stop = self.file.size if size is None or size < 0 else min(self.file.size, self.position + size)
        # pyarrow reads more than a small footer; what is before that it does not look at.
        before = bytes(max(0, min(stop, self.start) - self.position))
        data = before + self.tail[max(0, self.position - self.start) : max(0, stop - self.start)]
        self.position += len(data)
        return data


def _local(path: Path) -> TableSource:
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    return TableSource(os.path.abspath(path), status.st_size, str(status.st_mtime_ns))


def _as_facts(noted: Sequence[Any]) -> Facts:
    """Facts from JSON."""
    rows, size, (image, label, classes, text), labelled, top, names = noted
    columns = Columns(image, label, tuple(classes), text)
    return Facts(rows, size, columns, labelled, top, None if names is None else tuple(names))
