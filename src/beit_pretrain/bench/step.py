"""`bench step`: how fast a training step is, next to other people's, and what it spends its time on.

All variants take the same images, masks and tokens, in one process, in turn, in an order drawn anew every round, so
that whatever else the machine does slows all of them alike. A step is forward, backward, clipping and fused AdamW.

Without a tokenizer, from normalised images and known tokens:
* `ours`; `reference`, the authors' release written out plainly; `timm`, with its fused attention and a token head on
  all patches; `transformers` and `transformers_eager`.
With one, from what a loader brings:
* `ours_tokenizer`: two uint8 views, jitter and normalisation on the device, our encoder;
* `ours_cached`: one uint8 view with its tokens, jitter and normalisation on the device;
* `reference_tokenizer`: float images that the loader has jittered, the `dall_e` package's encoder in its own precision.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from beit_pretrain.bench.compare import Ratio, compared
from beit_pretrain.bench.cost import counted_flops, kept_bytes, measured_peak, state_bytes
from beit_pretrain.bench.inputs import Batch, Bench, configured, make_batch, make_bench
from beit_pretrain.bench.peers import peer_steps
from beit_pretrain.data.batches import Plan
from beit_pretrain.data.datamodule import PretrainData
from beit_pretrain.images.views import jittered_view
from beit_pretrain.runs.tasks import data_settings, pretrain_views
from beit_pretrain.runs.trainer import building
from beit_pretrain.tables import table
from beit_pretrain.tokens.tokenizer import view_size
from beit_pretrain.training.optim import clip_gradients
from beit_pretrain.training.pretrain import Found

BATCHES = 4  # different ones, in turn
PARTS = 6  # steps in which the parts are timed; the first is not counted
PAIRS = (  # what is divided by what
    *(("ours", other) for other in ("reference", "timm", "transformers", "transformers_eager")),
    *((own, "reference_tokenizer") for own in ("ours_tokenizer", "ours_cached")),
)
OF_CLOCK = {"wall": "", "cpu": " of processor time"}  # of `bench.clock`: what follows "a second" in a unit
Variant = Callable[[Batch], None]


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


def forward(bench: Bench, batch: dict[str, Tensor], view: Tensor, tokens: Tensor) -> Found:
    """As `Pretraining.training_step` does it."""
    module = bench.module
    with bench.precision():
        objective = module.fast(module.objective)
        found: Found = objective(view, batch["mask"], batch["mask_index"], tokens, module.drop(batch))
    return found


def backward(bench: Bench, batch: dict[str, Tensor], found: Found) -> None:
    """Gradients of the mean over the masked patches, clipped: as in `TrainedModule.configure_gradient_clipping`."""
    slots = batch["mask_index"].numel()
    (found.loss_sum / slots).backward()
    clip_gradients(bench.module.model.parameters(), bench.module.optim.clip, slots / found.masked)


def measure(
    bench: Bench, variants: dict[str, Variant], rounds: int, warm_up: int, seed: int = 0
) -> dict[str, list[float]]:
    """Seconds of a step of every variant in every round."""
    batches = [make_batch(bench, number) for number in range(BATCHES)]
    order, clock = np.random.default_rng(seed), Clock(bench)
    for number in tqdm(range(-warm_up, rounds), desc="measuring", unit=" rounds"):
        if number == 0:
            clock.seconds.clear()
        batch = batches[number % BATCHES]
        # Other draws of drop path every round.
        batch.ours["position"] = torch.arange(bench.batch_size, device=bench.device) + abs(number) * bench.batch_size
        for name in order.permutation(list(variants)):
            with clock(str(name)):
                variants[name](batch)
    return {name: clock.seconds[name] for name in variants}


class Clock:
    """Seconds of named pieces of work, each waited for on the device."""

    def __init__(self, bench: Bench):
        self.bench = bench
        self.seconds: dict[str, list[float]] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.bench.wait()
        start = self.bench.now()
        yield
        self.bench.wait()
        self.seconds.setdefault(name, []).append(self.bench.now() - start)


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
    with building():
        side = view_size(bench.module.model.grid, bench.tokenizer, cfg.data.token_image_size)
        data = PretrainData(views=pretrain_views(cfg, side), masking=bench.masking, **data_settings(cfg))
    dataset = data.train_dataset(Plan(bench.batch_size))
    return DataLoader(dataset, batch_size=None, sampler=range(PARTS), num_workers=cfg.data.workers)


def bench_step(cfg: DictConfig) -> None:
    """Print images/s of every variant, the ratios with their intervals, shares of time, memory; and all as JSON."""
    bench = make_bench(cfg)
    names = list(cfg.bench.variants)
    on_host = host_batches(cfg, bench)  # before the rounds, which take long: what is wrong with the data is said now
    own = our_steps(bench)
    variants = {**{n: v for n, v in own.items() if n in names}, **peer_steps(bench, names)}
    operations = counted_flops(lambda: own["ours"](make_batch(bench, 0))) / bench.batch_size
    seconds = measure(bench, variants, cfg.bench.rounds, cfg.bench.warm_up, cfg.seed)
    found: dict[str, Any] = {
        "ratios": {f"{a}/{b}": compared(seconds[b], seconds[a]) for a, b in PAIRS if a in seconds and b in seconds},
        "shares": shares(bench, iter(on_host), cfg.data.train is not None),
        "memory": memory(bench),
        "flops_per_image": operations,
        "peak_flops": measured_peak(bench.device, bench.bf16, bench.now),
    }
    rates = {name: bench.batch_size / float(np.median(values)) for name, values in seconds.items()}
    if "ours" in rates:
        found["utilisation"] = operations * rates["ours"] / found["peak_flops"]
    report(bench, seconds, found, OF_CLOCK[cfg.bench.clock])
    found["ratios"] = {name: ratio._asdict() for name, ratio in found["ratios"].items()}
    print(json.dumps({"bench": "step", **facts(bench, cfg), **rates, **found, "seconds": seconds}))


def memory(bench: Bench) -> dict[str, int]:
    """Bytes of ours: weights, gradients and moments; what a forward pass keeps; on a GPU the most that was in use."""
    batch = make_batch(bench, 0)
    kept = kept_bytes(lambda: forward(bench, batch.ours, batch.view, batch.ours["tokens"]))
    used = {"state": state_bytes(bench.module.model), "activations": kept}
    if bench.device.type == "cuda":
        used["peak"] = torch.cuda.max_memory_allocated(bench.device)
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
