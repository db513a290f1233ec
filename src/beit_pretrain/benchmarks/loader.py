"""`bench loader`: images per second that one core turns from files into what a training step needs, ours and theirs.

All variants run in one process and one thread, in turn; the median of CPU time counts. All of them read the same images
from temporary shards (by index and `pread`, from the page cache), draw masks with the same code and end with a batch:

* `reference`: the authors' loader. PIL decodes in full, torchvision's ColorJitter on the whole image, flip, one box
  cropped twice with PIL (bicubic for the backbone, Lanczos for the tokenizer), both as float tensors, normalised.
* `reference_uint8`: the same without the conversion to float, which ours leaves to the device.
* `exact`, `fast`: ours, from the images as they are (`data.pil_reference=true` and the default).
* `resized`: `fast` from shards whose images' shorter side was shrunk to 288 pixels (`shards make resize=288`).
* `stream`: `fast` from the same shards read one after another (`data.order=stream`).
* `in_place`: `fast` from the files as they lie in a folder. The ratios of these two to `fast` are reported.
* `cached`: as `resized`, from a folder of cached tokens: the backbone's view alone, as its record says, and the tokens
  (made for this by a stand-in for the tokenizer, through the code of the verb `tokenize`).

Ours leave to the training device what `reference` does itself: conversion to float, normalisation and, but for `exact`,
the jitter. The row `device part` says how many images a second that takes on this core, for both views of `fast`.
"""

from __future__ import annotations

import io
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d
from torch.utils.data import default_collate
from torchvision.transforms import ColorJitter, InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as F
from tqdm import tqdm

from beit_pretrain.benchmarks.blocks import Block, Results
from beit_pretrain.benchmarks.measure import in_turn
from beit_pretrain.data.dataset import BatchSchedule, ShardDataset
from beit_pretrain.data.manifest import MANIFEST
from beit_pretrain.data.order import MASK, Order, generator
from beit_pretrain.data.reader import ShardReader
from beit_pretrain.data.settings import DataSettings, SourceSettings
from beit_pretrain.data.sources import list_images, read_candidate
from beit_pretrain.data.stream import StreamDataset, StreamSource
from beit_pretrain.data.write.make_shards import make_shards
from beit_pretrain.errors import UserError, stop_if_memory_was_short
from beit_pretrain.fileio import expand_home
from beit_pretrain.models.backbone import patch_grid
from beit_pretrain.tokenizers.token_cache import CachedTokens, TokenFolder
from beit_pretrain.tokenizers.tokenize import make_tokens
from beit_pretrain.tokenizers.tokenizer import Tokenizer
from beit_pretrain.transforms import scaled_decoding as decoding
from beit_pretrain.transforms.image_io import open_image, reason, to_rgb
from beit_pretrain.transforms.jitter import HALF, jittered_views, normalise
from beit_pretrain.transforms.masking import BlockwiseMask
from beit_pretrain.transforms.views import TwoViewTransform

RESIZE = 288  # shorter side in the shards of `resized` and `cached`, pixels
BATCH = 32
STREAM_BUFFER = 256  # images
PATCH = 16  # pixels
REFERENCE, DEVICE_PART = "reference", "device part"


class Sides(NamedTuple):
    """Sides in pixels of the backbone's and the tokenizer's view."""

    image: int
    token_image: int


def read_photos(src: str | Path, limit: int) -> tuple[list[bytes], int]:
    """At most `limit` encoded images that decode, and the number of those that do not.

    Of a shard folder the first, of a folder or tar evenly spaced ones. Raises UserError if there is no image.
    """
    read: Callable[[Any], bytes] = read_candidate
    places: list[Any]
    if (expand_home(src) / MANIFEST).is_file():
        reader = ShardReader(src)
        order = Order(reader.sizes, shuffle=False)  # shards stand in random order already
        places, read = [order.sample_at(i) for i in range(min(limit, reader.samples))], lambda s: reader.read(s).data
    else:
        candidates = list_images(src)
        count = min(limit, len(candidates))
        places = [candidates[i * len(candidates) // count] for i in range(count)]
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
    return files, len(places) - len(files)


def sides_for(cfg: Any, tokenizer: Tokenizer | None) -> Sides:
    """Raises UserError if there is no size, or the tokenizer's view cannot be cut into whole tokens."""
    if cfg.image_size is None:
        raise UserError("image_size must be the side of the backbone's view in pixels, such as 224, not null")
    sides = Sides(cfg.image_size, cfg.token_image_size or max(1, cfg.image_size // 2))
    if tokenizer is not None and sides.token_image % tokenizer.downsample:
        pixels = f"{tokenizer.downsample}, the tokenizer's pixels a token"
        raise UserError(f"token_image_size={sides.token_image} is not divisible by {pixels}")
    return sides


class Reference(ShardDataset):
    """The authors' transform of every sample (beit/datasets.py, DataAugmentationForBEiT), with torchvision and PIL.

    `floats`: it ends with normalised float tensors as theirs, not with uint8.
    """

    def __init__(self, *args, floats: bool, **settings):
        super().__init__(*args, **settings)
        self.floats, self.jitter = floats, ColorJitter(0.4, 0.4, 0.4)

    def __getitem__(self, micro_batch: int) -> dict[str, Tensor]:
        return default_collate([self.tensors(position) for position in self.plan.positions(micro_batch)])

    def tensors(self, position: int) -> dict[str, Tensor]:
        """The sample at a position; jitter, flip and crop are torchvision's own draws."""
        data, _ = self.reader.read(self.order.sample_at(position))
        image = self.jitter(Image.open(io.BytesIO(data)).convert("RGB"))
        if torch.rand(1) < 0.5:
            image = F.hflip(image)
        box = RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3])
        views = [
            F.resized_crop(image, *box, [self.views.image_size] * 2, InterpolationMode.BICUBIC),
            F.resized_crop(image, *box, [self.views.token_image_size] * 2, InterpolationMode.LANCZOS),
        ]
        large, small = map(F.to_tensor if self.floats else F.pil_to_tensor, views)
        if self.floats:
            large, small = F.normalize(large, [0.5] * 3, [0.5] * 3), small * 0.8 + 0.1
        assert self.masking is not None
        mask = self.masking.draw(generator(self.seed, position, MASK))
        return {"image": large, "token_image": small, "mask": torch.from_numpy(mask)}


def mean_grey(image_BCHW: Tensor) -> Tensor:
    """The mean value of each patch, 0 to 255."""
    return (avg_pool2d(image_BCHW.mean(1, keepdim=True), 8) * 255).long().flatten(1)


# A stand-in for a tokenizer: which tokens a loader reads does not matter.
TOKENIZER: Any = SimpleNamespace(vocab_size=256, downsample=8, in_chans=3, encode=mean_grey, digest=lambda: "0" * 64)
TOKENIZER.to = lambda device: TOKENIZER


def make_variants(
    files: list[bytes], folder: Path, sides: tuple[int, int], seed: int
) -> dict[str, ShardDataset | StreamDataset]:
    """Write the temporary shards and build every variant's data set over them."""
    (folder / "files").mkdir()
    for i, data in enumerate(files):
        (folder / "files" / f"{i:06d}.image").write_bytes(data)
    grid = patch_grid(sides[0], PATCH)
    cap = round(75 / 196 * grid[0] * grid[1])
    common = []
    for name, resize in (("plain", None), ("resized", RESIZE)):
        (shards,) = make_shards(folder / "files", folder / name, resize=resize, num_workers=1)
        reader = ShardReader(shards)
        common.append((reader, Order(reader.sizes, seed), BatchSchedule(BATCH)))
    plain, small = common
    views = TwoViewTransform(image_size=sides[0], token_image_size=8 * grid[0])
    make_tokens(small[0], folder / "tokens", TOKENIZER, views, grid, count=1)  # as `tokenize` does
    tokens = CachedTokens([TokenFolder(folder / "tokens")], small[0], views, grid)
    masking = BlockwiseMask(grid=grid, max_patches=cap, min_block=min(16, cap))
    settings: dict[str, Any] = {"masking": masking, "seed": seed}
    fast = TwoViewTransform(image_size=sides[0], token_image_size=sides[1])
    in_place = ShardReader(folder / "files", SourceSettings(cache_dir=str(folder / "cache")))
    tars = [str(path) for path in sorted((folder / "plain").rglob("*.tar"))]
    choice = DataSettings(train=tars, order="stream", shuffle_buffer=STREAM_BUFFER)
    stream = StreamDataset(StreamSource([tars], choice, None, []), plain[2], fast, total=2**62, **settings)
    return {
        REFERENCE: Reference(*plain, fast, floats=True, **settings),
        "reference_uint8": Reference(*plain, fast, floats=False, **settings),
        "exact": ShardDataset(*plain, fast.model_copy(update={"pil_reference": True}), **settings),
        "fast": ShardDataset(*plain, fast, **settings),
        "stream": stream,
        "in_place": ShardDataset(in_place, Order(in_place.sizes, seed), BatchSchedule(BATCH), fast, **settings),
        "resized": ShardDataset(*small, fast, **settings),
        "cached": ShardDataset(*small, tokens.views, tokens=tokens, **settings),
    }


def batches_of(dataset: ShardDataset | StreamDataset) -> Callable[[int], object]:
    """A function of the number of a batch; a stream gives its next one whatever the number."""
    if isinstance(dataset, StreamDataset):
        batches = iter(dataset)
        return lambda number: next(batches)
    return dataset.__getitem__


def measure(work: Mapping[str, Callable[[int], object]], rounds: int, batches: int) -> dict[str, list[float]]:
    """Images per CPU second of all work in every round, of `batches` batches."""

    def rate(make: Callable[[int], object], number: int) -> float:
        start = time.process_time()
        for batch in range(number * batches, (number + 1) * batches):
            make(batch)
        return batches * BATCH / (time.process_time() - start)

    for make in work.values():
        make(0)  # opens files, builds tables
    *_, rates = in_turn({name: partial(rate, make) for name, make in work.items()}, rounds)
    return rates


def device_part(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Both views of a batch as network inputs: the work that ours leaves to the device and `reference` does itself."""
    image, token_image = jittered_views(batch)
    return normalise(image, HALF, HALF), token_image * 0.8 + 0.1


def bench_loader(cfg: Any) -> Results:
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    sides = sides_for(cfg, None)
    if min(patch_grid(sides.image, PATCH)) < 2:
        raise UserError(f"image_size={sides.image} is one patch; a mask needs at least 2 x 2, image_size={2 * PATCH}")
    files, bad = read_photos(cfg.src, cfg.images)
    with tempfile.TemporaryDirectory(prefix="beit_pretrain-bench-") as folder:
        variants = make_variants(files, Path(folder), sides, cfg.seed)
        batches = max(1, len(files) // BATCH)
        work = {name: batches_of(dataset) for name, dataset in variants.items()}
        ready: list[Any] = [work["fast"](number) for number in range(batches)]
        work[DEVICE_PART] = lambda number: device_part(ready[number % batches])
        rates = measure(work, cfg.rounds, batches)
    median = {name: statistics.median(values) for name, values in rates.items()}
    to_fast = {
        name: statistics.median(one / fast for one, fast in zip(rates[name], rates["fast"], strict=True))
        for name in ("stream", "in_place")
    }
    ratio = {name: median[name] / median[REFERENCE] for name in variants}
    rows = []
    for name, values in rates.items():
        times = f"{ratio[name]:.2f}" if name in ratio else ""
        rows.append([name, f"{median[name]:.0f}", f"{min(values):.0f} to {max(values):.0f}", times])
    found: dict[str, Any] = {"images": len(files), "not_decoded": bad, "rounds": cfg.rounds, "seed": cfg.seed}
    found |= {"threads": torch.get_num_threads(), "machine": platform.machine()}
    found |= {"simplejpeg": decoding.simplejpeg is not None, **sides._asdict()}
    found |= {f"{REFERENCE}_images_per_s_core": median[REFERENCE]}
    found |= {name: times for name, times in ratio.items() if name != REFERENCE}
    found |= {f"{name}_to_fast": times for name, times in to_fast.items()}
    found |= {"device_part_images_per_s_core": median[DEVICE_PART], "device_part_rounds": rates.pop(DEVICE_PART)}
    rows += [[f"{name} to fast", f"{times:.2f}", "", ""] for name, times in to_fast.items()]
    head = ("variant", "images/s and core", "rounds", "times the reference")
    return [Block(head, rows)], {"bench": "loader", **found, "images_per_s_core": rates}
