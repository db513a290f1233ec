"""The code that torch.compile generates for a training step on an H100, without a GPU (`codegen/README.md`).

Limits are what was found when they were written, and a little more. A figure below its limit is good news: lower the
limit with the change that brought it.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
BASE_BIAS = "bias (256, 12, 197, 197) strides (0, 41024, 208, 1)"  # of all images alike, its rows aligned
LAST_BIAS = "bias (256, 12, 75, 197) strides (187200, 208, 2496, 1)"  # of the masked positions, gathered

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def kit(tmp_path_factory) -> Callable[..., str]:
    """`kit(script, *words)`: the output of a script of the kit."""
    if torch.version.cuda is None:
        pytest.skip("this torch has no CUDA code to generate for")
    if sys.platform != "linux" or shutil.which("gcc") is None:
        pytest.skip("the stand-ins for CUDA are compiled by gcc, on Linux")
    folder = shutil.copytree(HERE / "codegen", tmp_path_factory.mktemp("codegen") / "kit")
    subprocess.run(["sh", folder / "build.sh", sys.executable], check=True)

    @cache
    def run(script: str, *words: str) -> str:
        command = ["sh", folder / "run.sh", sys.executable, folder / script, *words]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout

    return run


def figures(printed: str) -> dict:
    found: dict = json.loads(printed.splitlines()[-1])
    return found


def test_planted_faults_are_detected(kit):
    assert "MISSED" not in kit("faults.py")


@pytest.mark.parametrize("bias", ["shared", "per_layer", "none"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_is_one_graph_with_fused_attention(kit, bias, checkpointing):
    """Over three steps: one graph, no break, no recompilation, nothing on the CPU, aligned bias rows."""
    found = figures(kit("step.py", "2", bias, *["--checkpoint"] * checkpointing))
    assert (found["graphs"], found["graph_breaks"], found["cpu"], found["unaligned_products"]) == (1, 0, [], 0)
    operator = "_scaled_dot_product_" + ("flash" if bias == "none" else "efficient") + "_attention"
    assert found["extern"][operator] == 2 * (1 + checkpointing)
    assert found["extern"][f"{operator}_backward"] == 2
    assert not {"bmm", "baddbmm", "convolution"} & found["extern"].keys()
    given = {call.partition(", ")[2] for call in found["attention"]}
    assert given == ({"no bias"} if bias == "none" else {BASE_BIAS, LAST_BIAS})
    # Gradients of: masked tokens (twice), the rows of a bias and its table; with tables of their own, one a layer.
    assert found["atomics"] <= {"shared": 4, "per_layer": 5, "none": 2}[bias]


@pytest.mark.parametrize(
    ("bias", "launches", "forward", "backward", "saved"),
    [("shared", 30, 1.83, 3.64, 1.42), ("per_layer", 32, 1.83, 3.64, 1.42)],
)
def test_memory_traffic_of_a_block(kit, bias, launches, forward, backward, saved):
    """GB of a layer of base at 256 images, in kernels of the compiler (products and attention not counted)."""
    layer = figures(kit("step.py", "4", bias, "--per-layer"))["layer"]
    assert layer["extern"].get("addmm", 0) + layer["extern"].get("mm", 0) == 12
    found = [layer[name] for name in ("kernels", "forward_GB", "backward_GB", "saved_GB")]
    assert all(a <= b for a, b in zip(found, (launches, forward, backward, saved), strict=True)), found


@pytest.mark.parametrize("bias", ["shared", "per_layer"])
def test_triton_attention_packs_gradients(kit, bias):
    """One graph; the gradients of q, k and v are not copied into one tensor, the bias is read in place."""
    printed = kit("step.py", "4", bias, "--attention", "triton", "--per-layer")
    found = figures(printed)
    assert (found["graphs"], found["graph_breaks"], found["cpu"], found["unaligned_products"]) == (1, 0, [], 0)
    assert (found["extern"]["attention"], found["extern"]["attention_backward"]) == (4, 4)
    assert not [name for name in found["extern"] if name.startswith("_scaled_dot_product")]
    assert "stack" not in printed
    assert found["atomics"] <= {"shared": 3, "per_layer": 6}[bias]  # masked tokens (2), each table's rows
    layer = found["layer"]
    assert layer["forward_GB"] <= 1.83
    assert layer["backward_GB"] <= 2.94


def test_deterministic_mode_has_no_atomics(kit):
    found = figures(kit("step.py", "2", "shared", "--deterministic"))
    assert (found["graphs"], found["graph_breaks"], found["atomics"]) == (1, 0, 0)


def test_jitter_and_tokenizer_are_one_graph_with_fused_relus(kit):
    """24 of the encoder's 36 convolutions have their ReLU in the same kernel; the output is one product of fp16."""
    printed = kit("tokenizer.py")
    found = figures(printed)
    assert (found["graphs"], found["graph_breaks"], found["cpu"], found["atomics"]) == (1, 0, [], 0)
    assert found["extern"] == {"convolution": 12, "conv_relu": 24, "mm_dtype": 1}
    assert found["forward_GB"] < 33.5
