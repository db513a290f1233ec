"""Faster implementations for training on a CPU; `active` switches all of them.

With `ENABLED = False` plain torch gives the same results up to rounding. Measured in docs/performance.md.

* `linear`: oneDNN's matrix products where MKL's, which torch calls, are slower.
* `attention`: the bias is added by the product of queries and keys; no fused CPU kernel takes a bias that learns.
* `residual_of_kept`: residual branches are not computed for the images for which drop path drops them.
* OpenAI's encoder keeps its weights in oneDNN's layout (`tokenizers/dalle_encoder.py`).

Shapes: M rows, K inputs and N outputs of a linear layer; in attention and residual branches those of `blocks.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ENABLED = True
LARGE = 1 << 26  # multiply-adds of a product from which oneDNN is worth its overhead
ROWS = 1024  # of x, from which the gradient of W is faster computed transposed and copied back
ZEN_5 = 26  # AMD's number of this CPU family
KEYS = 8  # keys are padded to multiples of it: products with rows of 197 numbers are slower than with rows of 200
# The operator that torch's own compiler calls on a CPU; a build without oneDNN does not have it.
ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def active(device: torch.device) -> bool:
    """The switch: whether the kernels of this file are used for tensors on `device`."""
    return ENABLED and device.type == "cpu"


def by_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN computes a product: large, float32, on a CPU, neither compiled nor traced."""
    return (
        active(x.device)
        and ONEDNN is not None
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and type(x) is Tensor
        and type(weight) in (Tensor, nn.Parameter)  # no DTensor, which is sharded over processes
        and x.numel() * weight.shape[0] >= LARGE  # last: during an export the batch has no size
    )


def linear(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """`F.linear`, (..., K) -> (..., N), by the faster of two libraries."""
    if not by_onednn(x, weight_NK):
        return F.linear(x, weight_NK, bias_N)
    out: Tensor = _Linear.apply(x.reshape(-1, x.shape[-1]), weight_NK, bias_N)
    return out.unflatten(0, x.shape[:-1])


class Linear(nn.Linear):
    """torch's layer with `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def product(x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """x W^T + b by oneDNN, (M, N)."""
    out: Tensor = ONEDNN(x_MK, weight_NK, bias_N, "none", [], "")  # type: ignore[misc]
    return out


class _Linear(torch.autograd.Function):
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
    """The gradient of W, (N, K), by the library that was faster for such shapes on such a processor.

    Never chosen by a timing: a run resumed on such a processor must sum in the same order.
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
    """Whether MKL uses half of the vector width: on AMD it runs AVX2 code, which fills Zen 4 but not Zen 5."""
    try:
        facts = dict(re.findall(r"(?m)^(vendor_id|cpu family)\s*:\s*(\w+)", Path("/proc/cpuinfo").read_text()))
        return facts.get("vendor_id") == "AuthenticAMD" and int(facts["cpu family"]) >= ZEN_5
    except (OSError, ValueError, KeyError):  # not Linux, or another format
        return False


def attention(q_BHKd: Tensor, k_BHNd: Tensor, v_BHNd: Tensor, bias: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v, (B, H, K, d); `bias` (1 or B, H, K, N) with a gradient."""
    missing = -k_BHNd.shape[2] % KEYS
    if missing:  # the largest finite negative number, halved: of minus infinity the compiled softmax makes NaN
        bias = F.pad(bias, (0, missing), value=torch.finfo(bias.dtype).min / 2)
        k_BHNd, v_BHNd = (F.pad(t, (0, 0, 0, missing)) for t in (k_BHNd, v_BHNd))
    shape = (*q_BHKd.shape[:3], k_BHNd.shape[2])
    scores = bias.expand(shape).reshape(-1, *shape[2:])
    # In place only on a copy: with one head, or with a bias for each image, this is still the bias's memory.
    if scores.dtype != q_BHKd.dtype or shape[1] == 1 or (bias.shape[0] == shape[0] and not missing):
        scores = scores.to(q_BHKd.dtype, copy=True)
    q, k, v = (t.flatten(0, 1) for t in (q_BHKd, k_BHNd, v_BHNd))
    scores = scores.baddbmm_(q, k.transpose(1, 2), alpha=q.shape[-1] ** -0.5)
    return torch.bmm(scores.softmax(-1).to(v.dtype), v).unflatten(0, shape[:2])


def residual_of_kept(x: Tensor, branch: Callable[[Tensor], Tensor], keep_B: Tensor, scale: float) -> Tensor:
    """x + scale * branch(x); the branch is computed only for the images with `keep_B`."""
    kept = keep_B.nonzero().flatten()
    if not len(kept):  # one image at least: under DDP every process needs a gradient of every parameter
        kept, scale = kept.new_zeros(1), 0.0
    # Not x[kept]: the backward pass of indexing is ten times slower.
    return x.index_add(0, kept, branch(x.index_select(0, kept)).to(x.dtype), alpha=scale)
