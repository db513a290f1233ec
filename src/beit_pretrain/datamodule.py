"""LightningDataModules: shards -> order -> reader -> views and masks -> batches.

One loader item is one micro-batch of one process, made whole in a worker: the sampler counts micro-batches, `Plan`
says which positions of the run stand in each, and everything about a position is a function of (seed, position). So
the order needs no distributed sampler, and resuming starts the sampler elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from lightning import LightningDataModule
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from beit_pretrain.errors import UserError
from beit_pretrain.images import opened, reason
from beit_pretrain.masking import BlockwiseMask
from beit_pretrain.order import MASK, VIEW, Order, Sample, generator, positions
from beit_pretrain.reader import ShardReader
from beit_pretrain.views import ClassificationViews, PretrainViews


class Views(Protocol):
    """Arrays of one sample from its image (opened, not decoded) and the random numbers of its position."""

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> dict[str, np.ndarray]: ...


@dataclass(frozen=True)
class Plan:
    """Which positions stand in micro-batch m of a process: global batches, dealt to ranks, cut into micro-batches."""

    global_batch: int
    rank: int = 0
    world: int = 1
    micro_batches: int = 1

    def positions(self, micro_batch: int) -> range:
        """Positions of the process's micro-batch number `micro_batch`, counted from the beginning of the run."""
        step, part = divmod(micro_batch, self.micro_batches)
        share = positions(step, self.rank, self.world, self.global_batch)
        size = len(share) // self.micro_batches
        return share[part * size : (part + 1) * size]


@dataclass(frozen=True)
class EvalPlan:
    """Every sample once: rank r takes every world-th, in batches; the last ones may be smaller."""

    samples: int
    batch_size: int
    rank: int = 0
    world: int = 1

    def positions(self, batch: int) -> range:
        return range(self.rank, self.samples, self.world)[batch * self.batch_size : (batch + 1) * self.batch_size]

    def __len__(self) -> int:
        return -(-len(range(self.rank, self.samples, self.world)) // self.batch_size)


class ShardDataset(Dataset):
    """Item m is the collated micro-batch m of the plan.

    Keys: those of the views, stacked, and `label` (B,), `position` (B,); with masking `mask` (B, N) bool and
    `mask_index` (B, K) int64, the masked patches in ascending order padded with -1 (K = the cap: static shapes).
    """

    def __init__(
        self,
        reader: ShardReader,
        order: Order,
        plan: Plan | EvalPlan,
        views: Views,
        masking: BlockwiseMask | None = None,
        subset: np.ndarray | None = None,
        seed: int = 0,
    ):
        self.reader, self.order, self.plan = reader, order, plan
        self.views, self.masking, self.subset, self.seed = views, masking, subset, seed

    def __getitem__(self, micro_batch: int) -> dict[str, Tensor]:
        samples = [self.sample(position) for position in self.plan.positions(micro_batch)]
        return {key: torch.from_numpy(np.stack([s[key] for s in samples])) for key in samples[0]}

    def __len__(self) -> int:
        if isinstance(self.plan, EvalPlan):
            return len(self.plan)
        raise TypeError("training batches have no end; the sampler counts them")

    def sample(self, position: int) -> dict[str, np.ndarray]:
        """The arrays of one position; a pure function of the seed, the shards and the position."""
        address = self.order.sample_at(position)
        if self.subset is not None:
            address = Sample(*(int(i) for i in self.subset[address.row]))
        try:
            data, label = self.reader.read(address)
            numbers = generator(self.seed, position, VIEW)
            if isinstance(self.views, PretrainViews):
                arrays = self.views.of_bytes(data, numbers)
            else:
                with opened(data) as image:
                    arrays = self.views(image, numbers)
        except UserError:
            raise
        except Exception as error:  # Pillow's decoders raise nearly everything on broken files
            shard = self.reader.folder / self.reader.names[address.shard]
            raise UserError(f"sample {address.row} of {shard} cannot be decoded: {reason(error)}") from error
        arrays |= {"label": np.asarray(label, np.int64), "position": np.asarray(position, np.int64)}
        if self.masking is not None:
            mask = self.masking.draw(generator(self.seed, position, MASK)).reshape(-1)
            index = np.full(self.masking.max_patches, -1, np.int64)
            masked = np.flatnonzero(mask)
            index[: len(masked)] = masked
            arrays |= {"mask": mask, "mask_index": index}
        return arrays


class StepSampler(Sampler[int]):
    """Counts micro-batches from `start` to `total`; its length is always the whole run's, as Lightning's count is."""

    def __init__(self, total: int, start: int = 0):
        self.total, self.start = total, start

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.total))

    def __len__(self) -> int:
        return self.total


class ShardData(LightningDataModule):
    """Training and validation loaders over shard folders. The classes below say which views and masks.

    Args:
        train: shard folder of the training images.
        val: shard folder of held-out images; None = no validation.
        global_batch: images of one optimiser step over all processes and micro-batches.
        seed: of order, views and masks.
        workers: loader processes per training process; 0 = none.
        window, streams: see `order.Order`.
        val_batch: images of a validation batch.
        val_images: at most so many validation images.
        per_class: train on so many images of each class only (the first ones in the shards' order).
    """

    VAL_SEED = 1_000_003  # views and masks of held-out images never change, whatever the run's seed

    def __init__(
        self,
        train: str | Path,
        val: str | Path | None = None,
        *,
        global_batch: int,
        seed: int = 0,
        workers: int = 4,
        window: int = 4096,
        streams: int = 64,
        val_batch: int = 64,
        val_images: int | None = None,
        per_class: int | None = None,
    ):
        super().__init__()
        self.readers = {"train": ShardReader(train)}
        if val is not None:
            self.readers["val"] = ShardReader(val)
            if self.readers["val"].classes and self.readers["val"].classes != self.readers["train"].classes:
                raise UserError(f"data.val={val} has other classes than data.train={train}; make both in one go")
        if workers < 0:
            raise UserError(f"data.workers must be 0 or more, got {workers}")
        self.global_batch, self.seed, self.workers = global_batch, seed, workers
        self.window, self.streams = window, streams
        self.val_batch, self.val_images = val_batch, val_images
        self.subset = None if per_class is None else first_of_each_class(self.readers["train"], per_class)

    @property
    def classes(self) -> list[str]:
        """Names of the classes, in the order of the labels."""
        return self.readers["train"].classes

    @property
    def samples(self) -> int:
        """Training images."""
        return self.readers["train"].samples if self.subset is None else len(self.subset)

    def views(self, split: str) -> Views:
        """How the images of "train" or "val" are seen."""
        raise NotImplementedError

    masking: BlockwiseMask | None = None

    def train_dataset(self, plan: Plan) -> ShardDataset:
        """The training batches that `plan` lays out."""
        reader = self.readers["train"]
        sizes = reader.sizes if self.subset is None else [len(self.subset)]
        order = Order(sizes, self.seed, self.window, self.streams)
        return ShardDataset(reader, order, plan, self.views("train"), self.masking, self.subset, self.seed)

    def eval_dataset(
        self, split: str = "val", rank: int = 0, world: int = 1, views: Views | None = None, images: int | None = None
    ) -> ShardDataset:
        """Every image of a split (or its first `images`) once and in order, with fixed views and masks."""
        reader = self.readers[split]
        samples = reader.samples if images is None else min(reader.samples, images)
        plan = EvalPlan(samples, self.val_batch, rank, world)
        order = Order(reader.sizes, shuffle=False)
        return ShardDataset(reader, order, plan, views or self.views("val"), self.masking, seed=self.VAL_SEED)

    def train_dataloader(self) -> DataLoader:
        trainer = self.trainer
        assert trainer is not None
        micro_batches = trainer.accumulate_grad_batches
        plan = Plan(self.global_batch, trainer.global_rank, trainer.world_size, micro_batches)
        sampler = StepSampler(int(trainer.max_steps) * micro_batches, start=trainer.global_step * micro_batches)
        return self._loader(self.train_dataset(plan), sampler)

    def val_dataloader(self) -> DataLoader | list:
        if "val" not in self.readers:
            return []
        trainer = self.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
        dataset = self.eval_dataset("val", rank, world, images=self.val_images)
        return self._loader(dataset, range(len(dataset)))

    test_dataloader = val_dataloader

    def _loader(self, dataset: ShardDataset, sampler) -> DataLoader:
        return DataLoader(
            dataset,
            batch_size=None,
            sampler=sampler,
            num_workers=self.workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.workers > 0,
        )


class PretrainData(ShardData):
    """Two views and a mask of every image. `views` and `mask` are settings of `PretrainViews` and `BlockwiseMask`."""

    def __init__(self, train, val=None, *, views: PretrainViews, masking: BlockwiseMask, **settings):
        super().__init__(train, val, **settings)
        self._views, self.masking = views, masking

    def views(self, split: str) -> Views:
        return self._views


class ClassificationData(ShardData):
    """One view of every image with its label: augmented in training, resized and centre-cropped in validation."""

    def __init__(
        self, train, val=None, *, train_views: ClassificationViews, val_views: ClassificationViews, **settings
    ):
        super().__init__(train, val, **settings)
        self._views = {"train": train_views, "val": val_views}

    def views(self, split: str) -> Views:
        return self._views[split]


def labels(reader: ShardReader) -> np.ndarray:
    """Labels of all samples (samples,), in the order of the shards; -1 where there is none."""
    return np.concatenate([reader.labels(shard) for shard in range(len(reader.sizes))])


def first_of_each_class(reader: ShardReader, count: int) -> np.ndarray:
    """(samples, 2) shard and index of the first `count` samples of every class: the shards' order is already random."""
    if count < 1:
        raise UserError(f"data.per_class must be at least 1, got {count}")
    taken = np.zeros(len(reader.classes), np.int64)
    chosen = []
    for shard in range(len(reader.sizes)):
        for index, label in enumerate(reader.labels(shard)):
            if label >= 0 and taken[label] < count:
                taken[label] += 1
                chosen.append((shard, index))
    if not chosen:
        raise UserError(f"{reader.folder} has no labels; data.per_class needs images in class folders")
    return np.asarray(chosen, np.int64)
