"""Settings of the verb `shards`."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field, Strict

from beit_pretrain.data.listing.settings import ClassSettings, ImageKey
from beit_pretrain.data.settings import RemoteOptions
from beit_pretrain.settings import (
    BelowOne,
    Count,
    Name,
    Paths,
    PathStr,
    Rule,
    Seed,
    Settings,
    Text,
    Whole,
    Window,
    about,
)
from beit_pretrain.transforms.image_io import MAX_PIXELS

Quality = Annotated[int, Strict(), Field(ge=1, le=100)]
Percentile = Annotated[float, Strict(), Field(ge=0, le=100)]
Side = Annotated[int, Strict(), Field(ge=16, lt=2**63)]


def _ascending(pair: list[float]) -> list[float]:
    if pair[0] >= pair[1]:
        raise ValueError("does not rise")
    return pair


Percentiles = Annotated[
    list[Percentile],
    Field(min_length=2, max_length=2),
    AfterValidator(_ascending),
    Rule("a list of 2, each a number of at least 0 and at most 100, the second above the first"),
]


class EncodeSettings(Settings):
    """The settings on which the bytes of the shards depend, besides the source."""

    defaults = "shards.yaml"

    samples_per_shard: Count = about("images of a shard")
    seed: Seed = about("of the order and of the held-out part")
    # Of every class, before decoding; images without a class or alone in it are pooled.
    val: BelowOne = about("share of held-out images")
    resize: Count | None = about("shrink images to this shorter side, pixels; null = keep their bytes")
    quality: Quality = about("of the JPEGs that resize writes")
    window: Window | None = about("[low, high]: the values of grey images that become black and white")
    percentiles: Percentiles = about("the same by each image's own values, for grey images of more than 8 bits")
    max_pixels: Count = Field(MAX_PIXELS, description="images of more pixels are refused before they are decoded")
    image_key: ImageKey = about("extensions of the image, such as jpg or rgb.png, where files or members share a name")
    label_key: Name | None = about("column of the class in parquet and Arrow files; null = found")
    images: Count = about("of the synthetic set")
    size: Side = about("of the synthetic images, pixels")


class ShardsSettings(EncodeSettings, ClassSettings, RemoteOptions):
    """Settings of `shards make`, `shards index`, `shards verify` and `shards show`."""

    action: Text = about("make, index (existing WebDataset tars), verify or show")
    src: Paths = about(
        "make: a folder of class folders, a tar, a folder of tars, CIFAR-100's archive, or synthetic; index: tars of "
        "one folder, by its path or by braces, local or remote; else a shard folder"
    )
    out: PathStr | None = about(
        "make: folder for train/ and val/; index: for index and links, null = beside local tars; show: the picture"
    )
    split: Name | None = about("folder name when val=0; of a source with parts of its own also the part to read")
    num_workers: Whole | None = about("processes; null = all cores")
