"""Masked autoencoding (He et al. 2022): predict the pixels of masked patches from the visible quarter of an image.

Shapes: B batch, C channels, H W pixels, N patches. Masks are True where a patch is masked, to be predicted.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from PIL import Image
from pydantic import Field, Strict
from torch import Tensor

from beit_pretrain.data.settings import DataSettings
from beit_pretrain.engine.callbacks import ValidationPictures
from beit_pretrain.engine.settings import OptimSettings
from beit_pretrain.engine.task import Task
from beit_pretrain.errors import UserError
from beit_pretrain.evaluation.online_evaluation import CollapseSettings, DenseKNNSettings, KNNSettings, OnlineEvaluation
from beit_pretrain.models.build import named_size, network
from beit_pretrain.models.checkpoints.files import rebuild
from beit_pretrain.models.checkpoints.init_from import normalisation
from beit_pretrain.models.mae import MaskedAutoencoder, Masking, random_masking
from beit_pretrain.settings import PathStr, Settings, Switch, Whole, about, to_dict
from beit_pretrain.tasks.common import BackboneModule, BackboneSettings, NetworkSettings, Width, classification_data
from beit_pretrain.transforms.settings import CropSettings
from beit_pretrain.visualization import grids

Ratio = Annotated[float, Strict(), Field(gt=0, lt=1)]
VAL_SEED = 1_000_003  # masks of held-out images never change


class AutoencoderSettings(NetworkSettings):
    """The encoder, and the light decoder that predicts pixels."""

    decoder_embed_dim: Width = about("width of the decoder")
    decoder_depth: Width = about("blocks of the decoder")
    decoder_num_heads: Width = about("heads of the decoder")
    norm_pix_loss: Switch = about("predict pixels normalised by their patch's mean and standard deviation")


class MAEDataSettings(DataSettings, CropSettings):
    """Images and their crops."""


class MAEMaskSettings(Settings):
    """Random masks."""

    ratio: Ratio = about("share of the patches that are masked")


class MAESettings(BackboneSettings):
    """Settings of masked autoencoding."""

    defaults = "fit.yaml tasks/mae.yaml"

    model: AutoencoderSettings
    activation_checkpointing: Switch = about("saves most activation memory; a third slower", True)
    data: MAEDataSettings
    mask: MAEMaskSettings
    init_from: PathStr | None = about("a checkpoint of this task, to train it on, at any image_size")
    num_visualizations: Whole = about("masked | predicted | original rows after each validation; 0 = none", True)
    knn: KNNSettings = about("online kNN accuracy, if there are labels", True)
    dense_knn: DenseKNNSettings | None = about("online kNN of patches, if there are label maps; null = none", True)
    collapse: CollapseSettings | None = about("RankMe and deviation of held-out features; null = none", True)


class Autoencoding(BackboneModule):
    """Predicts the pixels of masked patches."""

    kind = "mae"
    model: MaskedAutoencoder

    def __init__(
        self, model: MaskedAutoencoder, optim: OptimSettings, mean: Any, std: Any, mask_ratio: float, seed: int = 0
    ):
        super().__init__(model, optim, mean, std, seed)
        self.mask_ratio, self.totals_shape = mask_ratio, (2,)

    def masking(self, position_B: Tensor, seed: int) -> Masking:
        """Masks of a batch; they depend only on seed and position."""
        return random_masking(seed, position_B, self.model.grid[0] * self.model.grid[1], self.mask_ratio)

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        """Mean squared error of the masked patches' pixels (section 3, "Reconstruction target")."""
        masking = self.masking(batch["position"], self.seed)
        loss = self.maybe_compile(self.model.forward)(self.image_of(batch), masking)
        self.accumulate(loss=loss)
        return loss

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        """Computes the same loss on held-out images, with fixed masks."""
        loss, images = self.model(self.image_of(batch), self.masking(batch["position"], VAL_SEED)), len(batch["image"])
        self.totals += torch.stack([loss.double() * images, loss.new_tensor(images, dtype=torch.float64)])

    def on_validation_epoch_end(self) -> None:
        total, images = self.sum_over_processes(self.totals)
        self.log_validation({"loss": total / images})


class MAE(Task):
    """The task `mae`: masked autoencoding."""

    settings = MAESettings
    best = ("val/loss", "min")
    module: Autoencoding

    def __init__(self, cfg: MAESettings):
        super().__init__(cfg)
        model, known = continued(cfg) if cfg.init_from else (MaskedAutoencoder(**network(cfg)), {})
        self.origin = str(cfg.init_from or "")
        mean, std = normalisation(cfg, known)
        self.data = classification_data(cfg)
        model.set_grad_checkpointing(cfg.activation_checkpointing)
        optim = cfg.optim.with_warmup_in_steps(self.data.samples, cfg.global_batch_size)
        self.module = Autoencoding(model, optim, mean, std, cfg.mask.ratio, cfg.seed)
        self.module.masking(torch.zeros(1, dtype=torch.int64), 0)  # raises UserError early for an unusable mask ratio
        if "val" in self.data.readers:
            if cfg.num_visualizations:
                self.callbacks.append(ValidationPictures(self))
            self.callbacks.append(OnlineEvaluation(self.data, cfg.knn, cfg.dense_knn, cfg.collapse))

    @torch.no_grad()
    def masked(self, options: Any) -> Image.Image | None:
        """Grid of masked | predicted | original, one row per image."""
        module, batch = self.module, self.batch_of(options)
        image, masking = batch["image"].float() / 255, module.masking(batch["position"], VAL_SEED)
        mean, std = (image.new_tensor(values).view(1, -1, 1, 1) for values in (module.mean, module.std))
        predicted = (module.model.reconstruct(module.image_of(batch), masking) * std + mean).clamp(0, 1)
        return grids.grid([grids.hide(image, masking.mask_BN), predicted, image], ["masked", "predicted", "original"])


def continued(cfg: MAESettings) -> tuple[MaskedAutoencoder, dict[str, Any]]:
    """The encoder and decoder of `init_from`, at any image size (positions are computed), and the file's metadata.

    Raises UserError if the settings ask for another network.
    """
    size = named_size(cfg.model.size)
    asked = {**size, **to_dict(cfg.model), "patch_size": cfg.patch_size, "in_chans": cfg.data.channels}

    def build(**config: Any) -> MaskedAutoencoder:
        for name in sorted(config.keys() & asked.keys() - {"norm_pix_loss"}):
            if asked[name] not in (None, config[name]):
                setting = {"patch_size": name, "in_chans": "data.channels"}.get(name, f"model.{name}")
                advice = "model.size=null keeps it" if name in size else f"set {setting}={config[name]}"
                raise UserError(
                    f"init_from={cfg.init_from} has {name}={config[name]}, but the run asks for {asked[name]}; {advice}"
                )
        own = {"image_size": cfg.image_size, "norm_pix_loss": cfg.model.norm_pix_loss}
        return MaskedAutoencoder(**{**config, **own})

    positions = ("pos_embed", "decoder_pos_embed")
    model, about = rebuild(build, cfg.init_from or "", Autoencoding.kind, computed=positions)
    for name, parameter in model.train().named_parameters():
        parameter.requires_grad_(name not in positions)
    return model, about
