"""`bench attention`: one layer's attention with a bias that learns, by every kernel there is.

Each kernel runs on two cases: queries of all tokens, and of the masked positions alone, as in the last block. It begins
with what a linear layer gives, q, k and v in one tensor, and with the bias as it is gathered from its table, and its
backward pass ends with their gradients: so what a kernel must copy counts. Forward and backward are timed apart, the
latter with a given gradient. Errors of the output and of all gradients are relative norms against float64.

Shapes: B batch, H heads, N tokens, K tokens that have queries, d width of a head.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from beit_pretrain.benchmarks.inputs import Bench, make_bench
from beit_pretrain.benchmarks.kernels import Inputs, Kernel, eager, kernels, on_heads
from beit_pretrain.benchmarks.step import facts, on_gpu
from beit_pretrain.benchmarks.timing import Clock, kernel_seconds
from beit_pretrain.errors import first_line
from beit_pretrain.tables import table

OUTPUTS = ("out", "dq", "dk", "dv", "dbias")
PRODUCTS = 7  # matrix products of B H K N d multiplications: two forward, five backward


class Case(NamedTuple):
    """Inputs, and the gradient of the output."""

    given: Inputs
    gradient: Tensor

    @property
    def queries(self) -> int:
        return int(self.gradient.shape[1])

    @property
    def operations(self) -> int:
        batch, queries, heads, width = self.gradient.shape
        return int(PRODUCTS * 2 * batch * heads * queries * self.given.qkv.shape[1] * width)


def make_case(bench: Bench, seed: int, masked_only: bool, dtype: torch.dtype | None = None) -> Case:
    """Random q, k, v as a linear layer gives them, and a bias in single precision as it is gathered from its table."""
    draw = torch.Generator().manual_seed(seed)
    heads, width = bench.architecture["num_heads"], bench.architecture["embed_dim"]
    height, columns = bench.module.model.grid
    batch, tokens, queries = bench.batch_size, 1 + height * columns, bench.masking.max_patches
    dtype = dtype or (torch.bfloat16 if bench.bf16 else torch.float32)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw).to(bench.device, dtype)

    bias = torch.randn(1, heads, tokens, tokens, generator=draw).to(bench.device).requires_grad_()
    if not masked_only:
        qkv = random(batch, tokens, 3, heads, width // heads).requires_grad_()
        return Case(Inputs(qkv, bias), random(batch, tokens, heads, width // heads))
    kv = random(batch, tokens, 2, heads, width // heads).requires_grad_()
    query = random(batch, queries, heads, width // heads).requires_grad_()
    asked = torch.rand(batch, tokens, generator=draw).argsort(1)[:, :queries].to(bench.device)
    return Case(Inputs(kv, bias, query, asked), random(batch, queries, heads, width // heads))


def results(kernel: Kernel, case: Case) -> dict[str, Tensor]:
    """Output and gradients."""
    out = kernel(case.given)
    leaves = case.given.leaves
    gradients = torch.autograd.grad(out, leaves, case.gradient.to(out.dtype), allow_unused=True)
    of_qkv, of_bias = gradients[:2]
    parts = of_qkv.unbind(2) if case.given.query is None else (gradients[2], *of_qkv.unbind(2))
    found = zip(OUTPUTS, (out.detach(), *parts, of_bias), strict=True)
    return {name: tensor for name, tensor in found if tensor is not None}


def exact(case: Case) -> dict[str, Tensor]:
    """The same in float64, by plain products."""
    qkv, bias, query, token_BK = case.given
    given = Inputs(
        qkv.detach().double().requires_grad_(),
        bias.detach().double().requires_grad_(),
        None if query is None else query.detach().double().requires_grad_(),
        token_BK,
    )
    return results(on_heads(eager, prepared=False)(), Case(given, case.gradient.double()))


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
    forward = kernel_seconds(lambda: kernel(case.given))
    out = kernel(case.given)
    leaves, gradient = case.given.leaves, case.gradient.to(out.dtype)

    def backward() -> None:
        torch.autograd.grad(out, leaves, gradient, retain_graph=True, allow_unused=True)

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
                out = found[name](case.given)
            with clock(f"{name} backward"):
                torch.autograd.grad(out, case.given.leaves, case.gradient, allow_unused=True)
            del out
    medians = clock.medians()
    return {name: {part: medians[f"{name} {part}"] for part in ("forward", "backward")} for name in found}


def measured(bench: Bench, case: Case, rounds: int, warm_up: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """(kernel, its seconds and errors), one after the other; of a kernel that cannot run the reason as `failed`."""
    working, errors = {}, {}
    wanted = exact(case)
    for name, make in kernels(bench.device).items():
        try:
            with repeatable_backward():  # around the first call, which compiles
                working[name] = make()
                errors[name] = errors_of(results(working[name], case), wanted) if name != "no_bias" else {}
                seconds = timed(working[name], case) if on_gpu(bench) else {}
            if seconds:
                yield name, {**seconds, **errors[name]}
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
        queries, keys = case.queries, case.given.qkv.shape[1]
        found = dict(measured(bench, case, cfg.bench.rounds, cfg.bench.warm_up))
        cases[str(queries)] = found
        print(f"{queries} queries, {keys} keys, {bench.batch_size} images")
        print(table(HEAD, attention_rows(found, case.operations)) + "\n")
    whole = next(iter(cases.values()))
    seconds = {name: each["forward"] + each["backward"] for name, each in whole.items() if "failed" not in each}
    difference = {name: each["difference"] for name, each in whole.items() if "difference" in each}
    about = facts(bench, cfg)
    print(json.dumps({"bench": "attention", **about, "seconds": seconds, "difference": difference, "queries": cases}))
