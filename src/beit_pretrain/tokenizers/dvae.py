"""A discrete VAE that users train on their own images (`fit +experiment=tokenizer`), as a tokenizer.

BEiT's tokenizer (section 2.2) is DALL-E's dVAE; this one is for other kinds of images (X-rays, satellite tiles).
Shapes: B batch, C channels, H W pixels, h w tokens (8 pixels each way), V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from beit_pretrain.models.checkpoints.files import rebuild
from beit_pretrain.tokenizers.tokenizer import square_grid, weights_digest, with_channels


class ResidualBlock(nn.Module):
    """x + conv1(relu(conv3(relu(x))))."""

    def __init__(self, width: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class DiscreteVAE(nn.Module):
    """Encoder to logits over V tokens at 1/8 of the resolution, and decoder back.

    Args:
        vocab_size: V, entries of the codebook.
        width: channels after the first of three halvings (then twice, then four times as many).
        blocks: residual blocks at the lowest resolution, in the encoder and in the decoder.
        code_dim: length of a codebook vector.
        in_chans: channels of the images.
    """

    downsample = 8
    vocab_size: int

    def __init__(
        self, vocab_size: int = 8192, width: int = 64, blocks: int = 2, code_dim: int = 128, in_chans: int = 3
    ):
        super().__init__()
        self.config: dict[str, Any] = dict(
            vocab_size=vocab_size, width=width, blocks=blocks, code_dim=code_dim, in_chans=in_chans
        )
        self.vocab_size = vocab_size
        self.encoder = nn.Sequential(
            nn.Conv2d(in_chans, width, 4, 2, 1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 4, 2, 1),
            nn.ReLU(),
            nn.Conv2d(2 * width, 4 * width, 4, 2, 1),
            *(ResidualBlock(4 * width) for _ in range(blocks)),
            nn.ReLU(),
            nn.Conv2d(4 * width, vocab_size, 1),
        )
        self.codebook = nn.Embedding(vocab_size, code_dim)
        self.decoder = nn.Sequential(
            nn.Conv2d(code_dim, 4 * width, 1),
            *(ResidualBlock(4 * width) for _ in range(blocks)),
            nn.ReLU(),
            nn.ConvTranspose2d(4 * width, 2 * width, 4, 2, 1),
            nn.ReLU(),
            nn.ConvTranspose2d(2 * width, width, 4, 2, 1),
            nn.ReLU(),
            nn.ConvTranspose2d(width, in_chans, 4, 2, 1),
        )

    def logits(self, image_BCHW: Tensor) -> Tensor:
        """Token logits (B, V, h, w) of images in [0, 1]."""
        return self.encoder(image_BCHW - 0.5)

    def reconstruct(self, weights_BVhw: Tensor) -> Tensor:
        """Images (B, C, H, W) of (relaxed) one-hot codes."""
        codes = torch.einsum("bvhw,vd->bdhw", weights_BVhw, self.codebook.weight)
        return self.decoder(codes) + 0.5

    def decode(self, ids_Bhw: Tensor) -> Tensor:
        """Images (B, C, H, W), not yet clamped to [0, 1], of token ids (B, h, w)."""
        return self.decoder(self.codebook(ids_Bhw).permute(0, 3, 1, 2)) + 0.5


class DVAETokenizer:
    """A trained `DiscreteVAE` as a frozen tokenizer (see `tokenizer.Tokenizer`), read from our checkpoint.

    Args:
        path: `.ckpt` of a run of `fit +experiment=tokenizer`.
    """

    downsample = DiscreteVAE.downsample

    def __init__(self, path: str | Path):
        self.model, _ = rebuild(DiscreteVAE, path, "tokenizer")
        self.vocab_size = self.model.vocab_size
        self.in_chans = int(self.model.config["in_chans"])

    def to(self, device: torch.device) -> DVAETokenizer:
        self.model.to(device)
        return self

    def digest(self) -> str:
        return weights_digest(self.model)

    @torch.no_grad()
    def encode(self, image_BCHW: Tensor) -> Tensor:
        with torch.autocast(image_BCHW.device.type, enabled=False):
            return self.model.logits(with_channels(image_BCHW.float(), self.in_chans)).argmax(1).flatten(1)

    @torch.no_grad()
    def decode(self, ids_BN: Tensor) -> Tensor:
        return self.model.decode(square_grid(ids_BN)).clamp(0, 1)
