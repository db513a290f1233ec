"""Triton attention: by Triton's interpreter on a CPU, compiled for sm_90 without a GPU; `attention=`."""

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
from tiny import start, tiny_words

from beit_pretrain.engine import speed
from beit_pretrain.errors import UserError
from beit_pretrain.models.checkpoints import files as checkpoint
from beit_pretrain.tables import curve

INTERPRETED = Path(__file__).with_name("interpreted_attention.py")
SHARED_MEMORY = 227 << 10  # bytes that a program may have on an H100 or H200
SIZES = {"base": 12, "large": 16}  # heads, of 64 numbers
SHAPES = ((197, None), (197, 75), (577, None))  # tokens; queries, if only some tokens have one
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


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


@pytest.mark.long
def test_interpreter_short():
    interpreted("not long")


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("marker", "lines"), [("long and not soak", 54), pytest.param("soak", 12, marks=pytest.mark.soak)]
)
def test_interpreter_all_shapes_and_precisions(marker, lines):
    """Errors next to float64, by the interpreter; of 577 tokens, half of the time, in `make soak`."""
    found = interpreted(marker)
    table = [line for line in found.splitlines() if re.search(r"N \d+, .*dbias", line)]
    print("relative error of ours (of torch's) against float64", *table, sep="\n")
    assert len(table) == lines


class Driver:
    """Tells Triton for which GPU to compile, without one."""

    def __init__(self, target: Any):
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return -1  # kernels of a real GPU, in tests that follow, have a cache of their own

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def kernels(tmp_path, monkeypatch) -> dict[str, Any]:
    """The kernels that the operators would launch on an H100, compiled, by name."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    from beit_pretrain.models import triton_attention

    found: dict[str, Any] = {}

    def compiled(kernel, programs, like, tiles, *arguments, **fixed):
        kinds = [value.dtype if isinstance(value, torch.Tensor) else value for value in arguments]
        how = {"num_warps": tiles.warps, "num_stages": tiles.stages, "grid": (programs,)}
        found[kernel.__name__] = kernel.warmup(*kinds, **fixed, **how)

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton_attention, "_launch", compiled)
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver(GPUTarget("cuda", 90, 32)))
    return found


def call_operators(heads: int, tokens: int, queries: int | None, dtype: torch.dtype) -> None:
    """Forward and backward pass of 256 images with heads of dimension 64, on fake tensors."""
    from beit_pretrain.models.triton_attention import attention, attention_backward

    there = {"device": "meta", "dtype": dtype}
    bias = torch.empty(1, heads, tokens, -(-tokens // 16) * 16, **there)[..., :tokens]
    if queries is None:
        given = (torch.empty(256, tokens, 3, heads, 64, **there), None, bias, None)
    else:
        q, kv = torch.empty(256, queries, heads, 64, **there), torch.empty(256, tokens, 2, heads, 64, **there)
        given = (q, kv, bias, torch.empty(256, queries, device="meta", dtype=torch.long))
    out, lse = attention._init_fn(*given)  # what a GPU would run: such tensors would be sent to the fake one
    attention_backward._init_fn(torch.empty_like(out), out, lse, *given, True, True)


def resources(ptx: str) -> tuple[int, int]:
    """(registers per thread, spilled bytes) of machine code, as reported by ptxas."""
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
@pytest.mark.parametrize(
    ("size", "tokens", "queries", "dtype"),
    [
        *(("base", *shape, torch.bfloat16) for shape in SHAPES),
        *(("base", *shape, torch.float32) for shape in SHAPES),
        *(("large", *shape, torch.bfloat16) for shape in SHAPES),
        ("base", 197, None, torch.float16),
    ],
)
def test_compiles_for_h100(size, tokens, queries, dtype, kernels):
    """No spills in half precision, hardly any in fp32; Hopper's matrix instructions; no atomics."""
    call_operators(SIZES[size], tokens, queries, dtype)
    assert kernels.keys() == {"forward_kernel", "delta_kernel", "backward_kernel", "bias_kernel"}
    for name, kernel in kernels.items():
        ptx, shared = kernel.asm["ptx"], kernel.metadata.shared
        registers, spilled = resources(ptx)
        wgmma = ptx.count("wgmma.mma_async")
        print(
            f"{name}, {size}, N {tokens}, K {queries}, {str(dtype)[6:]}: {registers} registers, {spilled} bytes",
            end=" ",
        )
        print(f"spilled, {shared} bytes shared, {wgmma} wgmma")
        assert registers <= 255
        assert spilled <= (32 if dtype == torch.float32 else 0)
        assert shared <= SHARED_MEMORY
        # Products of fp32 are exact: no tensor cores.
        assert (wgmma > 0) == (dtype != torch.float32 and name != "delta_kernel")
        assert not re.search(r"\b(atom|red)\.", ptx)


def test_needs_gpu(shards, dvae_checkpoint, run_cli, tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    words = ["fit", *tiny_words(shards, dvae_checkpoint), "steps=1", "attention=triton", f"run_dir={tmp_path / 'run'}"]
    code, _, stderr = run_cli(*words)
    assert code == 2
    assert (
        stderr == "error: attention=triton needs a GPU of CUDA, and this run has none; attention=sdpa runs everywhere\n"
    )
    assert not (tmp_path / "run").exists()


def test_attention_setting(monkeypatch):
    pytest.importorskip("triton")

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
def test_imports_without_triton():
    """As on a Mac: every module except those of the kernels can be imported without the package."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import importlib, pkgutil, beit_pretrain\n"
        "for found in pkgutil.walk_packages(beit_pretrain.__path__, 'beit_pretrain.'):\n"
        "    if '.triton_' not in found.name and '__main__' not in found.name: importlib.import_module(found.name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.long
def test_resume_with_other_attention(shards, dvae_checkpoint, run_cli, crash, tmp_path):
    """From torch's attention to Triton: same losses within rounding."""
    pytest.importorskip("triton")
    words = [
        "fit",
        *tiny_words(shards, dvae_checkpoint),
        "data.num_workers=0",
        "steps=4",
        "val_every=4",
        "save_every=2",
    ]
    assert run_cli(*words, f"run_dir={tmp_path / 'whole'}")[0] == 0
    crash(3, *words, f"run_dir={tmp_path / 'run'}")
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


def on_a_gpu() -> Any:
    """The module with the test tools, on a GPU."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    pytest.importorskip("triton")
    import interpreted_attention

    return interpreted_attention


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("kind", ["packed", "packed, a bias an image", "queries", "tokens"])
@pytest.mark.parametrize("keys", [50, 197, 577])
def test_gpu_error_is_at_most_that_of_torch(keys, kind, dtype):
    tools = on_a_gpu()
    torch.backends.cuda.matmul.allow_tf32 = False
    tools.compare(kind, keys, 75, dtype, heads=12, images=16, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["packed", "tokens"])
def test_gpu_runs_are_bit_identical(kind):
    tools = on_a_gpu()
    given = tools.inputs(kind, 64, 12, 197, 75, 64, torch.bfloat16, "cuda")
    grad = torch.randn(64, 197 if kind == "packed" else 75, 12, 64, device="cuda").bfloat16()
    first = tools.results(tools.ours, given, grad)
    for _ in range(5):
        again = tools.results(tools.ours, given, grad)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.gpu
def test_tensor_above_2_to_the_31_elements():
    """The last images give the same bits as on their own."""
    tools = on_a_gpu()
    if torch.cuda.mem_get_info()[0] < 30 << 30:
        pytest.skip("needs 30 GiB of free memory on the GPU")
    images = 2**31 // (197 * 3 * 12 * 64) + 8
    qkv, bias = tools.inputs("packed", 4, 12, 197, 0, 64, torch.bfloat16, "cuda")
    grad = torch.randn(4, 197, 12, 64, device="cuda").bfloat16()
    alone = tools.results(tools.ours, [qkv, bias], grad)
    many = qkv.repeat(-(-images // 4), 1, 1, 1, 1)
    found = tools.results(tools.ours, [many, bias], grad.repeat(len(many) // 4, 1, 1, 1))
    assert all(torch.equal(found[name][-4:], alone[name]) for name in ("out", "dq", "dk", "dv"))


@pytest.mark.gpu
@pytest.mark.parametrize("bias", ["shared", "per_layer"])
def test_compiled_gradients_on_gpu(bias):
    tools = on_a_gpu()
    network = tools.model(bias).cuda()
    wanted = tools.loss_and_gradients(network)
    tools.use_triton(network)
    network.forward_at = torch.compile(network.forward_at, fullgraph=True, dynamic=False)
    for name, tensor in tools.loss_and_gradients(network).items():
        torch.testing.assert_close(tensor, wanted[name], atol=1e-4, rtol=1e-4, msg=name)
