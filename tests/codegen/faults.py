"""Does the kit detect what it is for? Small functions with one fault each, and the line of the report that shows it.

usage: sh run.sh PYTHON faults.py
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F
from h100 import empty, generate
from report import figures
from torch import Tensor

HOST = torch.rand(64)  # as a buffer that was never moved to the device
half = torch.bfloat16
q = empty(8, 12, 197, 64, dtype=half).requires_grad_()
bias = empty(1, 12, 197, 197, dtype=half).requires_grad_()
square = empty(64, 64).requires_grad_()
number = empty(64, dtype=torch.long)
CALLS = {"so far": 0}


def pad_bias_stride(bias: Tensor) -> Tensor:
    return F.pad(bias, (0, 11))[..., :197]


def broken(x: Tensor) -> Tensor:
    y = x.sin()
    torch._dynamo.graph_break()
    return y.cos()


def changing(x: Tensor) -> Tensor:
    CALLS["so far"] += 1  # which is a constant to the compiler until it changes
    return x * CALLS["so far"]


def by_hand(q: Tensor, bias: Tensor) -> Tensor:
    return (q @ q.transpose(-1, -2) + bias).softmax(-1) @ q


def strides(found: dict) -> list[str]:
    return [call.split("strides ")[1] for call in found["attention"] if "backward" not in call]


CASES: list[tuple[str, Callable, tuple, Callable[[dict], bool]]] = [
    ("nothing", lambda x: x.sin(), (square,), lambda f: f["graphs"] == 1 and not f["graph_breaks"] + f["atomics"]),
    ("graph break", broken, (square,), lambda f: f["graphs"] == 2 and f["graph_breaks"] == 1),
    ("value on the CPU", lambda x: x + HOST.to(x.device), (square,), lambda f: len(f["cpu"]) == 1),
    ("atomics", lambda x, i: x[i], (square, number), lambda f: f["atomics"] == 1),
    (
        "bias aligned",
        lambda q, bias: F.scaled_dot_product_attention(q, q, q, attn_mask=pad_bias_stride(bias)),
        (q, bias),
        lambda f: strides(f) == ["(0, 41024, 208, 1)"],
    ),
    (
        "bias not aligned",  # torch pads it to multiples of 8 in a separate kernel at every call
        lambda q, bias: F.scaled_dot_product_attention(q, q, q, attn_mask=bias),
        (q, bias),
        lambda f: strides(f) == ["(0, 39424, 200, 1)"],
    ),
    (
        "bias copied for every image",
        lambda q, bias: F.scaled_dot_product_attention(q, q, q, attn_mask=pad_bias_stride(bias.repeat(8, 1, 1, 1))),
        (q, bias),
        lambda f: len(strides(f)) == 1 and not strides(f)[0].startswith("(0,"),
    ),
    ("recompilation", changing, (square,), lambda f: f["graphs"] == 3 and not f["graph_breaks"]),
    (
        "another attention",
        lambda q: F.scaled_dot_product_attention(q, q, q),
        (q,),
        lambda f: f["extern"]["_scaled_dot_product_cudnn_attention"] == 1,
    ),
    (
        "attention by hand",
        by_hand,
        (q, bias),
        lambda f: not f["attention"] and f["extern"]["bmm"] > 1 and f["unaligned_products"] > 0,
    ),
]


def launch_fails() -> bool:
    """A kernel that is really launched must raise instead of returning garbage."""
    try:
        torch.ones(3, device="cuda")
    except RuntimeError:
        return True
    return False


def reading_fails() -> bool:
    """Reading a value, which would synchronize with the device, must raise an error about the graph break."""

    def reads(x: Tensor) -> Tensor:
        return x * 2 if x.sum().item() > 0 else x

    try:
        generate(torch.compile(reads), square)
    except Exception as error:
        return "graph break" in " ".join(getattr(error, "__notes__", []))
    return False


def main() -> None:
    torch._logging.set_logs(dynamo=logging.ERROR)  # the graph breaks are on purpose
    missed = 0
    for name, function, arguments, seen in CASES:
        found = figures(generate(torch.compile(function, dynamic=False), *arguments, calls=3))
        good = seen(found)
        missed += not good
        print(f"{'seen' if good else 'MISSED'}: {name}" + ("" if good else f": {found}"))
    for check in (launch_fails, reading_fails):
        good = check()
        missed += not good
        print(f"{'seen' if good else 'MISSED'}: {check.__name__}")
    raise SystemExit(missed > 0)


if __name__ == "__main__":
    main()
