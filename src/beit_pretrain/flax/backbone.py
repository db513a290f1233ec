"""The BEiT backbone in Flax, computing what `models/backbone.py` computes; its parameters have the same names.

Shapes: B batch, C channels, H W pixels, N patches, D width, T tokens (1 + N), K requested patches of one image. Images
are channels first, as in torch and in the Flax classes that transformers had. Masks are True where a patch is masked.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.nn import initializers
from jax.nn.initializers import Initializer
from jax.typing import ArrayLike, DTypeLike

from beit_pretrain.errors import UserError
from beit_pretrain.flax.blocks import Block, LayerNorm, RelativePositionBias
from beit_pretrain.models.backbone import complete, patch_grid

CUT_NORMAL = initializers.truncated_normal(0.02, lower=-1, upper=1)  # pre-training: cut at one sigma
NORMAL = initializers.normal(0.02)  # fine-tuning
UNIFORM = initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # torch's own of convolutions


def times(init: Initializer, factor: float) -> Callable[..., Array]:
    """An initialiser whose numbers are multiplied by a factor."""
    return lambda key, shape, dtype: init(key, shape, dtype) * factor


class PatchEmbed(nnx.Module):
    """Non-overlapping patches of an image -> embeddings."""

    def __init__(self, patch: int, channels: int, width: int, **common: Any):
        size = (patch, patch)
        self.proj = nnx.Conv(channels, width, size, strides=size, padding="VALID", **common)

    def __call__(self, image_BCHW: Array) -> Array:
        """Embeddings (B, N, D), row-major over the grid."""
        found = self.proj(image_BCHW.transpose(0, 2, 3, 1))
        batch, rows, columns, width = found.shape
        return found.reshape(batch, rows * columns, width)


def check_drop_path_rate(rate: object) -> None:
    """Raise UserError for anything but a number from 0 to below 1."""
    if not isinstance(rate, int | float) or not 0 <= rate < 1:
        raise UserError(f"drop_path_rate={rate!r} must be a number of at least 0 and below 1")


def is_real(dtype: Any) -> bool:
    """Whether it names a type of floating point numbers."""
    try:
        return dtype is not None and bool(jnp.issubdtype(dtype, jnp.floating))
    except TypeError:
        return False


class Backbone(nnx.Module):
    """What the Flax networks share: embeddings, blocks, and a final LayerNorm over all tokens or over their mean.

    Args:
        pool: "avg": a LayerNorm over the mean of the patches; "token": one over all tokens.
        mask_token: whether there is one.
        finetuning: initial weights of fine-tuning in place of those of pre-training (models/backbone.py has both).
        dtype: of products; parameters are float32 in any case.
        rngs: random numbers of the initial weights, and, with drop_path_rate above 0, of drop path.
        architecture: see `models.backbone.DEFAULTS`.

    Attributes: `config`, the arguments that build the network again; `about`, metadata (mean, std, classes, ...);
    `grid`, rows and columns of patches. `model.train()` turns drop path on, `model.eval()` off, which is how it begins.
    """

    kind = "backbone"  # what a checkpoint of the network is called

    def __init__(
        self, pool: str, mask_token: bool, finetuning: bool, *, dtype: DTypeLike, rngs: nnx.Rngs, **architecture: Any
    ):
        config = complete(architecture)
        width, heads = config["embed_dim"], config["num_heads"]
        if width % heads:
            raise UserError(f"embed_dim={width} is not divisible by num_heads={heads}")
        if pool not in ("avg", "token"):
            raise UserError(f"pool={pool} is not one of avg, token")
        check_drop_path_rate(config["drop_path_rate"])
        if not is_real(dtype):
            raise UserError(f"dtype={dtype} is no type of real numbers, such as jax.numpy.bfloat16")
        # Static parts of a network must be hashable. `_said`: the values of its file's config.json, for the next one.
        self._config, self._about, self._said = json.dumps(config), "{}", "{}"
        self.grid = patch_grid(config["image_size"], config["patch_size"])
        self.pool, self.dtype = pool, jnp.dtype(dtype)
        common: dict[str, Any] = {"dtype": self.dtype, "rngs": rngs}
        init, patch, channels = NORMAL if finetuning else CUT_NORMAL, config["patch_size"], config["in_chans"]
        bound = (patch * patch * channels) ** -0.5 if finetuning else 0.0
        self.patch_embed = PatchEmbed(
            patch,
            channels,
            width,
            kernel_init=UNIFORM if finetuning else init,
            bias_init=lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound),
            **common,
        )
        self.cls_token = nnx.Param(init(rngs.params(), (1, 1, width)))
        self.mask_token = nnx.Param(init(rngs.params(), (1, 1, width))) if mask_token else None
        positions = (1, 1 + self.grid[0] * self.grid[1], width)
        self.pos_embed = nnx.Param(init(rngs.params(), positions)) if config["abs_pos_emb"] else None
        self.rel_pos_bias = RelativePositionBias(self.grid, heads) if config["rel_pos_bias"] == "shared" else None
        rates = np.linspace(0, config["drop_path_rate"], config["depth"]).tolist()
        self.blocks = nnx.List(
            Block(
                width,
                heads,
                int(width * config["mlp_ratio"]),
                self.grid if config["rel_pos_bias"] == "per_layer" else None,
                drop_path=rate,
                init_values=config["init_values"],
                norm_eps=config["norm_eps"],
                init=init,
                out_init=times(init, 1 / math.sqrt(2 * layer)),  # deeper residual branches start smaller
                **common,
            )
            for layer, rate in enumerate(rates, start=1)
        )
        norm = LayerNorm(width, epsilon=config["norm_eps"], **common)
        self.norm: Any = norm if pool == "token" else None
        self.fc_norm: Any = norm if pool == "avg" else None
        self.rngs = nnx.data(None)
        self.draw_from(rngs)

    @property
    def config(self) -> dict[str, Any]:
        """The arguments that build the network again."""
        return json.loads(self._config)

    @property
    def about(self) -> dict[str, Any]:
        """Metadata of a checkpoint: mean, std, classes, ..."""
        return json.loads(self._about)

    @about.setter
    def about(self, values: dict[str, Any]) -> None:
        self._about = json.dumps(values)

    def add_config(self, **more: Any) -> None:
        self._config = json.dumps({**self.config, **more})

    def draw_from(self, rngs: nnx.Rngs | None) -> None:
        """Take drop path's random numbers from the stream `dropout` of `rngs`."""
        if rngs is not None and self.config["drop_path_rate"]:
            self.rngs = rngs.dropout.fork()

    def embed(self, pixel_values: ArrayLike, bool_masked_pos: ArrayLike | None = None) -> Array:
        """Embeddings (B, T, D) of images (B, C, H, W), [CLS] first. A masked patch's embedding IS the mask token.

        Raises ValueError for images or masks (B, N) of another shape, and for images of whole numbers.
        """
        config = self.config
        image_BCHW = jnp.asarray(pixel_values)
        if not jnp.issubdtype(image_BCHW.dtype, jnp.floating):
            raise ValueError(f"pixel_values must be normalised images, not numbers of {image_BCHW.dtype}")
        sides = tuple(side * config["patch_size"] for side in self.grid)
        if image_BCHW.ndim != 4 or image_BCHW.shape[1:] != (config["in_chans"], *sides):
            shape = ", ".join(map(str, ("B", config["in_chans"], *sides)))
            raise ValueError(f"the network takes pixel_values of shape ({shape}), got {image_BCHW.shape}")
        x_BND = self.patch_embed(image_BCHW.astype(jnp.float32)).astype(jnp.float32)
        if bool_masked_pos is not None:
            mask_BN = jnp.asarray(bool_masked_pos).astype(bool)
            if self.mask_token is None:
                raise ValueError("the network has no mask token: bool_masked_pos cannot be used")
            if mask_BN.shape != x_BND.shape[:2]:
                raise ValueError(f"bool_masked_pos must be of shape {x_BND.shape[:2]}, got {mask_BN.shape}")
            x_BND = jnp.where(mask_BN[..., None], self.mask_token[...], x_BND)
        cls_B1D = jnp.broadcast_to(self.cls_token[...], (len(x_BND), 1, x_BND.shape[-1]))
        x_BTD = jnp.concatenate([cls_B1D, x_BND], axis=1)
        return x_BTD if self.pos_embed is None else x_BTD + self.pos_embed[...]

    def hidden_states(
        self,
        pixel_values: ArrayLike,
        bool_masked_pos: ArrayLike | None = None,
        position_BK: Array | None = None,
        attentions: bool = False,
        train: bool | None = None,
        dropout_rng: Array | None = None,
    ) -> tuple[list[Array], tuple[Array, ...] | None]:
        """(embeddings and raw outputs (B, T, D) of every block, attentions (B, H, T, T) of every block if asked for).

        With `position_BK`, numbers of patches, the last output is of these alone, (B, K, D).
        """
        x = self.embed(pixel_values, bool_masked_pos)
        bias = None if self.rel_pos_bias is None else self.rel_pos_bias()
        drop = self._drop(train, dropout_rng)
        states, found = [x], list[Any]()
        for number, block in enumerate(self.blocks, start=1):
            last = number == len(self.blocks)
            token_BK = position_BK + 1 if position_BK is not None and last else None  # behind [CLS]
            x, weights = block(x, bias, token_BK, weights=attentions, **drop)
            states.append(x)
            found.append(weights)
        return states, tuple(found) if attentions else None

    def _drop(self, train: bool | None, dropout_rng: Array | None) -> dict[str, Any]:
        """Arguments of `nnx.Dropout`. Raises ValueError where drop path has no random numbers."""
        off = self.blocks[0].drop_path.deterministic if train is None else not train
        rngs = self.rngs if dropout_rng is None else nnx.Rngs(dropout_rng)
        if not off and self.config["drop_path_rate"] and rngs is None:
            raise ValueError("drop path needs random numbers: dropout_rng=jax.random.key(0), or rngs= of the network")
        return {"deterministic": off, "rngs": rngs}
