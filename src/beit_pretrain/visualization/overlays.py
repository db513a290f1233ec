"""Label maps in colour: a palette, overlays on the image, a legend of the classes that occur.

Label maps are (H, W) uint8, IGNORE for pixels that do not count; pictures are PIL images.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from beit_pretrain.transforms.segmentation import IGNORE
from beit_pretrain.visualization.fonts import SMALL
from beit_pretrain.visualization.fonts import font as font_of
from beit_pretrain.visualization.grids import stack

GOLDEN = 0.618033988749895  # turns between neighbouring classes: far apart in hue, however many there are
OPACITY = 0.6
GAP, LINE, SWATCH = 6, 15, 11
IGNORED = (0, 0, 0)


def palette(classes: int) -> np.ndarray:
    """(classes, 3) uint8 colours, the same for a class whatever the number of classes."""
    hues = (np.arange(classes) * GOLDEN) % 1
    shades = [(0.75, 1.0), (0.95, 0.75), (0.45, 0.95)]  # saturation and value take turns
    colours = [colorsys.hsv_to_rgb(hue, *shades[i % 3]) for i, hue in enumerate(hues)]
    return (np.array(colours).reshape(-1, 3) * 255).round().astype(np.uint8)


def overlay(image: Image.Image, labels_HW: np.ndarray, classes: int) -> Image.Image:
    """The image under the colours of a label map of its size; ignored pixels are black."""
    colours = np.zeros((256, 3), np.uint8)
    colours[:classes] = palette(classes)[:256]
    colours[IGNORE] = IGNORED
    pixels = np.asarray(image.convert("RGB")).astype(np.float32)
    mixed = (1 - OPACITY) * pixels + OPACITY * colours[labels_HW]
    return Image.fromarray(mixed.round().astype(np.uint8))


def legend(present: Sequence[int], names: Sequence[str], width: int) -> Image.Image:
    """A strip of swatches with names, `width` pixels wide, as high as needed."""
    font, colours = font_of(SMALL), palette(len(names))
    entries = [(names[i].split(",")[0].strip(), tuple(int(c) for c in colours[i])) for i in present if i != IGNORE]
    if IGNORE in present:
        entries.append(("not counted", IGNORED))
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    x, y, places = GAP, GAP, []
    for name, colour in entries:
        needed = SWATCH + 4 + int(measure.textlength(name, font)) + 2 * GAP
        if x > GAP and x + needed > width:
            x, y = GAP, y + LINE
        places.append((x, y, name, colour))
        x += needed
    strip = Image.new("RGB", (width, y + LINE + GAP), "white")
    draw = ImageDraw.Draw(strip)
    for x, y, name, colour in places:
        draw.rectangle((x, y, x + SWATCH, y + SWATCH), fill=colour, outline="black")
        draw.text((x + SWATCH + 4, y), name, fill="black", font=font)
    return strip


def comparison(
    image: Image.Image, maps: Sequence[tuple[str, np.ndarray]], names: Sequence[str], cell: int = 320
) -> Image.Image:
    """One row: the image, then an overlay for each (caption, label map) of its size; a legend of all below."""
    pictures = [image.convert("RGB"), *(overlay(image, labels, len(names)) for _, labels in maps)]
    factor = cell / max(image.size)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    width = len(pictures) * (size[0] + GAP) + GAP
    present = sorted({int(i) for _, labels in maps for i in np.unique(labels)})
    row = Image.new("RGB", (width, LINE + size[1] + GAP), "white")
    draw, font = ImageDraw.Draw(row), font_of(SMALL)
    for number, (picture, caption) in enumerate(zip(pictures, ("image", *(c for c, _ in maps)), strict=True)):
        x = GAP + number * (size[0] + GAP)
        draw.text((x, 1), caption, fill="black", font=font)
        enlarged = max(size) > max(picture.size)
        resample = Image.Resampling.NEAREST if enlarged else Image.Resampling.BILINEAR
        row.paste(picture.resize(size, resample), (x, LINE))
    return stack([row, legend(present, names, width)])
