"""The task `probe`: linear classifiers on the frozen features of every layer, trained on augmented views over many
epochs, as the release does.

Shapes: B batch, C channels, H W pixels, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from beit_pretrain.engine.settings import OptimSettings
from beit_pretrain.engine.task import Task
from beit_pretrain.errors import UserError
from beit_pretrain.models.backbone import FeatureExtractor
from beit_pretrain.models.checkpoints.formats import digest
from beit_pretrain.models.checkpoints.hub import is_address
from beit_pretrain.models.checkpoints.init_from import normalisation, origin, read_source
from beit_pretrain.models.checkpoints.pretrained import features
from beit_pretrain.models.linear_probe import LayerProbes, losses_and_hits
from beit_pretrain.settings import Count, Pool, Settings, about
from beit_pretrain.tables import curve
from beit_pretrain.tasks.common import BackboneModule, BackboneSettings, ClassificationDataSettings, labelled_data
from beit_pretrain.transforms.jitter import normalise
from beit_pretrain.visualization.plots import layers_plot


class LayerSettings(Settings):
    """Which layers are probed, and on which features."""

    layer: Count | None = about("number of one block, from 1; null = all")
    pool: Pool = about("cls_avg: [CLS] and the mean of the patches, concatenated | avg | cls")


class NoNetwork(Settings):
    """No settings: the network comes from init_from."""

    size: None = None


class ProbeSettings(BackboneSettings):
    """Settings of linear probes."""

    defaults = "fit.yaml tasks/probe.yaml"

    model: NoNetwork = about("taken from init_from")
    probe: LayerSettings
    data: ClassificationDataSettings


class Probing(BackboneModule):
    """Trains the probes; validates every layer over every image exactly once, on any number of processes."""

    kind = "probe"
    model: LayerProbes

    def __init__(
        self,
        model: LayerProbes,
        backbone: FeatureExtractor,
        optim: OptimSettings,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ):
        super().__init__(model, optim, mean, std, seed=0)
        # In a list, so that the frozen backbone is no submodule: it stays out of the checkpoint and of DDP.
        self._backbone = [backbone.eval().requires_grad_(False)]
        self.totals_shape = (2 * len(model.layers) + 1,)  # each layer's loss and hits, and the number of images

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
        """Sum of the layers' cross-entropies; each probe gets only the gradient of its own loss."""
        losses, hits = losses_and_hits(self(batch["image"].float() / 255), batch["label"])
        losses, accuracies = losses / len(batch["label"]), hits / len(batch["label"])
        self.accumulate(loss=losses.mean(), accuracy=accuracies.max())
        return losses.sum()

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        losses, hits = losses_and_hits(self(batch["image"].float() / 255), batch["label"])
        self.totals += torch.cat([losses, hits, hits.new_tensor([len(batch["label"])])])

    def on_validation_epoch_end(self) -> None:
        totals = self.sum_over_processes(self.totals)
        losses, hits = (totals[:-1] / totals[-1]).chunk(2)
        best = int(hits.argmax())
        by_layer = {f"accuracy_layer_{n:02d}": hit for n, hit in zip(self.model.layers, hits, strict=True)}
        self.log_validation(
            {"accuracy": hits[best], "loss": losses[best], "best_layer": float(self.model.layers[best]), **by_layer}
        )


class Probe(Task):
    """The task `probe`: linear classifiers on frozen features."""

    settings = ProbeSettings
    best = ("val/accuracy", "max")
    module: Probing

    def __init__(self, cfg: ProbeSettings):
        super().__init__(cfg)
        source = read_source(cfg)
        assert source is not None  # a config without init_from is rejected earlier
        assert cfg.init_from is not None
        mean, std = normalisation(cfg, source.about)
        self.data = data = labelled_data(cfg, mean)
        backbone = features(source, cfg.image_size)
        depth = len(backbone.blocks)
        if cfg.probe.layer is not None and cfg.probe.layer > depth:
            raise UserError(f"probe.layer={cfg.probe.layer}, but {cfg.init_from} has {depth} blocks")
        layers = [cfg.probe.layer] if cfg.probe.layer is not None else list(range(1, depth + 1))
        probes = LayerProbes(layers, backbone.embed_dim, len(data.classes), cfg.probe.pool)
        optim = cfg.optim.with_warmup_in_steps(data.samples, cfg.global_batch_size)
        self.module = Probing(probes, backbone, optim, mean, std)
        place = cfg.init_from if is_address(cfg.init_from) else str(Path(cfg.init_from).absolute())
        self.module.about |= {"classes": list(data.classes), "init_from": place}
        self.module.about["backbone"] = digest(source.state)
        self.origin = origin(source)

    @property
    def network(self) -> nn.Module:
        return self.module.backbone

    @classmethod
    def resumed(cls, cfg: ProbeSettings, last: Path) -> ProbeSettings:
        """Keep init_from: a checkpoint holds only the probes, not their backbone."""
        return cfg

    def layers(self, options: Any, run: Path) -> Callable[[Path], Path] | None:
        """Plot the last measured accuracy of every layer."""
        file, layers = run / "metrics.csv", self.module.model.layers
        last = {n: curve(file, f"val/accuracy_layer_{n:02d}")[1] for n in layers}
        if not all(last.values()):
            if options.what is None:
                return None
            raise UserError(f"{file} has no held-out accuracy by layer: the run had no data.val, or has not validated")
        found = {run.name: {"linear probe": [values[-1] for values in last.values()]}}
        return lambda path: layers_plot(found, path, layers)
