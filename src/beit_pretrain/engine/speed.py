"""How a step is executed: torch.compile, determinism, attention kernel, profiling. Results change by rounding only."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from torch import nn
from torch.autograd import DeviceType

from beit_pretrain.errors import UserError
from beit_pretrain.models.blocks import attentions

WARM_UP, PROFILED = 10, 5  # steps before the profile (compilation, first allocations); steps in the profile
SLOWEST = 10  # rows in the table of the slowest operations


CUDA_GRAPHS = ("reduce-overhead", "max-autotune")  # modes of torch.compile that record CUDA graphs


def check_cuda_graphs(asked: bool | str, micro_batches: int, device_prefetch: bool, sharded: bool = False) -> None:
    """Raise UserError if CUDA graphs would give errors or wrong gradients.

    A graph writes to the same memory at each replay. That overwrites results of the previous micro-batch that gradient
    accumulation still needs (pytorch#169545, pytorch#96693), and conflicts with batches prepared on another stream. It
    also reads parameters at fixed addresses, and FSDP (`sharded`) moves them.
    """
    if asked not in CUDA_GRAPHS:
        return
    if micro_batches > 1:
        raise UserError(
            f"compile={asked} records CUDA graphs, which gradient accumulation ({micro_batches} micro-batches a step) "
            "breaks: make batch_size larger, or take compile=default"
        )
    if device_prefetch:
        raise UserError(f"compile={asked} records CUDA graphs, which device_prefetch=true breaks: change one of them")
    if sharded:
        raise UserError(f"compile={asked} records CUDA graphs, which trainer.strategy=fsdp breaks: take compile=false")


def make_deterministic(on_gpu: bool, impossible: str = "") -> None:
    """`deterministic=true`: bit-identical runs on one kind of GPU, but slower. Call before the first kernel.

    Without it, atomic additions (gradients of queries, mask token and bias tables) sum in a random order. Raises
    UserError on a GPU if the task uses an operation without a deterministic form (`impossible`: its name).
    """
    import torch._inductor.config

    if on_gpu and impossible:
        raise UserError(f"deterministic=true: torch has no deterministic form of {impossible} on a GPU")
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # required by cuBLAS
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined] # fills cost bandwidth
    torch.backends.cudnn.benchmark = False
    torch._inductor.config.deterministic = True  # do not choose block sizes by timing


def compile_mode(asked: bool | str, on_gpu: bool, sharded: bool) -> str | None:
    """The mode of torch.compile for the setting `compile`; None = no compilation.

    "auto" compiles on a GPU, except with FSDP (`sharded`), whose hooks break the graph, and falls back to eager
    execution if compilation fails.
    """
    if asked == "auto":
        if not on_gpu or sharded:
            return None
        torch._dynamo.config.suppress_errors = True
        return "default"
    if isinstance(asked, bool):
        return "default" if asked else None
    return asked


# Compute capability -> the kernel that was faster in a measurement (docs/performance.md).
# Empty: no GPU has been measured yet, so `attention=auto` means sdpa everywhere.
FASTEST_ATTENTION: dict[tuple[int, int], str] = {}


def attention_kernel(asked: str, on_gpu: bool, precision: str | int | None, widths: Collection[int]) -> str:
    """Resolve the setting `attention` for heads of these widths: "sdpa" (torch's kernels) or "triton" (this package's).

    Raises UserError if "triton" is requested and cannot run.
    """
    if asked == "auto":
        fastest = FASTEST_ATTENTION.get(torch.cuda.get_device_capability(), "sdpa") if on_gpu else "sdpa"
        return "sdpa" if fastest == "sdpa" or without_triton(on_gpu, precision, widths) else fastest
    if asked == "triton" and (reason := without_triton(on_gpu, precision, widths)):
        raise UserError(f"attention=triton {reason}; attention=sdpa runs everywhere")
    return asked


def set_attention(network: nn.Module, asked: str, on_gpu: bool, precision: str | int | None) -> None:
    """Set the attention kernel of every block. Raises UserError if "triton" is requested and cannot run."""
    layers = attentions(network)
    kernel = attention_kernel(asked, on_gpu, precision, {layer.width for layer in layers})
    for layer in layers:
        layer.kernel = kernel


def without_triton(on_gpu: bool, precision: str | int | None, widths: Collection[int]) -> str:
    """The reason why the Triton kernels cannot run; "" if they can. Tests run them on a CPU in Triton's interpreter."""
    if find_spec("triton") is None:
        return "needs the package triton, which is not installed"
    if not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
        return "needs a GPU of CUDA, and this run has none"
    if str(precision).startswith("64"):
        return f"does not take trainer.precision={precision}"
    from beit_pretrain.models.triton_attention import WIDTHS  # imports Triton

    if other := set(widths) - set(WIDTHS):
        return f"takes heads of width {', '.join(map(str, WIDTHS))}, and this network's are {min(other)} wide"
    return ""


class Profile(Callback):
    """`profile=true`: writes a trace of a few steps and a table of the slowest operations.

    `folder` gets `trace.json.gz` (for Perfetto or chrome://tracing) and `kernels.txt`.
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
        if profiler.step_num < WARM_UP + PROFILED:  # stopped early: the averages per step would be wrong
            return
        self._written = True
        self.folder.mkdir(parents=True, exist_ok=True)
        trace = self.folder / "trace.json.gz"
        profiler.export_chrome_trace(str(trace))  # compressed, by its name
        table = kernels(profiler.key_averages(), SLOWEST)
        (self.folder / "kernels.txt").write_text(table + "\n")
        print(f"\n{table}\nwrote {trace}", flush=True)


def too_short(steps: int) -> None:
    """Warn that the run is too short for a profile."""
    message = f"warning: profile=true needs {WARM_UP + PROFILED} steps, got {steps}: no profile is written"
    print(message, file=sys.stderr, flush=True)


def kernels(events: Iterable[Any], count: int) -> str:
    """Table of the `count` slowest operations by self time: share, milliseconds and calls per step.

    On a GPU only kernels and copies are listed, since torch attributes their time to the launching operators as well.
    Named regions (a step, the optimiser, waiting for data) are left out.
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
