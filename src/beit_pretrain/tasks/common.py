"""What tasks share: settings of a backbone, labelled data, and how data modules follow from the settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, Strict
from torch import Tensor, nn

from beit_pretrain.data.datamodule import ClassificationData
from beit_pretrain.data.settings import DataSettings
from beit_pretrain.engine.module import TrainedModule
from beit_pretrain.engine.settings import FitSettings, OptimSettings
from beit_pretrain.errors import UserError
from beit_pretrain.settings import (
    BelowOne,
    Number,
    PathStr,
    Positive,
    Settings,
    ShareAboveZero,
    Side,
    Switch,
    Text,
    about,
)
from beit_pretrain.transforms.jitter import HALF, normalise
from beit_pretrain.transforms.settings import AutoAugment, CropSettings
from beit_pretrain.transforms.views import ClassificationTransform

Width = Annotated[int, Strict(), Field(ge=1, le=2**20 - 1)]
Colours = Annotated[list[Number], Field(min_length=1)]
Deviations = Annotated[list[Positive], Field(min_length=1)]


class NetworkSettings(Settings):
    """Architecture of a new network. With init_from, the values set here must agree with the checkpoint."""

    size: Text | None = about("tiny, small, base or large; sets embed_dim, depth, num_heads, init_values")
    drop_path_rate: BelowOne = about("stochastic depth of the last block; linear from 0 over the depth")
    rel_pos_bias: Literal["shared", "per_layer", "none"] | None = about(
        "shared: one table for all blocks | per_layer: one for each | none; null = that of init_from, else the task's"
    )
    abs_pos_emb: Switch | None = about("learned absolute position embeddings; null = that of init_from, else false")
    embed_dim: Width | None = Field(None, description="set by size, or as +model.embed_dim=N")
    depth: Width | None = Field(None, description="blocks; set by size, or as +model.depth=N")
    num_heads: Width | None = Field(None, description="set by size, or as +model.num_heads=N")
    init_values: Positive | None = Field(None, description="initial layer scale, null = none; set by size")


class BackboneSettings(FitSettings):
    """Settings shared by every task that trains or probes a backbone."""

    image_size: Side = about("side of the images, pixels")
    patch_size: Side | None = about("side of a patch, pixels; null = that of init_from, else 16")
    mean: Colours | None = about("mean of the normalisation; null = that of init_from, else .5")
    std: Deviations | None = about("standard deviation of the normalisation; null = that of init_from, else .5")
    init_from: PathStr | None = about(
        "a checkpoint of fit, such as runs/base_22k/checkpoints/last.ckpt, the authors' .pth, a timm file, a "
        "Hugging Face folder, or hf://OWNER/NAME"
    )


class ClassificationDataSettings(DataSettings, CropSettings):
    """Images and their transforms."""

    defaults = "data/shards.yaml tasks/finetune.yaml:data"

    auto_augment: AutoAugment | None = about("RandAugment policy of timm, such as rand-m9-mstd0.5-inc1; null = none")
    crop_ratio: ShareAboveZero | None = about(
        "validation resizes the shorter side to image_size / crop_ratio; null = .875 below 384 pixels, 1 from there"
    )


class BackboneModule(TrainedModule):
    """A LightningModule whose network takes images normalised with `mean` and `std`."""

    def __init__(self, model: nn.Module, optim: OptimSettings, mean: Sequence[float], std: Sequence[float], seed: int):
        super().__init__(model, optim, seed)
        self.mean, self.std = tuple(mean), tuple(std)
        self.about = {"mean": list(mean), "std": list(std)}

    def image_of(self, batch: dict) -> Tensor:
        """The normalised images (B, C, H, W) of a batch."""
        return normalise(batch["image"].float() / 255, self.mean, self.std)


def data_settings(cfg: Any) -> dict[str, Any]:
    """Arguments common to all data modules, from the group `data`."""
    common = {name: getattr(cfg.data, name) for name in DataSettings.model_fields}
    return {"global_batch_size": cfg.global_batch_size, "seed": cfg.seed, **common}


def classification_data(cfg: Any, fill: tuple[float, ...] = HALF) -> ClassificationData:
    """Data with one view per image. Tokenizer training uses it too and ignores the labels."""
    data, size, channels = cfg.data, cfg.image_size, cfg.data.channels
    augment = getattr(data, "auto_augment", None)
    if channels == 4 and augment:
        raise UserError("RandAugment takes images of 1 or 3 channels: data.channels=4 needs data.auto_augment=null")
    crop = {"scale": data.scale, "ratio": data.ratio, "flip": data.flip}
    ratio = getattr(data, "crop_ratio", None)
    return ClassificationData(
        train_views=ClassificationTransform(
            image_size=size, **crop, auto_augment=augment, fill=fill, crop_ratio=ratio, channels=channels
        ),
        val_views=ClassificationTransform(image_size=size, train=False, crop_ratio=ratio, channels=channels),
        **data_settings(cfg),
    )


def labelled_data(cfg: Any, fill: tuple[float, ...]) -> ClassificationData:
    """Labelled data. Raises UserError if an image has no class, or there are fewer than two classes."""
    data = classification_data(cfg, fill)
    if data.readers["train"].classes_differ:
        raise UserError(f"data.train={cfg.data.train}: data sets of different classes cannot be used together")
    if len(data.classes) < 2:
        said = f"data.train={cfg.data.train} has {len(data.classes)} classes; {cfg.task} needs at least 2"
        asked = "" if data.classes else " (of streams and unread tars data.classes= says how many)"
        raise UserError(said + asked)
    data.needs_class = True
    for split, reader in data.readers.items():
        if without := reader.without_class:
            raise UserError(f"data.{split} has {without} images without a class; make shards only from class folders")
    return data
