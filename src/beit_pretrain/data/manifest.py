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
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from beit_pretrain.data.left_out import LEFT_OUT, LeftOut
from beit_pretrain.data.left_out import summary as summary_of_left_out
from beit_pretrain.data.shard_index import index_shard
from beit_pretrain.errors import UserError
from beit_pretrain.fileio import atomic_write, expand_home
from beit_pretrain.processes import cores, in_order

FORMAT = "beit_pretrain-shards/1"
MANIFEST = "manifest.json"
MANIFEST_KEYS = frozenset(("rejected", "classes", "class_counts", "segmentation", "seed", "source", "settings"))
REJECTED = "rejected.jsonl"
# A plain file name: a manifest is untrusted and must not lead out of its folder or to another host.
SHARD_NAME = re.compile(r"\w[^/\\:\x00-\x1f\x7f]*\.tar")
SHA256 = re.compile(r"[0-9a-f]{64}")


def index_path(shard: Path) -> Path:
    return shard.with_suffix(".index.npy")


def write_index(shard: Path, rows: np.ndarray) -> None:
    """Write the index of a shard: INDEX_DTYPE rows."""
    write_rows(index_path(shard), rows)


def write_rows(path: Path, rows: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, rows)
    atomic_write(path, buffer.getvalue(), durable=True, unique=True)


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
    """The extensions that `shards index` was given as `image_key`; shards that we wrote have one image a sample."""
    if manifest.get("listing_sha256"):
        return ()
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
