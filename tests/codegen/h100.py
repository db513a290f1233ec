"""Makes `torch.compile` generate an H100's code on a machine without a GPU, and keeps that code. Nothing is computed.

Run it by run.sh: with the stubs in the place of CUDA, torch finds a device by itself. What is replaced here is only
what would launch or load a kernel:

1. Triton's driver, which would load libcuda: it only has to say for which device to generate code.
2. GraphLowering.compile_to_module, which would compile the generated code and hand back something to call: the code
   is kept, and the call returns tensors of the right shapes.
3. The value of constants (UniformValueConstantFolder), computed on the device: here on the CPU.
4. save_graph_repro, which prints every graph with the values of its constants into a log that nobody reads.
5. The benchmark of products whose sizes are no multiples of 8 (pad_mm.get_cached_should_pad): they are left unpadded,
   and noted.

And call_kernel of Triton kernels, which writes a launch, also notes how many bytes Inductor thinks the launch moves.
"""

from __future__ import annotations

import os
import warnings
from typing import Any, NamedTuple

import torch
import torch._dynamo
import torch._functorch.config
import torch._inductor.config
import triton
from torch import Tensor
from torch._dynamo.repro import after_aot
from torch._inductor.codegen.triton import TritonKernel
from torch._inductor.fx_passes import pad_mm
from torch._inductor.fx_passes.joint_graph import UniformValueConstantFolder
from torch._inductor.graph import GraphLowering
from torch._inductor.select_algorithm import TritonTemplateKernel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from triton.backends.compiler import GPUTarget

TARGET = GPUTarget("cuda", 90, 32)  # compute capability 9.0, 32 threads a warp
DEVICE = torch.device("cuda", 0)


class Program(NamedTuple):
    """What Inductor made of one graph, forward or backward."""

    code: str  # the Python module: Triton kernels as strings, then `call`, which launches them
    backward: bool
    launches: list[tuple[str, int]]  # of Triton kernels: name, bytes read and written
    cpu: list[str]  # values that live on the CPU: constants, inputs, buffers
    saved_bytes: int  # of a backward: what the forward keeps for it, parameters and inputs left out


PROGRAMS: list[Program] = []  # in the order in which they were compiled
LAUNCHES: list[tuple[str, int]] = []  # of the program that is being written
UNALIGNED: list[str] = []  # products that torch would have timed with and without padding


class _Driver:
    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return DEVICE

    @staticmethod
    def is_active() -> bool:
        return True


class _Module:
    """Stands in for the compiled module of a program."""

    __file__ = __path__ = key = "not written"

    def __init__(self, graph: GraphLowering):
        (outputs,) = next(node for node in _nodes(graph) if node.op == "output").args
        self.outputs = [node.meta["val"] if isinstance(node, torch.fx.Node) else node for node in outputs]

    def call(self, arguments: list) -> list:
        arguments.clear()  # as the real one does
        return [_empty(value) if isinstance(value, Tensor) else value for value in self.outputs]


def _empty(like: Tensor) -> Tensor:
    return torch.empty_strided(like.size(), like.stride(), dtype=like.dtype, device=like.device)


def _nodes(graph: Any) -> list[Any]:
    return list(graph.module.graph.nodes)


def _keep(graph: GraphLowering) -> Any:
    LAUNCHES.clear()
    code, _ = graph.codegen()
    PROGRAMS.append(Program(code.value, bool(graph.is_backward), list(LAUNCHES), _on_cpu(graph), _saved(graph)))
    return _Module(graph)


def _on_cpu(graph: GraphLowering) -> list[str]:
    inputs = {name: value for name, value in graph.graph_inputs.items() if hasattr(value, "get_device")}
    buffers = {buffer.get_name(): buffer for buffer in graph.buffers if buffer.get_name() not in graph.removed_buffers}
    names = [name for name, value in {**inputs, **buffers}.items() if str(value.get_device()) == "cpu"]
    return names + [name for name, value in graph.constants.items() if value.device.type == "cpu"]


def _saved(graph: GraphLowering) -> int:
    if not graph.is_backward:
        return 0
    values = {node.name: node.meta["val"] for node in _nodes(graph) if node.op == "placeholder"}
    ours = ("primals", "tangents")
    return sum(v.nbytes for name, v in values.items() if isinstance(v, Tensor) and not name.startswith(ours))


def _note_launches(kernel: Any) -> None:
    call = kernel.call_kernel

    def call_kernel(self, name, *args, **kwargs):
        LAUNCHES.append((name, int(self.estimate_kernel_num_bytes())))
        return call(self, name, *args, **kwargs)

    kernel.call_kernel = call_kernel


class _OnCpu(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*tree_map(_to_cpu, args), **tree_map(_to_cpu, kwargs or {}))


def _to_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.cpu()
    return torch.device("cpu") if isinstance(value, torch.device) else value


def _note(key: str) -> bool:
    UNALIGNED.append(key)
    return False


def _install() -> None:
    if "cudart.so" not in os.environ.get("LD_PRELOAD", ""):
        raise SystemExit("the stubs are not in place: start this by run.sh")
    torch.cuda.init()
    torch.set_num_threads(1)
    triton.runtime.driver.set_active(_Driver())
    GraphLowering.compile_to_module = _keep  # type: ignore[method-assign, assignment]
    after_aot.save_graph_repro = lambda *args, **kwargs: None
    pad_mm.get_cached_should_pad = _note  # type: ignore[assignment]
    deduce = UniformValueConstantFolder._deduce_value

    def deduce_on_cpu(self, node):
        with _OnCpu():
            return deduce(self, node)

    UniformValueConstantFolder._deduce_value = deduce_on_cpu  # type: ignore[method-assign]
    _note_launches(TritonKernel)
    _note_launches(TritonTemplateKernel)
    torch._inductor.config.compile_threads = 1
    torch._inductor.config.force_disable_caches = True
    warnings.filterwarnings("ignore", "dynamo_pgo force disabled|Accessing the data pointer of FakeTensor")
    torch._functorch.config.force_non_lazy_backward_lowering = True  # the backward now, and not at its first call


_install()
mode = FakeTensorMode(allow_non_fake_inputs=True)  # tensors with shapes, strides, types, and no contents


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor on the absent device."""
    with mode:
        return torch.empty(shape, dtype=dtype, device=DEVICE)


def to_device(module: torch.nn.Module) -> torch.nn.Module:
    """Put a module's parameters and buffers onto the device, without their values."""
    with mode:
        for part in module.modules():
            for name, value in part._parameters.items():
                if value is not None:
                    there = torch.empty_like(value, device=DEVICE)
                    part._parameters[name] = torch.nn.Parameter(there, requires_grad=value.requires_grad)
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[name] = torch.empty_like(buffer, device=DEVICE)
    return module


def _another(value: Any) -> Any:
    with mode:
        return torch.empty_like(value).requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


def generate(function: Any, *arguments: Any, calls: int = 1) -> list[Program]:
    """The programs of a compiled function, called under bf16 autocast, each time with other tensors of these shapes.

    Between graphs the function runs as usual, with tensors without contents; to read a value there is an error.
    A second program of the same graph is a recompilation. Dynamo's counters start at zero.
    """
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    PROGRAMS.clear()
    UNALIGNED.clear()
    try:
        for _ in range(calls):
            with mode, torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
                function(*arguments)
            arguments = tree_map(_another, arguments)
    except Exception as error:
        for reason in torch._dynamo.utils.counters["graph_break"]:
            error.add_note(f"after a graph break: {reason}")
        raise
    return list(PROGRAMS)
