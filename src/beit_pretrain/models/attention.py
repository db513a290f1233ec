"""Attention probabilities of every head of every block, which fused kernels do not return.

Shapes: B batch, C channels, H W pixels, N patches, D width, A heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from beit_pretrain.models.backbone import Backbone, embed


@torch.no_grad()
def attention_maps(
    model: Backbone, image_BCHW: Tensor, layers: Sequence[int], mask_BN: Tensor | None = None
) -> dict[int, Tensor]:
    """{layer: probabilities (B, A, 1 + N, 1 + N)} of blocks counted from 1, for normalised images.

    Row i holds the attention weights of token i; token 0 is [CLS], then the patches row by row.
    """
    inputs = [embed(model, image_BCHW, mask_BN), *model.hidden_states(image_BCHW, mask_BN)]
    shared = model.rel_pos_bias() if model.rel_pos_bias is not None else None
    blocks: Any = model.blocks
    return {n: probabilities(blocks[n - 1].attn, blocks[n - 1].norm1(inputs[n - 1]), shared) for n in layers}


def probabilities(attention: Any, x_BND: Tensor, shared_bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d) + position bias), (B, A, N, N), of timm's attention on its normalised input."""
    bias = torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
    qkv = F.linear(x_BND, attention.qkv.weight, bias)
    q, k, _ = qkv.unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    logits = (q * attention.scale) @ k.transpose(-2, -1)
    if attention.relative_position_bias_table is not None:
        logits = logits + attention._get_rel_pos_bias()
    if shared_bias is not None:
        logits = logits + shared_bias
    return logits.softmax(-1)
