"""Files of vectors: how rows of .npy, .safetensors, .csv and .parquet are appended, finished and read again.

While vectors are computed, a file only grows, so that a killed run can be resumed: `head`, then the rows. `seal` makes
the finished file. .npy and .safetensors hold no names: these lie beside them, as JSON lines.
"""

from __future__ import annotations

import csv
import io
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from beit_pretrain.data.table_rows import parquet
from beit_pretrain.errors import UserError, first_line

NAMES, ABOUT = ".names.jsonl", ".about.json"  # ends of the names of the files beside the vectors
MOST_IMAGES = 10**15  # headers are as long as those of so many
GROUP = 2**26  # bytes of vectors in a row group of parquet, and read at once
ALIGNED = 64  # bytes at which the numbers of a .safetensors begin


class StoredVectors(NamedTuple):
    """A finished file: `names` of its rows, and a function that reads them in pieces (n, D) float32."""

    names: list[str]
    pieces: Callable[[], Iterator[np.ndarray]]


class VectorFormat(ABC):
    """A file of vectors, `shape` numbers of `dtype` for each image: (D,), or (N, D) of patches."""

    names_beside = False
    head = b""  # what the growing file begins with

    def __init__(self, dtype: str, shape: tuple[int, ...]):
        self.dtype, self.shape = np.dtype(dtype).newbyteorder("<"), shape

    @property
    def row_bytes(self) -> int:
        """Bytes of a row's numbers."""
        return self.dtype.itemsize * int(np.prod(self.shape))

    def encode(self, names: Sequence[str], rows: np.ndarray) -> bytes:
        """Rows (n, *shape) as they are appended."""
        return rows.tobytes()

    @abstractmethod
    def seal(self, grown: Path, names: Path, images: int) -> Path:
        """Make the finished file of `images` rows; returns its path. `names`: JSON lines. May be called again."""

    @staticmethod
    @abstractmethod
    def read(path: Path) -> StoredVectors:
        """A finished file. Raises UserError or what its library raises."""


class Npy(VectorFormat):
    """NumPy's format: one array (images, *shape)."""

    names_beside = True

    def __init__(self, dtype: str, shape: tuple[int, ...]):
        super().__init__(dtype, shape)
        self.head = bytes(len(self._header(0)))

    def _header(self, images: int) -> bytes:
        buffer = io.BytesIO()  # NumPy leaves room in it for an array that grows: its length is always the same
        about = {"descr": self.dtype.str, "fortran_order": False, "shape": (images, *self.shape)}
        np.lib.format.write_array_header_1_0(buffer, about)
        return buffer.getvalue()

    def seal(self, grown: Path, names: Path, images: int) -> Path:
        header = self._header(images)
        assert len(header) == len(self.head)
        return with_header(grown, header)

    @staticmethod
    def read(path: Path) -> StoredVectors:
        return StoredVectors(names_of(path), lambda: slices(np.load(path, mmap_mode="r")))


class Safetensors(VectorFormat):
    """One tensor, `vectors` (images, *shape)."""

    names_beside = True
    DTYPES = {"float32": "F32", "float16": "F16"}

    def __init__(self, dtype: str, shape: tuple[int, ...]):
        super().__init__(dtype, shape)
        longest = 8 + len(self._text(MOST_IMAGES))
        self.head = bytes(longest + -longest % ALIGNED)

    def _text(self, images: int) -> bytes:
        about = {
            "dtype": self.DTYPES[self.dtype.name],
            "shape": [images, *self.shape],
            "data_offsets": [0, images * self.row_bytes],
        }
        return json.dumps({"vectors": about}).encode()

    def seal(self, grown: Path, names: Path, images: int) -> Path:
        room = len(self.head) - 8
        return with_header(grown, room.to_bytes(8, "little") + self._text(images).ljust(room))

    @staticmethod
    def read(path: Path) -> StoredVectors:
        with path.open("rb") as file:
            room = int.from_bytes(file.read(8), "little")
            about = json.loads(file.read(room))["vectors"]
        dtype = next(name for name, said in Safetensors.DTYPES.items() if said == about["dtype"])
        shape = tuple(about["shape"])
        return StoredVectors(names_of(path), lambda: slices(np.memmap(path, dtype, "r", 8 + room, shape)))


class Csv(VectorFormat):
    """A line for each image: its name, then its numbers with as many digits as tell them apart."""

    def __init__(self, dtype: str, shape: tuple[int, ...]):
        super().__init__(dtype, shape)
        if len(shape) > 1:
            raise UserError(
                f"what=patches has {shape[0]:,} x {shape[1]:,} numbers an image, too many for a line of CSV; take "
                ".npy, .safetensors or .parquet"
            )
        self.head = ",".join(["file", *(f"v{n}" for n in range(shape[0]))]).encode() + b"\n"
        self.form = {"float32": "%.9g", "float16": "%.5g"}[dtype]

    def encode(self, names: Sequence[str], rows: np.ndarray) -> bytes:
        text = io.StringIO()
        lines = csv.writer(text, lineterminator="\n")
        for name, row in zip(names, rows.tolist(), strict=True):
            lines.writerow([name, *(self.form % value for value in row)])
        return text.getvalue().encode(errors="backslashreplace")

    def seal(self, grown: Path, names: Path, images: int) -> Path:
        return grown

    @staticmethod
    def read(path: Path) -> StoredVectors:
        def pieces() -> Iterator[np.ndarray]:
            rows: list[np.ndarray] = []
            for row in lines():
                rows.append(np.array(row[1:], np.float32))
                if len(rows) * rows[0].nbytes >= GROUP:
                    yield np.stack(rows)
                    rows = []
            if rows:
                yield np.stack(rows)

        def lines() -> Iterator[list[str]]:
            with path.open(newline="", encoding="utf-8") as file:
                rows = csv.reader(file)
                next(rows)
                yield from rows

        return StoredVectors([row[0] for row in lines()], pieces)


class Parquet(VectorFormat):
    """Columns file, vector (a fixed-size list; of patches row by row, N x D numbers) and, of labelled images, label."""

    def __init__(self, dtype: str, shape: tuple[int, ...]):
        super().__init__(dtype, shape)
        parquet()  # before anything is computed

    def seal(self, grown: Path, names: Path, images: int) -> Path:
        import pyarrow

        with names.open("rb") as lines:
            labelled = "label" in json.loads(next(lines))
        count = int(np.prod(self.shape))
        number = {"float32": pyarrow.float32(), "float16": pyarrow.float16()}[self.dtype.name]
        fields = [("file", pyarrow.string()), ("vector", pyarrow.list_(number, count))]
        schema = pyarrow.schema(
            fields + [("label", pyarrow.string())] * labelled, {"shape": json.dumps(list(self.shape))}
        )
        rows = np.memmap(grown, self.dtype, "r", shape=(images, count))
        path = grown.with_name("finished.parquet")
        step = max(1, GROUP // self.row_bytes)
        # Neither dictionaries nor compression: vectors are random numbers. Plain bytes are read fastest.
        with (
            names.open("rb") as lines,
            parquet().ParquetWriter(path, schema, compression="none", use_dictionary=["label"]) as file,
        ):
            for first in range(0, images, step):
                numbers = pyarrow.array(rows[first : first + step].reshape(-1))
                part = [json.loads(line) for line in islice(lines, step)]
                columns = [
                    pyarrow.array([one["file"].encode(errors="backslashreplace").decode() for one in part]),
                    pyarrow.FixedSizeListArray.from_arrays(numbers, count),
                    *([pyarrow.array([one.get("label") for one in part], pyarrow.string())] if labelled else []),
                ]
                file.write_table(pyarrow.Table.from_arrays(columns, schema=schema), row_group_size=step)
        return path

    @staticmethod
    def read(path: Path) -> StoredVectors:
        file: Any = parquet().ParquetFile(path)

        def pieces() -> Iterator[np.ndarray]:
            for group in range(file.num_row_groups):
                for batch in file.read_row_group(group, ["vector"]).to_batches():
                    vector = batch.column("vector")
                    numbers = vector.flatten().to_numpy(zero_copy_only=False)
                    yield numbers.reshape(-1, vector.type.list_size).astype(np.float32)

        return StoredVectors(file.read(["file"]).column("file").to_pylist(), pieces)


FORMATS: dict[str, type[VectorFormat]] = {".npy": Npy, ".safetensors": Safetensors, ".parquet": Parquet, ".csv": Csv}


def format_of(path: Path, setting: str = "out") -> type[VectorFormat]:
    """The format that a path's suffix says. Raises UserError if there is none."""
    if (found := FORMATS.get(path.suffix.lower())) is None:
        raise UserError(f"{setting}={path} must end with {', '.join(FORMATS)}")
    return found


def beside(path: Path, end: str) -> Path:
    """The file of the names (`NAMES`) or of the settings (`ABOUT`) beside a file of vectors."""
    return path.with_name(path.name + end)


def read_vectors(path: Path) -> StoredVectors:
    """The names and the vectors of a finished file. Raises UserError if it is missing, damaged or another file."""
    with reading(path):
        stored = format_of(path, "vectors").read(path)

    def pieces() -> Iterator[np.ndarray]:
        with reading(path):
            yield from stored.pieces()

    return StoredVectors(stored.names, pieces)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raise UserError for what goes wrong with a file."""
    try:
        yield
    except (OSError, ValueError, LookupError, StopIteration, TypeError) as error:
        raise UserError(f"{path} cannot be read as vectors that embed has written: {first_line(error)}") from None


def names_of(path: Path) -> list[str]:
    """The names beside a file of vectors."""
    with beside(path, NAMES).open("rb") as file:
        return [json.loads(line)["file"] for line in file]


def slices(stored: np.ndarray) -> Iterator[np.ndarray]:
    """An array in pieces of at most `GROUP` bytes, as float32."""
    step = max(1, GROUP // max(1, stored[:1].nbytes))
    for first in range(0, len(stored), step):
        yield np.array(stored[first : first + step], np.float32)


def with_header(path: Path, header: bytes) -> Path:
    """Write a header over the first bytes of a file."""
    with path.open("rb+") as file:
        file.write(header)
    return path
