"""Losses of the models when they are given labels, as transformers defines them.

Shapes: B batch, K classes, H W pixels of a label map, h w of logits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from beit_pretrain.errors import UserError

PROBLEMS = ("regression", "single_label_classification", "multi_label_classification")


def problem_of(classes: int, labels: Tensor) -> str:
    """Which of `PROBLEMS` labels are for: one number an image is a regression, whole numbers are classes."""
    if classes == 1:
        return PROBLEMS[0]
    return PROBLEMS[1] if labels.dtype in (torch.long, torch.int) else PROBLEMS[2]


def classification_loss(logits_BK: Tensor, labels: Tensor, problem: str | None = None) -> Tensor:
    """Mean squared error, cross-entropy, or binary cross-entropy of every class; `problem`: see `problem_of`.

    `labels`: (B,) classes; (B, K) in [0, 1] for several labels an image; (B,) or (B, K) numbers for a regression.
    """
    labels = labels.to(logits_BK.device)
    problem = problem or problem_of(logits_BK.shape[1], labels)
    wanted = logits_BK.numel() if problem != PROBLEMS[1] else len(logits_BK)
    if labels.numel() != wanted:
        raise UserError(f"labels of shape {tuple(labels.shape)} do not fit {len(logits_BK)} images and {problem}")
    if problem == PROBLEMS[1]:
        return F.cross_entropy(logits_BK, labels.flatten().long())
    labels = labels.to(logits_BK.dtype).view_as(logits_BK)
    if problem == PROBLEMS[0]:
        return F.mse_loss(logits_BK, labels)
    return F.binary_cross_entropy_with_logits(logits_BK, labels)


def segmentation_loss(
    logits_BKhw: Tensor, auxiliary_BKhw: Tensor | None, labels_BHW: Tensor, ignored: int, auxiliary_weight: float
) -> Tensor:
    """Cross-entropy of logits enlarged to the label map's size, without pixels labelled `ignored`.

    That of the auxiliary head, if there is one, is added with its weight.
    """
    labels_BHW = labels_BHW.to(logits_BKhw.device).long()  # label maps are often uint8

    def loss(logits: Tensor) -> Tensor:
        enlarged = F.interpolate(logits, size=labels_BHW.shape[-2:], mode="bilinear", align_corners=False)
        return F.cross_entropy(enlarged, labels_BHW, ignore_index=ignored)

    main = loss(logits_BKhw)
    return main if auxiliary_BKhw is None else main + auxiliary_weight * loss(auxiliary_BKhw)
