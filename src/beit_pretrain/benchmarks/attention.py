"""`bench attention`: one layer's attention with a bias that learns, by every kernel there is (`KERNELS`).

Each kernel runs on two cases: queries of all tokens, and of the masked positions alone, as in the last block. It begins
with what a linear layer gives, q, k and v in one tensor, and with the bias as it is gathered from its table, and its
backward pass ends with their gradients: so what a kernel must copy counts. Forward and backward are timed apart, the
latter with a given gradient. Errors of the output and of all gradients are relative norms against float64.

Shapes: B batch, H heads, N tokens, K tokens that have queries, d width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch import config as functorch
from torch.nn.attention import SDPBackend, sdpa_kernel

from beit_pretrain.benchmarks.blocks import Results, attention_blocks, milliseconds
from beit_pretrain.benchmarks.inputs import Bench, make_bench
from beit_pretrain.benchmarks.measure import in_turn, kernel_seconds
from beit_pretrain.benchmarks.report import Report
from beit_pretrain.errors import first_line
from beit_pretrain.models.blocks import bias_rows, biased_attention, pad_bias_stride

OUTPUTS = ("out", "dq", "dk", "dv", "dbias")
PASSES = ("forward", "backward")
PRODUCTS = 7  # matrix products of B H K N d multiplications: two forward, five backward


class Case(NamedTuple):
    """What a kernel gets, and the gradient of its output. Tensors but that and `token_BK` need gradients."""

    gradient: Tensor  # (B, N or K, H, d)
    qkv: Tensor  # (B, N, 3, H, d); with `token_BK` keys and values alone, (B, N, 2, H, d)
    bias: Tensor  # (1, H, N, N)
    query: Tensor | None = None  # (B, K, H, d)
    token_BK: Tensor | None = None

    def backward(self, out: Tensor) -> tuple[Tensor, ...]:
        """Gradients of qkv, bias (None of a kernel without one) and, where there is one, query."""
        leaves = [self.qkv, self.bias] if self.query is None else [self.qkv, self.bias, self.query]
        return torch.autograd.grad(out, leaves, self.gradient.to(out.dtype), retain_graph=True, allow_unused=True)


Kernel = Callable[[Case], Tensor]  # outputs (B, N or K, H, d)
OnHeads = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # q (B, H, K, d), k, v (B, H, N, d), bias (1|B, H, K, N)


def on_heads(attention: OnHeads, prepared: bool = True) -> Kernel:
    """A kernel of an attention on separate q, k, v and the queries' own rows of the bias.

    `prepared`: the bias in q's precision with aligned rows, as the network has it.
    """

    def kernel(case: Case) -> Tensor:
        parts = case.qkv.transpose(1, 3).unbind(2)  # (B, H, N, d) each
        q, k, v = parts if case.query is None else (case.query.transpose(1, 2), *parts)
        bias = pad_bias_stride(case.bias, q) if prepared else case.bias
        rows = bias if case.token_BK is None else bias_rows(bias, case.token_BK)
        return attention(q, k, v, rows).transpose(1, 2)

    return kernel


def eager(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Scores, added bias, softmax, product, as in the release."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias
    return scores.softmax(-1).to(v.dtype) @ v


def sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """The fused kernel that torch chooses."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))


@cache
def compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """FlexAttention, compiled at its first call, the bias looked up in the kernel."""
    several = len(bias) > 1

    def with_bias(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + (bias[b, h, i, j] if several else bias[0, h, i, j])

    out: Tensor = compiled_flex()(q, k, v, score_mod=with_bias)
    return out


def triton(case: Case) -> Tensor:
    """The project's own kernels, which take the packed tensors as they are and find the queries' rows themselves."""
    from beit_pretrain.models.triton_attention import attention_at, packed_attention  # not on every machine

    bias = pad_bias_stride(case.bias, case.qkv)
    if case.query is None or case.token_BK is None:
        return packed_attention(case.qkv, bias)
    return attention_at(case.query, case.qkv, bias, case.token_BK)


# ours: what the network uses; sdpa_odd: rows of 197 numbers, which CUDA's kernels copy first; no_bias: what no kernel
# with a bias can be faster than.
KERNELS: dict[str, Kernel] = {
    "eager": on_heads(eager, prepared=False),
    "ours": on_heads(biased_attention),
    "sdpa": on_heads(sdpa),
    "sdpa_odd": on_heads(sdpa, prepared=False),
    "no_bias": on_heads(lambda q, k, v, bias: F.scaled_dot_product_attention(q, k, v)),
    "sdpa_efficient": on_heads(sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION)(sdpa)),
    "sdpa_cudnn": on_heads(sdpa_kernel(SDPBackend.CUDNN_ATTENTION)(sdpa)),
    "triton": triton,
    "flex": on_heads(flex),
}
CUDA = ("sdpa_odd", "sdpa_efficient", "sdpa_cudnn", "triton", "flex")  # kernels for it alone


def kernels(device: torch.device) -> dict[str, Kernel]:
    return {name: kernel for name, kernel in KERNELS.items() if device.type == "cuda" or name not in CUDA}


def make_case(bench: Bench, masked_only: bool, dtype: torch.dtype | None = None) -> Case:
    """Random q, k, v as a linear layer gives them, and a bias in single precision as it is gathered from its table."""
    rng = torch.Generator().manual_seed(bench.module.seed)
    heads, width = bench.model.config["num_heads"], bench.model.config["embed_dim"]
    height, columns = bench.model.grid
    batch, tokens, queries = bench.batch_size, 1 + height * columns, bench.masking.max_patches
    dtype = dtype or (torch.bfloat16 if bench.bf16 else torch.float32)

    def random(*shape: int) -> Tensor:
        drawn = torch.randn((batch, *shape, heads, width // heads), generator=rng)
        return drawn.to(bench.device, dtype).requires_grad_()

    bias = torch.randn(1, heads, tokens, tokens, generator=rng).to(bench.device).requires_grad_()
    if not masked_only:
        qkv = random(tokens, 3)
        return Case(random(tokens).detach(), qkv, bias)
    kv, query = random(tokens, 2), random(queries)
    asked = torch.rand(batch, tokens, generator=rng).argsort(1)[:, :queries].to(bench.device)
    return Case(random(queries).detach(), kv, bias, query, asked)


def results(kernel: Kernel, case: Case) -> dict[str, Tensor]:
    """Output and gradients."""
    out = kernel(case)
    of_qkv, of_bias, *of_query = case.backward(out)
    return dict(zip(OUTPUTS, (out.detach(), *of_query, *of_qkv.unbind(2), of_bias), strict=True))


def exact(case: Case) -> dict[str, Tensor]:
    """The same in float64, by plain products."""
    doubled = {k: t.detach().double().requires_grad_() for k, t in case._asdict().items() if t is not None}
    return results(KERNELS["eager"], Case(**{**doubled, "token_BK": case.token_BK}))


def errors_of(kernel: Kernel, case: Case, wanted: dict[str, Tensor]) -> dict[str, Any]:
    """Relative norm of what each tensor is off, and the largest difference of the output."""
    off = {name: (tensor.double() - wanted[name]) for name, tensor in results(kernel, case).items()}
    errors = {name: (each.norm() / wanted[name].norm()).item() for name, each in off.items()}
    return {"errors": errors, "difference": off["out"].abs().max().item()}


def seconds_of(
    kernel: Kernel, case: Case, clock: Callable[[Callable[[], object]], float], number: int = 0
) -> list[float]:
    """Seconds of the forward and of the backward pass."""
    out = kernel(case)
    return [clock(lambda: kernel(case)), clock(lambda: case.backward(out))]


def measure_case(bench: Bench, case: Case, report: Report, rounds: int, warm_up: int) -> None:
    """Report seconds and errors of every kernel, or why it cannot run (`failed`).

    On a GPU one kernel is finished before the next begins; elsewhere all are timed in turn.
    """
    queries, there, wanted = str(case.gradient.shape[1]), kernels(bench.device), exact(case)
    report(operations={queries: PRODUCTS * 2 * case.gradient.numel() * case.qkv.shape[1]})
    for name, kernel in list(there.items()):
        try:
            with functorch.patch(donated_buffer=False):  # a compiled backward pass is to run more than once
                found = errors_of(kernel, case, wanted) if name != "no_bias" else {}
                if bench.on_gpu:
                    found |= dict(zip(PASSES, seconds_of(kernel, case, kernel_seconds), strict=True))
        except Exception as error:  # a kernel may refuse a device, a shape or a bias that learns in its own way
            found = {"failed": f"{type(error).__name__}: {first_line(error)}"}
            del there[name]
        report(queries={queries: {name: found}})
    if not bench.on_gpu:
        work = {name: partial(seconds_of, kernel, case, bench.seconds) for name, kernel in there.items()}
        *_, every = in_turn(work, rounds, warm_up)
        for name, pairs in every.items():
            medians = np.median(pairs, axis=0).tolist()
            report(queries={queries: {name: dict(zip(PASSES, medians, strict=True))}})


def measure(bench: Bench, report: Report, rounds: int, warm_up: int = 1) -> None:
    """Report every kernel on both cases."""
    for name, masked_only in (("all tokens", False), ("masked only", True)):
        with report.part(name):
            measure_case(bench, make_case(bench, masked_only), report, rounds, warm_up)
    first: dict[str, Any] = next(iter(report.found.get("queries", {}).values()), {})
    report(seconds={name: sum(each[part] for part in PASSES) for name, each in first.items() if "failed" not in each})
    said = (f"{name} {milliseconds(value)}" for name, value in report.found["seconds"].items())
    report.write(headline=f"ms: {', '.join(said)}")


def bench_attention(cfg: Any) -> Results:
    bench, report = make_bench(cfg), Report()
    report(about=bench.about)
    measure(bench, report, cfg.bench.rounds, cfg.bench.warm_up)
    found, blocks = report.found, attention_blocks(report.found)
    first = next(iter(found["queries"].values()))
    difference = {name: each["difference"] for name, each in first.items() if "difference" in each}
    given = {"seconds": found["seconds"], "difference": difference, "queries": found["queries"]}
    return blocks, {"bench": "attention", **found["about"], **given}
