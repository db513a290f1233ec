"""Patch features in colours, as a contact sheet: image | first three principal components of a layer | of another.

Colour maps are float tensors (B, 3, h, w) in [0, 1].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image
from torch import Tensor

from beit_pretrain.visualization import grids

CELL = 224
NOTE = (
    "Red, green and blue are the first three principal components of a layer's patch features over all images of this "
    "picture: patches of one colour have similar features."
)


def feature_sheet(pictures: Sequence[Image.Image], maps: Mapping[int, Tensor]) -> Image.Image:
    """A row for each image: the image, then its colours of every layer, enlarged. `maps`: {layer: (B, 3, h, w)}."""
    rows = []
    for number, picture in enumerate(pictures):
        colours = [grids.to_pil(map_B3hw[number]).resize((CELL, CELL)) for map_B3hw in maps.values()]
        rows.append([picture.resize((CELL, CELL), Image.Resampling.BICUBIC), *colours])
    sheet = grids.sheet(rows, ["image", *(f"layer {layer}" for layer in maps)], None, CELL)
    return grids.stack([sheet, grids.note(NOTE, sheet.width)])
