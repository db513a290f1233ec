"""From positions to batches; an image that cannot be decoded is replaced by its neighbour in the shard.

One item is one micro-batch of one process, built and collated in a worker. The sampler counts micro-batches,
`BatchSchedule` gives the positions of each, and everything about a position is a function of (seed, position). So no
distributed sampler is needed, and a resumed run only starts the sampler at another number.

An image that does not decode is replaced by the next one in its shard, with the same random numbers, so the replacement
too depends only on the position. The batch then lists it under `bad`.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from beit_pretrain.data.mixture import Mixture
from beit_pretrain.data.order import Order, Sample
from beit_pretrain.data.prefetch import ShardPrefetcher
from beit_pretrain.data.reader import ShardReader
from beit_pretrain.data.sample_views import NEIGHBOURS, PendingViews, SampleViews, collated
from beit_pretrain.errors import UserError, stop_if_memory_was_short
from beit_pretrain.transforms.image_io import reason
from beit_pretrain.transforms.masking import BlockwiseMask


class FixedTokens(Protocol):
    """Cached tokens of fixed views (`tokenizers.token_cache.CachedTokens`)."""

    def view(self, sample: Sample, epoch: int, data: bytes) -> PendingViews: ...


@dataclass(frozen=True)
class BatchSchedule:
    """The positions of every micro-batch of a process: global batches, dealt to ranks, cut into micro-batches."""

    global_batch_size: int
    rank: int = 0
    world: int = 1
    micro_batches: int = 1

    def positions(self, micro_batch: int) -> range:
        """Positions of this process's micro-batch number `micro_batch`, counted from the start of the run."""
        size = self.global_batch_size
        if size % self.world:
            raise ValueError(f"the global batch {size} cannot be dealt evenly to {self.world} processes")
        step, part = divmod(micro_batch, self.micro_batches)
        share = range(step * size + self.rank, (step + 1) * size, self.world)
        size = len(share) // self.micro_batches
        return share[part * size : (part + 1) * size]


@dataclass(frozen=True)
class EvalSchedule:
    """Every sample once: rank r takes every world-th, in batches; the last batch may be smaller, or larger by one.

    All ranks have the same number of batches (if each has a sample): a sharded network (FSDP) needs all ranks.
    """

    samples: int
    batch_size: int
    rank: int = 0
    world: int = 1

    def positions(self, batch: int) -> range:
        end = (batch + 1) * self.batch_size if batch + 1 < len(self) else self.samples
        return range(self.rank, self.samples, self.world)[batch * self.batch_size : end]

    def __len__(self) -> int:
        least = max(self.samples // self.world, int(self.rank < self.samples))
        return -(-least // self.batch_size)


@dataclass(eq=False, repr=False)
class ShardDataset(SampleViews, Dataset):
    """Item m is the collated micro-batch m of the plan.

    Keys: those of the views, stacked (a list if shapes differ; with cached tokens, `tokens` (B, N) int64 instead of the
    tokenizer's view), `label` (B,) and `position` (B,). With masking also `mask` (B, N) bool and `mask_index` (B, K)
    int64, the masked patches in ascending order, padded with -1 to the largest allowed number K (static shapes).
    Only if images were replaced, `bad` is a list of dictionaries: position, shard, key, reason and replaced_by (the
    key of the replacement).
    With `label_maps` the views also get the label map; a sample without a usable label map counts as bad.
    """

    reader: ShardReader
    order: Order | Mixture
    plan: BatchSchedule | EvalSchedule
    views: Any  # a Transform
    masking: BlockwiseMask | None = None
    subset: np.ndarray | None = None
    seed: int = 0
    label_maps: bool = False
    tokens: FixedTokens | None = None
    _ahead: ShardPrefetcher | None = field(default=None, init=False)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_ahead": None}  # a thread cannot be sent to a worker

    def __getitem__(self, micro_batch: int) -> dict[str, Any]:
        positions = self.plan.positions(micro_batch)
        addresses = [Sample(*address) for address in self.order.samples_at(positions).tolist()]
        if isinstance(self.plan, BatchSchedule) and self.reader.remote:
            if self._ahead is None:
                self.reader.fetch({address.shard for address in addresses})
                self._ahead = ShardPrefetcher(self.reader, self.order, self.plan.rank, self.plan.world, positions[0])
                weakref.finalize(self, self._ahead.ended.set)
            self._ahead.position = positions[0]
        bad: list[dict[str, Any]] = []
        # One kind of work at a time for the whole batch: small steps take half as long while their code is in cache.
        masks = [self.mask(position) for position in positions]
        begun = [self._begun(*of) for of in zip(positions, addresses, strict=True)]
        made = [self._made(*of, bad) for of in zip(positions, addresses, begun, strict=True)]
        samples = [{**arrays, **mask} for arrays, mask in zip(made, masks, strict=True)]
        return collated(samples, bad)

    def __len__(self) -> int:
        if isinstance(self.plan, EvalSchedule):
            return len(self.plan)
        raise TypeError("training batches have no end; the sampler counts them")

    def sample(self, position: int) -> dict[str, np.ndarray]:
        """The arrays of one position; a pure function of the seed, the shards and the position."""
        address = self.order.sample_at(position)
        return {**self._made(position, address, self._begun(position, address), []), **self.mask(position)}

    def _made(
        self, position: int, address: Sample, begun: tuple[PendingViews, int], bad: list[dict[str, Any]]
    ) -> dict[str, np.ndarray]:
        """The arrays of a position, from its sample or the next one that decodes; adds failures to `bad`.

        Raises UserError if none of the next `NEIGHBOURS` decodes, or if the shard cannot be read.
        """
        failures: list[tuple[Sample, str]] = []
        for neighbour in range(NEIGHBOURS):
            sample = self._neighbour(address, neighbour)
            if failures and sample == failures[0][0]:  # the whole shard has been tried
                break
            views, label = self._begun(position, address, neighbour) if neighbour else begun
            try:
                arrays = views()
            except UserError:
                raise  # the shard itself
            except Exception as error:  # Pillow's decoders raise nearly everything on broken files
                stop_if_memory_was_short(error, f"{self.reader.key(sample)} of {self.reader.where(sample.shard)}")
                failures.append((sample, reason(error)))
                continue
            for failed, why in failures:
                about_failed = {"shard": self.reader.where(failed.shard), "key": self.reader.key(failed), "reason": why}
                bad.append({"position": position, **about_failed, "replaced_by": self.reader.key(sample)})
            about = {"label": np.asarray(label, np.int64), "position": np.asarray(position, np.int64)}
            return {**arrays, **about}
        (first, why), where = failures[0], self.reader.where(failures[0][0].shard)
        others = f" and the {len(failures) - 1} images after it" if len(failures) > 1 else ""
        raise UserError(f"sample {self.reader.key(first)} of {where}{others} cannot be decoded: {why}")

    def _begun(self, position: int, address: Sample, neighbour: int = 0) -> tuple[PendingViews, int]:
        """Read an image file and its label, and draw its augmentation, without decoding. Raises UserError if the shard
        is broken."""
        sample = self._neighbour(address, neighbour)
        try:
            data, label = self.reader.read(sample)
        except OSError as error:  # of this sample's own file
            return partial(_fail, error), -1
        if self.tokens is not None:
            return self.tokens.view(sample, self.order.epoch_of(position), data), label
        return self.pending_views(position, data, partial(self.reader.label_map, sample)), label

    def _neighbour(self, address: Sample, distance: int) -> Sample:
        """The sample `distance` places after an address, in the same shard (or in the subset), cyclically."""
        if self.subset is None:
            return Sample(address.shard, (address.row + distance) % self.reader.sizes[address.shard])
        return Sample(*self.subset[(address.row + distance) % len(self.subset)].tolist())


def _fail(error: Exception) -> dict[str, np.ndarray]:
    raise error


FIRST = "first_position"  # key of a batch


def with_first_position(batch: dict) -> dict:
    """Add the first position to the batch as a host integer: reading it from the device would synchronise."""
    position: torch.Tensor = batch["position"]
    return {**batch, FIRST: int(position[0])} if position.device.type == "cpu" else batch


def first_position(batch: dict) -> int:
    """Position of a batch's first image, from the host's copy if there is one."""
    return batch[FIRST] if FIRST in batch else int(batch["position"][0])


class StepSampler(Sampler[int]):
    """Counts micro-batches from `start` to `total`. Its length is the whole run's, as Lightning expects."""

    def __init__(self, total: int, start: int = 0):
        self.total, self.start = total, start

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.total))

    def __len__(self) -> int:
        return self.total
