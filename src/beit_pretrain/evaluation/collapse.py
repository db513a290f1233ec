"""Whether features collapse: their standard deviation and their effective rank (RankMe), without labels.

Shapes: N images, D width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-7  # of RankMe, for float32
COLLAPSED, FEWEST = 2.0, 32  # features of at least FEWEST images with a lower RankMe have collapsed


def feature_std(features_ND: Tensor) -> float:
    """Standard deviation over the images of L2-normalised features, mean over the channels.

    1 / sqrt(D) if the features spread evenly over the sphere, 0 if all are equal (SimSiam, Chen and He 2021, section
    4.1 and figure 2).
    """
    return float(F.normalize(features_ND.float(), dim=1).std(0, correction=0).mean())


def rankme(features_ND: Tensor) -> float:
    """Effective rank: exp of the entropy of the singular values, divided by their sum (Garrido et al. 2023, eq. 1).

    From 1 (all features on one line) to min(N, D); the features are neither centred nor normalised, as in the paper.
    NaN if they are not finite, or their singular values are not found.
    """
    if not features_ND.isfinite().all():
        return math.nan
    try:
        values = torch.linalg.svdvals(features_ND.float())
    except torch.linalg.LinAlgError:  # it has not converged; a figure to look at must not end a training
        return math.nan
    p = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny) + EPSILON
    return float((-(p * p.log()).sum()).exp())


def collapse_warning(images: int, width: int, std: float, rank: float) -> str:
    """A line if features of `images` images have collapsed; "" if not, or if there are too few to tell."""
    if images < FEWEST or not rank < COLLAPSED:
        return ""
    return (
        f"the features collapse: RankMe {rank:.3g} of at most {min(images, width)}, standard deviation {std:.2g} "
        f"({width**-0.5:.2g} if they spread evenly); a lower optim.lr or a longer warm-up may help"
    )
