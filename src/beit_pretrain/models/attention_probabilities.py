"""Attention probabilities of blocks: fused kernels do not return them, so they are computed once more when asked for.

Shapes: B batch, A heads, N tokens ([CLS] first), D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def attention_probabilities(model: Any, inputs: Sequence[Tensor], layers: Sequence[int] | None = None) -> list[Tensor]:
    """softmax(q k^T / sqrt(d) + position bias), (B, A, N, N), of blocks counted from 1 (None = all of them).

    `inputs`: the embeddings and then the output of every block, (B, N, D) each: what the blocks of a `Backbone` read.
    """
    shared = model.rel_pos_bias() if model.rel_pos_bias is not None else None
    chosen = range(1, len(model.blocks) + 1) if layers is None else layers
    blocks = [(model.blocks[n - 1], inputs[n - 1]) for n in chosen]
    return [probabilities(block.attn, block.norm1(x_BND), shared) for block, x_BND in blocks]


def probabilities(attention: Any, x_BND: Tensor, shared_bias: Tensor | None = None) -> Tensor:
    """Those of timm's attention on its normalised input."""
    bias = torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
    qkv = F.linear(x_BND, attention.qkv.weight, bias)
    q, k, _ = qkv.unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    logits = (q * attention.scale) @ k.transpose(-2, -1)
    if attention.relative_position_bias_table is not None:
        logits = logits + attention._get_rel_pos_bias()
    if shared_bias is not None:
        logits = logits + shared_bias
    return logits.softmax(-1, dtype=torch.float32).to(x_BND.dtype)  # 577 tokens in fp16 would lose the small ones
