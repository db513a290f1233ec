"""Compiles the Triton kernels of saved programs to machine code for sm_90: do they compile, and what do they take?

usage: sh run.sh PYTHON step.py 2 shared --save FOLDER
       sh run.sh PYTHON kernels.py FOLDER/1_backward.py [PART OF A NAME]

Triton makes PTX by its own LLVM and machine code by the ptxas it brings along; neither needs a GPU. Of the block sizes
that would be timed on a GPU every one is compiled, and a line printed: registers, spilled bytes, shared memory.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import h100  # noqa: F401  Triton's driver
import torch
import triton
from report import KERNEL
from torch._inductor.codecache import PyCodeCache
from torch._inductor.runtime import triton_helpers


def compiled(name: str, source: str) -> list[tuple[Any, Any]]:
    """(block sizes, kernel) for each configuration of one kernel of a program."""
    tuner = getattr(PyCodeCache.load(source), name)  # a file, which triton.jit reads
    return [(config, tuner._precompile_config(config).kernel) for config in tuner.configs]


def resources(ptx: str) -> str:
    """Registers and spills as reported by ptxas."""
    target = re.search(r"^\.target (\w+)", ptx, re.M)
    assert target is not None
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [triton.knobs.nvidia.ptxas.path, "-v", f"--gpu-name={target[1]}", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    registers = re.search(r"Used (\d+) registers", said)
    spilled = re.search(r"(\d+) bytes spill stores", said)
    return f"{registers[1] if registers else '?':>3} registers, {spilled[1] if spilled else '?'} bytes spilled"


def main() -> None:
    if not 2 <= len(sys.argv) <= 3:
        raise SystemExit(__doc__)
    triton_helpers.set_driver_to_gpu = lambda: None  # it would load libcuda
    torch._inductor.config.use_static_triton_launcher = False  # it would keep only the file, not the PTX
    for name, source in KERNEL.findall(Path(sys.argv[1]).read_text()):
        if sys.argv[2:] and sys.argv[2] not in name:
            continue
        print(name)
        for config, kernel in compiled(name, source):
            blocks = " ".join(f"{key}={value}" for key, value in config.kwargs.items())
            shape = f"{blocks} warps={config.num_warps}"
            print(f"    {shape:40} {resources(kernel.asm['ptx'])}, {kernel.metadata.shared} bytes shared", flush=True)


if __name__ == "__main__":
    main()
