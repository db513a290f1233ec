"""What the page of `bench gpu` shows of each stage: tables and a line for the summary. Imports nothing heavy."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

Line = dict[str, Any]  # of gpu.jsonl
Rows = list[list[str]]
BARS, CURVES = "images_per_s.png", "curves.png"  # plots


class Block(NamedTuple):
    """A table (with a head), a plot, or text."""

    head: tuple[str, ...] = ()
    rows: Rows = []
    text: str = ""
    code: str = ""
    plot: str = ""  # file name


def milliseconds(seconds: Any) -> str:
    return f"{1000 * seconds:.4g}"


def tera(value: Any) -> str:
    return f"{value / 1e12:.4g}"


def share(value: float) -> str:
    return f"{value:.1%}"


NO_NUMBERS = ("nan", "inf", "-inf")


def restored(value: Any) -> Any:
    """Findings with the numbers that JSON does not know, which stand there as text."""
    if isinstance(value, dict):
        return {key: restored(each) for key, each in value.items()}
    if isinstance(value, list):
        return [restored(each) for each in value]
    return float(value) if isinstance(value, str) and value in NO_NUMBERS else value


def facts_blocks(found: dict[str, Any]) -> list[Block]:
    rows = [[name, str(value)] for name, value in found.get("versions", {}).items()]
    for group in ("machine", "gpu"):
        rows += [[f"{group}: {name}", str(value)] for name, value in found.get(group, {}).items()]
    rows += [[f"bandwidth: {name}", f"{value / 1e9:.4g} GB/s"] for name, value in found.get("bandwidth", {}).items()]
    for name, each in found.get("flops", {}).items():
        rows.append([f"products in {name}", f"best {tera(each['best'])}, sustained {tera(each['sustained'])} TFLOP/s"])
    return [Block(("what", "value"), rows)]


def error_rows(found: dict[str, Any]) -> Rows:
    rows = []
    for case, kernels in found.items():
        for name, errors in kernels.items():
            said = errors if isinstance(errors, str) else ", ".join(f"{k} {v:.1e}" for k, v in errors.items())
            rows.append([case, name, said])
    return rows


def parity_blocks(found: dict[str, Any]) -> list[Block]:
    blocks = [Block(("precision, queries", "kernel", "relative error"), error_rows(found.get("attention", {})))]
    if tokens := found.get("tokens"):  # shares of them, and how many there are
        rows = [[name, share(tokens[name])] for name in ("ours_and_fp32", "package_and_fp32", "ours_and_package")]
        counts = f"{tokens['tokens']} tokens, {tokens['distinct']} distinct."
        far = f"{counts} Logits of ours lie {tokens['far']:.2g} standard deviations below fp32's largest at the most."
        blocks += [Block(("tokens of two encoders that agree", "share"), rows), Block(text=far)]
    return blocks


COUNTS = ("graphs", "graph_breaks", "recompilations", "fallbacks")  # of torch.compile


def counted(found: dict[str, Any]) -> str:
    """What torch.compile has done."""
    said = ", ".join(f"{found[name]} {name.replace('_', ' ')}" for name in COUNTS)
    return f"{said}, {found['seconds']:.1f} s"


def compile_blocks(found: dict[str, Any]) -> list[Block]:
    rows = []
    for name, each in found.get("compared", {}).items():
        loss = f"{each['loss']['compiled']:.6g} / {each['loss']['eager']:.6g} / {each['loss']['fp32']:.6g}"
        worst = f"{each['from_eager']['worst']:.2g} ({each['from_eager']['where']})"
        gaps = [f"{each[key]['all']:.2g}" for key in ("from_eager", "compiled_from_fp32", "eager_from_fp32")]
        rows.append([name, loss, gaps[0], worst, *gaps[1:], counted(each)])
    head = ("case", "loss compiled / eager / fp32", "gradients: compiled from eager", "worst tensor")
    blocks = [Block((*head, "compiled from fp32", "eager from fp32", "compilation"), rows)]
    if views := found.get("views"):
        blocks.append(Block(text=f"Views: largest difference {views['largest_difference']:.2g}; {counted(views)}."))
    return blocks


def curves_blocks(found: dict[str, Any]) -> list[Block]:
    rows = []
    for label in ("difference", "noise"):
        if each := found.get(label):
            rows.append([label, *(f"{each[name]:.4g}" for name in ("mean", "mean_size", "largest"))])
    head = ("second half of the steps", "mean", "mean size", "largest")
    last = [[name, str(len(each)), f"{statistics.fmean(each[-20:]):.4f}"] for name, each in found["losses"].items()]
    return [
        Block(head, rows),
        Block(("path", "steps", "mean loss of the last 20"), last),
        Block(plot=CURVES),
        Block(text="difference: the plain path from the fast one on the same data; noise: other data from it."),
    ]


def utilisation(found: dict[str, Any], name: str) -> float | None:
    """Of the measured peak of matrix products."""
    rate, operations, peak = (
        found.get("images_per_s", {}).get(name),
        found.get("flops_per_image"),
        found.get("peak_flops"),
    )
    return rate * operations / peak if name in ("ours", "ours_cached") and rate and operations and peak else None


def step_blocks(found: dict[str, Any]) -> list[Block]:
    about, started = found.get("about", {}), found.get("started", {})
    rows = []
    for name, first in started.items():
        seconds = found.get("seconds", {}).get(name, [])
        used = utilisation(found, name)
        rows.append(
            [
                name,
                f"{found['images_per_s'][name]:.5g}" if seconds else "",
                milliseconds(statistics.median(seconds)) if seconds else "",
                f"{milliseconds(min(seconds))} to {milliseconds(max(seconds))}" if seconds else "",
                share(used) if used else "",
                f"{first['first_step']:.1f}",
                f"{first['graphs']} / {first['graph_breaks']} / {first['recompilations']}" if "graphs" in first else "",
            ]
        )
    head = ("variant", "images/s", "ms a step", "range", "of the peak", "first step, s", "graphs / breaks / again")
    blocks = [Block(text=said_of(about)), Block(head, rows)]
    rows = []
    for pair, each in found.get("ratios", {}).items():
        interval = f"{each['low']:.3f} to {each['high']:.3f}{'' if each['pairs'] > 5 else ' (range)'}"
        rows.append([pair, f"{each['median']:.3f}", interval, str(each["pairs"])])
    if rows:
        blocks.append(Block(("times as fast", "median", "95 % interval", "pairs"), rows))
    sizes = ", ".join(f"{name} {size / 2**30:.2f} GiB" for name, size in found.get("memory", {}).items())
    facts = [f"Memory of ours: {sizes}."] if sizes else []
    if "flops_per_image" in found and "peak_flops" in found:
        operations = f"{found['flops_per_image'] / 1e9:.1f} GFLOP an image"
        facts.append(f"{operations}; large matrix products run at {tera(found['peak_flops'])} TFLOP/s.")
    if off := found.get("numbers"):
        facts.append(f"Both settings, a step: loss apart by {off['loss']:.2g}, gradients by {off['gradients']:.2g}.")
    return [*blocks, Block(text=" ".join(facts))] if facts else blocks


def said_of(about: dict[str, Any]) -> str:
    """On what it was measured."""
    if not about:
        return ""
    network = f"{about.get('experiment')}, {about.get('parameters', 0) / 1e6:.1f} million parameters"
    how = f"{about.get('batch_size')} images, {about.get('precision')}, compile {about.get('compile')}"
    return f"{network}, {how}, {about.get('device')}."


def attention_blocks(found: dict[str, Any]) -> list[Block]:
    blocks = [Block(text=said_of(found.get("about", {})))]
    for queries, kernels in found.get("queries", {}).items():
        rows = []
        for name, each in kernels.items():
            if "forward" not in each:
                rows.append([name, "", "", "", str(each.get("failed", ""))[:80]])
                continue
            rate = found["operations"][queries] / (each["forward"] + each["backward"])
            errors = ", ".join(f"{key} {value:.1e}" for key, value in each.get("errors", {}).items())
            rows.append([name, milliseconds(each["forward"]), milliseconds(each["backward"]), tera(rate), errors])
        head = (f"{queries} queries", "ms forward", "ms backward", "TFLOP/s", "relative error from float64")
        blocks.append(Block(head, rows))
    return blocks


def fit_blocks(found: dict[str, Any]) -> list[Block]:
    rows = [[f"seconds: {name}", f"{value:.1f}"] for name, value in found.get("seconds", {}).items()]
    if "images_per_s" in found:
        rows += [["images/s", f"{found['images_per_s']:.5g}"], ["waiting for data", share(found["data_wait"])]]
    if compiled := found.get("compiled"):
        rows.append(["compiled", counted(compiled)])
    return [Block(("fit", "value"), rows), Block(code=found.get("profile", ""))]


def prefetch_blocks(found: dict[str, Any]) -> list[Block]:
    each = found.get("prefetch", {})
    rows = [[name, f"{values['images_per_s']:.5g}", share(values["data_wait"])] for name, values in each.items()]
    return [Block(("prefetcher", "images/s", "waiting for data"), rows)]


def started_blocks(found: dict[str, Any]) -> list[Block]:
    rows = [
        [f"{network}, {name}", f"{first['first_step']:.1f}"]
        for network, each in found.get("started", {}).items()
        for name, first in each.items()
    ]
    return [Block(("compiled ahead", "s"), rows)] if rows else []


BLOCKS: dict[str, Callable[[dict[str, Any]], list[Block]]] = {
    "facts": facts_blocks,
    "data": lambda found: [],
    "warm": started_blocks,
    "parity": parity_blocks,
    "compile": compile_blocks,
    "curves": curves_blocks,
    **dict.fromkeys(("large", "wide", "wider", "triton", "graphs", "autotune"), step_blocks),
    "base": lambda found: [*step_blocks(found), Block(plot=BARS)],
    "attention": attention_blocks,
    "fit": fit_blocks,
    "prefetch": prefetch_blocks,
}


def blocks_of(line: Line) -> list[Block]:
    """What the page shows of a stage."""
    blocks = []
    errors = [["the stage", line["error"]]] if line.get("error") else []
    errors += [[name, error] for name, error in line.get("errors", {}).items()]
    if errors:
        blocks.append(Block(("went wrong", "how"), errors))
    if line.get("found"):
        try:
            show = BLOCKS.get(line["stage"], lambda found: [Block(code=json.dumps(found)[:2000])])
            blocks += show(restored(line["found"]))
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:  # of a stage that was cut short
            blocks.append(Block(text=f"Not all of it can be shown ({type(error).__name__}: {error})."))
    return [block for block in blocks if any((block.rows, block.text, block.code, block.plot))]


def headline_of_step(found: dict[str, Any]) -> str:
    said = [f"{name} {rate:.5g}" for name, rate in found["images_per_s"].items()]
    used = utilisation(found, "ours_cached")
    return "images/s: " + ", ".join(said) + (f"; {share(used)} of the peak" if used else "")


def headline_of_attention(found: dict[str, Any]) -> str:
    kernels = next(iter(found["queries"].values()))
    times = {name: each["forward"] + each["backward"] for name, each in kernels.items() if "forward" in each}
    return "ms: " + ", ".join(f"{name} {milliseconds(value)}" for name, value in times.items())


HEADLINES: dict[str, Callable[[dict[str, Any]], str]] = {
    "facts": lambda f: f"bf16 {tera(f['flops']['bf16']['best'])} TFLOP/s, copy {f['bandwidth']['copy'] / 1e9:.4g} GB/s",
    "parity": lambda f: f"tokens as fp32: {share(f['tokens']['ours_and_fp32'])}",
    "compile": lambda f: counted(f["compared"]["training"]),
    "curves": lambda f: f"difference {f['difference']['mean_size']:.2g}, noise {f['noise']['mean_size']:.2g}",
    **dict.fromkeys(("base", "large", "wide", "wider", "triton", "graphs", "autotune"), headline_of_step),
    "attention": headline_of_attention,
    "fit": lambda f: f"{f['images_per_s']:.5g} images/s, waiting {share(f['data_wait'])}",
    "prefetch": lambda f: ", ".join(f"{name} {each['images_per_s']:.5g}" for name, each in f["prefetch"].items()),
}


def headline(line: Line) -> str:
    """The most important of a stage in one line."""
    if line.get("error"):
        return str(line["error"])[:100]
    try:
        said = HEADLINES[line["stage"]](restored(line.get("found", {})))
    except (KeyError, TypeError, ValueError, AttributeError, StopIteration):
        said = ""
    errors = line.get("errors", {})
    return said[:140] + (f"; failed: {', '.join(errors)}" if errors else "")


def summary(lines: Iterable[Line]) -> Block:
    """The stages, a row each."""
    rows = [[line["stage"], line["status"], f"{line['seconds']:.0f}", headline(line)] for line in lines]
    return Block(("stage", "status", "s", "what"), rows)
