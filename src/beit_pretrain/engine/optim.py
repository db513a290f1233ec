"""Parameter groups, layer-wise learning-rate decay and schedules (RECIPE sections 4 and 5).

timm's own groups are not used: they exempt the relative position bias tables from weight decay, the release does not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from beit_pretrain.errors import UserError

NO_DECAY = ("pos_embed", "cls_token")
SCHEDULES = ("cosine", "poly")


@dataclass
class Optim:
    """Settings of AdamW and its schedule.

    Args:
        lr: peak learning rate, as it is used (never scaled by the batch behind the user's back).
        min_lr: learning rate at the last step.
        warmup_steps: length of the linear warm-up from 0, in optimiser steps.
        clip: largest gradient norm over all parameters; None = no clipping.
        layer_decay: factor of the learning rate from a block to the one below; None = one rate for all.
        schedule: "cosine", or "poly", linear from the first step to the last (RECIPE section 7).
        warmup_start: with "poly", the share of the (already decaying) rate from which the warm-up rises.
    """

    lr: float
    min_lr: float = 1e-5
    warmup_steps: int = 0
    weight_decay: float = 0.05
    betas: tuple[float, float] = field(default=(0.9, 0.999))
    eps: float = 1e-8
    clip: float | None = None
    layer_decay: float | None = None
    schedule: str = "cosine"
    warmup_start: float = 0.0

    def __post_init__(self) -> None:
        numbers = {"lr": self.lr, "min_lr": self.min_lr, "weight_decay": self.weight_decay, "eps": self.eps}
        for name, value in {**numbers, "warmup_steps": self.warmup_steps}.items():
            if not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
                raise UserError(f"optim.{name} must be a number of at least 0, got {value!r}")
        for name, optional in {"clip": self.clip, "layer_decay": self.layer_decay}.items():
            if optional is not None and (not isinstance(optional, (int, float)) or not optional > 0):
                raise UserError(f"optim.{name} must be null or a number above 0, got {optional!r}")
        if self.lr == 0:
            raise UserError("optim.lr must be above 0")
        if self.schedule not in SCHEDULES:
            raise UserError(f"optim.schedule={self.schedule} is not one of {', '.join(SCHEDULES)}")

    def rate(self, step: int, total: int) -> float:
        """Learning rate of optimiser step `step` (from 0) of `total`."""
        if self.schedule == "poly":
            return poly_rate(step, total, self.warmup_steps, self.lr, self.min_lr, self.warmup_start)
        return learning_rate(step, total, self.warmup_steps, self.lr, self.min_lr)


def learning_rate(step: int, total: int, warmup: int, peak: float, end: float) -> float:
    """Learning rate of optimiser step `step` (from 0) of `total`: linear warm-up from 0, then cosine to `end`.

    The warm-up is `linspace(0, peak, warmup)`: step 0 has rate 0, and the peak stands at steps warmup-1 and warmup.
    """
    if step < warmup:
        return peak * step / (warmup - 1) if warmup > 1 else 0.0
    progress = (step - warmup) / max(1, total - warmup)
    return end + 0.5 * (peak - end) * (1 + math.cos(math.pi * min(1.0, progress)))


def poly_rate(step: int, total: int, warmup: int, peak: float, end: float, start: float) -> float:
    """Linear decay from `peak` to `end` over the whole run, times a linear warm-up from `start` to 1 (segmentation).

    Decay and warm-up begin together, so the peak itself is never reached: step `warmup` is already on the line.
    """
    rate = end + (peak - end) * max(0.0, 1 - step / total)
    return rate * (1 - (1 - step / warmup) * (1 - start)) if step < warmup else rate


def layer_of(name: str, depth: int) -> int:
    """The layer a Beit parameter belongs to: embeddings 0, block i -> i + 1, everything else depth + 1."""
    if name.startswith(("patch_embed.", "cls_token", "mask_token", "pos_embed")):
        return 0
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return depth + 1


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]],
    lr: float,
    weight_decay: float,
    layer_decay: float | None = None,
    depth: int = 0,
) -> list[dict]:
    """AdamW groups. No decay on 1-D parameters, biases, `pos_embed` and `cls_token`; the mask token is decayed.

    Each group carries `names` (for a person and for tests) and its own `lr` = lr * layer_decay ** (depth + 1 - layer).
    """
    groups: dict[tuple[int, float], dict] = {}
    for name, parameter in parameters:
        if not parameter.requires_grad:
            continue
        plain = parameter.ndim <= 1 or name.endswith(".bias") or name in NO_DECAY
        layer = layer_of(name, depth) if layer_decay is not None else depth + 1
        scale = (layer_decay or 1.0) ** (depth + 1 - layer)
        decay = 0.0 if plain else weight_decay
        group = groups.setdefault(
            (layer, decay), {"params": [], "names": [], "lr": lr * scale, "weight_decay": decay, "lr_scale": scale}
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def configure(model: nn.Module, optim: Optim, total_steps: int, depth: int = 0) -> dict:
    """What a LightningModule's `configure_optimizers` returns: AdamW over `model` and its schedule per step."""
    groups = parameter_groups(model.named_parameters(), optim.lr, optim.weight_decay, optim.layer_decay, depth)
    optimizer = torch.optim.AdamW(
        groups, lr=optim.lr, betas=(optim.betas[0], optim.betas[1]), eps=optim.eps, fused=True
    )

    def factor(step: int) -> float:
        return optim.rate(step, total_steps) / optim.lr

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def clip_gradients(
    parameters: Iterable[nn.Parameter], clip: Tensor | float | None, scale: Tensor | float = 1.0
) -> Tensor:
    """Multiply all gradients by `scale`, then clip them to norm `clip`. Returns the norm before clipping."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return torch.zeros(())
    norm = torch.nn.utils.get_total_norm(gradients)
    if isinstance(norm, DTensor):  # FSDP: every process has a part of each gradient
        norm = norm.full_tensor()
        gradients = [cast(DTensor, gradient).to_local() for gradient in gradients]
    norm = norm * scale
    factor = scale
    if clip is not None:
        factor = factor * torch.clamp(clip / (norm + 1e-6), max=1.0)
    if isinstance(factor, Tensor):  # in another precision it would take a kernel for each gradient, not one for many
        half = gradients[0].dtype in (torch.bfloat16, torch.float16)  # which would round the factor by .4 %
        torch._foreach_mul_(gradients, factor.float() if half else factor.to(gradients[0].dtype))
    elif factor != 1:
        torch._foreach_mul_(gradients, factor)
    return norm
