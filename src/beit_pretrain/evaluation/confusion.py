"""Confusion matrix of classes, and the scores of a segmentation: mIoU and accuracies."""

from __future__ import annotations

import torch
from torch import Tensor

from beit_pretrain.transforms.grey_values import IGNORE


def confusion(found: Tensor, target: Tensor, classes: int) -> Tensor:
    """Pixel counts (K, K) int64: rows are true classes, columns predicted ones; ignored pixels are left out."""
    counted = target != IGNORE
    pairs = target[counted] * classes + found[counted]
    return torch.bincount(pairs, minlength=classes * classes).view(classes, classes)


def scores(confusion_KK: Tensor) -> dict[str, float]:
    """mIoU, mean class accuracy and pixel accuracy; classes that do not occur are left out of the means."""
    counts = confusion_KK.double()
    hits, true, found = counts.diagonal(), counts.sum(1), counts.sum(0)
    iou, accuracy = hits / (true + found - hits), hits / true  # NaN for absent classes
    total = float(true.sum())
    return {
        "miou": float(iou.nanmean()),
        "macc": float(accuracy.nanmean()),
        "aacc": float(hits.sum()) / total if total else float("nan"),
    }
