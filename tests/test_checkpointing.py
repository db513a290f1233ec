"""Resume after kills, signals and damaged checkpoints is bit-identical; non-finite gradients; checkpoint files."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning import Callback
from lightning.pytorch.trainer.states import TrainerFn
from tiny import OFFLINE, fit_words, last_checkpoint, rows_of, same_run, signal_group, start, steps_written, wait_until

from beit_pretrain.engine import fit as runs
from beit_pretrain.engine.checkpointing import CheckpointManager, check_space, newest_good
from beit_pretrain.engine.nonfinite_guard import NonFiniteGuard
from beit_pretrain.engine.preemption import Preempted, PreemptionSignals
from beit_pretrain.errors import UserError
from beit_pretrain.tables import read_rows


@pytest.fixture
def words(shards, dvae_checkpoint, tmp_path):
    """A small run with all features of real ones: workers, a tokenizer, drop path, accumulation, offline W&B."""
    words = [f"tokenizer.path={dvae_checkpoint}", "batch_size=4", "val_every=5", "save_every=4", "steps=20", *OFFLINE]
    words += ["model.drop_path_rate=0.1", "data.num_workers=1", "num_visualizations=0", "optim.warmup_steps=2"]
    return fit_words("pretrain", shards, *words)


@pytest.mark.long
def test_resume_after_random_kills(words, tmp_path):
    """SIGKILL of the whole process group at random moments; six times here, thirty times in `make soak`."""
    log, folder, rng = tmp_path / "log", tmp_path / "killed", random.Random(0)
    assert start([*words, f"run_dir={tmp_path / 'whole'}"], tmp_path, log).wait(240) == 0, log.read_text()
    words, kills = [*words, f"run_dir={folder}"], 0
    while kills < 6 and steps_written(folder) < 20:
        running, aim = start(words, tmp_path, log), min(19, steps_written(folder) + rng.randrange(1, 6))
        wait_until(running, lambda aim=aim: steps_written(folder) >= aim)
        time.sleep(rng.random() * 0.2)
        if running.poll() is None:
            signal_group(running, signal.SIGKILL)
            kills += 1
        running.wait()
    assert start(words, tmp_path, log).wait(240) == 0, log.read_text()
    assert kills >= 3
    same_run(tmp_path / "whole", folder)


@pytest.mark.long
@pytest.mark.parametrize(("signum", "expected"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_resume_after_signal(signum, expected, words, tmp_path):
    """Workers get the signal too, as from a terminal or SLURM: the current step is finished and saved."""
    log, folder = tmp_path / "log", tmp_path / "stopped"
    assert start([*words, f"run_dir={tmp_path / 'whole'}"], tmp_path, log).wait(240) == 0, log.read_text()
    running = start([*words, f"run_dir={folder}"], tmp_path, log)
    assert wait_until(running, lambda: steps_written(folder) >= 6)
    before = steps_written(folder)
    signal_group(running, signum)
    assert running.wait(60) == expected, log.read_text()
    said = log.read_text()
    assert f"stopped by {signal.Signals(signum).name} after step" in said
    assert "rerun the same command to resume from there" in said
    assert "Traceback" not in said
    saved = last_checkpoint(folder)["global_step"]
    assert before <= saved <= steps_written(folder) == saved
    assert start([*words, f"run_dir={folder}"], tmp_path, log).wait(240) == 0, log.read_text()
    assert f"after step {saved}" in log.read_text()
    same_run(tmp_path / "whole", folder)


class Signal(Callback):
    """Sends this process a signal in a hook at a step."""

    def __init__(self, hook: str, step: int, signum: int = signal.SIGTERM):
        self.sent = False

        def send(trainer, *_):
            if trainer.global_step == step and not self.sent and trainer.state.fn == TrainerFn.FITTING:
                self.sent = True
                os.kill(os.getpid(), signum)

        setattr(self, hook, send)


@pytest.fixture
def sends(monkeypatch):
    """`sends(hook, step)`: the next run gets a signal in this hook."""
    make = runs.make_trainer

    def order(*where) -> None:
        def armed(cfg, steps, callbacks):
            monkeypatch.setattr(runs, "make_trainer", make)
            return make(cfg, steps, [*callbacks, Signal(*where)])

        monkeypatch.setattr(runs, "make_trainer", armed)

    return order


PLACES = [  # hook, step, step that is saved
    ("on_train_batch_start", 4, 5),  # in the first of two micro-batches, before a validation that is due
    ("on_train_batch_end", 5, 5),  # just before that validation
    ("on_validation_batch_start", 5, 5),  # in it
    ("on_validation_epoch_end", 5, 5),
    ("on_validation_end", 10, 10),  # of the last step
    ("on_fit_start", 0, None),  # before the first step
]


def test_resume_after_signal_in_any_hook(words, run_cli, tmp_path, sends, signals_restored):
    """The next start does what was due: same rows, weights, moments and best checkpoint."""
    words = [*in_process(words), "steps=10"]
    assert run_cli(*words, f"run_dir={tmp_path / 'whole'}")[0] == 0
    for number, (hook, step, saved) in enumerate(PLACES):
        run = tmp_path / str(number)
        sends(hook, step)
        with pytest.raises(SystemExit) as stopped:
            run_cli(*words, f"run_dir={run}")
        assert stopped.value.code == 75
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN  # one more must not change the exit code
        signals_restored()
        code, stdout, stderr = run_cli(*words, f"run_dir={run}")
        assert code == 0, stderr
        assert (f"after step {saved}" in stdout) == (saved is not None), hook
        same_run(tmp_path / "whole", run)
        assert (run / "finished.json").read_text() == '{"step": 10}\n'
        best = [torch.load(folder / "checkpoints/best.ckpt", weights_only=True) for folder in (tmp_path / "whole", run)]
        assert best[0]["global_step"] == best[1]["global_step"]


@pytest.fixture
def signals_restored():
    """`signals_restored()`: restore the signal handlers, which a stopped run ignores for good; also after the test."""

    def restore() -> None:
        for signum in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(signum, signal.SIG_DFL)

    yield restore
    restore()


def test_signal_waits_for_validation_with_ema(shards, run_cli, tmp_path, sends, signals_restored):
    """During validation the EMA weights replace the network's. Early stopping keeps its count."""
    words = ["from_scratch=true", "ema=.9", "early_stopping=3", "batch_size=4", "steps=10", "val_every=2"]
    words = fit_words("finetune", shards, *words, "save_every=4")
    assert run_cli(*words, f"run_dir={tmp_path / 'whole'}")[0] == 0
    sends("on_validation_batch_start", 4)
    with pytest.raises(SystemExit):
        run_cli(*words, f"run_dir={tmp_path / 'run'}")
    signals_restored()
    assert "val/accuracy" in rows_of(tmp_path / "run")[4]
    assert run_cli(*words, f"run_dir={tmp_path / 'run'}")[0] == 0
    same_run(tmp_path / "whole", tmp_path / "run")
    last = [last_checkpoint(tmp_path / name) for name in ("whole", "run")]
    for name, tensor in last[0]["current_model_state"].items():
        assert torch.equal(tensor, last[1]["current_model_state"][name])
    assert run_cli(*words, f"run_dir={tmp_path / 'run'}")[1].count("already finished") == 1  # however early it stopped


def test_signal_during_final_validation(words, run_cli, tmp_path, monkeypatch, signals_restored):
    """It follows the last checkpoint, whose step is no multiple of val_every."""
    words = [*in_process(words), "steps=7"]
    assert run_cli(*words, f"run_dir={tmp_path / 'whole'}")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(runs, "mark_finished", lambda *_: os.kill(os.getpid(), signal.SIGUSR1))
        with pytest.raises(SystemExit):
            run_cli(*words, f"run_dir={tmp_path / 'run'}")
    signals_restored()
    assert run_cli(*words, f"run_dir={tmp_path / 'run'}")[0] == 0
    assert "val/loss" in same_rows(tmp_path / "whole", tmp_path / "run")[7]
    code, stdout, _ = run_cli(*words, f"run_dir={tmp_path / 'run'}")
    assert (code, "already finished" in stdout) == (0, True)
    assert "val/loss" in same_rows(tmp_path / "whole", tmp_path / "run")[7]


def same_rows(one: Path, other: Path) -> dict:
    rows = rows_of(one)
    assert rows == rows_of(other)
    return rows


def send(signum: int) -> None:
    os.kill(os.getpid(), signum)
    time.sleep(0.1)


class TestSignals:
    def test_exits_at_once_outside_loop(self, signals_restored):
        with pytest.raises(Preempted) as stopped, PreemptionSignals():
            send(signal.SIGUSR1)
        assert (stopped.value.signum, stopped.value.step) == (signal.SIGUSR1, None)

    def test_first_signal_in_loop_is_deferred(self):
        before = signal.getsignal(signal.SIGTERM)
        with PreemptionSignals() as signals:
            signals.looping = True
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            assert signals.told == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) == before

    def test_second_ctrl_c_exits_at_once(self):
        with PreemptionSignals() as signals:
            signals.looping = True
            send(signal.SIGINT)
            assert signals.told == signal.SIGINT
            with pytest.raises(KeyboardInterrupt):
                send(signal.SIGINT)

    def test_second_sigterm_is_ignored(self, signals_restored):
        """Neither the message nor the ongoing shutdown."""
        closed = []

        def leave() -> None:
            with PreemptionSignals():
                try:
                    send(signal.SIGTERM)
                finally:
                    send(signal.SIGTERM)
                    closed.append(True)

        with pytest.raises(Preempted) as stopped:
            leave()
        assert closed
        assert stopped.value.step is None
        with PreemptionSignals() as signals:
            signals.looping = True
            send(signal.SIGTERM)
            signals.looping = False  # the loop has ended and the signal is still pending
            send(signal.SIGTERM)
            assert signals.told == signal.SIGTERM

    def test_message_outside_loop_names_saved_step(self, signals_restored):
        def validate() -> None:
            with PreemptionSignals() as signals:
                signals.saved_at = 11
                send(signal.SIGTERM)

        with pytest.raises(Preempted, match="after step 11"):
            validate()

    @pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
    def test_blocked_main_thread_is_ended(self, signum, code):
        """As in torch's store, where processes wait for each other; here the thread waits for its own lock."""
        program = (
            "import ctypes\nfrom beit_pretrain.engine.preemption import PreemptionSignals\n"
            "def on_exit(stopped):\n    print(stopped, flush=True)\n    return 130 if stopped.signum == 2 else 75\n"
            "lock, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)\n"
            "with PreemptionSignals(on_exit):\n    print('waiting', flush=True)\n"
            "    libc.pthread_mutex_lock(lock)\n    libc.pthread_mutex_lock(lock)"
        )
        with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "waiting\n"
            time.sleep(0.2)
            process.send_signal(signum)
            said, _ = process.communicate(timeout=20)
        assert process.returncode == code
        assert said == f"stopped by {signal.Signals(signum).name} with no step in hand\n"

    def test_lightning_does_not_install_handlers(self, words, run_cli, tmp_path, monkeypatch):
        taken = []
        monkeypatch.setattr(
            CheckpointManager, "begin", lambda self, trainer: taken.append(signal.getsignal(signal.SIGTERM))
        )
        assert run_cli(*in_process(words), "steps=1", f"run_dir={tmp_path / 'run'}")[0] == 0
        assert [handler.__self__.__class__ for handler in taken] == [PreemptionSignals]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_during_imports(signum, words, tmp_path):
    """A signal before torch is loaded also gives exit code 75."""
    process = start([*words, f"run_dir={tmp_path / 'run'}"], tmp_path, tmp_path / "log")
    assert wait_until(process, lambda: bool(caught(process.pid) & 1 << signum - 1))
    process.send_signal(signum)
    assert process.wait(60) == 75
    assert f"stopped by {signum.name} with no step in hand" in (tmp_path / "log").read_text()


def caught(pid: int) -> int:
    """The signals that a process has handlers for, as a bit mask."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("SigCgt:")[2].split()[0], 16)


def test_requeued_job_resumes(words, run_cli, tmp_path, sends, signals_restored, monkeypatch):
    """resume=never applies only to the first start: a scheduler repeats the whole command."""
    words = [*in_process(words), "steps=4", "resume=never", f"run_dir={tmp_path / 'run'}"]
    sends("on_train_batch_end", 2)
    with pytest.raises(SystemExit):
        run_cli(*words)
    signals_restored()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    code, stdout, stderr = run_cli(*words)
    assert code == 0, stderr
    assert "after step 2" in stdout


def in_process(words: list[str]) -> list[str]:
    return [word for word in words if not word.startswith(("logger", "data.num_workers"))] + ["data.num_workers=0"]


def test_checkpoint_files_of_a_run(words, run_cli, tmp_path):
    assert run_cli(*in_process(words), f"run_dir={tmp_path / 'run'}", "keep_every=6")[0] == 0
    names = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    kept = {f"step-{step:08d}.ckpt" for step in (6, 12, 18)}
    assert names == {"last.ckpt", "previous.ckpt", "best.ckpt", *kept}
    assert {path.name for path in (tmp_path / "run").iterdir() if path.is_dir()} == {"checkpoints"}
    step = {
        name: torch.load(tmp_path / "run" / "checkpoints" / name, weights_only=True)["global_step"] for name in names
    }
    assert step["last.ckpt"] == 20
    assert step["previous.ckpt"] == 18
    assert step["step-00000006.ckpt"] == 6


def test_save_minutes_does_not_change_metrics(words, run_cli, tmp_path):
    """A checkpoint between two rows of metrics holds the sums not yet written."""
    words = [*in_process(words), "log_every=5", "steps=10"]
    assert run_cli(*words, f"run_dir={tmp_path / 'whole'}")[0] == 0
    often = [*words, f"run_dir={tmp_path / 'often'}", "save_minutes=1e-9"]
    assert run_cli(*often)[0] == 0
    same_run(tmp_path / "whole", tmp_path / "often", every=5)
    last = tmp_path / "often" / "checkpoints" / "previous.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 9
    assert "loss" in torch.load(last, weights_only=True)["unwritten"]
    # Going on from the one in between gives the same row.
    (tmp_path / "often" / "checkpoints" / "last.ckpt").unlink()
    code, stdout, stderr = run_cli(*often)
    assert "resuming demo/pretrain after step 9" in stdout, stderr
    same_run(tmp_path / "whole", tmp_path / "often", every=5)


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "flipped"])
def test_damaged_checkpoint_falls_back_to_previous(damage, words, run_cli, tmp_path):
    words = [*in_process(words), f"run_dir={tmp_path / 'run'}", "steps=8"]
    assert run_cli(*words)[0] == 0
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    whole = last.read_bytes()
    last.unlink()
    middle = len(whole) // 2
    last.write_bytes(
        {
            "cut": whole[: int(0.7 * len(whole))],
            "empty": b"",
            "text": b"no checkpoint",
            "flipped": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
        }[damage]
    )
    code, stdout, stderr = run_cli(*words)
    assert code == 0, stderr
    assert "last.ckpt is damaged" in stderr or "last.ckpt cannot be read" in stderr
    assert "resuming from" in stderr
    assert "after step 4" in stdout


def test_checkpoint_truncated_at_any_length(words, run_cli, tmp_path):
    """It is named and skipped in favour of the previous, the best, or a kept one, in this order."""
    words = [*in_process(words), f"run_dir={tmp_path / 'run'}", "steps=8", "keep_every=4", "val_every=2"]
    assert run_cli(*words)[0] == 0
    folder, rng = tmp_path / "run" / "checkpoints", random.Random(1)
    names = ["last.ckpt", "previous.ckpt"]
    names += sorted(["best.ckpt", "step-00000004.ckpt"], key=lambda name: -(folder / name).stat().st_mtime_ns)
    (folder / "step-00000008.ckpt").unlink()
    for number, name in enumerate(names):
        assert newest_good(folder)[0] == folder / name
        whole = (folder / name).read_bytes()
        for length in [0, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(10))]:
            (folder / name).unlink()
            (folder / name).write_bytes(whole[:length])
            if number + 1 < len(names):
                newest, _, problems = newest_good(folder)
                assert newest == folder / names[number + 1]
                assert str(folder / name) in problems[number]
            else:
                with pytest.raises(UserError, match="none of the 4 checkpoints"):
                    newest_good(folder)


def test_no_readable_checkpoint(words, run_cli, refused, tmp_path):
    words = [*in_process(words), f"run_dir={tmp_path / 'run'}", "steps=4"]
    assert run_cli(*words)[0] == 0
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        path.write_bytes(b"damaged")
    assert "none of the" in refused(*words)


def test_preflight_only(words, run_cli, tmp_path):
    words = [*in_process(words), f"run_dir={tmp_path / 'run'}"]
    code, stdout, stderr = run_cli(*words, "preflight=only")
    assert code == 0, stderr
    for said in ("20 steps of 8", "a sample of train and val decodes", "different tokens in", "GB free", "32-true"):
        assert said in stdout
    assert "memory: a checkpoint is copied to 0.395 MB of" in stdout  # 32,936 parameters
    assert not (tmp_path / "run").exists()


def test_start_says_what_was_found(words, shards, run_cli, tmp_path):
    """Also that held-out images are training images."""
    words = [*in_process(words), f"run_dir={tmp_path / 'run'}", "steps=1"]
    code, stdout, stderr = run_cli(*words)
    assert code == 0, stderr
    assert f"  data.train: {shards / 'train'}: " in stdout
    assert "warning: data.val reads" not in stdout
    code, stdout, stderr = run_cli(*words, f"data.val={shards / 'train'}", "preflight=only", "resume=never")
    assert code == 0, stderr
    assert "warning: data.val reads 50 images that data.train reads too" in stdout


def test_disk_space_check(tmp_path, monkeypatch):
    assert "GB free" in check_space(tmp_path / "not" / "yet", 1000)
    with pytest.raises(UserError, match=r"3 checkpoints need 36000000\.00 GB"):
        check_space(tmp_path, 10**15)
    with pytest.raises(UserError, match=r"4 checkpoints need 64000000\.00 GB"):
        check_space(tmp_path, 10**15, states=4, best=True)
    assert "1000000 more to keep 12000.00 GB (warning" in check_space(tmp_path, 10**6, kept=10**6)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="not a writable folder"):
        check_space(tmp_path / "file", 1)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match="not a writable folder"):
        check_space(tmp_path / "not" / "yet", 1)


def test_kept_checkpoints_are_not_counted_as_freed(tmp_path, monkeypatch):
    """last, previous and best are overwritten, unless they are hard links to a kept one."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    for step in range(10):
        (tmp_path / f"step-{step:08d}.ckpt").write_bytes(bytes(10**6))
    os.link(tmp_path / "step-00000009.ckpt", tmp_path / "last.ckpt")
    (tmp_path / "mine.ckpt").write_bytes(bytes(10**7))
    with pytest.raises(UserError, match=r"has 0 MB free, 3 checkpoints need 1\.8 MB"):
        check_space(tmp_path, 50_000)
    for name in ("previous.ckpt", "best.ckpt"):
        (tmp_path / name).write_bytes(bytes(2 * 10**6))
    line = check_space(tmp_path, 50_000, kept=12)
    assert line.startswith("4 MB free")
    assert line.endswith("3 checkpoints need 1.8 MB, 2 more to keep 1.2 MB")  # ten of the twelve are there
    assert check_space(tmp_path, 50_000, kept=20).endswith("10 more to keep 6 MB (warning: more than is free)")
    assert "14 MB free" in check_space(tmp_path, 50_000, cleared=True)  # resume=never removes those, too


class Poison:
    """Makes the reduced gradients of some steps NaN."""

    def __init__(self, monkeypatch, steps):
        from beit_pretrain.engine import optim

        clip = optim.clip_gradients
        self.calls = 0

        def poisoned(parameters, limit, scale=1.0):
            parameters = list(parameters)
            if self.calls in steps:
                parameters[0].grad.fill_(float("nan"))
            self.calls += 1
            return clip(parameters, limit, scale)

        monkeypatch.setattr(optim, "clip_gradients", poisoned)


def test_nonfinite_gradient_skips_step(words, run_cli, tmp_path, monkeypatch):
    """Weights, moments and step counts equal those of a run without the update; the schedule continues."""
    words = [*in_process(words), "steps=10"]
    with monkeypatch.context() as patch:
        Poison(patch, {7})
        code, stdout, stderr = run_cli(*words, f"run_dir={tmp_path / 'nan'}")
    assert code == 0, stderr
    assert "1 update was skipped" in stderr
    assert '{"step": 8, "positions": [56, 63]}' in (tmp_path / "nan" / "skipped.jsonl").read_text()
    rows = read_rows(tmp_path / "nan" / "metrics.csv")[1]
    assert [rows[step]["train/skipped"] for step in range(1, 11)] == [0] * 7 + [1, 0, 0]
    assert all(torch.isfinite(torch.tensor(row["train/loss"])) for row in rows.values() if "train/loss" in row)

    def leave_out(self, norm, optimizer, step):
        optimizer.found_inf = torch.tensor(float(step == 7))
        return torch.tensor(int(step == 7))

    with monkeypatch.context() as patch:
        patch.setattr(NonFiniteGuard, "check", leave_out)
        assert run_cli(*words, f"run_dir={tmp_path / 'left out'}")[0] == 0
    one, other = (torch.load(tmp_path / n / "checkpoints/last.ckpt", weights_only=True) for n in ("nan", "left out"))
    for name, tensor in one["state_dict"].items():
        assert torch.equal(tensor, other["state_dict"][name])
    assert {float(entry["step"]) for entry in one["optimizer_states"][0]["state"].values()} == {9.0}


def test_persistent_nan_stops_run(words, run_cli, tmp_path, monkeypatch):
    words = [*in_process(words), f"run_dir={tmp_path / 'run'}", "steps=20", "max_nonfinite_steps=3"]
    with monkeypatch.context() as patch:
        Poison(patch, set(range(6, 100)))
        code, _, stderr = run_cli(*words)
    assert code == 2
    assert "3 steps in a row had no finite gradient" in stderr
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert all(tensor.isfinite().all() for tensor in saved["state_dict"].values())
    assert saved["global_step"] <= 8
    assert len((tmp_path / "run" / "skipped.jsonl").read_text().splitlines()) >= 3
    code, stdout, stderr = run_cli(*words)  # resumes once the cause is fixed
    assert code == 0, stderr


class TestWarnings:
    def test_loss_spike(self):
        guard = NonFiniteGuard(None, 5, 8)
        for i in range(10):
            assert guard.warnings({"train/loss": 6.0 - 0.01 * i}, None) == []
        (line,) = guard.warnings({"train/loss": 8.0}, None)
        assert "jumps to 8, from about 5.9" in line

    def test_noisy_loss_is_no_spike(self):
        guard, rng = NonFiniteGuard(None, 5, 8), random.Random(0)
        assert not [w for _ in range(500) for w in guard.warnings({"train/loss": 6 + rng.gauss(0, 0.1)}, None)]

    def test_codebook_collapse(self):
        guard = NonFiniteGuard(None, 5, 8)
        assert guard.warnings({"train/codebook_perplexity": 900.0}, 8192) == []
        for _ in range(2):
            (line,) = guard.warnings({"train/codebook_perplexity": 20.0}, 8192)
            assert "20 of 8192 tokens" in line
            assert guard.warnings({"train/codebook_perplexity": 21.0}, 8192) == []  # warns once ...
            assert guard.warnings({"train/codebook_perplexity": 900.0}, 8192) == []  # ... until it recovers
