"""`bench views`: what our order of operations on an image changes, against the authors' (docs/design.md, departures).

The same images and the same random numbers go through the authors' pipeline (`pil_reference`) and through ours, in full
and one departure at a time. Two kinds of controls give the scale: the smallest changes that anyone would call harmless
(a JPEG round trip, half a pixel), and another draw of the jitter, which is the augmentation's own variation.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from hydra.utils import instantiate
from PIL import Image
from scipy.stats import ks_2samp
from torch import Tensor
from tqdm import tqdm

from beit_pretrain.benchmarks.blocks import Block, Results
from beit_pretrain.benchmarks.loader import Sides, read_photos, sides_for
from beit_pretrain.data.order import VIEW, generator
from beit_pretrain.settings import to_dict
from beit_pretrain.tokenizers.tokenizer import Tokenizer
from beit_pretrain.transforms import views
from beit_pretrain.transforms.image_io import open_image, to_rgb
from beit_pretrain.transforms.jitter import color_jitter, jitter_arrays, jittered_views
from beit_pretrain.transforms.mean_color_grid import of_image
from beit_pretrain.transforms.scaled_decoding import Crop, resized, scaled_decode
from beit_pretrain.transforms.views import AugmentParams, TwoViewTransform, to_array

OTHER_JITTER = 1_000_003  # added to the seed for another draw of the jitter
FILTERS = Image.Resampling.BICUBIC, Image.Resampling.LANCZOS  # of the authors' two views


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
    made = jittered_views({name: torch.from_numpy(array)[None] for name, array in arrays.items()})
    return Pair(made[0][0], made[1][0])


def unchanged(image: np.ndarray, token_image: np.ndarray) -> Pair:
    """Arrays (3, H, W) as views."""
    return Pair(*(torch.from_numpy(array).float() / 255 for array in (image, token_image)))


def pil_arrays(image: Image.Image, crop: Crop, sides: Sides, flip: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Both views of an RGB image by PIL, bicubic and Lanczos, then, if asked, the flip."""
    large, small = (views.resized_crop(image, crop, side, how) for side, how in zip(sides, FILTERS, strict=True))
    return to_array(large, flip), to_array(small, flip)


def jittered_and_flipped(image: Image.Image, draw: AugmentParams) -> Image.Image:
    image = views.pil_jitter(to_rgb(image), draw.jitter)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draw.flip else image


def authors(image: Image.Image, draw: AugmentParams, sides: Sides) -> Pair:
    """Decode in full, jitter and flip the whole image, then crop: the view `pil_reference`."""
    return unchanged(*pil_arrays(jittered_and_flipped(image, draw), draw.crop, sides))


def unjittered(
    image: Image.Image, draw: AugmentParams, sides: Sides, scaled: bool = False, by_torch: bool = False
) -> Pair:
    """The authors' views without their jitter.

    `scaled`: decoded at the scale that the crop allows; `by_torch`: resized by torch, bicubic for both views.
    """
    crop = draw.mirrored(image.width).crop
    if scaled:
        image, crop = scaled_decode(image, crop, max(sides))
    if not by_torch:
        return unchanged(*pil_arrays(to_rgb(image), crop, sides, draw.flip))
    top, left, height, width = crop
    array = np.array(to_rgb(image))[top : top + height, left : left + width]
    large, small = (resized(array, side) for side in sides)
    return unchanged(*((view.flip(-1) if draw.flip else view).numpy() for view in (large, small)))


def jitter_after(image: Image.Image, draw: AugmentParams, sides: Sides) -> Pair:
    """The authors' views but for the jitter, which comes after the crop, in float."""
    rgb = to_rgb(image)
    large, small = pil_arrays(rgb, draw.mirrored(image.width).crop, sides, draw.flip)
    return on_device({"image": large, "token_image": small} | jitter_arrays(draw.jitter, of_image(rgb)))


def crops_contrast(image: Image.Image, draw: AugmentParams, sides: Sides) -> Pair:
    """The same with contrast relative to the crop's mean grey, each view's own: what this project avoids."""
    jitter = torch.from_numpy(draw.jitter.factors)[None], torch.from_numpy(draw.jitter.order)[None]
    return Pair(*(color_jitter(view[None], *jitter)[0] for view in unjittered(image, draw, sides)))


def ours(image: Image.Image, draw: AugmentParams, sides: Sides) -> Pair:
    """What training sees by default: all departures at once."""
    return on_device(TwoViewTransform(image_size=sides[0], token_image_size=sides[1]).apply(image, draw))


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
    return unchanged(*(to_array(image.resize((s, s), how, box=box)) for s, how in zip(sides, FILTERS, strict=True)))


EXACT, PLAIN = "exact", "exact, no jitter"
VARIANTS: dict[str, Variant] = {
    EXACT: Variant(EXACT, authors),
    PLAIN: Variant(PLAIN, unjittered),
    "fast: all departures": Variant(EXACT, ours),
    "only jitter after the crop": Variant(EXACT, jitter_after),
    "the same, crop's contrast": Variant(EXACT, crops_contrast),
    "only scaled decoding": Variant(PLAIN, partial(unjittered, scaled=True)),
    "only the resizing filter": Variant(PLAIN, partial(unjittered, by_torch=True)),
    "control: half a pixel": Variant(EXACT, half_a_pixel),
    "control: JPEG at quality 92": Variant(EXACT, encoded_again),
    "control: another jitter": Variant(EXACT, authors, other=True),
}


@torch.no_grad()
def compare(
    files: list[bytes], positions: int, seed: int, sides: Sides, tokenizer: Tokenizer | None
) -> dict[str, dict[str, Any]]:
    """Statistics of every variant, over `positions` draws of the images in turn."""
    drawn, rows = TwoViewTransform(image_size=sides[0], token_image_size=sides[1]), []
    against = [list(VARIANTS).index(variant.against) for variant in VARIANTS.values()]

    def pair_of(variant: Variant, position: int) -> Pair:
        with open_image(files[position % len(files)]) as image:
            draw, other = (drawn.draw(image.size, generator(s, position, VIEW)) for s in (seed, seed + OTHER_JITTER))
            return variant.make(image, draw._replace(jitter=other.jitter) if variant.other else draw, sides)

    for position in tqdm(range(positions), desc="comparing", unit=" positions"):
        pairs = [pair_of(variant, position) for variant in VARIANTS.values()]
        image, token_image = (torch.stack(images) for images in zip(*pairs, strict=True))  # (variants, 3, H, W)
        off = [(view - view[against]).abs().mean((1, 2, 3)) for view in (image, token_image)]
        changed = torch.full((len(pairs),), torch.nan)
        if tokenizer is not None:
            ids = tokenizer.encode(token_image)
            changed = (ids != ids[against]).float().mean(1)
        rows.append(torch.cat([image.mean((2, 3)), image.std((2, 3)), torch.stack([*off, changed], 1)], 1).numpy())
    found = np.array(rows, float).swapaxes(0, 1)  # (variants, positions, 9)
    return {name: statistics(found[i], found[against[i]]) for i, name in enumerate(VARIANTS)}


def statistics(own: np.ndarray, others: np.ndarray) -> dict[str, Any]:
    """In levels of 0 ... 255: means and standard deviations of the backbone's view, with the largest Kolmogorov-Smirnov
    distance (`ks`) of three channels from the other variant's; how far both views are from that's; other tokens.
    """
    found: dict[str, Any] = {}
    for name, channels in (("mean", range(3)), ("std", range(3, 6))):
        values = 255 * own[:, channels]
        found |= {name: float(values.mean()), f"{name}_sd": float(values.std(0).mean())}
        found[f"{name}_ks"] = max(float(ks_2samp(own[:, c], others[:, c], method="asymp").statistic) for c in channels)
    image, token_image, changed = own[:, 6:].mean(0).tolist()
    found |= {"image_difference": 255 * image, "token_image_difference": 255 * token_image}
    return {**found, "tokens_changed": None if np.isnan(changed) else changed}


def bench_views(cfg: Any) -> Results:
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    tokenizer = instantiate(to_dict(cfg.tokenizer)) if cfg.tokenizer else None
    sides = sides_for(cfg, tokenizer)
    files, bad = read_photos(cfg.src, cfg.images)
    positions = cfg.positions or len(files)
    found = compare(files, positions, cfg.seed, sides, tokenizer)
    head = ["views", "against", "view differs by", "token view", "mean (sd)", "KS", "std (sd)", "KS"]
    rows = []
    for name, f in found.items():
        row = [name, VARIANTS[name].against if VARIANTS[name].against != name else ""]
        row += [f"{f['image_difference']:.2f}", f"{f['token_image_difference']:.2f}"]
        for kind in ("mean", "std"):
            row += [f"{f[kind]:.2f} ({f[f'{kind}_sd']:.2f})", f"{f[f'{kind}_ks']:.3f}"]
        rows.append(row + ([f"{100 * f['tokens_changed']:.1f} %"] if tokenizer else []))
    about = {"images": len(files), "not_decoded": bad, "positions": positions, "seed": cfg.seed, **sides._asdict()}
    if tokenizer:
        head.append("tokens changed")
        about |= {"vocab_size": tokenizer.vocab_size, "tokens": (sides.token_image // tokenizer.downsample) ** 2}
    note = Block(text="differences, means and standard deviations in levels of 0 ... 255")
    return [Block(tuple(head), rows), note], {"bench": "views", **about, "variants": found}
