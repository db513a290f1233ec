"""The stages that time a training step: base, large, more images, CUDA graphs, autotuning; and the attention kernels.

`warm` compiles ahead what `base` and `large` will run, so that these find it in the cache.
"""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig

from beit_pretrain.benchmarks.attention import make_case, measured
from beit_pretrain.benchmarks.compare import compared
from beit_pretrain.benchmarks.cost import measured_peak
from beit_pretrain.benchmarks.gpu.report import Report
from beit_pretrain.benchmarks.gpu.setup import Setup
from beit_pretrain.benchmarks.inputs import Batch, Bench, make_batch, make_bench
from beit_pretrain.benchmarks.peers import peer_steps
from beit_pretrain.benchmarks.step import (
    STEPS,
    Gradients,
    Variant,
    distance,
    facts,
    first_step,
    flops_per_image,
    gradients,
    measured_rounds,
    memory,
    on_gpu,
    our_steps,
    ratios,
)

OURS = ("ours_cached", "ours_tokenizer")
PEERS = ("reference", "reference_compiled", "reference_tokenizer", "timm", "transformers")
SPARE = 4.0  # seconds of a stage's time that are kept for its end
COMPILING, COMPILED = 60.0, 25.0  # seconds that a peer's first step may take, compiled then or found in the cache
LOSS_OFF, GRADIENTS_OFF = 1e-2, 5e-2  # relative difference of a step under two settings, from which on they are wrong


def base(setup: Setup, report: Report) -> None:
    """A step of base next to others', interleaved."""
    in_turn(setup, report, base_config(setup), ("ours", *OURS), PEERS)


def large(setup: Setup, report: Report) -> None:
    """A step of large."""
    in_turn(setup, report, large_config(setup), OURS)


def wide(setup: Setup, report: Report) -> None:
    """A step of base with more images."""
    in_turn(setup, report, setup.config(f"batch_size={setup.sizes.wide}"), OURS[:1])


def wider(setup: Setup, report: Report) -> None:
    """A step of base with still more images."""
    in_turn(setup, report, setup.config(f"batch_size={setup.sizes.wider}"), OURS[:1])


def warm(setup: Setup, report: Report) -> None:
    """Compile what `base` and `large` run, but for what `compile` compiles meanwhile."""
    with report.part("base"):
        bench = make_bench(base_config(setup))
        reference = peer_steps(bench, ["reference_compiled"])["reference_compiled"]
        report(started={"base": {"reference_compiled": first_step(bench, reference)}})
        warmed(setup).write_text("")
        del bench, reference
    with report.part("large"):
        torch._dynamo.reset()
        bench = make_bench(large_config(setup))
        own = our_steps(bench)
        for name in OURS:
            report(started={"large": {name: first_step(bench, own[name])}})


def warmed(setup: Setup) -> Path:
    """A file that is there if the compiled reference is in the cache, for these settings."""
    name = hashlib.sha256(repr((setup.words, setup.sizes)).encode()).hexdigest()[:16]
    return setup.scratch / f"reference-compiled-{name}"


def base_config(setup: Setup) -> DictConfig:
    return setup.config(f"batch_size={setup.sizes.base}")


def large_config(setup: Setup) -> DictConfig:
    return setup.config(f"batch_size={setup.sizes.large}", experiment="large_22k")


def in_turn(setup: Setup, report: Report, cfg: DictConfig, names: tuple[str, ...], peers: tuple[str, ...] = ()) -> None:
    """Our variants of a step and others', interleaved. A variant that fails is reported, and left out."""
    bench = make_bench(cfg)
    report(about=facts(bench, cfg))
    own, variants = our_steps(bench), {}
    with report.part("operations"):
        report(flops_per_image=flops_per_image(bench))
    for name in names:
        with report.part(name):
            report(started={name: first_step(bench, own[name])})
            variants[name] = own[name]
    if not variants:
        raise RuntimeError("none of our variants ran")
    with report.part("memory"):  # before others' networks are there
        report(memory=memory(bench, next(iter(variants.values()))))
    with report.part("peak"):
        report(peak_flops=measured_peak(bench.device, bench.bf16, bench.now))
    for name in peers:
        with report.part(name):
            need = SPARE
            if "compiled" in name and not setup.tiny:
                need = COMPILED if warmed(setup).is_file() else COMPILING
            if setup.left() < need:
                raise TimeoutError(f"left out: {setup.left():.0f} s are left, it may need {need:.0f}")
            variant = peer_steps(bench, [name])[name]
            report(started={name: first_step(bench, variant)})
            variants[name] = variant
    rounds_until_late(setup, report, bench, variants)


def triton(setup: Setup, report: Report) -> None:
    """A step of base by torch's attention and by our own."""
    compared_settings(setup, report, setup.sizes.base, "attention=sdpa", "attention=triton")


def graphs(setup: Setup, report: Report) -> None:
    """A step of few images, without and with CUDA graphs."""
    compared_settings(setup, report, setup.sizes.graphs, "compile=default", "compile=reduce-overhead")


def autotune(setup: Setup, report: Report) -> None:
    """A step of base with every product tuned."""
    compared_settings(setup, report, setup.sizes.base, "compile=default", "compile=max-autotune-no-cudagraphs")


def compared_settings(setup: Setup, report: Report, batch_size: int, usual: str, other: str) -> None:
    """`ours` with one setting and with another, in turn; each with a network of its own, from the same weights.

    Before the first step, loss and gradients of both are compared.
    """
    benches: dict[str, Bench] = {}
    variants: dict[str, Variant] = {}
    numbers: dict[str, Gradients] = {}
    for word in (usual, other):
        cfg = setup.config(f"batch_size={batch_size}", forced=(word,))
        with report.part(word):
            bench = make_bench(cfg)
            report(about=facts(bench, cfg))
            variant = in_graph_steps(our_steps(bench)["ours"])

            def one(batch: Batch, word: str = word, bench: Bench = bench) -> None:
                numbers[word] = gradients(bench, batch)

            started = first_step(bench, in_graph_steps(one))
            report(started={word: started})
            if bench.module.compile_mode is not None and "graphs" not in started:
                raise RuntimeError(f"{word} compiled nothing: it ran what the other setting had compiled")
            variant(make_batch(bench, 0))
            benches[word], variants[word] = bench, variant
    if not variants:
        raise RuntimeError("neither setting ran")
    with report.part("numbers"):
        compare_numbers(report, numbers, usual, other)
    numbers.clear()
    rounds_until_late(setup, report, next(iter(benches.values())), variants, usual)


def compare_numbers(report: Report, numbers: dict[str, Gradients], usual: str, other: str) -> None:
    """Report how far a step's loss and gradients are apart under two settings. Raises RuntimeError if too far."""
    if usual not in numbers or other not in numbers:
        return
    (loss, wanted), (its_loss, found) = numbers[usual], numbers[other]
    of_loss, of_gradients = abs(its_loss / loss - 1), distance(found, wanted)["all"]
    report(numbers={"loss": of_loss, "gradients": of_gradients})
    if not (of_loss < LOSS_OFF and of_gradients < GRADIENTS_OFF):
        raise RuntimeError(f"{other} is not {usual}: loss off by {of_loss:.2g}, gradients by {of_gradients:.2g}")


def in_graph_steps(variant: Variant) -> Variant:
    """Tell CUDA graphs where a step begins: what the last one returned may be overwritten."""

    def step(batch) -> None:
        torch.compiler.cudagraph_mark_step_begin()
        variant(batch)

    return step


def rounds_until_late(
    setup: Setup, report: Report, bench: Bench, variants: dict[str, Variant], usual: str = ""
) -> None:
    """Interleaved rounds while there is time; what they say is reported after each."""
    rounds = measured_rounds(bench, variants, steps=STEPS if on_gpu(bench) else 1)
    next(rounds)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(setup.sizes.rounds):
        start = time.monotonic()
        for name, value in next(rounds).items():
            seconds[name].append(value)
        rates = {name: bench.batch_size / float(np.median(values)) for name, values in seconds.items()}
        found = ratios(seconds)
        if usual in seconds:
            found |= {f"{n}/{usual}": compared(seconds[usual], seconds[n]) for n in seconds if n != usual}
        report(seconds=seconds, images_per_s=rates, ratios={name: each._asdict() for name, each in found.items()})
        if setup.left() < SPARE + 1.2 * (time.monotonic() - start):
            break


def attention(setup: Setup, report: Report) -> None:
    """Every attention kernel: forward and backward, of all tokens and of the masked alone, with its errors."""
    cfg = setup.config(f"batch_size={setup.sizes.base}")
    bench = make_bench(cfg)
    report(about=facts(bench, cfg))
    for masked_only in (False, True):
        with report.part("masked only" if masked_only else "all tokens"):
            case = make_case(bench, cfg.seed, masked_only)
            queries = str(case.queries)
            report(operations={queries: case.operations})
            for name, found in measured(bench, case, rounds=setup.sizes.rounds, warm_up=1):
                report(queries={queries: {name: found}})
            del case
