"""LightningDataModules: shards -> order -> reader -> batches; held-out data and cache must fit the training data."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor, distributed
from torch.utils.data import DataLoader

from beit_pretrain.data.dataset import (
    BatchSchedule,
    EvalSchedule,
    FixedTokens,
    ShardDataset,
    StepSampler,
    with_first_position,
)
from beit_pretrain.data.loader_workers import begin_worker
from beit_pretrain.data.mixture import Mixture
from beit_pretrain.data.order import Order
from beit_pretrain.data.reader import ShardReader
from beit_pretrain.data.sample_views import Transform
from beit_pretrain.data.settings import DataSettings
from beit_pretrain.data.stream import STATE, StreamDataset, StreamHead, StreamSource
from beit_pretrain.data.stream_order import Place, StreamPlaces
from beit_pretrain.data.training_source import open_training
from beit_pretrain.errors import UserError
from beit_pretrain.transforms.masking import BlockwiseMask


class ShardData(LightningDataModule):
    """Training and validation loaders over shard folders.

    Args:
        train_views, val_views: transforms of the images.
        global_batch_size: images of one optimiser step over all processes and micro-batches.
        seed: of order, views and masks.
        train, val, settings: those of `DataSettings`.
    """

    VAL_SEED = 1_000_003  # views and masks of held-out images do not depend on the run's seed

    def __init__(
        self, train, val=None, *, train_views, val_views, global_batch_size: int, seed: int = 0, **settings: Any
    ):
        super().__init__()
        self.views: dict[str, Transform] = {"train": train_views, "val": val_views}
        self.settings = chosen = DataSettings(train=train, val=val, **settings)
        self.tokens: dict[str, FixedTokens] = {}  # for splits with cached tokens, whose views are fixed
        self.readers: dict[str, Any] = {"train": open_training(chosen)}  # ShardReaders; a StreamSource for a stream
        if chosen.val is not None:
            held_out = self.readers["val"] = ShardReader(chosen.val, chosen, chosen.val_split or "val")
            differ = held_out.classes_differ or self.readers["train"].classes_differ
            # Without classes of the training images no task compares labels.
            compared = bool(held_out.classes and self.classes) and not differ
            if compared and not held_out.number_classes_as(self.classes):
                shown = " and ".join(map(str, held_out.folders))  # without secrets
                raise UserError(f"data.val={shown} has other classes than data.train; make both in one go")
        source = self.readers["train"]
        self.stream = StreamPlaces(len(source.entries)) if isinstance(source, StreamSource) else None
        if self.stream is not None and chosen.labels_per_class is not None:
            raise UserError("a stream (data.order=stream) has no numbered images to take data.labels_per_class from")
        if chosen.weights is not None and chosen.labels_per_class is not None:
            raise UserError("data.weights and data.labels_per_class exclude each other")
        self.global_batch_size, self.seed = global_batch_size, seed
        count = chosen.labels_per_class
        self.subset = None if count is None else first_of_each_class(self.readers["train"], count)

    @property
    def classes(self) -> list[str]:
        """Names of the classes, in the order of the labels."""
        return self.readers["train"].classes

    @property
    def samples(self) -> int | None:
        """Training images; None if they are streamed and not counted."""
        return self.readers["train"].samples if self.subset is None else len(self.subset)

    masking: BlockwiseMask | None = None
    label_maps = False
    needs_class = False  # whether every training image must have a class
    wrapped: Callable[[DataLoader], Any] | None = None  # wraps the training loader, as `DevicePrefetcher` does
    patience: float = 0  # seconds to wait for a batch of the workers; 0 = no limit

    def on_before_batch_transfer(self, batch: dict, dataloader_idx: int) -> dict:
        return with_first_position(batch)

    def train_dataset(self, plan: BatchSchedule, **stream: Any) -> Any:
        """A `ShardDataset`; of a stream a `StreamDataset`, with its further arguments."""
        if self.stream is not None:
            return self._stream("train", plan, self.views["train"], seed=self.seed, **stream)
        how = {"subset": self.subset, "seed": self.seed, "tokens": self.tokens.get("train")}
        return self._dataset("train", self.train_order(), plan, self.views["train"], **how)

    def train_order(self) -> Order | Mixture:
        """The order of the training images: position -> sample."""
        reader = self.readers["train"]
        block_size, streams = self.settings.shuffle_block_size, self.settings.shuffle_streams
        if self.settings.weights is None:
            sizes = reader.sizes if self.subset is None else [len(self.subset)]
            return Order(sizes, self.seed, block_size, streams)
        # A seed for each set: with one seed for all, equal sets would be read in the same order.
        orders = [Order(s, self.seed + i, block_size, streams) for i, s in enumerate(reader.parts())]
        return Mixture(orders, self.settings.weights, self.seed)

    def eval_dataset(
        self,
        split: str = "val",
        rank: int = 0,
        world: int = 1,
        views: Transform | None = None,
        images: int | None = None,
    ) -> Any:
        """Every image of a split (or its first `images`) once and in order, with fixed views and masks.

        Of a stream only the first ones can be read.
        """
        reader = self.readers[split]
        if isinstance(reader, StreamSource):
            head = self._stream(split, BatchSchedule(1), views or self.views["val"], seed=self.VAL_SEED)
            return StreamHead(
                head, EvalSchedule(images or self.settings.val_batch, self.settings.val_batch, rank, world)
            )
        samples = reader.samples if images is None else min(reader.samples, images)
        plan = EvalSchedule(samples, self.settings.val_batch, rank, world)
        order, tokens = Order(reader.sizes, shuffle=False), None if views else self.tokens.get(split)
        return self._dataset(split, order, plan, views or self.views["val"], tokens=tokens, seed=self.VAL_SEED)

    @property
    def has_label_maps(self) -> bool:
        """Whether training and held-out images have label maps, of the same classes; a stream has none."""
        if self.stream is not None or "val" not in self.readers:
            return False
        parts = [[f.about for f in reader.folders if f.about["segmentation"]] for reader in self.readers.values()]
        names = [about.get("segmentation_classes") for part in parts for about in part]  # older manifests have none
        return all(parts) and all(classes == names[0] for classes in names)

    def label_map_dataset(
        self, split: str, rank: int, world: int, views: Transform, images: int
    ) -> ShardDataset | None:
        """The first images of a split that have a label map, as `eval_dataset` gives them; None without one."""
        reader = self.readers[split]
        shards = ((shard, np.flatnonzero(reader.has_label_map(shard))) for shard in range(len(reader.sizes)))
        found = list(islice(((shard, row) for shard, rows in shards for row in rows.tolist()), images))
        if not found:
            return None
        plan, order = EvalSchedule(len(found), self.settings.val_batch, rank, world), Order([len(found)], shuffle=False)
        subset = np.asarray(found, np.int64)
        return ShardDataset(reader, order, plan, views, subset=subset, seed=self.VAL_SEED, label_maps=True)

    def first_files(self, split: str, count: int) -> list[bytes]:
        """The first image files of a split."""
        dataset, reader = self.eval_dataset(split), self.readers[split]
        if isinstance(dataset, StreamHead):
            return [dataset.dataset.head(position).data for position in range(count)]
        return [reader.read(dataset.order.sample_at(position)).data for position in range(count)]

    def _stream(self, split: str, plan: BatchSchedule, views: Transform, **how: Any) -> StreamDataset:
        maps, needs = self.label_maps, self.needs_class
        return StreamDataset(self.readers[split], plan, views, self.masking, label_maps=maps, needs_class=needs, **how)

    def _dataset(self, split: str, order, plan, views: Transform, **how: Any) -> ShardDataset:
        reader = self.readers[split]
        return ShardDataset(reader, order, plan, views, self.masking, label_maps=self.label_maps, **how)

    def train_dataloader(self) -> Any:
        trainer = self.trainer
        assert trainer is not None
        micro_batches = trainer.accumulate_grad_batches
        plan = BatchSchedule(self.global_batch_size, trainer.global_rank, trainer.world_size, micro_batches)
        if self.stream is not None:
            if trainer.global_step and not self.stream.resumed:
                raise UserError("the checkpoint does not say where the stream stood; resume=never starts over")
            start, total = trainer.global_step * micro_batches, int(trainer.max_steps) * micro_batches
            places = self.stream.begin(trainer.world_size * max(1, self.settings.num_workers))
            loader = self.loader(self.train_dataset(plan, places=places, start=start, total=total), None)
            return loader if self.wrapped is None else self.wrapped(loader)
        if self.readers["train"].remote:
            ranks = range(trainer.node_rank * trainer.num_devices, (trainer.node_rank + 1) * trainer.num_devices)
            self.check_cache(trainer.global_step * self.global_batch_size, ranks, trainer.world_size)
        sampler = StepSampler(int(trainer.max_steps) * micro_batches, start=trainer.global_step * micro_batches)
        loader = self.loader(self.train_dataset(plan), sampler)
        return loader if self.wrapped is None else self.wrapped(loader)

    def note_used(self, batch: dict) -> None:
        """Call after every training batch: a checkpoint says where the stream stands after the batches used."""
        if self.stream is not None and STATE in batch:
            self.stream.note(batch[STATE])

    def teardown(self, stage: str) -> None:
        """Count what a stream skipped."""
        skipped = 0 if self.stream is None else sum(self.stream.without_image.values())
        if stage == "fit" and skipped:
            said = f"{skipped:,} samples of the stream, as this process read it, have no image and were skipped"
            print(f"warning: {said}", file=sys.stderr, flush=True)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, over all processes, which must all call this; empty for other data."""
        if self.stream is None:
            return {}
        used = dict(self.stream.used)
        if self.trainer is not None and self.trainer.world_size > 1:
            parts: list[Any] = [None] * self.trainer.world_size
            distributed.all_gather_object(parts, used)
            used = {lane: states for part in parts for lane, states in part.items()}
        return {"stream": [place.packed() for place in self.stream.now(used)]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.stream is not None and "stream" in state_dict:
            places = [Place.unpacked(place) for place in state_dict["stream"]]
            if len(places) != len(self.stream.places):
                raise UserError(
                    f"the checkpoint was made with {len(places)} streams, not {len(self.stream.places)}: keep "
                    "data.train and data.weights as they were, or start over with resume=never"
                )
            self.stream.places, self.stream.resumed = places, True

    def read_at_once(self, position: int, ranks: Iterable[int], world: int) -> tuple[int, int]:
        """Shards that these of `world` processes fetch and read from at once, and their bytes; none of a stream."""
        reader = self.readers["train"]
        if self.subset is not None or self.stream is not None or not reader.remote:
            return 0, 0
        order = self.train_order()
        here = {shard for rank in ranks for shard in order.upcoming_shards(position, rank, world, windows=1)}
        fetched = [reader.shards[shard].bytes for shard in here if reader.is_remote(shard)]
        return len(fetched), sum(fetched)

    def check_cache(self, position: int, ranks: Sequence[int], world: int) -> None:
        """Raise UserError if the cache cannot hold the shards that this node's processes read from at once."""
        shards, needed = self.read_at_once(position, ranks, world)
        if needed > self.settings.cache_gb * 1e9:
            raise UserError(
                f"data.cache_gb={self.settings.cache_gb:g} is too small: this node reads from {shards:,} shards of "
                f"{needed / 1e9:.3g} GB at once; raise it, or lower data.shuffle_block_size or data.shuffle_streams"
            )

    def val_dataloader(self) -> DataLoader | list:
        if "val" not in self.readers:
            return []
        trainer = self.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
        dataset = self.eval_dataset("val", rank, world, images=self.settings.val_images)
        return self.loader(dataset, range(len(dataset)))

    test_dataloader = val_dataloader

    def loader(self, dataset: Any, sampler, kept: bool = False) -> DataLoader:
        """A DataLoader over a data set.

        `kept`: the batches are read once and stay on the host, so they are not pinned, and the workers end.
        """
        workers = self.settings.num_workers
        if isinstance(dataset, StreamHead):  # each worker would read the stream from its beginning
            workers = min(workers, 1)
        return DataLoader(
            dataset,
            batch_size=None,
            sampler=sampler,
            num_workers=workers,
            pin_memory=torch.cuda.is_available() and not kept,
            persistent_workers=workers > 0 and not kept,
            worker_init_fn=begin_worker,
            timeout=self.patience if workers else 0,
        )


class ClassificationData(ShardData):
    """One view per image with its label: augmented in training, resized and centre-cropped in validation."""


class SegmentationData(ShardData):
    """Images with label maps. Raises UserError if a shard folder has none."""

    label_maps = True

    def __init__(self, train, val=None, **settings):
        super().__init__(train, val, **settings)
        if self.stream is not None:
            raise UserError("segmentation needs shards with an index: data.order=stream cannot be used")
        for reader in self.readers.values():
            for folder in reader.folders:
                if not folder.about["segmentation"]:
                    raise UserError(f"{folder} has no label maps (.seg.png); segmentation needs them")


def first_of_each_class(reader: ShardReader, count: int) -> np.ndarray:
    """(samples, 2) shard and row of the first `count` samples of every class; shards are already shuffled."""
    taken = np.zeros(len(reader.classes), np.int64)
    chosen = []
    for shard in range(len(reader.sizes)):
        for index, label in enumerate(reader.labels(shard)):
            if label >= 0 and taken[label] < count:
                taken[label] += 1
                chosen.append((shard, index))
    if not chosen:
        raise UserError(
            f"{reader.folders[0]} has no known labels, which data.labels_per_class needs (tars: data.classes=N)"
        )
    return np.asarray(chosen, np.int64)


def first_images(dataset: Any, count: int, device: torch.device) -> dict[str, Tensor]:
    """The first images of a data set as a batch on `device`."""
    count = count if isinstance(dataset, StreamDataset | StreamHead) else min(count, dataset.order.samples)
    samples = [dataset.sample(position) for position in range(count)]
    return {k: torch.stack([torch.as_tensor(s[k]) for s in samples]).to(device) for k in samples[0]}
