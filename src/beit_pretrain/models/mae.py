"""The masked autoencoder: He et al. 2022, "Masked Autoencoders Are Scalable Vision Learners", section 3.

The encoder is a `Backbone` that sees only the visible patches; a light decoder predicts the pixels of the masked ones.
The encoder's parameters have the backbone's names, so its checkpoints can be used as a backbone; the decoder's names
(`mask_token`, `decoder_*`) are those of the authors' release. One difference: the release's keys have a bias. It adds
q . b to every score of query q, which does not change the softmax, so keys have none here, as in BEiT.

Shapes: B batch, C channels, H W pixels, N patches, of which K are visible and M masked, D width, E width of the
decoder, P numbers of a patch (rows, columns, channels).
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm, build_sincos2d_pos_embed
from timm.models.beit import Block
from torch import Tensor, nn

from beit_pretrain.errors import UserError
from beit_pretrain.models.backbone import Architecture, Backbone, check_counts, embed
from beit_pretrain.models.blocks import block_outputs, gather_tokens, run_blocks, use_our_forward
from beit_pretrain.models.drop_path import uniforms

# Fixed values of `backbone.DEFAULTS`: a plain ViT with sine-cosine positions (section 3; appendix A.1).
FIXED: Architecture = {"rel_pos_bias": "none", "abs_pos_emb": True, "init_values": None, "drop_path_rate": 0.0}
NORM_EPS = 1e-6  # added to the variance of a patch's pixels (the release's `forward_loss`)


class Masking(NamedTuple):
    """Numbers of the visible patches (B, K) and of the masked ones (B, M) of each image, in random order."""

    visible_BK: Tensor
    masked_BM: Tensor

    @property
    def mask_BN(self) -> Tensor:
        """True where a patch is masked."""
        mask_BN = torch.zeros_like(torch.cat(self, dim=1), dtype=torch.bool)
        return mask_BN.scatter(1, self.masked_BM, True)


def random_masking(seed: int, position_B: Tensor, patches: int, mask_ratio: float = 0.75) -> Masking:
    """Uniform random masks (section 3, "Masking") for the positions (B,) int64 of a run.

    A function of (seed, position): the same on any number of workers and processes, on every device.
    """
    return mask_by_noise(uniforms(seed, position_B, patches), mask_ratio)


def mask_by_noise(noise_BN: Tensor, mask_ratio: float = 0.75) -> Masking:
    """The patches with the smallest noise stay visible, int(N (1 - mask_ratio)) of them, as in the release.

    Raises UserError unless at least one patch is visible and one masked.
    """
    patches = noise_BN.shape[1]
    visible = int(patches * (1 - mask_ratio))
    if not 0 < visible < patches:
        raise UserError(
            f"mask_ratio={mask_ratio} leaves {visible} of {patches} patches visible; 1 to {patches - 1} can be"
        )
    shuffle_BN = noise_BN.argsort(dim=1, stable=True)
    return Masking(shuffle_BN[:, :visible], shuffle_BN[:, visible:])


def patchify(image_BCHW: Tensor, patch_size: int) -> Tensor:
    """The pixels of every patch, (B, N, P), channels last as in the release."""
    blocks = image_BCHW.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))
    return blocks.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patch_BNP: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """The images (B, C, H, W) whose patches are `patch_BNP`, row-major over the grid (rows, columns)."""
    blocks = patch_BNP.unflatten(2, (patch_size, patch_size, -1)).unflatten(1, grid)
    return blocks.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def sincos_positions(grid: tuple[int, int], width: int) -> Tensor:
    """Fixed 2-D sine-cosine positions (1, 1 + N, width); [CLS] has zeros, columns come before rows (the release)."""
    table = build_sincos2d_pos_embed(list(grid), width, interleave_sin_cos=True).roll(width // 2, dims=1)
    return F.pad(table, (0, 0, 1, 0)).unsqueeze(0)


class MaskedAutoencoder(Backbone):
    """Beit on the visible patches, and a decoder that predicts the pixels of the masked ones.

    Args:
        decoder_embed_dim, decoder_depth, decoder_num_heads: E and the blocks of the decoder (section 4.1: 8 of 512).
        norm_pix_loss: predict pixels normalised by their patch's mean and standard deviation (table 1d).
        architecture: see `backbone.DEFAULTS`; the values of `FIXED` cannot be changed.
    """

    def __init__(
        self,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        norm_pix_loss: bool = True,
        **architecture: Any,
    ):
        for name, value in FIXED.items():
            if architecture.get(name, value) != value:
                raise UserError(f"model.{name}={architecture.get(name)}: a masked autoencoder has {name}={value}")
        super().__init__("", 0, **{**architecture, **FIXED})
        self.norm_pix_loss = norm_pix_loss
        decoder = {"decoder_embed_dim": decoder_embed_dim, "decoder_depth": decoder_depth}
        self.config |= {**decoder, "decoder_num_heads": decoder_num_heads, "norm_pix_loss": norm_pix_loss}
        check_counts(self.config, "decoder_embed_dim", "decoder_depth", "decoder_num_heads")
        for name, divisor in (("embed_dim", 4), ("decoder_embed_dim", 4), ("decoder_embed_dim", decoder_num_heads)):
            if self.config[name] % divisor:  # 4: sines and cosines of rows and columns
                raise UserError(f"model.{name}={self.config[name]} is not divisible by {divisor}")
        norm_layer: Any = partial(LayerNorm, eps=self.config["norm_eps"])
        self.decoder_embed = nn.Linear(self.embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid[0] * self.grid[1], decoder_embed_dim))
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_embed_dim, decoder_num_heads, True, self.config["mlp_ratio"], norm_layer=norm_layer)
            for _ in range(decoder_depth)
        )
        self.decoder_norm = norm_layer(decoder_embed_dim)
        self.decoder_pred = nn.Linear(decoder_embed_dim, self.config["patch_size"] ** 2 * self.config["in_chans"])
        use_our_forward(self)
        init_autoencoder(self)

    def forward(self, image_BCHW: Tensor, masking: Masking) -> Tensor:  # type: ignore[override]
        """The loss (section 3, "Reconstruction target"): mean squared error of the masked patches' pixels.

        Every image has M masked patches, so means over micro-batches and processes of one size are means over all.
        """
        target_BMP = gather_tokens(patchify(image_BCHW, self.config["patch_size"]), masking.masked_BM)
        mean, std = self.patch_statistics(target_BMP)
        return F.mse_loss(self.predict(image_BCHW, masking).to(target_BMP.dtype), (target_BMP - mean) / std)

    def patch_statistics(self, patch_BNP: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """Mean and (unbiased) standard deviation by which each patch is normalised, (B, N, 1); 0 and 1 if it is not."""
        if not self.norm_pix_loss:
            return 0.0, 1.0
        variance, mean = torch.var_mean(patch_BNP, dim=-1, keepdim=True)
        return mean, (variance + NORM_EPS).sqrt()

    def predict(self, image_BCHW: Tensor, masking: Masking) -> Tensor:
        """Predicted pixels of the masked patches, (B, M, P); normalised with `norm_pix_loss`."""
        return self.decode(self.encode(image_BCHW, masking.visible_BK), *masking)

    def encode(self, image_BCHW: Tensor, visible_BK: Tensor) -> Tensor:
        """Features (B, 1 + K, D) of [CLS] and the visible patches, after the final LayerNorm."""
        token_BK = F.pad(visible_BK + 1, (1, 0))  # [CLS] is token 0
        return self.norm(block_outputs(self, gather_tokens(embed(self, image_BCHW), token_BK))[-1])

    def decode(self, latent_BKD: Tensor, visible_BK: Tensor, asked_BM: Tensor) -> Tensor:
        """Predictions (B, M, P) of the masked patches, from the features that `encode` returns."""
        latent_BKE = self.decoder_embed(latent_BKD).to(self.mask_token.dtype)
        token_BK = F.pad(visible_BK + 1, (1, 0)).unsqueeze(-1).expand_as(latent_BKE)
        mask_BNE = self.mask_token.expand(len(latent_BKE), self.decoder_pos_embed.shape[1], -1)
        x = mask_BNE.scatter(1, token_BK, latent_BKE) + self.decoder_pos_embed  # every patch at its place
        x = run_blocks(self.decoder_blocks, x, token_BK=asked_BM + 1, checkpointing=self.grad_checkpointing)[-1]
        return self.decoder_pred(self.decoder_norm(x))

    @torch.no_grad()
    def reconstruct(self, image_BCHW: Tensor, masking: Masking) -> Tensor:
        """The images (B, C, H, W) with their masked patches as predicted; colours as in the input, not clamped.

        Normalised predictions are scaled back with the original patch's mean and standard deviation.
        """
        patch_BNP = patchify(image_BCHW, self.config["patch_size"])
        mean, std = self.patch_statistics(gather_tokens(patch_BNP, masking.masked_BM))
        pixel_BMP = self.predict(image_BCHW, masking).to(patch_BNP.dtype) * std + mean
        patch_BNP = patch_BNP.scatter(1, masking.masked_BM.unsqueeze(-1).expand_as(pixel_BMP), pixel_BMP)
        return unpatchify(patch_BNP, self.grid, self.config["patch_size"])


@torch.no_grad()
def init_autoencoder(model: MaskedAutoencoder) -> None:
    """The release's initial weights (appendix A.1; `models_mae.py`): q, k and v are one matrix to Xavier's uniform."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    nn.init.xavier_uniform_(model.patch_embed.proj.weight.flatten(1))  # a view: like a linear layer
    for token in (model.cls_token, model.mask_token):
        nn.init.normal_(token, std=0.02)
    positions: Any
    for positions in (model.pos_embed, model.decoder_pos_embed):
        positions.copy_(sincos_positions(model.grid, positions.shape[-1])).requires_grad_(False)
