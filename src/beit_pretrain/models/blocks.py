"""Transformer blocks: timm's modules with a faster forward pass; results are equal up to rounding.

* The last block before a token head computes queries, projection and MLP only at the masked positions.
* The attention bias is gathered once per step, in the layout and precision that fused kernels need.
* Attention uses torch's kernels or our Triton kernels (`Attention.kernel`).
* Layer scale is multiplied into the weights before it, not into every token's output.
* Patches are embedded by a matrix product, not by a convolution of three channels.
* Code only for CPUs is in `cpu_kernels.py`, which has a switch.

Shapes: B batch, N tokens ([CLS] first), K requested tokens, D width, H heads, d width of a head, R residual
branches (two a block).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm import layers
from timm.models import beit
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from beit_pretrain.models import cpu_kernels
from beit_pretrain.models.cpu_kernels import Linear, linear

# Without cuDNN's: torch would prefer it without gradients, and it makes a new plan for every shape. Not measured yet.
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
ALIGNED = 16  # rows of the bias begin at multiples of it: otherwise CUDA's kernels copy the bias in every layer


class PatchEmbed(layers.PatchEmbed):
    """timm's patch embedding (its parameters and their names) as a linear layer on unfolded patches."""

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Embeddings (B, N, D), row-major over the grid. Raises ValueError for images of another size."""
        height, width = self.patch_size
        if tuple(image_BCHW.shape[-2:]) != tuple(self.img_size):
            raise ValueError(f"the network is for images of {self.img_size}, got {tuple(image_BCHW.shape[-2:])}")
        # (B, C, rows, height, columns, width), then a patch's numbers side by side in the order of the kernel's.
        patches = image_BCHW.unflatten(3, (-1, width)).unflatten(2, (-1, height)).permute(0, 2, 4, 1, 3, 5)
        return linear(patches.flatten(3).flatten(1, 2), self.proj.weight.flatten(1), self.proj.bias)


def scaled_linear(layer: nn.Linear, x: Tensor, gamma_D: Tensor | None) -> Tensor:
    """gamma * (x W^T + b), layer scale's factors (D,) after a linear layer.

    In training gamma is multiplied into W and b: its gradient then follows from that of W, so the layer's output is
    neither kept nor read for it. Not in fp16, which could not hold such weights where gamma is 1e-5.
    """
    if gamma_D is None:
        return layer(x)
    if not torch.is_grad_enabled() or compute_dtype(x) == torch.float16:
        return gamma_D * layer(x)
    return linear(x, gamma_D.unsqueeze(1) * layer.weight, gamma_D * layer.bias)


class Mlp(layers.Mlp):
    """timm's MLP (its parameters and their names), with the layer scale that follows it."""

    def forward(self, x: Tensor, gamma_D: Tensor | None = None) -> Tensor:
        return scaled_linear(cast(nn.Linear, self.fc2), self.act(self.fc1(x)), gamma_D)


class Attention(beit.Attention):
    """timm's attention (its parameters and their names), optionally for only some of the tokens."""

    kernel = "sdpa"  # or "triton", which is for attention with a bias: `attention=` of `fit`

    @property
    def width(self) -> int:
        """d, of a head."""
        return self.qkv.weight.shape[0] // (3 * self.num_heads)

    def forward(
        self,
        x_BND: Tensor,
        shared_rel_pos_bias: Tensor | None = None,
        token_BK: Tensor | None = None,
        gamma_D: Tensor | None = None,
    ) -> Tensor:
        """Outputs (B, N, D), or with token numbers `token_BK` those of these tokens, (B, K, D).

        `shared_rel_pos_bias` (1, H, N, N) is added to the scores, and so is the bias of the layer's own table.
        `gamma_D`: the layer scale that follows.
        """
        bias = shared_rel_pos_bias
        if self.relative_position_bias_table is not None:
            own = pad_bias_stride(self._get_rel_pos_bias(), x_BND)
            bias = own if bias is None else bias + own
        heads, bias_of_k = self.num_heads, cast(Tensor, self.k_bias)  # zeros
        if token_BK is None:
            bias_3D = torch.cat((self.q_bias, bias_of_k, self.v_bias))
            qkv = linear(x_BND, self.qkv.weight, bias_3D).unflatten(-1, (3, heads, -1))
            q, k, v = qkv.unbind(2)
        else:
            of_query, of_rest = self.qkv.weight.split((x_BND.shape[-1], 2 * x_BND.shape[-1]))
            q = linear(gather_tokens(x_BND, token_BK), of_query, self.q_bias).unflatten(-1, (heads, -1))
            kv = linear(x_BND, of_rest, torch.cat((bias_of_k, self.v_bias))).unflatten(-1, (2, heads, -1))
            k, v = kv.unbind(2)
        if bias is not None and self.kernel == "triton":
            from beit_pretrain.models.triton_attention import attention_at, packed_attention  # needs Triton

            out_BKHd = packed_attention(qkv, bias) if token_BK is None else attention_at(q, kv, bias, token_BK)
        else:
            if bias is not None and token_BK is not None:
                bias = bias_rows(bias, token_BK)
            out_BKHd = biased_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), bias).transpose(1, 2)
        return scaled_linear(self.proj, out_BKHd.flatten(2), gamma_D)


def use_our_forward(network: nn.Module) -> None:
    """Turn the layers of timm and torch in a network into ours, in place; parameters and their names stay."""
    ours = {beit.Attention: Attention, layers.Mlp: Mlp, layers.PatchEmbed: PatchEmbed, nn.Linear: Linear}
    for layer in network.modules():
        layer.__class__ = ours.get(type(layer), type(layer))


def attentions(network: nn.Module) -> list[Attention]:
    """The attention of every block in a network."""
    return [layer for layer in network.modules() if isinstance(layer, Attention)]


def biased_attention(q_BHKd: Tensor, k_BHNd: Tensor, v_BHNd: Tensor, bias: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v, (B, H, K, d); `bias` (1 or B, H, K, N)."""
    if q_BHKd.is_cuda:
        with sdpa_kernel(KERNELS):
            return F.scaled_dot_product_attention(q_BHKd, k_BHNd, v_BHNd, attn_mask=bias)
    if bias is not None and bias.requires_grad and torch.is_grad_enabled() and cpu_kernels.active(q_BHKd.device):
        return cpu_kernels.attention(q_BHKd, k_BHNd, v_BHNd, bias)
    return F.scaled_dot_product_attention(q_BHKd, k_BHNd, v_BHNd, attn_mask=bias)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The precision in which products of `x` will run."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def pad_bias_stride(bias_1HNN: Tensor, like: Tensor) -> Tensor:
    """The same bias in the precision in which attention on `like` will run, its rows beginning at `ALIGNED` numbers."""
    bias_1HNN = bias_1HNN.to(compute_dtype(like))
    if not like.is_cuda:
        return bias_1HNN
    tokens = bias_1HNN.shape[-1]
    return F.pad(bias_1HNN, (0, -tokens % ALIGNED))[..., :tokens]


def bias_rows(bias_1HNN: Tensor, token_BK: Tensor) -> Tensor:
    """The rows of the requested tokens in a bias, (B, H, K, N), with the bias's alignment."""
    _, heads, tokens, _ = bias_1HNN.shape
    width = bias_1HNN.stride(2)
    rows = bias_1HNN[0].transpose(0, 1)  # (N, H, N): one look-up brings a token's rows of all heads
    if width != tokens:
        rows = F.pad(rows, (0, width - tokens))
    # An embedding: on a GPU its gradient has a kernel whose order of summation is fixed, for `deterministic=true`.
    found = F.embedding(token_BK, rows.flatten(1)).unflatten(-1, (heads, -1))
    return found.transpose(1, 2)[..., :tokens]


def gather_tokens(x_BND: Tensor, token_BK: Tensor) -> Tensor:
    """The requested tokens of each image, (B, K, D)."""
    return x_BND.gather(1, token_BK.unsqueeze(-1).expand(-1, -1, x_BND.shape[-1]))


def residual(
    x: Tensor, branch: Callable[[Tensor], Tensor], rate: float, uniform_B: Tensor | None, skip: bool = False
) -> Tensor:
    """x + branch(x), the branch dropped with probability `rate` for each image and else scaled by 1 / (1 - rate).

    `uniform_B` (B,) in [0, 1) decides; None = nothing is dropped. With `skip` the branch is computed only for the
    images that keep it.
    """
    if rate == 0 or uniform_B is None:
        return x + branch(x)
    keep_B = uniform_B >= rate
    if skip and not keep_B.all():
        return cpu_kernels.residual_of_kept(x, branch, keep_B, 1 / (1 - rate))
    factor_B = keep_B.to(x.dtype) / (1 - rate)
    return x + branch(x) * factor_B.view(-1, *[1] * (x.ndim - 1))


def run_block(
    block: Any, x: Tensor, bias: Tensor | None, drop_B2: Tensor | None = None, token_BK: Tensor | None = None
) -> Tensor:
    """timm's Block on (B, N, D); drop path's random numbers (B, 2) are an argument.

    With `token_BK`, only the outputs at these tokens, (B, K, D).
    """
    rate = getattr(block.drop_path1, "drop_prob", 0.0)
    first, second = drop_B2.unbind(1) if drop_B2 is not None else (None, None)
    skip = cpu_kernels.active(x.device) and not torch.compiler.is_compiling()
    if token_BK is None:
        x = residual(x, lambda x: block.attn(block.norm1(x), bias, gamma_D=block.gamma_1), rate, first, skip)
    else:
        out = block.attn(block.norm1(x), bias, token_BK, block.gamma_1)
        x = residual(gather_tokens(x, token_BK), lambda _: out, rate, first)
    return residual(x, lambda x: block.mlp(block.norm2(x), block.gamma_2), rate, second, skip)


def block_outputs(
    model: Any,
    x: Tensor,
    drop_BR: Tensor | None = None,
    blocks: int | None = None,
    token_BK: Tensor | None = None,
) -> list[Tensor]:
    """Outputs of every block of a Beit (or of the first `blocks`) on embeddings `x` (B, N, D); see `run_blocks`."""
    bias = pad_bias_stride(model.rel_pos_bias()[None], x) if model.rel_pos_bias is not None else None
    return run_blocks(model.blocks[:blocks], x, bias, drop_BR, token_BK, model.grad_checkpointing)


def run_blocks(
    blocks: Any,
    x: Tensor,
    bias: Tensor | None = None,
    drop_BR: Tensor | None = None,
    token_BK: Tensor | None = None,
    checkpointing: bool = False,
) -> list[Tensor]:
    """Outputs of every block of a ModuleList on `x` (B, N, D).

    `drop_BR`: numbers in [0, 1) that decide about drop path. With `token_BK` the last output has only these tokens.
    """
    outputs: list[Tensor] = []
    for number, block in enumerate(blocks, start=1):
        drop_B2 = drop_BR[:, 2 * number - 2 : 2 * number] if drop_BR is not None else None
        asked = token_BK if number == len(blocks) else None
        if checkpointing and torch.is_grad_enabled():
            # Blocks draw no random numbers (drop path's are arguments), so no generator state needs saving.
            x = checkpoint(run_block, block, x, bias, drop_B2, asked, use_reentrant=False, preserve_rng_state=False)
        else:
            x = run_block(block, x, bias, drop_B2, asked)
        outputs.append(x)
    return outputs
