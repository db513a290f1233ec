"""What a step costs apart from time: floating-point operations, memory; and what the device could do at best."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from beit_pretrain.models.cpu_kernels import ONEDNN, linear


def counted_flops(step: Callable[[], Any]) -> int:
    """Floating-point operations of the matrix products and convolutions that a call really does."""
    with FlopCounterMode(display=False, custom_mapping={ONEDNN: _of_linear} if ONEDNN else None) as counter:
        step()
    return int(counter.get_total_flops())


def _of_linear(x_shape: Any, weight_shape: Any, *_: Any, **__: Any) -> int:
    return 2 * x_shape[0] * x_shape[1] * weight_shape[0]


def kept_bytes(forward: Callable[[], Any]) -> int:
    """Bytes that a forward pass keeps for its backward pass, parameters not counted; each storage once."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = forward()  # noqa: F841 (the graph must live until all is counted)
    return sum(storages.values())


def state_bytes(model: nn.Module) -> int:
    """Bytes of weights, gradients and AdamW's two moments, in single precision."""
    return 4 * 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)


def peak_bytes(device: torch.device, work: Callable[[], None]) -> int:
    """The most bytes in use on the GPU during some work."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def measured_peak(device: torch.device, bf16: bool, now: Callable[[], float]) -> float:
    """FLOP/s of the fastest of some large matrix products in the precision of training; `now` counts the seconds."""
    return product_rate(device, torch.bfloat16 if bf16 else torch.float32, now)


def product_rate(device: torch.device, dtype: torch.dtype, now: Callable[[], float], sides: Any = None) -> float:
    """FLOP/s of the fastest of some matrix products of random square matrices with these sides."""
    sides = sides or ((1024, 2048) if device.type == "cpu" else (4096, 8192))
    best = 0.0
    for side in sides:
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        for _ in range(3):
            repeats = 2 if device.type == "cpu" else 20
            linear(a, b)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = now()
            for _ in range(repeats):
                linear(a, b)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best = max(best, 2 * side**3 * repeats / (now() - start))
    return best
