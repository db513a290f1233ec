"""Training images from tars of which only the addresses are known: read one after another, with a shuffle buffer.

`StreamSource` stands where a `ShardReader` stands for data that are not streamed. `StreamDataset` gives the batches of
one process: each loader process (a lane, `stream_order.py`) reads tars of its own, mixes them in a buffer of encoded
images, and adds to every batch where its lane stands after it. From the states of the newest batches that were used
`ShardData` makes the place at which a run resumes.

Crop, jitter and mask of a sample depend on the seed, its epoch and its key alone. Which samples meet in a batch depends
on the number of lanes.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, NoReturn

import numpy as np
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from beit_pretrain.data.cache import Shard
from beit_pretrain.data.dataset import BatchSchedule, EvalSchedule
from beit_pretrain.data.order import MIX_STREAMS, generator
from beit_pretrain.data.sample_views import NEIGHBOURS, PendingViews, SampleViews, collated
from beit_pretrain.data.settings import DataSettings
from beit_pretrain.data.storage import is_remote, without_secrets
from beit_pretrain.data.stream_order import END, Lane, Place, TarOrder
from beit_pretrain.data.stream_tars import read_tar
from beit_pretrain.errors import UserError, stop_if_memory_was_short
from beit_pretrain.transforms.image_io import reason
from beit_pretrain.transforms.masking import BlockwiseMask

STATE = "stream"  # key of a batch: the state of its lane after it
EMPTY_TARS = 100  # tars without an image one after another, besides all of the set, before a run stops
SOON = 4  # the buffer gives images when 1 / SOON of it is full


class StreamSample(NamedTuple):
    """One sample as it comes. `label` is -1 without a class; `part` and `row` are those of the lane's `Part`."""

    data: bytes
    label: int
    key: str
    tar: str
    epoch: int
    part: int
    row: int
    seg: bytes = b""  # its label map (PNG); empty without one

    @property
    def number(self) -> int:
        """What crop, jitter and mask are drawn from, besides the seed: 64 bits of its epoch and key."""
        name = f"{self.epoch} {self.key}".encode("utf-8", "surrogateescape")
        return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")

    def label_map(self) -> bytes:
        """Raises ValueError if it has none."""
        if not self.seg:
            raise ValueError("it has no label map")
        return self.seg


class StreamSource:
    """The training images of a run, streamed.

    Args:
        entries: addresses or paths of the tars, one list for each data set.
        samples: images of all sets together; None = unknown.
        classes: names of the classes; none = `.cls` members are ignored.
    """

    classes_differ = False
    without_class = 0  # unknown; `StreamDataset.needs_class` stops at the first

    def __init__(
        self, entries: Sequence[Sequence[str]], settings: DataSettings, samples: int | None, classes: list[str]
    ):
        self.entries, self.settings, self.classes = [list(tars) for tars in entries], settings, classes
        self.samples = settings.samples if settings.samples is not None else samples
        if settings.weights is None:  # one sequence: every image of all sets once an epoch
            self.entries = [[tar for tars in self.entries for tar in tars]]
        elif len(settings.weights) != len(self.entries):
            raise UserError(
                f"data.weights has {len(settings.weights)} numbers for {len(self.entries)} data sets in data.train"
            )
        self.remote = any(is_remote(tar) for tars in self.entries for tar in tars)

    @property
    def shards(self) -> list[Shard]:
        """Stand-ins by which `engine.distributed.contents` compares data: of the names of the tars alone."""
        names = (without_secrets(tar).rpartition("/")[2] for tars in self.entries for tar in tars)
        return [Shard(name, 0, 0, hashlib.sha256(name.encode()).hexdigest()) for name in names]

    def description(self) -> str:
        """What was found, in one line."""
        tars, first = sum(map(len, self.entries)), without_secrets(self.entries[0][0])
        images = "an unknown number of" if self.samples is None else f"{self.samples:,}"
        mixed = f"mixed {self.settings.shuffle_buffer:,} at a time in each loader process"
        return f"a stream of {tars:,} tars, first {first}, with {images} images, {mixed} (shards index: exact order)"

    def _refuse(self, *_: Any) -> NoReturn:
        raise UserError(
            "a stream (data.order=stream) has no numbered images; this needs data.order=position, or shards with an "
            "index: python -m beit_pretrain shards index"
        )

    read = key = label_map = labels = where = parts = is_remote = fetch_ahead = check_content = _refuse
    sizes = folders = property(_refuse)

    def samples_of(self, number: int, lane: Lane, seed: int) -> Iterator[StreamSample]:
        """The samples of data set `number` that a lane still has to give, without end, as they lie in the tars."""
        tars, image_key = self.entries[number], self.settings.image_key or ()
        order, empty = TarOrder(len(tars), seed), 0
        while True:
            opened, part = lane.open()
            tar, epoch = order.at(part.entry)
            listed, last = frozenset(part.rows), max(part.rows, default=-1) if part.start >= END else END
            where, row = without_secrets(tars[tar]), -1
            for found in read_tar(tars[tar], self.settings, image_key):
                if found is None:
                    lane.without_image += 1
                    continue
                row += 1
                if row < part.start and row not in listed:
                    lane.skip(row)
                else:
                    lane.add(opened, row)
                    image, seg = found.places["image"], found.places.get("seg.png", b"")
                    yield StreamSample(
                        image, self._label(found.label, where), found.key, where, epoch, opened, row, seg
                    )
                if row >= last:
                    break
            empty = empty + 1 if row < 0 else 0
            if empty >= len(tars) + EMPTY_TARS:
                raise UserError(f"{where} and {empty - 1} tars before it hold no images")

    def _label(self, label: int, where: str) -> int:
        if not self.classes:
            return -1
        if label >= len(self.classes):
            raise UserError(f"{where} has the class number {label}, beyond the {len(self.classes)} of data.classes")
        return label


@dataclass(eq=False, repr=False)
class StreamDataset(SampleViews, IterableDataset):
    """The micro-batches `start` to `total` of one process, with the keys of `ShardDataset`'s batches and `stream`.

    `stream`: {"lane", "sets", "without_image"}: lane number, the fields of a `LaneState` for each data set, as plain
    numbers and bytes, and how many groups without an image the lane has skipped since its start.
    An image that does not decode is replaced by the next one of its data set.

    Args:
        places: where each data set goes on, the same on all processes.
        needs_class: whether a sample without a class is an error.
    """

    source: StreamSource
    plan: BatchSchedule
    views: Any
    masking: BlockwiseMask | None = None
    seed: int = 0
    label_maps: bool = False
    places: Sequence[Place] = ()
    start: int = 0
    total: int = 0
    needs_class: bool = False
    _head: tuple[list[StreamSample], Iterator[StreamSample]] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.places = self.places or [Place()] * len(self.source.entries)
        weights = np.asarray(self.source.settings.weights or [1.0], np.float64)
        self._shares = weights / weights.sum()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_head": None}

    def __len__(self) -> int:
        """Micro-batches of the whole run, as Lightning expects."""
        return self.total

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        lane, lanes = self.plan.rank * workers + number, self.plan.world * workers
        walks = [Lane(place, lane, lanes) for place in self.places]
        streams = [self._shuffled(i, walk) for i, walk in enumerate(walks)]
        for micro_batch in range(self.start + number, self.total, workers):
            batch = self._batch(self.plan.positions(micro_batch), streams)
            skipped = sum(walk.without_image for walk in walks)
            state = {"lane": lane, "sets": [tuple(walk.state()) for walk in walks], "without_image": skipped}
            yield {**batch, STATE: state}

    def sample(self, position: int) -> dict[str, np.ndarray]:
        """The arrays of the position-th sample of the stream as it would be without shuffling and on one process."""
        sample = self.head(position)
        bad: list[dict[str, Any]] = []
        following = (self.head(position + distance) for distance in range(1, NEIGHBOURS))
        return self._made(position, sample, self.mask(sample.number), self._begun(sample), following, bad)

    def head(self, position: int) -> StreamSample:
        """The position-th sample of the stream, without shuffling; those before it stay in memory."""
        if self._head is None:
            walks = [Lane(Place(), 0, 1) for _ in self.places]
            streams = [self.source.samples_of(i, walk, self.seed + i) for i, walk in enumerate(walks)]
            self._head = [], (next(streams[i]) for i in self._sets(range(2**62)))
        known, stream = self._head
        while len(known) <= position:
            known.append(next(stream))
        return known[position]

    def _shuffled(self, number: int, walk: Lane) -> Iterator[StreamSample]:
        """A data set's samples of a lane from its buffer, which webdataset keeps; each is given once it comes out."""
        from webdataset import filters
        from webdataset.pipeline import DataPipeline

        size = max(1, round(self.source.settings.shuffle_buffer * self._shares[number]))
        begin = f"{self.seed} {number} {walk.lane} {walk.lanes} {self.start}"
        read = partial(self.source.samples_of, number, walk, self.seed + number)
        shuffle = filters.shuffle(size, initial=max(1, size // SOON), rng=random.Random(begin))
        for sample in DataPipeline(read, shuffle):
            walk.give(sample.part, sample.row)
            yield sample

    def _sets(self, positions: range) -> Iterator[int]:
        """The number of the data set that gives the sample of each position."""
        if len(self._shares) == 1:
            yield from (0 for _ in positions)
            return
        ends = np.cumsum(self._shares)[:-1]
        for position in positions:
            yield int(np.searchsorted(ends, generator(self.seed, position, MIX_STREAMS).random(), side="right"))

    def _batch(self, positions: range, streams: Sequence[Iterator[StreamSample]]) -> dict[str, Any]:
        bad: list[dict[str, Any]] = []
        of_set = [streams[number] for number in self._sets(positions)]
        samples = [next(stream) for stream in of_set]
        # One kind of work at a time, as in `ShardDataset`.
        masks = [self.mask(sample.number) for sample in samples]
        begun = [self._begun(sample) for sample in samples]
        made = [self._made(*of, bad) for of in zip(positions, samples, masks, begun, of_set, strict=True)]
        return collated(made, bad)

    def _begun(self, sample: StreamSample) -> PendingViews:
        return self.pending_views(sample.number, sample.data, sample.label_map)

    def _made(
        self,
        position: int,
        sample: StreamSample,
        mask: dict[str, np.ndarray],
        pending: PendingViews,
        following: Iterator[StreamSample],
        bad: list[dict[str, Any]],
    ) -> dict[str, np.ndarray]:
        """The arrays of a sample or, if it does not decode, of the next one that does; adds failures to `bad`.

        Raises UserError if none of `NEIGHBOURS` decodes.
        """
        failures: list[tuple[StreamSample, str]] = []
        while True:
            try:
                arrays = pending()
                break
            except Exception as error:  # Pillow's decoders raise nearly everything on broken files
                stop_if_memory_was_short(error, f"{sample.key} of {sample.tar}")
                failures.append((sample, reason(error)))
            if len(failures) == NEIGHBOURS:
                (first, why), others = failures[0], f" and the {NEIGHBOURS - 1} images after it"
                raise UserError(f"sample {first.key} of {first.tar}{others} cannot be decoded: {why}")
            sample = next(following)
            mask, pending = self.mask(sample.number), self._begun(sample)
        for failed, why in failures:
            about_failed = {"shard": failed.tar, "key": failed.key, "reason": why}
            bad.append({"position": position, **about_failed, "replaced_by": sample.key})
        if self.needs_class and sample.label < 0:
            raise UserError(f"sample {sample.key} of {sample.tar} has no class (.cls); this task needs one for each")
        about = {"label": np.asarray(sample.label, np.int64), "position": np.asarray(position, np.int64)}
        return {**arrays, **about, **mask}


class StreamHead(Dataset):
    """The first images of a stream as a data set of batches, such as those for held-out images.

    `dataset.sample` of small positions is what pictures use; a process that reads batches reads the stream up to them.
    """

    def __init__(self, dataset: StreamDataset, plan: EvalSchedule):
        self.dataset, self.plan = dataset, plan
        self.sample, self.samples = dataset.sample, plan.samples

    def __getitem__(self, batch: int) -> dict[str, Any]:
        return collated([self.dataset.sample(position) for position in self.plan.positions(batch)], [])

    def __len__(self) -> int:
        return len(self.plan)
