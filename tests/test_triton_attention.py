"""The Triton attention: tested on a CPU by Triton's interpreter, compiled for sm_90 without a GPU; `attention=`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from crash import Crash
from tiny import start, tiny_words

from beit_pretrain.checkpoints import files as checkpoint
from beit_pretrain.errors import UserError
from beit_pretrain.runs import fit as runs
from beit_pretrain.training import speed
from beit_pretrain.training.metrics import curve

INTERPRETED = Path(__file__).with_name("interpreted_attention.py")
SHARED_MEMORY = 227 << 10  # bytes that a program may have on an H100 or H200
SIZES = {"base": 12, "large": 16}  # heads, of 64 numbers
SHAPES = ((197, None), (197, 75), (577, None))  # tokens; queries, where some tokens alone have one
NAMES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


def interpreted(marker: str) -> str:
    """Run the tests of `interpreted_attention.py`; their output."""
    pytest.importorskip("triton")
    words = [sys.executable, "-m", "pytest", INTERPRETED, "--noconftest", "-s", "-p", "no:cacheprovider", "-m", marker]
    done = subprocess.run(
        [*words, f"--rootdir={INTERPRETED.parents[1]}"],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    return done.stdout


def test_numbers_gradients_and_a_network_by_the_interpreter():
    interpreted("not long")


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_errors_of_every_shape_and_precision_by_the_interpreter():
    found = interpreted("long")
    table = [line for line in found.splitlines() if re.search(r"N \d+, .*dbias", line)]
    print("relative error of ours (of torch's) against float64", *table, sep="\n")
    assert len(table) > 48


def compiled(name: str, heads: int, tokens: int, queries: int | None, dtype: torch.dtype, width: int = 64) -> Any:
    """A kernel of 256 images compiled for sm_90, with the block sizes that a call would take."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    from beit_pretrain.networks import triton_attention as ours

    rows, packed = queries is not None, queries is None
    kernel = {"forward": ours.forward_kernel, "backward": ours.backward_kernel, "bias": ours.bias_kernel}[name]
    shape = ours.Shape(256, queries or tokens, tokens, heads, width, tokens)
    tiles = ours.TILES["bias_rows" if name == "bias" and rows else name, dtype.itemsize, width]
    fixed = ours.constants(name, shape, packed, rows, tiles)
    fixed |= {"kv": None, "grad_kv": None} if packed else {}
    fixed |= {} if rows else {"row": None}
    fixed |= {"SHARE": ours.parts(shape, tiles, per_image=False)[1]} if name == "bias" else {}
    kinds = {"lse": "*fp32", "delta": "*fp32", "grad_bias": "*fp32", "row": "*i64"}
    kinds |= dict.fromkeys(("bias_image", "bias_head", "bias_line", "images"), "i32")
    given = {n: "constexpr" if n in fixed else kinds.get(n, NAMES[dtype]) for n in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(given.values()) if kind != "constexpr"}
    source = triton.compiler.ASTSource(kernel, given, {n: fixed[n] for n in given if n in fixed}, aligned)
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def resources(ptx: str) -> tuple[int, int]:
    """(registers of a thread, bytes spilled) of machine code, as ptxas says."""
    import triton

    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [triton.knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", file.name, "-o", os.devnull]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    registers, spilled = re.search(r"Used (\d+) registers", said), re.search(r"(\d+) bytes spill stores", said)
    assert registers is not None
    assert spilled is not None
    return int(registers[1]), int(spilled[1])


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's ptxas is for Linux")
@pytest.mark.parametrize("name", ["forward", "backward", "bias"])
@pytest.mark.parametrize(
    ("size", "tokens", "queries", "dtype"),
    [
        *(("base", *shape, torch.bfloat16) for shape in SHAPES),
        *(("base", *shape, torch.float32) for shape in SHAPES),
        *(("large", *shape, torch.bfloat16) for shape in SHAPES),
        ("base", 197, None, torch.float16),
    ],
)
def test_compiled_for_an_h100(size, tokens, queries, dtype, name, tmp_path, monkeypatch):
    """No spills in half precision, hardly any in fp32; Hopper's matrix instructions; no atomics."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found = compiled(name, SIZES[size], tokens, queries, dtype)
    ptx = found.asm["ptx"]
    registers, spilled = resources(ptx)
    shared, wgmma = found.metadata.shared, ptx.count("wgmma.mma_async")
    print(f"{name}, {size}, N {tokens}, K {queries}, {str(dtype)[6:]}: {registers} registers, {spilled} bytes spilled,",
          f"{shared} bytes shared, {wgmma} wgmma")  # fmt: skip
    assert registers <= 255
    assert spilled <= (32 if dtype == torch.float32 else 0)
    assert shared <= SHARED_MEMORY
    assert (wgmma > 0) == (dtype != torch.float32)  # products of fp32 are exact: no tensor cores
    assert not re.search(r"\b(atom|red)\.", ptx)


def test_triton_needs_a_gpu(shards, dvae_checkpoint, run_cli, tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    words = ["fit", *tiny_words(shards, dvae_checkpoint), "steps=1", "attention=triton", f"run_dir={tmp_path / 'run'}"]
    code, _, stderr = run_cli(*words)
    assert code == 2
    assert (
        stderr == "error: attention=triton needs a GPU of CUDA, and this run has none; attention=sdpa runs everywhere\n"
    )
    assert not (tmp_path / "run").exists()


def test_which_attention(monkeypatch):
    def kernel(asked: str, on_gpu: bool = True, precision: str = "auto", width: int = 64) -> str:
        return speed.attention_kernel(asked, on_gpu, precision, {width})

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(speed, "find_spec", lambda name: object())
    assert [kernel(asked) for asked in ("auto", "sdpa", "triton")] == ["sdpa", "sdpa", "triton"]
    monkeypatch.setitem(speed.FASTEST_ATTENTION, (9, 0), "triton")  # a measurement
    assert kernel("auto") == "triton"
    for given, said in (
        ({"on_gpu": False}, "needs a GPU of CUDA"),
        ({"precision": "64-true"}, "does not take trainer.precision=64-true"),
        ({"width": 24}, "takes heads of width 16, 32, 64, 128, and this network's are 24 wide"),
    ):
        assert kernel("auto", **given) == "sdpa"
        with pytest.raises(UserError, match=f"attention=triton {said}.*; attention=sdpa runs everywhere"):
            kernel("triton", **given)
    monkeypatch.setattr(speed, "find_spec", lambda name: None)
    assert kernel("auto") == "sdpa"
    with pytest.raises(UserError, match="package triton"):
        kernel("triton")


@pytest.mark.long
def test_everything_is_imported_without_triton():
    """As on a Mac: the package is not there, and every module of ours but the kernels' own is imported."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import importlib, pkgutil, beit_pretrain\n"
        "for found in pkgutil.walk_packages(beit_pretrain.__path__, 'beit_pretrain.'):\n"
        "    if '.triton_' not in found.name and '__main__' not in found.name: importlib.import_module(found.name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.long
def test_a_run_goes_on_with_the_other_attention(shards, dvae_checkpoint, run_cli, tmp_path, monkeypatch):
    """Begun with torch's, continued with ours: the same losses within rounding."""
    pytest.importorskip("triton")
    words = ["fit", *tiny_words(shards, dvae_checkpoint), "data.workers=0", "steps=4", "val_every=4", "save_every=2"]
    assert run_cli(*words, f"run_dir={tmp_path / 'whole'}")[0] == 0
    make = runs.make_trainer
    monkeypatch.setattr(runs, "make_trainer", lambda cfg, steps, calls: make(cfg, steps, [*calls, Crash(3)]))
    with pytest.raises(RuntimeError, match="power cut"):
        run_cli(*words, f"run_dir={tmp_path / 'run'}")
    log = tmp_path / "log"
    process = start([*words, "attention=triton", f"run_dir={tmp_path / 'run'}"], tmp_path, log, TRITON_INTERPRET="1")
    assert process.wait(280) == 0, log.read_text()
    assert "after step 2" in log.read_text()
    whole, run = (curve(tmp_path / name / "metrics.csv", "train/loss")[1] for name in ("whole", "run"))
    assert run == pytest.approx(whole, abs=1e-5)
    last = [checkpoint.read(tmp_path / name / "checkpoints/last.ckpt")["state_dict"] for name in ("whole", "run")]
    assert any(not torch.equal(last[0][name], last[1][name]) for name in last[0])  # it was really ours that ran
    for name in last[0]:
        torch.testing.assert_close(last[0][name], last[1][name], atol=1e-4, rtol=1e-3, msg=name)
