"""Fixtures of the soak tests: a dataset, a tokenizer and cached tokens, made by the shipped commands; a watcher."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from tiny import OFFLINE, start

HERE = Path(__file__).parent


class Made(NamedTuple):
    """Paths and settings of what the shipped commands made."""

    folder: Path  # data/train, data/val, runs/dvae
    words: list[str]  # of `fit`: everything but steps and name
    cached: list[str]  # the same from cached tokens, without a tokenizer


def shell(words: list[str], folder: Path, seconds: float = 300) -> None:
    """Run a shipped command, which must succeed."""
    log = folder / "shell.log"
    assert start(words, folder, log).wait(seconds) == 0, log.read_text()[-3000:]


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Made:
    """Synthetic shards, a dVAE trained for a few seconds, cached tokens, and the settings of a run that uses them."""
    folder = tmp_path_factory.mktemp("made")
    train, val = (f"data.{split}={folder / 'data' / split}" for split in ("train", "val"))
    shell(
        "shards make src=synthetic out=data images=480 val=.1 size=48 samples_per_shard=36 num_workers=1".split(),
        folder,
    )
    dvae = f"fit +experiment=demo_tokenizer name=dvae {train} {val} image_size=32 steps=60 val_every=60 log_every=20"
    shell(f"{dvae} threads=1 model.vocab_size=64 model.width=16 data.num_workers=0".split(), folder)
    tokenizer = f"tokenizer.path={folder / 'runs/dvae/checkpoints/last.ckpt'}"
    views = (
        "image_size=32 patch_size=8 scale=[0.4,1.0] ratio=[0.9,1.1] jitter=[0.4,0.4,0.4] views=2 num_workers=0 "
        "threads=1"
    )
    shell(f"tokenize data={folder / 'data/train'} tokenizer=dvae {tokenizer} {views}".split(), folder)
    common = (
        f"fit +experiment=demo_pretrain {train} image_size=32 patch_size=8 data.jitter=[0.4,0.4,0.4] "
        "data.num_workers=2 "
        "model.embed_dim=96 model.depth=3 model.num_heads=3 model.drop_path_rate=.1 mask.max_patches=6 "
        "mask.min_block=1 global_batch_size=8 batch_size=4 optim.warmup_steps=5 log_every=1 save_every=7 val_every=25 "
        "data.val_images=16 data.val_batch=4 knn.bank=32 knn.queries=16 num_visualizations=1 threads=1 "
        "trainer.accelerator=cpu"
    ).split()
    words = [*common, *OFFLINE, val, tokenizer]
    return Made(folder, words, [*common, *OFFLINE, "tokenizer=none", f"data.tokens={folder / 'data/train/tokens'}"])


@pytest.fixture
def watch(tmp_path) -> Callable[..., dict[str, str]]:
    """`watch(name, ...)`: the environment in which `fit` takes the callbacks of `watcher.py`.

    Lightning finds them as it finds those of any installed package; the shipped command stays what it is.
    """
    package = tmp_path / "watcher"
    about = package / "watcher-0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: watcher\nVersion: 0\n")
    (about / "entry_points.txt").write_text("[lightning.pytorch.callbacks_factory]\nwatcher = watcher:callbacks\n")
    (package / "watcher.py").write_text((HERE / "watcher.py").read_text())

    def environment(record: Path | None = None, **orders: str) -> dict[str, str]:
        path = os.pathsep.join([str(package), *filter(None, [os.environ.get("PYTHONPATH")])])
        return {"PYTHONPATH": path, **({"WATCH": str(record)} if record else {}), **orders}

    return environment
