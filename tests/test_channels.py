"""Images of one and of four channels through every kind of training, by the command line."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

TINY = "image_size=32 global_batch_size=4 batch_size=4 data.num_workers=0 threads=1 steps=2 val_every=2 log_every=1".split()
SMALL = "patch_size=8 model.embed_dim=32 model.num_heads=2 model.depth=2".split()


@pytest.fixture(scope="module")
def deep_grey(tmp_path_factory):
    """X-rays as it were: 16-bit grey TIFFs with values of 1,000 to 5,000 in two classes."""
    root = tmp_path_factory.mktemp("xrays")
    rng = np.random.default_rng(0)
    for number in range(12):
        folder = root / f"class{number % 2}"
        folder.mkdir(exist_ok=True)
        pixels = rng.uniform(1000, 5000, (48, 40)).astype(np.uint16)
        Image.fromarray(pixels).save(folder / f"{number}.tif")
    return root


@pytest.mark.parametrize("channels", [1, 4])
def test_tokenizer_backbone_classifier(channels, deep_grey, run_cli, tmp_path):
    def run(*words: str) -> None:
        code, _, stderr = run_cli(*words)
        assert code == 0, stderr

    run("shards", "make", f"src={deep_grey}", "out=data", "val=0.2", "num_workers=1")
    data = ["data.train=data/train", "data.val=data/val", f"data.channels={channels}", *TINY]
    vae = "model.vocab_size=16 model.width=8 model.blocks=1 model.code_dim=8".split()
    run("fit", "+experiment=demo_tokenizer", *data, *vae, "run_dir=t")
    mask = "mask.max_patches=6 mask.min_block=1 tokenizer.path=t/checkpoints/last.ckpt".split()
    run("fit", "+experiment=demo_pretrain", *data, *SMALL, *mask, "run_dir=p")
    run("fit", "+experiment=demo_finetune", *data, *SMALL, "init_from=p/checkpoints/last.ckpt", "run_dir=f")
    state = torch.load(tmp_path / "f/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert state["model.patch_embed.proj.weight"].shape[1] == channels
    run("predict", "init_from=f/checkpoints/last.ckpt", f"src={deep_grey}")
    run("visualize", "run=p")


def test_channels_that_do_not_fit(deep_grey, dvae_checkpoint, run_cli):
    assert run_cli("shards", "make", f"src={deep_grey}", "out=data", "num_workers=1")[0] == 0
    words = [
        "fit",
        "+experiment=demo_pretrain",
        "data.train=data/train",
        *TINY,
        *SMALL,
        f"tokenizer.path={dvae_checkpoint}",
    ]
    for word, said in (
        ("data.channels=2", "data.channels must be 1, 3 or 4"),
        ("mean=[.1,.2]", "mean=[0.1, 0.2] has 2"),
    ):
        code, _, stderr = run_cli(*words, word)
        assert code == 2
        assert said in stderr
        assert stderr.count("\n") == 1
