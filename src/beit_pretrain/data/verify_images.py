"""Decodes every image of a source that has no manifest to compare with (`shards verify`)."""

from __future__ import annotations

from functools import partial

from tqdm import tqdm

from beit_pretrain.data.order import Sample
from beit_pretrain.data.reader import ShardReader
from beit_pretrain.errors import UserError, stop_if_memory_was_short
from beit_pretrain.processes import cores, in_order
from beit_pretrain.transforms.image_io import open_image, reason, to_rgb


def faults(reader: ShardReader, progress: bool = True, num_workers: int | None = None) -> list[str]:
    """A line for every image or shard that cannot be read. `num_workers`: None = all cores."""
    problems: list[str] = []
    with (
        in_order(min(num_workers or cores(), len(reader.shards))) as run,
        tqdm(total=reader.samples, unit=" images", desc="verify", disable=not progress) as bar,
    ):
        for shard, found in enumerate(run(partial(_faults_of, reader), range(len(reader.shards)))):
            problems += found
            bar.update(reader.sizes[shard])
    return problems


def _faults_of(reader: ShardReader, shard: int) -> list[str]:
    problems: list[str] = []
    for row in range(reader.sizes[shard]):
        sample = Sample(shard, row)
        try:
            with open_image(reader.read(sample).data) as image:
                to_rgb(image)
        except UserError as error:  # the whole shard
            return [*problems, str(error)]
        except Exception as error:  # Pillow's decoders raise nearly everything on broken files
            stop_if_memory_was_short(error, reader.where(shard))
            problems.append(f"{reader.where(shard)}: {reader.key(sample)}: {reason(error)}")
    return problems
