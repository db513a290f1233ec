"""The BEiT backbone: timm's `Beit` and what pre-training adds to it (BEiT, sections 2.1, 2.4 and 2.5).

Shapes: B batch, C channels, H W pixels, N patches, D width, R residual branches, V vocabulary, K masked positions of
one image (padded), M masked patches of the batch. Masks are True where a patch is masked and has to be predicted.

State-dict names are timm's and the authors': `blocks.N.attn.qkv.weight`, `mask_token`, `lm_head.weight`, ...
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from timm.layers import LayerNorm
from timm.models.beit import Beit
from torch import Tensor, nn

from beit_pretrain.errors import UserError
from beit_pretrain.models.blocks import block_outputs, use_our_forward
from beit_pretrain.models.cpu_kernels import Linear

# Base and large as in the release's modeling_pretrain.py, with the layer scale of its commands; tiny, small as in DeiT.
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


Architecture = dict[str, Any]  # arguments that every network takes, some of these:
DEFAULTS: Architecture = {
    "image_size": 224,  # side of square images, or (height, width), pixels
    "patch_size": 16,  # side of a patch, pixels
    "in_chans": 3,
    "embed_dim": 768,
    "depth": 12,
    "num_heads": 12,
    "mlp_ratio": 4.0,
    "init_values": 0.1,  # initial layer scale; None = no layer scale
    "drop_path_rate": 0.1,  # stochastic depth of the last block; linear from 0 over the depth
    "rel_pos_bias": "shared",  # one position bias table for all blocks; "per_layer" (fine-tuning), "none"
    "abs_pos_emb": False,  # learned absolute positions, as in the released 800-epoch ImageNet-1k model
    "norm_eps": 1e-6,  # of every LayerNorm; Hugging Face's files say 1e-12
}
BIASES = ("shared", "per_layer", "none")


def check_counts(config: dict[str, Any], *names: str) -> None:
    """Raise UserError if one of these sizes of a network is below 1."""
    for name in names:
        if config[name] < 1:
            raise UserError(f"model.{name} must be at least 1, got {config[name]}")


def complete(architecture: Architecture) -> Architecture:
    """All arguments of a network: those given, and `DEFAULTS`; a square image's size is a number.

    Raises UserError for values that no network has, TypeError for unknown arguments.
    """
    if unknown := sorted(architecture.keys() - DEFAULTS.keys()):
        raise TypeError(f"unknown arguments of the network: {', '.join(unknown)}")
    config = {**DEFAULTS, **architecture}
    check_counts(config, "embed_dim", "depth", "num_heads", "in_chans")
    patch_grid(config["image_size"], config["patch_size"])
    if config["rel_pos_bias"] not in BIASES:
        raise UserError(f"model.rel_pos_bias={config['rel_pos_bias']} is not one of {', '.join(BIASES)}")
    size = config["image_size"]
    config["image_size"] = size if isinstance(size, int) else size[0] if size[0] == size[1] else list(size)
    return config


class Backbone(Beit):
    """timm's Beit with the options of every BEiT checkpoint; `config` holds the arguments that build it again."""

    kind = "backbone"  # what a checkpoint of the network is called

    def __init__(self, pool: str, num_classes: int, **architecture: Any):
        config = complete(architecture)
        self.grid = patch_grid(config["image_size"], config["patch_size"])
        size = config["image_size"]
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
        use_our_forward(self)
        self.config = config
        # Metadata of a checkpoint: mean, std, classes, ...
        self.about: dict[str, Any] = {}

    def hidden_states(
        self, image_BCHW: Tensor, mask_BN: Tensor | None = None, drop_BR: Tensor | None = None
    ) -> list[Tensor]:
        """Raw outputs (B, 1 + N, D) of every block, [CLS] first, without the final LayerNorm.

        `drop_BR`, random numbers from `drop_path.uniforms`, decides about drop path; None = nothing is dropped.
        """
        return block_outputs(self, embed(self, image_BCHW, mask_BN), drop_BR)

    @property
    def branches(self) -> int:
        """R, the number of residual branches."""
        return 2 * len(self.blocks)


class MaskedImageModel(Backbone):
    """Beit with a mask token and a token head: predicts the visual token of every masked patch.

    `vocab_size` is V, the size of the tokenizer's codebook; for the other arguments see `DEFAULTS`.
    """

    kind = "mim"

    def __init__(self, vocab_size: int = 8192, **architecture: Any):
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
        """Logits (B, K, V) at the given patches, with static shapes and no synchronisation, unlike `forward`.

        `position_BK` lists the masked patches of each image, padded with any valid number.
        """
        token_BK = position_BK + 1  # behind [CLS]
        hidden = block_outputs(self, embed(self, image_BCHW, mask_BN), drop_BR, token_BK=token_BK)[-1]
        return self.lm_head(self.norm(hidden))

    def encode(self, image_BCHW: Tensor, mask_BN: Tensor | None = None, drop_BR: Tensor | None = None) -> Tensor:
        """Features (B, 1 + N, D) after the final LayerNorm, [CLS] first; equal to timm's without a mask."""
        return self.norm(self.hidden_states(image_BCHW, mask_BN, drop_BR)[-1])


class Classifier(Backbone):
    """Beit for classification, by default with a bias table for every block (the release's modeling_finetune.py).

    Args:
        num_classes: number of classes.
        pool: "avg", the mean of the patch tokens -> a new LayerNorm -> linear head; "token", the final LayerNorm of
            pre-training -> [CLS] -> linear head.
        architecture: see `DEFAULTS`.
    """

    kind = "classifier"

    def __init__(self, num_classes: int, pool: str = "avg", **architecture: Any):
        if pool not in ("avg", "token"):
            raise UserError(f"model.pool={pool} is not one of avg, token")
        check_counts({"num_classes": num_classes}, "num_classes")
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
    """Beit without a head: features of every layer, without the final LayerNorm."""

    def __init__(self, **architecture: Any):
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
    # In the parameters' precision, also under autocast: the residual stream is never rounded to bf16.
    x_BND = model.patch_embed(image_BCHW.to(model.cls_token.dtype)).to(model.cls_token.dtype)
    if mask_BN is not None:
        x_BND = torch.where(mask_BN.unsqueeze(-1), model.mask_token, x_BND)
    x_BND = torch.cat([model.cls_token.expand(x_BND.shape[0], -1, -1), x_BND], dim=1)
    if model.pos_embed is not None:
        x_BND = x_BND + model.pos_embed
    return model.pos_drop(x_BND)


_cut_normal = partial(nn.init.trunc_normal_, std=0.02, a=-0.02, b=0.02)  # cut at one sigma
_normal = partial(nn.init.trunc_normal_, std=0.02, a=-2.0, b=2.0)


def init_for_pretraining(model: MaskedImageModel) -> None:
    """The release's initial weights of pre-training: normal of std .02, cut at +-.02."""
    _init(model, _cut_normal, patch_conv=True)
    _cut_normal(model.mask_token)
    init_token_head(model.lm_head)


def init_for_finetuning(model: Backbone) -> None:
    """The release's initial weights of fine-tuning: normal of std .02, patch convolution as torch's, head x .001."""
    _init(model, _normal, patch_conv=False)
    if isinstance(model.head, nn.Linear):
        init_class_head(model.head)


def init_token_head(head: nn.Linear) -> None:
    """Initial weights of a head over visual tokens."""
    _cut_normal(head.weight)
    nn.init.zeros_(head.bias)


@torch.no_grad()
def init_class_head(head: nn.Linear) -> None:
    """Initial weights of a head over classes, near zero."""
    _normal(head.weight)
    head.weight.mul_(0.001)
    nn.init.zeros_(head.bias)


@torch.no_grad()
def _init(model: Beit, draw: Callable[[Tensor], Tensor], patch_conv: bool) -> None:
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
    for layer, block in enumerate(model.blocks, start=1):  # deeper residual branches start smaller
        block.attn.proj.weight.div_(math.sqrt(2 * layer))
        block.mlp.fc2.weight.div_(math.sqrt(2 * layer))
