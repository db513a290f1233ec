"""`bench step`: how fast a training step is, next to other people's, and what it spends its time on.

All variants take the same images, masks and tokens, in one process, in turn. A step is forward, backward, clipping and
fused AdamW. On a GPU a sample is the mean of several steps between two CUDA events.

Without a tokenizer, from normalised images and known tokens:
* `ours`; `reference`, the authors' release written out plainly, and `reference_compiled`, the same under torch.compile;
  `timm`, with its fused attention and a token head on all patches; `transformers` and `transformers_eager`.
With one, from what a loader brings:
* `ours_tokenizer`: two uint8 views, jitter and normalisation on the device, our encoder;
* `ours_cached`: one uint8 view with its tokens, jitter and normalisation on the device;
* `reference_tokenizer`: float images that the loader has jittered, the `dall_e` package's encoder in its own precision.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from beit_pretrain.benchmarks import measure
from beit_pretrain.benchmarks.blocks import Block, Results, milliseconds, step_blocks, utilisation
from beit_pretrain.benchmarks.inputs import Batch, Bench, make_batch, make_bench
from beit_pretrain.benchmarks.peers import peer_step
from beit_pretrain.benchmarks.report import Report
from beit_pretrain.config import as_user_errors
from beit_pretrain.data.dataset import BatchSchedule
from beit_pretrain.engine.compile import compile_counts
from beit_pretrain.engine.optim import clip_gradients
from beit_pretrain.tasks.common import data_settings
from beit_pretrain.tasks.pretrain import MIMOutput, PretrainData, two_views
from beit_pretrain.tokenizers.tokenizer import view_size
from beit_pretrain.transforms.jitter import jittered_view

BATCHES = 4  # different batches, used in turn
STEPS = 5  # of a sample on a GPU, unless bench.steps says it
PARTS = 6  # steps in which the parts are timed; the first is not counted
SPARE = 4.0  # seconds of a stage's time that are kept for its end
PAIRS = (  # of which ratios are reported
    *(("ours", other) for other in ("reference", "reference_compiled", "timm", "transformers", "transformers_eager")),
    *((own, "reference_tokenizer") for own in ("ours_tokenizer", "ours_cached")),
)
Variant = Callable[[Batch], object]
Gradients = tuple[float, dict[str, Tensor]]  # the loss, and the gradients by name


def our_steps(bench: Bench) -> dict[str, Variant]:
    """`ours`, `ours_tokenizer`, `ours_cached`: the LightningModule's step, without Lightning."""
    optimizer, prepare = bench.optimizer(), bench.module.prepare

    def from_loader(batch: dict[str, Tensor]) -> None:
        take_step(bench, optimizer, batch, *prepare(batch))

    return {
        "ours": lambda batch: take_step(bench, optimizer, batch.ours, batch.view, batch.ours["tokens"]),
        "ours_tokenizer": lambda batch: from_loader(batch.without("tokens")),
        "ours_cached": lambda batch: from_loader(batch.without("token_image")),
    }


def take_step(
    bench: Bench, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor], view: Tensor, tokens: Tensor
) -> MIMOutput:
    """One optimiser step; returns the output of its forward pass."""
    found = forward(bench, batch, view, tokens)
    backward(bench, batch, found)
    optimizer.step()
    optimizer.zero_grad()
    return found


def forward(bench: Bench, batch: dict[str, Tensor], view: Tensor, tokens: Tensor) -> MIMOutput:
    """As `Pretraining.training_step` does it."""
    module = bench.module
    with bench.precision():
        objective = module.maybe_compile(module.objective)
        found: MIMOutput = objective(view, batch["mask"], batch["mask_index"], tokens, module.drop_path_noise(batch))
    return found


def backward(bench: Bench, batch: dict[str, Tensor], found: MIMOutput) -> None:
    """Gradients of the mean over the masked patches, clipped: as in `TrainedModule.configure_gradient_clipping`."""
    slots = batch["mask_index"].numel()
    (found.loss_sum / slots).backward()
    clip_gradients(bench.model.parameters(), bench.module.optim.clip, slots / found.masked)


def on_images(bench: Bench, batch: Batch) -> MIMOutput:
    """The forward pass of `ours`."""
    return forward(bench, batch.ours, batch.view, batch.ours["tokens"])


def gradients(bench: Bench, batch: Batch) -> Gradients:
    """Loss, the mean over the masked patches, and all gradients."""
    bench.model.zero_grad()
    found = on_images(bench, batch)
    loss = found.loss_sum / found.masked
    loss.backward()
    kept = {name: p.grad.clone() for name, p in bench.model.named_parameters() if p.grad is not None}
    bench.model.zero_grad()
    return loss.item(), kept


def distance(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Any]:
    """Relative norm of the difference of all gradients together, and of the tensor that is off most."""
    norms = {name: ((found[name] - wanted[name]).norm().item(), wanted[name].norm().item()) for name in wanted}
    each = {name: off / norm for name, (off, norm) in norms.items() if norm > 0}
    worst = max(each, key=lambda name: each[name])
    off, whole = (math.hypot(*column) for column in zip(*norms.values(), strict=True))
    return {"all": off / whole, "worst": each[worst], "where": worst}


def costs(bench: Bench, step: Variant) -> dict[str, Any]:
    """Operations an image, and bytes: of weights, gradients and moments, what an uncompiled forward pass keeps, and the
    most in use in a step on a GPU: that is of the whole process, so it is measured before others' networks are there.
    """
    batch = make_batch(bench, 0)
    with bench.uncompiled():
        operations = measure.counted_flops(lambda: backward(bench, batch.ours, on_images(bench, batch)))
        bench.model.zero_grad()
        kept = measure.kept_bytes(lambda: on_images(bench, batch))
    memory = {"state": measure.state_bytes(bench.model), "activations": kept}
    if bench.on_gpu:
        memory["peak"] = measure.peak_bytes(bench.device, lambda: step(batch))
    return {"flops_per_image": operations / bench.batch_size, "memory": memory}


def first_step(bench: Bench, variant: Variant) -> dict[str, Any]:
    """Take the first step of a variant: its seconds, and what torch.compile made of it."""
    batch, before = make_batch(bench, 0), compile_counts()
    seconds = bench.seconds(lambda: variant(batch))
    counts = compile_counts().since(before)
    return {"first_step": seconds, **(counts._asdict() if any(counts) else {})}


def started(
    bench: Bench, names: Sequence[str], report: Report, check_time: Callable[[str], object] = lambda name: None
) -> dict[str, Variant]:
    """Take the first step of every variant, ours first, and report costs and failures; returns the working variants.

    `check_time`, called with a name before a network of others is built, may raise. Raises RuntimeError if ours fail.
    """
    own: dict[str, Variant] = our_steps(bench)
    variants: dict[str, Variant] = {}
    for name in (name for name in names if name in own):
        with report.part(name):
            report(started={name: first_step(bench, own[name])})
            variants[name] = own[name]
    if own.keys() & set(names) and not variants:
        raise RuntimeError("none of our variants ran")
    with report.part("costs"):
        report(**costs(bench, next(iter(variants.values()), own["ours"])))
    with report.part("peak"):
        report(peak_flops=measure.measured_peak(bench.device, bench.bf16, bench.now))
    for name in (name for name in names if name not in own):
        with report.part(name):
            check_time(name)
            variant = peer_step(bench, name)
            report(started={name: first_step(bench, variant)})
            variants[name] = variant
    return variants


def measure_rounds(
    bench: Bench,
    variants: dict[str, Variant],
    report: Report,
    rounds: int,
    warm_up: int = 1,
    steps: int | None = None,
    seed: int = 0,
    pairs: Sequence[tuple[str, str]] = PAIRS,
    left: Callable[[], float] = lambda: math.inf,
) -> None:
    """Report seconds of a step of every variant, the mean of `steps` in a row, and rates and ratios, after every round.

    Ends early if the seconds `left` are too few for another round.
    """
    batches, count = [make_batch(bench, number) for number in range(BATCHES)], steps or (STEPS if bench.on_gpu else 1)

    def sample(variant: Variant, number: int) -> float:
        for batch in batches:  # other draws of drop path every round
            batch.ours["position"] = torch.arange(bench.batch_size, device=bench.device) + number * bench.batch_size

        def work() -> None:
            for step in range(number, number + count):
                variant(batches[step % BATCHES])

        return bench.seconds(work) / count

    start = time.monotonic()
    work = {name: partial(sample, variant) for name, variant in variants.items()}
    for number, seconds in enumerate(measure.in_turn(work, rounds, warm_up, seed), start=1):
        rates = {name: bench.batch_size / float(np.median(values)) for name, values in seconds.items()}
        report(seconds=seconds, images_per_s=rates, ratios=measure.ratios(seconds, pairs))
        used = utilisation(report.found, "ours_cached")
        said = ", ".join(f"{name} {rate:.5g}" for name, rate in rates.items())
        report.write(headline=f"images/s: {said}" + (f"; {used:.1%} of the peak" if used else ""))
        if left() < SPARE + 1.2 * (time.monotonic() - start) / (warm_up + number):
            break


def shares(bench: Bench, batches: Iterator[dict[str, Tensor]]) -> dict[str, float]:
    """Median seconds of the parts of a step, each waited for, on batches from the host with the tokenizer on line."""
    module, seconds = bench.module, dict[str, list[float]]()
    optimizer = bench.optimizer()

    @contextmanager
    def part(name: str) -> Iterator[None]:
        bench.wait()
        start = bench.now()
        yield
        bench.wait()
        seconds.setdefault(name, []).append(bench.now() - start)

    for _ in range(PARTS):
        with part("data wait"):
            on_host = next(batches)
        with part("transfer"):
            batch = {name: tensor.to(bench.device) for name, tensor in on_host.items()}
        with part("device transforms"):
            view, token_image = jittered_view(batch, "image"), jittered_view(batch, "token_image")
        with part("tokenizer"):
            tokens = bench.tokenizer.encode(token_image)
        with part("forward"):
            found = forward(bench, batch, view, tokens)
        with part("backward"):
            backward(bench, batch, found)
        with part("optimiser"):
            optimizer.step()
            optimizer.zero_grad()
        with part("logging"):
            module.count(found, tokens)
            module._read()
    module._sums.clear()
    return {name: float(np.median(values[1:])) for name, values in seconds.items()}


def host_batches(cfg: Any, bench: Bench) -> Iterable[dict[str, Tensor]]:
    """Batches in the host's memory: of `data.train`, if it is given, else random ones.

    Opens the shards, but makes no batch and starts no worker before it is iterated over.
    """
    if cfg.data.train is None:
        every = (make_batch(bench, number).without("tokens") for number in range(PARTS))
        return ({name: tensor.cpu() for name, tensor in batch.items()} for batch in every)
    with as_user_errors():
        side = view_size(bench.model.grid, bench.tokenizer, cfg.data.token_image_size)
        data = PretrainData(views=two_views(cfg, side), masking=bench.masking, **data_settings(cfg))
    dataset = data.train_dataset(BatchSchedule(bench.batch_size))
    return DataLoader(dataset, batch_size=None, sampler=range(PARTS), num_workers=cfg.data.num_workers)


def bench_step(cfg: Any) -> Results:
    bench, report = make_bench(cfg), Report()
    on_host = host_batches(cfg, bench)  # before the long rounds: problems with the data show at once
    report(about=bench.about)
    variants, before = started(bench, variant_names(cfg, bench), report), compile_counts()
    measure_rounds(bench, variants, report, cfg.bench.rounds, cfg.bench.warm_up, cfg.bench.steps, cfg.seed)
    parts = shares(bench, iter(on_host))
    if cfg.data.train is None:  # no loader was waited for
        del parts["data wait"]
    report(shares=parts, compiled_later=compile_counts().since(before)._asdict())
    if used := utilisation(report.found, "ours"):
        report(utilisation=used)
    rows = [[name, milliseconds(value), f"{value / sum(parts.values()):.1%}"] for name, value in parts.items()]
    blocks = [*step_blocks(report.found), Block(("part of a step, tokenizer on line", "ms", "share"), rows)]
    about, rates = (report.found.pop(name) for name in ("about", "images_per_s"))
    return blocks, {"bench": "step", **about, **rates, **report.found}


def variant_names(cfg: Any, bench: Bench) -> list[str]:
    """Variants of the config; compiled peers only where ours is compiled."""
    return [name for name in cfg.bench.variants if bench.module.compile_mode is not None or "compiled" not in name]
