"""Starts and watches the processes of a run without an external launcher (`trainer.devices=8`); DDP and FSDP.

If a child process fails, Lightning's watcher kills the main process at once, without a message. This launcher gives the
main process some seconds to report its own error. If it hangs in a collective with the failed process, the launcher
prints a one-line error and ends it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any, cast

from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

PATIENCE = 15.0  # seconds for the main process to report its own error


class SubprocessLauncher(_SubprocessScriptLauncher):
    """Starts the other processes of this machine, and watches them until `leaving` is set."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.children: list[subprocess.Popen] = []
        self.leaving = threading.Event()

    def _call_children_scripts(self) -> None:
        super()._call_children_scripts()
        self.children, self.procs = self.procs, []  # disables Lightning's watcher
        threading.Thread(target=self._watch, daemon=True, name="children").start()

    def kill(self, signum: int) -> None:
        for process in self.children:
            if process.poll() is None:
                process.send_signal(signum)

    def _watch(self) -> None:
        failed: list[tuple[int, int]] = []  # local rank and exit code
        while not failed:
            codes = [process.poll() for process in self.children]
            failed = [(rank, code) for rank, code in enumerate(codes, start=1) if code]
            if not failed and (codes == [0] * len(codes) or self.leaving.wait(0.5)):
                return
        if self.leaving.wait(PATIENCE):
            return
        rank, code = failed[0]
        how = f"was killed ({signal.Signals(-code).name})" if code < 0 else f"ended with exit code {code}"
        print(
            f"\nerror: process {rank} of the run {how}; the others are ended. Rerun the same command to resume from "
            "the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        self.kill(signal.SIGKILL)
        os._exit(2)

    def end(self, seconds: float = 1, signum: int | None = None) -> None:
        """End the children when the main process exits: send them `signum`, and kill them after `seconds`."""
        self.leaving.set()
        if signum is not None:
            self.kill(signum)
        deadline = time.monotonic() + seconds
        while any(process.poll() is None for process in self.children) and time.monotonic() < deadline:
            time.sleep(0.05)
        self.kill(signal.SIGKILL)


class _StartsChildren:
    """Mixin for a strategy that uses `SubprocessLauncher`."""

    _launcher: Any

    def _configure_launcher(self) -> None:
        super()._configure_launcher()  # type: ignore[misc]
        if type(launcher := self._launcher) is _SubprocessScriptLauncher:
            self._launcher = SubprocessLauncher(
                launcher.cluster_environment, launcher.num_processes, launcher.num_nodes
            )


class DDP(_StartsChildren, DDPStrategy):
    """Lightning's DDPStrategy with gradients as views of the all-reduce buckets, which saves a copy.

    `compression`: "bf16" = all-reduce gradients in bf16, which halves the traffic; None = as they are.
    """

    def __init__(self, compression: str | None = None, **settings: Any):
        super().__init__(gradient_as_bucket_view=True, **settings)
        self._compression = compression

    def configure_ddp(self) -> None:
        assert self.model is not None
        self._ddp_kwargs["broadcast_buffers"] = has_local_statistics(self.model)
        super().configure_ddp()
        if self._compression == "bf16":  # Lightning's argument for it has no effect on CPUs
            cast(DistributedDataParallel, self.model).register_comm_hook(None, bf16_compress_hook)


def has_local_statistics(model: nn.Module) -> bool:
    """Whether a network has batch norms with statistics per process; DDP then broadcasts those of rank 0.

    All other buffers are constant tables, equal on all processes, and need no broadcast at each step.
    """
    return any(isinstance(m, _BatchNorm) and not isinstance(m, nn.SyncBatchNorm) for m in model.modules())


class FSDP(_StartsChildren, ModelParallelStrategy):
    """Shards parameters, gradients and optimiser state over the processes."""
