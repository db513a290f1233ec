"""Linear probes: one linear classifier on the frozen features of every layer at once (RECIPE section 6).

The last layer of a masked image model is busy with tokens and looks broken to a linear classifier, so all layers are
probed in one run and the best one is named. Shapes: B batch, C channels, H W pixels, D width, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit_pretrain.engine.module import TrainedModule
from beit_pretrain.engine.optim import Optim
from beit_pretrain.errors import UserError
from beit_pretrain.models.backbone import FeatureExtractor, Features
from beit_pretrain.transforms.views import normalise

POOLS = ("cls_avg", "avg", "cls")


class LayerProbes(nn.Module):
    """A linear classifier for each of some layers, without any normalisation in front.

    Args:
        layers: numbers of the blocks, from 1.
        width: D, of the backbone.
        num_classes: K.
        pool: "cls_avg", [CLS] beside the mean of the patch tokens (release); "avg" (paper); "cls".
    """

    def __init__(self, layers: Sequence[int], width: int, num_classes: int, pool: str = "cls_avg"):
        super().__init__()
        if pool not in POOLS:
            raise UserError(f"probe.pool={pool} is not one of {', '.join(POOLS)}")
        self.config = {"layers": list(layers), "width": width, "num_classes": num_classes, "pool": pool}
        self.layers, self.pool = list(layers), pool
        self.heads = nn.ModuleList(nn.Linear(width * (2 if pool == "cls_avg" else 1), num_classes) for _ in layers)
        for head in self.heads:
            nn.init.normal_(head.weight, std=0.01)  # type: ignore[arg-type]
            nn.init.zeros_(head.bias)  # type: ignore[arg-type]

    def forward(self, features: Features) -> list[Tensor]:
        """Logits (B, K) of every layer."""
        return [
            head(pooled(features.cls[layer - 1], features.patches[layer - 1], self.pool))
            for layer, head in zip(self.layers, self.heads, strict=True)
        ]


def pooled(cls_BD: Tensor, patches_BND: Tensor, pool: str) -> Tensor:
    """One vector an image: (B, 2 D) for "cls_avg", else (B, D)."""
    parts = {"cls": [cls_BD], "avg": [patches_BND.mean(1)], "cls_avg": [cls_BD, patches_BND.mean(1)]}[pool]
    return torch.cat(parts, dim=1)


class Probing(TrainedModule):
    """Trains the probes; validates every layer over every image exactly once, on any number of processes."""

    kind = "probe"
    model: LayerProbes

    def __init__(
        self,
        model: LayerProbes,
        backbone: FeatureExtractor,
        optim: Optim,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ):
        super().__init__(model, optim)
        # In a list, and so no submodule: frozen, it belongs neither into the checkpoint nor into DDP.
        self._backbone = [backbone.eval().requires_grad_(False)]
        self.mean, self.std = tuple(mean), tuple(std)
        self._totals = torch.zeros(0)

    @property
    def backbone(self) -> FeatureExtractor:
        """The frozen network."""
        return self._backbone[0]

    def setup(self, stage: str) -> None:
        self.backbone.to(self.device)

    def forward(self, image_BCHW: Tensor) -> list[Tensor]:
        """Logits (B, K) of every layer, for images in [0, 1]."""
        with torch.no_grad():
            features = self.backbone(normalise(image_BCHW, self.mean, self.std))
        return self.model(features)

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        """The sum of the layers' cross-entropies: no layer's probe sees another's gradient."""
        logits = [x.float() for x in self(batch["image"].float() / 255)]
        losses = torch.stack([F.cross_entropy(x, batch["label"]) for x in logits])
        correct = torch.stack([(x.argmax(1) == batch["label"]).float().mean() for x in logits])
        self.accumulate(loss=losses.mean(), accuracy=correct.max())
        return losses.sum()

    def on_validation_epoch_start(self) -> None:
        # For each layer: loss, hits; and the number of images.
        self._totals = torch.zeros(2 * len(self.model.layers) + 1, dtype=torch.float64, device=self.device)

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        label_B, count = batch["label"], len(self.model.layers)
        for i, logits in enumerate(self(batch["image"].float() / 255)):
            self._totals[i] += F.cross_entropy(logits.float(), label_B, reduction="sum")
            self._totals[count + i] += (logits.argmax(1) == label_B).sum()
        self._totals[-1] += len(label_B)

    def on_validation_epoch_end(self) -> None:
        totals = self.sum_over_processes(self._totals)
        losses, hits = (totals[:-1] / totals[-1]).chunk(2)
        best = int(hits.argmax())
        by_layer = {f"accuracy_layer_{n:02d}": hit for n, hit in zip(self.model.layers, hits, strict=True)}
        self.log_validation(
            {"accuracy": hits[best], "loss": losses[best], "best_layer": float(self.model.layers[best]), **by_layer}
        )
