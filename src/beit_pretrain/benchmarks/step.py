"""`bench step`: how fast a training step is, next to other people's, and what it spends its time on.

All variants take the same images, masks and tokens, in one process, in turn, in an order drawn anew every round, so
that whatever else the machine does slows all of them alike. A step is forward, backward, clipping and fused AdamW. On a
GPU a sample is the mean of several steps between two CUDA events.

Without a tokenizer, from normalised images and known tokens:
* `ours`; `reference`, the authors' release written out plainly, and `reference_compiled`, the same under torch.compile;
  `timm`, with its fused attention and a token head on all patches; `transformers` and `transformers_eager`.
With one, from what a loader brings:
* `ours_tokenizer`: two uint8 views, jitter and normalisation on the device, our encoder;
* `ours_cached`: one uint8 view with its tokens, jitter and normalisation on the device;
* `reference_tokenizer`: float images that the loader has jittered, the `dall_e` package's encoder in its own precision.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterable, Iterator
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from beit_pretrain.benchmarks.compare import Ratio, compared
from beit_pretrain.benchmarks.cost import counted_flops, kept_bytes, measured_peak, peak_bytes, state_bytes
from beit_pretrain.benchmarks.inputs import Batch, Bench, configured, make_batch, make_bench
from beit_pretrain.benchmarks.peers import peer_steps
from beit_pretrain.benchmarks.plots import OF_CLOCK
from beit_pretrain.benchmarks.timing import Clock, seconds_per_call
from beit_pretrain.data.datamodule import PretrainData
from beit_pretrain.data.dataset import BatchSchedule
from beit_pretrain.engine.compile import CompileCounts, compile_counts
from beit_pretrain.engine.optim import clip_gradients
from beit_pretrain.engine.tasks import data_settings, pretrain_views
from beit_pretrain.engine.trainer import as_user_errors
from beit_pretrain.tables import table
from beit_pretrain.tasks.pretrain import MIMOutput
from beit_pretrain.tokenizers.tokenizer import view_size
from beit_pretrain.transforms.jitter import jittered_view

BATCHES = 4  # different ones, in turn
STEPS = 5  # of a sample on a GPU, unless bench.steps says it
PARTS = 6  # steps in which the parts are timed; the first is not counted
PAIRS = (  # what is divided by what
    *(("ours", other) for other in ("reference", "reference_compiled", "timm", "transformers", "transformers_eager")),
    *((own, "reference_tokenizer") for own in ("ours_tokenizer", "ours_cached")),
)
Variant = Callable[[Batch], None]
Gradients = tuple[float, dict[str, Tensor]]  # the loss, and the gradients by name


def our_steps(bench: Bench) -> dict[str, Variant]:
    """`ours`, `ours_tokenizer`, `ours_cached`: the LightningModule's step, without Lightning."""
    module = bench.module
    optimizer = configured(module.model, module.optim)

    def step(batch: dict[str, Tensor], view: Tensor, tokens: Tensor) -> None:
        found = forward(bench, batch, view, tokens)
        backward(bench, batch, found)
        optimizer.step()
        optimizer.zero_grad()

    def from_loader(batch: dict[str, Tensor]) -> None:
        step(batch, *module.prepare(batch))

    return {
        "ours": lambda batch: step(batch.ours, batch.view, batch.ours["tokens"]),
        "ours_tokenizer": lambda batch: from_loader({k: v for k, v in batch.ours.items() if k != "tokens"}),
        "ours_cached": lambda batch: from_loader({k: v for k, v in batch.ours.items() if k != "token_image"}),
    }


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
    clip_gradients(bench.module.model.parameters(), bench.module.optim.clip, slots / found.masked)


def gradients(bench: Bench, batch: Batch) -> Gradients:
    """Loss, the mean over the masked patches, and all gradients."""
    model: nn.Module = bench.module.model
    model.zero_grad()
    found = forward(bench, batch.ours, batch.view, batch.ours["tokens"])
    loss = found.loss_sum / found.masked
    loss.backward()
    kept = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.item(), kept


def distance(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Any]:
    """Relative norm of the difference of all gradients together, and of the tensor that is off most."""
    norms = {name: ((found[name] - wanted[name]).norm().item(), wanted[name].norm().item()) for name in wanted}
    each = {name: off / norm for name, (off, norm) in norms.items() if norm > 0}
    worst = max(each, key=lambda name: each[name])
    together = [sum(pair[place] ** 2 for pair in norms.values()) ** 0.5 for place in (0, 1)]
    return {"all": together[0] / together[1], "worst": each[worst], "where": worst}


def flops_per_image(bench: Bench) -> float:
    """Operations of forward and backward, counted on the uncompiled functions."""
    batch = make_batch(bench, 0)

    def once() -> None:
        backward(bench, batch.ours, forward(bench, batch.ours, batch.view, batch.ours["tokens"]))

    with bench.uncompiled():
        operations = counted_flops(once)
    bench.module.model.zero_grad()
    return operations / bench.batch_size


def first_step(bench: Bench, variant: Variant) -> dict[str, Any]:
    """Take the first step of a variant: its seconds, and what torch.compile made of it."""
    batch, before, clock = make_batch(bench, 0), compile_counts(), Clock(bench)
    with clock("first"):
        variant(batch)
    counts = compile_counts().since(before)
    return {"first_step": clock.seconds["first"][0], **(counts._asdict() if any(counts) else {})}


def measured_rounds(
    bench: Bench, variants: dict[str, Variant], seed: int = 0, steps: int = 1
) -> Iterator[dict[str, float]]:
    """Rounds without end: seconds of a step of every variant, the mean of so many steps in a row."""
    batches = [make_batch(bench, number) for number in range(BATCHES)]
    order = np.random.default_rng(seed)

    def sample(variant: Variant, start: int) -> float:
        return seconds_per_call(bench, lambda number: variant(batches[(start + number) % BATCHES]), steps)

    for number in count():
        for batch in batches:  # other draws of drop path every round
            batch.ours["position"] = torch.arange(bench.batch_size, device=bench.device) + number * bench.batch_size
        found = {str(name): sample(variants[name], number) for name in order.permutation(list(variants))}
        yield {name: found[name] for name in variants}


def shares(bench: Bench, batches: Iterator[dict[str, Tensor]], with_data: bool) -> dict[str, float]:
    """Seconds (medians) of the parts of a step, each waited for, on batches from the host with the tokenizer on line.

    `with_data`: the batches come from a real loader, and waiting for it is a part.
    """
    module, clock = bench.module, Clock(bench)
    optimizer = configured(module.model, module.optim)
    for _ in range(PARTS):
        with clock("data wait"):
            on_host = next(batches)
        with clock("transfer"):
            batch = {name: tensor.to(bench.device) for name, tensor in on_host.items()}
        with clock("device transforms"):
            view, token_image = jittered_view(batch, "image"), jittered_view(batch, "token_image")
        with clock("tokenizer"):
            tokens = bench.tokenizer.encode(token_image)
        with clock("forward"):
            found = forward(bench, batch, view, tokens)
        with clock("backward"):
            backward(bench, batch, found)
        with clock("optimiser"):
            optimizer.step()
            optimizer.zero_grad()
        with clock("logging"):
            module.count(found, tokens)
            module._read()
    module._sums.clear()
    parts = {name: float(np.median(values[1:])) for name, values in clock.seconds.items()}
    return parts if with_data else {name: value for name, value in parts.items() if name != "data wait"}


def host_batches(cfg: DictConfig, bench: Bench) -> Iterable[dict[str, Tensor]]:
    """Batches in the host's memory: of `data.train`, if it is given, else random ones.

    Opens the shards, but makes no batch and starts no worker before it is iterated over.
    """
    if cfg.data.train is None:
        every = (make_batch(bench, number).ours for number in range(PARTS))
        return ({name: tensor.cpu() for name, tensor in ours.items() if name != "tokens"} for ours in every)
    with as_user_errors():
        side = view_size(bench.module.model.grid, bench.tokenizer, cfg.data.token_image_size)
        data = PretrainData(views=pretrain_views(cfg, side), masking=bench.masking, **data_settings(cfg))
    dataset = data.train_dataset(BatchSchedule(bench.batch_size))
    return DataLoader(dataset, batch_size=None, sampler=range(PARTS), num_workers=cfg.data.num_workers)


def bench_step(cfg: DictConfig) -> None:
    """Print images/s of every variant, the ratios with their intervals, shares of time, memory; and all as JSON."""
    bench = make_bench(cfg)
    names = variant_names(cfg, bench)
    on_host = host_batches(cfg, bench)  # before the rounds, which take long: what is wrong with the data is said now
    own = our_steps(bench)
    operations = flops_per_image(bench)
    variants = {name: own[name] for name in own if name in names}
    started = {name: first_step(bench, variant) for name, variant in variants.items()}
    used = memory(bench, next(iter(variants.values()), own["ours"]))  # before the others' networks are there
    variants |= peer_steps(bench, names)
    started |= {name: first_step(bench, variant) for name, variant in variants.items() if name not in started}
    before = compile_counts()
    rounds = measured_rounds(bench, variants, cfg.seed, cfg.bench.steps or (STEPS if on_gpu(bench) else 1))
    taken = list(tqdm(islice(rounds, cfg.bench.warm_up + cfg.bench.rounds), desc="measuring", unit=" rounds"))
    kept = taken[cfg.bench.warm_up :]
    seconds = {name: [each[name] for each in kept] for name in variants}
    found: dict[str, Any] = {
        "ratios": ratios(seconds),
        "shares": shares(bench, iter(on_host), cfg.data.train is not None),
        "memory": used,
        "started": started,
        "compiled_later": compile_counts().since(before)._asdict(),
        "flops_per_image": operations,
        "peak_flops": measured_peak(bench.device, bench.bf16, bench.now),
    }
    rates = {name: bench.batch_size / float(np.median(values)) for name, values in seconds.items()}
    if "ours" in rates:
        found["utilisation"] = operations * rates["ours"] / found["peak_flops"]
    report(bench, seconds, found, OF_CLOCK[cfg.bench.clock])
    found["ratios"] = {name: ratio._asdict() for name, ratio in found["ratios"].items()}
    print(json.dumps({"bench": "step", **facts(bench, cfg), **rates, **found, "seconds": seconds}))


def variant_names(cfg: DictConfig, bench: Bench) -> list[str]:
    """Those of the config; compiled ones of others only where ours are compiled."""
    return [name for name in cfg.bench.variants if bench.module.compile_mode is not None or "compiled" not in name]


def ratios(seconds: dict[str, list[float]]) -> dict[str, Ratio]:
    """How many times as fast ours are as others, for the variants that were measured."""
    return {f"{a}/{b}": compared(seconds[b], seconds[a]) for a, b in PAIRS if a in seconds and b in seconds}


def on_gpu(bench: Bench) -> bool:
    return bench.device.type == "cuda"


def memory(bench: Bench, step: Variant) -> dict[str, int]:
    """Bytes: weights, gradients and moments; what an uncompiled forward pass keeps; the most in use in a step on a GPU.

    The last is of all that this process has on the GPU, so it is measured before others' networks are there.
    """
    batch = make_batch(bench, 0)
    with bench.uncompiled():
        kept = kept_bytes(lambda: forward(bench, batch.ours, batch.view, batch.ours["tokens"]))
    used = {"state": state_bytes(bench.module.model), "activations": kept}
    if on_gpu(bench):
        used["peak"] = peak_bytes(bench.device, lambda: step(batch))
    return used


def report(bench: Bench, seconds: dict[str, list[float]], found: dict[str, Any], of_clock: str) -> None:
    """The tables for people; `of_clock` says which seconds they are."""
    rows = []
    for name, values in seconds.items():
        low, middle, high = (1000 * np.percentile(values, share) for share in (10, 50, 90))
        rows.append([name, f"{1000 * bench.batch_size / middle:.4g}", f"{middle:.4g}", f"{low:.4g} to {high:.4g}"])
    print(table(["variant", f"images/s{of_clock}", "ms a step", "10 % to 90 %"], rows))
    ratios: dict[str, Ratio] = found["ratios"]
    rows = [[name, f"{r.median:.3f}", f"{r.low:.3f} to {r.high:.3f}", str(r.pairs)] for name, r in ratios.items()]
    if rows:
        interval = next(iter(ratios.values())).interval
        print("\n" + table(["times as fast", "median", interval, "pairs"], rows))
    total = sum(found["shares"].values())
    rows = [[name, f"{1000 * value:.4g}", f"{value / total:.1%}"] for name, value in found["shares"].items()]
    print("\n" + table(["part of a step, tokenizer on line", "ms", "share"], rows))
    for name, start in found["started"].items():
        if "graphs" in start:
            print(f"\n{name}, first step: {CompileCounts(*(start[field] for field in CompileCounts._fields))}")
    print("\nmemory: " + ", ".join(f"{name} {size / 2**30:.2f} GiB" for name, size in found["memory"].items()))
    used = f"; ours uses {found['utilisation']:.1%} of it" if "utilisation" in found else ""
    print(
        f"{found['flops_per_image'] / 1e9:.1f} GFLOP an image; large matrix products run at "
        f"{found['peak_flops'] / 1e12:.3g} TFLOP/s{of_clock} here{used}"
    )


def facts(bench: Bench, cfg: DictConfig) -> dict[str, Any]:
    """On what, and with which settings, it was measured."""
    device = torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else platform.machine()
    return {
        "experiment": cfg.name,
        "device": device,
        "clock": cfg.bench.clock,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "precision": "bf16-mixed" if bench.bf16 else "32-true",
        "compile": bench.module.compile_mode,
        "batch_size": bench.batch_size,
        "parameters": sum(p.numel() for p in bench.module.model.parameters()),
    }
