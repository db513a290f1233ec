"""Settings of the group `data`: source and order of the images; each task adds its transforms."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Strict

from beit_pretrain.data.listing.settings import ImageKey
from beit_pretrain.settings import (
    Channels,
    Count,
    Gigabytes,
    Name,
    Paths,
    PathStr,
    Positive,
    Seconds,
    Settings,
    Share,
    Whole,
    about,
)

Retries = Annotated[int, Strict(), Field(ge=0, le=100)]
Streams = Annotated[int, Strict(), Field(ge=1, le=4096)]


class RemoteOptions(Settings):
    """How remote shards are read."""

    defaults = "data/shards.yaml"
    positional = ("cache_dir",)

    cache_dir: PathStr | None = about(
        "cache of remote shards on a local disk; null = ~/.cache/beit_pretrain/shards", True
    )
    cache_gb: Gigabytes = about("largest size of the cache, GB", True)
    retries: Retries = about("retries of a transfer, with growing pauses", True)
    timeout: Seconds = about("seconds without a byte after which a transfer has failed", True)


class SourceSettings(RemoteOptions):
    """What is read of a source that is not a shard folder with a manifest."""

    image_key: ImageKey = about("extension (of a tar's members) or column (of parquet) of the image; null = found")
    label_key: Name | None = about("column of the class in parquet and Arrow files; null = found")
    classes: Count | PathStr | None = about("number of classes, or a file of their names, where the source has none")


class DataSettings(SourceSettings):
    """The images of a run, from any source that data/README.md names."""

    # A resumed run compares the images of train and val, not their paths, so they may move.
    train: Paths = about(
        "shards, tars (by braces), images in folders, parquet; local or https://, s3://, gs://, hf://, pipe:; a list",
        True,
    )
    val: Paths | None = about("the same for held-out images; null = no validation", True)
    split: Name | None = about("part that train reads of a source with parts; null = train")
    val_split: Name | None = about("the same for val; null = its validation part")
    order: Literal["auto", "position", "stream"] = about(
        "position: exact, by an index | stream: tars one after another, without one | auto: position where possible",
        True,  # with the other order the data count as others, and the run is not resumed
    )
    samples: Count | None = about("images of an epoch of a stream, where its source does not say")
    shuffle_buffer: Count = about("images that a loader process of a stream shuffles together", True)
    weights: Annotated[list[Positive], Field(min_length=1)] | None = about(
        "shares of the data sets of a list, such as [0.7,0.3]; null = every image of all sets once an epoch"
    )
    channels: Channels = about("channels of the images: 1 (grey), 3 (RGB) or 4; grey is repeated for a tokenizer of 3")
    labels_per_class: Count | None = about("train on only this many images of each class")
    val_batch: Count = about("images in a validation batch", True)
    val_images: Count | None = about("largest number of held-out images")
    num_workers: Whole = about("loader processes of each training process; 0 = none", True)
    shuffle_block_size: Count = about("images of a stream that are shuffled together")
    shuffle_streams: Streams = about("streams; each reads from about shuffle_block_size / (images per shard) shards")
    max_corrupt_fraction: Share = about("share of training images that may be corrupt; above it the run stops", True)
