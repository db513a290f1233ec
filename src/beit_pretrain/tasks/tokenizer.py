"""A discrete VAE that users train on their own images, and its LightningModule.

The tokenizer of BEiT (section 2.2) is DALL-E's dVAE; whoever has no use for OpenAI's weights (X-rays, satellite tiles)
trains one here: Gumbel-softmax relaxation with an annealed temperature (Ramesh et al. 2021, section 2.1),
reconstruction loss, and two weights against a dead codebook.

Shapes: B batch, C channels, H W pixels, h w tokens (8 pixels each way), V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit_pretrain.data.dataset import first_position
from beit_pretrain.engine.module import TrainedModule
from beit_pretrain.engine.optim import Optim
from beit_pretrain.errors import UserError
from beit_pretrain.models.checkpoints.files import rebuild
from beit_pretrain.tokenizers.tokenizer import codebook_use, square_grid, weights_digest, with_channels


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
    """A trained `DiscreteVAE` as a frozen tokenizer (see `tokenizer.Tokenizer`), read from a checkpoint of ours.

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


@dataclass
class GumbelConfig:
    """How the relaxed codes are pulled towards discrete, evenly used ones.

    Args:
        temperature_end: Gumbel-softmax temperature after `anneal` of the run; it falls exponentially from 1.
        kl_weight: weight of KL(q(token | patch) || uniform), the dVAE's own prior term.
        usage_weight: weight of KL(batch mean of q || uniform). It keeps every token in use without making single
            patches undecided, which the prior term does.
    """

    temperature_end: float = 1 / 16
    anneal: float = 0.7
    kl_weight: float = 0.0
    usage_weight: float = 0.005

    def __post_init__(self) -> None:
        if not 0 < self.temperature_end <= 1 or not 0 < self.anneal <= 1:
            raise UserError(
                f"relaxation.temperature_end={self.temperature_end} and relaxation.anneal={self.anneal} must be above 0"
                " and at most 1"
            )

    def temperature(self, progress: float) -> float:
        """Temperature at `progress` (0 to 1) of the run."""
        return math.exp(math.log(self.temperature_end) * min(1.0, progress / self.anneal))


class TokenizerTraining(TrainedModule):
    """Trains a `DiscreteVAE`. Logs loss, reconstruction error, both KL terms and the codebook's use."""

    kind = "tokenizer"
    model: DiscreteVAE

    def __init__(self, model: DiscreteVAE, optim: Optim, relaxation: GumbelConfig, seed: int = 0):
        super().__init__(model, optim, seed)
        self.relaxation = relaxation
        self._totals: Tensor | None = None

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        """Equation (1) of Ramesh et al.: reconstruction under q plus weighted KL to the uniform prior."""
        image = batch["image"].float() / 255
        temperature = self.relaxation.temperature(self.trainer.global_step / max(1, self.trainer.max_steps))
        logits = self.model.logits(image).float()
        # The noise belongs to the batch: a run that goes on draws what it would have drawn.
        torch.manual_seed(self.seed * 1_000_003 + first_position(batch))
        weights = F.gumbel_softmax(logits, temperature, dim=1)
        reconstruction = F.mse_loss(self.model.reconstruct(weights), image)
        kl, usage_kl = self.divergences(logits)
        loss = reconstruction + self.relaxation.kl_weight * kl + self.relaxation.usage_weight * usage_kl
        self.accumulate(loss=loss, reconstruction=reconstruction, kl=kl, usage_kl=usage_kl, temperature=temperature)
        return loss

    def divergences(self, logits_BVhw: Tensor) -> tuple[Tensor, Tensor]:
        """KL to the uniform distribution in nats: mean over patches, and of the batch's mean distribution."""
        log_q = logits_BVhw.log_softmax(1)
        kl = (log_q.exp() * log_q).sum(1).mean() + math.log(self.model.vocab_size)
        mean_q = log_q.exp().mean((0, 2, 3))
        return kl, (mean_q * mean_q.clamp(min=1e-9).log()).sum() + math.log(self.model.vocab_size)

    def on_validation_epoch_start(self) -> None:
        self._totals = torch.zeros(2 + self.model.vocab_size, dtype=torch.float64, device=self.device)

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        """Error of the images decoded from the argmax tokens: what the pictures will look like."""
        image = batch["image"].float() / 255
        ids = self.model.logits(image).argmax(1)
        assert self._totals is not None
        self._totals[0] += (self.model.decode(ids).float().clamp(0, 1) - image).square().mean((1, 2, 3)).sum()
        self._totals[1] += len(image)
        self._totals[2:] += torch.bincount(ids.flatten(), minlength=self.model.vocab_size)

    def on_validation_epoch_end(self) -> None:
        totals = self.sum_over_processes(self._totals)
        use = codebook_use(totals[2:])
        self.log_validation({"reconstruction": totals[0] / totals[1], **use})
        if use["codebook_perplexity"] < 0.05 * self.model.vocab_size and not self.trainer.sanity_checking:
            self.print(
                f"warning: the codebook is collapsing: perplexity {use['codebook_perplexity']:.0f} of "
                f"{self.model.vocab_size} tokens; raise relaxation.usage_weight or lower optim.lr"
            )


@torch.no_grad()
def reconstruction_picture(model: DiscreteVAE, image_BCHW: Tensor):
    """Grid of original | decoded from its tokens, one row an image (a PIL image)."""
    from beit_pretrain.visualization import grids

    decoded = model.decode(model.logits(image_BCHW).argmax(1)).clamp(0, 1)
    return grids.grid([image_BCHW, decoded], ["original", "from its tokens"])
