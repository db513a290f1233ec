"""Position tables at another image size, as in the release's run_class_finetuning.py.

A relative position bias table holds one row for each offset between two patches, (2h - 1) x (2w - 1) of them row-major,
and three more: [CLS] to patch, patch to [CLS], [CLS] to itself. Near offsets need the finest resolution, so the known
offsets are placed on a geometric progression that spans the new grid, dense in the middle, and a cubic spline through
them is read at the new whole offsets. Plain interpolation of the table loses several points on dense tasks.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

EXTRA_ROWS = 3
RATIOS = (1.01, 1.5)  # bounds of the progression's ratio


def resize_table(table_RH: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """A relative position bias table (R, heads) of grid `old` (rows, columns of patches) for grid `new`.

    An axis whose number of patches changes is interpolated, also for fewer patches: the ratio then ends at its lower
    bound, 1.01. The three rows of [CLS] are kept.
    """
    if old == new:
        return table_RH.clone()
    offsets = table_RH[:-EXTRA_ROWS].double().cpu().numpy().reshape(2 * old[0] - 1, 2 * old[1] - 1, -1)
    for axis in (0, 1):
        if old[axis] != new[axis]:
            offsets = _resize_axis(offsets, axis, new[axis])
    body = torch.from_numpy(offsets.reshape(-1, offsets.shape[-1])).to(table_RH)
    return torch.cat([body, table_RH[-EXTRA_ROWS:]])


def _resize_axis(offsets: np.ndarray, axis: int, patches: int) -> np.ndarray:
    reach, new_reach = offsets.shape[axis] // 2, patches - 1
    if reach == 0:  # a single known offset cannot be interpolated
        return np.repeat(offsets, 2 * new_reach + 1, axis=axis)
    from scipy.interpolate import make_interp_spline  # slow to import, and only used when images change their size

    half = progression(reach, new_reach)
    known = np.concatenate([-half[::-1], [0.0], half])
    wanted = np.arange(-new_reach, new_reach + 1).clip(known[0], known[-1])
    # Not-a-knot ends, as FITPACK's interpolating splines have them; a tensor product, so one axis after the other.
    return make_interp_spline(known, offsets, k=min(3, 2 * reach), axis=axis)(wanted)


def progression(terms: int, extent: float) -> np.ndarray:
    """Places 1, 1 + q, 1 + q + q^2, ... of `terms` offsets, with the q within `RATIOS` whose last place is `extent`.

    q is the last midpoint of a bisection to 1e-6, as in the release.
    """
    (low, high), ratio = RATIOS, 0.0
    while high - low > 1e-6:
        ratio = (low + high) / 2
        if (1 - ratio**terms) / (1 - ratio) > extent:
            high = ratio
        else:
            low = ratio
    return np.cumsum(ratio ** np.arange(terms))


def resize_positions(pos_embed: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Absolute position embeddings (1, 1 + N, D), [CLS] first, of grid `old` for grid `new`: bicubic."""
    if old == new:
        return pos_embed.clone()
    cls, patches = pos_embed[:, :1], pos_embed[:, 1:]
    picture = patches.float().unflatten(1, old).permute(0, 3, 1, 2)
    picture = F.interpolate(picture, size=new, mode="bicubic", align_corners=False)
    return torch.cat([cls, picture.permute(0, 2, 3, 1).flatten(1, 2).to(pos_embed)], dim=1)


def resize_state(state: dict[str, Tensor], old: tuple[int, int], new: tuple[int, int]) -> dict[str, Tensor]:
    """A state dict with tables and absolute positions resized to grid `new`; other tensors are unchanged."""
    if old == new:
        return state
    resized = dict(state)
    for name, tensor in state.items():
        if name.endswith("relative_position_bias_table"):
            resized[name] = resize_table(tensor, old, new)
        elif name == "pos_embed":
            resized[name] = resize_positions(tensor, old, new)
    return resized
