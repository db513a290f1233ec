"""Self-attention of chosen patches, for layers and heads, as in the paper's figure (BEiT, section 3.4, figure 2).

Shapes: B batch, C channels, H W pixels, A heads, h w patches, N = h w, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from beit_pretrain.errors import UserError
from beit_pretrain.models.attention_probabilities import attention_probabilities
from beit_pretrain.models.backbone import Backbone, embed
from beit_pretrain.visualization import grids
from beit_pretrain.visualization.fonts import font

CELL = 112
RED = (230, 30, 30)
NOTE = (
    "Yellow is the largest value of its map, dark is 0. In %: the share of the red patch's attention that goes to the "
    "yellow one."
)


def attention_sheet(
    image_CHW: Tensor,
    maps: Mapping[int, Tensor],
    patches: Sequence[Sequence[int]],
    heads: Sequence[int],
    grid: tuple[int, int],
) -> Image.Image:
    """A row for each patch and layer: the image with the patch in red, the mean over all heads, then single heads.

    `maps`: {layer: probabilities (A, 1 + N, 1 + N)} of this image (`attention_maps`); heads count from 1.
    Each map is scaled to its own largest value, which is written on it in per cent.
    """
    rows, names = [], []
    for row, column in patches:
        for layer, map_ANN in maps.items():
            seen_AN = map_ANN[:, 1 + row * grid[1] + column, 1:]  # the attention of the patch, without [CLS]
            chosen = [seen_AN.mean(0), *(seen_AN[head - 1] for head in heads)]
            rows.append([marked(image_CHW, (row, column), grid), *(heat(map_N, grid) for map_N in chosen)])
            names.append(f"layer {layer}\npatch\n{row}, {column}")
    captions = ["patch in red", "mean of heads", *(f"head {head}" for head in heads)]
    return grids.sheet(rows, captions, names, CELL)


def marked(image_CHW: Tensor, patch: tuple[int, int], grid: tuple[int, int]) -> Image.Image:
    """The image, enlarged, with a red frame round a patch."""
    picture = grids.to_pil(image_CHW).resize((CELL, CELL), Image.Resampling.BICUBIC)
    height, width = CELL / grid[0], CELL / grid[1]
    box = (patch[1] * width, patch[0] * height, (patch[1] + 1) * width - 1, (patch[0] + 1) * height - 1)
    ImageDraw.Draw(picture).rectangle(box, outline=RED, width=2)
    return picture


def heat(map_N: Tensor, grid: tuple[int, int]) -> Image.Image:
    """A map over patches in colours, dark for 0, yellow for its largest value, which is written into it."""
    from matplotlib import colormaps

    values = map_N.detach().float().cpu().view(*grid).numpy()
    most = float(values.max())
    colours = (colormaps["viridis"](values / max(most, 1e-12))[..., :3] * 255).round().astype(np.uint8)
    picture = Image.fromarray(colours).resize((CELL, CELL), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(picture)
    text = f"{most:.0%}" if most >= 0.1 else f"{most:.1%}"
    draw.text((4, CELL - 17), text, fill="white", font=font(), stroke_width=1, stroke_fill="black")
    return picture


@torch.no_grad()
def attention_picture(
    model,
    normalised_BCHW: Tensor,
    shown_BCHW: Tensor,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    patches: Sequence[Sequence[int]] | None = None,
) -> Image.Image:
    """Sheets of several images, one below the other, and a note on how to read them.

    None = the layers at a third, two thirds and the end of the depth; all heads; three patches along the diagonal.
    Raises UserError for a layer, head or patch that the network does not have.
    """
    depth, num_heads, grid = len(model.blocks), int(model.config["num_heads"]), model.grid
    layers = layers or sorted({max(1, round(depth * share)) for share in (1 / 3, 2 / 3, 1)})
    heads = heads or range(1, num_heads + 1)
    patches = patches or [(grid[0] * i // 4, grid[1] * i // 4) for i in (1, 2, 3)]
    for name, values, most in (("layers", layers, depth), ("heads", heads, num_heads)):
        if wrong := [value for value in values if not 1 <= value <= most]:
            raise UserError(f"{name}={list(values)}: {wrong[0]} is outside 1 to {most}")
    for row, column in patches:
        if not (0 <= row < grid[0] and 0 <= column < grid[1]):
            raise UserError(f"patches: [{row}, {column}] is outside the {grid[0]} x {grid[1]} patches (from [0, 0])")
    maps = attention_maps(model, normalised_BCHW, layers)
    sheets = [
        attention_sheet(image, {layer: maps[layer][i] for layer in sorted(maps)}, patches, heads, grid)
        for i, image in enumerate(shown_BCHW)
    ]
    return grids.stack([*sheets, grids.note(NOTE, sheets[0].width)])


@torch.no_grad()
def attention_maps(
    model: Backbone, image_BCHW: Tensor, layers: Sequence[int], mask_BN: Tensor | None = None
) -> dict[int, Tensor]:
    """{layer: probabilities (B, A, 1 + N, 1 + N)} of blocks counted from 1, for normalised images.

    Row i holds the attention weights of token i; token 0 is [CLS], then the patches row by row.
    """
    inputs = [embed(model, image_BCHW, mask_BN), *model.hidden_states(image_BCHW, mask_BN)]
    return dict(zip(layers, attention_probabilities(model, inputs, layers), strict=True))
