"""Callback: kNN accuracy on the features of the network in training, after every validation."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from lightning import Callback, Trainer
from torch import Tensor, distributed

from beit_pretrain.data.datamodule import ShardData
from beit_pretrain.evaluation.knn import TEMPERATURE, sweep
from beit_pretrain.settings import Count, Settings, about
from beit_pretrain.transforms.jitter import normalise
from beit_pretrain.transforms.views import ClassificationTransform


class KNNSettings(Settings):
    """Online kNN accuracy, for labelled data."""

    defaults = "tasks/pretrain.yaml:knn"

    bank: Count = about("labelled training images")
    queries: Count = about("held-out images")
    k: Count = about("neighbours")


class Labelled(NamedTuple):
    """One process's share of `total` images, every world-th one, as (n, C, H, W) uint8 in host memory."""

    images: Tensor
    labels: Tensor
    total: int


class OnlineKNN(Callback):
    """Logs the accuracy of a kNN vote on the backbone's features, if the data has labels.

    The feature is the mean patch token at three quarters of the depth: in a masked image model the last block is
    specialised on token prediction, and its kNN accuracy is much lower.

    Images are decoded once, by loader workers, and kept in memory: 2,500 of 224 pixels take 376 MB, split over the
    processes. The result does not depend on the number of processes.

    Args:
        data: training images are the bank, held-out ones the queries, in the evaluation view.
        bank, queries: number of each.
        k: neighbours, weighted by exp(cosine / 0.07) as in Wu et al. 2018.
    """

    needs_whole_network = True

    def __init__(self, data: ShardData, **settings: Any):
        chosen = KNNSettings(**settings)
        self.data, self.bank, self.queries, self.k = data, chosen.bank, chosen.queries, chosen.k
        self._kept: dict[str, Labelled] = {}

    def on_validation_epoch_end(self, trainer: Trainer, pl_module) -> None:
        if trainer.sanity_checking or len(self.data.classes) < 2:
            return
        if not self._kept:
            self._kept = {split: self._decoded(trainer, pl_module, split) for split in ("train", "val")}
        bank, bank_labels = self._features(trainer, pl_module, self._kept["train"])
        queries, labels = self._features(trainer, pl_module, self._kept["val"])
        known = (labels >= 0) & torch.isin(labels, bank_labels)  # classes missing in the bank cannot be predicted
        if not trainer.is_global_zero or not known.any():
            return
        bank, bank_labels = bank[bank_labels >= 0], bank_labels[bank_labels >= 0]
        classes = len(self.data.classes)
        found = sweep(bank, bank_labels, queries[known], labels[known], classes, [self.k], [TEMPERATURE])
        for logger in trainer.loggers:
            logger.log_metrics({"val/knn_accuracy": found[self.k, TEMPERATURE]}, step=trainer.global_step)

    def _decoded(self, trainer: Trainer, module: Any, split: str) -> Labelled:
        """This process's share of the first images of a split."""
        embed, count = module.model.patch_embed, self.bank if split == "train" else self.queries
        views = ClassificationTransform(image_size=embed.img_size[0], train=False, channels=embed.proj.in_channels)
        dataset = self.data.eval_dataset(split, trainer.global_rank, trainer.world_size, views=views, images=count)
        dataset.masking = None
        batches = list(self.data.loader(dataset, range(len(dataset)), kept=True))
        total = min(count, self.data.readers[split].samples or count)
        if not batches:  # fewer images than processes
            return Labelled(torch.zeros(0, 1, 1, 1), torch.zeros(0, dtype=torch.int64), total)
        images, labels = (torch.cat([batch[name] for batch in batches]) for name in ("image", "label"))
        return Labelled(images, labels, total)

    @torch.no_grad()
    def _features(self, trainer: Trainer, module: Any, kept: Labelled) -> tuple[Tensor, Tensor]:
        """Features (M, D) and labels (M,) of the images of all processes, in the order of the data set."""
        model, features = module.model, []
        layer = max(1, round(len(model.blocks) * 0.75)) - 1
        with trainer.precision_plugin.val_step_context():
            for first in range(0, len(kept.images), self.data.settings.val_batch):
                images = kept.images[first : first + self.data.settings.val_batch].to(module.device)
                image = normalise(images.float() / 255, module.mean, module.std).to(module.dtype)
                features.append(model.hidden_states(image)[layer][:, 1:].mean(1).float())
        mine = torch.cat([torch.zeros(0, model.embed_dim, device=module.device), *features])
        labels, world = kept.labels.to(module.device), trainer.world_size
        return dealt_together(mine, kept.total, world), dealt_together(labels, kept.total, world)


def dealt_together(share: Tensor, total: int, world: int) -> Tensor:
    """Gather the `total` rows of all processes, each of which has every `world`-th. All processes must call it."""
    if world == 1:
        return share
    most = -(-total // world)
    padded = torch.cat([share, share.new_zeros(most - len(share), *share.shape[1:])])
    parts = [torch.empty_like(padded) for _ in range(world)]
    distributed.all_gather(parts, padded)
    return torch.stack(parts, dim=1).flatten(0, 1)[:total]
