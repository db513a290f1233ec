"""The linear layers of the backbone: on a CPU oneDNN's products where MKL's, which torch takes, are slower.

Measured on an AMD EPYC with two cores (docs/performance.md): y = x W^T and the gradient of x are 7 to 28 % faster by
oneDNN; the gradient of W is 6 % faster by MKL, but where x is wider than y (the second layer of an MLP) 7 % by oneDNN.
So each takes its own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LARGE = 1 << 26  # multiply-adds of a product, from which on calling another library is worth it
# What torch's own compiler calls on a CPU; a build without oneDNN has no such operator.
ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def product(x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """x W^T + b by oneDNN, (M, N)."""
    out: Tensor = ONEDNN(x_MK, weight_NK, bias_N, "none", [], "")  # type: ignore[misc]
    return out


class _Linear(torch.autograd.Function):
    """x W^T + b of float32 matrices on a CPU, and its gradients."""

    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_MK, weight_NK)
        return product(x_MK, weight_NK, bias_N)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_MN: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x_MK, weight_NK = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            product(grad_MN, weight_NK.t()) if of_x else None,
            weight_gradient(grad_MN, x_MK) if of_weight else None,
            grad_MN.sum(0) if of_bias else None,
        )


def weight_gradient(grad_MN: Tensor, x_MK: Tensor) -> Tensor:
    """The gradient of W, (N, K)."""
    if x_MK.shape[1] > grad_MN.shape[1]:
        return product(grad_MN.t(), x_MK.t())
    return grad_MN.t() @ x_MK


def linear(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """`F.linear`, (..., K) -> (..., N), by the fastest product."""
    if not by_onednn(x, weight_NK):
        return F.linear(x, weight_NK, bias_N)
    out: Tensor = _Linear.apply(x.reshape(-1, x.shape[-1]), weight_NK, bias_N)
    return out.unflatten(0, x.shape[:-1])


def by_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether a product is one for oneDNN: large, float32, on a CPU, and neither compiled nor traced."""
    return (
        ONEDNN is not None
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and type(x) is Tensor
        and type(weight) in (Tensor, nn.Parameter)  # not one that is cut over processes
        and x.numel() * weight.shape[0] >= LARGE  # the last question: an export's batch has no size
    )


class Linear(nn.Linear):
    """torch's layer (its parameters and their names) with `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def use_linear(module: nn.Module) -> None:
    """Give every linear layer in a module `linear`."""
    for layer in module.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = Linear
