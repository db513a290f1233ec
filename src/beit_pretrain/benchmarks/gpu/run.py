"""The stages of a real run: shards, tokens, `fit` with its loader; and `fit` with the prefetcher on and off."""

from __future__ import annotations

import shutil
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from beit_pretrain.benchmarks.blocks import shown
from beit_pretrain.benchmarks.gpu.plan import Setup
from beit_pretrain.benchmarks.report import Report
from beit_pretrain.cli import run
from beit_pretrain.engine.compile import compile_counts
from beit_pretrain.processes import cores
from beit_pretrain.tables import curve

LOG_EVERY = 10  # steps, of `fit`
SETTLED = 1 / 3  # of a run: what comes before it is compilation and warm-up
POLL = 5.0  # seconds between two reads of a run's metrics: they are reported if the stage is killed
IMAGE, AHEAD = 200_000, 3  # bytes of an image with both its views; batches that a worker may hold
TRACE_BYTES = 15 * 2**20  # a larger trace stays in the scratch folder


def data(setup: Setup, report: Report) -> None:
    with timed(report, "shards"):
        shards(setup)


@contextmanager
def timed(report: Report, name: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    report(seconds={name: time.monotonic() - start})


def shards(setup: Setup) -> Path:
    """Shards of synthetic photos; made once."""
    sizes = setup.sizes
    folder = setup.scratch / f"photos-{sizes.photos}-{sizes.pixels}"
    if not (folder / "train" / "manifest.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        given = [f"out={folder}", f"images={sizes.photos}", f"size={sizes.pixels}", f"num_workers={num_workers(setup)}"]
        run(["shards", "make", "src=synthetic", "val=0", f"samples_per_shard={max(8, sizes.photos // 16)}", *given])
    return folder / "train"


def num_workers(setup: Setup) -> int:
    """Processes that draw, decode and tokenize: at least one."""
    return 1 if setup.tiny else max(1, cores() - 1)


def loader_workers(setup: Setup) -> int:
    """Loader processes, 0 = this one; limited by the shared memory in which they hand over batches."""
    if setup.tiny:
        return 0
    shared = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 2**60
    return min(num_workers(setup), int(shared / (AHEAD * IMAGE * setup.sizes.base)))


def fit(setup: Setup, report: Report) -> None:
    """Shards, tokens, and a run with cached tokens: data wait, images/s, a profile."""
    with timed(report, "shards"):
        folder, encoder = shards(setup), setup.encoder()
    tokens = setup.scratch / f"{folder.parent.name}-tokens"
    with timed(report, "tokens"):
        if not (tokens / "tokens.json").is_file():
            words = [word for word in setup.network if word.startswith(("image_size=", "patch_size="))]
            words += [f"num_workers={num_workers(setup)}", f"batch_size={2 * setup.sizes.base}"]
            words += [f"data={folder}", f"tokenizer.path={encoder}", f"out={tokens}", f"accelerator={setup.device}"]
            run(["tokenize", *words])
    before = compile_counts()
    report(loader_workers=loader_workers(setup))
    with timed(report, "fit"):
        where = trained(setup, lambda found: report(**found), setup.sizes.run, f"data.tokens={tokens}", "profile=true")
    report(compiled=compile_counts().since(before)._asdict())
    rate, wait = (shown(report.found.get(name)) for name in ("images_per_s", "data_wait"))
    report.write(headline=f"{rate} images/s, share of time waiting for data {wait}")
    table, trace = where / "profile/kernels.txt", where / "profile/trace.json.gz"
    if table.is_file():
        report(profile=table.read_text())
        if trace.stat().st_size < TRACE_BYTES:
            shutil.copyfile(trace, setup.out / trace.name)
    shutil.rmtree(where, ignore_errors=True)


def prefetch(setup: Setup, report: Report) -> None:
    """The same loader with the tokenizer on line, with and without device prefetch."""
    for name, switch in (("off", "device_prefetch=false"), ("on", "device_prefetch=true")):
        with report.part(name):
            where = trained(setup, lambda found: report(prefetch={name: found}), setup.sizes.switched, switch)  # noqa: B023
            shutil.rmtree(where, ignore_errors=True)
    rates = {name: found.get("images_per_s") for name, found in report.found.get("prefetch", {}).items()}
    report.write(headline=f"images/s: {shown(rates)}")


def trained(setup: Setup, say: Callable[[dict[str, Any]], None], steps: int, *words: str) -> Path:
    """Run `fit` in this process and report its speed through `say`; returns its folder."""
    batch, where = setup.sizes.base, setup.scratch / f"run-{time.time_ns()}"
    given = [
        *(f"global_batch_size={batch}", f"batch_size={batch}", f"steps={steps}", f"log_every={LOG_EVERY}"),
        *(f"save_every={steps}", "logger=csv", f"run_dir={where}", f"data.num_workers={loader_workers(setup)}"),
        *("trainer.devices=1", "trainer.num_nodes=1"),  # other processes of this stage could not be started
        *("resume=never", "epochs=null", "recipe=null", "optim.warmup_steps=10", f"val_every={steps}"),
        *(f"data.train={shards(setup)}", f"tokenizer.path={setup.encoder()}", *words),
    ]
    with watched(where, say):
        run(["fit", *(word for word in setup.settings(*given) if not word.startswith("bench."))])
    say(speed(where))
    return where


@contextmanager
def watched(where: Path, say: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """While the block runs, report the speed of the run in a folder every `POLL` seconds."""
    over = threading.Event()

    def poll() -> None:
        while not over.wait(POLL):
            with suppress(Exception):  # nothing is written yet, or just now
                if found := speed(where):
                    say(found)

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def speed(where: Path) -> dict[str, Any]:
    """Images a second and the share of time spent waiting for data, of each `LOG_EVERY` steps and settled.

    Empty before the first of them.
    """
    metrics = where / "metrics.csv"
    found: dict[str, Any] = {"losses": curve(metrics, "train/loss")[1]}
    for name in ("images_per_s", "data_wait"):
        steps, values = curve(metrics, f"train/{name}")
        if not steps:
            return {}
        settled = [value for step, value in zip(steps, values, strict=True) if step > SETTLED * steps[-1]]
        found |= {name: statistics.median(settled), f"every_{name}": values}
    return found
