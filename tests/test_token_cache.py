"""Cached tokens give exactly the loss of a run that computes them for the same views; mismatches are refused."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from test_datamodule import MASKING, assert_equal, batches, by_position
from test_pretraining import Pretraining, trainer
from test_pretraining import module as network
from tiny import spoil

from beit_pretrain.data.dataset import BatchSchedule
from beit_pretrain.data.order import CACHED_VIEW, Sample, generator
from beit_pretrain.data.reader import ShardReader
from beit_pretrain.errors import UserError
from beit_pretrain.tasks.pretrain import PretrainData
from beit_pretrain.tokenizers.dvae import DVAETokenizer
from beit_pretrain.tokenizers.token_cache import CachedTokens, TokenFolder, same_tokenizer
from beit_pretrain.tokenizers.tokenize import make_tokens
from beit_pretrain.transforms.views import TwoViewTransform

VIEWS = TwoViewTransform(image_size=32, token_image_size=32)
GRID = (4, 4)


def tokens_of(source: Path, out: Path, dvae: Path, views: TwoViewTransform = VIEWS, count: int = 2, **how) -> Path:
    assert make_tokens(ShardReader(source), out, DVAETokenizer(dvae), views, GRID, count, **how)
    return out


@pytest.fixture(scope="module")
def cached(shards, dvae_checkpoint, tmp_path_factory) -> Path:
    """Two views of every training image in `train`, one view of every validation image in `val`."""
    folder = tmp_path_factory.mktemp("cached")
    tokens_of(shards / "train", folder / "train", dvae_checkpoint)
    tokens_of(shards / "val", folder / "val", dvae_checkpoint, count=1)
    return folder


def data_of(shards: Path, tokens: Path, views: TwoViewTransform = VIEWS, **settings) -> PretrainData:
    settings = {
        "global_batch_size": 8,
        "num_workers": 0,
        "shuffle_block_size": 16,
        "shuffle_streams": 4,
        "seed": 3,
    } | settings
    folders = {"train": [TokenFolder(tokens)]}
    return PretrainData(shards / "train", views=views, masking=MASKING, tokens=folders, **settings)


class Drawn:
    """Replaces cached tokens: draws the same views again, for a run that computes its tokens."""

    def __init__(self, reader: ShardReader, views: TwoViewTransform, count: int, seed: int = 0):
        self.first, self.views, self.count, self.seed = np.cumsum([0, *reader.sizes]), views, count, seed

    def view(self, sample, epoch, data):
        number = int(self.first[sample.shard]) + sample.row
        rng = generator(self.seed, (epoch % self.count) * 2**40 + number, CACHED_VIEW)
        return self.views.prepare_view(data, rng)


class KeepsLosses(Pretraining):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.losses = [*getattr(self, "losses", []), loss.item()]
        return loss


def trained(data: PretrainData, tokenizer, steps: int) -> KeepsLosses:
    plain = network()  # weights of one seed
    module = KeepsLosses(plain.model, tokenizer, plain.optim, plain.mean, plain.std)
    trainer(steps).fit(module, data)
    return module


@pytest.mark.parametrize(
    "views",
    [
        VIEWS,
        TwoViewTransform(32, 32, pil_reference=True),
        TwoViewTransform(32, 32, jitter=(0, 0, 0)),
        TwoViewTransform(32, 32, flip=1),
    ],
    ids=["fast", "exact", "no jitter", "always flipped"],
)
def test_loss_equals_that_of_computed_tokens(views, shards, dvae_checkpoint, tmp_path):
    folder = tokens_of(shards / "train", tmp_path / "tokens", dvae_checkpoint, views)
    steps = 2 * ShardReader(shards / "train").samples // 8 + 1  # both views of an image come
    from_cache = trained(data_of(shards, folder, views), None, steps)
    data = data_of(shards, folder, views)
    data.tokens["train"] = Drawn(data.readers["train"], views, 2)
    computing = trained(data, DVAETokenizer(dvae_checkpoint), steps)
    assert len(from_cache.losses) == steps
    assert from_cache.losses == computing.losses
    for one, other in zip(from_cache.model.parameters(), computing.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert len(set(from_cache.losses)) > steps // 2


def test_views_of_an_image_rotate_by_epoch(shards, cached, dvae_checkpoint):
    data = data_of(shards, cached / "train", global_batch_size=10)
    epoch = data.samples // 10
    rows = [by_position(batches(data, 3 * epoch, done=k * epoch)[:epoch]) for k in range(3)]
    assert rows[0][0].keys() == {
        "image",
        "tokens",
        "jitter_factors",
        "jitter_order",
        "jitter_tiles",
        "label",
        "position",
        "mask",
        "mask_index",
    }
    order = data.train_order()
    of_sample = [{order.sample_at(p): row for p, row in epoch_rows.items()} for epoch_rows in rows]
    assert of_sample[0].keys() == of_sample[1].keys() == of_sample[2].keys()
    for sample in of_sample[0]:
        first, second, third = (epoch_rows[sample] for epoch_rows in of_sample)
        assert torch.equal(first["image"], third["image"])
        assert torch.equal(first["tokens"], third["tokens"])
        assert not torch.equal(first["jitter_factors"], second["jitter_factors"])
    masks = [torch.stack([epoch_rows[s]["mask"] for s in of_sample[0]]) for epoch_rows in of_sample]
    assert not torch.equal(masks[0], masks[2])  # the mask is the position's, not the view's


def test_batches_are_independent_of_workers_ranks_and_restarts(shards, cached):
    data = data_of(shards, cached / "train")
    expected = batches(data, 12)
    assert_equal(batches(data_of(shards, cached / "train", num_workers=2), 12), expected)
    assert_equal(batches(data, 12, done=7), expected[7:])
    whole = by_position(expected)
    for world, micro_batches in ((2, 1), (4, 2)):
        ranks = [batches(data, 12, rank, world, micro_batches) for rank in range(world)]
        rows = by_position([batch for rank in ranks for batch in rank])
        assert rows.keys() == whole.keys()
        assert all(torch.equal(rows[p][key], whole[p][key]) for p in whole for key in whole[p])


def test_pickled_dataset_gives_same_batches(shards, cached):
    dataset = data_of(shards, cached / "train").train_dataset(BatchSchedule(8))
    first = dataset[1]
    assert_equal([pickle.loads(pickle.dumps(dataset))[1]], [first])


def test_weighted_mixture_of_two_datasets(shards, cached):
    folders = {"train": [TokenFolder(cached / "train"), TokenFolder(cached / "val")]}
    sources = [shards / "train", shards / "val"]
    settings = {"global_batch_size": 8, "num_workers": 0, "weights": [0.5, 0.5]}
    data = PretrainData(sources, views=VIEWS, masking=MASKING, tokens=folders, **settings)
    rows = by_position(batches(data, 40))
    order, shards_of_first = data.train_order(), len(data.readers["train"].folders[0].shards)
    seen: dict = {}
    for position in sorted(rows):
        seen.setdefault(order.sample_at(position), []).append(rows[position]["tokens"].tolist())
    held_out = [times for sample, times in seen.items() if sample.shard >= shards_of_first]
    assert min(map(len, held_out)) > 2
    assert all(len({tuple(t) for t in times}) == 1 for times in held_out)  # one view
    train = [times for sample, times in seen.items() if sample.shard < shards_of_first and len(times) > 2]
    assert all(times[0] == times[2] for times in train)
    assert any(times[0] != times[1] for times in train)


def test_validation_tokens(shards, cached):
    folders = {"val": [TokenFolder(cached / "val")]}
    data = PretrainData(
        shards / "train", shards / "val", views=VIEWS, masking=MASKING, tokens=folders, global_batch_size=8
    )
    assert "tokens" in data.eval_dataset()[0]
    assert "token_image" not in data.eval_dataset()[0]
    assert "token_image" in data.eval_dataset("train")[0]
    assert "tokens" not in data.eval_dataset(views=VIEWS)[0]


def test_image_without_tokens_is_replaced(shards, dvae_checkpoint, tmp_path):
    folder = Path(shutil.copytree(shards / "train", tmp_path / "train"))
    spoil(folder, 0, [3])
    tokens = tokens_of(folder, tmp_path / "tokens", dvae_checkpoint)
    assert json.loads((tokens / "tokens.json").read_text())["undecodable"] == 1
    data = PretrainData(
        folder,
        views=VIEWS,
        masking=MASKING,
        tokens={"train": [TokenFolder(tokens)]},
        global_batch_size=10,
        num_workers=0,
    )
    made = batches(data, data.samples // 10)
    (record,) = [record for batch in made for record in batch.get("bad", [])]
    order, reader = data.train_order(), data.readers["train"]
    assert order.sample_at(record["position"]) == (0, 3)
    rows = by_position([{k: v for k, v in batch.items() if k != "bad"} for batch in made])
    neighbour = next(row for p, row in rows.items() if order.sample_at(p) == (0, 4))
    assert torch.equal(rows[record["position"]]["tokens"], neighbour["tokens"])
    assert reader.key(order.sample_at(record["position"])) == record["key"]


class TestErrors:
    def refused(self, shards, tokens, said: str, views=VIEWS, grid=GRID, source="train"):
        with pytest.raises(UserError, match=said) as caught:
            CachedTokens([TokenFolder(tokens)], ShardReader(shards / source), views, grid)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("settings", "said"),
        [
            ({"image_size": 64}, "of views with image_size=32, not 64"),
            ({"token_image_size": 64}, "data.token_image_size=32, not 64"),
            ({"jitter": (0, 0, 0)}, r"data.jitter=\[0.4, 0.4, 0.4\], not \[0.0, 0.0, 0.0\]"),
            ({"scale": (0.2, 1.0)}, r"data.scale=\[0.08, 1.0\], not \[0.2, 1.0\]"),
            ({"ratio": (1, 1)}, "data.ratio="),
            ({"flip": 0.0}, "data.flip=0.5, not 0.0"),
            ({"pil_reference": True}, "data.pil_reference=False, not True"),
            ({"channels": 1}, "data.channels=3, not 1"),
        ],
    )
    def test_mismatched_view_settings(self, settings, said, shards, cached):
        views = TwoViewTransform(**{"image_size": 32, "token_image_size": 32} | settings)
        self.refused(shards, cached / "train", said, views)

    def test_mismatched_images_or_patch_grid(self, shards, cached):
        self.refused(shards, cached / "val", "holds tokens of other images than data.train=")
        self.refused(shards, cached / "train", "holds 4 x 4 tokens an image, the run has 2 x 2 patches", grid=(2, 2))
        both = ShardReader([shards / "train", shards / "val"])
        with pytest.raises(UserError, match=r"data\.tokens names 1 folders for the 2 of data\.train"):
            CachedTokens([TokenFolder(cached / "train")], both, VIEWS, GRID)

    def test_changed_shards(self, shards, cached, tmp_path):
        folder = Path(shutil.copytree(shards / "train", tmp_path / "train"))
        spoil(folder, 0, [3])
        self.refused(tmp_path, cached / "train", "holds tokens of other images")

    def test_mismatched_tokenizer(self, cached):
        folders = [TokenFolder(cached / name) for name in ("train", "val")]
        same_tokenizer(folders, "it", folders[0].tokenizer["sha256"])
        with pytest.raises(UserError, match=r"another tokenizer .DVAETokenizer, SHA-256"):
            same_tokenizer(folders, "it", "0" * 64)
        folders[1].tokenizer = {**folders[1].tokenizer, "sha256": "0" * 64}
        with pytest.raises(UserError, match="hold tokens of different tokenizers"):
            same_tokenizer(folders)

    def test_missing_tokens(self, shards, tmp_path):
        with pytest.raises(UserError, match=r"has no tokens\.json; make tokens with"):
            TokenFolder(shards / "train")
        with pytest.raises(UserError, match="local folder"):
            TokenFolder("https://host/tokens")

    @pytest.mark.parametrize(
        "change",
        [
            lambda about: about.pop("view"),
            lambda about: about.update(views="2"),
            lambda about: about.update(grid=[4]),
            lambda about: about.update(format="x"),
            lambda about: about["tokenizer"].update(vocab_size=2**20),
            lambda about: about["shards"][0].update(sha256="../.."),
            lambda about: about.update(shards=7),
        ],
    )
    def test_damaged_manifest(self, change, cached, tmp_path):
        folder = Path(shutil.copytree(cached / "train", tmp_path / "tokens"))
        about = json.loads((folder / "tokens.json").read_text())
        change(about)
        (folder / "tokens.json").write_text(json.dumps(about))
        with pytest.raises(UserError, match=r"is damaged|has format"):
            TokenFolder(folder)

    def test_a_file_that_shrinks_while_it_is_open(self, shards, cached, tmp_path):
        folder = TokenFolder(shutil.copytree(cached / "train", tmp_path / "tokens"))
        tokens = CachedTokens([folder], ShardReader([shards / "train"]), VIEWS, GRID)
        tokens.view(Sample(0, 0), 0, b"")
        with (folder.path / "shard-000000.tokens.npy").open("r+b") as file:
            file.truncate(200)
        with pytest.raises(UserError, match="shorter than its header says"):
            tokens.view(Sample(0, 3), 0, b"")

    def test_damaged_files(self, shards, cached, tmp_path):
        folder = Path(shutil.copytree(cached / "train", tmp_path / "tokens"))
        data = data_of(shards, folder)
        file = folder / "shard-000000.tokens.npy"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"shard-000000\.tokens\.npy has changed"):
            batches(data, 7)
        file.write_bytes(content[:-1])
        self.refused(shards, folder, "shard-000000.tokens.npy is missing or not as tokens.json says")
        file.unlink()
        self.refused(shards, folder, "shard-000000.tokens.npy is missing")
