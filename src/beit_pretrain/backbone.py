"""The BEiT backbone: timm's `Beit`, and what pre-training adds to it (BEiT, sections 2.1, 2.4 and 2.5).

Shapes: B batch, C channels, H W pixels, N patches, D width, V vocabulary, K masked positions of one image (padded),
M masked patches of the batch. Masks are True where a patch is masked, to be predicted.

State-dict names are timm's and the authors': `blocks.N.attn.qkv.weight`, `mask_token`, `lm_head.weight`, ...
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from timm.models.beit import Beit
from torch import Tensor, nn

from beit_pretrain.errors import UserError

# Named sizes: width, depth, heads and the initial layer scale of RECIPE section 3 (tiny and small as in DeiT).
SIZES: dict[str, dict] = {
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3, "init_values": 0.1},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6, "init_values": 0.1},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12, "init_values": 0.1},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16, "init_values": 1e-5},
}


def patch_grid(image_size: int, patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches. Raises UserError if the image does not divide into patches."""
    if image_size < 1 or patch_size < 1:
        raise UserError(f"image_size={image_size} and patch_size={patch_size} must be at least 1")
    if image_size % patch_size:
        raise UserError(
            f"image_size={image_size} is not divisible by patch_size={patch_size}; "
            f"{(image_size // patch_size + 1) * patch_size} would be"
        )
    return image_size // patch_size, image_size // patch_size


class MaskedImageModel(Beit):
    """Beit with a mask token and a token head: predicts the visual token of every masked patch.

    Args:
        image_size: side of the square images, pixels.
        patch_size: side of a patch, pixels.
        vocab_size: V, size of the tokenizer's codebook.
        embed_dim, depth, num_heads, init_values: see `SIZES`.
        drop_path_rate: stochastic depth of the last block; linear from 0 over the depth.
        shared_rel_pos_bias: one relative position bias table for all blocks (pre-training, RECIPE section 3).
        abs_pos_emb: learned absolute positions (the released ImageNet-1k 800-epoch model).
    """

    def __init__(
        self,
        image_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        vocab_size: int = 8192,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        init_values: float | None = 0.1,
        drop_path_rate: float = 0.1,
        shared_rel_pos_bias: bool = True,
        abs_pos_emb: bool = False,
    ):
        arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        patch_grid(image_size, patch_size)
        super().__init__(
            img_size=image_size,
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=0,
            global_pool="",  # keeps the final LayerNorm before the token head
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            init_values=init_values,
            drop_path_rate=drop_path_rate,
            use_shared_rel_pos_bias=shared_rel_pos_bias,
            use_abs_pos_emb=abs_pos_emb,
        )
        self.config: dict[str, Any] = arguments
        self.vocab_size = vocab_size
        self.mask_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.lm_head = nn.Linear(embed_dim, vocab_size)
        init_for_pretraining(self)

    def forward(self, image_BCHW: Tensor, mask_BN: Tensor) -> Tensor:  # type: ignore[override]
        """Logits (M, V) of the masked patches, row-major over the batch (as in `logits = model(image)[mask]`)."""
        return self.lm_head(self.encode(image_BCHW, mask_BN)[:, 1:][mask_BN])

    def forward_at(self, image_BCHW: Tensor, mask_BN: Tensor, position_BK: Tensor) -> Tensor:
        """Logits (B, K, V) at the given patch numbers: static shapes and no wait for the device, unlike `forward`.

        `position_BK` lists the masked patches of each image, padded by any valid number (the caller ignores those).
        """
        hidden = self.encode(image_BCHW, mask_BN)[:, 1:]
        index = position_BK.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
        return self.lm_head(hidden.gather(1, index))

    def encode(self, image_BCHW: Tensor, mask_BN: Tensor | None = None) -> Tensor:
        """Features (B, 1 + N, D) after the final LayerNorm, [CLS] first; equal to timm's without a mask."""
        return self.norm(self.hidden_states(image_BCHW, mask_BN)[-1])

    def hidden_states(self, image_BCHW: Tensor, mask_BN: Tensor | None = None) -> list[Tensor]:
        """Raw outputs (B, 1 + N, D) of every block, without the final LayerNorm."""
        return block_outputs(self, embed(self, image_BCHW, mask_BN))


class Classifier(Beit):
    """Beit for classification: mean of the patch tokens -> new LayerNorm -> linear head; one bias table per block.

    Args as of `MaskedImageModel`; `num_classes` is the number of classes (RECIPE section 5).
    """

    def __init__(
        self,
        num_classes: int,
        image_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        init_values: float | None = 0.1,
        drop_path_rate: float = 0.1,
        rel_pos_bias: bool = True,
        abs_pos_emb: bool = False,
    ):
        arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        patch_grid(image_size, patch_size)
        super().__init__(
            img_size=image_size,
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool="avg",
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            init_values=init_values,
            drop_path_rate=drop_path_rate,
            use_rel_pos_bias=rel_pos_bias,
            use_abs_pos_emb=abs_pos_emb,
        )
        self.config: dict[str, Any] = arguments
        init_for_finetuning(self)

    def hidden_states(self, image_BCHW: Tensor) -> list[Tensor]:
        """Raw outputs (B, 1 + N, D) of every block."""
        return block_outputs(self, embed(self, image_BCHW))


def embed(model: Any, image_BCHW: Tensor, mask_BN: Tensor | None = None) -> Tensor:
    """Patch embeddings with [CLS] in front, (B, 1 + N, D). A masked patch's embedding IS the mask token.

    The replacement comes before any position is added, and through `where`: no pixel of a masked patch is left.
    """
    x_BND = model.patch_embed(image_BCHW)
    if mask_BN is not None:
        x_BND = torch.where(mask_BN.unsqueeze(-1), model.mask_token.to(x_BND.dtype), x_BND)
    x_BND = torch.cat([model.cls_token.expand(x_BND.shape[0], -1, -1).to(x_BND.dtype), x_BND], dim=1)
    if model.pos_embed is not None:
        x_BND = x_BND + model.pos_embed
    return model.pos_drop(x_BND)


def block_outputs(model: Beit, x: Tensor) -> list[Tensor]:
    """Outputs of every block on embeddings `x` (B, 1 + N, D); the shared bias table is gathered once."""
    bias = model.rel_pos_bias() if model.rel_pos_bias is not None else None
    outputs = []
    for block in model.blocks:
        x = block(x, shared_rel_pos_bias=bias)
        outputs.append(x)
    return outputs


@torch.no_grad()
def init_for_pretraining(model: MaskedImageModel) -> None:
    """The release's initial weights of pre-training: truncated normal of std .02 cut at +-.02, that is at one sigma."""

    def draw(weight: Tensor) -> None:
        nn.init.trunc_normal_(weight, std=0.02, a=-0.02, b=0.02)

    _init(model, draw, patch_conv=True)
    draw(model.mask_token)
    draw(model.lm_head.weight)


@torch.no_grad()
def init_for_finetuning(model: Classifier) -> None:
    """The release's initial weights of fine-tuning: std .02 (cut at an absolute +-2), head x .001, patch conv as is."""

    def draw(weight: Tensor) -> None:
        nn.init.trunc_normal_(weight, std=0.02, a=-2.0, b=2.0)

    _init(model, draw, patch_conv=False)
    if isinstance(model.head, nn.Linear):
        model.head.weight.mul_(0.001)
        model.head.bias.mul_(0.001)


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
