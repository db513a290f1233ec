"""The stages of a real run: images, shards, tokens, `fit` with its loader; and the prefetcher on and off."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from beit_pretrain.__main__ import run
from beit_pretrain.benchmarks.gpu.report import Report
from beit_pretrain.benchmarks.gpu.setup import Setup
from beit_pretrain.engine.compile import compile_counts
from beit_pretrain.processes import cores
from beit_pretrain.tables import read_rows

LOG_EVERY = 10  # steps, of `fit`
SETTLED = 1 / 3  # of a run: what comes before it is compilation and warm-up
LOOKS = 5.0  # seconds between two looks at a run's metrics: if it is cut short, they are what is known of it
IMAGE, AHEAD = 200_000, 3  # bytes of an image with both its views; batches that a worker may hold
TRACE_BYTES = 15 * 2**20  # a larger trace stays in the scratch folder


def data(setup: Setup, report: Report) -> None:
    """Draw photos and write them into shards."""
    start = time.monotonic()
    shards(setup)
    report(seconds=time.monotonic() - start)


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
    """Processes of the loader; 0 = this one. They hand batches over in shared memory, of which there may be little."""
    if setup.tiny:
        return 0
    shared = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else None
    return (
        num_workers(setup)
        if shared is None
        else min(num_workers(setup), int(shared / (AHEAD * IMAGE * setup.sizes.base)))
    )


def view_words(setup: Setup) -> list[str]:
    """Of the experiment's words those that `tokenize` takes too."""
    return [word for word in setup.sizes.words if word.startswith(("image_size=", "patch_size="))]


def fit(setup: Setup, report: Report) -> None:
    """Shards, tokens, and a run with cached tokens: data wait, images/s, a profile."""
    seconds: dict[str, float] = {}

    def took(name: str, start: float) -> None:
        seconds[name] = time.monotonic() - start
        report(seconds=seconds)

    start = time.monotonic()
    folder, encoder = shards(setup), setup.encoder()
    took("shards", start)
    tokens, start = setup.scratch / f"{folder.parent.name}-tokens", time.monotonic()
    if not (tokens / "tokens.json").is_file():
        accelerator = f"accelerator={setup.device}"
        words = [f"data={folder}", f"tokenizer.path={encoder}", f"out={tokens}", f"num_workers={num_workers(setup)}"]
        run(["tokenize", *words, *view_words(setup), accelerator, f"batch_size={2 * setup.sizes.base}"])
    took("tokens", start)
    start, before = time.monotonic(), compile_counts()
    where = setup.scratch / f"run-{time.time_ns()}"
    report(loader_workers=loader_workers(setup))
    with watched(where, lambda found: report(**found)):
        trained(where, setup, setup.sizes.run, folder, encoder, f"data.tokens={tokens}", "profile=true")
    took("fit", start)
    report(compiled=compile_counts().since(before)._asdict(), **speed(where))
    profile = where / "profile"
    if (profile / "kernels.txt").is_file():
        report(profile=(profile / "kernels.txt").read_text())
        trace = profile / "trace.json.gz"
        if trace.stat().st_size < TRACE_BYTES:
            shutil.copyfile(trace, setup.out / trace.name)
    shutil.rmtree(where, ignore_errors=True)


def prefetch(setup: Setup, report: Report) -> None:
    """The same loader with the tokenizer on line, the next batch prepared beside the step or not."""
    folder, encoder = shards(setup), setup.encoder()
    for name, switch in (("off", "device_prefetch=false"), ("on", "device_prefetch=true")):
        with report.part(name):
            where = setup.scratch / f"run-{time.time_ns()}"
            with watched(where, lambda found, name=name: report(prefetch={name: found})):  # type: ignore[misc]
                trained(where, setup, setup.sizes.switched, folder, encoder, switch)
            report(prefetch={name: speed(where)})
            shutil.rmtree(where, ignore_errors=True)


@contextmanager
def watched(where: Path, say: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Inside, say from time to time how fast the run in a folder is so far."""
    over = threading.Event()

    def look() -> None:
        while not over.wait(LOOKS):
            with suppress(Exception):  # nothing is written yet, or just now
                if found := speed(where):
                    say(found)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def trained(where: Path, setup: Setup, steps: int, folder: Path, encoder: Path, *words: str) -> None:
    """Run `fit` in this process, in a folder of its own."""
    batch = setup.sizes.base
    given = [
        *(f"global_batch_size={batch}", f"batch_size={batch}", f"steps={steps}", f"log_every={LOG_EVERY}"),
        *(f"save_every={steps}", "logger=csv", f"run_dir={where}", f"data.num_workers={loader_workers(setup)}"),
        *("trainer.devices=1", "trainer.num_nodes=1"),  # other processes of this stage could not be started
        *("resume=never", "epochs=null", "recipe=null", "optim.warmup_steps=10", f"val_every={steps}"),
        *(f"data.train={folder}", f"tokenizer.path={encoder}", *words),
    ]
    run(["fit", *(word for word in setup.settings(*given) if not word.startswith("bench."))])


def speed(where: Path) -> dict[str, Any]:
    """Images a second and the share of time spent waiting for data, of each `LOG_EVERY` steps and settled.

    Empty before the first of them.
    """
    _, rows = read_rows(where / "metrics.csv")
    steps = sorted(rows)
    last = [rows[step] for step in steps if step > SETTLED * steps[-1]]
    if not any("train/images_per_s" in row for row in last):
        return {}
    found: dict[str, Any] = {"losses": [rows[step].get("train/loss") for step in steps]}
    for name, key in (("images_per_s", "train/images_per_s"), ("data_wait", "train/data_wait")):
        found[name] = float(np.median([row[key] for row in last if key in row]))
        found[f"every_{name}"] = [rows[step].get(key) for step in steps]
    return found
