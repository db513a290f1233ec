"""The BEiT backbone: timm's `Beit`, and what pre-training adds to it (BEiT, sections 2.1, 2.4 and 2.5).

Shapes: B batch, C channels, H W pixels, N patches, D width, V vocabulary, K masked positions of one image (padded),
M masked patches of the batch. Masks are True where a patch is masked, to be predicted.

State-dict names are timm's and the authors': `blocks.N.attn.qkv.weight`, `mask_token`, `lm_head.weight`, ...
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypedDict, Unpack, cast

import torch
from timm.layers import LayerNorm
from timm.models.beit import Beit
from torch import Tensor, nn

from beit_pretrain.errors import UserError
from beit_pretrain.models.blocks import Attention, Mlp, PatchEmbed, block_outputs
from beit_pretrain.models.linear import Linear, use_linear

# Named sizes: width, depth, heads and the initial layer scale of RECIPE section 3 (tiny and small as in DeiT).
SIZES: dict[str, dict] = {
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3, "init_values": 0.1},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6, "init_values": 0.1},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12, "init_values": 0.1},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16, "init_values": 1e-5},
}


def patch_grid(image_size: int | Sequence[int], patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches of an image (its side, or height and width, in pixels).

    Raises UserError if the image does not divide into patches.
    """
    if image_size is None:
        raise UserError("image_size is null; a number of pixels is needed here")
    sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(sides) != 2 or min(*sides, patch_size) < 1:
        raise UserError(f"image_size={image_size} and patch_size={patch_size} must be at least 1")
    for side in sides:
        if side % patch_size:
            raise UserError(
                f"image_size={image_size} is not divisible by patch_size={patch_size}; "
                f"{(side // patch_size + 1) * patch_size} would be"
            )
    return sides[0] // patch_size, sides[1] // patch_size


class Architecture(TypedDict, total=False):
    """Arguments that every network here takes.

    image_size: side of square images, or (height, width), pixels. patch_size: side of a patch, pixels.
    embed_dim, depth, num_heads, init_values (initial layer scale; None = no layer scale): see `SIZES`.
    drop_path_rate: stochastic depth of the last block; linear from 0 over the depth.
    rel_pos_bias: "shared", one relative position bias table for all blocks (pre-training, RECIPE section 3);
    "per_layer", one for each (fine-tuning); "none".
    abs_pos_emb: learned absolute positions (the released ImageNet-1k 800-epoch model).
    norm_eps: of every LayerNorm (Hugging Face's files say 1e-12).
    """

    image_size: int | Sequence[int]
    patch_size: int
    in_chans: int
    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float
    init_values: float | None
    drop_path_rate: float
    rel_pos_bias: str
    abs_pos_emb: bool
    norm_eps: float


DEFAULTS: Architecture = {
    "image_size": 224,
    "patch_size": 16,
    "in_chans": 3,
    "embed_dim": 768,
    "depth": 12,
    "num_heads": 12,
    "mlp_ratio": 4.0,
    "init_values": 0.1,
    "drop_path_rate": 0.1,
    "rel_pos_bias": "shared",
    "abs_pos_emb": False,
    "norm_eps": 1e-6,
}
BIASES = ("shared", "per_layer", "none")


class Backbone(Beit):
    """timm's Beit with the options of every BEiT checkpoint; `config` holds the arguments that build it again."""

    def __init__(self, pool: str, num_classes: int, **architecture: Unpack[Architecture]):
        if unknown := sorted(architecture.keys() - DEFAULTS.keys()):
            raise TypeError(f"unknown arguments of the network: {', '.join(unknown)}")
        config: dict[str, Any] = {**DEFAULTS, **architecture}
        self.grid = patch_grid(config["image_size"], config["patch_size"])
        if config["rel_pos_bias"] not in BIASES:
            raise UserError(f"model.rel_pos_bias={config['rel_pos_bias']} is not one of {', '.join(BIASES)}")
        size = config["image_size"]
        config["image_size"] = size if isinstance(size, int) else size[0] if size[0] == size[1] else list(size)
        own = ("image_size", "rel_pos_bias", "abs_pos_emb", "norm_eps")
        super().__init__(
            img_size=size if isinstance(size, int) else (size[0], size[1]),
            num_classes=num_classes,
            global_pool=pool,  # "" keeps the final LayerNorm over all tokens
            use_rel_pos_bias=config["rel_pos_bias"] == "per_layer",
            use_shared_rel_pos_bias=config["rel_pos_bias"] == "shared",
            use_abs_pos_emb=config["abs_pos_emb"],
            norm_layer=cast(type[nn.Module], partial(LayerNorm, eps=config["norm_eps"])),
            **{name: value for name, value in config.items() if name not in own},
        )
        block: Any
        for block in self.blocks:
            block.attn.__class__, block.mlp.__class__ = Attention, Mlp  # timm's parameters, our forward
        self.patch_embed.__class__ = PatchEmbed
        use_linear(self)
        self.config = config
        # Plain facts that a checkpoint or a file of others says beside its tensors: mean, std, classes, ...
        self.about: dict[str, Any] = {}

    def hidden_states(
        self, image_BCHW: Tensor, mask_BN: Tensor | None = None, drop_BR: Tensor | None = None
    ) -> list[Tensor]:
        """Raw outputs (B, 1 + N, D) of every block, [CLS] first, without the final LayerNorm.

        `drop_BR`, numbers in [0, 1) for each image and residual branch, decides about drop path (`drop_path.uniforms`);
        without it nothing is dropped.
        """
        return block_outputs(self, embed(self, image_BCHW, mask_BN), drop_BR)

    @property
    def branches(self) -> int:
        """R, the number of residual branches."""
        return 2 * len(self.blocks)


class MaskedImageModel(Backbone):
    """Beit with a mask token and a token head: predicts the visual token of every masked patch.

    `vocab_size` is V, the size of the tokenizer's codebook; the other arguments are those of `Architecture`.
    """

    def __init__(self, vocab_size: int = 8192, **architecture: Unpack[Architecture]):
        super().__init__("", 0, **architecture)
        self.config["vocab_size"] = self.vocab_size = vocab_size
        self.mask_token = nn.Parameter(torch.zeros(1, 1, self.embed_dim))
        self.lm_head = Linear(self.embed_dim, vocab_size)
        init_for_pretraining(self)

    def forward(self, image_BCHW: Tensor, mask_BN: Tensor) -> Tensor:  # type: ignore[override]
        """Logits (M, V) of the masked patches, row-major over the batch (as in `logits = model(image)[mask]`)."""
        return self.lm_head(self.encode(image_BCHW, mask_BN)[:, 1:][mask_BN])

    def forward_at(
        self, image_BCHW: Tensor, mask_BN: Tensor, position_BK: Tensor, drop_BR: Tensor | None = None
    ) -> Tensor:
        """Logits (B, K, V) at the given patch numbers: static shapes and no wait for the device, unlike `forward`.

        `position_BK` lists the masked patches of each image, padded by any valid number (the caller ignores those).
        """
        token_BK = position_BK + 1  # behind [CLS]
        hidden = block_outputs(self, embed(self, image_BCHW, mask_BN), drop_BR, token_BK=token_BK)[-1]
        return self.lm_head(self.norm(hidden))

    def encode(self, image_BCHW: Tensor, mask_BN: Tensor | None = None, drop_BR: Tensor | None = None) -> Tensor:
        """Features (B, 1 + N, D) after the final LayerNorm, [CLS] first; equal to timm's without a mask."""
        return self.norm(self.hidden_states(image_BCHW, mask_BN, drop_BR)[-1])


class Classifier(Backbone):
    """Beit for classification, by default with a bias table for every block (RECIPE section 5).

    Args:
        num_classes: number of classes.
        pool: "avg", the mean of the patch tokens -> a new LayerNorm -> linear head; "token", the final LayerNorm of
            pre-training -> [CLS] -> linear head.
        architecture: see `Architecture`.
    """

    def __init__(self, num_classes: int, pool: str = "avg", **architecture: Unpack[Architecture]):
        if pool not in ("avg", "token"):
            raise UserError(f"model.pool={pool} is not one of avg, token")
        architecture.setdefault("rel_pos_bias", "per_layer")
        super().__init__(pool, num_classes, **architecture)
        self.config |= {"num_classes": num_classes, "pool": pool}
        init_for_finetuning(self)

    def forward(self, image_BCHW: Tensor, drop_BR: Tensor | None = None) -> Tensor:
        """Logits (B, classes)."""
        return self.forward_head(self.norm(self.hidden_states(image_BCHW, drop_BR=drop_BR)[-1]))


class Features(NamedTuple):
    """Raw outputs of every block, the first one first."""

    cls: list[Tensor]  # (B, D) each
    patches: list[Tensor]  # (B, N, D) each, row-major over the grid


class FeatureExtractor(Backbone):
    """Beit without a head: features of every layer, without the final LayerNorm (RECIPE section 6)."""

    def __init__(self, **architecture: Unpack[Architecture]):
        super().__init__("", 0, **architecture)
        self.norm = nn.Identity()

    def forward(self, image_BCHW: Tensor) -> Features:  # type: ignore[override]
        """[CLS] and patch features of every layer, for normalised images."""
        states = self.hidden_states(image_BCHW)
        return Features([x[:, 0] for x in states], [x[:, 1:] for x in states])


def embed(model: Any, image_BCHW: Tensor, mask_BN: Tensor | None = None) -> Tensor:
    """Patch embeddings with [CLS] in front, (B, 1 + N, D). A masked patch's embedding IS the mask token.

    The replacement comes before any position is added, and through `where`: no pixel of a masked patch is left.
    """
    # In the parameters' precision, also under autocast: what residual branches are added to is never rounded to bf16.
    x_BND = model.patch_embed(image_BCHW.to(model.cls_token.dtype)).to(model.cls_token.dtype)
    if mask_BN is not None:
        x_BND = torch.where(mask_BN.unsqueeze(-1), model.mask_token, x_BND)
    x_BND = torch.cat([model.cls_token.expand(x_BND.shape[0], -1, -1), x_BND], dim=1)
    if model.pos_embed is not None:
        x_BND = x_BND + model.pos_embed
    return model.pos_drop(x_BND)


def init_for_pretraining(model: MaskedImageModel) -> None:
    """The release's initial weights of pre-training: truncated normal of std .02 cut at +-.02, that is at one sigma."""
    _init(model, _draw_cut, patch_conv=True)
    _draw_cut(model.mask_token)
    init_token_head(model.lm_head)


def init_for_finetuning(model: Backbone) -> None:
    """The release's initial weights of fine-tuning: std .02 (cut at an absolute +-2), head x .001, patch conv as is."""
    _init(model, _draw, patch_conv=False)
    if isinstance(model.head, nn.Linear):
        init_class_head(model.head)


def init_token_head(head: nn.Linear) -> None:
    """A new head over the tokens of a codebook."""
    _draw_cut(head.weight)
    nn.init.zeros_(head.bias)


@torch.no_grad()
def init_class_head(head: nn.Linear) -> None:
    """A new head over classes: nearly nothing at first."""
    _draw(head.weight)
    head.weight.mul_(0.001)
    nn.init.zeros_(head.bias)


def _draw_cut(weight: Tensor) -> None:
    nn.init.trunc_normal_(weight, std=0.02, a=-0.02, b=0.02)


def _draw(weight: Tensor) -> None:
    nn.init.trunc_normal_(weight, std=0.02, a=-2.0, b=2.0)


@torch.no_grad()
def _init(model: Beit, draw: Callable[[Tensor], None], patch_conv: bool) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and patch_conv):
            draw(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    draw(model.cls_token)
    if model.pos_embed is not None:
        draw(model.pos_embed)
    block: Any
    for layer, block in enumerate(model.blocks, start=1):  # residual branches start smaller the deeper they sit
        block.attn.proj.weight.div_(math.sqrt(2 * layer))
        block.mlp.fc2.weight.div_(math.sqrt(2 * layer))
