"""Loader workers: what they do with signals, and what is said when one of them dies."""

from __future__ import annotations

import atexit
import multiprocessing
import re
import signal

from beit_pretrain.errors import UserError
from beit_pretrain.processes import end_with_parent


def begin_worker(worker: int = 0) -> None:
    """`DataLoader(worker_init_fn=)`: a worker ends with its parent, and by nothing else.

    A signal often reaches the whole group of processes, as Ctrl-C and schedulers send it; the run then finishes its
    step, which may need the worker's batches.
    """
    end_with_parent(worker)
    for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(signum, signal.SIG_IGN)


@atexit.register
def end_workers() -> None:
    """Kill the workers that are left at the end: Python would wait for them after a SIGTERM, which they ignore."""
    left = [process for process in multiprocessing.active_children() if process.daemon]
    if left:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would call it an error
    for process in left:
        process.kill()


def worker_died(error: BaseException) -> UserError | None:
    """What to tell about an error of torch's loader: a worker has died, or gives no batch; None for other errors."""
    if silent := re.search(r"DataLoader timed out after ([\d.]+) seconds", str(error)):
        return UserError(
            f"the loader workers gave no batch for {float(silent[1]) / 60:g} minutes (timeout_minutes); the same "
            "command goes on from the last checkpoint"
        )
    found = re.search(r"DataLoader worker \(pid\(?s?\)? ([\d, ]+)\) (?:is killed by signal: (\w+)|exited)", str(error))
    if found is None:
        return None
    how = f"was killed ({found[2]})" if found[2] else "ended"
    return UserError(
        f"loader worker {found[1]} {how}, as systems do that are out of memory; the same command goes on from the last "
        "checkpoint, with fewer data.num_workers perhaps"
    )
