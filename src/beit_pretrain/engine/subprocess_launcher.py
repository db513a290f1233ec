"""Processes that a run starts itself (`trainer.devices=8` without a launcher), and what happens when one of them fails.

Lightning's own watcher kills the first process too, without a word and whatever it is about to say. Here the first one
has a while for an error of its own; if it hangs in an exchange with the one that is gone, it is ended with a line.
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

PATIENCE = 15.0  # seconds that the first process has for an error of its own


class SubprocessLauncher(_SubprocessScriptLauncher):
    """Starts the other processes of a machine, and watches them until `leaving` is set."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.children: list[subprocess.Popen] = []
        self.leaving = threading.Event()

    def _call_children_scripts(self) -> None:
        super()._call_children_scripts()
        self.children, self.procs = self.procs, []  # Lightning's watcher has nothing to watch
        threading.Thread(target=self._watch, daemon=True, name="children").start()

    def kill(self, signum: int) -> None:
        for process in self.children:
            if process.poll() is None:
                process.send_signal(signum)

    def _watch(self) -> None:
        while not (failed := self._failed()):
            if all(process.poll() == 0 for process in self.children) or self.leaving.wait(0.5):
                return
        if self.leaving.wait(PATIENCE):
            return
        rank, code = failed
        how = f"was killed ({signal.Signals(-code).name})" if code < 0 else f"ended with exit code {code}"
        print(
            f"\nerror: process {rank} of the run {how}; the others are ended. The same command goes on from the last "
            "checkpoint",
            file=sys.stderr,
            flush=True,
        )
        self.kill(signal.SIGKILL)
        os._exit(2)

    def _failed(self) -> tuple[int, int] | None:
        """Local rank and exit code of the first process that failed."""
        ended = ((rank, process.poll()) for rank, process in enumerate(self.children, start=1))
        return next(((rank, code) for rank, code in ended if code), None)

    def forward_signal(self) -> None:
        """Tell the others to stop, when the first process was told alone, and see to it that they do."""
        self.leaving.set()
        self.kill(signal.SIGTERM)  # who is leaving already ignores it
        self._end_after(10)

    def end(self) -> None:
        """Stop watching and end the others, when the first process leaves with an error."""
        self.leaving.set()
        self._end_after(1)  # who has an error to tell has told it

    def _end_after(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while any(process.poll() is None for process in self.children) and time.monotonic() < deadline:
            time.sleep(0.05)
        self.kill(signal.SIGKILL)


class _StartsChildren:
    """A strategy whose launcher is `Children`."""

    _launcher: Any

    def _configure_launcher(self) -> None:
        super()._configure_launcher()  # type: ignore[misc]
        if type(its := self._launcher) is _SubprocessScriptLauncher:
            self._launcher = SubprocessLauncher(its.cluster_environment, its.num_processes, its.num_nodes)


class DDP(_StartsChildren, DDPStrategy):
    """Every process has the whole network. Gradients are views of the buckets that are summed, which spares a copy.

    Args:
        compression: "bf16" = gradients are rounded to it before they are summed, which halves what is sent.
        settings: of Lightning's DDPStrategy.
    """

    def __init__(self, compression: str | None = None, **settings: Any):
        super().__init__(gradient_as_bucket_view=True, **settings)
        self._compression = compression

    def configure_ddp(self) -> None:
        assert self.model is not None
        self._ddp_kwargs["broadcast_buffers"] = has_local_statistics(self.model)
        super().configure_ddp()
        if self._compression == "bf16":  # Lightning's own argument does nothing on CPUs
            cast(DistributedDataParallel, self.model).register_comm_hook(None, bf16_compress_hook)


def has_local_statistics(model: nn.Module) -> bool:
    """Whether a network has batch norms that count on each process alone; those of the first process are then used.

    All other buffers are tables that are the same everywhere: they need not be sent at every step.
    """
    return any(isinstance(m, _BatchNorm) and not isinstance(m, nn.SyncBatchNorm) for m in model.modules())


class FSDP(_StartsChildren, ModelParallelStrategy):
    """Network, gradients and optimiser are cut over the processes."""
