"""The transformer's blocks: timm's modules, run so that nothing is computed that nobody looks at.

* A residual branch that drop path drops is not computed for that image.
* Of the last block in front of a token head, only the masked positions have queries, a projection and an MLP.
* The bias of the attention is gathered once a step, in the layout and precision that fused kernels want.
* Attention runs by torch's kernels, or by Triton kernels of our own (`Attention.kernel`).
* Layer scale is multiplied into the weights in front of it and not into every token's output.
* Patches are embedded by a matrix product, not by a convolution of three channels.
* Linear layers take the fastest product (`linear.py`).

None of that changes a number by more than rounding. Shapes: B batch, N tokens ([CLS] first), K tokens that are asked
for, D width, H heads, d width of a head, R residual branches (two a block).
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

from beit_pretrain.models.linear import linear

# Not cuDNN's: without gradients torch would prefer it, and it makes a new plan for every shape. Not measured yet.
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
ALIGNED = 16  # numbers in whose multiples rows of the bias begin: without, CUDA's kernels copy it at every layer
TRITON_WIDTHS = (16, 32, 64, 128)  # of the heads that the Triton kernels take
KEYS = 8  # a CPU's keys are filled up to multiples of it: products with rows of 197 numbers are slower than of 200


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

    In training they are multiplied into W and b: their gradient comes out of that of W, and neither the layer's output
    must be kept for it nor two tensors of its size be read. fp16 could not hold such weights where gamma is 1e-5.
    """
    if gamma_D is None:
        return layer(x)
    if not torch.is_grad_enabled() or compute_dtype(x) == torch.float16:
        return gamma_D * layer(x)
    bias = None if layer.bias is None else gamma_D * layer.bias
    return linear(x, gamma_D.unsqueeze(1) * layer.weight, bias)


class Mlp(layers.Mlp):
    """timm's MLP (its parameters and their names), with the layer scale that follows it."""

    def forward(self, x: Tensor, gamma_D: Tensor | None = None) -> Tensor:
        return scaled_linear(cast(nn.Linear, self.fc2), self.act(self.fc1(x)), gamma_D)


class Attention(beit.Attention):
    """timm's attention (its parameters and their names), also for some of the tokens only."""

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
        """Outputs (B, N, D); with `token_BK`, numbers of tokens, those of these tokens (B, K, D).

        `shared_rel_pos_bias` (1, H, N, N) is added to the scores; a table of the layer's own is added by itself.
        `gamma_D`: the layer scale that follows.
        """
        bias = shared_rel_pos_bias
        if self.relative_position_bias_table is not None:
            own = pad_bias_stride(self._get_rel_pos_bias(), x_BND)
            bias = own if bias is None else bias + own
        none: Any = self.k_bias  # zeros: keys have no bias
        if token_BK is None:
            whole = None if self.q_bias is None else torch.cat((self.q_bias, none, self.v_bias))
            qkv = linear(x_BND, self.qkv.weight, whole).unflatten(-1, (3, self.num_heads, -1))
            q, k, v = qkv.unbind(2)
        else:
            parts = (len(self.qkv.weight) // 3, 2 * len(self.qkv.weight) // 3)
            of_query, of_rest = self.qkv.weight.split(parts)
            rest = None if self.q_bias is None else torch.cat((none, self.v_bias))
            q = linear(gather_tokens(x_BND, token_BK), of_query, self.q_bias).unflatten(-1, (self.num_heads, -1))
            kv = linear(x_BND, of_rest, rest).unflatten(-1, (2, self.num_heads, -1))
            k, v = kv.unbind(2)
        if bias is not None and self.kernel == "triton":
            from beit_pretrain.models.triton_attention import attention_at, packed_attention  # not on every machine

            out_BKHd = packed_attention(qkv, bias) if token_BK is None else attention_at(q, kv, bias, token_BK)
        else:
            if bias is not None and token_BK is not None:
                bias = bias_rows(bias, token_BK)
            out_BKHd = biased_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), bias).transpose(1, 2)
        return scaled_linear(self.proj, out_BKHd.flatten(2), gamma_D)


def attentions(network: nn.Module) -> list[Attention]:
    """The attention of every block in a network."""
    return [layer for layer in network.modules() if isinstance(layer, Attention)]


def biased_attention(q_BHKd: Tensor, k_BHNd: Tensor, v_BHNd: Tensor, bias: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v, (B, H, K, d); `bias` (1 or B, H, K, N)."""
    if q_BHKd.is_cuda:
        with sdpa_kernel(KERNELS):
            return F.scaled_dot_product_attention(q_BHKd, k_BHNd, v_BHNd, attn_mask=bias)
    if bias is None or not (torch.is_grad_enabled() and bias.requires_grad):
        return F.scaled_dot_product_attention(q_BHKd, k_BHNd, v_BHNd, attn_mask=bias)
    # On a CPU no fused kernel takes a bias that learns: here it is added by the product itself.
    missing = -k_BHNd.shape[2] % KEYS
    if missing:  # keys that nobody looks at; not minus infinity, of which compiled softmax makes NaN
        bias = F.pad(bias, (0, missing), value=torch.finfo(bias.dtype).min / 2)
        k_BHNd, v_BHNd = (F.pad(t, (0, 0, 0, missing)) for t in (k_BHNd, v_BHNd))
    shape = (*q_BHKd.shape[:3], k_BHNd.shape[2])
    scores = bias.expand(shape).reshape(-1, *shape[2:])
    if scores.dtype != q_BHKd.dtype or (bias.shape[0] == shape[0] and not missing):  # in place only on a copy
        scores = scores.to(q_BHKd.dtype, copy=True)
    q, k, v = (t.flatten(0, 1) for t in (q_BHKd, k_BHNd, v_BHNd))
    scores = scores.baddbmm_(q, k.transpose(1, 2), alpha=q.shape[-1] ** -0.5)
    return torch.bmm(scores.softmax(-1).to(v.dtype), v).unflatten(0, shape[:2])


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
    """Of a bias the rows of the asked tokens, (B, H, K, N), aligned as it is."""
    _, heads, tokens, _ = bias_1HNN.shape
    width = bias_1HNN.stride(2)
    rows = bias_1HNN[0].transpose(0, 1)  # (N, H, N): one look-up brings a token's rows of all heads
    if width != tokens:
        rows = F.pad(rows, (0, width - tokens))
    # An embedding: on a GPU its gradient has a kernel whose order of summation is fixed, for `deterministic=true`.
    found = F.embedding(token_BK, rows.flatten(1)).unflatten(-1, (heads, -1))
    return found.transpose(1, 2)[..., :tokens]


def gather_tokens(x_BND: Tensor, token_BK: Tensor) -> Tensor:
    """The asked tokens of each image, (B, K, D)."""
    return x_BND.gather(1, token_BK.unsqueeze(-1).expand(-1, -1, x_BND.shape[-1]))


def residual(
    x: Tensor, branch: Callable[[Tensor], Tensor], rate: float, uniform_B: Tensor | None, skip: bool = False
) -> Tensor:
    """x + branch(x), the branch dropped with probability `rate` for each image and else scaled by 1 / (1 - rate).

    `uniform_B` (B,) in [0, 1) decides; None = nothing is dropped. With `skip` the branch is computed for the images
    alone that keep it: fewer products, but shapes that change and a look at the device.
    """
    if rate == 0 or uniform_B is None:
        return x + branch(x)
    keep_B = uniform_B >= rate
    if skip and not keep_B.all():
        kept = keep_B.nonzero().flatten()
        scale = 1 / (1 - rate)
        if not len(kept):  # one image at least, or a process of several would have no gradient where others have one
            kept, scale = kept.new_zeros(1), 0.0
        # Not x[kept], whose gradient is put together ten times as slowly.
        return x.index_add(0, kept, branch(x.index_select(0, kept)).to(x.dtype), alpha=scale)
    factor_B = keep_B.to(x.dtype) / (1 - rate)
    return x + branch(x) * factor_B.view(-1, *[1] * (x.ndim - 1))


def run_block(
    block: Any, x: Tensor, bias: Tensor | None, drop_B2: Tensor | None = None, token_BK: Tensor | None = None
) -> Tensor:
    """timm's Block on (B, N, D), with the decisions about drop path (B, 2) given from outside.

    With `token_BK` its outputs at these tokens alone, (B, K, D).
    """

    def mlp_branch(x: Tensor) -> Tensor:
        return block.mlp(block.norm2(x), block.gamma_2)

    rate = getattr(block.drop_path1, "drop_prob", 0.0)
    first, second = drop_B2.unbind(1) if drop_B2 is not None else (None, None)
    skip = not (x.is_cuda or torch.compiler.is_compiling())
    if token_BK is None:
        x = residual(x, lambda x: block.attn(block.norm1(x), bias, gamma_D=block.gamma_1), rate, first, skip)
    else:
        out = block.attn(block.norm1(x), bias, token_BK, block.gamma_1)
        x = residual(gather_tokens(x, token_BK), lambda _: out, rate, first)
    return residual(x, mlp_branch, rate, second, skip)


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

    `drop_BR`: numbers in [0, 1) that decide about drop path. With `token_BK` the last one is at these tokens alone.
    """
    outputs: list[Tensor] = []
    for number, block in enumerate(blocks, start=1):
        drop_B2 = drop_BR[:, 2 * number - 2 : 2 * number] if drop_BR is not None else None
        asked = token_BK if number == len(blocks) else None
        if checkpointing and torch.is_grad_enabled():
            # A block draws nothing at random (drop path's numbers come from outside): no state to save and set back.
            x = checkpoint(run_block, block, x, bias, drop_B2, asked, use_reentrant=False, preserve_rng_state=False)
        else:
            x = run_block(block, x, bias, drop_B2, asked)
        outputs.append(x)
    return outputs
