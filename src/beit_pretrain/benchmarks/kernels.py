"""The attention kernels that `bench attention` compares: `KERNELS`. Another one is one more entry.

Shapes: B batch, H heads, N tokens, K tokens that have queries, d width of a head.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from beit_pretrain.models.blocks import bias_rows, biased_attention, pad_bias_stride


class Inputs(NamedTuple):
    """What a kernel gets. Tensors but `token_BK` need gradients."""

    qkv: Tensor  # (B, N, 3, H, d); with `token_BK` keys and values alone, (B, N, 2, H, d)
    bias: Tensor  # (1, H, N, N)
    query: Tensor | None = None  # (B, K, H, d)
    token_BK: Tensor | None = None

    @property
    def leaves(self) -> list[Tensor]:
        return [self.qkv, self.bias] if self.query is None else [self.qkv, self.bias, self.query]


Kernel = Callable[[Inputs], Tensor]  # outputs (B, N or K, H, d)
OnHeads = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # q (B, H, K, d), k, v (B, H, N, d), bias (1|B, H, K, N)


def on_heads(attention: OnHeads, prepared: bool = True) -> Callable[[], Kernel]:
    """A kernel of an attention on separate q, k, v and the queries' own rows of the bias.

    `prepared`: the bias in q's precision with aligned rows, as the network has it.
    """

    def kernel(given: Inputs) -> Tensor:
        parts = given.qkv.transpose(1, 3).unbind(2)  # (B, H, N, d) each
        q, k, v = parts if given.query is None else (given.query.transpose(1, 2), *parts)
        bias = pad_bias_stride(given.bias, q) if prepared else given.bias
        rows = bias if given.token_BK is None else bias_rows(bias, given.token_BK)
        return attention(q, k, v, rows).transpose(1, 2)

    return lambda: kernel


def eager(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Scores, added bias, softmax, product, as in the release."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias
    return scores.softmax(-1).to(v.dtype) @ v


def sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """The fused kernel that torch chooses."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))


def no_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """The fused kernel without a bias: what the bias costs at least."""
    return F.scaled_dot_product_attention(q, k, v)


def of_backend(backend: SDPBackend) -> OnHeads:
    """torch's attention by one backend."""

    def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    return attention


def flex() -> Kernel:
    """FlexAttention, compiled at its first call, the bias looked up in the kernel."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled: Any = torch.compile(flex_attention, dynamic=False)

    def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        several = len(bias) > 1

        def with_bias(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score + (bias[b, h, i, j] if several else bias[0, h, i, j])

        out: Tensor = compiled(q, k, v, score_mod=with_bias)
        return out

    return on_heads(attention)()


TRITON = "beit_pretrain.models.triton_attention"


def triton() -> Kernel:
    """The project's own kernels, which take the packed tensors as they are and find the queries' rows themselves."""
    module: Any = importlib.import_module(TRITON)

    def kernel(given: Inputs) -> Tensor:
        bias = pad_bias_stride(given.bias, given.qkv)
        if given.query is None:
            packed: Tensor = module.packed_attention(given.qkv, bias)
            return packed
        some: Tensor = module.attention_at(given.query, given.qkv, bias, given.token_BK)
        return some

    return kernel


# Name -> what makes the kernel, and whether it needs CUDA.
# ours: what the network uses; sdpa_odd: rows of 197 numbers, which CUDA's kernels copy first.
KERNELS: dict[str, tuple[Callable[[], Kernel], bool]] = {
    "eager": (on_heads(eager, prepared=False), False),
    "ours": (on_heads(biased_attention), False),
    "sdpa": (on_heads(sdpa), False),
    "sdpa_odd": (on_heads(sdpa, prepared=False), True),
    "no_bias": (on_heads(no_bias), False),
    "sdpa_efficient": (on_heads(of_backend(SDPBackend.EFFICIENT_ATTENTION)), True),
    "sdpa_cudnn": (on_heads(of_backend(SDPBackend.CUDNN_ATTENTION)), True),
    "triton": (triton, True),
    "flex": (flex, True),  # on a CPU it has no gradient
}


def kernels(device: torch.device) -> dict[str, Callable[[], Kernel]]:
    """Makers of the kernels that there are for a device."""
    there = {name: make for name, (make, cuda) in KERNELS.items() if device.type == "cuda" or not cuda}
    if importlib.util.find_spec(TRITON) is None:
        there.pop("triton", None)
    return there
