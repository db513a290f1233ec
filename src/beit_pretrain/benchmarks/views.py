"""`bench views`: what our order of operations on an image changes, against the authors' (docs/design.md, departures).

The same images and the same random numbers go through the authors' pipeline (`pil_reference`) and through ours, in full and
one departure at a time. Two kinds of controls give the scale: the smallest changes that anyone would call harmless (a
JPEG round trip, half a pixel), and another draw of the jitter, which is the augmentation's own variation.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from PIL import Image
from scipy.stats import ks_2samp
from torch import Tensor
from tqdm import tqdm

from beit_pretrain.benchmarks.photos import Sides, read_photos, sides_for
from beit_pretrain.data.order import VIEW, generator
from beit_pretrain.tables import table
from beit_pretrain.tokenizers.tokenizer import Tokenizer
from beit_pretrain.transforms.image_io import open_image, to_rgb
from beit_pretrain.transforms.jitter import Jitter, color_jitter, jitter_arrays, jittered_views, pil_jitter
from beit_pretrain.transforms.mean_color_grid import of_image
from beit_pretrain.transforms.scaled_decoding import Crop, resized, scaled_decode
from beit_pretrain.transforms.views import AugmentParams, TwoViewTransform, resized_crop, to_array

OTHER_JITTER = 1_000_003  # added to the seed for another draw of the jitter
BICUBIC, LANCZOS = Image.Resampling.BICUBIC, Image.Resampling.LANCZOS
NO_JITTER = Jitter(np.ones(3, np.float32), np.arange(3))


class Pair(NamedTuple):
    """Both views of one crop, float32 (3, H, W) in [0, 1]."""

    image: Tensor
    token_image: Tensor


Recipe = Callable[[Image.Image, AugmentParams, Sides], Pair]


class Variant(NamedTuple):
    """A way to make the views, and the name of the one that it is compared with."""

    against: str
    make: Recipe
    other: bool = False  # with the jitter of another draw


def on_device(arrays: dict[str, np.ndarray]) -> Pair:
    """What the training device makes of a worker's arrays."""
    views = jittered_views({name: torch.from_numpy(array)[None] for name, array in arrays.items()})
    return Pair(views[0][0], views[1][0])


def unchanged(image: np.ndarray, token_image: np.ndarray) -> Pair:
    """Arrays (3, H, W) as views."""
    return on_device(
        {"image": image, "token_image": token_image} | jitter_arrays(NO_JITTER, np.zeros((64, 3), np.uint8))
    )


def pil_arrays(image: Image.Image, crop: Crop, sides: Sides, flip: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Both views of an RGB image by PIL, bicubic and Lanczos, then, if asked, the flip."""
    large = to_array(resized_crop(image, crop, sides.image, BICUBIC), flip)
    return large, to_array(resized_crop(image, crop, sides.token_image, LANCZOS), flip)


def authors(image: Image.Image, draw: AugmentParams, sides: Sides) -> Pair:
    """Decode in full, jitter and flip the whole image, then crop: the view `pil_reference`."""
    return unchanged(*pil_arrays(jittered_and_flipped(image, draw), draw.crop, sides))


def jittered_and_flipped(image: Image.Image, draw: AugmentParams) -> Image.Image:
    image = pil_jitter(to_rgb(image), draw.jitter)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draw.flip else image


def unjittered(image: Image.Image, draw: AugmentParams, sides: Sides) -> Pair:
    """The authors' views without their jitter."""
    return unchanged(*pil_arrays(to_rgb(image), draw.mirrored(image.width).crop, sides, draw.flip))


def jitter_after(image: Image.Image, draw: AugmentParams, sides: Sides) -> Pair:
    """The authors' views but for the jitter, which comes after the crop, in float."""
    rgb = to_rgb(image)
    large, small = pil_arrays(rgb, draw.mirrored(image.width).crop, sides, draw.flip)
    jitter = jitter_arrays(draw.jitter, of_image(rgb))
    return on_device({"image": large, "token_image": small} | jitter)


def crops_contrast(image: Image.Image, draw: AugmentParams, sides: Sides) -> Pair:
    """The same with contrast relative to the crop's mean grey, each view's own: what this project avoids."""
    arrays = pil_arrays(to_rgb(image), draw.mirrored(image.width).crop, sides, draw.flip)
    jitter = torch.from_numpy(draw.jitter.factors)[None], torch.from_numpy(draw.jitter.order)[None]
    return Pair(*(color_jitter(torch.from_numpy(array)[None].float() / 255, *jitter)[0] for array in arrays))


def scaled(image: Image.Image, draw: AugmentParams, sides: Sides) -> Pair:
    """Without jitter, decoded at the scale that the crop allows."""
    image, crop = scaled_decode(image, draw.mirrored(image.width).crop, max(sides))
    return unchanged(*pil_arrays(image, crop, sides, draw.flip))


def other_filter(image: Image.Image, draw: AugmentParams, sides: Sides) -> Pair:
    """Without jitter, decoded in full, resized by torch: bicubic for both views."""
    top, left, height, width = draw.mirrored(image.width).crop
    array = np.array(to_rgb(image))[top : top + height, left : left + width]
    views = (resized(array, side) for side in sides)
    large, small = ((view.flip(-1) if draw.flip else view).numpy() for view in views)
    return unchanged(large, small)


def ours(image: Image.Image, draw: AugmentParams, sides: Sides) -> Pair:
    """What training sees by default: all departures at once."""
    return on_device(TwoViewTransform(*sides).apply(image, draw))


def encoded_again(image: Image.Image, draw: AugmentParams, sides: Sides) -> Pair:
    """The authors' views of the image after one more JPEG round trip at quality 92."""
    buffer = io.BytesIO()
    to_rgb(image).save(buffer, "JPEG", quality=92)
    return authors(Image.open(io.BytesIO(buffer.getvalue())), draw, sides)


def half_a_pixel(image: Image.Image, draw: AugmentParams, sides: Sides) -> Pair:
    """The authors' views of a box that lies half a pixel of the image further inside the image."""
    image = jittered_and_flipped(image, draw)
    top, left, height, width = draw.crop
    left_f = left + (0.5 if left + width < image.width else -0.5 if left else 0)
    top_f = top + (0.5 if top + height < image.height else -0.5 if top else 0)
    box = (left_f, top_f, left_f + width, top_f + height)
    large, small = (image.resize((side, side), how, box=box) for side, how in zip(sides, (BICUBIC, LANCZOS)))
    return unchanged(to_array(large), to_array(small))


EXACT, PLAIN = "exact", "exact, no jitter"
VARIANTS: dict[str, Variant] = {
    EXACT: Variant(EXACT, authors),
    PLAIN: Variant(PLAIN, unjittered),
    "fast: all departures": Variant(EXACT, ours),
    "only jitter after the crop": Variant(EXACT, jitter_after),
    "the same, crop's contrast": Variant(EXACT, crops_contrast),
    "only scaled decoding": Variant(PLAIN, scaled),
    "only the resizing filter": Variant(PLAIN, other_filter),
    "control: half a pixel": Variant(EXACT, half_a_pixel),
    "control: JPEG at quality 92": Variant(EXACT, encoded_again),
    "control: another jitter": Variant(EXACT, authors, other=True),
}


class Tally:
    """What is gathered of one variant: per view its pixel statistics, its distance and its share of other tokens."""

    def __init__(self) -> None:
        self.mean: list[np.ndarray] = []  # (3,) per position, of the backbone's view
        self.std: list[np.ndarray] = []
        self.distance: list[list[float]] = []  # mean absolute difference, backbone's and tokenizer's view
        self.changed: list[float] = []

    def add(self, pair: Pair, reference: Pair, ids_N: Tensor | None, reference_ids_N: Tensor | None) -> None:
        self.mean.append(pair.image.mean((1, 2)).numpy())
        self.std.append(pair.image.std((1, 2)).numpy())
        self.distance.append([(a - b).abs().mean().item() for a, b in zip(pair, reference)])
        if ids_N is not None and reference_ids_N is not None:
            self.changed.append((ids_N != reference_ids_N).float().mean().item())

    def summary(self, reference: Tally) -> dict[str, Any]:
        """Levels of 0 ... 255; `ks` is the largest Kolmogorov-Smirnov distance of the three channels."""
        found: dict[str, Any] = {}
        for name in ("mean", "std"):
            own, others = np.array(getattr(self, name)), np.array(getattr(reference, name))
            found |= {name: 255 * float(own.mean()), f"{name}_sd": 255 * float(own.std(0).mean())}
            found[f"{name}_ks"] = max(
                float(ks_2samp(own[:, c], others[:, c], method="asymp").statistic) for c in range(3)
            )
        distance = 255 * np.array(self.distance).mean(0)
        found |= {"image_difference": float(distance[0]), "token_image_difference": float(distance[1])}
        found["tokens_changed"] = float(np.mean(self.changed)) if self.changed else None
        return found


@torch.no_grad()
def compare(
    files: list[bytes], positions: int, seed: int, sides: Sides, tokenizer: Tokenizer | None
) -> dict[str, dict[str, Any]]:
    """Every variant's summary, over `positions` draws of the images in turn."""
    tallies = {name: Tally() for name in VARIANTS}
    views = TwoViewTransform(*sides)
    for position in tqdm(range(positions), desc="comparing", unit=" positions"):
        data = files[position % len(files)]
        pairs = {name: _pair(data, views, variant, seed, position, sides) for name, variant in VARIANTS.items()}
        ids: dict[str, Tensor | None] = dict.fromkeys(VARIANTS)
        if tokenizer is not None:
            ids = dict(zip(VARIANTS, tokenizer.encode(torch.stack([pair.token_image for pair in pairs.values()]))))
        for name, variant in VARIANTS.items():
            tallies[name].add(pairs[name], pairs[variant.against], ids[name], ids[variant.against])
    return {name: tallies[name].summary(tallies[variant.against]) for name, variant in VARIANTS.items()}


def _pair(data: bytes, views: TwoViewTransform, variant: Variant, seed: int, position: int, sides: Sides) -> Pair:
    with open_image(data) as image:
        draw = views.draw(image.size, generator(seed, position, VIEW))
        if variant.other:
            other = views.draw(image.size, generator(seed + OTHER_JITTER, position, VIEW))
            draw = draw._replace(jitter=other.jitter)
        return variant.make(image, draw, sides)


def bench_views(cfg: DictConfig) -> None:
    """Print the effect of each departure as a table and as JSON."""
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    tokenizer = instantiate(cfg.tokenizer) if cfg.get("tokenizer") else None
    sides = sides_for(cfg, tokenizer)
    files, bad = read_photos(cfg.src, cfg.images)
    positions = cfg.positions or len(files)
    found = compare(files, positions, cfg.seed, sides, tokenizer)
    header = ["views", "against", "view differs by", "token view", "mean (sd)", "KS", "std (sd)", "KS"]
    header += ["tokens changed"] if tokenizer else []
    rows = []
    for name, f in found.items():
        row = [name, VARIANTS[name].against if VARIANTS[name].against != name else ""]
        row += [f"{f['image_difference']:.2f}", f"{f['token_image_difference']:.2f}"]
        for kind in ("mean", "std"):
            row += [f"{f[kind]:.2f} ({f[f'{kind}_sd']:.2f})", f"{f[f'{kind}_ks']:.3f}"]
        rows.append(row + ([f"{100 * f['tokens_changed']:.1f} %"] if tokenizer else []))
    about = {"images": len(files), "not_decoded": bad, "positions": positions, "seed": cfg.seed, **sides._asdict()}
    if tokenizer:
        about |= {"vocab_size": tokenizer.vocab_size, "tokens": (sides.token_image // tokenizer.downsample) ** 2}
    print(table(header, rows))
    print("differences, means and standard deviations in levels of 0 ... 255")
    print(json.dumps({"bench": "views", **about, "variants": found}))
