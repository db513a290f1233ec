"""Writes, reads, verifies and summarises the manifest and indices of a shard folder.

A split is one folder:

    manifest.json           counts, class names, settings, size and SHA-256 of every shard; written last
    rejected.jsonl          {"key", "reason"} of every source file that is not a usable image
    left_out.jsonl          {"key", "reason", "files"}: what was not read, by folder and reason (`key` is the first)
    shard-000000.tar        a plain WebDataset tar
    shard-000000.index.npy  one INDEX_DTYPE row per sample: offsets and sizes of its members in the tar
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from beit_pretrain.data.layout import (
    BY_PRODUCT,
    FURTHER,
    MAP,
    NO_IMAGE,
    image_rank,
    is_by_product,
    split_key,
    why_no_image,
)
from beit_pretrain.data.left_out import LEFT_OUT, LeftOut
from beit_pretrain.data.left_out import summary as summary_of_left_out
from beit_pretrain.data.source_tree import map_folders_of
from beit_pretrain.data.sources import read_bytes
from beit_pretrain.data.tars import REFUSED, scan_tar
from beit_pretrain.errors import UserError
from beit_pretrain.fileio import atomic_write, expand_home
from beit_pretrain.processes import cores, in_order
from beit_pretrain.transforms.image_io import IMAGE_EXTENSIONS, starts_as_image

FORMAT = "beit_pretrain-shards/1"
MANIFEST = "manifest.json"
MANIFEST_KEYS = frozenset(("rejected", "classes", "class_counts", "segmentation", "seed", "source", "settings"))
REJECTED = "rejected.jsonl"
EMPTY = "an empty image"
INNER_TAR = "a tar in a tar, which shards make reads"
NO_IMAGE_IN_SAMPLE = "a sample without an image"
NUMBERS = re.compile(r"((?:\d[^.]*\.)*\d[^.]*)\.")  # parts of an extension that begin with a digit
# A plain file name: a manifest is untrusted and must not lead out of its folder or to another host.
SHARD_NAME = re.compile(r"\w[^/\\:\x00-\x1f\x7f]*\.tar")
MOST_CLASSES = 1_000_000  # largest number of classes; each has a name in the manifest
SHA256 = re.compile(r"[0-9a-f]{64}")
# Offsets and sizes in bytes, from the start of the tar to the member's data. label -1: no class; size 0: no mask.
INDEX_DTYPE = np.dtype(
    [("image_offset", "<u8"), ("image_size", "<u8"), ("label", "<i8")]
    + [("segmentation_offset", "<u8"), ("segmentation_size", "<u8")]
)


def index_shard(path: str | Path, image_key: Sequence[str] = ()) -> np.ndarray:
    """The index of a WebDataset tar: INDEX_DTYPE rows of the samples with an image, in the tar's order.

    `image_key`: as of `scan_shard`. Raises UserError if the tar cannot be read or a `.cls` holds no class number.
    """
    return scan_shard(Path(path), image_key, LeftOut())


def scan_shard(path: Path, image_key: Sequence[str], left_out: LeftOut) -> np.ndarray:
    """`index_shard`; what is left out goes into `left_out`.

    As in WebDataset, a sample's key is the path up to the first dot of the file name, but numbers after it belong to
    the key if no member has the bare one (`scan.0001.jpg`, `scan.0002.jpg`). The last part of the extension gives the
    member's kind (`k.input.jpg` is an image, `k.target.cls` a class), but a plain extension (`k.jpg`) has priority. Of
    several images `layout.image_rank` chooses, by `image_key` (extensions) if it is given. A repeated member of a key
    starts a new sample. Folders of label maps are left out.
    """
    notes: list[str] = []
    members = [(*split_key(name), name, offset, size) for name, offset, size in scan_tar(path, notes=notes)]
    for text in notes:
        left_out.note(path.name, text)
    maps = map_folders_of(name for _, _, name, *_ in members)
    bare = {key for key, extension, *_ in members if "." not in extension}
    samples: list[_Sample] = []
    of_key: dict[str, _Sample] = {}  # the last sample of a key
    for key, extension, name, offset, size in members:
        if key not in bare and (number := NUMBERS.match(extension)):
            key, extension = f"{key}.{number[1]}", extension[number.end() :]
        kind = MAP if name[: name.rfind("/") + 1] in maps else _kind(path, name, extension, offset, size)
        if kind not in ("image", "seg.png", "cls"):
            left_out.add(f"{path.name}/{name}", kind, folder=path.name)
            continue
        if key not in of_key or extension in of_key[key].extensions:
            of_key[key] = _Sample(f"{path.name}/{name}")
            samples.append(of_key[key])
        sample = of_key[key]
        rank = image_rank(extension, image_key) if kind == "image" else (extension != kind,)
        if kind == "image":
            sample.images += 1
        if rank is not None and (kind not in sample.ranks or rank < sample.ranks[kind]):
            sample.ranks[kind] = rank
            if kind == "cls":
                sample.row[2] = _class_number(path, name, read_bytes(path, offset, min(size, 100)))
            else:
                start = 0 if kind == "image" else 3
                sample.row[start : start + 2] = offset, size
        sample.extensions.add(extension)
    for sample in samples:
        further = sample.images - ("image" in sample.ranks)
        if further:
            left_out.add(sample.first, FURTHER, further, path.name)
        if not sample.row[1]:
            left_out.add(sample.first, EMPTY if "image" in sample.ranks else NO_IMAGE_IN_SAMPLE, folder=path.name)
    return np.array([tuple(sample.row) for sample in samples if sample.row[1]], INDEX_DTYPE)


class _Sample:
    """A sample of a foreign tar while its members are found."""

    def __init__(self, first: str):
        self.first = first  # name of its first member
        self.row = [0, 0, -1, 0, 0]
        self.ranks: dict[str, tuple[int, ...]] = {}  # of the member taken so far, by kind
        self.extensions: set[str] = set()
        self.images = 0


def key_of(name: str) -> str:
    """The key of a sample by the name of its image: without the extension, with numbers after the first dot."""
    key, extension = split_key(name)
    number = NUMBERS.match(extension)
    return f"{key}.{number[1]}" if number else key


def _kind(path: Path, name: str, extension: str, offset: int, size: int) -> str:
    """What a member is: "image", "seg.png", "cls", or the reason why it is left out."""
    if any(map(is_by_product, name.split("/"))):
        return BY_PRODUCT
    last = "seg.png" if extension.endswith("seg.png") else extension.rpartition(".")[2]
    kind = "image" if last in IMAGE_EXTENSIONS else last if last in ("seg.png", "cls") else ""
    if not kind and last == "tar":
        return INNER_TAR
    if not kind and (why := why_no_image(name)):
        return why
    if size < 0:  # a link, a device, or a name that leads outside
        return REFUSED[size]
    if not kind:  # an unknown extension, or none
        return "image" if starts_as_image(read_bytes(path, offset, min(size, 32))) else NO_IMAGE
    return kind


def _class_number(path: Path, name: str, text: bytes) -> int:
    try:
        number = int(text)
    except ValueError:
        raise UserError(f"{path}: {name} holds {text[:20]!r} where a class number is needed") from None
    if not -1 <= number < MOST_CLASSES:
        said = text.decode(errors="replace").strip()
        raise UserError(f"{path}: {name} holds the class number {said[:20]}, not one of -1 to {MOST_CLASSES - 1:,}")
    return number


def index_path(shard: Path) -> Path:
    return shard.with_suffix(".index.npy")


def write_index(shard: Path, rows: np.ndarray) -> None:
    """Write the index of a shard: INDEX_DTYPE rows."""
    buffer = io.BytesIO()
    np.save(buffer, rows)
    atomic_write(index_path(shard), buffer.getvalue(), durable=True, unique=True)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def shard_entry(path: Path, samples: int) -> dict[str, Any]:
    return {"name": path.name, "samples": samples, "bytes": path.stat().st_size, "sha256": _sha256(path)}


def write_manifest(
    folder: Path, shards: list[dict[str, Any]], labels: np.ndarray, classes: list[str], **about: Any
) -> None:
    """Write manifest.json of a folder that is otherwise complete.

    Args:
        shards: entries in order.
        labels: class index of every sample, -1 = none.
        about: `segmentation`: whether there are label maps; `segmentation_classes`: names of their values 1, 2, ...;
            `deep_colours`: number of images with 16 bits a channel, of which readers use the upper 8; `seed`, `source`,
            `settings`: how the shards were made; `left_out`: files of the source that are not among the samples, by
            reason; `listing_sha256`: over keys, sizes and classes of all files read,
            including rejected ones.
    """
    defaults = {"segmentation": False, "segmentation_classes": [], "deep_colours": 0, "seed": 0, "source": ""}
    defaults |= {"left_out": {}}
    manifest = {
        "format": FORMAT,
        "samples": len(labels),
        "bytes": sum(entry["bytes"] for entry in shards),
        "rejected": (folder / REJECTED).read_bytes().count(b"\n"),
        "classes": classes,
        "class_counts": np.bincount(labels[labels >= 0], minlength=len(classes)).tolist(),
        **(defaults | {"listing_sha256": None, "settings": {}} | about),
        "shards": shards,
    }
    atomic_write(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a split. Raises UserError if it is missing or this version cannot read it."""
    folder = expand_home(folder)
    path = folder / MANIFEST
    advice = "make shards with: python -m beit_pretrain shards make src=FOLDER out=FOLDER"
    if (folder / "train" / MANIFEST).is_file() and not path.is_file():
        raise UserError(f"{folder} has no {MANIFEST}, but its folder train has: give {folder / 'train'}")
    if not path.is_file():
        raise UserError(f"{folder} {f'has no {MANIFEST}' if folder.exists() else 'does not exist'}; {advice}")
    try:
        text = path.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); {advice}") from None
    return parse_manifest(text, path, advice)


def parse_manifest(text: str, path: str | Path, advice: str) -> dict[str, Any]:
    """Parse and check a manifest's text. Raises UserError with `advice` if it is damaged or hostile."""
    try:
        manifest: dict[str, Any] = json.loads(text)
        if manifest["format"] != FORMAT:
            raise UserError(f"{path} has format {manifest['format']!r}, this version reads {FORMAT!r}; {advice}")
        if missing := MANIFEST_KEYS - manifest.keys():
            raise KeyError(min(missing))
        shards, counts, classes = manifest["shards"], manifest["class_counts"], manifest["classes"]
        for entry in shards:
            _check_entry(entry)
        if len({entry["name"] for entry in shards}) < len(shards):
            raise ValueError("two of its shards have the same name")
        if not isinstance(manifest["settings"], dict):
            raise ValueError("its settings are invalid")
        if [type(count) for count in counts] != [int] * len(classes) or {type(name) for name in classes} - {str}:
            raise ValueError("its class_counts do not fit its classes")
        for key in ("samples", "bytes"):
            if sum(entry[key] for entry in shards) != manifest[key]:
                raise ValueError(f"its shards do not add up to its {key}")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); {advice}") from None
    return manifest


def _check_entry(entry: dict[str, Any]) -> None:
    """Raise ValueError, LookupError or TypeError for an invalid entry, or one outside the manifest's folder."""
    if not isinstance(entry["name"], str) or not SHARD_NAME.fullmatch(entry["name"]):
        raise ValueError(f"shard name {str(entry['name'])[:80]!r} is not a plain file name that ends with .tar")
    if not SHA256.fullmatch(entry["sha256"]):
        raise ValueError(f"the SHA-256 of {entry['name']} is invalid")
    for key in ("samples", "bytes"):
        if type(entry[key]) is not int or not 0 <= entry[key] < 2**53:
            raise ValueError(f"{key} of {entry['name']} is {entry[key]!r}")


def verify_shards(folder: str | Path, progress: bool = True, num_workers: int | None = 1) -> list[str]:
    """Read every shard of a split again and return its faults, one line each.

    `num_workers`: None = all cores. Raises UserError if there is no usable manifest.
    """
    manifest, folder = read_manifest(folder), expand_home(folder)
    shards = manifest["shards"]
    problems: list[str] = []
    counts = np.zeros(len(manifest["classes"]), np.int64)
    with in_order(min(num_workers or cores(), len(shards))) as run:
        checked = run(partial(_class_counts, folder, len(counts), image_key_of(manifest)), shards)
        for found in tqdm(checked, total=len(shards), unit=" shards", desc="verify", disable=not progress):
            if isinstance(found, str):
                problems.append(found)
            else:
                counts += found
    if not problems and counts.tolist() != manifest["class_counts"]:
        problems.append(f"{MANIFEST}: its class_counts differ from the labels in the shards")
    known = {entry["name"] for entry in shards} | {key for key, _ in LeftOut.read(folder / LEFT_OUT).examples()}
    extra = {path.name for path in folder.glob("*.tar")} - known
    return problems + [f"{name}: not in {MANIFEST}" for name in sorted(extra)]


def image_key_of(manifest: dict[str, Any]) -> tuple[str, ...]:
    """The extensions that `shards index` was given as `image_key`."""
    found = manifest["settings"].get("image_key") or ()
    return tuple(map(str, found)) if isinstance(found, list | tuple) else (str(found),)


def _class_counts(folder: Path, classes: int, image_key: tuple[str, ...], entry: dict[str, Any]) -> np.ndarray | str:
    """Samples of each class in a shard, or a line that says how the shard differs from its entry."""
    path = folder / entry["name"]
    index_file = index_path(path)
    try:
        if not path.is_file():
            raise UserError("missing")
        if (size := path.stat().st_size) != entry["bytes"]:
            raise UserError(f"has {size} bytes instead of {entry['bytes']}")
        if _sha256(path) != entry["sha256"]:
            raise UserError("its content has changed (another SHA-256 than in the manifest)")
        if not index_file.is_file():
            raise UserError(f"its index {index_file.name} is missing")
        index = index_shard(path, image_key)
        if not np.array_equal(np.load(index_file, allow_pickle=False), index):
            raise UserError(f"its index {index_file.name} does not fit it")
        if len(index) != entry["samples"]:
            raise UserError(f"has {len(index)} samples instead of {entry['samples']}")
        labels = index["label"]
        if labels.size and (labels.min() < -1 or labels.max() >= classes):
            raise UserError(f"has labels beyond the {classes} classes of {MANIFEST}")
        return np.bincount(labels[labels >= 0], minlength=classes)
    except (UserError, OSError, ValueError, EOFError, MemoryError) as error:
        return f"{entry['name']}: {error}"


def summary(folder: str | Path) -> str:
    """Describe a split in a few lines. Raises UserError as `read_manifest` does."""
    manifest = read_manifest(folder)
    shards, classes, counts = manifest["shards"], manifest["classes"], manifest["class_counts"]
    lines = [
        f"{folder}: {manifest['samples']:,} samples in {len(shards):,} shards, {manifest['bytes'] / 1e6:,.1f} MB",
        f"source {manifest['source']}, seed {manifest['seed']}, {manifest['rejected']:,} files rejected",
        f"{len(classes):,} classes" if classes else "no classes",
    ]
    if classes:
        most, least = int(np.argmax(counts)), int(np.argmin(counts))
        lines[-1] += f": most {classes[most]} ({counts[most]:,}), least {classes[least]} ({counts[least]:,})"
    if deep := manifest.get("deep_colours", 0):
        lines.append(f"{deep:,} images have 16 bits a colour, of which the upper 8 are read")
    if left_out := manifest.get("left_out"):
        lines.append(summary_of_left_out(left_out))
    return "\n".join([*lines, "with segmentation masks"] if manifest["segmentation"] else lines)
