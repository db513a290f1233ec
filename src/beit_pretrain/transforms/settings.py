"""Settings of views."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator

from beit_pretrain.settings import Channels, Jitter, Range, Rule, Scale, Settings, Share, Side, Switch, Text, about


def _is_policy(name: str) -> str:
    from timm.data.auto_augment import rand_augment_transform

    rand_augment_transform(name, {})  # AssertionError and ValueError are pydantic's
    return name


AutoAugment = Annotated[
    Text, AfterValidator(_is_policy), Rule("timm's name of a RandAugment policy, such as rand-m9-mstd0.5-inc1")
]


class CropSettings(Settings):
    """The random resized crop and flip of training images."""

    scale: Scale = about("share of the image's area that a random crop takes, [lowest, highest]")
    ratio: Range = about("aspect ratio of a random crop, [lowest, highest]")
    flip: Share = about("probability of a horizontal flip")


class ViewSettings(CropSettings):
    """The two views of an image: for the backbone and for the tokenizer."""

    defaults = "data/shards.yaml tasks/pretrain.yaml:data"

    token_image_size: Side | None = about("side of the tokenizer's view, pixels; null = what gives one token per patch")
    jitter: Jitter = about("strengths of brightness, contrast and saturation jitter; null = none")
    pil_reference: Switch = about("the release's order of operations with PIL, slower")
    channels: Channels = about("of the images: 1 (grey), 3 (RGB) or 4")
