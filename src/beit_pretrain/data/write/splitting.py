"""Classes, order and train/val split of the listed files, before anything is decoded."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from beit_pretrain.data.manifest import MANIFEST, read_manifest
from beit_pretrain.data.write import synthetic
from beit_pretrain.data.write.file_index import Listing
from beit_pretrain.errors import UserError


def class_names(listing: Listing, sources: list[str], out: Path, split: str) -> list[str]:
    """Sorted names; for a split beside an existing `train`, its names, so that labels agree. Raises UserError."""
    if sources == ["synthetic"]:
        return list(synthetic.TEXTURES)  # all, however few the images: the masks' values rest on them
    names = sorted(listing.classes)
    if split == "train" or not names or not (out / "train" / MANIFEST).exists():
        return names
    known: list[str] = read_manifest(out / "train")["classes"]
    if unknown := sorted(set(names).difference(known)):
        raise UserError(f"class {unknown[0]!r} of {split} is not among the {len(known)} classes of {out / 'train'}")
    return known


def validation_part(labels: np.ndarray, val: float) -> np.ndarray:
    """Mark the first share `val` of each class: at least one image, never all. Raises UserError if none can be.

    Images without a class (-1) or alone in theirs are pooled as one class, of which none need be marked if others are.
    """
    chosen = np.zeros(len(labels), bool)
    if val == 0:
        return chosen
    _, inverse, count = np.unique(labels, return_inverse=True, return_counts=True)
    labels = np.where(count[inverse] > 1, labels, -1)
    by_class = np.argsort(labels, kind="stable")
    names, start, count = np.unique(labels[by_class], return_index=True, return_counts=True)
    least = (names >= 0) | (len(names) == 1)
    quota = np.minimum(np.maximum(np.rint(count * val), least), count - 1)
    chosen[by_class] = np.arange(len(labels)) - np.repeat(start, count) < np.repeat(quota, count)
    if not chosen.any():
        raise UserError(f"val={val} leaves nothing to validate on: there is only one image")
    return chosen


def split_rows(labels: np.ndarray, names: list[str], val: float, seed: int) -> dict[str, np.ndarray]:
    """Rows of the listing, whose class indices are `labels`, in the order of each split. Raises UserError."""
    # By sorting raw draws: numpy guarantees these forever, but not the result of Generator.permutation.
    order = np.argsort(np.random.PCG64(seed).random_raw(len(labels)), kind="stable")
    in_val = validation_part(labels[order], val)
    return {name: order[in_val == (val > 0 and name == "val")] for name in names}
