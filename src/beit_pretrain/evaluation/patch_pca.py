"""Principal components of patch features over several images, as colours (as in Oquab et al. 2023, figure 1).

Shapes: B images, N patches, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

TAILS = 0.02  # share of the values at either end that is cut off: a few outliers would leave the rest grey


def pca_colours(patches_BND: Tensor, grid: tuple[int, int]) -> Tensor:
    """The first three components of all patches together, scaled to [0, 1], (B, 3, h, w).

    A component's sign is arbitrary; here it is the one by which the middle of the images is brighter than their edge,
    so that what is shown there stands out. With fewer components than three the others are 0.
    """
    x_MD = patches_BND.double().flatten(0, 1)
    x_MD = x_MD - x_MD.mean(0)
    _, vectors_DD = torch.linalg.eigh(x_MD.T @ x_MD)  # ascending eigenvalues
    found_MK = x_MD @ vectors_DD[:, -3:].flip(1)
    found_BNK = found_MK.view(*patches_BND.shape[:2], -1)
    inner_N = middle(grid).flatten()
    sign_K = (found_BNK[:, inner_N].mean((0, 1)) - found_BNK[:, ~inner_N].mean((0, 1))).sign()
    found_BNK = found_BNK * torch.where(sign_K == 0, 1.0, sign_K)
    low_K, high_K = torch.quantile(found_BNK.flatten(0, 1), torch.tensor([TAILS, 1 - TAILS]).double(), dim=0)
    scaled_BNK = ((found_BNK - low_K) / (high_K - low_K).clamp(min=1e-12)).clamp(0, 1)
    return scaled_BNK.transpose(1, 2).unflatten(2, grid).float()


def middle(grid: tuple[int, int]) -> Tensor:
    """Which patches are in the middle (h, w): the central half of the rows and of the columns, at least one."""
    inner = torch.zeros(grid, dtype=torch.bool)
    rows, columns = ((side // 4, max(side // 4 + 1, side - side // 4)) for side in grid)
    inner[rows[0] : rows[1], columns[0] : columns[1]] = True
    return inner
