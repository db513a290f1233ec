"""`bench attention`: forward and backward of one layer's attention with a bias that learns, by every kernel there is.

* `eager`: scores, added bias, softmax, product, as in the release.
* `ours`: what the network uses (`blocks.attend`): on a CPU the bias inside the product, on a GPU the fused kernel.
* `sdpa`: the fused kernel with the bias as it is gathered, rows of 197 numbers, which CUDA's kernels copy first.
* `flex`: FlexAttention, compiled, the bias looked up in the kernel (CUDA only: it has no gradient on a CPU).
* `no_bias`: the fused kernel without a bias: what the bias costs at least.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from beit_pretrain.bench.inputs import Bench, make_bench
from beit_pretrain.bench.step import Clock, facts
from beit_pretrain.networks.blocks import aligned, attend
from beit_pretrain.tables import table

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # q, k, v (B, H, N, d), bias (1, H, N, N)


def eager(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias
    return scores.softmax(-1).to(v.dtype) @ v


def ours(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return attend(q, k, v, aligned(bias, q))


def sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))


def no_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def flex() -> Kernel:
    """FlexAttention, compiled at its first call."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled: Any = torch.compile(flex_attention, dynamic=False)

    def kernel(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        def with_bias(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score + bias[0, h, i, j]

        out: Tensor = compiled(q, k, v, score_mod=with_bias)
        return out

    return kernel


def kernels(device: torch.device) -> dict[str, Kernel]:
    found: dict[str, Kernel] = {"eager": eager, "ours": ours, "sdpa": sdpa, "no_bias": no_bias}
    return found | ({"flex": flex()} if device.type == "cuda" else {})


def inputs(bench: Bench, seed: int) -> list[Tensor]:
    """Random q, k, v in the layout of a projection, and a bias in single precision; all need gradients."""
    draw = torch.Generator().manual_seed(seed)
    heads, width = bench.architecture["num_heads"], bench.architecture["embed_dim"]
    height, columns = bench.module.model.grid
    tokens, dtype = 1 + height * columns, torch.bfloat16 if bench.bf16 else torch.float32
    qkv = torch.randn(bench.batch_size, tokens, 3, heads, width // heads, generator=draw)
    q, k, v = qkv.to(bench.device, dtype).unbind(2)
    bias = torch.randn(1, heads, tokens, tokens, generator=draw).to(bench.device)
    return [t.requires_grad_() for t in (*(t.transpose(1, 2) for t in (q, k, v)), bias)]


def bench_attention(cfg: DictConfig) -> None:
    """Print milliseconds of every kernel, how far its output is from the eager one's, and the same as JSON."""
    bench = make_bench(cfg)
    given, clock = inputs(bench, cfg.seed), Clock(bench)
    expected = eager(*(t.double() for t in given)).detach()
    weight = torch.randn_like(expected).to(given[0].dtype)
    found = kernels(bench.device)
    distance = {
        name: (kernel(*given).double() - expected).abs().max().item()
        for name, kernel in found.items()
        if name != "no_bias"
    }
    for number in tqdm(range(-cfg.bench.warm_up, cfg.bench.rounds), desc="measuring", unit=" rounds"):
        if number == 0:
            clock.seconds.clear()
        for name in np.random.default_rng(abs(number)).permutation(list(found)):
            with clock(str(name)):
                (found[name](*given) * weight).sum().backward()
            for tensor in given:
                tensor.grad = None
    rows, medians = [], {name: float(np.median(clock.seconds[name])) for name in found}
    for name, seconds in medians.items():
        off = f"{distance[name]:.2g}" if name in distance else ""
        rows.append([name, f"{1000 * seconds:.4g}", f"{medians['eager'] / seconds:.2f}", off])
    print(table(["kernel", "ms, forward and backward", "times eager", "largest difference from float64"], rows))
    about = facts(bench, cfg)
    print(json.dumps({"bench": "attention", **about, "seconds": medians, "difference": distance}))
