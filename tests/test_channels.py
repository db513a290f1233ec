"""Images of one and of four channels through every task by the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import fit_words, state_of

DATA = Path("data")


@pytest.fixture(scope="module")
def deep_grey(tmp_path_factory):
    """16-bit grey TIFFs, as of X-rays, with values from 1,000 to 5,000 in two classes."""
    root = tmp_path_factory.mktemp("xrays")
    rng = np.random.default_rng(0)
    for number in range(12):
        folder = root / f"class{number % 2}"
        folder.mkdir(exist_ok=True)
        pixels = rng.uniform(1000, 5000, (48, 40)).astype(np.uint16)
        Image.fromarray(pixels).save(folder / f"{number}.tif")
    return root


@pytest.mark.parametrize("channels", [1, 4])
def test_one_and_four_channels_through_all_tasks(channels, deep_grey, run_cli, tmp_path):
    def run(*words: str) -> None:
        code, _, stderr = run_cli(*words)
        assert code == 0, stderr

    run("shards", "make", f"src={deep_grey}", "out=data", "val=0.2", "num_workers=1")
    more = [f"data.channels={channels}", "global_batch_size=4", "steps=2", "val_every=2"]
    run(*fit_words("tokenizer", DATA, *more, "run_dir=t"))
    run(*fit_words("pretrain", DATA, *more, "tokenizer.path=t/checkpoints/last.ckpt", "run_dir=p"))
    run(*fit_words("finetune", DATA, *more, "init_from=p/checkpoints/last.ckpt", "run_dir=f"))
    assert state_of(tmp_path / "f")["model.patch_embed.proj.weight"].shape[1] == channels
    run("predict", "init_from=f/checkpoints/last.ckpt", f"src={deep_grey}")
    run("visualize", "run=p")


def test_invalid_channels(deep_grey, dvae_checkpoint, run_cli, refused):
    assert run_cli("shards", "make", f"src={deep_grey}", "out=data", "num_workers=1")[0] == 0
    words = fit_words("pretrain", DATA, "data.val=null", f"tokenizer.path={dvae_checkpoint}")
    for word, said in (
        ("data.channels=2", "data.channels must be 1, 3 or 4"),
        ("mean=[.1,.2]", "mean=[0.1, 0.2] has 2"),
    ):
        assert said in refused(*words, word)
