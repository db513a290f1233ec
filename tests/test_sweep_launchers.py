"""Launching the runs of a sweep: parallel limit, failures, signals, GPUs, submitit settings."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

import pytest

from beit_pretrain.engine.preemption import PREEMPTED
from beit_pretrain.engine.sweep_launchers import Process, launcher, member_environment, run_all, shared_gpus
from beit_pretrain.errors import UserError


class Timed:
    """A run that lasts for a number of polls."""

    running = most = 0

    def __init__(self, polls: int, code: int):
        self.polls, self.code = polls, code
        Timed.running += 1
        Timed.most = max(Timed.most, Timed.running)

    def poll(self) -> int | None:
        self.polls -= 1
        if self.polls >= 0:
            return None
        Timed.running -= 1
        return self.code

    def stop(self, number: int) -> None:
        raise AssertionError


def test_parallel_limit_and_failures_do_not_stop_others():
    slots = []

    def start(number: int, slot: int) -> Timed:
        slots.append(slot)
        return Timed(number % 3, 3 if number == 1 else 0)

    assert run_all(list("abcdef"), start, 2) == [0, 3, 0, 0, 0, 0]
    assert Timed.most == 2
    assert set(slots) == {0, 1}


def sleeper(monkeypatch, tmp_path, said: str):
    """A run with a child process; both write down the signal they get."""
    code = (
        "import os, signal, sys, time\n"
        f"signal.signal(signal.{said}, lambda *_: (open('told', 'a').write('x'), sys.exit(0)))\n"
        "os.fork()\nopen('ready', 'a').write('x')\ntime.sleep(60)"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("beit_pretrain.engine.sweep_launchers.command", lambda words: [sys.executable, "-c", code])
    return Process([], tmp_path / "log", None)


@pytest.mark.parametrize(
    ("sent", "received", "ends"), [("SIGINT", "SIGINT", KeyboardInterrupt), ("SIGTERM", "SIGTERM", SystemExit)]
)
def test_signals_reach_runs_and_their_children(sent, received, ends, monkeypatch, tmp_path, request):
    process = sleeper(monkeypatch, tmp_path, received)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))

    def send() -> None:
        while not (tmp_path / "ready").exists() or (tmp_path / "ready").stat().st_size < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), getattr(signal, sent))

    threading.Thread(target=send).start()
    with pytest.raises(ends) as caught:
        run_all(["a"], lambda number, slot: process, 1)
    if ends is SystemExit:
        assert caught.value.code == PREEMPTED
    deadline = time.monotonic() + 5
    while (tmp_path / "told").stat().st_size < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert (tmp_path / "told").read_text() == "xx"
    assert process.poll() == 0


def test_killed_run_has_shell_exit_code(monkeypatch, tmp_path):
    process = sleeper(monkeypatch, tmp_path, "SIGINT")
    process.stop(signal.SIGKILL)
    process.process.wait()
    assert process.poll() == 137


def test_gpus_are_split_among_runs(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    assert shared_gpus(1) is None
    assert shared_gpus(2) == ["0,1", "2,3"]
    assert shared_gpus(6) == ["0", "1", "2", "3", "0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert shared_gpus(2) is None


def test_run_does_not_inherit_launcher_variables(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert not {"LOCAL_RANK", "TORCHELASTIC_RUN_ID"} & set(member_environment())
    assert member_environment("1,2")["CUDA_VISIBLE_DEVICES"] == "1,2"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["hydra/launcher=joblib"], "is not one of basic"),
        (["hydra.launcher.partition=a"], "needs hydra/launcher=submitit_slurm"),
        (["hydra/launcher=submitit_local", "hydra.launcher.partition=a"], "partition"),
        (["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=soon"], "soon"),
        (["hydra/launcher=submitit_local", "hydra.launcher.tasks_per_node=2"], "trainer.devices=N"),
        (["hydra/launcher=submitit_slurm"], "slurm"),  # there is none here
    ],
)
def test_invalid_launchers(words, said, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=said):
        launcher(words, tmp_path, 1, [])
