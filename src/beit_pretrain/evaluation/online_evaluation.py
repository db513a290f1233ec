"""Callback: what the features of the network in training are worth, after every validation: kNN, RankMe, dense kNN.

Shapes: M images, N patches of each, D width.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any, NamedTuple

import torch
from lightning import Callback, Trainer
from pydantic import Field, Strict
from torch import Tensor, distributed
from tqdm import tqdm

from beit_pretrain.data.datamodule import ShardData
from beit_pretrain.evaluation.collapse import collapse_warning, feature_std, rankme
from beit_pretrain.evaluation.confusion import confusion, scores
from beit_pretrain.evaluation.knn import TEMPERATURE, sweep, votes
from beit_pretrain.settings import Count, Settings, Switch, about
from beit_pretrain.transforms.grey_values import IGNORE
from beit_pretrain.transforms.jitter import normalise
from beit_pretrain.transforms.segmentation import PatchLabelTransform
from beit_pretrain.transforms.views import ClassificationTransform

DENSE_TEMPERATURE = 0.02  # of the vote of patches, as is usual for that evaluation
MOST_PATCHES = 20_000  # of a bank, or of its queries: 82 MB of features of width 1,024
Images = Annotated[int, Strict(), Field(ge=1, le=2048)]


class KNNSettings(Settings):
    """Online kNN accuracy, for labelled data."""

    defaults = "tasks/pretrain.yaml:knn"

    bank: Count = about("labelled training images")
    queries: Count = about("held-out images")
    k: Count = about("neighbours")


class DenseKNNSettings(Settings):
    """Online kNN of patches, for data with label maps."""

    defaults = "tasks/pretrain.yaml:dense_knn"

    bank: Count = about("training images with label maps")
    queries: Count = about("held-out images with label maps")
    k: Count = about("neighbours")
    reduce_labels: Switch = about("ADE20K: 0 in a label map is ignored, ids shift by one | false: 0 is a class")


class CollapseSettings(Settings):
    """RankMe and standard deviation of held-out features."""

    defaults = "tasks/pretrain.yaml:collapse"

    images: Images = about("held-out images, at most 2048; RankMe is at most their number")


class Labelled(NamedTuple):
    """One process's share of `total` images, every world-th one, as (n, C, H, W) uint8 in host memory.

    `labels`: (n,) of the images, or (n, N) of their patches.
    """

    images: Tensor
    labels: Tensor
    total: int


class OnlineEvaluation(Callback):
    """Logs what the backbone's features are worth:

    * `val/feature_std`, `val/rankme`: see `collapse.py`; a warning if they collapse;
    * `val/knn_accuracy`: of a kNN vote (weights exp(cosine / 0.07), Wu et al. 2018), if there are classes;
    * `val/dense_knn_miou`: mIoU of a kNN vote of patches, whose classes are those of most of their pixels, if training
      and held-out images have label maps (Hummingbird's evaluation, Balazevic et al. 2023, but with one class a patch
      instead of shares, and scored at the resolution of patches).

    The feature is the mean patch token (dense: each patch token) at three quarters of the depth: in a masked image
    model the last block is specialised on token prediction, and its kNN accuracy is much lower.

    Images are decoded once, by loader workers, and kept in memory: 3,000 of 224 pixels take 452 MB, split over the
    processes. The results do not depend on the number of processes.

    Args:
        data: training images are the banks, held-out ones the queries, in the evaluation view.
        knn, dense, collapse: their settings; None = without.
    """

    needs_whole_network = True

    def __init__(
        self,
        data: ShardData,
        knn: KNNSettings | None = None,
        dense: DenseKNNSettings | None = None,
        collapse: CollapseSettings | None = None,
    ):
        self.data, self.collapse = data, collapse
        self.knn = knn if len(data.classes) > 1 else None
        self.dense = dense if data.has_label_maps else None
        self._kept: dict[str, Labelled] = {}
        self._mapped: dict[str, Labelled | None] = {}  # images with label maps
        self._collapsed = False

    def on_validation_epoch_end(self, trainer: Trainer, pl_module) -> None:
        if trainer.sanity_checking:
            return
        counts = [self.knn.queries if self.knn else 0, self.collapse.images if self.collapse else 0]
        held_out = self._features(trainer, pl_module, "val", max(counts))
        bank = self._features(trainer, pl_module, "train", self.knn.bank if self.knn else 0)
        patches = [self._patches(trainer, pl_module, split) for split in ("train", "val")]
        if not trainer.is_global_zero:
            return
        found: dict[str, float] = {}
        if held_out and self.collapse:
            found |= self._spread(held_out[0][: self.collapse.images], trainer.global_step)
        if held_out and bank and self.knn:
            features, labels = (part[: self.knn.queries] for part in held_out)
            found |= self._knn_accuracy(*bank, features, labels)
        if patches[0] and patches[1]:
            found |= self._dense_miou(*patches[0], *patches[1])
        for logger in trainer.loggers if found else ():
            metrics = {f"val/{name}": value for name, value in found.items()}
            logger.log_metrics(metrics, step=trainer.global_step)

    def _spread(self, features_MD: Tensor, step: int) -> dict[str, float]:
        std, rank = feature_std(features_MD), rankme(features_MD)
        warning = collapse_warning(len(features_MD), features_MD.shape[1], std, rank)
        if warning and not self._collapsed:
            tqdm.write(f"warning: step {step}: {warning}", file=sys.stderr)
        self._collapsed = bool(warning)  # warn once, until it recovers
        return {"feature_std": std, "rankme": rank}

    def _knn_accuracy(self, bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor) -> dict[str, float]:
        assert self.knn is not None
        known = (labels >= 0) & torch.isin(labels, bank_labels)  # classes missing in the bank cannot be predicted
        if not known.any():
            return {}
        bank, bank_labels, k = bank[bank_labels >= 0], bank_labels[bank_labels >= 0], self.knn.k
        classes = len(self.data.classes)
        found = sweep(bank, bank_labels, queries[known], labels[known], classes, [k], [TEMPERATURE])
        return {"knn_accuracy": found[k, TEMPERATURE]}

    def _dense_miou(self, bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor) -> dict[str, float]:
        assert self.dense is not None
        counted, known = bank_labels != IGNORE, (labels != IGNORE) & torch.isin(labels, bank_labels)
        if not known.any():
            return {}
        bank, bank_labels = thinned(bank[counted], bank_labels[counted])
        queries, labels = thinned(queries[known], labels[known])
        total, k = torch.zeros(IGNORE, IGNORE, dtype=torch.int64, device=labels.device), self.dense.k
        for some, found in votes(bank, bank_labels, queries, IGNORE, [k], [DENSE_TEMPERATURE]):
            total += confusion(found[k, DENSE_TEMPERATURE], labels[some], IGNORE)
        return {"dense_knn_miou": scores(total)["miou"]}

    def _features(self, trainer: Trainer, module: Any, split: str, count: int) -> tuple[Tensor, Tensor] | None:
        """Features (M, D) and labels (M,) of the first `count` images of a split; None for 0."""
        if not count:
            return None
        if split not in self._kept:
            self._kept[split] = self._decoded(trainer, module, split, count)
        return self._embedded(trainer, module, self._kept[split])

    def _patches(self, trainer: Trainer, module: Any, split: str) -> tuple[Tensor, Tensor] | None:
        """Features (M * N, D) and classes (M * N,) of the patches of images with label maps; None without any."""
        if self.dense is None:
            return None
        if split not in self._mapped:
            self._mapped[split] = self._decoded_patches(trainer, module, split)
        if (kept := self._mapped[split]) is None:
            return None
        features, labels = self._embedded(trainer, module, kept, dense=True)
        return features.flatten(0, 1), labels.flatten()

    def _decoded(self, trainer: Trainer, module: Any, split: str, count: int) -> Labelled:
        """This process's share of the first images of a split."""
        embed = module.model.patch_embed
        views = ClassificationTransform(image_size=embed.img_size[0], train=False, channels=embed.proj.in_channels)
        dataset = self.data.eval_dataset(split, trainer.global_rank, trainer.world_size, views=views, images=count)
        dataset.masking = None
        return self._read(dataset, "label", min(count, self.data.readers[split].samples or count))

    def _decoded_patches(self, trainer: Trainer, module: Any, split: str) -> Labelled | None:
        assert self.dense is not None
        embed, count = module.model.patch_embed, self.dense.bank if split == "train" else self.dense.queries
        views = PatchLabelTransform(
            embed.img_size[0], embed.patch_size[0], self.dense.reduce_labels, embed.proj.in_channels
        )
        dataset = self.data.label_map_dataset(split, trainer.global_rank, trainer.world_size, views, count)
        return None if dataset is None else self._read(dataset, "target", dataset.order.samples)

    def _read(self, dataset: Any, labels: str, total: int) -> Labelled:
        with torch.random.fork_rng(devices=[]):  # a DataLoader draws a seed for its workers
            batches = list(self.data.loader(dataset, range(len(dataset)), kept=True))
        if not batches:  # fewer images than processes
            return Labelled(torch.zeros(0, 1, 1, 1), torch.zeros(0, dtype=torch.int64), total)
        image, label = (torch.cat([batch[name] for batch in batches]) for name in ("image", labels))
        return Labelled(image, label, total)

    @torch.no_grad()
    def _embedded(self, trainer: Trainer, module: Any, kept: Labelled, dense: bool = False) -> tuple[Tensor, Tensor]:
        """Features (M, D) and labels (M,) of the images of all processes, in the order of the data set.

        `dense`: of their patches, (M, N, D) and (M, N).
        """
        model, size = module.model, self.data.settings.val_batch
        shape = (model.grid[0] * model.grid[1],) if dense else ()
        features = [torch.zeros(0, *shape, model.embed_dim, device=module.device)]
        layer = max(1, round(len(model.blocks) * 0.75)) - 1
        with trainer.precision_plugin.val_step_context():
            for first in range(0, len(kept.images), size):
                images = kept.images[first : first + size].to(module.device)
                image = normalise(images.float() / 255, module.mean, module.std).to(module.dtype)
                patches_BND = model.hidden_states(image)[layer][:, 1:]
                features.append((patches_BND if dense else patches_BND.mean(1)).float())
        labels = (kept.labels if len(kept.labels) else torch.zeros(0, *shape)).to(module.device).long()
        world = trainer.world_size
        return dealt_together(torch.cat(features), kept.total, world), dealt_together(labels, kept.total, world)


def thinned(features_MD: Tensor, labels_M: Tensor) -> tuple[Tensor, Tensor]:
    """At most `MOST_PATCHES` of these, evenly spaced."""
    if len(labels_M) <= MOST_PATCHES:
        return features_MD, labels_M
    kept = torch.linspace(0, len(labels_M) - 1, MOST_PATCHES, device=labels_M.device, dtype=torch.float64).long()
    return features_MD[kept], labels_M[kept]


def dealt_together(share: Tensor, total: int, world: int) -> Tensor:
    """Gather the `total` rows of all processes, each of which has every `world`-th. All processes must call it."""
    if world == 1:
        return share
    most = -(-total // world)
    padded = torch.cat([share, share.new_zeros(most - len(share), *share.shape[1:])])
    parts = [torch.empty_like(padded) for _ in range(world)]
    distributed.all_gather(parts, padded)
    return torch.stack(parts, dim=1).flatten(0, 1)[:total]
