"""The linear layers of the backbone: on a CPU oneDNN's products where MKL's, which torch takes, are slower.

Measured on AMD EPYCs with two cores (docs/performance.md). On Zen 4, y = x W^T and the gradient of x are 7 to 28 %
faster by oneDNN; the gradient of W is 6 % faster by MKL, but where x is wider than y (the second layer of an MLP) 7 %
by oneDNN. On Zen 5 oneDNN takes about half of MKL's time for every one of them. So each takes its own.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LARGE = 1 << 26  # multiply-adds of a product, from which on calling another library is worth it
ZEN_5 = 26  # a family of processors
ROWS = 1024  # of x, from which on the gradient of W is faster as its transpose, copied into W's order
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
    """The gradient of W, (N, K).

    Which product it is by depends on shapes and the processor alone, never on a timing: a run that is continued on
    such a processor sums in the same order.
    """
    rows, width = x_MK.shape
    if width > grad_MN.shape[1]:
        return product(grad_MN.t(), x_MK.t())
    if not mkl_is_narrow():
        return grad_MN.t() @ x_MK
    if rows < ROWS or width == grad_MN.shape[1]:
        return product(grad_MN.t(), x_MK.t())
    return product(x_MK.t(), grad_MN.t()).t().contiguous()


@cache
def mkl_is_narrow() -> bool:
    """Whether MKL uses half of the processor's width only.

    On AMD's processors its code is AVX2's. That is all that Zen 4 can do in a cycle, but not Zen 5 and later.
    """
    facts: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            facts.setdefault(name.strip(), value.strip())
        return facts.get("vendor_id") == "AuthenticAMD" and int(facts["cpu family"]) >= ZEN_5
    except (OSError, ValueError, KeyError):  # not Linux, or not as it writes it
        return False


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
