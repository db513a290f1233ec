"""Loader workers: signal handling, and the error message when one of them dies."""

from __future__ import annotations

import atexit
import multiprocessing
import re
import signal

from beit_pretrain.errors import UserError
from beit_pretrain.processes import end_with_parent


def begin_worker(worker: int = 0) -> None:
    """`DataLoader(worker_init_fn=)`: make a worker end with its parent and ignore signals.

    Ctrl-C and schedulers often signal the whole process group. The run then finishes its step, which may need the
    workers' batches.
    """
    end_with_parent(worker)
    for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(signum, signal.SIG_IGN)


@atexit.register
def end_workers() -> None:
    """Kill remaining workers at exit: Python would send SIGTERM, which they ignore, and wait for ever."""
    left = [process for process in multiprocessing.active_children() if process.daemon]
    if left:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report an error
    for process in left:
        process.kill()


def worker_died(error: BaseException) -> UserError | None:
    """The user error for a loader worker that died or gives no batch; None for other errors."""
    if silent := re.search(r"DataLoader timed out after ([\d.]+) seconds", str(error)):
        return UserError(
            f"the loader workers gave no batch for {float(silent[1]) / 60:g} minutes (timeout_minutes); rerun the same "
            "command to resume from the last checkpoint"
        )
    found = re.search(r"DataLoader worker \(pid\(?s?\)? ([\d, ]+)\) (?:is killed by signal: (\w+)|exited)", str(error))
    if found is None:
        return None
    how = f"was killed ({found[2]})" if found[2] else "ended"
    return UserError(
        f"loader worker {found[1]} {how}, perhaps for lack of memory; rerun the same command to resume from the last "
        "checkpoint, if need be with fewer data.num_workers"
    )
