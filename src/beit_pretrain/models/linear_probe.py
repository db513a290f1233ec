"""Linear classifiers on the frozen features of several layers at once, with their losses and accuracies.

As in the release's run_linear_eval.py, all layers are probed together: the last layer of a masked image model is
specialised on tokens and seldom the best one.

Shapes: B batch, N patches, D width, F features of a layer, L layers, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit_pretrain.errors import UserError
from beit_pretrain.models.backbone import Features

POOLS = ("cls_avg", "avg", "cls")


class LayerProbes(nn.Module):
    """One linear classifier for each of several layers.

    Args:
        layers: numbers of the blocks, from 1.
        width: D, of the backbone.
        num_classes: K.
        pool: "cls_avg", [CLS] and the mean of the patch tokens, concatenated (release); "avg" (paper); "cls".
        mean_LF, std_LF: of each layer's features, by which they are standardised; None = they are not (release). Fixed,
            they only speed up the training: the classifier stays linear in the raw features.
    """

    mean_LF: Tensor | None
    scale_LF: Tensor | None

    def __init__(
        self,
        layers: Sequence[int],
        width: int,
        num_classes: int,
        pool: str = "cls_avg",
        mean_LF: Tensor | None = None,
        std_LF: Tensor | None = None,
    ):
        super().__init__()
        if pool not in POOLS:
            raise UserError(f"probe.pool={pool} is not one of {', '.join(POOLS)}")
        self.config = {"layers": list(layers), "width": width, "num_classes": num_classes, "pool": pool}
        self.layers, self.pool = list(layers), pool
        self.register_buffer("mean_LF", mean_LF)
        self.register_buffer("scale_LF", None if std_LF is None else 1 / std_LF.clamp(min=1e-6))
        self.heads = nn.ModuleList(nn.Linear(width * (2 if pool == "cls_avg" else 1), num_classes) for _ in layers)
        for head in self.heads:
            nn.init.normal_(head.weight, std=0.01)  # type: ignore[arg-type]
            nn.init.zeros_(head.bias)  # type: ignore[arg-type]

    def forward(self, features: Features) -> list[Tensor]:
        """Logits (B, K) of every layer."""
        vectors = [pooled(features.cls[n - 1], features.patches[n - 1], self.pool) for n in self.layers]
        if self.mean_LF is not None and self.scale_LF is not None:
            vectors = [(x - m) * s for x, m, s in zip(vectors, self.mean_LF, self.scale_LF, strict=True)]
        return [head(x) for head, x in zip(self.heads, vectors, strict=True)]


def pooled(cls_BD: Tensor, patches_BND: Tensor, pool: str) -> Tensor:
    """One vector an image: (B, 2 D) for "cls_avg", else (B, D)."""
    parts = {"cls": [cls_BD], "avg": [patches_BND.mean(1)], "cls_avg": [cls_BD, patches_BND.mean(1)]}[pool]
    return torch.cat(parts, dim=1)


def losses_and_hits(logits: Sequence[Tensor], label_B: Tensor) -> tuple[Tensor, Tensor]:
    """Each layer's sum of cross-entropies (L,) and number of correct images (L,); a label of -1 does not count."""
    losses = [F.cross_entropy(x.float(), label_B, ignore_index=-1, reduction="sum") for x in logits]
    return torch.stack(losses), torch.stack([(x.argmax(1) == label_B).sum() for x in logits])
