"""Kills and signals at any moment: the shipped command resumes as if undisturbed."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
from offline import folders, same_history
from tiny import last_checkpoint, rows_of, same_run, signal_group, start, steps_written, tree, wait_until

pytestmark = [pytest.mark.soak, pytest.mark.long, pytest.mark.timeout(1800)]

STEPS, KILLS = 300, 30


@pytest.fixture(scope="session")
def whole(made) -> Path:
    """The folder of an undisturbed run."""
    log = made.folder / "whole.log"
    assert start([*made.words, f"steps={STEPS}", "name=whole"], made.folder, log).wait(600) == 0, log.read_text()[
        -2000:
    ]
    return made.folder / "runs/whole"


def test_resume_after_thirty_random_kills(made, whole, tmp_path, measured):
    """30 SIGKILLs at random moments, also during a checkpoint write, change neither losses nor weights nor W&B."""
    rng, run, moments = random.Random(0), tmp_path / "runs/killed", Counter()
    partial = run / "checkpoints/.last.ckpt.partial"
    words = [*made.words, f"steps={STEPS}", "name=killed"]
    for kill in range(KILLS):
        process = start(words, tmp_path, tmp_path / "log")
        kind, before = ("start", "step", "step", "write", "write")[kill % 5], steps_written(run)
        if kind == "start":
            time.sleep(rng.uniform(0, 10))
        elif kind == "write":
            aim = before + rng.randrange(1, 12)
            wait_until(process, lambda aim=aim: steps_written(run) >= aim)
            wait_until(process, partial.exists, pause=0)
            time.sleep(rng.uniform(0, 0.02))
        else:
            aim = before + rng.randrange(1, 12)
            wait_until(process, lambda aim=aim: steps_written(run) >= aim)
            time.sleep(rng.uniform(0, 0.3))
        assert process.poll() is None, (tmp_path / "log").read_text()[-2000:]
        if rng.random() < 0.5:
            signal_group(process, signal.SIGKILL)
        else:
            process.kill()  # its loader workers exit by themselves
        process.wait()
        moments["while a checkpoint was written" if partial.exists() else
                "between steps 0 and 1" if not steps_written(run) else
                "before the first new step" if steps_written(run) == before else "in a step"] += 1  # fmt: skip
    assert start(words, tmp_path, tmp_path / "log").wait(600) == 0, (tmp_path / "log").read_text()[-2000:]
    assert moments["while a checkpoint was written"] >= 3, moments
    assert same_run(whole, run) == STEPS
    rows = same_history(run)
    measured(f"{KILLS} kills: " + ", ".join(f"{count} {moment}" for moment, count in moments.items()))
    measured(f"{STEPS} rows of metrics, all weights and moments bit-identical, each step once")
    measured(f"W&B offline: {len(folders(run))} folders of one run; the newest has all {rows} steps once, same numbers")


@pytest.mark.parametrize("devices", [1, 2])
def test_resume_after_signals(devices, made, whole, tmp_path, measured):
    """SIGTERM, SIGUSR1 and Ctrl-C end a run after the current step; resuming is bit-identical."""
    words = [*made.words, f"steps={STEPS if devices == 1 else 90}", f"batch_size={4 // devices}"]
    words += [] if devices == 1 else ["trainer.devices=2"]
    if devices == 2:
        assert start([*words, "name=whole"], tmp_path, tmp_path / "log").wait(600) == 0
    undisturbed = whole if devices == 1 else tmp_path / "runs/whole"
    rng, run, waited, further = random.Random(1), tmp_path / "runs/stopped", [], []
    words.append("name=stopped")
    for signum, whom in (
        *((signal.SIGTERM, "one"), (signal.SIGTERM, "group"), (signal.SIGTERM, "everything")),
        *((signal.SIGUSR1, "one"), (signal.SIGUSR1, "everything"), (signal.SIGINT, "group")),
    ):
        process = start(words, tmp_path, tmp_path / "log")
        aim = steps_written(run) + rng.randrange(2, 9)
        assert wait_until(process, lambda aim=aim: steps_written(run) >= aim), (tmp_path / "log").read_text()[-2000:]
        time.sleep(rng.uniform(0, 0.3))
        before, told = steps_written(run), time.monotonic()
        for pid in {"one": [process.pid], "group": [], "everything": tree(process)}[whom]:
            with suppress(ProcessLookupError):
                os.kill(pid, signum)
        if whom == "group":
            signal_group(process, signum)
        code = process.wait(60)
        said = (tmp_path / "log").read_text()
        assert code == (130 if signum == signal.SIGINT else 75), f"{signum.name} to {whom}: {code}\n{said[-3000:]}"
        assert f"stopped by {signum.name} after step {steps_written(run)}, saved" in said, said[-2000:]
        assert "Traceback" not in said, said[-3000:]
        assert last_checkpoint(run)["global_step"] == steps_written(run)
        waited.append(time.monotonic() - told)
        further.append(steps_written(run) - before)
    assert start(words, tmp_path, tmp_path / "log").wait(600) == 0, (tmp_path / "log").read_text()[-2000:]
    steps = same_run(undisturbed, run)
    same_history(run)
    # The current step, and one that may have ended before the signal. With several processes a signal
    # travels with the all-reduce of a step, which may have begun, and is read one step later, so that no step waits.
    assert max(further) <= (2 if devices == 1 else 4)
    measured(f"{len(waited)} stops of {devices} process(es): {min(waited):.1f} to {max(waited):.1f} s until the exit, ")
    measured(f"steps after the signal: {further}; exit codes 75 and 130; {steps} steps bit-identical, W&B too")


def test_resume_after_signal_during_validation(made, tmp_path, measured):
    """SIGTERM during a validation ends it at once; the next start repeats the validation."""
    words = [*made.words, "steps=75", "data.val_batch=1", "data.val_images=48"]
    assert start([*words, "name=whole"], tmp_path, tmp_path / "log").wait(600) == 0
    run, caught = tmp_path / "runs/stopped", 0
    for aim in (25, 50, 75):
        process = start([*words, "name=stopped"], tmp_path, tmp_path / "log")
        assert wait_until(process, lambda aim=aim: steps_written(run) >= aim, pause=0.001)
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
        assert code == 75, (tmp_path / "log").read_text()[-2000:]
        caught += steps_written(run) == aim and "val/loss" not in rows_of(run)[aim]
    assert start([*words, "name=stopped"], tmp_path, tmp_path / "log").wait(600) == 0
    assert caught >= 2
    assert same_run(tmp_path / "runs/whole", run) == 75
    measured(f"{caught} of 3 signals at the end of step 25, 50, 75 came before or in its validation; bit-identical")
