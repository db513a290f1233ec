"""How a step is executed, which changes none of its numbers beyond rounding: compiled, deterministic, profiled."""

from __future__ import annotations

import gzip
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from torch.autograd import DeviceType

WARM_UP, PROFILED = 10, 5  # steps before a profile (compilation, first allocations), and in it
DEAREST = 10  # operations of the table


def compile_mode(asked: bool | str, on_gpu: bool, sharded: bool) -> str | None:
    """The mode of torch.compile for `compile=`; None = not at all.

    "auto" compiles on a GPU, where a network is whole (FSDP gathers its pieces by hooks, at which a graph breaks), and
    goes on uncompiled if that fails; any other value says by itself what is to be done.
    """
    if asked == "auto":
        if not on_gpu or sharded:
            return None
        torch._dynamo.config.suppress_errors = True
        return "default"
    if isinstance(asked, bool):
        return "default" if asked else None
    return asked


class Profile(Callback):
    """`profile=true`: a trace of a few steps, for Perfetto or chrome://tracing, and a table of the dearest operations.

    Args:
        folder: gets `trace.json.gz` and `kernels.txt`.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._profiler: torch.profiler.profile | None = None
        self._written = False

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        if not trainer.is_global_zero:
            return
        if (left := trainer.max_steps - trainer.global_step) < WARM_UP + PROFILED:
            too_short(left)
            return
        kinds = [torch.profiler.ProfilerActivity.CPU]
        kinds += [torch.profiler.ProfilerActivity.CUDA] if pl_module.device.type == "cuda" else []
        self._profiler = torch.profiler.profile(
            activities=kinds,
            schedule=torch.profiler.schedule(wait=WARM_UP - 1, warmup=1, active=PROFILED, repeat=1),
            on_trace_ready=self._write,
        )
        self._profiler.start()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs, batch, batch_idx: int) -> None:
        if self._profiler is not None and (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._profiler.step()

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        if self._profiler is not None:
            self._profiler.stop()
            if not self._written:
                too_short(self._profiler.step_num)
            self._profiler = None

    def _write(self, profiler: torch.profiler.profile) -> None:
        if profiler.step_num < WARM_UP + PROFILED:  # stopped in the middle: the figures a step would be wrong
            return
        self._written = True
        self.folder.mkdir(parents=True, exist_ok=True)
        plain, trace = self.folder / ".trace.partial", self.folder / "trace.json.gz"
        profiler.export_chrome_trace(str(plain))
        with plain.open("rb") as source, gzip.open(trace, "wb", compresslevel=5) as target:
            shutil.copyfileobj(source, target)
        plain.unlink()
        table = kernels(profiler.key_averages(), DEAREST)
        (self.folder / "kernels.txt").write_text(table + "\n")
        print(f"\n{table}\nwrote {trace}", flush=True)


def too_short(steps: int) -> None:
    """Say why there is no profile."""
    said = f"warning: profile=true needs {WARM_UP + PROFILED} steps; of {steps} there is no profile"
    print(said, file=sys.stderr, flush=True)


def kernels(events: Iterable[Any], count: int) -> str:
    """The dearest operations by the time in themselves: share, milliseconds, calls.

    On a GPU they are its kernels and copies alone: torch gives the operators that start them the same time once more.
    Named regions (a step, the optimiser, waiting for data) are no operations.
    """
    own = [event for event in events if not event.is_user_annotation and not event.key.startswith("ProfilerStep")]
    on_gpu = [event for event in own if event.device_type == DeviceType.CUDA]
    where = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    found = [(getattr(event, where), event) for event in on_gpu or own]
    total = sum(time for time, _ in found) or 1
    lines = [f"{'share':>6}  {'ms a step':>9}  {'calls':>6}  operation"]
    for time, event in sorted(found, key=lambda pair: -pair[0])[:count]:
        calls = event.count / PROFILED
        lines.append(f"{time / total:6.1%}  {time / 1000 / PROFILED:9.2f}  {calls:6.4g}  {event.key[:80]}")
    return "\n".join(lines)
