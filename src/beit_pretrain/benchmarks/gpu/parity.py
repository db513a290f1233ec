"""The stages that compare numbers: attention and tokens with more precise ones, compiled functions with eager ones."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from beit_pretrain.benchmarks.attention import errors_of, exact, kernels, make_case
from beit_pretrain.benchmarks.gpu.curves import smooth_images
from beit_pretrain.benchmarks.gpu.machine import allowing_tf32
from beit_pretrain.benchmarks.gpu.plan import Setup
from beit_pretrain.benchmarks.inputs import Batch, Bench, make_batch, make_bench
from beit_pretrain.benchmarks.peers import packages_encoder
from beit_pretrain.benchmarks.report import Report
from beit_pretrain.benchmarks.step import distance, gradients
from beit_pretrain.engine.compile import CompileCounts, compile_counts, compile_reasons
from beit_pretrain.errors import first_line
from beit_pretrain.tokenizers.tokenizer import OpenAITokenizer

OFF = 1e-3  # relative difference between compiled and eager in fp32 at which the stage fails
# The same in bf16: of the loss; and gradients, next to fp32's, may be so many times as far off as eager ones.
LOSS_OFF, TIMES_OFF = 1e-2, 1.5
VIEWS_OFF = 2 / 255  # of a pixel of a view: a level that was rounded the other way, stretched by what follows
OWN_KERNELS, THEIRS = ("ours", "triton"), "sdpa_efficient"  # the former may be at most `TIMES_OFF` times as far off
BATCHES = 3  # with which a compiled function is called: none but the first may compile it


def fail_if(wrong: list[str]) -> None:
    """Raise RuntimeError with what is wrong."""
    if wrong:
        raise RuntimeError("; ".join(wrong))


def parity(setup: Setup, report: Report) -> None:
    """How many tokens agree; relative errors of every attention kernel from float64. Errors of ours are judged.

    Kernels of our own come last: what fails inside a kernel leaves a process without its GPU.
    """
    bench = setup.bench(report, "parity")
    with report.part("tokens"):
        rng = torch.Generator(bench.device).manual_seed(bench.module.seed)
        report(tokens=token_parity(bench, smooth_images(bench, bench.tokenizer.downsample, rng)))
        report.write(headline=f"tokens as fp32: {report.found['tokens']['ours_and_fp32']:.1%}")
    there = kernels(bench.device)
    # Without no_bias, another function, and flex, which compiles for long and is in the stage `attention`.
    theirs = [name for name in there if name not in ("no_bias", "flex", "triton")]
    dtypes = (torch.float32, torch.bfloat16, torch.float16)[: 3 if bench.on_gpu else 2]
    own = [name for name in there if name == "triton"]
    for names, dtype, masked_only in product((theirs, own), dtypes, (False, True)):
        case = make_case(bench, masked_only, dtype)
        label, wanted = f"{str(dtype).removeprefix('torch.')} {case.gradient.shape[1]}", exact(case)
        for name in names:
            try:
                errors: Any = errors_of(there[name], case, wanted)["errors"]
            except Exception as error:  # a kernel that refuses a precision is no failure of the stage
                errors = f"{type(error).__name__}: {first_line(error)}"
            report(attention={label: {name: errors}})
    for label, each in report.found["attention"].items():
        with report.part(f"attention, {label}"):
            fail_if(wrong_kernels(each))


def wrong_kernels(found: dict[str, dict[str, float] | str]) -> list[str]:
    """Problems of kernels by their errors; a kernel that did not run has a text instead, which counts for ours only."""
    wrong, usual = [], found.get(THEIRS)
    for name, errors in found.items():
        if isinstance(errors, str):
            wrong += [f"{name}: {errors}"] if name in OWN_KERNELS else []
            continue
        for output, error in errors.items():
            if not math.isfinite(error):
                wrong.append(f"{name}: {output} is not finite")
            elif name in OWN_KERNELS and isinstance(usual, dict) and not error <= TIMES_OFF * usual[output]:
                wrong.append(f"{name}: {output} is off by {error:.1e}, {THEIRS}'s by {usual[output]:.1e}")
    return wrong


@torch.no_grad()
def token_parity(bench: Bench, image: Tensor) -> dict[str, float]:
    """Shares of tokens on which two encoders agree: ours, the package's module, and that in real fp32.

    `distinct`: tokens that occur; with random weights alone a few win everywhere, so the output bias is set to give
    many. `far`: how far the logits of our tokens lie below fp32's largest, at the most, in standard deviations of all
    logits: 0 where they agree, little for near-ties.
    """
    from dall_e import map_pixels

    encoder: Any = bench.tokenizer.encoder  # type: ignore[attr-defined]
    precise: Any = copy.deepcopy(encoder).to(bench.device)
    for module in precise.modules():
        module.use_float16 = False
    with allowing_tf32(False):
        logits_BVHW = precise(map_pixels(image))
        shift_V = -logits_BVHW.mean((0, 2, 3))
    encoder.blocks.output.conv.b.add_(shift_V.to(encoder.blocks.output.conv.b.device))
    logits_BVN = (logits_BVHW + shift_V.view(1, -1, 1, 1)).flatten(2)
    fused = OpenAITokenizer.of(encoder).to(bench.device)  # of the changed weights
    wanted, package, ours = logits_BVN.argmax(1), packages_encoder(bench)(image), fused.encode(image)
    below_BN = logits_BVN.amax(1) - logits_BVN.gather(1, ours.unsqueeze(1)).squeeze(1)
    same = {"ours_and_fp32": ours == wanted, "package_and_fp32": package == wanted, "ours_and_package": ours == package}
    shares = {name: equal.double().mean().item() for name, equal in same.items()}
    far = (below_BN / logits_BVN.std()).max().item()
    return {**shares, "far": far, "tokens": wanted.numel(), "distinct": len(wanted.unique())}


def compiled(setup: Setup, report: Report) -> None:
    """Loss and gradients of compiled and eager steps, in fp32 and in training's precision; one graph, compiled once.

    Raises RuntimeError if something was compiled in pieces or more than once, or is off.
    """
    sizes = setup.sizes
    shallow = () if setup.tiny else (f"+model.depth={sizes.shallow}",)
    in_fp32 = setup.config(f"batch_size={sizes.precise}", *shallow, forced=("trainer.precision=32-true",))
    cfg = setup.config(f"batch_size={sizes.base}")
    for name, config in (("fp32", in_fp32), ("training", cfg)):
        with report.part(name):
            compare_compiled(report, name, config)
    with report.part("views"):
        compare_views(report, cfg)
    fail_if([f"{name}: {error}" for name, error in report.errors.items()])


def in_both_ways(bench: Bench, work: Callable[[Batch], Any], batches: list[Batch]) -> tuple[Any, Any, CompileCounts]:
    """(uncompiled, compiled, counts): results of the first batch, and what was compiled for all of them."""
    with bench.uncompiled():
        eager = work(batches[0])
    torch._dynamo.reset()  # another network before is no recompilation of this one
    before = compile_counts()
    fast, *_ = [work(batch) for batch in batches]
    return eager, fast, compile_counts().since(before)


def compare_compiled(report: Report, name: str, cfg: Any) -> None:
    """Compare the steps of one network. Raises RuntimeError with what is wrong."""
    bench = make_bench(cfg)
    report(about={name: bench.about})
    batches = [make_batch(bench, number) for number in range(BATCHES)]
    with allowing_tf32(False), bench.uncompiled():
        loss, precise = gradients(bench._replace(bf16=False), batches[0])
    # In bf16 torch's own settings: code compiled under others would not be found in the cache by later stages.
    with allowing_tf32(False) if not bench.bf16 else nullcontext():
        eager, fast, counts = in_both_ways(bench, partial(gradients, bench), batches)
    found = {
        "loss": {"eager": eager[0], "compiled": fast[0], "fp32": loss},
        "from_eager": distance(fast[1], eager[1]),
        "eager_from_fp32": distance(eager[1], precise),
        "compiled_from_fp32": distance(fast[1], precise),
        **counts._asdict(),
    }
    report(compared={name: found})
    report.write(headline=f"{name}: {counts}")
    of_loss, of_gradients, most = abs(fast[0] / eager[0] - 1), found["from_eager"]["all"], OFF
    if bench.bf16:
        of_gradients = found["compiled_from_fp32"]["all"]
        most += TIMES_OFF * found["eager_from_fp32"]["all"]
    right = of_loss < (LOSS_OFF if bench.bf16 else OFF) and of_gradients < most  # not-a-number is not
    differ = f"compiled and eager differ: loss {of_loss:.2g}, gradients {of_gradients:.2g}"
    fail_if(said_of(counts) + ([] if right else [differ]))


def compare_views(report: Report, cfg: Any) -> None:
    """Compare the jittered view of a batch, as training with cached tokens makes it."""
    bench = make_bench(cfg)
    batches = [make_batch(bench, number) for number in range(BATCHES)]
    work = lambda batch: bench.module.prepare(batch.without("token_image"))[0]  # noqa: E731
    eager, fast, counts = in_both_ways(bench, work, batches)
    off = (fast - eager).abs().max().item()
    report(views={"largest_difference": off, **counts._asdict()})
    fail_if(said_of(counts) + ([] if off <= VIEWS_OFF else [f"compiled and eager views differ by {off:.2g}"]))


def said_of(counts: CompileCounts) -> list[str]:
    """A line unless everything was one graph, compiled once."""
    if counts.clean and counts.graphs == 1:
        return []
    reasons = "; ".join(compile_reasons(counts)[:3])
    return [f"{counts}, {counts.fallbacks} not compiled ({reasons})"]
