"""What is measured of features during training: kNN, collapse, kNN of patches; images are decoded once, kept as bytes,
and split among processes."""

from __future__ import annotations

import io
import math
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_pretraining import MASKING, data, module
from tiny import fit_words, rows_of, state_of

from beit_pretrain.data.order import Sample
from beit_pretrain.evaluation import online_evaluation
from beit_pretrain.evaluation.collapse import collapse_warning, feature_std, rankme
from beit_pretrain.evaluation.knn import TEMPERATURE, sweep
from beit_pretrain.evaluation.online_evaluation import (
    CollapseSettings,
    DenseKNNSettings,
    KNNSettings,
    Labelled,
    OnlineEvaluation,
)
from beit_pretrain.tasks.pretrain import PretrainData
from beit_pretrain.transforms.jitter import HALF, normalise
from beit_pretrain.transforms.segmentation import IGNORE, PatchLabelTransform
from beit_pretrain.transforms.views import ClassificationTransform, TwoViewTransform


class Logger:
    def __init__(self) -> None:
        self.seen: list = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.seen.append(metrics["val/knn_accuracy"] if [*metrics] == ["val/knn_accuracy"] else metrics)


def trainer(rank: int = 0, world: int = 1) -> SimpleNamespace:
    plugin = SimpleNamespace(val_step_context=nullcontext)
    about = {"global_rank": rank, "world_size": world, "is_global_zero": rank == 0, "global_step": 1}
    return SimpleNamespace(sanity_checking=False, precision_plugin=plugin, loggers=[Logger()], **about)


@pytest.fixture
def network():
    return module().eval()


COUNT = {"train": 23, "val": 4}


def watch(shards_data, bank: int, queries: int, k: int = 10) -> OnlineEvaluation:
    return OnlineEvaluation(shards_data, KNNSettings(bank=bank, queries=queries, k=k))


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
    watch(data(shards, val_batch=7), bank=50, queries=9, k=3).on_validation_epoch_end(one, network)
    assert one.loggers[0].seen == [by_hand(network, shards, 50, 9, 3)]


def test_images_are_decoded_once(network, shards, monkeypatch):
    knn, one = watch(data(shards), bank=24, queries=8), trainer()
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
        knn = watch(data(shards), bank=23, queries=4)  # of five processes, one has no query
        shares.append({s: knn._decoded(trainer(rank, world), network, s, COUNT[s]) for s in COUNT})
    whole = watch(data(shards), bank=23, queries=4)
    for split in ("train", "val"):
        parts = [share[split] for share in shares]
        assert {part.total for part in parts} == {COUNT[split]}
        alone = whole._decoded(trainer(), network, split, COUNT[split])
        for name in ("images", "labels"):
            expected = getattr(alone, name)
            mine = [getattr(part, name) for part in parts]
            assert sum(map(len, mine)) == len(expected)
            monkeypatch.setattr(online_evaluation.distributed, "all_gather", gathers(mine, parts[0].total, world))
            share = mine[0] if len(mine[0]) else expected[:0]
            assert torch.equal(online_evaluation.dealt_together(share, parts[0].total, world), expected)


def gathers(shares: list[torch.Tensor], total: int, world: int):
    """A fake `all_gather` of processes that pad their share to the largest."""

    def gather(parts: list[torch.Tensor], mine: torch.Tensor) -> None:
        assert len(mine) == -(-total // world)
        for part, share in zip(parts, shares, strict=True):
            part[: len(share)] = share

    return gather


def only(collapse: int = 0, dense: DenseKNNSettings | None = None, **settings):
    """A callback with one of the measurements."""
    shards_data = data(**settings)
    return OnlineEvaluation(shards_data, None, dense, CollapseSettings(images=collapse) if collapse else None)


def features(network, shards_data, split: str, count: int) -> torch.Tensor:
    """Patch tokens (n, N, D) of the second block, image by image."""
    dataset = shards_data.eval_dataset(split, views=ClassificationTransform(32, train=False), images=count)
    dataset.masking = None
    images = [
        torch.from_numpy(dataset.sample(position)["image"].copy())[None].float() / 255 for position in range(count)
    ]
    with torch.no_grad():
        return torch.cat([network.model.hidden_states(normalise(i, HALF, HALF))[1][:, 1:] for i in images])


class TestCollapse:
    def test_rankme_is_equation_1(self):
        z = torch.randn(40, 12, generator=torch.Generator().manual_seed(0)) @ torch.diag(0.5 ** torch.arange(12))
        sigma = np.linalg.svd(z.numpy().astype(np.float64), compute_uv=False)
        p = sigma / sigma.sum() + 1e-7
        assert rankme(z) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-5)
        assert rankme(1000 * z) == pytest.approx(rankme(z), rel=1e-5)

    @pytest.mark.parametrize(
        ("features", "expected"),
        [
            (torch.eye(16), 16),
            (torch.ones(64, 16), 1),
            (torch.zeros(64, 16), 1),
            (torch.eye(16)[[0, 3]].repeat(40, 1), 2),
            (torch.full((4, 4), math.nan), math.nan),
        ],
    )
    def test_rankme_of_known_features(self, features, expected):
        assert rankme(features) == pytest.approx(expected, abs=1e-3, nan_ok=True)

    def test_deviation_of_known_features(self):
        even = torch.randn(20_000, 64, generator=torch.Generator().manual_seed(0))
        assert feature_std(even) == pytest.approx(64**-0.5, rel=0.01)
        assert feature_std(7 * even) == pytest.approx(feature_std(even), rel=1e-5)
        assert feature_std(torch.randn(1, 64).repeat(50, 1)) == pytest.approx(0, abs=1e-7)

    def test_equals_reference_and_needs_no_classes(self, network, shards):
        watching, one = only(9, shards=shards, val_batch=4), trainer()
        watching.on_validation_epoch_end(one, network)
        expected = features(network, watching.data, "val", 9).mean(1)
        assert one.loggers[0].seen == [
            {
                "val/feature_std": pytest.approx(feature_std(expected), rel=1e-4),
                "val/rankme": pytest.approx(rankme(expected), rel=1e-4),
            }
        ]

    def test_warns_once_of_a_collapsed_network(self, network, shards, capsys):
        watching, one = only(40, shards=shards), trainer()
        watching.data.readers["val"] = watching.data.readers["train"]  # enough images to tell
        healthy = {name: value.clone() for name, value in network.model.state_dict().items()}
        said = []
        for weights in (healthy, None, None, healthy, None):
            with torch.no_grad():
                network.model.load_state_dict(healthy)
                if weights is None:
                    network.model.patch_embed.proj.weight.zero_()  # every image looks alike
            watching.on_validation_epoch_end(one, network)
            said.append(capsys.readouterr().err)
        assert [text.count("the features collapse: RankMe 1") for text in said] == [0, 1, 0, 0, 1]
        assert "warning: step 1: " in said[1]
        seen = one.loggers[0].seen
        assert seen[0]["val/rankme"] > 2 > 1.01 > seen[1]["val/rankme"]
        assert seen[0]["val/feature_std"] > 0.1 * 32**-0.5
        assert seen[1]["val/feature_std"] < 1e-3 * 32**-0.5

    def test_few_images_are_no_collapse(self):
        assert not collapse_warning(31, 16, 0.0, 1.0)
        assert collapse_warning(32, 16, 0.0, 1.0)
        assert not collapse_warning(32, 16, math.nan, math.nan)


class TestDense:
    SETTINGS = DenseKNNSettings(bank=20, queries=9, k=3, reduce_labels=False)

    def by_hand(self, network, shards_data) -> float:
        """The vote patch by patch, and the mean IoU from sets of patches."""
        found = {}
        for split, count in (("train", 20), ("val", 9)):
            reader, labels = shards_data.readers[split], []
            for position in range(count):
                shard, row = divmod(position, 12)
                with Image.open(io.BytesIO(reader.label_map(Sample(shard, row)))) as opened:
                    map_HW = np.asarray(opened.resize((36, 36), Image.Resampling.NEAREST).crop((2, 2, 34, 34)))
                for top in range(0, 32, 8):
                    for left in range(0, 32, 8):
                        pixels = map_HW[top : top + 8, left : left + 8].ravel().tolist()
                        labels.append(min(set(pixels), key=lambda value: (-pixels.count(value), value)))
            found[split] = (features(network, shards_data, split, count).flatten(0, 1), labels)
        (bank, bank_labels), (queries, labels) = found["train"], found["val"]
        centre = bank.mean(0)
        said = []
        for query in queries:
            cosine = torch.cosine_similarity(query - centre, bank - centre).tolist()
            votes: dict[int, float] = {}
            for near in sorted(range(len(bank)), key=lambda i: -cosine[i])[:3]:
                votes[bank_labels[near]] = votes.get(bank_labels[near], 0) + math.exp(cosine[near] / 0.02)
            said.append(max(votes, key=lambda label: votes[label]))
        pairs = [(true, guess) for true, guess in zip(labels, said, strict=True) if true in bank_labels]
        ious = []
        for label in {value for pair in pairs for value in pair}:
            both = sum(pair == (label, label) for pair in pairs)
            ious.append(both / sum(label in pair for pair in pairs))
        return sum(ious) / len(ious)

    def test_equals_reference_vote(self, network, shards):
        watching, one = only(dense=self.SETTINGS, shards=shards, val_batch=4), trainer()
        watching.on_validation_epoch_end(one, network)
        expected = self.by_hand(network, watching.data)
        assert one.loggers[0].seen == [{"val/dense_knn_miou": pytest.approx(expected, abs=1e-6)}]
        assert 0.1 < expected < 1

    @pytest.mark.parametrize("world", [2, 3])
    def test_is_independent_of_world_size(self, world, network, shards, monkeypatch):
        settings = DenseKNNSettings(bank=13, queries=2, k=3, reduce_labels=False)  # of three processes, one has none
        alone = only(dense=settings, shards=shards)._patches(trainer(), network, "val")
        parts = [only(dense=settings, shards=shards) for _ in range(world)]
        kept = [part._decoded_patches(trainer(rank, world), network, "val") for rank, part in enumerate(parts)]
        with monkeypatch.context() as patch:
            patch.setattr(online_evaluation, "dealt_together", lambda share, total, world: share)
            shares = [parts[0]._embedded(trainer(), network, one, dense=True) for one in kept]
        for number, expected in enumerate(alone):
            mine = [share[number] for share in shares]
            monkeypatch.setattr(online_evaluation.distributed, "all_gather", gathers(mine, 2, world))
            assert torch.equal(online_evaluation.dealt_together(mine[0], 2, world).flatten(0, 1), expected)

    def test_without_label_maps(self, network, shards, photos):
        class Plain(PretrainData):
            label_maps = False

        views = TwoViewTransform(image_size=32, token_image_size=32)
        for train in (photos, [shards / "train", photos]):
            plain = Plain(train, photos, views=views, masking=None, global_batch_size=8, num_workers=0)
            assert not plain.has_label_maps
            one = trainer()
            OnlineEvaluation(plain, None, self.SETTINGS).on_validation_epoch_end(one, network)
            assert one.loggers[0].seen == []
        mixed = PretrainData(
            [photos, shards / "train"], shards / "val", views=views, masking=MASKING, global_batch_size=8, num_workers=0
        )
        one = trainer()
        OnlineEvaluation(mixed, None, self.SETTINGS).on_validation_epoch_end(one, network)
        assert one.loggers[0].seen[0].keys() == {"val/dense_knn_miou"}

    def test_bank_is_bounded(self):
        features, labels = torch.arange(90_000.0)[:, None], torch.arange(90_000)
        few, marked = online_evaluation.thinned(features, labels)
        assert len(few) == len(marked) == online_evaluation.MOST_PATCHES
        assert torch.equal(few[:, 0].long(), marked)
        assert (marked[0], marked[-1]) == (0, 89_999)


class TestPatchLabels:
    def see(self, ids: np.ndarray, reduce_labels=False, mode=None) -> list[int]:
        image = Image.new("RGB", ids.shape[::-1])
        found = PatchLabelTransform(32, 16, reduce_labels)(image, None, Image.fromarray(ids, mode))
        assert found["image"].shape == (3, 32, 32)
        return found["target"].tolist()

    def test_class_of_most_pixels(self):
        ids = np.zeros((36, 36), np.uint8)
        ids[2:18, 2:18], ids[2:10, 2:18] = 7, 4  # half and half: the lower one
        ids[2:18, 18:34], ids[2:4, 18:34] = 255, 9  # few pixels count
        ids[18:34, 2:18] = 255
        assert self.see(ids) == [4, 9, IGNORE, 0]
        assert self.see(ids, reduce_labels=True) == [3, 8, IGNORE, IGNORE]

    @pytest.mark.parametrize(
        "ids", [np.full((20, 36), 3, np.uint8), np.full((36, 36), 300, np.uint16), np.zeros((36, 36, 3), np.uint8)]
    )
    def test_maps_that_cannot_be_used(self, ids):
        image = Image.new("RGB", (36, 36))
        found = PatchLabelTransform(32, 16)(image, None, Image.fromarray(ids))
        assert found["target"].tolist() == [IGNORE] * 4


@pytest.mark.parametrize("task", ["pretrain"])
def test_training_is_the_same_with_and_without(task, shards, dvae_checkpoint, run_cli, tmp_path):
    words = fit_words(task, shards, f"tokenizer.path={dvae_checkpoint}", "steps=2", "val_every=1")
    for name, more in (("with", []), ("without", ["collapse=null", "dense_knn=null"])):
        assert run_cli(*words, *more, f"run_dir={tmp_path / name}")[0] == 0
    rows = rows_of(tmp_path / "with"), rows_of(tmp_path / "without")
    newer = {"val/feature_std", "val/rankme", "val/dense_knn_miou"}
    assert all(newer <= row.keys() for row in rows[0].values())
    assert [{name: row[name] for name in row.keys() - newer} for row in rows[0].values()] == [*rows[1].values()]
    states = [state_of(tmp_path / name) for name in ("with", "without")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
