"""Grids of images with captions, masked patches.

Images are float tensors (B, C, H, W) in [0, 1]; pictures are PIL images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from beit_pretrain.visualization.fonts import font

GAP, CAPTION = 4, 16
GREY = 0.5


def hide(image_BCHW: Tensor, mask_BN: Tensor) -> Tensor:
    """The images with their masked patches grey. The grid is square: N = rows * rows."""
    rows = math.isqrt(mask_BN.shape[1])
    mask_B1hw = mask_BN.view(-1, 1, rows, rows).float()
    mask = torch.nn.functional.interpolate(mask_B1hw, image_BCHW.shape[-2:], mode="nearest")
    return image_BCHW * (1 - mask) + GREY * mask


def grid(columns: list[Tensor], captions: list[str]) -> Image.Image:
    """One column per tensor of images, one row per image, captions on top. Small images are enlarged to 96 pixels."""
    rows = [[to_pil(image) for image in row] for row in zip(*columns, strict=True)]
    return sheet(rows, captions, None, max(96, int(columns[0].shape[-1])))


def sheet(
    rows: Sequence[Sequence[Image.Image]], captions: Sequence[str], names: Sequence[str] | None, cell: int
) -> Image.Image:
    """Pictures in rows, resized to `cell` pixels; a caption over each column, a name before each row."""
    left, step = 0 if names is None else 64, cell + GAP
    canvas = Image.new("RGB", (left + len(captions) * step + GAP, CAPTION + GAP + len(rows) * step), "white")
    draw = ImageDraw.Draw(canvas)
    for x, caption in enumerate(captions):
        draw.text((left + GAP + x * step, 2), caption, fill="black", font=font())
    for y, row in enumerate(rows):
        top = CAPTION + GAP + y * step
        if names is not None:
            draw.text((GAP, top), names[y], fill="black", font=font())
        for x, picture in enumerate(row):
            canvas.paste(picture.resize((cell, cell), Image.Resampling.NEAREST), (left + GAP + x * step, top))
    return canvas


def captioned(rows: Sequence[Sequence[tuple[Image.Image, str]]], cell: int) -> Image.Image:
    """Rows of pictures, each within a square of `cell` pixels and over its caption of one or several lines.

    A line that is too long loses its beginning: of a path the end tells most.
    """
    lines = max(text.count("\n") + 1 for row in rows for _, text in row)
    across, down = cell + GAP, cell + lines * CAPTION + GAP
    canvas = Image.new("RGB", (max(map(len, rows)) * across + GAP, len(rows) * down + GAP), "white")
    draw = ImageDraw.Draw(canvas)
    for y, row in enumerate(rows):
        for x, (picture, text) in enumerate(row):
            left, top = GAP + x * across, GAP + y * down
            small = ImageOps.contain(picture.convert("RGB"), (cell, cell), Image.Resampling.BICUBIC)
            canvas.paste(small, (left + (cell - small.width) // 2, top + (cell - small.height) // 2))
            for number, line in enumerate(text.split("\n")):
                shown = shortened(line, lambda text: draw.textlength(text, font()) <= cell - GAP)
                draw.text((left, top + cell + number * CAPTION), shown, fill="black", font=font())
    return canvas


def shortened(text: str, fits: Callable[[str], bool]) -> str:
    """The text, or as much of its end as fits behind an ellipsis."""
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    if fits(text):
        return text
    return next((short for n in range(1, len(text)) if fits(short := f"...{text[n:]}")), "...")


def stack(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures one below the other."""
    canvas = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)), "white")
    y = 0
    for picture in pictures:
        canvas.paste(picture, (0, y))
        y += picture.height
    return canvas


def note(text: str, width: int) -> Image.Image:
    """Text on a strip of `width` pixels, in as many lines as it takes."""
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font()) > width - 2 * GAP and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    strip = Image.new("RGB", (width, len(lines) * CAPTION + GAP), "white")
    for number, line in enumerate(lines):
        ImageDraw.Draw(strip).text((GAP, number * CAPTION), line, fill="black", font=font())
    return strip


def to_pil(image_CHW: Tensor) -> Image.Image:
    """An RGB picture of one image; one channel becomes grey, of more than three the first three are shown."""
    image_CHW = image_CHW.detach().float().cpu().clamp(0, 1)
    image_CHW = image_CHW.expand(3, -1, -1) if image_CHW.shape[0] == 1 else image_CHW[:3]
    return Image.fromarray((image_CHW.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))


def save(picture: Image.Image, path: Path) -> None:
    """Write a picture, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
