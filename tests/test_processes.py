"""Loader workers exit with their parent, even while blocked on a full pipe."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

PARENT = """
import os, sys
import numpy as np
from torch.utils.data import DataLoader, Dataset
from beit_pretrain.processes import end_with_parent

class Large(Dataset):
    def __getitem__(self, number):
        return np.full(1 << 20, os.getpid())  # 8 MB, through the pipe

loader = DataLoader(Large(), batch_size=None, sampler=range(99), num_workers=2, collate_fn=lambda item: item,
                    worker_init_fn=end_with_parent)
batches = iter(loader)
print(next(batches)[0], next(batches)[0], flush=True)
sys.stdin.read()
"""


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs forked workers")
def test_workers_exit_if_parent_is_killed():
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    num_workers = [int(word) for word in parent.stdout.readline().split()]
    assert len(set(num_workers)) == 2
    time.sleep(1)  # both now wait with the next batch, which the pipe does not hold
    assert all(map(alive, num_workers))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    ends = time.monotonic() + 60
    while any(map(alive, num_workers)) and time.monotonic() < ends:
        time.sleep(0.2)
    assert not any(map(alive, num_workers))
