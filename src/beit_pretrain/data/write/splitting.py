"""Which classes there are, which files go to which split, and in which order: before anything is decoded."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from beit_pretrain.data.manifest import MANIFEST, read_manifest
from beit_pretrain.data.write import synthetic
from beit_pretrain.data.write.file_index import Listing
from beit_pretrain.errors import UserError


def class_names(listing: Listing, sources: list[str], out: Path, split: str) -> list[str]:
    """Sorted names; for a split added beside `train`, those of `train`, so that labels agree. Raises UserError."""
    if sources == ["synthetic"]:
        return list(synthetic.TEXTURES)  # all of them, however few the images: the masks' values rest on them
    names = sorted(listing.classes)
    if split == "train" or not names or not (out / "train" / MANIFEST).exists():
        return names
    known: list[str] = read_manifest(out / "train")["classes"]
    if unknown := sorted(set(names).difference(known)):
        raise UserError(f"class {unknown[0]!r} of {split} is not among the {len(known)} classes of {out / 'train'}")
    return known


def permutation(count: int, seed: int) -> np.ndarray:
    """A seeded order of 0 ... count - 1."""
    # By sorting raw draws: numpy promises these for ever, but not what Generator.permutation makes of them.
    return np.argsort(np.random.PCG64(seed).random_raw(count), kind="stable")


def validation_part(labels: np.ndarray, val: float) -> np.ndarray:
    """Mark the first `val` of each class, one image or more, but never a class's last. Raises UserError if none is.

    Images without a class (-1) or alone in theirs are pooled as if of one class, which need not give any if others do.
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
