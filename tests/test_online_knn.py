"""kNN accuracy during training: images are decoded once, kept as bytes, and split among processes."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from test_pretraining import data, module

from beit_pretrain.evaluation import online_knn
from beit_pretrain.evaluation.knn import TEMPERATURE, sweep
from beit_pretrain.evaluation.online_knn import Labelled, OnlineKNN
from beit_pretrain.transforms.jitter import HALF, normalise
from beit_pretrain.transforms.views import ClassificationTransform


class Logger:
    def __init__(self) -> None:
        self.seen: list[float] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.seen.append(metrics["val/knn_accuracy"])


def trainer(rank: int = 0, world: int = 1) -> SimpleNamespace:
    plugin = SimpleNamespace(val_step_context=nullcontext)
    about = {"global_rank": rank, "world_size": world, "is_global_zero": rank == 0, "global_step": 1}
    return SimpleNamespace(sanity_checking=False, precision_plugin=plugin, loggers=[Logger()], **about)


@pytest.fixture
def network():
    return module().eval()


def by_hand(network, shards, bank: int, queries: int, k: int) -> float:
    """The kNN vote image by image."""
    views = ClassificationTransform(32, train=False)
    found = []
    for split, count in (("train", bank), ("val", queries)):
        dataset = data(shards).eval_dataset(split, views=views, images=count)
        dataset.masking = None
        samples = [dataset.sample(position) for position in range(count)]
        image = torch.stack([torch.from_numpy(sample["image"].copy()) for sample in samples]).float() / 255
        with torch.no_grad():
            blocks = network.model.hidden_states(normalise(image, HALF, HALF))
        found += [blocks[1][:, 1:].mean(1), torch.tensor([int(sample["label"]) for sample in samples])]
    return sweep(*found, 10, [k], [TEMPERATURE])[k, TEMPERATURE]


def test_equals_reference_vote(network, shards):
    one = trainer()
    OnlineKNN(data(shards, val_batch=7), bank=50, queries=9, k=3).on_validation_epoch_end(one, network)
    assert one.loggers[0].seen == [by_hand(network, shards, 50, 9, 3)]


def test_images_are_decoded_once(network, shards, monkeypatch):
    knn, one = OnlineKNN(data(shards), bank=24, queries=8), trainer()
    knn.on_validation_epoch_end(one, network)
    monkeypatch.setattr(knn.data, "eval_dataset", None)  # nothing asks for it again
    with torch.no_grad():
        network.model.blocks[0].attn.qkv.weight.mul_(3)
    knn.on_validation_epoch_end(one, network)
    assert len(one.loggers[0].seen) == 2
    assert {kept.images.dtype for kept in knn._kept.values()} == {torch.uint8}


@pytest.mark.parametrize("world", [2, 3, 5])
def test_images_are_independent_of_world_size(world, network, shards, monkeypatch):
    """Same bytes in the same order, also if the counts are not divisible."""
    shares: list[dict[str, Labelled]] = []
    for rank in range(world):
        knn = OnlineKNN(data(shards), bank=23, queries=4)  # of five processes, one has no query
        shares.append({s: knn._decoded(trainer(rank, world), network, s) for s in ("train", "val")})
    whole = OnlineKNN(data(shards), bank=23, queries=4)
    for split in ("train", "val"):
        parts = [share[split] for share in shares]
        assert {part.total for part in parts} == {23 if split == "train" else 4}
        alone = whole._decoded(trainer(), network, split)
        for name in ("images", "labels"):
            expected = getattr(alone, name)
            mine = [getattr(part, name) for part in parts]
            assert sum(map(len, mine)) == len(expected)
            monkeypatch.setattr(online_knn.distributed, "all_gather", gathers(mine, parts[0].total, world))
            share = mine[0] if len(mine[0]) else expected[:0]
            assert torch.equal(online_knn.dealt_together(share, parts[0].total, world), expected)


def gathers(shares: list[torch.Tensor], total: int, world: int):
    """A fake `all_gather` of processes that pad their share to the largest."""

    def gather(parts: list[torch.Tensor], mine: torch.Tensor) -> None:
        assert len(mine) == -(-total // world)
        for part, share in zip(parts, shares, strict=True):
            part[: len(share)] = share

    return gather
