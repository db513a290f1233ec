"""A network for images of another size than its own, for one call: its position tables are interpolated.

The method is that of transformers' `interpolate_pos_encoding=True`: linear in both directions for relative position
tables, bicubic for absolute positions. It has gradients. The release's way, for fine-tuning at a new size, is in
`resize.py`.
Shapes: R rows of a table, H heads, h w patches.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from timm.models.beit import gen_relative_position_index
from torch import Tensor, nn

from beit_pretrain.models.backbone import Backbone, patch_grid
from beit_pretrain.models.resize import EXTRA_ROWS, resize_positions

Network = TypeVar("Network", bound=Backbone)


def at_size(network: Network, image_size: tuple[int, int]) -> Network:
    """A view of the network for images of (height, width) pixels: the same parameters and buffers, other positions.

    Raises UserError if the images do not divide into patches.
    """
    grid = patch_grid(image_size, network.config["patch_size"])
    view: Any = _shallow(network)
    old, view.grid = view.grid, grid
    view.patch_embed = _shallow(view.patch_embed)
    view.patch_embed.img_size, view.patch_embed.grid_size = image_size, grid
    index = gen_relative_position_index(grid, device=view.cls_token.device)

    def resized(module: Any) -> Any:
        copied = _shallow(module)
        _replace(
            copied, "relative_position_bias_table", interpolate_table(module.relative_position_bias_table, old, grid)
        )
        copied.relative_position_index, copied.window_size, copied.window_area = index, grid, grid[0] * grid[1]
        return copied

    if view.rel_pos_bias is not None:
        view.rel_pos_bias = resized(view.rel_pos_bias)
    if view.config["rel_pos_bias"] == "per_layer":
        blocks = [_shallow(block) for block in view.blocks]
        for block in blocks:
            block.attn = resized(block.attn)
        view.blocks = nn.ModuleList(blocks)
    if view.pos_embed is not None:
        _replace(view, "pos_embed", resize_positions(view.pos_embed, old, grid))
    return view


def interpolate_table(table_RH: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """A relative position bias table of grid `old` (rows, columns of patches) for grid `new`; [CLS]'s rows are kept."""
    spans = [(2 * h - 1, 2 * w - 1) for h, w in (old, new)]
    offsets = table_RH[:-EXTRA_ROWS].unflatten(0, spans[0]).permute(2, 0, 1).unsqueeze(0)
    offsets = F.interpolate(offsets, size=spans[1], mode="bilinear", align_corners=False)
    return torch.cat([offsets[0].permute(1, 2, 0).flatten(0, 1), table_RH[-EXTRA_ROWS:]])


def _shallow(module: Any) -> Any:
    """A module of its own with the same parameters, buffers and submodules."""
    copied = copy.copy(module)
    for registry in ("_parameters", "_buffers", "_modules"):
        copied.__dict__[registry] = dict(module.__dict__[registry])
    return copied


def _replace(module: Any, name: str, tensor: Tensor) -> None:
    """Put a computed tensor in the place of a parameter."""
    del module._parameters[name]
    setattr(module, name, tensor)
