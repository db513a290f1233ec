"""Training samples depend only on their position, also with bad images; and the first one comes quickly."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tiny import spoil

from beit_pretrain.data import storage
from beit_pretrain.data.order import Sample
from beit_pretrain.data.reader import ShardReader
from beit_pretrain.data.write.make_shards import make_shards
from beit_pretrain.errors import UserError
from beit_pretrain.tasks.pretrain import PretrainData
from beit_pretrain.transforms import views
from beit_pretrain.transforms.masking import BlockwiseMask
from beit_pretrain.transforms.views import TwoViewTransform

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
VIEWS = TwoViewTransform(image_size=16, token_image_size=16)
MASKING = BlockwiseMask((2, 2), max_patches=2, min_block=1)
BATCH, STEPS = 12, 9  # of 47 images: two epochs and the beginning of a third, none of them whole batches
BAD = {0: [3, 4], 2: [0]}  # shard: rows that are no images; two in a row, and the first of a shard


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory) -> Path:
    """47 images in four shards, some of them undecodable."""
    out = tmp_path_factory.mktemp("spoiled")
    (folder,) = make_shards("synthetic", out, images=47, size=32, samples_per_shard=12, num_workers=1)
    for shard, rows in BAD.items():
        spoil(folder, shard, rows)
    return folder


def data(train, **settings) -> PretrainData:
    settings = {
        "global_batch_size": BATCH,
        "num_workers": 0,
        "shuffle_block_size": 8,
        "shuffle_streams": 4,
        "seed": 5,
    } | settings
    return PretrainData(train, views=VIEWS, masking=MASKING, **settings)


def batches(data: PretrainData, rank=0, world=1, micro_batches=1, done=0) -> list[dict]:
    """The batches of one process in a run of STEPS steps, beginning after `done` of them."""
    data.trainer = SimpleNamespace(
        accumulate_grad_batches=micro_batches,
        global_rank=rank,
        world_size=world,
        node_rank=0,
        num_devices=world,
        max_steps=STEPS,
        global_step=done,
    )
    return list(data.train_dataloader())


def sequence(batches: list[dict]) -> dict[int, tuple]:
    """All arrays of each position as bytes, and its records of bad images."""
    made: dict[int, tuple] = {}
    for batch in batches:
        bad: dict[int, list] = {}
        for record in batch.get("bad", []):
            bad.setdefault(record["position"], []).append(tuple(record.items()))
        for i, position in enumerate(batch["position"].tolist()):
            assert position not in made
            arrays = {key: value[i].numpy().tobytes() for key, value in batch.items() if key != "bad"}
            made[position] = (tuple(sorted(arrays.items())), tuple(bad.get(position, [])))
    return made


@pytest.fixture(scope="module")
def expected(spoiled):
    return sequence(batches(data(spoiled)))


@pytest.mark.parametrize(("num_workers", "world"), list(itertools.product((0, 1, 3), (1, 2, 4))))
def test_samples_are_independent_of_workers_and_ranks(spoiled, expected, num_workers, world):
    ranks = [batches(data(spoiled, num_workers=num_workers), rank, world) for rank in range(world)]
    assert sequence(list(itertools.chain(*ranks))) == expected
    for number in range(2):
        for rank, batch in enumerate(ranks):
            mine = {k for k in range(number * 47, (number + 1) * 47) if k % world == rank}
            assert mine <= sequence(batch).keys()


@pytest.mark.parametrize(("world", "micro_batches"), [(1, 1), (2, 3)])
def test_resume_at_any_step_gives_same_samples(spoiled, expected, world, micro_batches):
    for done in range(STEPS):
        ranks = [batches(data(spoiled), rank, world, micro_batches, done) for rank in range(world)]
        whole = {k: v for k, v in expected.items() if k >= done * BATCH}
        assert sequence(list(itertools.chain(*ranks))) == whole


def test_remote_shards_give_same_samples(spoiled, expected, serve, tmp_path):
    server = serve(spoiled)
    loaded = data(server.url, cache_dir=tmp_path / "cache")
    assert {k: v[0] for k, v in sequence(batches(loaded)).items()} == {k: v[0] for k, v in expected.items()}
    files = {name: count for name, count in server.requests.items() if count > 1}
    assert not files  # the prefetch thread and the readers share the cache


def test_epoch_covers_every_sample_and_lists_replacements(spoiled, expected):
    assert sorted(expected) == list(range(BATCH * STEPS))
    order, reader = data(spoiled).train_order(), ShardReader(spoiled)
    for number in range(2):
        epoch = range(number * 47, (number + 1) * 47)
        drawn = [order.sample_at(k) for k in epoch]
        assert sorted(drawn) == [Sample(s, r) for s, size in enumerate(reader.sizes) for r in range(size)]
        keys = {reader.key(Sample(shard, row)) for shard, rows in BAD.items() for row in rows}
        listed = [dict(record) for k in epoch for record in expected[k][1]]
        assert {record["key"] for record in listed} == keys
        assert len(listed) == 4  # row 3's neighbour is bad too: two records of its position, and one of row 4's own
        assert {(r["key"], r["replaced_by"]) for r in listed} == {
            *((reader.key(Sample(0, row)), reader.key(Sample(0, 5))) for row in (3, 4)),
            (reader.key(Sample(2, 0)), reader.key(Sample(2, 1))),
        }
        assert all(r["reason"] == "not an image in a known format" for r in listed)
        assert {r["shard"] for r in listed} == {f"{spoiled}/shard-{s:06d}.tar" for s in BAD}


def test_replacement_uses_own_label_and_rng_of_position(spoiled):
    dataset = data(spoiled).train_dataset(None)
    order, reader = dataset.order, dataset.reader
    position = next(k for k in range(47) if order.sample_at(k) == Sample(2, 0))
    made = dataset.sample(position)
    assert made["label"] == reader.read(Sample(2, 1)).label
    healthy = next(k for k in range(47) if order.sample_at(k) == Sample(2, 1))
    assert (made["jitter_factors"] != dataset.sample(healthy)["jitter_factors"]).any()


def test_too_many_consecutive_bad_images_raise(spoiled, tmp_path):
    folder = shutil.copytree(spoiled, tmp_path / "train")
    spoil(folder, 1, list(range(12)))
    dataset = data(folder).train_dataset(None)
    position = next(k for k in range(47) if dataset.order.sample_at(k).shard == 1)
    with pytest.raises(
        UserError, match=r"sample \d+ of .*shard-000001\.tar and the 11 images after it cannot be decoded: not an"
    ):
        dataset.sample(position)


def test_replacement_stays_within_subset(spoiled):
    dataset = data(spoiled, labels_per_class=2).train_dataset(None)
    chosen = {tuple(row) for row in dataset.subset.tolist()}
    for number, address in enumerate(dataset.subset.tolist()):
        for distance in range(30):
            assert dataset._neighbour(Sample(0, number), distance) in chosen
        assert dataset._neighbour(Sample(0, number), 0) == tuple(address)


def test_mixture_is_independent_of_workers_and_ranks(spoiled, shards):
    both, weights = [str(spoiled), str(shards / "val")], [0.6, 0.4]
    whole = sequence(batches(data(both, weights=weights)))
    ranks = [batches(data(both, weights=weights, num_workers=1), rank, 2) for rank in range(2)]
    assert sequence(list(itertools.chain(*ranks))) == whole
    assert sequence(batches(data(both, weights=weights), done=4)) == {k: v for k, v in whole.items() if k >= 48}
    mixed = data(both, weights=weights)
    assert mixed.samples == mixed.train_order().samples == 47 + ShardReader(shards / "val").samples
    with pytest.raises(UserError, match="exclude each other"):
        data(both, weights=weights, labels_per_class=1)
    with pytest.raises(UserError, match="2 numbers for 1 data sets"):
        data(str(spoiled), weights=weights).train_order()


def test_cache_smaller_than_working_set(spoiled, serve, tmp_path):
    server = serve(spoiled)
    size = sum(path.stat().st_size for path in spoiled.glob("*.tar"))
    small = {"cache_dir": tmp_path / "cache", "cache_gb": size / 2 / 1e9}
    with pytest.raises(UserError, match=r"data\.cache_gb=.* is too small: this node reads from 4 shards"):
        batches(data(server.url, **small))
    assert len(batches(data(server.url, **small, shuffle_streams=1, shuffle_block_size=1))) == STEPS


def test_shards_are_prefetched(spoiled, serve, tmp_path, monkeypatch):
    """The first batch needs one shard; the others come while nobody asks."""
    monkeypatch.setattr(storage, "LONGEST_PAUSE", 0.01)
    server = serve(spoiled)
    server.trouble = lambda name, number: "drop" if number == 0 else None
    loaded = data(server.url, cache_dir=tmp_path / "cache", retries=1, shuffle_streams=1, shuffle_block_size=12)
    loaded.trainer = SimpleNamespace(
        accumulate_grad_batches=1, global_rank=0, world_size=1, node_rank=0, num_devices=1, max_steps=9, global_step=0
    )
    iterator = iter(loaded.train_dataloader())
    next(iterator)
    ahead = len(loaded.train_order().upcoming_shards(0))
    for _ in range(100):
        if len(list((tmp_path / "cache").glob("*.tar"))) >= ahead > 1:
            break
        time.sleep(0.05)
    assert len(list((tmp_path / "cache").glob("*.tar"))) == ahead


FULL_SIZE = """
import json, sys, time
started = time.perf_counter()
from beit_pretrain.data.order import Order
from beit_pretrain.data.reader import ShardReader
from beit_pretrain.data.order import Sample
position, folder = int(sys.argv[1]), sys.argv[2]
reader = ShardReader(folder)
order = Order(reader.sizes)
step = position // 2048
addresses = order.samples_at(range(step * 2048, (step + 1) * 2048)).tolist()
size = sum(len(reader.read(Sample(*address)).data) for address in addresses)
first = time.perf_counter() - started
for step in range(step + 1, step + 100):  # fills the caches of windows and indices
    for address in order.samples_at(range(step * 2048, (step + 1) * 2048))[::40].tolist():
        reader.read(Sample(*address))
# Not ru_maxrss: a child inherits its parent's.
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024
print(json.dumps({"seconds": first, "mib": peak, "samples": reader.samples, "bytes": size}))
"""


@pytest.fixture(scope="module")
def full_size(tmp_path_factory) -> Path:
    """14.2 million samples in 14,200 shards, all links to one shard of 1000 small images."""
    out = tmp_path_factory.mktemp("full")
    (folder,) = make_shards("synthetic", out, images=1000, size=16, samples_per_shard=1000, num_workers=1)
    manifest = json.loads((folder / "manifest.json").read_text())
    (entry,) = manifest["shards"]
    manifest["shards"] = [{**entry, "name": f"shard-{i:06d}.tar"} for i in range(14_200)]
    for key in ("samples", "bytes"):
        manifest[key] = 14_200 * entry[key]
    manifest["class_counts"] = [14_200 * count for count in manifest["class_counts"]]
    for i in range(1, 14_200):
        for kind in ("tar", "index.npy"):
            os.link(folder / f"shard-000000.{kind}", folder / f"shard-{i:06d}.{kind}")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
@pytest.mark.parametrize("position", [0, 100_000_000])
def test_imagenet22k_size_starts_fast_in_little_memory(full_size, position):
    """Order, manifest and index of one process, and reading its first 2048 images."""
    command = [sys.executable, "-c", FULL_SIZE, str(position), str(full_size)]
    result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(result)
    assert result["samples"] == 14_200_000
    assert result["seconds"] < 3
    assert result["mib"] < 300


def test_first_batch_of_imagenet22k_size(full_size):
    start = time.perf_counter()
    loaded = data(full_size, global_batch_size=2048, shuffle_block_size=4096, shuffle_streams=64)
    loaded.trainer = SimpleNamespace(
        accumulate_grad_batches=16, global_rank=0, world_size=1, max_steps=10**6, global_step=100_000_000 // 2048
    )
    batch = next(iter(loaded.train_dataloader()))
    assert time.perf_counter() - start < 3
    assert batch["position"].tolist() == list(range(99_999_744, 99_999_744 + 128))
    assert np.isfinite(batch["jitter_factors"].numpy()).all()


@pytest.mark.parametrize(
    "error",
    [MemoryError(), OSError(12, "Cannot allocate memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
    ids=["python", "system", "torch"],
)
def test_out_of_memory_raises_instead_of_replacing_image(spoiled, error, monkeypatch):
    """The image is fine: replacing it would make the batch depend on the machine."""

    def short(*args, **settings):
        raise error

    monkeypatch.setattr(views, "resized", short)
    with pytest.raises(UserError, match=r"^not enough memory to decode \d{9} of .*shard-00000\d\.tar; fewer workers"):
        batches(data(spoiled))
    with pytest.raises(UserError, match=r"^not enough memory to decode"):  # from a worker, as one line too
        batches(data(spoiled, num_workers=1))
