"""The stage `facts`: what the machine is, and what its parts can do at best."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from beit_pretrain.benchmarks.gpu.report import Report
from beit_pretrain.benchmarks.gpu.setup import Setup

PACKAGES = (
    *("torch", "triton", "torchvision", "lightning", "timm", "transformers", "hydra-core", "omegaconf", "dall-e"),
    *("numpy", "pillow", "simplejpeg", "safetensors", "nvidia-cudnn-cu13", "nvidia-cublas"),
)
NVIDIA_SMI = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu,utilization.gpu"


def facts(setup: Setup, report: Report) -> None:
    """Versions, the device, bandwidth of copies, peak of matrix products."""
    report(versions=versions(), machine=machine(setup))
    device = torch.device(setup.device)
    if device.type == "cuda":
        report(gpu=gpu())
    with report.part("bandwidth"):
        report(bandwidth=bandwidth(device, setup.sizes.copied))
    for name, dtype, tf32 in (
        ("bf16", torch.bfloat16, False),
        ("fp16", torch.float16, False),
        ("tf32", torch.float32, True),
        ("fp32", torch.float32, False),
    ):
        if device.type == "cuda" or name in ("bf16", "fp32"):
            with report.part(f"products in {name}"), allowing_tf32(tf32):
                report(flops={name: products(device, dtype, setup.sizes.side)})


def versions() -> dict[str, str]:
    """Of Python, the driver's side of CUDA and the packages that there are."""
    found = {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    if torch.backends.cudnn.is_available():
        found["cudnn"] = str(torch.backends.cudnn.version())
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine(setup: Setup) -> dict[str, Any]:
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "processor": platform.machine(),
        "system": platform.release(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": pages,
        "scratch_free_bytes": shutil.disk_usage(setup.scratch).free,
        "shared_memory_bytes": shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else None,
    }


def gpu() -> dict[str, Any]:
    """Name, size and present state of the GPU."""
    properties = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info()
    found: dict[str, Any] = {
        "name": properties.name,
        "capability": list(torch.cuda.get_device_capability()),
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": total,
        "memory_free_bytes": free,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "bf16": torch.cuda.is_bf16_supported(),
    }
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", f"--query-gpu={NVIDIA_SMI}", "--format=csv,noheader"]
        try:
            said = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
            found["nvidia_smi"] = dict(zip(NVIDIA_SMI.split(","), said.splitlines()[0].split(", ")))
        except (OSError, subprocess.SubprocessError, IndexError) as error:
            found["nvidia_smi"] = f"{type(error).__name__}"
    return found


def bandwidth(device: torch.device, size: int) -> dict[str, float]:
    """Bytes a second: of a copy on the device (read and written), to the device and back from pinned memory."""
    source = torch.empty(size, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    found = {"copy": 2 * size / best_seconds(lambda: target.copy_(source), device)}
    if device.type == "cuda":
        host = torch.empty(size // 4, dtype=torch.uint8, pin_memory=True).fill_(1)
        part = target[: size // 4]
        found["to_device"] = size / 4 / best_seconds(lambda: part.copy_(host, non_blocking=True), device)
        found["from_device"] = size / 4 / best_seconds(lambda: host.copy_(part, non_blocking=True), device)
    return found


def products(device: torch.device, dtype: torch.dtype, side: int) -> dict[str, float]:
    """FLOP/s of products of square matrices: the best, and the mean over half a second, when a GPU's clock has fallen.

    Of random numbers: on zeros a GPU is faster.
    """
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    best = best_seconds(lambda: torch.mm(a, b, out=out), device)
    repeats = max(3, min(500, int(0.5 / best)))
    together = best_seconds(lambda: [torch.mm(a, b, out=out) for _ in range(repeats)], device, samples=1)
    return {"best": 2 * side**3 / best, "sustained": 2 * side**3 * repeats / together}


@contextmanager
def allowing_tf32(allowed: bool) -> Iterator[None]:
    """Products and convolutions of float32 as TF32, or in full (torch's own choice is TF32 for convolutions alone)."""
    products, convolutions = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    unset = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = products, convolutions
        # "none" once more: compiled code is looked up in the cache by this word.
        torch.backends.cuda.matmul.fp32_precision = unset


def best_seconds(work: Callable[[], object], device: torch.device, samples: int = 10) -> float:
    """The least seconds of some calls, each waited for; by CUDA events on a GPU."""
    if device.type == "cuda":
        from beit_pretrain.benchmarks.timing import event_seconds

        for _ in range(2 if samples > 1 else 0):
            work()
        torch.cuda.synchronize()
        return min(event_seconds(work) for _ in range(samples))
    found = []
    for _ in range(samples):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found)
