"""Full disks, read-only folders, deleted shards, damaged checkpoints, NaN: each ends in a clear message."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from tiny import errors, last_checkpoint, rows_of, same_run, same_weights, start, steps_written, tree, wait_until

from beit_pretrain.engine.checkpointing import newest_good
from beit_pretrain.tables import read_rows

pytestmark = [pytest.mark.soak, pytest.mark.long, pytest.mark.timeout(1800)]

STEPS = 60


@pytest.fixture(scope="session")
def words(made) -> list[str]:
    """A run of just over an epoch that opens one shard after the other."""
    return [*made.words, f"steps={STEPS}", "data.shuffle_block_size=36", "data.shuffle_streams=1"]


@pytest.fixture(scope="session")
def undisturbed(made, words) -> Path:
    """The folder of an undisturbed run with its checkpoint of step 12."""
    log = made.folder / "undisturbed.log"
    assert start([*words, "name=undisturbed", "keep_every=12"], made.folder, log).wait(600) == 0, log.read_text()[
        -2000:
    ]
    return made.folder / "runs/undisturbed"


def ended(process: subprocess.Popen, log: Path, code: int) -> str:
    """Wait for a run to exit with a code and without traceback; returns its error line."""
    assert process.wait(300) == code, log.read_text()[-3000:]
    assert "Traceback" not in log.read_text(), log.read_text()[-3000:]
    if not code:
        return ""
    (said,) = errors(log)
    return said


def test_disk_fills_during_checkpoint(words, undisturbed, full_disk, tmp_path, measured):
    """A disk that fills during a checkpoint: the earlier one is intact, the message says so, the exit code is not 0."""
    disk, log = full_disk(48 << 20), tmp_path / "log"
    run, filler = disk / "run", disk / "filler"
    process = start([*words, "name=full", f"run_dir={run}"], tmp_path, log)
    assert wait_until(process, (run / "checkpoints/previous.ckpt").is_file)
    process.send_signal(signal.SIGSTOP)  # the next file is to be last.ckpt, and not the best one of a later validation
    size = (run / "checkpoints/last.ckpt").stat().st_size
    with filler.open("wb") as file:  # leaves room for half a checkpoint
        file.write(b"x" * (shutil.disk_usage(disk).free - size // 2))
    process.send_signal(signal.SIGCONT)
    said = ended(process, log, 2)
    assert said.endswith("last.ckpt cannot be written: No space left on device; the one before is intact"), said
    good, _, problems = newest_good(run / "checkpoints")
    assert (good, problems) == (run / "checkpoints/last.ckpt", [])
    assert not list((run / "checkpoints").glob(".*"))
    at = last_checkpoint(run)["global_step"]
    filler.unlink()
    ended(start([*words, "name=full", f"run_dir={run}"], tmp_path, log), log, 0)
    assert same_run(undisturbed, run) == STEPS
    measured(f"exit code 2; {said.removeprefix('error: ').replace(str(disk), 'DISK')}")
    measured(f"last.ckpt is that of step {at}; with room again the run ends bit-identical")


def test_disk_full_from_start(words, undisturbed, full_disk, tmp_path, measured):
    """A disk without room for a line of metrics: the run ends with a clear message and resumes once there is room."""
    disk, log = full_disk(48 << 20), tmp_path / "log"
    run, filler = disk / "run", disk / "filler"
    process = start([*words, "name=full", f"run_dir={run}"], tmp_path, log)
    assert wait_until(process, (run / "checkpoints/last.ckpt").is_file)
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass
    said = ended(process, log, 2)
    assert "No space left on device" in said
    filler.unlink()
    ended(start([*words, "name=full", f"run_dir={run}"], tmp_path, log), log, 0)
    assert same_run(undisturbed, run) == STEPS
    measured(f"exit code 2; {said.removeprefix('error: ').replace(str(disk), 'DISK')}; afterwards bit-identical")


def test_file_size_limit(words, undisturbed, tmp_path, measured):
    """A file size limit during a checkpoint: the earlier one is intact, the message says so, the exit code is not 0."""
    log, run = tmp_path / "log", tmp_path / "runs/quota"
    process = start([*words, "name=quota"], tmp_path, log)
    last = run / "checkpoints/last.ckpt"
    assert wait_until(process, last.is_file)
    limit = last.stat().st_size // 2
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
    said = ended(process, log, 2)
    assert said.endswith("cannot be written: File too large; the one before is intact"), said
    good, _, problems = newest_good(run / "checkpoints")
    assert (good, problems) == (last, [])
    ended(start([*words, "name=quota"], tmp_path, log), log, 0)
    assert same_run(undisturbed, run) == STEPS
    measured(f"exit code 2; ...{said[-62:]}; afterwards bit-identical")


def test_read_only_folder(words, full_disk, tmp_path, measured):
    """A read-only folder is reported before the first step."""
    disk, log = full_disk(16 << 20), tmp_path / "log"
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    said = ended(start([*words, "name=ro", f"run_dir={disk / 'run'}"], tmp_path, log), log, 2)
    assert f"{disk} is not a writable folder" in said
    measured(f"exit code 2; {said.removeprefix('error: ').replace(str(disk), 'DISK')}")


def test_shard_deleted_during_training(made, words, undisturbed, tmp_path, measured):
    """A shard deleted during training is named; once it is back, the run resumes as if undisturbed."""
    data, log = tmp_path / "data", tmp_path / "log"
    shutil.copytree(made.folder / "data/train", data)
    words = [f"data.train={data}" if word.startswith("data.train=") else word for word in words]
    process = start([*words, "name=deleted"], tmp_path, log)
    run = tmp_path / "runs/deleted"
    assert wait_until(process, lambda: steps_written(run) >= 8)
    opened = {os.readlink(file) for pid in tree(process) for file in Path(f"/proc/{pid}/fd").iterdir()}
    shard = next(path for path in sorted(data.glob("*.tar")) if str(path) not in opened)
    shard.rename(tmp_path / "away.tar")
    said = ended(process, log, 2)
    assert f"{shard} cannot be read: No such file or directory" in said
    again = ended(start([*words, "name=deleted"], tmp_path, log), log, 2)
    assert f"{shard} is missing" in again
    (tmp_path / "away.tar").rename(shard)
    ended(start([*words, "name=deleted"], tmp_path, log), log, 0)
    # The undisturbed run has its images elsewhere: only the name of the folder is another.
    assert same_run(undisturbed, run) == STEPS
    measured(f"exit code 2; {said.removeprefix('error: ').replace(str(data), 'DATA')}; afterwards bit-identical")


def test_checkpoint_truncated_at_fifty_lengths(words, undisturbed, tmp_path, measured):
    """A checkpoint truncated at any of 50 random lengths is named, and the previous one is used."""
    rng, log = random.Random(3), tmp_path / "log"
    shutil.copytree(undisturbed / "checkpoints", tmp_path / "runs/cut/checkpoints")
    folder = tmp_path / "runs/cut/checkpoints"
    last = folder / "last.ckpt"
    whole = last.read_bytes()
    for length in [0, 1, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(47))]:
        last.unlink(missing_ok=True)
        last.write_bytes(whole[:length])
        good, _, (problem,) = newest_good(folder)
        assert good == folder / "previous.ckpt"
        assert str(last) in problem
    for name in ("config.yaml", "metrics.csv"):
        shutil.copy(undisturbed / name, tmp_path / "runs/cut" / name)
    before = torch.load(folder / "previous.ckpt", weights_only=True)["global_step"]
    resumed = [*words, "name=undisturbed", f"run_dir={folder.parent}"]
    ended(start(resumed, tmp_path, log), log, 0)
    said = log.read_text()
    assert f"warning: {last}" in said
    assert f"resuming undisturbed after step {before}" in said
    assert same_run(undisturbed, folder.parent) == STEPS
    measured(
        f"50 lengths of {len(whole):,} bytes: all refused by name; from step {before} the command ends bit-identical"
    )


def test_nan_at_step_seven(words, watch, tmp_path, measured):
    """A NaN injected at step 7 is skipped and counted; the result equals a run without that update."""
    log = tmp_path / "log"
    for name, orders in (("nan", {"POISON": "7"}), ("left_out", {"LEAVE_OUT": "7"})):
        ended(start([*words, f"name={name}", "steps=30"], tmp_path, log, **watch(**orders)), log, 0)
        if name == "nan":
            assert "step 8: 1 update was skipped" in log.read_text()
    nan, left_out = tmp_path / "runs/nan", tmp_path / "runs/left_out"
    same_weights(last_checkpoint(nan), last_checkpoint(left_out))
    rows = [rows_of(run) for run in (nan, left_out)]
    for step in range(1, 31):
        assert rows[0][step]["train/loss"] == rows[1][step]["train/loss"]
        assert rows[0][step]["train/skipped"] == (step == 8)
    listed = [json.loads(line) for line in (nan / "skipped.jsonl").read_text().splitlines()]
    assert listed == [{"step": 8, "positions": [56, 63]}]
    # Killed after it and gone on: counted once all the same.
    process = start([*words, "name=killed", "steps=30"], tmp_path, log, **watch(POISON="7"))
    assert wait_until(process, lambda: steps_written(tmp_path / "runs/killed") >= 10)
    process.kill()
    process.wait()
    ended(start([*words, "name=killed", "steps=30"], tmp_path, log, **watch(POISON="7")), log, 0)
    assert same_run(nan, tmp_path / "runs/killed") == 30
    assert (tmp_path / "runs/killed/skipped.jsonl").read_text() == (nan / "skipped.jsonl").read_text()
    counts = {float(entry["step"]) for entry in last_checkpoint(nan)["optimizer_states"][0]["state"].values()}
    assert counts == {29.0}
    measured("30 steps: weights, moments (29 updates) and all losses equal; skipped.jsonl: step 8, positions 56 to 63")


def test_persistent_nan(words, undisturbed, watch, tmp_path, measured):
    """Persistent NaN from step 12 on: the run stops in time with the last good weights."""
    log, run = tmp_path / "log", tmp_path / "runs/nan"
    orders = watch(POISON="12-")
    said = ended(start([*words, "name=nan", "max_nonfinite_steps=3"], tmp_path, log, **orders), log, 2)
    assert "3 steps in a row had no finite gradient and were skipped, up to step 15" in said
    content = last_checkpoint(run)
    good = torch.load(undisturbed / "checkpoints/step-00000012.ckpt", weights_only=True)
    same_weights(good, content)
    listed = [json.loads(line)["step"] for line in (run / "skipped.jsonl").read_text().splitlines()]
    assert listed == [13, 14, 15]
    assert read_rows(run / "metrics.csv")[1][15]["train/skipped"] == 1
    measured(
        f"stopped at step 15 with exit code 2; last.ckpt (step {content['global_step']}) has the weights of step 12"
    )
