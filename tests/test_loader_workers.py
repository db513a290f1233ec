"""Loader workers ignore signals to the process group; a killed worker is reported in one line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from beit_pretrain.data.loader_workers import worker_died

LOADER = """
import os, signal, sys
from torch.utils.data import DataLoader
from beit_pretrain.data.loader_workers import begin_worker
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    signal.signal(number, lambda *_: None)
loader = DataLoader(range(40), batch_size=None, num_workers=1, worker_init_fn=begin_worker)
found = []
for number in loader:
    found.append(number)
    if number in (5, 10, 15):
        os.killpg(0, {5: signal.SIGTERM, 10: signal.SIGUSR1, 15: signal.SIGINT}[number])
assert found == list(range(40))
iterator = iter(loader)
next(iterator)
print("done", flush=True)
sys.exit(3)  # with a worker that is still at work
"""


def test_workers_ignore_group_signals():
    done = subprocess.run(
        [sys.executable, "-c", LOADER], start_new_session=True, capture_output=True, text=True, timeout=100,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (3, "done\n", "")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("DataLoader worker (pid 12) is killed by signal: Killed. ", "loader worker 12 was killed (Killed)"),
        ("DataLoader worker (pid(s) 12, 13) exited unexpectedly", "loader worker 12, 13 ended"),
        ("DataLoader timed out after 1800.0 seconds", "gave no batch for 30 minutes (timeout_minutes)"),
        ("DataLoader worker (pid 12) exited unexpectedly with exit code 1.", "loader worker 12 ended"),
    ],
)
def test_killed_worker_is_reported(text, said):
    assert said in str(worker_died(RuntimeError(text)))


def test_other_errors_are_not_explained():
    assert worker_died(RuntimeError("shapes differ")) is None
