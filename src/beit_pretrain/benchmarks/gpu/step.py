"""The stages that time a training step: base, large, more images, CUDA graphs, autotuning; and the attention kernels.

`warm` compiles ahead what `base` and `large` will run, so that these find it in the cache.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from beit_pretrain.benchmarks import attention as kernels
from beit_pretrain.benchmarks import step as steps
from beit_pretrain.benchmarks.gpu.plan import Setup
from beit_pretrain.benchmarks.inputs import Batch, make_batch
from beit_pretrain.benchmarks.peers import peer_step
from beit_pretrain.benchmarks.report import Report
from beit_pretrain.benchmarks.step import SPARE, Gradients, Variant, distance, first_step, gradients, our_steps

OURS = ("ours_cached", "ours_tokenizer")
PEERS = ("reference", "reference_compiled", "reference_tokenizer", "timm", "transformers")
LARGE = "large_22k"  # experiment
COMPILING, COMPILED = 60.0, 25.0  # seconds that a peer's first step may take, compiled then or found in the cache
LOSS_OFF, GRADIENTS_OFF = 1e-2, 5e-2  # relative difference of a step under two settings, from which on they are wrong


def warm(setup: Setup, report: Report) -> None:
    """Fill the compile cache for `base` and `large`, except for what the stage `compile` compiles."""
    with report.part("base"):
        bench = setup.bench(report, "base")
        reference = peer_step(bench, "reference_compiled")
        report(started={"base": {"reference_compiled": first_step(bench, reference)}})
        warmed(setup).touch()
        del bench, reference
    with report.part("large"):
        torch._dynamo.reset()
        bench = setup.bench(report, "large", experiment=LARGE)
        own = our_steps(bench)
        for name in OURS:
            report(started={"large": {name: first_step(bench, own[name])}})


def warmed(setup: Setup) -> Path:
    """Marker file: the compiled reference is in the cache for these settings."""
    name = hashlib.sha256(repr((setup.words, setup.sizes)).encode()).hexdigest()[:16]
    return setup.scratch / f"reference-compiled-{name}"


def interleaved(
    setup: Setup, report: Report, size: str, names: tuple[str, ...] = OURS[:1], experiment: str | None = None
) -> None:
    """Measure variants of a step, interleaved. A variant that fails is reported and left out."""
    bench = setup.bench(report, size, experiment=experiment)

    def check_time(name: str) -> None:
        need = SPARE
        if "compiled" in name and not setup.tiny:
            need = COMPILED if warmed(setup).is_file() else COMPILING
        if setup.left() < need:
            raise TimeoutError(f"left out: {setup.left():.0f} s are left, it may need {need:.0f}")

    variants = steps.started(bench, names, report, check_time)
    steps.measure_rounds(bench, variants, report, setup.sizes.rounds, left=setup.left)


base = partial(interleaved, size="base", names=("ours", *OURS, *PEERS))
large = partial(interleaved, size="large", names=OURS, experiment=LARGE)
wide = partial(interleaved, size="wide")
wider = partial(interleaved, size="wider")


def two_settings(setup: Setup, report: Report, size: str, usual: str, other: str) -> None:
    """`ours` with one setting and with another, in turn; each with a network of its own, from the same weights.

    Before the first step, loss and gradients of both are compared.
    """
    variants: dict[str, Variant] = {}
    numbers: dict[str, Gradients] = {}
    for word in (usual, other):
        with report.part(word):
            bench = setup.bench(report, size, forced=(word,))
            variant = in_graph_steps(our_steps(bench)["ours"])
            compute = partial(gradients, bench)
            start = first_step(bench, in_graph_steps(lambda batch: numbers.update({word: compute(batch)})))  # noqa: B023
            report(started={word: start})
            if bench.module.compile_mode is not None and "graphs" not in start:
                raise RuntimeError(f"{word} compiled nothing: it ran what the other setting had compiled")
            variant(make_batch(bench, 0))
            variants[word] = variant
    if not variants:
        raise RuntimeError("neither setting ran")
    with report.part("numbers"):
        compare_numbers(report, numbers, usual, other)
    numbers.clear()
    # Any of the benches serves: they have the same batches and clock.
    pairs = [(name, usual) for name in variants if name != usual]
    steps.measure_rounds(bench, variants, report, setup.sizes.rounds, pairs=pairs, left=setup.left)


triton = partial(two_settings, size="base", usual="attention=sdpa", other="attention=triton")
graphs = partial(two_settings, size="graphs", usual="compile=default", other="compile=reduce-overhead")
autotune = partial(two_settings, size="base", usual="compile=default", other="compile=max-autotune-no-cudagraphs")


def compare_numbers(report: Report, numbers: dict[str, Gradients], usual: str, other: str) -> None:
    """Report how far a step's loss and gradients are apart under two settings. Raises RuntimeError if too far."""
    if usual not in numbers or other not in numbers:
        return
    (loss, wanted), (its_loss, found) = numbers[usual], numbers[other]
    of_loss, of_gradients = abs(its_loss / loss - 1), distance(found, wanted)["all"]
    report(numbers={"loss": of_loss, "gradients": of_gradients})
    if not (of_loss < LOSS_OFF and of_gradients < GRADIENTS_OFF):
        raise RuntimeError(f"{other} is not {usual}: loss off by {of_loss:.2g}, gradients by {of_gradients:.2g}")


def in_graph_steps(variant: Callable[[Batch], object]) -> Variant:
    """Mark the beginning of a step for CUDA graphs: outputs of the last one may be overwritten."""

    def step(batch: Batch) -> None:
        torch.compiler.cudagraph_mark_step_begin()
        variant(batch)

    return step


def attention(setup: Setup, report: Report) -> None:
    """Every attention kernel: forward and backward, of all tokens and of the masked alone, with its errors."""
    kernels.measure(setup.bench(report, "base"), report, setup.sizes.rounds)
