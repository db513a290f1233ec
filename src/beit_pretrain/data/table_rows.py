"""Reads the rows of a table file, parquet or Arrow: bytes of the image, and class; and what its footer says.

A file is read in pieces of `PIECE` rows, so that row groups of any size need little memory.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from beit_pretrain.data.columns import Columns, find_columns, image_columns
from beit_pretrain.errors import UserError, first_line
from beit_pretrain.transforms.image_io import HEAD

PIECE = 64  # rows
MOST_NAMES = 100_000  # different texts in a label column, above which they are no classes
NO_IMAGE = b"null"  # stands for the image of a row that has none: does not decode, but counts as a sample


class Facts(NamedTuple):
    """What is known of a file without reading its images."""

    rows: int
    image_bytes: int  # about: a column that repeats values takes fewer
    columns: Columns
    labelled: int  # rows with a class
    top: int  # largest class number, -1 without one
    names: tuple[str, ...] | None = None  # sorted, of a label column of texts; None = not read


def parquet() -> Any:
    """`pyarrow.parquet`. Raises UserError if it is not installed."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError("parquet and Arrow files need pyarrow: pip install 'beit_pretrain[parquet]'") from None
    return pyarrow.parquet


class TableFile:
    """An open file. `where`: its name for messages. Raises UserError if it is damaged, or no parquet or Arrow file.

    `source`: a path, or a file object of parquet of which the footer alone can be read.
    """

    def __init__(self, source: Any, where: str):
        self.where, self.parquet = where, parquet()
        import pyarrow

        self.errors = (pyarrow.ArrowException, OSError, ValueError)
        self.table: Any = None
        self.batches: list[Any] = []  # of an Arrow file: maps of it, which take no memory
        try:
            start = b"PAR1" if isinstance(source, io.IOBase) else _head(source)
            if start.startswith(b"PAR1"):
                self.table = self.parquet.ParquetFile(source, buffer_size=1 << 20, pre_buffer=False)
                self.schema = self.table.schema_arrow
            else:
                opened = pyarrow.memory_map(os.fspath(source))
                if start.startswith(b"ARROW1"):
                    reader = pyarrow.ipc.open_file(opened)
                    self.batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
                else:
                    reader = pyarrow.ipc.open_stream(opened)
                    self.batches = list(reader)
                self.schema = reader.schema
        except self.errors as error:
            raise self._damaged(error) from None
        sizes = [len(batch) for batch in self.batches]
        if self.table is not None:
            about = self.table.metadata
            sizes = [about.row_group(group).num_rows for group in range(about.num_row_groups)]
        self.ends = np.cumsum(sizes, dtype=np.int64)  # of row groups or record batches
        self.rows = int(self.ends[-1]) if len(sizes) else 0

    def facts(self, image_key: Sequence[str] | None, label_key: str | None, whole: bool = True) -> Facts:
        """What is known without the images. `whole`: the rest of the file is there too, not its footer alone.

        Raises UserError as `find_columns` does.
        """
        columns = find_columns(self.schema, lambda name: self._first(name, whole), image_key, label_key, self.where)
        size = self._image_bytes(columns.image)
        if columns.label is None or not self.rows:
            return Facts(self.rows, size, columns, 0, -1, () if columns.text else None)
        if columns.text:
            return (
                self._text_facts(Facts(self.rows, size, columns, self.rows, -1))
                if whole
                else (Facts(self.rows, size, columns, self.rows, -1))
            )
        labelled, top = self._by_statistics(columns.label) or (-1, -1)
        if labelled < 0 and whole:
            labels = np.concatenate([self._numbers(batch, columns.label) for batch in self._pieces([columns.label])])
            labelled, top = int((labels >= 0).sum()), int(labels.max(initial=-1))
        elif labelled < 0:
            labelled, top = self._least_by_statistics(columns.label)
        return Facts(self.rows, size, columns, labelled, top)

    def named_samples(self, image_key: Sequence[str] | None, label_key: str | None) -> Iterator[tuple[Any, str | None]]:
        """Yield (bytes of the image, name of its class or None) of every row. Raises UserError as `samples` does."""
        columns = find_columns(self.schema, lambda name: self._first(name, True), image_key, label_key, self.where)
        images = (image for image, _ in self.samples(columns._replace(label=None)))
        yield from zip(images, self.classes(columns), strict=True)

    def samples(self, columns: Columns, names: Sequence[str] | None = None) -> Iterator[tuple[Any, int]]:
        """Yield (bytes of the image, class number or -1) of every row; `NO_IMAGE` where it is null.

        `names`: the classes, for a label column of texts. Raises UserError for a damaged file, an image that is only a
        path, a class that is not in `names`.
        """
        number = {name: index for index, name in enumerate(names or ())}
        at = 0
        for batch in self._pieces([columns.image] + ([columns.label] if columns.label else [])):
            images = self._images(batch, columns.image, at)
            if columns.label is None:
                labels: Any = [-1] * len(batch)
            elif columns.text:
                labels = [self._number(number, text) for text in self.texts(batch, columns.label)]
            else:
                labels = self._numbers(batch, columns.label).tolist()
            for image, label in zip(images, labels, strict=True):
                yield (image if image else NO_IMAGE), label
            at += len(batch)

    def classes(self, columns: Columns) -> list[str | None]:
        """The name of every row's class; a number without a name is its own."""
        if columns.label is None:
            return [None] * self.rows
        found: list[str | None] = []
        for batch in self._pieces([columns.label]):
            if columns.text:
                found += self.texts(batch, columns.label)
                continue
            for label in self._numbers(batch, columns.label).tolist():
                if columns.classes and label >= len(columns.classes):
                    raise UserError(f"{self.where} has the class number {label}, and {len(columns.classes)} classes")
                found.append(None if label < 0 else columns.classes[label] if columns.classes else str(label))
        return found

    def group(self, number: int, column: str) -> list[Any]:
        """The images of a row group or record batch, None where there is none."""
        try:
            if self.table is None:
                batches = [self.batches[number]]
            else:
                batches = self.table.read_row_group(number, [column], use_threads=False).to_batches()
        except self.errors as error:
            raise self._damaged(error) from None
        return [image for batch in batches for image in self._images(batch, column, 0)]

    def texts(self, batch: Any, column: str) -> list[str | None]:
        return [None if text in (None, "") else str(text) for text in batch.column(column).to_pylist()]

    def _pieces(self, columns: list[str]) -> Iterator[Any]:
        """Record batches of at most `PIECE` rows of parquet, of Arrow as they are."""
        pieces = iter(self.batches)
        try:
            if self.table is not None:
                pieces = self.table.iter_batches(PIECE, columns=columns, use_threads=False)
        except self.errors as error:
            raise self._damaged(error) from None
        while True:
            try:
                batch = next(pieces)
            except StopIteration:
                return
            except self.errors as error:
                raise self._damaged(error) from None
            yield batch

    def _images(self, batch: Any, column: str, first: int) -> list[Any]:
        """Buffers of the images; None where a row has none."""
        import pyarrow.compute

        values = batch.column(column)
        paths = None
        if str(values.type).startswith("struct<"):
            names = [field.name for field in values.type]
            paths = pyarrow.compute.struct_field(values, "path") if "path" in names else None
            values = pyarrow.compute.struct_field(values, "bytes")
        if paths is not None and values.null_count:
            for row, (image, path) in enumerate(zip(values, paths, strict=True)):
                if not image.is_valid and path.is_valid and path.as_py():
                    raise UserError(
                        f"{self.where}: row {first + row} holds the path of an image and not its bytes; save the data "
                        "set with its images (datasets: embed_external_files=True)"
                    )
        return [value.as_buffer() if value.is_valid else None for value in values]

    def _numbers(self, batch: Any, column: str) -> np.ndarray:
        import pyarrow

        try:
            labels = batch.column(column).cast(pyarrow.int64()).fill_null(-1).to_numpy(zero_copy_only=False)
        except self.errors as error:
            raise self._damaged(error) from None
        return np.maximum(labels, -1)

    def _number(self, number: dict[str, int], text: str | None) -> int:
        if text is None or not number:
            return -1
        if text not in number:
            raise UserError(f"{self.where} has the class {text[:60]!r}, which classes= does not name")
        return number[text]

    def _text_facts(self, facts: Facts) -> Facts:
        """With the names of the classes, unless there are too many for classes."""
        names: set[str] = set()
        labelled = 0
        assert facts.columns.label is not None
        for batch in self._pieces([facts.columns.label]):
            found = [text for text in self.texts(batch, facts.columns.label) if text is not None]
            labelled += len(found)
            names.update(found)
            if len(names) > MOST_NAMES:
                return facts
        return facts._replace(labelled=labelled, names=tuple(sorted(names)))

    def _chunks(self, column: str) -> Iterator[Any]:
        """The entries of a column in the footer, a row group after another; of a group of columns all of its parts."""
        about = self.table.metadata
        for group in range(about.num_row_groups):
            part = about.row_group(group)
            for i in range(part.num_columns):
                chunk = part.column(i)
                if chunk.path_in_schema == column or chunk.path_in_schema.startswith(f"{column}."):
                    yield chunk

    def _image_bytes(self, column: str) -> int:
        if self.table is None:
            return sum(batch.column(column).nbytes for batch in self.batches)
        return sum(chunk.total_uncompressed_size for chunk in self._chunks(column))

    def _statistics(self, column: str) -> list[tuple[int, Any]]:
        if self.table is None:
            return []
        return [(chunk.num_values, chunk.statistics) for chunk in self._chunks(column)]

    def _by_statistics(self, column: str) -> tuple[int, int] | None:
        """Rows with a class, and the largest class number, if the footer says them exactly."""
        labelled, top = 0, -1
        found = self._statistics(column)
        for values, said in found:
            if said is None or not said.has_null_count:
                return None
            if said.null_count == values:
                continue
            if not said.has_min_max or said.min < 0 <= said.max:
                return None
            labelled += values - said.null_count if said.min >= 0 else 0
            top = max(top, said.max)
        return (labelled, top) if found else None

    def _least_by_statistics(self, column: str) -> tuple[int, int]:
        """The same where the footer does not tell how many rows lack a class: at least one of a row group that has
        negative numbers; none of one without statistics."""
        labelled, top = 0, -1
        for values, said in self._statistics(column):
            known = said is not None and said.has_min_max
            top = max(top, said.max if known else -1)
            nulls = said.null_count if said is not None and said.has_null_count else 0
            labelled += values - nulls - (int(said.min < 0) if known else 0)
        return labelled, top

    def _first(self, column: str, whole: bool) -> bytes | None:
        """The first bytes of one of a column's binary values, from the footer's smallest value, or by reading."""
        for _, said in self._statistics(column):
            if said is not None and said.has_min_max and isinstance(said.min, bytes):
                return said.min[:HEAD]
        if whole:
            for batch in self._pieces([column]):
                for value in batch.column(column):
                    if value.is_valid:
                        return value.as_buffer().to_pybytes()[:HEAD]
        return None

    def _damaged(self, error: Exception) -> UserError:
        return UserError(f"{self.where} cannot be read as parquet or Arrow: {first_line(error)[:200]}")


def holds_images(path: str | os.PathLike) -> bool:
    """Whether a file is a table that has columns of images."""
    try:
        file = TableFile(path, str(path))
        return bool(image_columns(file.schema, lambda name: file._first(name, True)))
    except UserError:
        return False


def count_rows(path: str, image_key: tuple[str, ...] = ()) -> int:
    """The number of rows of a file, as it is now. Raises UserError if it has no column of images."""
    _opened.cache_clear()
    _group.cache_clear()
    return _opened(path, image_key)[0].rows


def read_row(path: str, row: int, image_key: tuple[str, ...] = ()) -> bytes:
    """The image of one row. Keeps the row group of the last row, so rows are best read in order. Raises UserError."""
    file, column = _opened(path, image_key)
    group = int(np.searchsorted(file.ends, row, side="right"))
    image = _group(path, image_key, group)[row - (int(file.ends[group - 1]) if group else 0)]
    return NO_IMAGE if image is None else image.to_pybytes()


@lru_cache(maxsize=8)
def _opened(path: str, image_key: tuple[str, ...]) -> tuple[TableFile, str]:
    file = TableFile(path, path)
    return file, find_columns(file.schema, lambda name: file._first(name, True), image_key, None, path).image


@lru_cache(maxsize=1)
def _group(path: str, image_key: tuple[str, ...], group: int) -> list[Any]:
    file, column = _opened(path, image_key)
    return file.group(group, column)


def _head(path: Any) -> bytes:
    with open(path, "rb") as file:
        return file.read(8)
