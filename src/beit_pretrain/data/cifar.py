"""Reads CIFAR-100 as published, `cifar-100-python.tar.gz` or unpacked: pickles, read without executing them.

The format (cs.toronto.edu/~kriz/cifar.html): files `train`, `test` and `meta`, each a pickled dictionary. `data` is a
uint8 array (N, 3072), an image's 1,024 red, then green, then blue values; `fine_labels` and `filenames` are lists.
A pickle may name any function to call. Here the few names that an array needs map to inert classes of this module; any
other name is an error.
"""

from __future__ import annotations

import io
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from beit_pretrain.data.tars import read_named
from beit_pretrain.errors import UserError, first_line

SIDE = 32
PIXELS = 3 * SIDE * SIDE  # bytes of an image
ARCHIVE = re.compile(r"cifar-100-python.*\.(tar\.gz|tgz)", re.IGNORECASE)
FILES = {"train": "train", "val": "test", "test": "test", "validation": "test"}
LARGEST = 2**29  # largest file in the archive, bytes; the real ones have at most 155 MB


def recognised(source: Path) -> bool:
    """Whether a path is the archive or the unpacked folder."""
    if source.is_dir():
        return all((source / name).is_file() for name in ("train", "test", "meta"))
    return ARCHIVE.fullmatch(source.name) is not None


def part_of(source: Path, split: str) -> Path:
    """The file that holds a split: the archive itself, or one of the unpacked files. Raises UserError."""
    if split not in FILES:
        raise UserError(f"{source}: CIFAR-100 has the parts train and test; split={split} is none of them")
    return source / FILES[split] if source.is_dir() else source


def read(source: Path, split: str) -> tuple[list[str], list[str], np.ndarray]:
    """Names and classes of the images of a split, and their pixels (N, 3072) uint8.

    `source`: as `part_of` returns for the split. Raises UserError if anything differs from CIFAR-100's own layout.
    """
    name = FILES[split]
    try:
        place = source if ARCHIVE.fullmatch(source.name) else source.parent
        found = read_named(place, {name, "meta"}, LARGEST, total=2 * LARGEST)
        batch, names = _load(found[name]), _load(found["meta"])[b"fine_label_names"]
        pixels = batch[b"data"].array()
        labels = [names[label].decode("ascii") for label in batch[b"fine_labels"] if label >= 0]
        files = [f"{name}/{file.decode('ascii')}" for file in batch[b"filenames"]]
        if not len(labels) == len(files) == len(pixels) > 0 or pixels.shape[1] != PIXELS:
            raise ValueError(f"{len(files)} names, {len(labels)} labels, data of shape {pixels.shape}")
        if len(set(files)) < len(files) or any("/" in file.removeprefix(f"{name}/") for file in files):
            raise ValueError("its file names are not those of CIFAR-100")
    except Exception as error:  # a damaged or hostile pickle may raise anything
        raise UserError(f"{source} is not CIFAR-100's python version: {first_line(error)}") from None
    return files, labels, pixels


class _Inert:
    """Replaces numpy's types while a pickle is read: stores its arguments and does nothing else."""

    state: tuple[Any, ...] = ()

    def __init__(self, *args: Any):
        self.args: tuple[Any, ...] = args

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def array(self) -> np.ndarray:
        """The 2-D uint8 array that the record describes. Raises ValueError for any other array."""
        _, shape, dtype, fortran, data = self.state
        if dtype.args[0] not in ("u1", b"u1") or fortran or not isinstance(data, bytes) or len(shape) != 2:
            raise ValueError("its data is no array of bytes")
        return np.frombuffer(data, np.uint8).reshape(shape)


ALLOWED: dict[tuple[str, str], Any] = {("numpy", "ndarray"): _Inert, ("numpy", "dtype"): _Inert}
ALLOWED |= {(f"numpy.{core}.multiarray", "_reconstruct"): _Inert for core in ("core", "_core")}
# Used by pickles that Python 3 wrote for Python 2, for bytes.
ALLOWED["_codecs", "encode"] = lambda text, encoding: text.encode("latin1")


# Python's unpickler, not the C one: that reserves memory for any memo number in a hostile pickle.
class _Unpickler(pickle._Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no array needs")
        return ALLOWED[module, name]


def _load(data: bytes) -> dict[bytes, Any]:
    """The pickled dictionary, texts as bytes (as Python 2 wrote them)."""

    def as_bytes(value: Any) -> Any:
        return value.encode() if isinstance(value, str) else value

    loaded = _Unpickler(io.BytesIO(data), encoding="bytes").load()
    return {as_bytes(k): [*map(as_bytes, v)] if isinstance(v, list) else v for k, v in loaded.items()}


def image_of(pixels: bytes) -> Image.Image:
    """An image (RGB) from its `PIXELS` bytes."""
    planes = np.frombuffer(pixels, np.uint8).reshape(3, SIDE, SIDE)
    return Image.fromarray(np.ascontiguousarray(planes.transpose(1, 2, 0)))


def as_png(pixels: bytes) -> bytes:
    """The same as a PNG file."""
    buffer = io.BytesIO()
    image_of(pixels).save(buffer, "PNG")
    return buffer.getvalue()
