"""`bench loader`: every variant gives the batch that it is said to give, and the command reports all of them."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from beit_pretrain.benchmarks import loader as bench_loader
from beit_pretrain.benchmarks.loader import REFERENCE, make_variants, mean_grey, measure
from beit_pretrain.data.order import Sample
from beit_pretrain.transforms.jitter import jittered_view

NAMES = {REFERENCE, "reference_uint8", "exact", "fast", "stream", "in_place", "resized", "cached"}


@pytest.fixture(scope="module")
def variants(photos, tmp_path_factory):
    files = [path.read_bytes() for path in sorted(photos.rglob("*.jpg"))]
    return make_variants(files, tmp_path_factory.mktemp("bench"), (64, 32), seed=0)


def test_the_batches_are_what_they_are_said_to_be(variants):
    assert variants.keys() == NAMES
    batches = {name: bench_loader.batches_of(dataset)(0) for name, dataset in variants.items()}
    for name, batch in batches.items():
        floats = name == REFERENCE
        assert batch["image"].shape == (32, 3, 64, 64)
        assert batch["image"].dtype == (torch.float32 if floats else torch.uint8)
        assert batch["mask"].flatten(1).shape == (32, 16)
        if name == "cached":
            assert "token_image" not in batch
            assert batch["tokens"].shape == (32, 16)
        else:
            assert batch["token_image"].shape == (32, 3, 32, 32)
    assert -1 <= batches[REFERENCE]["image"].min() < -0.1 < 0.1 < batches[REFERENCE]["image"].max() <= 1
    assert 0.099 < batches[REFERENCE]["token_image"].min() < batches[REFERENCE]["token_image"].max() < 0.901
    assert torch.equal(batches["exact"]["mask"], batches["fast"]["mask"])
    cached = batches["cached"]  # its tokens are of the very view that it shows
    of_view = mean_grey(torch.nn.functional.avg_pool2d(jittered_view(cached, "image"), 2))
    assert (cached["tokens"] - of_view).abs().float().mean() < 3


def test_the_device_part_gives_what_the_reference_has_done(variants):
    """Floats, normalised alike: what `fast` saves a loader must be done elsewhere; a row says at what rate."""
    image, token_image = bench_loader.device_part(variants["fast"][0])
    theirs = variants[REFERENCE][0]
    for ours, reference in ((image, theirs["image"]), (token_image, theirs["token_image"])):
        assert (ours.shape, ours.dtype) == (reference.shape, torch.float32)
        assert abs(ours.mean() - reference.mean()) < 0.2 * (reference.max() - reference.min())  # other crops and jitter
    assert -1 <= image.min() < -0.1 < 0.1 < image.max() <= 1
    assert 0.099 < token_image.min() < token_image.max() < 0.901


def test_resized_shards_are_smaller_images(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_loader, "RESIZE", 32)
    files = [path.read_bytes() for path in sorted(photos.rglob("*.jpg"))]
    made = make_variants(files, tmp_path, (32, 16), seed=0)
    for name, shorter in (("fast", 40), ("resized", 32)):
        data = [made[name].reader.read(Sample(0, row)).data for row in range(len(files))]
        assert max(min(Image.open(io.BytesIO(d)).size) for d in data) >= shorter
        assert (min(min(Image.open(io.BytesIO(d)).size) for d in data) > 32) == (name == "fast")
    assert made["resized"].reader.samples == made["fast"].reader.samples == len(files)


def test_rates_are_images_per_cpu_second(monkeypatch):
    clock = iter(np.arange(0, 100, 0.75))
    monkeypatch.setattr(bench_loader.time, "process_time", lambda: float(next(clock)))
    read: list[int] = []
    rates = measure({"a": read.append, "b": read.append}, rounds=2, batches=3)
    assert rates == {"a": [128.0, 128.0], "b": [128.0, 128.0]}  # 3 x 32 images in .75 s
    assert read == [0, 0, *2 * [0, 1, 2], *2 * [3, 4, 5]]  # warm-up, then in turn


def test_the_command(run_cli, photos):
    code, stdout, stderr = run_cli("bench", "loader", f"src={photos}", "image_size=64", "rounds=1", "threads=null")
    assert code == 0, stderr
    last = json.loads(stdout.splitlines()[-1])
    assert last["images"] == 18
    assert last["reference_images_per_s_core"] > 0
    assert all(last[name] > 0 for name in NAMES - {REFERENCE})
    assert last["images_per_s_core"].keys() == NAMES
    assert last["stream_to_fast"] == pytest.approx(last["stream"] / last["fast"])
    assert last["device_part_images_per_s_core"] == last["device_part_rounds"][0] > 0
    assert [line.split("|")[1].strip() for line in stdout.splitlines() if line.startswith("| device")] == [
        "device part"
    ]


@pytest.mark.parametrize(
    "words",
    [
        ["src=nowhere"],
        ["src=x", "rounds=0"],
        ["src={photos}", "image_size=50"],
        ["src={photos}", "image_size=16"],
        ["src={photos}", "image_size=null"],
    ],
)
def test_wrong_words(words, run_cli, photos):
    code, _, stderr = run_cli("bench", "loader", *(word.format(photos=photos) for word in words))
    assert code == 2
    assert stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in stderr
