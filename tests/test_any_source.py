"""The same images from every kind of source give the same batches, for any number of workers and processes."""

import os
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import webdataset as wds
from loopback import Server, serving
from table_makers import table_of, write
from test_listed_folder import VIEWS, assert_same
from test_sources import class_files, write_folder

from beit_pretrain.data import listed_folder
from beit_pretrain.data.datamodule import ClassificationData
from beit_pretrain.data.reader import ShardReader
from beit_pretrain.data.write.make_shards import make_shards
from beit_pretrain.errors import UserError
from beit_pretrain.inference.image_stream import source_of

SHARD = 7  # images; 18 in three shards


@pytest.fixture(scope="module")
def kinds(tmp_path_factory) -> dict[str, str]:
    """A source of every kind, of the same 18 images in 3 classes."""
    folder = tmp_path_factory.mktemp("kinds")
    photos = write_folder(folder / "photos", class_files())
    (shards,) = make_shards(photos, folder / "shards", samples_per_shard=SHARD, num_workers=1)
    tars = sorted(shards.glob("*.tar"))
    for tar in tars:
        os.link(tar, folder / tar.name)
    for number, tar in enumerate(tars):
        with tarfile.open(tar) as members:
            read = {member.name: members.extractfile(member).read() for member in members}
        images = sorted(name for name in read if name.endswith(".jpg"))
        labels = [int(read[name.replace(".jpg", ".cls")]) for name in images]
        table = table_of([read[name] for name in images], labels, ["ant", "bee", "cat"])
        write(folder / "parquet" / f"train-{number:05d}-of-00003.parquet", table)
    files = {f"/{tar.name}": tar.read_bytes() for tar in tars}
    with serving(Server(files)) as ranges, serving(Server(files, ranges=False)) as whole:
        yield {
            "shards": str(shards),
            "folder above the shards": str(folder / "shards"),
            "braces": f"{folder}/shard-{{000000..000002}}.tar",
            "glob": f"{folder}/shard-*.tar",
            "joined": "::".join(str(folder / tar.name) for tar in tars),
            "class folders": str(photos),
            "ranges": f"{ranges.url}/shard-{{000000..000002}}.tar",
            "no ranges": f"{whole.url}/shard-{{000000..000002}}.tar",
            "pipe": f"pipe:cat {folder}/shard-{{000000..000002}}.tar",
            "parquet": str(folder / "parquet"),
        }


def batches(source: str, cache: Path, workers: int = 0, world: int = 1) -> list[dict]:
    """The batches of two epochs, rank after rank."""
    found = []
    for rank in range(world):
        data = ClassificationData(
            source,
            **VIEWS,
            global_batch_size=6,
            num_workers=workers,
            order="position",
            cache_dir=str(cache),
            shuffle_streams=2,
            shuffle_block_size=5,
        )
        steps = {"max_steps": 6, "global_step": 0, "accumulate_grad_batches": 1}
        data.trainer = SimpleNamespace(**steps, global_rank=rank, world_size=world, node_rank=0, num_devices=world)
        found += list(data.train_dataloader())
    return found


@pytest.fixture(scope="module")
def expected(kinds, tmp_path_factory) -> dict[int, list[dict]]:
    return {world: batches(kinds["shards"], tmp_path_factory.mktemp("cache"), world=world) for world in (1, 2)}


@pytest.mark.parametrize(
    "kind", ["folder above the shards", "braces", "class folders", "ranges", "no ranges", "pipe", "parquet"]
)
def test_same_batches(kinds, expected, kind, tmp_path, monkeypatch):
    monkeypatch.setattr(listed_folder, "SHARD", SHARD)
    for workers, world in ((0, 1), (1, 2), (3, 1)):
        assert_same(batches(kinds[kind], tmp_path, workers, world), expected[world])


@pytest.mark.parametrize("kind", ["glob", "joined"])
def test_other_spellings(kinds, kind):
    keys = [
        [reader.sizes, reader.folders[0].addresses()] for reader in map(ShardReader, (kinds[kind], kinds["braces"]))
    ]
    assert keys[0] == keys[1]


def test_predict_reads_every_kind(kinds):
    """By the bytes of the images: names differ."""
    images = {}
    for kind, source in kinds.items():
        listed = source_of(source)
        images[kind] = sorted(listed[number][1]() for number in range(len(listed)))
    assert all(found == images["shards"] and len(found) == 18 for found in images.values())


def test_mixtures_of_kinds(kinds):
    data = ClassificationData(
        [kinds["class folders"], kinds["braces"], kinds["parquet"]], **VIEWS, weights=[1, 1, 2], global_batch_size=4
    )
    assert data.samples == 54
    with pytest.raises(UserError, match="is not made of tars, so it cannot be streamed"):
        ClassificationData([kinds["class folders"], kinds["braces"]], **VIEWS, order="stream", global_batch_size=4)


def test_our_shards_in_plain_webdataset(kinds):
    """As README says it."""
    shards = sorted(str(path) for path in Path(kinds["shards"]).glob("*.tar"))
    dataset = wds.WebDataset(shards, shardshuffle=False).decode("pil").to_tuple("jpg", "cls")
    found = [(image.size, label) for image, label in wds.WebLoader(dataset, batch_size=None, num_workers=1)]
    assert [size for size, _ in found] == [(24, 18)] * 18
    reader = ShardReader(kinds["shards"])
    assert [label for _, label in found] == [label for shard in range(3) for label in reader.labels(shard)]
