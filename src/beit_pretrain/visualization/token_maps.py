"""Token maps: the visual token of each patch, as a colour and a number.

Shapes: B batch, C channels, H W pixels, N patches.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from beit_pretrain.visualization import grids
from beit_pretrain.visualization.fonts import font
from beit_pretrain.visualization.overlays import palette

CELL = 288
NUMBERS = 10  # height of a number
SMALLEST = 26  # pixels of a square in which one can be read


def token_map(ids_N: Tensor, vocab_size: int, cell: int = CELL, hidden_N: Tensor | None = None) -> Image.Image:
    """The ids of a square grid: a colour for each token, its number if there is room; hidden ones are grey."""
    side = math.isqrt(len(ids_N))
    ids = ids_N.cpu().view(side, side).numpy()
    colours = palette(vocab_size)[ids]
    hidden = np.zeros_like(ids, bool) if hidden_N is None else hidden_N.cpu().view(side, side).numpy()
    colours[hidden] = round(255 * grids.GREY)
    picture = Image.fromarray(colours).resize((cell, cell), Image.Resampling.NEAREST)
    square, draw = cell / side, ImageDraw.Draw(picture)
    for (row, column), number in np.ndenumerate(ids):
        if square >= SMALLEST and not hidden[row, column]:
            middle = ((column + 0.5) * square, (row + 0.5) * square)
            draw.text(middle, str(number), "white", font(NUMBERS), "mm", stroke_width=1, stroke_fill="black")
    return picture


def token_sheet(image_BCHW: Tensor, decoded_BCHW: Tensor, ids_BN: Tensor, vocab_size: int) -> Image.Image:
    """A row for each image: image | its tokens | decoded from them."""
    rows = [
        [grids.to_pil(image), token_map(ids, vocab_size), grids.to_pil(decoded)]
        for image, ids, decoded in zip(image_BCHW, ids_BN, decoded_BCHW, strict=True)
    ]
    return grids.sheet(rows, ["image", "its tokens", "decoded from the tokens"], None, CELL)
