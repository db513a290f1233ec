"""The smallest `fit` that has everything (shards, a loader worker, a tokenizer, accumulation), in processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

TINY = (
    "+experiment=demo_pretrain image_size=32 patch_size=8 mask.max_patches=6 mask.min_block=1 global_batch=16 "
    "batch_size=2 data.workers=1 model.embed_dim=32 model.num_heads=2 model.depth=2 model.drop_path_rate=.1 "
    "data.val_images=8 data.val_batch=4 log_every=1 threads=1 val_every=2 trainer.accelerator=cpu optim.warmup_steps=1"
).split()


def tiny_words(shards: Path, tokenizer: Path) -> list[str]:
    """Settings of `fit`; steps and name are still to be given."""
    return [*TINY, f"data.train={shards / 'train'}", f"data.val={shards / 'val'}", f"tokenizer.path={tokenizer}"]


def start(
    words: list[str], folder: Path, log: Path, launcher: Sequence[str] = (), **variables: str
) -> subprocess.Popen:
    """`python [launcher] -m beit_pretrain WORDS` in a folder, its output in a file."""
    with log.open("w") as file:
        return subprocess.Popen(
            [sys.executable, *launcher, "-m", "beit_pretrain", *map(str, words)],
            cwd=folder,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
        )


def errors(log: Path) -> list[str]:
    """The lines of ours in what a process printed."""
    return [line for line in log.read_text(errors="replace").splitlines() if line.startswith("error:")]
