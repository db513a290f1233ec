"""Settings of the verb `probe`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from beit_pretrain.data.settings import DataSettings
from beit_pretrain.settings import (
    Count,
    NonNegative,
    Number,
    PathStr,
    Pool,
    Positive,
    Seed,
    Settings,
    ShareAboveZero,
    Side,
    Switch,
    about,
)


class LinearSettings(Settings):
    """Linear probes, on fixed views: resize and centre crop."""

    defaults = "probe.yaml:linear"

    pool: Pool = about("cls_avg: [CLS] and the mean of the patches, concatenated | avg | cls")
    epochs: Count = about("epochs over the stored features")
    batch: Count = about("images in a step")
    lr: Positive = about("peak learning rate")
    weight_decay: NonNegative = about("weight decay of AdamW")


class KNNSettings(Settings):
    """kNN of [CLS] and of the mean of the patches: every pair of these."""

    defaults = "probe.yaml:knn"

    ks: Annotated[list[Count], Field(min_length=1)] = about("numbers of neighbours")
    temperatures: Annotated[list[Positive], Field(min_length=1)] = about(
        "temperatures of the vote exp(cosine / temperature)"
    )


class ProbeDataSettings(DataSettings):
    """Labelled images."""

    defaults = "data/shards.yaml probe.yaml:data"

    crop_ratio: ShareAboveZero | None = about(
        "shorter side = image_size / crop_ratio; null = .875 below 384, 1 from there"
    )


class ProbeSettings(Settings):
    """Settings of `probe`."""

    defaults = "probe.yaml"

    init_from: PathStr = about(
        "a checkpoint of fit, the authors' .pth, a timm file, a Hugging Face folder, or hf://OWNER/NAME"
    )
    out: PathStr | None = about("folder for layers.csv, knn.csv, layers.png; null = probe beside the checkpoint")
    keep_features: Switch = about("keep the stored features for the next call (images x layers x 2 x width x 2 bytes)")
    image_size: Side | None = about("null = that of init_from")
    mean: Annotated[list[Number], Field(min_length=1)] | None = about("null = that of init_from, else .5")
    std: Annotated[list[Positive], Field(min_length=1)] | None = about("null = that of init_from, else .5")
    train_images: Count | None = about("largest number of training images")
    seed: Seed = about("seed of the probes")
    threads: Count | None = about("torch threads on a CPU; null = torch's default")
    linear: LinearSettings
    knn: KNNSettings
    data: ProbeDataSettings
