"""Training of a discrete VAE on the user's own images, as a tokenizer.

BEiT's tokenizer (section 2.2) is DALL-E's dVAE. For other kinds of images (X-rays, satellite tiles), train one here:
Gumbel-softmax relaxation with an annealed temperature (Ramesh et al. 2021, section 2.1), a reconstruction loss, and two
KL terms against codebook collapse.

Shapes: B batch, C channels, H W pixels, h w tokens (8 pixels each way), V vocabulary.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import Field, Strict
from torch import Tensor

from beit_pretrain.data.dataset import first_position
from beit_pretrain.data.settings import DataSettings
from beit_pretrain.engine.module import TrainedModule
from beit_pretrain.engine.settings import FitSettings, OptimSettings
from beit_pretrain.engine.task import Task
from beit_pretrain.errors import UserError
from beit_pretrain.settings import NonNegative, Settings, ShareAboveZero, Side, about, to_dict
from beit_pretrain.tasks.common import Width, classification_data
from beit_pretrain.tokenizers.dvae import DiscreteVAE
from beit_pretrain.tokenizers.tokenizer import codebook_use
from beit_pretrain.transforms.settings import CropSettings
from beit_pretrain.visualization import grids
from beit_pretrain.visualization.token_maps import token_sheet

VocabSize = Annotated[int, Strict(), Field(ge=2, le=2**31 - 1)]
BlockCount = Annotated[int, Strict(), Field(ge=0, le=2**10 - 1)]


class GumbelConfig(Settings):
    """Temperature of the Gumbel-softmax relaxation, and weights of the KL terms."""

    defaults = "tasks/tokenizer.yaml:relaxation"

    temperature_end: ShareAboveZero = about(
        "Gumbel-softmax temperature after `anneal` of the run; it falls exponentially from 1"
    )
    anneal: ShareAboveZero = about("share of the run over which the temperature falls")
    kl_weight: NonNegative = about("weight of KL(q(token | patch) || uniform), the dVAE's own prior term")
    # Unlike the prior term, it does not flatten the distribution of a single patch.
    usage_weight: NonNegative = about("weight of KL(batch mean of q || uniform), which keeps every token in use")

    def temperature(self, progress: float) -> float:
        """Temperature at `progress` (0 to 1) of the run."""
        return math.exp(math.log(self.temperature_end) * min(1.0, progress / self.anneal))


class DVAESettings(Settings):
    """Architecture of the dVAE."""

    defaults = "tasks/tokenizer.yaml:model"

    vocab_size: VocabSize = about("entries of the codebook")
    width: Width = about("channels after the first of three halvings (then twice, then four times as many)")
    blocks: BlockCount = about("residual blocks at the lowest resolution, in the encoder and in the decoder")
    code_dim: Width = about("length of a codebook vector")


class TokenizerDataSettings(DataSettings, CropSettings):
    """Images and their crops."""

    defaults = "data/shards.yaml tasks/tokenizer.yaml:data"


class TokenizerSettings(FitSettings):
    """Settings of training a dVAE."""

    defaults = "fit.yaml tasks/tokenizer.yaml"

    image_size: Side = about("side of the images, pixels; a token covers 8 x 8 pixels")
    model: DVAESettings
    relaxation: GumbelConfig
    data: TokenizerDataSettings


class TokenizerTraining(TrainedModule):
    """Trains a `DiscreteVAE`. Logs loss, reconstruction error, both KL terms and the codebook's use."""

    kind = "tokenizer"
    model: DiscreteVAE

    def __init__(self, model: DiscreteVAE, optim: OptimSettings, relaxation: GumbelConfig, seed: int = 0):
        super().__init__(model, optim, seed)
        self.relaxation = relaxation
        self.totals_shape = (2 + model.vocab_size,)  # squared error, images, histogram of the tokens

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        """Equation (1) of Ramesh et al.: reconstruction under q plus weighted KL to the uniform prior."""
        image = batch["image"].float() / 255
        temperature = self.relaxation.temperature(self.trainer.global_step / max(1, self.trainer.max_steps))
        logits = self.model.logits(image).float()
        # Seeded by position, so that a resumed run draws the same noise.
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

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        """Computes the reconstruction error of images decoded from their argmax tokens."""
        image = batch["image"].float() / 255
        ids = self.model.logits(image).argmax(1)
        self.totals[0] += (self.model.decode(ids).float().clamp(0, 1) - image).square().mean((1, 2, 3)).sum()
        self.totals[1] += len(image)
        self.totals[2:] += torch.bincount(ids.flatten(), minlength=self.model.vocab_size)

    def on_validation_epoch_end(self) -> None:
        totals = self.sum_over_processes(self.totals)
        use = codebook_use(totals[2:])
        self.log_validation({"reconstruction": totals[0] / totals[1], **use})
        if use["codebook_perplexity"] < 0.05 * self.model.vocab_size:
            self.print(
                f"warning: the codebook is collapsing: perplexity {use['codebook_perplexity']:.0f} of "
                f"{self.model.vocab_size} tokens; raise relaxation.usage_weight or lower optim.lr"
            )


@torch.no_grad()
def reconstruction_picture(model: DiscreteVAE, image_BCHW: Tensor):
    """Grid (PIL image) of original | decoded from its tokens, one row per image."""
    decoded = model.decode(model.logits(image_BCHW).argmax(1)).clamp(0, 1)
    return grids.grid([image_BCHW, decoded], ["original", "from its tokens"])


class TrainTokenizer(Task):
    """The task `tokenizer`: training a dVAE."""

    settings = TokenizerSettings
    best = ("val/reconstruction", "min")
    module: TokenizerTraining

    def __init__(self, cfg: TokenizerSettings):
        super().__init__(cfg)
        if cfg.image_size % DiscreteVAE.downsample:
            raise UserError(
                f"image_size={cfg.image_size} is not divisible by {DiscreteVAE.downsample}, the pixels per token"
            )
        self.data = classification_data(cfg)
        model = DiscreteVAE(**to_dict(cfg.model), in_chans=cfg.data.channels)
        optim = cfg.optim.with_warmup_in_steps(self.data.samples, cfg.global_batch_size)
        self.module = TokenizerTraining(model, optim, cfg.relaxation, cfg.seed)

    def masked(self, options: Any) -> Image.Image | None:
        return reconstruction_picture(self.module.model, self.batch_of(options)["image"].float() / 255)

    @torch.no_grad()
    def tokens(self, options: Any) -> Image.Image | None:
        image, model = self.batch_of(options)["image"].float() / 255, self.module.model
        ids_Bhw = model.logits(image).argmax(1)
        return token_sheet(image, model.decode(ids_Bhw).clamp(0, 1), ids_Bhw.flatten(1), model.vocab_size)
