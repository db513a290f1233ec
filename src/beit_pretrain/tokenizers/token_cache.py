"""Cached tokens: token ids of a few fixed views of every image, so that a run trains without a tokenizer.

`tokenize` (tokenize.py) writes one token folder for each shard folder:

    tokens.json               images, tokenizer and settings of the views; size and SHA-256 of every file
    shard-000000.tokens.npy   (samples, views) records of `record_dtype`, for shard-000000.tar

A record holds the tokens of a view, and the crop, flip and jitter that reproduce this view for the backbone.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from beit_pretrain.data.cache import Shard
from beit_pretrain.data.manifest import SHA256
from beit_pretrain.data.order import Sample
from beit_pretrain.data.reader import ShardReader
from beit_pretrain.data.storage import is_remote
from beit_pretrain.errors import UserError
from beit_pretrain.fileio import expand_home
from beit_pretrain.settings import renamed, to_dict
from beit_pretrain.transforms.jitter import Jitter
from beit_pretrain.transforms.scaled_decoding import Crop
from beit_pretrain.transforms.views import AugmentParams, TwoViewTransform

FORMAT = "beit_pretrain-tokens/1"
TOKENS = "tokens.json"
HEADER = 1024  # largest header of a token file, bytes
OPTIONS = {"train": "data.tokens", "val": "data.val_tokens"}


def record_dtype(patches: int) -> np.dtype:
    """Dtype of one view: its tokens and its augmentation. A crop height of 0 marks an image that does not decode."""
    return np.dtype(
        [
            ("tokens", "<u2", (patches,)),
            ("crop", "<u4", (4,)),  # top, left, height, width in pixels of the original
            ("flip", "?"),
            ("jitter_factors", "<f4", (3,)),  # all 1: no jitter
            ("jitter_order", "u1", (3,)),
        ]
    )


def tokens_name(shard: str) -> str:
    """File name of a shard's tokens."""
    return f"{shard.removesuffix('.tar')}.tokens.npy"


def images_digest(shards: Sequence[Shard]) -> str:
    """SHA-256 over the manifest's names, counts and checksums of all shards."""
    text = "".join(f"{shard.sha256} {shard.samples} {shard.name}\n" for shard in shards)
    return hashlib.sha256(text.encode()).hexdigest()


def view_settings(views: TwoViewTransform) -> dict[str, Any]:
    """Settings of the views, as stored in JSON."""
    settings: dict[str, Any] = to_dict(views.model_copy(update=views.model_dump()))
    return settings


class TokenFolder:
    """Metadata of a token folder. Raises UserError if the folder is missing, damaged or not finished."""

    def __init__(self, path: str | Path):
        if is_remote(path):
            raise UserError(f"{path}: tokens are read from a local folder; copy them to this machine")
        self.path = expand_home(path)
        file = self.path / TOKENS
        if not file.is_file():
            if (self.path / "tokens" / TOKENS).is_file():
                raise UserError(f"{path} has no {TOKENS}, but its folder tokens has: give {self.path / 'tokens'}")
            raise UserError(f"{path} has no {TOKENS}; make tokens with: python -m beit_pretrain tokenize data=SHARDS")
        try:
            about = json.loads(file.read_text("utf-8"))
            if about["format"] != FORMAT:
                raise UserError(f"{file} has format {about['format']!r}, this version reads {FORMAT!r}")
            self._take(about)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{file} is damaged ({type(error).__name__}: {error}); make the tokens again") from None

    def _take(self, about: dict[str, Any]) -> None:
        self.images, self.view, self.tokenizer = about["images"], renamed(about["view"]), about["tokenizer"]
        self.count, self.vocab_size = about["views"], about["tokenizer"]["vocab_size"]
        height, width = about["grid"]
        self.grid: tuple[int, int] = (height, width)
        whole = (height, width, self.count, self.vocab_size, self.view["token_image_size"])
        if not all(type(n) is int and 0 < n <= 2**16 for n in whole):
            raise ValueError("its grid, views, vocabulary or token_image_size is invalid")
        for digest in (self.images["sha256"], self.tokenizer["sha256"], *(s["sha256"] for s in about["shards"])):
            if not SHA256.fullmatch(digest):
                raise ValueError("a SHA-256 is invalid")
        self.shards = [Shard(s["name"], s["samples"], s["bytes"], s["sha256"]) for s in about["shards"]]

    def __str__(self) -> str:
        return str(self.path)


class CachedTokens:
    """Cached tokens and views of a reader's images. The views of an image are used in turn, one per epoch.

    Args:
        folders: token folders, one for each of the reader's folders.
        reader: reader of the images.
        views: transform of the run; the tokens must come from the same views.
        grid: the run's patch grid (height, width).
        split: "train" or "val".

    Raises UserError for tokens of other images, views or patches.
    """

    def __init__(
        self,
        folders: Sequence[TokenFolder],
        reader: ShardReader,
        views: TwoViewTransform,
        grid: tuple[int, int],
        split: str = "train",
    ):
        option, images = OPTIONS[split], f"data.{split}"
        if len(folders) != len(reader.folders):
            raise UserError(f"{option} names {len(folders)} folders for the {len(reader.folders)} of {images}")
        for folder, of in zip(folders, reader.folders):
            if folder.images["sha256"] != images_digest(of.shards) or len(folder.shards) != len(of.shards):
                raise UserError(f"{option}={folder} holds tokens of other images than {images}={of}")
            _check_settings(folder, views, grid, option)
            for file, shard in zip(folder.shards, of.shards):
                _check_file(folder.path / tokens_name(shard.name), file)
        self.folders, self.views, self.patches = list(folders), views, grid[0] * grid[1]
        # As the reader counts shards.
        self._files = [
            (folder, folder.path / shard.name, shard.sha256) for folder in folders for shard in folder.shards
        ]
        self._sizes = reader.sizes

    def view(self, sample: Sample, epoch: int, data: bytes) -> Callable[[], dict[str, np.ndarray]]:
        """Return a function that makes `image`, its jitter and `tokens` (N,) of a sample; `data` is its image file.

        Raises UserError if the token file is missing or damaged.
        """
        folder, path, sha256 = self._files[sample.shard]
        file = _verified(path, sha256, (self._sizes[sample.shard], folder.count), self.patches)
        record = file.read(sample.row * folder.count + epoch % folder.count)
        if int(record["tokens"].max()) >= folder.vocab_size:
            raise UserError(f"{path} is damaged: it has a token beyond the {folder.vocab_size} of its tokenizer")
        return lambda: self._replayed(data, record)

    def _replayed(self, data: bytes, record: np.void) -> dict[str, np.ndarray]:
        crop = Crop(*record["crop"].tolist())
        if not crop.height:
            raise ValueError("it could not be decoded when its tokens were made")
        jitter = Jitter(record["jitter_factors"].copy(), record["jitter_order"].astype(np.int64))
        arrays = self.views.seen_bytes(data, AugmentParams(jitter, bool(record["flip"]), crop), names=("image",))
        return {**arrays, "tokens": record["tokens"].astype(np.int64)}


def same_tokenizer(folders: Sequence[TokenFolder], name: str = "", sha256: str | None = None) -> None:
    """Raise UserError if the folders' tokens are of different tokenizers, or not of the one with this SHA-256."""
    first = folders[0].tokenizer
    for folder in folders:
        if folder.tokenizer["sha256"] != first["sha256"]:
            raise UserError(f"{folders[0]} and {folder} hold tokens of different tokenizers")
    if sha256 is not None and sha256 != first["sha256"]:
        raise UserError(
            f"{folders[0]} holds tokens of another tokenizer ({first['name']}, SHA-256 {first['sha256'][:12]}...) "
            f"than {name} (SHA-256 {sha256[:12]}...)"
        )


def _check_settings(folder: TokenFolder, views: TwoViewTransform, grid: tuple[int, int], option: str) -> None:
    """Raise UserError for the first view setting that differs from the run's."""
    asked = view_settings(views)
    for name in asked.keys() | folder.view.keys():
        if (made := folder.view.get(name)) != (now := asked.get(name)):
            setting = name if name == "image_size" else f"data.{name}"
            raise UserError(f"{option}={folder} holds tokens of views with {setting}={made}, not {now}")
    if folder.grid != grid:
        made, now = (f"{height} x {width}" for height, width in (folder.grid, grid))
        raise UserError(f"{option}={folder} holds {made} tokens an image, the run has {now} patches")


def _check_file(path: Path, entry: Shard) -> None:
    """Raise UserError if a token file is missing, has another size or belongs to another shard."""
    try:
        fits = path.name == entry.name and os.stat(path).st_size == entry.bytes
    except OSError:
        fits = False
    if not fits:
        raise UserError(f"{path} is missing or not as {TOKENS} says; make the tokens again")


@cache  # once per process: it takes half a millisecond
def _check_content(path: Path, sha256: str) -> None:
    try:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    if digest != sha256:
        raise UserError(f"{path} has changed (another SHA-256 than in {TOKENS}); make the tokens again")


@lru_cache(maxsize=256)
def _verified(path: Path, sha256: str, shape: tuple[int, int], patches: int) -> _TokenFile:
    _check_content(path, sha256)
    return _TokenFile(path, shape, patches)


class _TokenFile:
    """An open token file, read and not mapped: a mapped file that shrinks or cannot be read kills the process."""

    def __init__(self, path: Path, shape: tuple[int, int], patches: int):
        records = open_records(path, shape, patches)
        self.path, self.start, self.dtype = path, records.offset, records.dtype
        self.file = open(path, "rb", buffering=0)  # noqa: SIM115

    def read(self, number: int) -> np.void:
        """The record at index `number`. Raises UserError if the file ends before it."""
        size = self.dtype.itemsize
        data = os.pread(self.file.fileno(), size, self.start + number * size)
        if len(data) < size:
            raise UserError(f"{self.path} is shorter than its header says; make the tokens again")
        record: np.void = np.frombuffer(data, self.dtype)[0]
        return record


def open_records(path: Path, shape: tuple[int, int], patches: int) -> np.memmap:
    """The records (samples, views) of a token file, mapped. Raises UserError if it has another shape or dtype."""
    try:
        records = np.lib.format.open_memmap(path, mode="r", max_header_size=HEADER)
        if records.shape != shape or records.dtype != record_dtype(patches):
            raise ValueError(f"{records.shape} records")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is missing or damaged: {error}") from None
    return records
