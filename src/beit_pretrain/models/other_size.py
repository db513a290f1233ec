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
from torch import Tensor

from beit_pretrain.models.backbone import Backbone, patch_grid
from beit_pretrain.models.resize import EXTRA_ROWS, resize_positions

Network = TypeVar("Network", bound=Backbone)


def at_size(network: Network, image_size: tuple[int, int]) -> Network:
    """A view of the network for images of (height, width) pixels: the same parameters and buffers, other positions.

    Raises UserError if the images do not divide into patches.
    """
    grid = patch_grid(image_size, network.config["patch_size"])
    tensors = [*network.parameters(), *network.buffers()]
    view = copy.deepcopy(network, {id(tensor): tensor for tensor in tensors})
    old: Any = view.grid
    view.grid = view.patch_embed.grid_size = grid
    view.patch_embed.img_size = image_size
    index = gen_relative_position_index(grid, device=network.cls_token.device)
    for module in view.modules():
        if isinstance(table := module._parameters.get("relative_position_bias_table"), Tensor):
            _replace(module, "relative_position_bias_table", interpolate_table(table, old, grid))
            module.relative_position_index, module.window_size = index, grid  # type: ignore[assignment]
            module.window_area = grid[0] * grid[1]  # type: ignore[assignment]
    if view.pos_embed is not None:
        _replace(view, "pos_embed", resize_positions(view.pos_embed, old, grid))
    return view


def interpolate_table(table_RH: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """A relative position bias table of grid `old` (rows, columns of patches) for grid `new`; [CLS]'s rows are kept."""
    spans = [(2 * h - 1, 2 * w - 1) for h, w in (old, new)]
    offsets = table_RH[:-EXTRA_ROWS].unflatten(0, spans[0]).permute(2, 0, 1).unsqueeze(0)
    offsets = F.interpolate(offsets, size=spans[1], mode="bilinear", align_corners=False)
    return torch.cat([offsets[0].permute(1, 2, 0).flatten(0, 1), table_RH[-EXTRA_ROWS:]])


def _replace(module: Any, name: str, tensor: Tensor) -> None:
    """Put a computed tensor in the place of a parameter."""
    del module._parameters[name]
    setattr(module, name, tensor)
