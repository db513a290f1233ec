"""Losses of the models when they are given labels, as transformers defines them.

Shapes: B batch, K classes, H W pixels of a label map, h w of logits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from beit_pretrain.errors import UserError

PROBLEMS = ("regression", "single_label_classification", "multi_label_classification")
IGNORED = -100  # torch's: tokens and classes of this number do not count


def described(value: object) -> str:
    """What was given in the place of a tensor, or of another tensor."""
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} of {value.dtype}"
    return "none" if value is None else f"an object of the type {type(value).__name__}"


def check_tensor(labels: object) -> None:
    """Raise UserError for labels in an array or a list."""
    if not isinstance(labels, Tensor):
        raise UserError(f"labels must be a tensor, got {described(labels)}")


def readable(tensor: Tensor) -> bool:
    """Whether its values can be looked at for nothing: a GPU would be waited for, and a compiled graph would break."""
    return tensor.device.type == "cpu" and tensor.numel() > 0 and not torch.compiler.is_compiling()


def are_whole(labels: Tensor) -> bool:
    """Whether they are of an integer type."""
    return labels.dtype != torch.bool and not labels.is_floating_point() and not labels.is_complex()


def checked_ids(labels: Tensor, count: int, ignored: int = IGNORED) -> Tensor:
    """Numbers below `count`, or `ignored`, as int64. Raises UserError for other types, and for others on the CPU."""
    if not are_whole(labels):
        raise UserError(f"labels must be a tensor of whole numbers, got {described(labels)}")
    ids = labels.long()
    if readable(ids):
        wrong = ids[((ids < 0) | (ids >= count)) & (ids != ignored)]
        if len(wrong):
            raise UserError(
                f"labels must be from 0 to {count - 1}, or {ignored} for those that do not count; got {wrong[0].item()}"
            )
    return ids


def problem_of(classes: int, labels: Tensor) -> str:
    """Which of `PROBLEMS` labels are for.

    With one class, a regression. Else whole numbers of any integer type, one an image, are classes; all others are
    several labels an image.
    """
    if classes == 1:
        return PROBLEMS[0]
    one = labels.ndim < 2 or labels.numel() == len(labels)
    return PROBLEMS[1] if one and are_whole(labels) else PROBLEMS[2]


def classification_loss(logits_BK: Tensor, labels: Tensor, problem: str | None = None) -> Tensor:
    """Mean squared error, cross-entropy, or binary cross-entropy of every class; `problem`: see `problem_of`.

    `labels`: (B,) classes, of which -100 do not count; (B, K) in [0, 1], of any type, for several labels an image; (B,)
    or (B, K) numbers for a regression. Raises UserError for labels of another shape, type or range; the range is looked
    at on the CPU alone.
    """
    check_tensor(labels)
    problem = problem or problem_of(logits_BK.shape[1], labels)
    wanted = logits_BK.numel() if problem != PROBLEMS[1] else len(logits_BK)
    if labels.numel() != wanted:
        raise UserError(f"labels of shape {tuple(labels.shape)} do not fit {len(logits_BK)} images and {problem}")
    if problem == PROBLEMS[1]:
        if logits_BK.shape[1] == 1:
            raise UserError(f"with one class there is nothing to learn from {problem}: num_labels must be above 1")
        ids = checked_ids(labels.flatten(), logits_BK.shape[1])
        return F.cross_entropy(logits_BK, ids.to(logits_BK.device), ignore_index=IGNORED)
    if problem == PROBLEMS[2] and readable(labels) and not bool(((labels >= 0) & (labels <= 1)).all()):
        raise UserError(f"labels must be from 0 to 1 where an image has several; got {described(labels)} with others")
    labels = labels.to(logits_BK).view_as(logits_BK)
    if problem == PROBLEMS[0]:
        return F.mse_loss(logits_BK, labels)
    return F.binary_cross_entropy_with_logits(logits_BK, labels)


def segmentation_loss(
    logits_BKhw: Tensor, auxiliary_BKhw: Tensor | None, labels_BHW: Tensor, ignored: int, auxiliary_weight: float
) -> Tensor:
    """Cross-entropy of logits enlarged to the label map's size, without pixels labelled `ignored`.

    That of the auxiliary head, if there is one, is added with its weight. Raises UserError for labels that are no
    classes.
    """
    ids_BHW = checked_ids(labels_BHW, logits_BKhw.shape[1], ignored).to(logits_BKhw.device)  # often uint8

    def loss(logits: Tensor) -> Tensor:
        enlarged = F.interpolate(logits, size=ids_BHW.shape[-2:], mode="bilinear", align_corners=False)
        return F.cross_entropy(enlarged, ids_BHW, ignore_index=ignored)

    main = loss(logits_BKhw)
    return main if auxiliary_BKhw is None else main + auxiliary_weight * loss(auxiliary_BKhw)
