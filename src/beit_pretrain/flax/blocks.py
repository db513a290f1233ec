"""Transformer blocks in Flax, computing what `models/blocks.py` computes.

Parameters are float32; products are computed in `dtype`, LayerNorm's statistics, softmax and the residual stream in
float32. Shapes: B batch, N tokens ([CLS] first), K requested tokens, D width, H heads, d width of a head, R rows of a
position table.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from timm.models.beit import gen_relative_position_index

Grid = tuple[int, int]
Init = Callable[..., Array]  # an initialiser
# One pass over E[x^2] - E[x]^2, nnx's default, loses digits where the mean is large.
LayerNorm = partial(nnx.LayerNorm, use_fast_variance=False)


@lru_cache(maxsize=8)
def position_index(grid: Grid) -> np.ndarray:
    """Rows (N, N) of the position table for every pair of tokens; timm's order."""
    return gen_relative_position_index(grid).numpy().astype(np.int32)


def position_table(grid: Grid, heads: int) -> nnx.Param:
    """An empty table (R, H), one row an offset between two patches and three of [CLS]."""
    return nnx.Param(jnp.zeros(((2 * grid[0] - 1) * (2 * grid[1] - 1) + 3, heads)))


def position_bias(table_RH: Array, grid: Grid) -> Array:
    """The bias (H, N, N) of a position table."""
    return table_RH[position_index(grid)].transpose(2, 0, 1)


def at_tokens(x_BND: Array, token_BK: Array) -> Array:
    """The requested tokens of each image, (B, K, D)."""
    return jnp.take_along_axis(x_BND, token_BK[..., None], axis=1)


class RelativePositionBias(nnx.Module):
    """The bias table that all blocks share."""

    def __init__(self, grid: Grid, heads: int):
        self.grid = grid
        self.relative_position_bias_table = position_table(grid, heads)

    def __call__(self) -> Array:
        return position_bias(self.relative_position_bias_table[...], self.grid)


class Attention(nnx.Module):
    """Self-attention with an additive bias; k has no bias. `grid`: of the layer's own bias table, if it has one."""

    def __init__(self, width: int, heads: int, grid: Grid | None, *, init: Init, out_init: Init, **common: Any):
        self.heads, self.grid, self.dtype = heads, grid, common["dtype"]
        self.qkv = nnx.Linear(width, 3 * width, use_bias=False, kernel_init=init, **common)
        self.q_bias, self.v_bias = nnx.Param(jnp.zeros(width)), nnx.Param(jnp.zeros(width))
        self.relative_position_bias_table = None if grid is None else position_table(grid, heads)
        self.proj = nnx.Linear(width, width, kernel_init=out_init, **common)

    def __call__(
        self, x_BND: Array, bias_HNN: Array | None = None, token_BK: Array | None = None, weights: bool = False
    ) -> tuple[Array, Array | None]:
        """(outputs (B, N or K, D), attention (B, H, N or K, N) if `weights` is asked for).

        `token_BK`: the tokens whose outputs are computed; None = all.
        """
        if self.relative_position_bias_table is not None and self.grid is not None:
            own = position_bias(self.relative_position_bias_table[...], self.grid)
            bias_HNN = own if bias_HNN is None else bias_HNN + own
        bias_3D = jnp.concatenate([self.q_bias[...], jnp.zeros_like(self.q_bias[...]), self.v_bias[...]])
        qkv_BN3D = self.qkv(x_BND) + bias_3D.astype(self.dtype)
        bias_BHKN = None if bias_HNN is None else bias_HNN[None].astype(self.dtype)
        q, k, v = jnp.split(qkv_BN3D, 3, axis=-1)
        if token_BK is not None:
            q = at_tokens(q, token_BK)
            bias_BHKN = None if bias_HNN is None else bias_HNN.astype(self.dtype)[:, token_BK].swapaxes(0, 1)
        q, k, v = (part.reshape(*part.shape[:2], self.heads, x_BND.shape[-1] // self.heads) for part in (q, k, v))
        if weights:
            out_BKHd, weights_BHKN = attention_with_weights(q, k, v, bias_BHKN)
        else:
            out_BKHd, weights_BHKN = jax.nn.dot_product_attention(q, k, v, bias_BHKN), None
        return self.proj(out_BKHd.reshape(*out_BKHd.shape[:2], x_BND.shape[-1])), weights_BHKN


def attention_with_weights(q_BKHd: Array, k_BNHd: Array, v_BNHd: Array, bias_BHKN: Array | None) -> tuple[Array, Array]:
    """What `jax.nn.dot_product_attention` computes, (B, K, H, d), and its weights (B, H, K, N)."""
    scores = jnp.einsum("bkhd,bnhd->bhkn", q_BKHd, k_BNHd, preferred_element_type=jnp.float32)
    scores = scores * q_BKHd.shape[-1] ** -0.5
    weights = jax.nn.softmax(scores if bias_BHKN is None else scores + bias_BHKN)
    return jnp.einsum("bhkn,bnhd->bkhd", weights.astype(v_BNHd.dtype), v_BNHd), weights


class Mlp(nnx.Module):
    """Two linear layers with the exact GELU between them."""

    def __init__(self, width: int, hidden: int, *, init: Init, out_init: Init, **common: Any):
        self.fc1 = nnx.Linear(width, hidden, kernel_init=init, **common)
        self.fc2 = nnx.Linear(hidden, width, kernel_init=out_init, **common)

    def __call__(self, x: Array) -> Array:
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))


class Block(nnx.Module):
    """Pre-norm attention and MLP, each with layer scale and drop path.

    Args:
        drop_path: probability of dropping a residual branch of an image, in training.
        init_values: initial layer scale; None = none.
        norm_eps: of the LayerNorms.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        grid: Grid | None,
        *,
        drop_path: float,
        init_values: float | None,
        norm_eps: float,
        **rest: Any,
    ):
        common = {"dtype": rest["dtype"], "rngs": rest["rngs"]}
        self.norm1 = LayerNorm(width, epsilon=norm_eps, **common)
        self.attn = Attention(width, heads, grid, **rest)
        self.norm2 = LayerNorm(width, epsilon=norm_eps, **common)
        self.mlp = Mlp(width, hidden, **rest)
        self.gamma_1, self.gamma_2 = (
            None if init_values is None else nnx.Param(jnp.full(width, init_values)) for _ in range(2)
        )
        self.drop_path = nnx.Dropout(drop_path, broadcast_dims=(1, 2), deterministic=True)

    def __call__(
        self,
        x_BND: Array,
        bias_HNN: Array | None,
        token_BK: Array | None = None,
        *,
        weights: bool = False,
        **drop: Any,
    ) -> tuple[Array, Array | None]:
        """(outputs (B, N or K, D), attention or None) as of `Attention`; `drop` goes to `nnx.Dropout`."""
        out, found = self.attn(self.norm1(x_BND), bias_HNN, token_BK, weights)
        x = x_BND if token_BK is None else at_tokens(x_BND, token_BK)
        x = x + self.drop_path(scaled(out, self.gamma_1), **drop)
        return x + self.drop_path(scaled(self.mlp(self.norm2(x)), self.gamma_2), **drop), found


def scaled(x: Array, gamma_D: nnx.Param | None) -> Array:
    """Layer scale, in float32."""
    return x if gamma_D is None else gamma_D[...] * x
