"""Two processes over gloo: same steps as one process, without blocking collectives."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import (
    TINY,
    errors,
    gone,
    largest_difference,
    last_checkpoint,
    rows_of,
    start,
    steps_written,
    tree,
    wait_until,
)

from beit_pretrain.tables import read_rows

pytestmark = pytest.mark.long

HERE = Path(__file__).parent
STEPS = 8


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Callable[[Path], dict[str, str]]:
    """`installed(FILE)`: environment variables with which `fit` counts its collectives."""
    package = tmp_path_factory.mktemp("package")
    about = package / "collectives-0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: collectives\nVersion: 0\n")
    (about / "entry_points.txt").write_text(
        "[lightning.pytorch.callbacks_factory]\ncollectives = collectives:callbacks\n"
    )
    (package / "collectives.py").write_text((HERE / "collectives.py").read_text())
    path = os.pathsep.join([str(package), *filter(None, [os.environ.get("PYTHONPATH")])])
    return lambda record: {"PYTHONPATH": path, "COLLECTIVES": str(record)}


@pytest.fixture(scope="module")
def words(shards, dvae_checkpoint) -> list[str]:
    """Two micro-batches per step on two processes; metrics are written only at the end."""
    words = [w for w in TINY if not w.startswith(("log_every", "val_every", "batch_size", "data.num_workers"))]
    words += [f"data.train={shards / 'train'}", f"data.val={shards / 'val'}", f"tokenizer.path={dvae_checkpoint}"]
    words += [
        f"log_every={STEPS}",
        f"val_every={STEPS}",
        f"save_every={STEPS}",
        "num_visualizations=0",
        "data.num_workers=1",
    ]
    return ["fit", *words, f"steps={STEPS}", "knn.bank=24", "knn.queries=9", "data.val_images=10"]


@pytest.fixture(scope="module")
def runs(words, installed, tmp_path_factory) -> Path:
    """A folder with the same run in float64 on one and on two processes, and their counts."""
    folder = tmp_path_factory.mktemp("runs")
    for devices, more in ((1, ["batch_size=8"]), (2, ["batch_size=4", "trainer.devices=2"])):
        run = ["trainer.precision=64-true", "log_every=1", f"run_dir={folder / str(devices)}", *more]
        log = folder / f"log{devices}"
        process = start([*words, *run], folder, log, **installed(folder / f"counts{devices}"))
        assert process.wait(240) == 0, log.read_text()[-3000:]
    return folder


def test_steps_equal_one_process(runs):
    """The loss is the mean over all masked patches of the global batch, up to the order of float64 sums."""
    assert largest_difference(runs / "1", runs / "2") < 2e-15
    one, two = (last_checkpoint(runs / name)["state_dict"] for name in ("1", "2"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-9, atol=1e-12)


def test_features_are_worth_the_same_as_on_one_process(runs):
    """Banks and queries are split among the processes and gathered in one order."""
    rows = [rows_of(runs / name)[STEPS] for name in ("1", "2")]
    for name in ("knn_accuracy", "dense_knn_miou"):
        assert rows[0][f"val/{name}"] == rows[1][f"val/{name}"] > 0
    for name in ("feature_std", "rankme"):
        assert rows[0][f"val/{name}"] == pytest.approx(rows[1][f"val/{name}"], rel=1e-4)


def counted(record: Path) -> dict[int, list[dict]]:
    """The counts of each process between the ends of two steps."""
    found: dict[int, list[dict]] = {}
    for line in record.read_text().splitlines():
        entry = json.loads(line)
        found.setdefault(entry["step"], []).append(entry)
    return found


@pytest.mark.parametrize(
    ("strategy", "own"), [("ddp", set()), ("fsdp", {"_allgather_base", "_reduce_scatter_base"})], ids=["ddp", "fsdp"]
)
def test_steps_have_no_blocking_collectives(strategy, own, words, installed, tmp_path):
    """In steady state nothing blocks, and one all-reduce overlaps with the backward pass; FSDP adds its own."""
    record, log = tmp_path / "counts", tmp_path / "log"
    run = ["batch_size=4", "trainer.devices=2", f"trainer.strategy={strategy}", f"run_dir={tmp_path / 'run'}"]
    assert start([*words, *run], tmp_path, log, **installed(record)).wait(240) == 0, log.read_text()[-3000:]
    steps = counted(record)
    assert set(steps) == set(range(STEPS + 1))
    for step in range(1, STEPS):  # the first one is preceded by the start, the last one followed by a validation
        for entry in steps[step]:
            assert set(entry["blocking"]) == own, entry
            assert entry["asynchronous"] == {"allreduce": 1}, entry
    assert len(steps[STEPS]) == 2
    assert all(entry["blocking"].get("allreduce", 0) > 0 for entry in steps[STEPS])  # blocking collectives are detected


def test_signal_to_one_process_stops_both(words, tmp_path):
    """The signal travels with the all-reduce of a step: both stop after the same step, at most two steps later."""
    log, run = tmp_path / "log", tmp_path / "run"
    words = [*words, "steps=400", "log_every=1", "batch_size=4", "trainer.devices=2", f"run_dir={run}", "data.val=null"]
    process = start(words, tmp_path, log)
    assert wait_until(process, lambda: steps_written(run) >= 5), log.read_text()[-3000:]
    before = steps_written(run)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75, log.read_text()[-3000:]
    saved = last_checkpoint(run)["global_step"]
    assert f"stopped by SIGTERM after step {saved}, saved" in log.read_text()
    assert before < saved == steps_written(run) <= before + 4  # a step may have ended before the signal
    assert errors(log) == []
    assert "Traceback" not in log.read_text()


def test_failed_write_ends_both_processes(words, tmp_path):
    """Rank 0 writes and meets a file size limit while the other process waits for it."""
    log, run = tmp_path / "log", tmp_path / "run"
    words = [*words, "steps=4000", "save_every=3", "log_every=1", "batch_size=4", "trainer.devices=2", "data.val=null"]
    process = start([*words, f"run_dir={run}"], tmp_path, log)
    last = run / "checkpoints/last.ckpt"
    assert wait_until(process, last.is_file), log.read_text()[-3000:]
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit := last.stat().st_size // 2, limit))
    both = tree(process)
    assert process.wait(60) == 2, log.read_text()[-3000:]
    assert errors(log) == [f"error: checkpoint {last} cannot be written: File too large; the one before is intact"]
    assert "Traceback" not in log.read_text()
    assert all(gone(pid) for pid in both)
    assert last_checkpoint(run)["global_step"] % 3 == 0


def test_time_based_saves_agree(words, tmp_path):
    """Time-based saves and validations happen at the same steps on both: every second, as agreement takes one."""
    log, run = tmp_path / "log", tmp_path / "run"
    more = ["batch_size=4", "trainer.devices=2", f"run_dir={run}", "log_every=1", "val_minutes=1e-9"]
    assert start([*words, *more], tmp_path, log).wait(240) == 0, log.read_text()[-3000:]
    rows = read_rows(run / "metrics.csv")[1]
    assert [step for step, row in rows.items() if "val/loss" in row] == [2, 4, 6, 8]
    assert torch.load(run / "checkpoints/previous.ckpt", weights_only=True)["global_step"] == 6


def test_bf16_gradient_compression(words, runs, tmp_path):
    """Close to uncompressed gradients, but not equal."""
    log, run = tmp_path / "log", tmp_path / "run"
    more = ["batch_size=4", "trainer.devices=2", f"run_dir={run}", "log_every=1", "gradient_compression=bf16"]
    assert start([*words, *more], tmp_path, log).wait(240) == 0, log.read_text()[-3000:]
    assert 1e-7 < largest_difference(runs / "2", run) < 1e-2


@pytest.mark.timeout(900)  # on a slow CPU
def test_compiled_ddp_step_is_split_and_reported(words, tmp_path):
    """So that communication overlaps with computation; `optimize_ddp=false` keeps one graph."""
    log, run = tmp_path / "log", tmp_path / "run"
    larger = ["model.embed_dim=192", "model.depth=4", "model.num_heads=3"]  # beyond the first bucket's 1 MB
    more = ["batch_size=4", "trainer.devices=2", f"run_dir={run}", "log_every=1", "compile=true", "data.val=null"]
    assert start([*words, *larger, *more], tmp_path, log).wait(840) == 0, log.read_text()[-3000:]
    assert re.search(r"compiled: \d+ graphs? \(for DDP in \d+ pieces\)", log.read_text())
