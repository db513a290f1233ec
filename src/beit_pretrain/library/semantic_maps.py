"""From the logits of a segmenter to label maps of the images' sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from beit_pretrain.library.batch_feature import BatchFeature
from beit_pretrain.models.checkpoints.hf_processor import number


def semantic_maps(
    outputs: Any, target_sizes: Sequence[Sequence[int]] | Tensor | None = None, return_scores: bool = False
) -> list[Any]:
    """The most likely class (H, W) int64 of each pixel, for every image.

    Args:
        outputs: with `logits` (B, K, h, w), as attribute or entry.
        target_sizes: (height, width) for each image, to which logits are resized (bilinear) first; None = h, w.
        return_scores: return `segmentation` and the resized logits `segmentation_scores` (K, H, W) of each image.

    Raises TypeError, ValueError.
    """
    logits_BKhw = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    if not isinstance(logits_BKhw, Tensor) or logits_BKhw.ndim != 4:
        raise TypeError("outputs must have logits (B, K, h, w) of a segmentation model")
    if target_sizes is None:
        scores = list(logits_BKhw)
    else:
        sizes = _sizes(target_sizes)
        if len(sizes) != len(logits_BKhw):
            raise ValueError(f"target_sizes has {len(sizes)} entries for {len(logits_BKhw)} images")
        scores = [
            F.interpolate(logits_Khw[None], size=size, mode="bilinear", align_corners=False)[0]
            for logits_Khw, size in zip(logits_BKhw, sizes, strict=True)
        ]
    maps = [scores_KHW.argmax(0) for scores_KHW in scores]
    if not return_scores:
        return maps
    return [BatchFeature(segmentation=found, segmentation_scores=of) for found, of in zip(maps, scores, strict=True)]


def _sizes(target_sizes: Any) -> list[tuple[int, int]]:
    """(height, width) of each image. Raises ValueError for anything else."""
    try:
        sizes = [[side.item() if hasattr(side, "item") else side for side in size] for size in target_sizes]
        right = all(number(side) and float(side).is_integer() and side >= 1 for size in sizes for side in size)
        if right and all(len(size) == 2 for size in sizes):
            return [(int(height), int(width)) for height, width in sizes]
    except (TypeError, ValueError, OverflowError, RuntimeError):
        pass
    raise ValueError("target_sizes must hold (height, width) of every image, in pixels")
