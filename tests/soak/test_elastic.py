"""Resuming with another number of processes and workers: same samples, same steps."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path

import pytest
from offline import same_history
from tiny import largest_difference, signal_group, start, steps_written, wait_until

pytestmark = [pytest.mark.soak, pytest.mark.long, pytest.mark.timeout(1800)]

BATCH = ["global_batch_size=16", "batch_size=2"]  # on one process 8 micro-batches, on four 2
Seen = dict[int, list[tuple[int, str]]]  # step -> (position, digest of its image) of all its micro-batches


def consumed(record: Path) -> Seen:
    """What a part of a run has trained on, as recorded by the watcher."""
    seen: Seen = {}
    for line in record.read_text().splitlines():
        found = json.loads(line)
        seen.setdefault(found["step"], []).extend(zip(found["positions"], found["images"], strict=True))
    return seen


def in_parts(words: list[str], stops: list[tuple[int, int, int]], steps: int, folder: Path, watch) -> Seen:
    """Run in parts (processes, workers, stop after about this step); returns what all parts trained on, in order.

    The second part is killed, the others are told to stop. Steps that a killed part has begun and nobody has saved are
    the next part's.
    """
    run, rng = folder / "runs/parts", random.Random(2)
    seen: Seen = {}
    for number, (processes, num_workers, stop) in enumerate([*stops, (1, 2, steps)]):
        record, log = folder / f"part{number}", folder / f"log{number}"
        more = [f"steps={steps}", "name=parts", f"trainer.devices={processes}", f"data.num_workers={num_workers}"]
        process = start([*words, *more], folder, log, **watch(record))
        aim = max(stop, steps_written(run) + 1)
        if stop < steps:
            assert wait_until(process, lambda aim=aim: steps_written(run) >= aim, 300), log.read_text()[-3000:]
            time.sleep(rng.uniform(0, 0.3 if steps > 10 else 0.03))
            if number == 1:
                signal_group(process, signal.SIGKILL)
            else:
                process.send_signal(signal.SIGTERM)
        assert process.wait(600) == (0 if stop == steps else -9 if number == 1 else 75), log.read_text()[-3000:]
        assert f"({processes} processes x" in log.read_text()
        part = consumed(record)
        assert min(part) == len([step for step in seen if step < min(part)])  # no step is left out
        seen = {**{step: found for step, found in seen.items() if step < min(part)}, **part}
    return seen


@pytest.mark.parametrize(
    ("precision", "steps", "stops", "bound"),
    [
        ("64-true", 100, [(1, 2, 25), (2, 1, 50), (4, 1, 75)], 1e-9),
        ("32-true", 10, [(1, 2, 2), (2, 1, 4), (4, 0, 6)], 1e-4),
    ],
)
def test_resume_with_1_2_4_and_1_processes(precision, steps, stops, bound, made, tmp_path, watch, measured):
    """1 -> 2 -> 4 -> 1 processes by restart, with other worker counts: each sample exactly once, same losses."""
    words = [*(made.cached if precision == "64-true" else made.words), *BATCH, f"trainer.precision={precision}"]
    watched = watch(tmp_path / "whole")
    whole = start([*words, f"steps={steps}", "name=whole"], tmp_path, tmp_path / "log", **watched)
    assert whole.wait(900) == 0, (tmp_path / "log").read_text()[-3000:]
    alone, parts = consumed(tmp_path / "whole"), in_parts(words, stops, steps, tmp_path, watch)
    assert list(alone) == list(range(steps))
    for step in range(steps):
        assert sorted(parts[step]) == sorted(alone[step]), step
        assert [position for position, _ in sorted(parts[step])] == list(range(step * 16, (step + 1) * 16))
    found = largest_difference(tmp_path / "runs/whole", tmp_path / "runs/parts")
    assert found <= bound
    same_history(tmp_path / "runs/parts")
    measured(
        f"{precision}: {steps} steps of 16, each position once, same images; largest difference of a loss {found:.1e}"
    )
