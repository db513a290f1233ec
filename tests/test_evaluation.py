"""Frozen features: one pass, every image once; linear probes and kNN against references; the verb `probe`."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import torch

from beit_pretrain.data.datamodule import ClassificationData
from beit_pretrain.evaluation.features import AVG, CLS, FeatureStore, extract
from beit_pretrain.evaluation.knn import sweep
from beit_pretrain.evaluation.linear_probe import accuracy, moments, slices, train_probes
from beit_pretrain.models.backbone import FeatureExtractor, Features
from beit_pretrain.models.checkpoints.pretrained import load_pretrained
from beit_pretrain.models.linear_probe import LayerProbes
from beit_pretrain.transforms.jitter import HALF, normalise
from beit_pretrain.transforms.views import ClassificationTransform

CPU = torch.device("cpu")


def test_knn_equals_a_vote_by_hand():
    """Neighbour by neighbour in NumPy, for every k and temperature; a k beyond the bank takes all of it."""
    rng = np.random.default_rng(0)
    bank, queries = rng.normal(size=(40, 6)) + 3, rng.normal(size=(11, 6)) + 3
    bank_labels, labels = rng.integers(0, 4, 40), rng.integers(0, 4, 11)
    ks, temperatures = [1, 3, 10, 99], [0.02, 0.07, 1.0]
    tensors = [torch.tensor(x, dtype=torch.float32) for x in (bank, queries)]
    found = sweep(tensors[0], torch.tensor(bank_labels), tensors[1], torch.tensor(labels), 4, ks, temperatures)
    centred = [x - bank.mean(0) for x in (bank, queries)]
    bank, queries = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in centred)
    for (k, temperature), share in found.items():
        hits = 0
        for query, label in zip(queries, labels, strict=True):
            votes = np.zeros(4)
            for i in sorted(range(40), key=lambda i: -(bank[i] @ query))[:k]:
                votes[bank_labels[i]] += np.exp(bank[i] @ query / temperature)
            hits += int(votes.argmax() == label)
        assert share == pytest.approx(hits / 11), (k, temperature)
    assert len(found) == len(ks) * len(temperatures)


def test_linear_probes_are_linear_in_the_raw_features():
    """The fixed shift and scale can be multiplied into weight and bias."""
    mean, std = torch.randn(2, 10), torch.rand(2, 10) + 0.5
    probes = LayerProbes([1, 2], 5, 3, "cls_avg", mean, std)
    cls, patches = torch.randn(2, 7, 5), torch.randn(2, 7, 4, 5)
    found = probes(Features(list(cls), list(patches)))
    for layer, head in enumerate(probes.heads):
        weight = head.weight / std[layer]
        bias = head.bias - weight @ mean[layer]
        x = torch.cat([cls[layer], patches[layer].mean(1)], 1)
        assert torch.allclose(found[layer], x @ weight.T + bias, atol=1e-5)


@pytest.mark.parametrize(("pool", "chosen"), [("cls", [0]), ("avg", [1]), ("cls_avg", [0, 1])])
def test_moments_are_numpys(pool, chosen):
    features = np.random.default_rng(0).normal(2, 3, (1500, 3, 2, 4)).astype(np.float16)
    mean, std = moments(FeatureStore(features, np.zeros(1500, np.int64)), pool, CPU)
    expected = features.astype(np.float64)[:, :, chosen].reshape(1500, 3, -1)
    assert np.allclose(mean, expected.mean(0), atol=1e-5)
    assert np.allclose(std, expected.std(0), atol=1e-5)


def test_a_layer_that_knows_the_class_is_found():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 300)
    features = rng.normal(size=(300, 2, 2, 4)).astype(np.float16)
    features[:, 1, AVG, :3] += 6 * np.eye(3)[labels]
    labels[:5] = -1  # without a class: they neither train nor count
    stored = FeatureStore(features, labels)
    probes = train_probes(stored, 3, "cls_avg", 20, 64, 1e-2, 1e-4, 0, CPU)
    first, second = accuracy(probes, stored, CPU)
    assert second > 0.97
    assert first < 0.6


@pytest.mark.parametrize(("images", "batch"), [(100, 32), (5, 32), (64, 32), (1, 1)])
def test_an_epoch_has_every_image_once(images, batch):
    for seed in range(5):
        spans = list(slices(images, batch, np.random.default_rng(seed)))
        assert sorted(i for first, last in spans for i in range(first, last)) == list(range(images))
        assert all(last - first <= batch for first, last in spans)


def test_features_are_those_of_the_backbone_image_by_image(shards, mim_checkpoint, tmp_path):
    backbone = load_pretrained(mim_checkpoint)
    views = ClassificationTransform(32, False)
    data = ClassificationData(
        shards / "train", train_views=views, val_views=views, global_batch_size=1, num_workers=0, val_batch=5
    )
    dataset = data.eval_dataset("train", images=12)
    stored = extract(backbone, HALF, HALF, dataset, tmp_path, "train-x")
    assert stored.features.shape == (12, 2, 2, 32)
    for position in range(12):
        sample = dataset.sample(position)
        found = backbone(normalise(torch.from_numpy(sample["image"])[None].float() / 255, HALF, HALF))
        assert int(sample["label"]) == stored.labels[position]
        for layer in range(2):
            expected = found.cls[layer][0], found.patches[layer][0].mean(0)
            assert torch.allclose(stored.layer(layer, CLS)[position], expected[0], atol=2e-3)
            assert torch.allclose(stored.layer(layer, AVG)[position], expected[1], atol=2e-3)
    again = extract(None, HALF, HALF, dataset, tmp_path, "train-x")  # from the disk: no network is needed
    assert np.array_equal(again.features, stored.features)


@pytest.fixture
def words(shards, mim_checkpoint, tmp_path):
    data = [f"data.train={shards / 'train'}", f"data.val={shards / 'val'}", "data.num_workers=0", "threads=1"]
    return ["probe", f"init_from={mim_checkpoint}", f"out={tmp_path / 'probe'}", "linear.epochs=2", *data]


def test_the_verb_looks_at_every_image_once(words, run_cli, tmp_path, monkeypatch):
    seen = []
    forward = FeatureExtractor.forward
    monkeypatch.setattr(FeatureExtractor, "forward", lambda self, x: seen.append(len(x)) or forward(self, x))
    code, stdout, stderr = run_cli(*words, "knn.ks=[1,5]", "knn.temperatures=[0.07,1]", "data.val_batch=7")
    assert code == 0, stderr
    assert sum(seen) == 60
    with (tmp_path / "probe/layers.csv").open(newline="") as file:
        layers = list(csv.DictReader(file))
    with (tmp_path / "probe/knn.csv").open(newline="") as file:
        sweeps = list(csv.DictReader(file))
    assert [row["layer"] for row in layers] == ["1", "2"]
    assert len(sweeps) == 2 * 2 * 2 * 2  # layers, pools, k, temperatures
    for row in layers:
        best = max(float(s["accuracy"]) for s in sweeps if s["layer"] == row["layer"])
        assert float(row["knn"]) == best
    assert "| 2     |" in stdout
    assert (tmp_path / "probe/layers.png").is_file()
    assert not (tmp_path / "probe/features").exists()


def test_kept_features_are_used_again(words, run_cli, monkeypatch):
    code, first, stderr = run_cli(*words, "keep_features=true")
    assert code == 0, stderr
    monkeypatch.setattr(FeatureExtractor, "forward", None)
    code, second, stderr = run_cli(*words, "keep_features=true")
    assert code == 0, stderr
    assert first == second


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("data.val=null", "data.val is missing"),
        ("knn.ks=[0]", "knn.ks must be"),
        ("linear.pool=max", "linear.pool must be one of"),
        ("image_size=33", "not divisible"),
        ("data.channels=1", "set data.channels=3"),
        ("init_from=nowhere.ckpt", "does not exist"),
    ],
)
def test_bad_settings(word, said, words, run_cli, tmp_path):
    code, _, stderr = run_cli(*words, word)
    assert code == 2
    assert said in stderr
    assert stderr.count("\n") == 1
    assert not (tmp_path / "probe").exists()
