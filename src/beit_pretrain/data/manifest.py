"""What a folder of shards says of itself: manifest and indices. Read, verify and summarise them.

A split is one folder:

    manifest.json           counts, class names, settings, size and SHA-256 of every shard; written last
    rejected.jsonl          {"key", "reason"} of every source file that is not a usable image
    shard-000000.tar        a plain WebDataset tar
    shard-000000.index.npy  one INDEX_DTYPE row per sample: where its members lie in the tar
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from beit_pretrain.data.sources import read_bytes
from beit_pretrain.data.tars import scan_tar
from beit_pretrain.errors import UserError
from beit_pretrain.fileio import atomic_write
from beit_pretrain.processes import cores, in_order
from beit_pretrain.transforms.image_io import IMAGE_EXTENSIONS

FORMAT = "beit_pretrain-shards/1"
MANIFEST = "manifest.json"
MANIFEST_KEYS = frozenset(("rejected", "classes", "class_counts", "segmentation", "seed", "source", "settings"))
REJECTED = "rejected.jsonl"
# A plain file name: a manifest may come from anywhere, and must not lead out of its folder or to another host.
SHARD_NAME = re.compile(r"\w[^/\\:\x00-\x1f\x7f]*\.tar")
MOST_CLASSES = 1_000_000  # each has a name in the manifest
SHA256 = re.compile(r"[0-9a-f]{64}")
# Offsets and sizes in bytes, from the start of the tar to the member's data. label -1: no class; size 0: no mask.
INDEX_DTYPE = np.dtype(
    [
        ("image_offset", "<u8"),
        ("image_size", "<u8"),
        ("label", "<i8"),
        ("segmentation_offset", "<u8"),
        ("segmentation_size", "<u8"),
    ]
)


class ShardScan(NamedTuple):
    """What `scan_shard` makes of a tar: INDEX_DTYPE rows, and how many of its images are in none."""

    rows: np.ndarray
    left_out: int


def index_shard(path: str | Path) -> np.ndarray:
    """Where the samples of a WebDataset tar lie: INDEX_DTYPE rows, in the tar's order, of the samples with an image.

    Raises UserError if the tar cannot be read or a `.cls` is not the number of a class.
    """
    return scan_shard(path).rows


def scan_shard(path: str | Path) -> ShardScan:
    """`index_shard`, and what it leaves out: empty images, and further ones of a sample.

    As WebDataset has it, a sample's key is a name up to the first dot of its last part. What a member is says the last
    part of its extension (`k.input.jpg` is an image, `k.target.cls` a class), where no plain one (`k.jpg`) does. A key
    that comes with a member again is another sample.
    """
    rows: list[list[int]] = []
    of_key: dict[str, tuple[list[int], set[str]]] = {}  # the last sample of a key, and what it has
    images, path = 0, Path(path)
    for name, offset, size in scan_tar(path):
        if size < 0:  # a link or a device: no sample's
            continue
        folder, _, base = name.rpartition("/")
        stem, _, extension = base.partition(".")
        key, extension = f"{folder}/{stem}", extension.lower()
        kind = "seg.png" if extension.endswith("seg.png") else extension.rpartition(".")[2]
        if kind not in IMAGE_EXTENSIONS and kind not in ("seg.png", "cls"):
            continue
        if key not in of_key or f".{extension}" in of_key[key][1]:
            rows.append([0, 0, -1, 0, 0])
            of_key[key] = rows[-1], set()
        row, has = of_key[key]
        known, plain = "image" if kind in IMAGE_EXTENSIONS else kind, extension == kind
        images += known == "image"
        if plain or known not in has:
            if known == "image":
                row[:2] = offset, size
            elif known == "seg.png":
                row[3:] = offset, size
            else:
                row[2] = _class_number(path, name, read_bytes(path, offset, min(size, 100)))
        has |= {f".{extension}", known}
    index = np.array([tuple(row) for row in rows if row[1]], INDEX_DTYPE)
    return ShardScan(index, images - len(index))


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
    """Where the index of a shard lies."""
    return shard.with_suffix(".index.npy")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def shard_entry(path: Path, samples: int) -> dict[str, Any]:
    """What the manifest tells of a shard, a finished tar of so many samples."""
    return {"name": path.name, "samples": samples, "bytes": path.stat().st_size, "sha256": _sha256(path)}


def write_manifest(
    folder: Path,
    shards: list[dict[str, Any]],
    labels: np.ndarray,
    classes: list[str],
    *,
    segmentation: bool,
    seed: int,
    source: str,
    settings: dict[str, Any],
    segmentation_classes: Sequence[str] = (),
    listing_sha256: str | None = None,
    deep_colours: int = 0,
) -> None:
    """Write manifest.json of a folder that is complete but for it.

    `shards`: an entry each, in order; `labels`: the class index of every sample, -1 = none; `segmentation`: whether
    there are masks; `seed`, `source`, `settings`: what the shards were made from; `segmentation_classes`: names of the
    masks' values 1, 2, ...; `listing_sha256`: over keys, sizes and classes of what was read, rejected files included;
    `deep_colours`: images of 16 bits a colour, of which readers see the upper 8.
    """
    manifest = {
        "format": FORMAT,
        "samples": len(labels),
        "bytes": sum(entry["bytes"] for entry in shards),
        "rejected": (folder / REJECTED).read_bytes().count(b"\n"),
        "classes": classes,
        "class_counts": np.bincount(labels[labels >= 0], minlength=len(classes)).tolist(),
        "segmentation": segmentation,
        "segmentation_classes": list(segmentation_classes),
        "deep_colours": deep_colours,
        "seed": seed,
        "source": source,
        "listing_sha256": listing_sha256,
        "settings": settings,
        "shards": shards,
    }
    atomic_write(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a split. Raises UserError if there is none, or one that this version cannot read."""
    folder = Path(folder).expanduser()
    path = folder / MANIFEST
    advice = "make shards with: python -m beit_pretrain shards make src=FOLDER out=FOLDER"
    if not folder.exists():
        raise UserError(f"{folder} does not exist; {advice}")
    if not path.is_file():
        if (folder / "train" / MANIFEST).is_file():
            raise UserError(f"{folder} has no {MANIFEST}, but its folder train has: give {folder / 'train'}")
        raise UserError(f"{folder} has no {MANIFEST}; {advice}")
    try:
        text = path.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); {advice}") from None
    return parse_manifest(text, path, advice)


def parse_manifest(text: str, path: str | Path, advice: str) -> dict[str, Any]:
    """The manifest that a file at `path` holds. Raises UserError, with the advice, if it is damaged or hostile."""
    try:
        manifest: dict[str, Any] = json.loads(text)
        if manifest["format"] != FORMAT:
            raise UserError(f"{path} has format {manifest['format']!r}, this version reads {FORMAT!r}; {advice}")
        if missing := MANIFEST_KEYS - manifest.keys():
            raise KeyError(min(missing))
        for entry in manifest["shards"]:
            _check_entry(entry)
        if len({entry["name"] for entry in manifest["shards"]}) < len(manifest["shards"]):
            raise ValueError("two of its shards have the same name")
        counts, classes = manifest["class_counts"], manifest["classes"]
        if not isinstance(manifest["settings"], dict):
            raise ValueError("its settings are none")
        if len(counts) != len(classes) or not all(
            type(n) is int and isinstance(c, str) for n, c in zip(counts, classes)
        ):
            raise ValueError("its class_counts do not fit its classes")
        for key in ("samples", "bytes"):
            if sum(entry[key] for entry in manifest["shards"]) != manifest[key]:
                raise ValueError(f"its shards do not add up to its {key}")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); {advice}") from None
    return manifest


def _check_entry(entry: dict[str, Any]) -> None:
    """Raise ValueError, LookupError or TypeError for an entry that is no shard in the manifest's own folder.

    A manifest may come from anyone.
    """
    if not isinstance(entry["name"], str) or not SHARD_NAME.fullmatch(entry["name"]):
        raise ValueError(f"shard name {str(entry['name'])[:80]!r} is not a plain file name that ends with .tar")
    if not SHA256.fullmatch(entry["sha256"]):
        raise ValueError(f"the SHA-256 of {entry['name']} is not one")
    for key in ("samples", "bytes"):
        if type(entry[key]) is not int or not 0 <= entry[key] < 2**53:
            raise ValueError(f"{key} of {entry['name']} is {entry[key]!r}")


def verify_shards(folder: str | Path, progress: bool = True, num_workers: int | None = 1) -> list[str]:
    """Read every shard of a split again and return what is wrong, a line each: nothing if all is well.

    `workers`: None = all cores. Raises UserError if there is no usable manifest.
    """
    manifest = read_manifest(folder)
    folder = Path(folder).expanduser()
    shards = manifest["shards"]
    problems: list[str] = []
    counts = np.zeros(len(manifest["classes"]), np.int64)
    with in_order(min(num_workers or cores(), len(shards))) as run:
        for found in tqdm(
            run(partial(_checked_counts, folder, len(counts)), shards),
            total=len(shards),
            unit=" shards",
            desc="verify",
            disable=not progress,
        ):
            if isinstance(found, str):
                problems.append(found)
            else:
                counts += found
    if not problems and counts.tolist() != manifest["class_counts"]:
        problems.append(f"{MANIFEST}: its class_counts differ from the labels in the shards")
    extra = {path.name for path in folder.glob("*.tar")} - {entry["name"] for entry in shards}
    return problems + [f"{name}: not in {MANIFEST}" for name in sorted(extra)]


def _checked_counts(folder: Path, classes: int, entry: dict[str, Any]) -> np.ndarray | str:
    """Samples of each class in a shard that is as the manifest says, or what is wrong with it."""
    try:
        labels = _checked_index(folder / entry["name"], entry)["label"]
        if labels.size and (labels.min() < -1 or labels.max() >= classes):
            raise UserError(f"has labels beyond the {classes} classes of {MANIFEST}")
        return np.bincount(labels[labels >= 0], minlength=classes)
    except (UserError, OSError, ValueError, EOFError, MemoryError) as error:
        return f"{entry['name']}: {error}"


def _checked_index(path: Path, entry: dict[str, Any]) -> np.ndarray:
    """The index of a shard that is as the manifest's `entry` says. Raises UserError, OSError, ValueError if not."""
    if not path.is_file():
        raise UserError("missing")
    if (size := path.stat().st_size) != entry["bytes"]:
        raise UserError(f"has {size} bytes instead of {entry['bytes']}")
    if _sha256(path) != entry["sha256"]:
        raise UserError("its content has changed (another SHA-256 than in the manifest)")
    if not index_path(path).is_file():
        raise UserError(f"its index {index_path(path).name} is missing")
    index = index_shard(path)
    if not np.array_equal(np.load(index_path(path), allow_pickle=False), index):
        raise UserError(f"its index {index_path(path).name} does not fit it")
    if len(index) != entry["samples"]:
        raise UserError(f"has {len(index)} samples instead of {entry['samples']}")
    return index


def summary(folder: str | Path) -> str:
    """A few lines on a split for people. Raises UserError as `read_manifest` does."""
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
    return "\n".join([*lines, "with segmentation masks"] if manifest["segmentation"] else lines)
