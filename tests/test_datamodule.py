"""Batches are independent of workers, ranks, micro-batches and restarts; validation covers every image once."""

import io
import itertools
import json
import pickle
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import labels

from beit_pretrain.data.datamodule import ClassificationData, first_of_each_class
from beit_pretrain.data.dataset import BatchSchedule, EvalSchedule, StepSampler, first_position
from beit_pretrain.data.order import MASK, VIEW, Order, generator
from beit_pretrain.data.reader import ShardReader
from beit_pretrain.errors import UserError
from beit_pretrain.tasks.pretrain import PretrainData
from beit_pretrain.transforms.masking import BlockwiseMask
from beit_pretrain.transforms.views import ClassificationTransform, TwoViewTransform

VIEWS = TwoViewTransform(image_size=32, token_image_size=32)
MASKING = BlockwiseMask((4, 4), max_patches=6, min_block=2, attempts=1)  # few attempts: few masks reach the cap
JITTER = {"jitter_factors", "jitter_order", "jitter_tiles"}
KEYS = JITTER | {"image", "token_image", "label", "position", "mask", "mask_index"}


def pretrain_data(shards, **settings) -> PretrainData:
    settings = {
        "global_batch_size": 8,
        "num_workers": 0,
        "shuffle_block_size": 16,
        "shuffle_streams": 4,
        "seed": 3,
    } | settings
    return PretrainData(shards / "train", shards / "val", views=VIEWS, masking=MASKING, **settings)


def classification_data(shards, **settings) -> ClassificationData:
    settings = {"global_batch_size": 8, "num_workers": 0, "seed": 3} | settings
    views = {"train_views": ClassificationTransform(32), "val_views": ClassificationTransform(32, train=False)}
    return ClassificationData(shards / "train", shards / "val", **views, **settings)


def batches(data: PretrainData, steps: int = 3, rank=0, world=1, micro_batches=1, done=0) -> list[dict]:
    """The batches of one process in a run of `steps` steps, beginning after `done` of them."""
    data.trainer = SimpleNamespace(
        accumulate_grad_batches=micro_batches, global_rank=rank, world_size=world, max_steps=steps, global_step=done
    )
    return list(data.train_dataloader())


def assert_equal(first: list[dict], second: list[dict]) -> None:
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def by_position(batches: list[dict]) -> dict[int, dict]:
    rows = [{key: batch[key][i] for key in batch} for batch in batches for i in range(len(batch["position"]))]
    assert len({int(row["position"]) for row in rows}) == len(rows)
    return {int(row["position"]): row for row in rows}


@pytest.fixture(scope="module")
def expected(shards):
    """Three steps of one process without loader workers or micro-batches."""
    return batches(pretrain_data(shards))


def test_batch_contents(expected):
    assert len(expected) == 3
    for step, batch in enumerate(expected):
        assert batch.keys() == KEYS
        assert batch["image"].shape == batch["token_image"].shape == (8, 3, 32, 32)
        assert batch["image"].dtype == torch.uint8
        assert batch["position"].tolist() == list(range(8 * step, 8 * step + 8))
        assert batch["label"].dtype == batch["position"].dtype == batch["mask_index"].dtype == torch.int64
        assert batch["mask"].shape == (8, 16)
        assert batch["mask_index"].shape == (8, 6)


def test_mask_index_lists_the_masked_patches(expected):
    counts = set()
    for mask, index in itertools.chain(*(zip(b["mask"], b["mask_index"], strict=True) for b in expected)):
        masked = np.flatnonzero(mask.numpy()).tolist()
        assert index.tolist() == masked + [-1] * (6 - len(masked))
        counts.add(len(masked))
    assert len(counts) > 1  # the cap is a cap: padding is really met


def test_position_combines_sample_view_and_mask(shards, expected):
    """Sample, view and mask of a position come from their own modules and random numbers."""
    reader = ShardReader(shards / "train")
    order = Order(reader.sizes, seed=3, block_size=16, streams=4)
    for i, position in enumerate(expected[1]["position"].tolist()):
        data, label = reader.read(order.sample_at(position))
        image = Image.open(io.BytesIO(data))
        parts = VIEWS(image, generator(3, position, VIEW))
        parts |= {"mask": MASKING.draw(generator(3, position, MASK)).reshape(-1), "label": label}
        for key, array in parts.items():
            assert torch.equal(expected[1][key][i], torch.as_tensor(array))


def test_batches_are_independent_of_workers(shards, expected):
    assert_equal(batches(pretrain_data(shards, num_workers=2)), expected)


def test_pickled_dataset_gives_same_batches(shards, expected):
    dataset = pretrain_data(shards).train_dataset(BatchSchedule(8))
    dataset[0]  # fills the caches, which must not travel
    assert_equal([pickle.loads(pickle.dumps(dataset))[1]], expected[1:2])


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_batches_are_independent_of_ranks_and_micro_batches(shards, expected, world, micro_batches):
    ranks = [batches(pretrain_data(shards), rank=r, world=world, micro_batches=micro_batches) for r in range(world)]
    for step, batch in enumerate(expected):
        part = slice(step * micro_batches, (step + 1) * micro_batches)
        rows = by_position([b for rank in ranks for b in rank[part]])
        assert sorted(rows) == batch["position"].tolist()
        for i, position in enumerate(batch["position"].tolist()):
            assert all(torch.equal(rows[position][key], batch[key][i]) for key in KEYS)
    assert {len(b["position"]) for rank in ranks for b in rank} == {8 // world // micro_batches}


def test_resume_continues_at_saved_step(shards, expected):
    data = pretrain_data(shards)
    assert_equal(batches(data, done=1, micro_batches=2), batches(data, micro_batches=2)[2:])
    assert_equal(batches(data, done=1), expected[1:])
    sampler = data.train_dataloader().sampler
    assert (len(sampler), list(sampler)) == (3, [1, 2])  # Lightning counts batches against the whole run's length


def test_seed_changes_batches(shards, expected):
    (other,) = batches(pretrain_data(shards, seed=4), steps=1)
    for key in ("image", "mask", "jitter_factors"):
        assert not torch.equal(other[key], expected[0][key])


def test_epoch_has_every_image_once(shards):
    data = pretrain_data(shards, global_batch_size=10)
    reader = data.readers["train"]
    assert data.samples % 10 == 0
    steps = data.samples // 10
    drawn = [
        np.sort(torch.cat([b["label"] for b in batches(data, 2 * steps, done=k)[:steps]])).tolist() for k in (0, steps)
    ]
    assert drawn == [np.sort(labels(reader)).tolist()] * 2


@pytest.mark.parametrize(("world", "batch_size"), list(itertools.product((1, 2, 3, 5), (1, 4, 100))))
@pytest.mark.parametrize("samples", [1, 11, 12])
def test_validation_covers_every_image_once(world, batch_size, samples):
    plans = [EvalSchedule(samples, batch_size, rank, world) for rank in range(world)]
    seen = [list(plan.positions(batch)) for plan in plans for batch in range(len(plan))]
    assert sorted(itertools.chain(*seen)) == list(range(samples))
    assert all(0 < len(batch) <= batch_size + 1 for batch in seen)
    assert samples < world or len({len(plan) for plan in plans}) == 1


def test_validation_views_and_masks_are_fixed(shards):
    first = [pretrain_data(shards, seed=seed, val_batch=5).eval_dataset() for seed in (0, 1)]
    assert_equal(*([dataset[i] for i in range(len(dataset.plan))] for dataset in first))
    shares = [pretrain_data(shards, val_batch=2).eval_dataset(rank=rank, world=2) for rank in range(2)]
    rows = by_position([dataset[i] for dataset in shares for i in range(len(dataset.plan))])
    whole = by_position([first[0][i] for i in range(len(first[0].plan))])
    assert rows.keys() == whole.keys() == set(range(first[0].reader.samples))
    assert all(torch.equal(rows[position][key], whole[position][key]) for position in whole for key in KEYS)


def test_val_images_caps_validation(shards):
    data = pretrain_data(shards, val_images=3, val_batch=2)
    data.trainer = None
    assert [len(batch["position"]) for batch in data.val_dataloader()] == [2, 1]
    assert pretrain_data(shards, val_images=10**6).eval_dataset().plan.samples == data.readers["val"].samples


def test_no_validation_without_val_data(shards):
    data = PretrainData(shards / "train", views=VIEWS, masking=MASKING, global_batch_size=8)
    assert data.val_dataloader() == []


def test_classification_batches(shards):
    data = classification_data(shards)
    (batch,) = batches(data, steps=1)
    assert batch.keys() == {"image", "label", "position"}
    held_out = data.eval_dataset()[0]
    assert held_out["label"].tolist() == labels(data.readers["val"]).tolist()


def test_labels_match_images(shards):
    """The label in the index is the texture in the image: the only nonzero value of its label map."""
    reader = ShardReader(shards / "train")
    manifest = json.loads((shards / "train/manifest.json").read_text())
    assert np.bincount(labels(reader), minlength=10).tolist() == manifest["class_counts"]
    assert reader.samples == manifest["samples"] == len(labels(reader))


@pytest.mark.parametrize("count", [1, 2])
def test_per_class_selects_first_of_each_class(shards, count):
    data = classification_data(shards, labels_per_class=count, global_batch_size=10)
    reader = data.readers["train"]
    assert data.samples == 10 * count
    everything = [(shard, i) for shard, size in enumerate(reader.sizes) for i in range(size)]
    of_class = [[address for address, y in zip(everything, labels(reader), strict=True) if y == c] for c in range(10)]
    assert [tuple(row) for row in data.subset] == sorted(itertools.chain(*(a[:count] for a in of_class)))
    for done in (0, count):  # every epoch has each of them once
        drawn = torch.cat([batch["label"] for batch in batches(data, steps=2 * count, done=done)[:count]])
        assert drawn.bincount().tolist() == [count] * 10


def test_per_class_above_class_size_selects_all(shards):
    assert classification_data(shards, labels_per_class=10**6).samples == ShardReader(shards / "train").samples


def test_sampler_starts_at_step():
    assert (list(StepSampler(5, start=3)), len(StepSampler(5, start=3))) == ([3, 4], 5)


class TestErrors:
    def test_invalid_settings(self, shards, tmp_path):
        with pytest.raises(ValueError, match="num_workers"):
            pretrain_data(shards, num_workers=-1)
        with pytest.raises(ValueError, match="labels_per_class"):
            pretrain_data(shards, labels_per_class=0)
        with pytest.raises(UserError, match="does not exist"):
            pretrain_data(tmp_path / "nowhere")

    def test_folder_of_splits(self, shards):
        assert str(ShardReader(shards).folders[0]) == str(shards / "train")
        assert str(ShardReader(shards, split="validation").folders[0]) == str(shards / "val")

    def test_no_labels(self, shards):
        reader = ShardReader(shards / "train")
        reader.classes, reader.labels = [], lambda shard: np.full(reader.sizes[shard], -1)
        with pytest.raises(UserError, match="has no known labels"):
            first_of_each_class(reader, 1)

    def test_val_with_other_classes(self, shards, tmp_path):
        folder = shutil.copytree(shards / "val", tmp_path / "val")
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["classes"][0] = "another"
        (folder / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(UserError, match="has other classes"):
            PretrainData(shards / "train", folder, views=VIEWS, masking=MASKING, global_batch_size=8)

    def test_shards_must_match_manifest(self, shards, tmp_path):
        folder = shutil.copytree(shards / "val", tmp_path / "val")
        shard = next(folder.glob("*.tar"))
        shard.write_bytes(shard.read_bytes()[:-512])
        with pytest.raises(UserError, match="not as its manifest says"):
            ShardReader(folder)
        shard.unlink()
        with pytest.raises(UserError, match="missing"):
            ShardReader(folder)

    def test_missing_index(self, shards, tmp_path):
        folder = shutil.copytree(shards / "val", tmp_path / "val")
        next(folder.glob("*.npy")).unlink()
        with pytest.raises(UserError, match="is missing or damaged"):
            labels(ShardReader(folder))


def test_first_position_stays_on_host(shards):
    data = pretrain_data(shards)
    batch = data.on_before_batch_transfer(data.train_dataset(BatchSchedule(8))[3], 0)
    assert first_position(batch) == batch["first_position"] == 24
    assert first_position({"position": torch.tensor([7, 8])}) == 7
