"""Checkpoints written in the background during a run: nothing is lost and errors are reported, however it ends."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from lightning import Callback
from test_background_checkpoint import endless
from test_checkpointing import in_process, sends, signals_restored, words  # noqa: F401 (fixtures)
from tiny import Crash, last_checkpoint, rows_of

from beit_pretrain.engine import fit as runs
from beit_pretrain.engine.background_checkpoint import BackgroundCheckpointIO
from beit_pretrain.engine.checkpointing import CheckpointManager
from beit_pretrain.errors import UserError
from beit_pretrain.models.checkpoints.files import AtomicCheckpointIO
from beit_pretrain.tables import read_rows

WRITE = AtomicCheckpointIO.save_checkpoint


@pytest.fixture
def short(words, tmp_path) -> list[str]:  # noqa: F811
    """Ten steps without validation, saving after steps 4, 8 and 10."""
    words = [word for word in in_process(words) if not word.startswith("data.val=")]
    return [*words, "steps=10", f"run_dir={tmp_path / 'run'}"]


class Steps(Callback):
    """Counts the steps that a run has begun."""

    def __init__(self) -> None:
        self.begun_steps = 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx: int) -> None:
        self.begun_steps = trainer.global_step + 1


@pytest.fixture
def with_callback(monkeypatch):
    """`with_callback(callback)`: add it to all later runs."""
    make = runs.make_trainer

    def add(callback: Callback) -> Callback:
        monkeypatch.setattr(runs, "make_trainer", lambda cfg, steps, calls: make(cfg, steps, [*calls, callback]))
        return callback

    return add


@pytest.fixture
def slow(monkeypatch):
    """Every write takes a while, as on a network disk."""

    def write(self, checkpoint, path, storage_options=None) -> None:
        time.sleep(0.3)
        WRITE(self, checkpoint, path)

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", write)


def same_content(one, other, place: str = "") -> None:
    """Assert that two checkpoints are bit-identical except for times and folders."""
    assert type(one) is type(other), place
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), place
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), place
        for key in one:
            if key not in ("images_per_s", "data_wait", "dirpath", "best_model_path", "best_k_models"):
                same_content(one[key], other[key], f"{place}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), place
        for number, pair in enumerate(zip(one, other, strict=True)):
            same_content(*pair, f"{place}.{number}")
    else:
        assert one == other, place


def test_checkpoint_is_snapshot_of_its_step(short, run_cli, tmp_path, monkeypatch, with_callback):
    """Written three steps later, it equals one written at once: weights, moments, sums, loops."""
    short = [*short, "log_every=3", "keep_every=4"]  # the sums of step 4 are not written yet
    save = BackgroundCheckpointIO.save_checkpoint

    def waited_for(self, *args, **kwargs) -> None:
        save(self, *args, **kwargs)
        self.wait()

    with monkeypatch.context() as patch:
        patch.setattr(BackgroundCheckpointIO, "save_checkpoint", waited_for)
        assert run_cli(*short, f"run_dir={tmp_path / 'waited'}")[0] == 0
    steps, begun = with_callback(Steps()), {}

    def late(self, checkpoint, path, storage_options=None) -> None:
        step, deadline = int(checkpoint["global_step"]), time.monotonic() + 20
        while steps.begun_steps < min(step + 3, 8) and time.monotonic() < deadline:
            time.sleep(0.01)
        begun[step] = steps.begun_steps
        WRITE(self, checkpoint, path)

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", late)
    code, _, stderr = run_cli(*short)
    assert code == 0, stderr
    assert begun[4] == 7  # the step that was in hand when that of step 4 was written
    for name in ("step-00000004.ckpt", "step-00000008.ckpt", "last.ckpt"):
        both = [torch.load(tmp_path / run / "checkpoints" / name, weights_only=True) for run in ("waited", "run")]
        assert both[0]["unwritten"] or name == "last.ckpt"
        same_content(*both)


def test_failed_write_ends_run_at_next_step(short, run_cli, tmp_path, monkeypatch, with_callback):
    """One line, exit code 2, and the previous checkpoint is intact."""
    steps = with_callback(Steps())
    fail_from(monkeypatch, 8)
    code, _, stderr = run_cli(*short)
    assert (code, stderr.count("error:"), "Traceback" in stderr) == (2, 1, False), stderr
    assert "disk full of step 8" in stderr
    assert 8 <= steps.begun_steps <= 10
    assert last_checkpoint(tmp_path / "run")["global_step"] == 4


def fail_from(monkeypatch, step: int) -> None:
    """Checkpoints from a step on fail to be written, after a short delay."""

    def write(self, checkpoint, path, storage_options=None) -> None:
        if checkpoint["global_step"] < step:
            return WRITE(self, checkpoint, path)
        time.sleep(0.05)
        raise UserError(f"disk full of step {checkpoint['global_step']}")

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", write)


def test_failed_best_checkpoint_before_first_last(words, run_cli, monkeypatch, with_callback):  # noqa: F811
    """It is written by the same thread and ends the run just as early."""
    steps = with_callback(Steps())
    fail_from(monkeypatch, 1)
    code, _, stderr = run_cli(*in_process(words), "save_every=1000", "val_every=2", "steps=12")
    assert (code, stderr.count("error:")) == (2, 1), stderr
    assert "disk full of step 2" in stderr
    assert 2 <= steps.begun_steps <= 4


def test_exit_waits_for_best_checkpoint(words, run_cli, tmp_path, slow, with_callback):  # noqa: F811
    with_callback(Crash(3))
    with pytest.raises(RuntimeError, match="power cut"):
        run_cli(*in_process(words), "save_every=1000", "val_every=2", f"run_dir={tmp_path / 'run'}")
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["best.ckpt"]


def test_failed_write_without_steps_left(short, run_cli, tmp_path, monkeypatch):
    """The last checkpoint was lost, but a kept one has all steps."""
    given = [*short, "steps=8", "keep_every=8"]
    assert run_cli(*given)[0] == 0
    for name in ("checkpoints/last.ckpt", "checkpoints/previous.ckpt", "finished.json"):
        (tmp_path / "run" / name).unlink()
    heard, written = [], CheckpointManager._written
    monkeypatch.setattr(
        CheckpointManager, "_written", lambda self, path, held: heard.append(path.name) or written(self, path, held)
    )
    code, _, stderr = run_cli(*given)
    assert code == 0, stderr
    assert heard == ["last.ckpt"]
    assert last_checkpoint(tmp_path / "run")["global_step"] == 8


def test_signal_during_snapshot_does_not_save_twice(short, run_cli, tmp_path, monkeypatch, signals_restored):  # noqa: F811
    """Taking it may last, since it waits for the previous write."""
    save = CheckpointManager.save

    def told(self, module) -> None:
        save(self, module)
        if module.trainer.global_step == 8:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(CheckpointManager, "save", told)
    with pytest.raises(SystemExit, match="75"):
        run_cli(*short)
    assert last_checkpoint(tmp_path / "run")["global_step"] == 8


def test_failed_final_write(short, run_cli, tmp_path, monkeypatch):
    """No step follows; the run is not marked finished."""
    fail_from(monkeypatch, 10)
    code, stdout, stderr = run_cli(*short)
    assert code == 2
    assert "disk full of step 10" in stderr
    assert "saved" not in stdout
    assert not (tmp_path / "run/finished.json").exists()


def test_failed_write_during_preemption(short, run_cli, tmp_path, monkeypatch, sends):  # noqa: F811
    """Exit code 2 instead of 75: there is no checkpoint to resume from."""
    fail_from(monkeypatch, 6)
    sends("on_train_batch_start", 5)
    code, stdout, stderr = run_cli(*short)
    assert code == 2
    assert "disk full of step 6" in stderr
    assert "stopped by" not in stdout
    assert last_checkpoint(tmp_path / "run")["global_step"] == 4


def test_failed_write_does_not_hide_other_error(short, run_cli, monkeypatch, with_callback, capsys):
    """The run raises the other error and also prints the failed write."""
    with_callback(Crash(4))
    fail_from(monkeypatch, 4)
    with pytest.raises(RuntimeError, match="power cut"):
        run_cli(*short)
    assert "warning: disk full of step 4" in capsys.readouterr().err


class TestPendingWriteIsAwaited:
    """When a process exits, its last checkpoint is completely written."""

    def test_at_normal_end(self, short, run_cli, tmp_path, slow):
        code, stdout, _ = run_cli(*short)
        assert (code, "saved" in stdout) == (0, True)
        assert last_checkpoint(tmp_path / "run")["global_step"] == 10
        assert torch.load(tmp_path / "run/checkpoints/previous.ckpt", weights_only=True)["global_step"] == 8

    def test_on_signal(self, short, run_cli, tmp_path, slow, sends, signals_restored):  # noqa: F811
        sends("on_train_batch_start", 5)
        with pytest.raises(SystemExit) as stopped:
            run_cli(*short)
        assert stopped.value.code == 75
        assert last_checkpoint(tmp_path / "run")["global_step"] == 6

    def test_on_error(self, short, run_cli, tmp_path, slow, with_callback):
        with_callback(Crash(5))
        with pytest.raises(RuntimeError, match="power cut"):
            run_cli(*short)
        assert last_checkpoint(tmp_path / "run")["global_step"] == 4

    def test_on_early_stopping(self, words, run_cli, tmp_path, slow, with_callback):  # noqa: F811
        """The step of the last validation is saved, whatever `save_every` is."""

        class Early(Callback):
            def on_validation_end(self, trainer, pl_module) -> None:
                trainer.should_stop = True

        with_callback(Early())
        code, stdout, stderr = run_cli(*in_process(words), f"run_dir={tmp_path / 'run'}", "save_every=1000")
        assert code == 0, stderr
        assert "stopped early after step 5 of 20" in stdout
        saved = last_checkpoint(tmp_path / "run")
        assert (saved["global_step"], saved["validation_due"]) == (5, False)

    def test_not_on_second_ctrl_c(self, short, run_cli, tmp_path, monkeypatch, with_callback):
        """The previous checkpoint is kept, and nothing half-written."""

        class Twice(Callback):
            def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
                if trainer.global_step == 5:  # that of step 4 is on the disk, or half of it
                    os.kill(os.getpid(), signal.SIGINT)
                    time.sleep(0.05)
                    began.append(time.monotonic())
                    os.kill(os.getpid(), signal.SIGINT)

        began: list[float] = []
        with_callback(Twice())
        monkeypatch.setattr(torch, "save", endless)
        code, *_ = run_cli(*short)
        assert code == 130
        assert time.monotonic() - began[0] < 10
        assert not list((tmp_path / "run/checkpoints").iterdir())


class TestValMinutes:
    def test_does_not_change_metrics(self, words, run_cli, tmp_path):  # noqa: F811
        words = [*in_process(words), "steps=6", "save_every=1000"]
        assert run_cli(*words, f"run_dir={tmp_path / 'steps'}", "val_every=3")[0] == 0
        often = [*words, f"run_dir={tmp_path / 'clock'}", "val_every=1000", "val_minutes=1e-9"]
        assert run_cli(*often)[0] == 0
        rows = [rows_of(tmp_path / run) for run in ("steps", "clock")]
        for step, row in rows[1].items():
            assert "val/loss" in row, step
            assert all(row[name] == value for name, value in rows[0][step].items()), step

    def test_resume_validates_first(self, words, run_cli, tmp_path, sends, signals_restored):  # noqa: F811
        """As with val_every: the checkpoint before the validation says that it is due."""
        words = [*in_process(words), "steps=6", "save_every=1000", "val_every=1000", f"run_dir={tmp_path / 'run'}"]
        sends("on_validation_batch_start", 2)
        with pytest.raises(SystemExit):
            run_cli(*words, "val_minutes=1e-9")
        signals_restored()
        saved = last_checkpoint(tmp_path / "run")
        assert (saved["global_step"], saved["validation_due"]) == (2, True)
        assert "val/loss" not in rows_of(tmp_path / "run")[2]
        assert run_cli(*words)[0] == 0
        assert [step for step, row in rows_of(tmp_path / "run").items() if "val/loss" in row] == [1, 2, 6]

    def test_needs_val_data(self, short, run_cli, tmp_path):
        assert run_cli(*short, "val_minutes=1e-9", "save_every=1000")[0] == 0
        rows = read_rows(tmp_path / "run/metrics.csv")[1]
        assert not any(name.startswith("val/") for row in rows.values() for name in row)
        assert [path.name for path in Path(tmp_path / "run/checkpoints").iterdir()] == ["last.ckpt"]
