"""Parameter groups, layer-wise learning-rate decay, learning-rate schedules, gradient clipping.

They follow BEiT (arXiv:2106.08254), appendices on hyperparameters, and the release's `beit/optim_factory.py`
(`get_parameter_groups`) and `beit/utils.py` (`cosine_scheduler`). timm's parameter groups are not used: they exempt the
relative position bias tables from weight decay, and the release does not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from beit_pretrain.engine.settings import OptimSettings

NO_DECAY = ("pos_embed", "cls_token")


def rate(optim: OptimSettings, step: int, total: int) -> float:
    """Learning rate of optimiser step `step` (from 0) of `total`."""
    if optim.schedule == "poly":
        return poly_rate(step, total, optim.warmup_steps, optim.lr, optim.min_lr, optim.warmup_start)
    return learning_rate(step, total, optim.warmup_steps, optim.lr, optim.min_lr)


def learning_rate(step: int, total: int, warmup: int, peak: float, end: float) -> float:
    """Learning rate of optimiser step `step` (from 0) of `total`: linear warm-up from 0, then cosine to `end`.

    The warm-up is `linspace(0, peak, warmup)`: step 0 has rate 0, steps warmup-1 and warmup both have the peak.
    """
    if step < warmup:
        return peak * step / (warmup - 1) if warmup > 1 else 0.0
    progress = (step - warmup) / max(1, total - warmup)
    return end + 0.5 * (peak - end) * (1 + math.cos(math.pi * min(1.0, progress)))


def poly_rate(step: int, total: int, warmup: int, peak: float, end: float, start: float) -> float:
    """Linear decay from `peak` to `end` over the whole run, times a linear warm-up from `start` to 1 (segmentation).

    Decay and warm-up both begin at step 0, so the rate never reaches the peak.
    """
    rate = end + (peak - end) * max(0.0, 1 - step / total)
    return rate * (1 - (1 - step / warmup) * (1 - start)) if step < warmup else rate


def layer_of(name: str, depth: int) -> int:
    """Layer index of a `Beit` parameter: embeddings 0, block i -> i + 1, everything else depth + 1."""
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
    """AdamW parameter groups: no weight decay for 1-D parameters, biases, `pos_embed` and `cls_token`.

    The mask token is decayed. Each group has `names` (of its parameters) and
    `lr` = lr * layer_decay ** (depth + 1 - layer).
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


def configure(model: nn.Module, optim: OptimSettings, total_steps: int, depth: int = 0) -> dict:
    """What a LightningModule's `configure_optimizers` returns: AdamW over `model` and its schedule per step."""
    groups = parameter_groups(model.named_parameters(), optim.lr, optim.weight_decay, optim.layer_decay, depth)
    optimizer = torch.optim.AdamW(
        groups, lr=optim.lr, betas=(optim.betas[0], optim.betas[1]), eps=optim.eps, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(optim, step, total_steps) / optim.lr)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def clip_gradients(
    parameters: Iterable[nn.Parameter], clip: Tensor | float | None, scale: Tensor | float = 1.0
) -> Tensor:
    """Multiply all gradients by `scale`, then clip them to norm `clip`. Returns the norm before clipping."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return torch.zeros(())
    norm = torch.nn.utils.get_total_norm(gradients)
    if isinstance(norm, DTensor):  # FSDP: each process holds a part of each gradient
        norm = norm.full_tensor()
        gradients = [cast(DTensor, gradient).to_local() for gradient in gradients]
    norm = norm * scale
    factor = scale
    if clip is not None:
        factor = factor * torch.clamp(clip / (norm + 1e-6), max=1.0)
    if isinstance(factor, Tensor):  # with another dtype, _foreach_mul_ launches one kernel per gradient
        half = gradients[0].dtype in (torch.bfloat16, torch.float16)  # would round the factor by up to 0.4 %
        torch._foreach_mul_(gradients, factor.float() if half else factor.to(gradients[0].dtype))
    elif factor != 1:
        torch._foreach_mul_(gradients, factor)
    return norm
