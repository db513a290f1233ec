"""`bench loop`: what Lightning, the metrics, their files and the checkpoints add to a bare loop of the same step.

The Trainer of `fit`, with its progress bar, callbacks, guard, keeper and CSV file, trains on batches in memory. Before
it gets its next batch, a bare loop takes one step with a network of its own on the same batch, so both are slowed alike
by whatever else happens. Metrics are written every `LOG_EVERY` steps at the latest, so that some are among those
measured; since that falls on single steps, all steps together are compared beside the pairs.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from lightning import Callback
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from beit_pretrain.bench.compare import Ratio, compared
from beit_pretrain.bench.inputs import Bench, configured, make_batch, make_bench
from beit_pretrain.bench.step import BATCHES, backward, facts, forward
from beit_pretrain.data.replacements import Replacements
from beit_pretrain.runs.folder import REPLACED, SKIPPED
from beit_pretrain.runs.trainer import building, make_trainer, quieten
from beit_pretrain.tables import table
from beit_pretrain.training.callbacks import ProgressBar, Throughput
from beit_pretrain.training.guards import Guard
from beit_pretrain.training.keeping import LAST, Keeper
from beit_pretrain.training.metrics import CsvMetrics

LOG_EVERY = 5  # steps, at the most, between two flushes of the metrics


class InTurn:
    """Batches for the Trainer; takes a bare step before each. Seconds of both are kept."""

    def __init__(self, bench: Bench, steps: int):
        self.bench, self.steps = bench, steps
        self.batches = [make_batch(bench, number).ours for number in range(BATCHES)]
        self.optimizer = configured(bench.module.model, bench.module.optim)
        self.bare: list[float] = []
        self.trained: list[float] = []

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[dict[str, Any]]:
        given = None
        for number in range(self.steps):
            self.bench.wait()
            if given is not None:
                self.trained.append(self.bench.now() - given)
            batch: dict[str, Any] = {k: v for k, v in self.batches[number % BATCHES].items() if k != "token_image"}
            self.step(batch)
            given = self.bench.now()
            yield {**batch, "bad": []}

    def step(self, batch: dict[str, Tensor]) -> None:
        """The bare step: what the LightningModule computes, its metrics not counted."""
        start = self.bench.now()
        view, tokens = self.bench.module.prepare(batch)
        backward(self.bench, batch, forward(self.bench, batch, view, tokens))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.bench.wait()
        self.bare.append(self.bench.now() - start)


def run_in_turn(cfg: DictConfig, bench: Bench, folder: Path) -> tuple[InTurn, dict[str, float]]:
    """Train with the Trainer and in turn with the bare loop; then the seconds and bytes of a checkpoint."""
    steps = cfg.bench.rounds + cfg.bench.warm_up + 1  # the time of the last one is not seen from outside
    ours = make_bench(cfg)  # a network of its own, from the same seed
    module = ours.module
    module.log_every = min(cfg.log_every, LOG_EVERY)
    module.keeper = Keeper(folder, every=2 * steps)  # a checkpoint is measured by itself
    module.guard = Guard(folder / SKIPPED, cfg.max_skipped, cfg.batch_size)
    settings = {"global_batch": cfg.batch_size, "run_dir": str(folder), "val_every": steps}
    own = OmegaConf.merge(cfg, settings)
    callbacks: list[Callback] = [ProgressBar(refresh_rate=10), Throughput(), Replacements(folder / REPLACED, 1)]
    with building():
        trainer = make_trainer(own, steps, callbacks)  # type: ignore[arg-type]
    trainer.loggers = [CsvMetrics(folder / "metrics.csv")]
    batches = InTurn(bench, steps)
    with redirect_stdout(sys.stderr):  # Lightning's bar goes where results do
        trainer.fit(module, train_dataloaders=batches)
    start = time.perf_counter()
    trainer.save_checkpoint(folder / LAST)
    saved = {"seconds": time.perf_counter() - start, "bytes": float((folder / LAST).stat().st_size)}
    return batches, saved


def bench_loop(cfg: DictConfig) -> None:
    """Print what the loop costs over a bare one, and what a checkpoint costs; and both as JSON."""
    quieten()
    bench = make_bench(cfg)
    with tempfile.TemporaryDirectory(prefix="beit_pretrain-bench-") as folder:
        batches, saved = run_in_turn(cfg, bench, Path(folder))
    skip = cfg.bench.warm_up
    bare, trained = batches.bare[skip : skip + cfg.bench.rounds], batches.trained[skip : skip + cfg.bench.rounds]
    cost = compared(trained, bare)
    step = sorted(trained)[len(trained) // 2]
    every = cfg.save_every
    together = sum(trained) / sum(bare)
    report(cost, together, step, bare, saved, every)
    print(
        json.dumps(
            {
                "bench": "loop",
                **facts(bench, cfg),
                "loop_over_bare": cost._asdict(),
                "loop_over_bare_together": together,
                "seconds": {"bare": bare, "trainer": trained},
                "checkpoint": saved,
                "checkpoint_share": saved["seconds"] / (every * step + saved["seconds"]),
                "save_every": every,
            }
        )
    )


def report(cost: Ratio, together: float, step: float, bare: list[float], saved: dict[str, float], every: int) -> None:
    """The table for people."""
    over = f"{cost.median - 1:+.2%} ({cost.low - 1:+.2%} to {cost.high - 1:+.2%})"
    rows = [
        ["bare loop", f"{1000 * sorted(bare)[len(bare) // 2]:.4g} ms a step", ""],
        ["fit's loop", f"{1000 * step:.4g} ms a step", over],
        ["all steps together", "", f"{together - 1:+.2%}"],
        [
            "a checkpoint",
            f"{saved['seconds']:.2f} s, {saved['bytes'] / 1e6:,.0f} MB",
            f"{saved['seconds'] / (every * step):.2%} at one every {every} steps",
        ],
    ]
    print(table(["what", "time", f"over a bare loop, of {cost.pairs} pairs ({cost.interval})"], rows))
