"""The stage `facts`: a description of the machine, its memory bandwidth and its matrix-product peak."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from beit_pretrain.benchmarks.blocks import shown
from beit_pretrain.benchmarks.gpu.plan import Setup
from beit_pretrain.benchmarks.measure import matmul_rate, seconds_of
from beit_pretrain.benchmarks.report import Report
from beit_pretrain.processes import cores

PACKAGES = (
    *("torch", "triton", "torchvision", "lightning", "timm", "transformers", "hydra-core", "omegaconf", "dall-e"),
    *("numpy", "pillow", "simplejpeg", "safetensors", "nvidia-cudnn-cu13", "nvidia-cublas"),
)
NVIDIA_SMI = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu,utilization.gpu"
SUSTAINED = 0.5  # seconds of products, in which a GPU's clock falls
KINDS = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}


def facts(setup: Setup, report: Report) -> None:
    """Versions, the device, bandwidth of copies, peak of matrix products."""
    device, sizes = torch.device(setup.device), setup.sizes
    report(versions=versions(), machine=machine(setup))
    if device.type == "cuda":
        report(gpu=gpu())
    with report.part("bandwidth"):
        report(bandwidth=bandwidth(device, sizes.copied))
    for name, dtype in KINDS.items():
        if device.type == "cuda" or name in ("bf16", "fp32"):
            with report.part(f"products in {name}"), allowing_tf32(name == "tf32"):
                report(flops={name: {"best": matmul_rate(device, dtype, sizes.side)}})
                report(flops={name: {"sustained": matmul_rate(device, dtype, sizes.side, seconds=SUSTAINED)}})
    best = [f"{name} {shown(each.get('best'))}" for name, each in report.found.get("flops", {}).items()]
    report.write(headline=f"FLOP/s: {', '.join(best)}; bytes/s: {shown(report.found.get('bandwidth', {}))}")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    found["cudnn"] = str(torch.backends.cudnn.version())
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def machine(setup: Setup) -> dict[str, Any]:
    return {
        "processor": platform.machine(),
        "system": platform.release(),
        "cores": cores(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "scratch_free_bytes": shutil.disk_usage(setup.scratch).free,
        "shared_memory_bytes": shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else None,
    }


def gpu() -> dict[str, Any]:
    """Name, size and present state of the GPU."""
    properties = torch.cuda.get_device_properties(0)
    names = ("name", "major", "minor", "multi_processor_count", "total_memory", "L2_cache_size")
    found = {name: getattr(properties, name, None) for name in names}
    found |= {"memory_free_bytes": torch.cuda.mem_get_info()[0], "bf16": torch.cuda.is_bf16_supported()}
    query = ["nvidia-smi", f"--query-gpu={NVIDIA_SMI}", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
        found["nvidia_smi"] = dict(zip(NVIDIA_SMI.split(","), said.splitlines()[0].split(", ")))
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        found["nvidia_smi"] = type(error).__name__
    return found


def bandwidth(device: torch.device, size: int) -> dict[str, float]:
    """Bytes a second: of a copy on the device (read and written), to the device and back from pinned memory."""
    source = torch.empty(size, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)

    def best(work: Callable[[], object]) -> float:
        return min(seconds_of(work, device) for _ in range(12))

    found = {"copy": 2 * size / best(lambda: target.copy_(source))}
    if device.type == "cuda":
        host = torch.empty(size // 4, dtype=torch.uint8, pin_memory=True).fill_(1)
        part = target[: size // 4]
        found["to_device"] = size / 4 / best(lambda: part.copy_(host, non_blocking=True))
        found["from_device"] = size / 4 / best(lambda: host.copy_(part, non_blocking=True))
    return found


@contextmanager
def allowing_tf32(allowed: bool) -> Iterator[None]:
    """Run float32 products and convolutions as TF32, or in full precision (torch's default: TF32 for convolutions)."""
    products, convolutions = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    unset = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = products, convolutions
        # Back to "none": this word is part of the key of the compile cache.
        torch.backends.cuda.matmul.fp32_precision = unset
