"""`bench loader`: images per second that one core turns from files into what a training step needs, ours and theirs.

All variants run in one process and one thread, in turn, round after round, so that whatever else the machine does
slows all of them alike; what counts is CPU time, and of the rounds the median. All of them read the same images from
temporary shards (by index and `pread`, from the page cache), draw masks with the same code and end with a collated
batch:

* `reference`: the authors' loader. PIL decodes in full, torchvision's ColorJitter on the whole image, flip, one box
  cropped twice with PIL (bicubic for the backbone, Lanczos for the tokenizer), both as float tensors, normalised.
* `reference_uint8`: the same without the conversion to float, which ours leaves to the device.
* `pil_reference`, `fast`: ours, from the images as they are (`data.pil_reference=true` and the default).
* `resized`: `fast` from shards whose images' shorter side was shrunk to 288 pixels (`shards make resize=288`).
* `cached`: as `resized`, from a folder of cached tokens: the backbone's view alone, as its record says, and the tokens
  (made for this by a stand-in for the tokenizer, through the code of the verb `tokenize`).

All of ours leave to the training device what `reference` has done: conversion to float, normalisation and, but for
`pil_reference`, the jitter. `device part` says how many images a second that takes on this core, both views of `fast`: a row of
its own, in no ratio.
"""

from __future__ import annotations

import hashlib
import io
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d
from torchvision.transforms import ColorJitter, InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as F
from tqdm import tqdm

from beit_pretrain.benchmarks.photos import read_photos, sides_for
from beit_pretrain.data.dataset import BatchSchedule, ShardDataset
from beit_pretrain.data.order import MASK, Order, generator
from beit_pretrain.data.reader import ShardReader
from beit_pretrain.data.write.make_shards import make_shards
from beit_pretrain.errors import UserError
from beit_pretrain.models.backbone import patch_grid
from beit_pretrain.tables import table
from beit_pretrain.tokenizers.token_cache import CachedTokens, TokenFolder
from beit_pretrain.tokenizers.tokenize import make_tokens
from beit_pretrain.transforms import scaled_decoding as decoding
from beit_pretrain.transforms.jitter import HALF, jittered_views, normalise
from beit_pretrain.transforms.masking import BlockwiseMask
from beit_pretrain.transforms.views import TwoViewTransform

RESIZE = 288  # shorter side in the shards of `resized` and `cached`, pixels
BATCH = 32
PATCH = 16  # pixels
REFERENCE = "reference"


class Reference(ShardDataset):
    """The authors' transform of every sample (beit/datasets.py, DataAugmentationForBEiT), with torchvision and PIL.

    Args:
        floats: end with normalised float tensors as they do, not with uint8.
        sides: of the backbone's and the tokenizer's view, pixels.
    """

    def __init__(self, *args, floats: bool, sides: tuple[int, int], **settings):
        super().__init__(*args, **settings)
        self.floats, self.sides, self.jitter = floats, sides, ColorJitter(0.4, 0.4, 0.4)

    def __getitem__(self, micro_batch: int) -> dict[str, Tensor]:
        samples = [self.tensors(position) for position in self.plan.positions(micro_batch)]
        return {key: torch.stack([s[key] for s in samples]) for key in samples[0]}

    def tensors(self, position: int) -> dict[str, Tensor]:
        """The sample at a position; jitter, flip and crop are torchvision's own draws."""
        data, _ = self.reader.read(self.order.sample_at(position))
        image = self.jitter(Image.open(io.BytesIO(data)).convert("RGB"))
        if torch.rand(1) < 0.5:
            image = F.hflip(image)
        box = RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3])
        how = (InterpolationMode.BICUBIC, InterpolationMode.LANCZOS)
        views = [F.resized_crop(image, *box, [side, side], mode) for side, mode in zip(self.sides, how)]
        if self.floats:
            large, small = F.normalize(F.to_tensor(views[0]), [0.5] * 3, [0.5] * 3), F.to_tensor(views[1]) * 0.8 + 0.1
        else:
            large, small = map(F.pil_to_tensor, views)
        assert self.masking is not None
        mask = self.masking.draw(generator(self.seed, position, MASK))
        return {"image": large, "token_image": small, "mask": torch.from_numpy(mask)}


class MeanGrey:
    """In place of a tokenizer, as no loader looks at which tokens it reads: the mean value of each patch, 0 to 255."""

    vocab_size, downsample, in_chans = 256, 8, 3

    def encode(self, image_BCHW: Tensor) -> Tensor:
        return (avg_pool2d(image_BCHW.mean(1, keepdim=True), self.downsample) * 255).long().flatten(1)

    def decode(self, ids_BN: Tensor) -> Tensor:
        raise NotImplementedError

    def to(self, device: torch.device) -> MeanGrey:
        return self

    def digest(self) -> str:
        return hashlib.sha256(b"mean grey").hexdigest()


def cached_tokens(reader: ShardReader, folder: Path, views: TwoViewTransform, grid: tuple[int, int]) -> CachedTokens:
    """Tokens of one view of each image, made as `tokenize` makes them."""
    make_tokens(reader, folder, MeanGrey(), views, grid, count=1)
    return CachedTokens([TokenFolder(folder)], reader, views, grid)


def make_variants(files: list[bytes], folder: Path, sides: tuple[int, int], seed: int) -> dict[str, ShardDataset]:
    """Write the temporary shards and build every variant's data set over them."""
    (folder / "files").mkdir()
    for i, data in enumerate(files):
        (folder / "files" / f"{i:06d}.image").write_bytes(data)
    grid = patch_grid(sides[0], PATCH)
    cap = round(75 / 196 * grid[0] * grid[1])
    masking = BlockwiseMask(grid, cap, min_block=min(16, cap))
    common = []
    for name, resize in (("plain", None), ("resized", RESIZE)):
        (shards,) = make_shards(folder / "files", folder / name, resize=resize, num_workers=1)
        reader = ShardReader(shards)
        common.append((reader, Order(reader.sizes, seed), BatchSchedule(BATCH)))
    plain, small = common
    settings: dict[str, Any] = {"masking": masking, "seed": seed}
    fast = TwoViewTransform(*sides)
    tokens = cached_tokens(small[0], folder / "tokens", TwoViewTransform(sides[0], 8 * grid[0]), grid)
    return {
        REFERENCE: Reference(*plain, fast, floats=True, sides=sides, **settings),
        "reference_uint8": Reference(*plain, fast, floats=False, sides=sides, **settings),
        "exact": ShardDataset(*plain, TwoViewTransform(*sides, pil_reference=True), **settings),
        "fast": ShardDataset(*plain, fast, **settings),
        "resized": ShardDataset(*small, fast, **settings),
        "cached": ShardDataset(*small, tokens.views, tokens=tokens, **settings),
    }


def measure(variants: dict[str, ShardDataset], rounds: int, batches: int) -> dict[str, list[float]]:
    """Images per CPU second of every variant in every round; a round is `batches` batches of each, in turn."""
    rates: dict[str, list[float]] = {name: [] for name in variants}
    for dataset in variants.values():
        dataset[0]  # opens files, builds tables
    for number in tqdm(range(rounds), desc="measuring", unit=" rounds"):
        seconds = dict.fromkeys(variants, 0.0)
        for batch in range(number * batches, (number + 1) * batches):
            for name, dataset in variants.items():
                start = time.process_time()
                dataset[batch]
                seconds[name] += time.process_time() - start
        for name in variants:
            rates[name].append(batches * BATCH / seconds[name])
    return rates


def device_part(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Both views of a batch as the networks want them: what ours leaves to the device, and `reference` has done."""
    image, token_image = jittered_views(batch)
    return normalise(image, HALF, HALF), token_image * 0.8 + 0.1


def measure_device_part(dataset: ShardDataset, rounds: int, batches: int) -> list[float]:
    """Images per CPU second of `device_part` in every round, of batches that are there."""
    rates = []
    device_part(dataset[0])
    for number in range(rounds):
        seconds = 0.0
        for i in range(number * batches, (number + 1) * batches):
            batch = dataset[i]
            start = time.process_time()
            device_part(batch)
            seconds += time.process_time() - start
        rates.append(batches * BATCH / seconds)
    return rates


def bench_loader(cfg: DictConfig) -> None:
    """Print images per second and core of every variant, and of the device's part, as a table and as JSON."""
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    sides = sides_for(cfg, None)
    if min(patch_grid(sides.image, PATCH)) < 2:
        raise UserError(f"image_size={sides.image} is one patch; a mask needs at least 2 x 2, image_size={2 * PATCH}")
    files, bad = read_photos(cfg.src, cfg.images)
    with tempfile.TemporaryDirectory(prefix="beit_pretrain-bench-") as folder:
        variants = make_variants(files, Path(folder), sides, cfg.seed)
        batches = max(1, len(files) // BATCH)
        rates = measure(variants, cfg.rounds, batches)
        device_rates = measure_device_part(variants["fast"], cfg.rounds, batches)
    median = {name: statistics.median(values) for name, values in rates.items()}
    ratio = {name: median[name] / median[REFERENCE] for name in median}
    rows = [
        [name, f"{median[name]:.0f}", f"{min(values):.0f} to {max(values):.0f}", f"{ratio[name]:.2f}"]
        for name, values in rates.items()
    ]
    device = statistics.median(device_rates)
    rows.append(["device part", f"{device:.0f}", f"{min(device_rates):.0f} to {max(device_rates):.0f}", ""])
    print(table(["variant", "images/s and core", "rounds", "times the reference"], rows))
    about = {
        "images": len(files),
        "not_decoded": bad,
        "rounds": cfg.rounds,
        "threads": torch.get_num_threads(),
        "seed": cfg.seed,
    }
    about |= {"machine": platform.machine(), "simplejpeg": decoding.simplejpeg is not None, **sides._asdict()}
    found: dict[str, Any] = {
        f"{REFERENCE}_images_per_s_core": median.pop(REFERENCE),
        **{name: ratio[name] for name in median},
    }
    found |= {"device_part_images_per_s_core": device, "device_part_rounds": device_rates}
    print(json.dumps({"bench": "loader", **about, **found, "images_per_s_core": rates}))
