"""Facts about generated programs (h100.py): kernels, library calls, atomics, bytes, attention bias."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from h100 import UNALIGNED, Program
from torch._dynamo.utils import counters

SHOWN = 12  # kernels of a program
KERNEL = re.compile(r"async_compile\.triton\('(\w+)', '''(.*?)'''", re.S)
# extern_kernels.addmm( and torch.ops.aten.convolution_backward.default( ; under checkpointing an operator is also
# another's argument: graphsafe_run_with_rng_state(torch.ops.aten._scaled_dot_product_efficient_attention.default, ...
LIBRARY = re.compile(r"(?<![\w.'])(?:extern_kernels|(?:torch\.ops\.)?(?:aten|beit_pretrain))\.(\w+)(?:\.\w+)?[(,]")
ATTENTION = re.compile(r"\.(_scaled_dot_product_\w+)\.default[(,] ?(.*)$", re.M)
BIAS_AT = {  # which argument the bias is; flash attention has none
    "_scaled_dot_product_efficient_attention": 3,
    "_scaled_dot_product_efficient_attention_backward": 4,
    "_scaled_dot_product_cudnn_attention": 3,
    "_scaled_dot_product_cudnn_attention_backward": 8,
}
NUMBERS = r"\(([\d, ]*)\), \(([\d, ]*)\)"  # size and strides
VIEW = re.compile(r"reinterpret_tensor\(\w+, " + NUMBERS)
WHOLE = re.compile(r"(\w+) = empty_strided_\w+\(" + NUMBERS + r"|assert_size_stride\((\w+), " + NUMBERS)


class Summary:
    """Of one program: `kernels` (sources), `launches`, `bytes` and `atomics` by kernel, calls of `library`, ..."""

    def __init__(self, program: Program):
        body = calls(program.code)
        self.backward = program.backward
        self.kernels = dict(KERNEL.findall(program.code))
        self.launches = Counter(name for name, _ in program.launches)
        self.bytes: Counter[str] = Counter()
        for name, size in program.launches:
            self.bytes[name] += size
        self.atomics = Counter({name: text.count("tl.atomic_") for name, text in self.kernels.items()})
        self.library = Counter(LIBRARY.findall(body))
        self.attention = attention(body)
        self.cpu = [name for name in program.cpu if re.search(rf"\b{name}\b", body)]
        self.saved = program.saved_bytes


def calls(code: str) -> str:
    """The lines of a program that launch kernels and call libraries, without comments."""
    body = code.split("async_compile.wait(globals())")[-1]
    body = re.split(r"^def (?:get_args|benchmark_compiled_module)\(", body, flags=re.M)[0]
    return "\n".join(line for line in body.splitlines() if not line.lstrip().startswith("#"))


def attention(body: str) -> Counter[str]:
    """How often each attention is called, with the size and strides of its bias."""
    whole = {match[1] or match[4]: (match[2] or match[5], match[3] or match[6]) for match in WHOLE.finditer(body)}
    found: Counter[str] = Counter()
    for operator, rest in ATTENTION.findall(body):
        place = BIAS_AT.get(operator)
        bias = _arguments(rest)[place] if place is not None else "None"
        view = VIEW.match(bias)
        size, strides = (view[1], view[2]) if view else whole.get(bias, ("?", "?"))
        found[f"{operator}, " + ("no bias" if bias == "None" else f"bias ({size}) strides ({strides})")] += 1
    return found


def _arguments(text: str) -> list[str]:
    """The arguments of a call, given what follows its opening bracket."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([") - (letter in ")]")
        if depth < 0:
            break
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def figures(programs: list[Program]) -> dict[str, Any]:
    """The numbers to compare and to test, over all programs."""
    parts = [Summary(program) for program in programs]

    def added(name: str) -> Counter[str]:
        return sum((getattr(part, name) for part in parts), Counter())

    def gigabytes(backward: bool) -> float:
        return round(sum(part.bytes.total() for part in parts if part.backward == backward) / 1e9, 3)

    return {
        "graphs": counters["stats"]["unique_graphs"],
        "graph_breaks": sum(counters["graph_break"].values()),
        "kernels": added("launches").total(),
        "extern": dict(sorted(added("library").items())),
        "atomics": added("atomics").total(),
        "forward_GB": gigabytes(False),
        "backward_GB": gigabytes(True),
        "saved_GB": round(sum(part.saved for part in parts) / 1e9, 3),
        "attention": dict(sorted(added("attention").items())),
        "cpu": sorted({name for part in parts for name in part.cpu}),
        "unaligned_products": len(set(UNALIGNED)),
    }


def show(programs: list[Program]) -> None:
    """Print what there is to know of each program."""
    for part in map(Summary, programs):
        print("backward:" if part.backward else "forward:")
        print(f"  {part.launches.total()} launches of {len(part.launches)} Triton kernels,", end=" ")
        print(f"{part.bytes.total() / 1e9:.3f} GB by them")
        print("  libraries:", ", ".join(f"{name} {n}" for name, n in sorted(part.library.items())) or "none")
        for call, n in sorted(part.attention.items()):
            print(f"  attention: {n} x {call}")
        for name, n in (+part.atomics).items():
            print(f"  atomics: {n} in {name}, launched {part.launches[name]} x")
        if part.cpu:
            print("  on the CPU:", ", ".join(part.cpu))
        for name, size in part.bytes.most_common(SHOWN):
            print(f"  {size / 1e9:8.3f} GB in {part.launches[name]:3} x {name[:90]}")
    for reason, n in counters["graph_break"].items():
        print(f"graph break, {n} x: {reason.splitlines()[0]}")
    for product in sorted(set(UNALIGNED)):
        print(f"unaligned product: {product}")


def finish(programs: list[Program], numbers: dict[str, Any], folder: str | None = None) -> None:
    """Save the programs, if a folder is given, and print the numbers as the last line."""
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        for number, program in enumerate(programs):
            name = f"{number}_{'backward' if program.backward else 'forward'}.py"
            Path(folder, name).write_text(program.code)
    print(json.dumps(numbers))
