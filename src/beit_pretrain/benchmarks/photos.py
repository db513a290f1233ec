"""Which images `bench views` and `bench loader` look at."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig
from tqdm import tqdm

from beit_pretrain.data.manifest import MANIFEST
from beit_pretrain.data.order import Order
from beit_pretrain.data.reader import ShardReader
from beit_pretrain.data.sources import list_images, read_candidate
from beit_pretrain.errors import UserError, stop_if_memory_was_short
from beit_pretrain.tokenizers.tokenizer import Tokenizer
from beit_pretrain.transforms.image_io import open_image, reason, to_rgb


class Sides(NamedTuple):
    """Sides in pixels of the backbone's and the tokenizer's view."""

    image: int
    token_image: int


class Photos(NamedTuple):
    """Encoded images, all of which decode, and how many of the source do not."""

    files: list[bytes]
    bad: int


def read_photos(src: str | Path, limit: int) -> Photos:
    """At most `limit` image files of a shard folder, or evenly spaced ones of a folder or tar.

    Raises UserError if there is no source or none of its files decodes.
    """
    read: Callable[[Any], bytes]
    places: list[Any]
    if (Path(src).expanduser() / MANIFEST).is_file():
        reader = ShardReader(src)
        order = Order(reader.sizes, shuffle=False)  # shards stand in random order already
        places = [order.sample_at(i) for i in range(min(limit, reader.samples))]
        read = lambda sample: reader.read(sample).data  # noqa: E731
    else:
        candidates = list_images(src)
        count = min(limit, len(candidates))
        places = [candidates[i * len(candidates) // count] for i in range(count)]
        read = read_candidate
    files, why = [], ""
    for place in tqdm(places, desc="reading", unit=" images"):
        try:
            data = read(place)
            with open_image(data) as image:
                to_rgb(image)
            files.append(data)
        except UserError:
            raise
        except Exception as error:  # Pillow's decoders raise nearly everything on broken files
            stop_if_memory_was_short(error, f"an image of {src}")
            why = reason(error)
    if not files:
        raise UserError(f"none of the {len(places)} files in {src} is a usable image ({why})")
    return Photos(files, len(places) - len(files))


def sides_for(cfg: DictConfig, tokenizer: Tokenizer | None) -> Sides:
    """Raises UserError if there is no size, or the tokenizer's view cannot be cut into whole tokens."""
    if cfg.image_size is None:
        raise UserError("image_size must be the side of the backbone's view in pixels, such as 224, not null")
    token_image = cfg.token_image_size or max(1, cfg.image_size // 2)
    if tokenizer is not None and token_image % tokenizer.downsample:
        raise UserError(
            f"token_image_size={token_image} is not divisible by {tokenizer.downsample}, the tokenizer's pixels a token"
        )
    return Sides(cfg.image_size, token_image)
