"""`bench attention`: one layer's attention with a bias that learns, by every kernel there is.

Each kernel runs on two cases: queries of all tokens, and of the masked positions alone, as in the last block. Times are
of the kernel's forward pass and of its backward pass with a given gradient, nothing else. Errors of the output and of
all gradients are relative norms against the same attention in float64.

Another kernel is one more entry of `KERNELS`.
Shapes: B batch, H heads, K queries, N keys, d width of a head.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from beit_pretrain.bench.inputs import Bench, make_bench
from beit_pretrain.bench.step import facts, on_gpu
from beit_pretrain.bench.timing import Clock, kernel_seconds
from beit_pretrain.errors import first_line
from beit_pretrain.networks.blocks import ALIGNED, aligned, attend, bias_rows
from beit_pretrain.tables import table

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # q (B, H, K, d), k, v (B, H, N, d), bias (1 or B, H, K, N)
OUTPUTS = ("out", "dq", "dk", "dv", "dbias")
PRODUCTS = 7  # matrix products of B H K N d multiplications: two forward, five backward


class Case(NamedTuple):
    """Inputs that need gradients, and the gradient of the output."""

    given: list[Tensor]  # q, k, v, bias
    gradient: Tensor

    @property
    def operations(self) -> int:
        batch, heads, queries, width = self.given[0].shape
        return PRODUCTS * 2 * batch * heads * queries * self.given[1].shape[2] * width


def eager(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Scores, added bias, softmax, product, as in the release."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias
    return scores.softmax(-1).to(v.dtype) @ v


def ours(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """What the network uses: on a CPU the bias inside the product, on a GPU the fused kernel with aligned rows."""
    return attend(q, k, v, with_aligned_rows(bias, q))


def with_aligned_rows(bias: Tensor, like: Tensor) -> Tensor:
    """`blocks.aligned`, but for rows that are so already: the network aligns its bias once a step."""
    ready = bias.dtype == like.dtype and bias.stride(2) % ALIGNED == 0
    return bias if ready else aligned(bias, like)


def sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """The fused kernel that torch chooses, with rows of 197 numbers, which CUDA's kernels copy first."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))


def no_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """The fused kernel without a bias: what the bias costs at least."""
    return F.scaled_dot_product_attention(q, k, v)


def of_backend(backend: SDPBackend) -> Callable[[], Kernel]:
    """torch's attention by one backend, the bias' rows aligned as in the network."""

    def kernel(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=with_aligned_rows(bias, q))

    return lambda: kernel


def flex() -> Kernel:
    """FlexAttention, compiled at its first call, the bias looked up in the kernel."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled: Any = torch.compile(flex_attention, dynamic=False)

    def kernel(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        several = len(bias) > 1

        def with_bias(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score + (bias[b, h, i, j] if several else bias[0, h, i, j])

        out: Tensor = compiled(q, k, v, score_mod=with_bias)
        return out

    return kernel


TRITON = "beit_pretrain.networks.triton_attention"


def triton() -> Kernel:
    """The project's own kernel."""
    kernel: Kernel = importlib.import_module(TRITON).attention
    return kernel


# Name -> what makes the kernel, and whether it needs CUDA. Those whose names begin with "triton" need that module.
KERNELS: dict[str, tuple[Callable[[], Kernel], bool]] = {
    "eager": (lambda: eager, False),
    "ours": (lambda: ours, False),
    "sdpa": (lambda: sdpa, False),
    "no_bias": (lambda: no_bias, False),
    "sdpa_efficient": (of_backend(SDPBackend.EFFICIENT_ATTENTION), True),
    "sdpa_cudnn": (of_backend(SDPBackend.CUDNN_ATTENTION), True),
    "triton": (triton, True),
    "flex": (flex, True),  # on a CPU it has no gradient
}


def kernels(device: torch.device) -> dict[str, Callable[[], Kernel]]:
    """Makers of the kernels that there are for a device."""
    there = {name: make for name, (make, cuda) in KERNELS.items() if device.type == "cuda" or not cuda}
    if importlib.util.find_spec(TRITON) is None:
        there.pop("triton", None)
    return there


def make_case(bench: Bench, seed: int, masked_only: bool, dtype: torch.dtype | None = None) -> Case:
    """Random q, k, v in the layout of a projection and a bias: in single precision of all tokens, as it is gathered
    from its table; with `masked_only` rows for the queries of each image, as `blocks.bias_rows` makes them."""
    draw = torch.Generator().manual_seed(seed)
    heads, width = bench.architecture["num_heads"], bench.architecture["embed_dim"]
    height, columns = bench.module.model.grid
    tokens, queries = 1 + height * columns, bench.masking.max_patches
    dtype = dtype or (torch.bfloat16 if bench.bf16 else torch.float32)
    qkv = torch.randn(bench.batch_size, tokens, 3, heads, width // heads, generator=draw)
    q, k, v = (t.transpose(1, 2) for t in qkv.to(bench.device, dtype).unbind(2))
    bias = torch.randn(1, heads, tokens, tokens, generator=draw).to(bench.device)
    if masked_only:
        asked = torch.rand(bench.batch_size, tokens, generator=draw).argsort(1)[:, :queries].to(bench.device)
        q, bias = q[:, :, :queries], bias_rows(aligned(bias, q), asked)
    gradient = torch.randn(q.transpose(1, 2).shape, generator=draw).to(bench.device, dtype).transpose(1, 2)
    return Case([t.detach().requires_grad_() for t in (q, k, v, bias)], gradient)


def results(kernel: Kernel, case: Case) -> dict[str, Tensor]:
    """Output and gradients."""
    out = kernel(*case.given)
    gradients = torch.autograd.grad(out, case.given, case.gradient.to(out.dtype), allow_unused=True)
    found = zip(OUTPUTS, (out.detach(), *gradients), strict=True)
    return {name: tensor for name, tensor in found if tensor is not None}


def exact(case: Case) -> dict[str, Tensor]:
    """The same in float64, by plain products."""
    given = [t.detach().double().requires_grad_() for t in case.given]
    return results(eager, Case(given, case.gradient.double()))


def relative_errors(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """Relative norm of what each tensor is off."""
    return {name: ((found[name].double() - wanted[name]).norm() / wanted[name].norm()).item() for name in found}


@contextmanager
def repeatable_backward() -> Iterator[None]:
    """Let a compiled function's backward run more than once on what its forward kept."""
    from torch._functorch import config

    with config.patch(donated_buffer=False):
        yield


def timed(kernel: Kernel, case: Case) -> dict[str, float]:
    """On a GPU: median seconds of the forward and of the backward pass."""
    with repeatable_backward():
        forward = kernel_seconds(lambda: kernel(*case.given))
        out = kernel(*case.given)
        gradient = case.gradient.to(out.dtype)

        def backward() -> None:
            torch.autograd.grad(out, case.given, gradient, retain_graph=True, allow_unused=True)

        return {"forward": forward, "backward": kernel_seconds(backward)}


def timed_in_turn(
    bench: Bench, found: dict[str, Kernel], case: Case, rounds: int, warm_up: int
) -> dict[str, dict[str, float]]:
    """Elsewhere: the same of all kernels, in turn, in an order drawn anew every round."""
    clock = Clock(bench)
    for number in tqdm(range(-warm_up, rounds), desc="measuring", unit=" rounds"):
        if number == 0:
            clock.seconds.clear()
        for name in np.random.default_rng(abs(number)).permutation(list(found)):
            with clock(f"{name} forward"):
                out = found[name](*case.given)
            with clock(f"{name} backward"):
                torch.autograd.grad(out, case.given, case.gradient, allow_unused=True)
            del out
    medians = clock.medians()
    return {name: {part: medians[f"{name} {part}"] for part in ("forward", "backward")} for name in found}


def measured(bench: Bench, case: Case, rounds: int, warm_up: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """(kernel, its seconds and errors), one after the other; of a kernel that cannot run the reason as `failed`."""
    working, errors = {}, {}
    wanted = exact(case)
    for name, make in kernels(bench.device).items():
        try:
            working[name] = make()
            errors[name] = errors_of(results(working[name], case), wanted) if name != "no_bias" else {}
            if on_gpu(bench):
                yield name, {**timed(working[name], case), **errors[name]}
        except Exception as error:  # a kernel may refuse a device, a shape or a bias that learns in its own way
            working.pop(name, None)
            yield name, {"failed": f"{type(error).__name__}: {first_line(error)}"}
    if not on_gpu(bench):
        for name, seconds in timed_in_turn(bench, working, case, rounds, warm_up).items():
            yield name, {**seconds, **errors[name]}


def errors_of(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Any]:
    """Relative errors of all tensors, and the largest difference of the output."""
    difference = (found["out"].double() - wanted["out"]).abs().max().item()
    return {"errors": relative_errors(found, wanted), "difference": difference}


def attention_rows(found: dict[str, dict[str, Any]], operations: float) -> list[list[str]]:
    """Rows of the table of one case."""
    rows = []
    whole = {name: f["forward"] + f["backward"] for name, f in found.items() if "failed" not in f}
    for name, each in found.items():
        if name not in whole:
            rows.append([name, "-", "-", "-", "-", each["failed"][:60]])
            continue
        times, rate = (1000 * each["forward"], 1000 * each["backward"]), operations / whole[name] / 1e12
        errors = ", ".join(f"{key} {value:.1e}" for key, value in each.get("errors", {}).items())
        ratio = f"{whole['eager'] / whole[name]:.2f}" if "eager" in whole else ""
        rows.append([name, f"{times[0]:.4g}", f"{times[1]:.4g}", f"{rate:.3g}", ratio, errors])
    return rows


HEAD = ["kernel", "ms forward", "ms backward", "TFLOP/s", "times eager", "relative error from float64"]


def bench_attention(cfg: DictConfig) -> None:
    """Print a table for queries of all tokens and one for the masked alone, and the same as JSON."""
    bench = make_bench(cfg)
    cases: dict[str, Any] = {}
    for masked_only in (False, True):
        case = make_case(bench, cfg.seed, masked_only)
        queries, keys = case.given[0].shape[2], case.given[1].shape[2]
        found = dict(measured(bench, case, cfg.bench.rounds, cfg.bench.warm_up))
        cases[str(queries)] = found
        print(f"{queries} queries, {keys} keys, {bench.batch_size} images")
        print(table(HEAD, attention_rows(found, case.operations)) + "\n")
    whole = next(iter(cases.values()))
    seconds = {name: each["forward"] + each["backward"] for name, each in whole.items() if "failed" not in each}
    difference = {name: each["difference"] for name, each in whole.items() if "difference" in each}
    about = facts(bench, cfg)
    print(json.dumps({"bench": "attention", **about, "seconds": seconds, "difference": difference, "queries": cases}))
