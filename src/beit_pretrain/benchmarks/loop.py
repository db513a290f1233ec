"""`bench loop`: what Lightning, the metrics, their files and the checkpoints add to a bare loop of the same step.

The Trainer of `fit`, with its progress bar, callbacks, guard, keeper and CSV file, trains on batches in memory. It
takes turns with a bare loop that trains a network of its own on the same batches, so whatever else the machine does
slows both alike. A turn is a block of steps that is waited for once, at its end: what the host does while the device is
busy costs nothing. On a GPU a block has `BLOCK` steps; a CPU does everything in order, so there a block is one step.

Metrics are written as often as `log_every` says, or every `LOG_EVERY` steps if a block is shorter, so that some of the
writing is measured; since it falls on single blocks, all blocks together are compared beside the pairs.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from lightning import Callback, Trainer

from beit_pretrain.benchmarks.blocks import Block, Results, interval, milliseconds
from beit_pretrain.benchmarks.inputs import Bench, make_batch, make_bench
from beit_pretrain.benchmarks.measure import compared
from beit_pretrain.benchmarks.step import BATCHES, our_steps
from beit_pretrain.config import as_user_errors
from beit_pretrain.data.corrupt_images import CorruptImages
from beit_pretrain.engine.callbacks import ProgressBar, Throughput
from beit_pretrain.engine.checkpointing import LAST, CheckpointManager
from beit_pretrain.engine.metrics import CsvMetrics
from beit_pretrain.engine.nonfinite_guard import NonFiniteGuard
from beit_pretrain.engine.run_folder import REPLACED, SKIPPED
from beit_pretrain.engine.trainer import make_trainer, silence_warnings

BLOCK = 100  # steps on a GPU, unless bench.steps says it
LOG_EVERY = 5  # steps, at the most, between two flushes of the metrics where a block is shorter than log_every
SAVES = 2  # checkpoints, of which the last is reported: the first also allocates


class InterleavedLoader:
    """Batches for the Trainer, in `blocks` of `steps`; before each block a bare loop takes the same steps."""

    def __init__(self, bench: Bench, blocks: int, steps: int):
        self.bench, self.blocks, self.steps = bench, blocks, steps
        self.batches = [make_batch(bench, number) for number in range(BATCHES)]
        self.step = our_steps(bench)["ours_cached"]  # what the LightningModule computes, its metrics not counted
        self.bare: list[float] = []  # seconds a step, of every block
        self.trained: list[float] = []

    def __len__(self) -> int:
        return self.blocks * self.steps + 1  # the end of a block shows when the next batch is asked for

    def __iter__(self) -> Iterator[dict[str, Any]]:
        given = 0.0
        for number in range(len(self)):
            if number % self.steps == 0:
                self.bench.wait()
                if number:
                    self.trained.append((self.bench.now() - given) / self.steps)
                if number < len(self) - 1:
                    self.bare.append(self.bench.seconds(partial(self.bare_block, number)) / self.steps)
                given = self.bench.now()
            yield {**self.batches[number % BATCHES].without("token_image"), "bad": []}

    def bare_block(self, first: int) -> None:
        for number in range(first, first + self.steps):
            self.step(self.batches[number % BATCHES])


def run_in_turn(cfg: Any, bench: Bench, folder: Path, steps: int) -> tuple[InterleavedLoader, dict[str, float]]:
    """Train with the Trainer and in turn with the bare loop; then the seconds and bytes of a checkpoint."""
    batches = InterleavedLoader(bench, cfg.bench.warm_up + cfg.bench.rounds, steps)
    module = make_bench(cfg).module  # a network of its own, from the same seed
    module.log_every = cfg.log_every if steps >= cfg.log_every else min(cfg.log_every, LOG_EVERY)
    never = 2 * len(batches)  # a checkpoint is measured by itself
    no_saves = {"save_every": never, "save_minutes": None, "keep_every": None, "val_minutes": None}
    module.keeper = CheckpointManager(folder, cfg.model_copy(update=no_saves))
    module.guard = NonFiniteGuard(folder / SKIPPED, cfg.max_nonfinite_steps, cfg.batch_size)
    settings: dict[str, Any] = {"global_batch_size": cfg.batch_size, "run_dir": str(folder), "val_every": len(batches)}
    # To Lightning, auto would be all GPUs.
    settings["trainer"] = cfg.trainer.model_copy(update={"devices": 1, "num_nodes": 1})
    saves = Saves(bench, folder / LAST)
    callbacks: list[Callback] = [ProgressBar(refresh_rate=10), Throughput(), CorruptImages(folder / REPLACED, 1), saves]
    with as_user_errors():
        trainer = make_trainer(cfg.model_copy(update=settings), len(batches), callbacks)
    trainer.loggers = [CsvMetrics(folder / "metrics.csv")]
    with redirect_stdout(sys.stderr):  # Lightning's bar goes where results do
        trainer.fit(module, train_dataloaders=batches)
    return batches, saves.found


class Saves(Callback):
    """Saves some checkpoints when the loop ends, while it is still the loop that waits for them.

    `found`, of the last one: `seconds` of training that it takes, `until_written` until it is on the disk, its `bytes`.
    """

    def __init__(self, bench: Bench, file: Path):
        self.bench, self.file = bench, file
        self.found: dict[str, float] = {}

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        keeper: CheckpointManager = pl_module.keeper
        for _ in range(SAVES):
            keeper.saved_at = None  # so that the same step is saved again
            self.bench.wait()
            start = time.perf_counter()
            keeper.save(pl_module)
            seconds = time.perf_counter() - start
            keeper.wait()
            written = time.perf_counter() - start
            self.found = {"seconds": seconds, "until_written": written, "bytes": float(self.file.stat().st_size)}


def bench_loop(cfg: Any) -> Results:
    silence_warnings()
    bench = make_bench(cfg)
    steps = cfg.bench.steps or (BLOCK if bench.on_gpu else 1)
    with tempfile.TemporaryDirectory(prefix="beit_pretrain-bench-") as folder:
        batches, saved = run_in_turn(cfg, bench, Path(folder), steps)
    bare, trained = batches.bare[cfg.bench.warm_up :], batches.trained[cfg.bench.warm_up :]
    cost, together, step = compared(trained, bare), sum(trained) / sum(bare), float(np.median(trained))
    over = f"{cost['median'] - 1:+.2%} ({cost['low'] - 1:+.2%} to {cost['high'] - 1:+.2%})"
    wait, written = (f"{saved[name]:.2f} s" for name in ("seconds", "until_written"))
    share = saved["seconds"] / (cfg.save_every * step + saved["seconds"])
    rows = [
        ["bare loop", f"{milliseconds(float(np.median(bare)))} ms a step", ""],
        ["fit's loop", f"{milliseconds(step)} ms a step", over],
        ["all blocks together", "", f"{together - 1:+.2%}"],
        ["training waits for a checkpoint", wait, f"{share:.2%} at one every {cfg.save_every} steps"],
        ["until it is on the disk", f"{written}, {saved['bytes'] / 1e6:,.0f} MB", ""],
    ]
    head = ("what", "time", f"over a bare loop, of {cost['pairs']} pairs ({interval(cost)})")
    found = {"block": steps, "loop_over_bare": cost, "loop_over_bare_together": together, "save_every": cfg.save_every}
    found |= {"seconds": {"bare": bare, "trainer": trained}, "checkpoint": saved, "checkpoint_share": share}
    return [Block(head, rows)], {"bench": "loop", **bench.about, **found}
