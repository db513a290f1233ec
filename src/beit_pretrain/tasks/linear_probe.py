"""The task `probe`: trains linear classifiers on the frozen features of every layer (`networks/linear_probe.py`).

Shapes: B batch, C channels, H W pixels, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from beit_pretrain.engine.module import TrainedModule
from beit_pretrain.engine.optim import Optim
from beit_pretrain.models.backbone import FeatureExtractor
from beit_pretrain.models.linear_probe import LayerProbes, losses_and_hits
from beit_pretrain.transforms.jitter import normalise


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
        losses, hits = losses_and_hits(self(batch["image"].float() / 255), batch["label"])
        losses, accuracies = losses / len(batch["label"]), hits / len(batch["label"])
        self.accumulate(loss=losses.mean(), accuracy=accuracies.max())
        return losses.sum()

    def on_validation_epoch_start(self) -> None:
        # Each layer's loss and hits, and the number of images.
        self._totals = torch.zeros(2 * len(self.model.layers) + 1, dtype=torch.float64, device=self.device)

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        losses, hits = losses_and_hits(self(batch["image"].float() / 255), batch["label"])
        self._totals += torch.cat([losses, hits, hits.new_tensor([len(batch["label"])])])

    def on_validation_epoch_end(self) -> None:
        totals = self.sum_over_processes(self._totals)
        losses, hits = (totals[:-1] / totals[-1]).chunk(2)
        best = int(hits.argmax())
        by_layer = {f"accuracy_layer_{n:02d}": hit for n, hit in zip(self.model.layers, hits, strict=True)}
        self.log_validation(
            {"accuracy": hits[best], "loss": losses[best], "best_layer": float(self.model.layers[best]), **by_layer}
        )
