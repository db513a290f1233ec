"""The stages that compare numbers: attention and tokens with more precise ones, compiled functions with eager ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from beit_pretrain.bench.attention import exact, make_case, relative_errors, results
from beit_pretrain.bench.gpu.curves import smooth_images
from beit_pretrain.bench.gpu.device import allowing_tf32
from beit_pretrain.bench.gpu.report import Report
from beit_pretrain.bench.gpu.setup import Setup
from beit_pretrain.bench.inputs import Batch, Bench, make_batch, make_bench
from beit_pretrain.bench.kernels import kernels
from beit_pretrain.bench.peers import packages_encoder
from beit_pretrain.bench.step import facts, forward
from beit_pretrain.errors import first_line
from beit_pretrain.tokens.tokenizer import OpenAITokenizer
from beit_pretrain.training.compile import CompileCounts, compile_counts, compile_reasons

OFF = 1e-3  # relative difference between compiled and eager in fp32 at which the stage fails
BATCHES = 3  # with which a compiled function is called: none but the first may compile it


def parity(setup: Setup, report: Report) -> None:
    """Relative errors of every attention kernel from float64; how many tokens agree."""
    cfg = setup.config(f"batch_size={setup.sizes.parity}")
    bench = make_bench(cfg)
    report(about=facts(bench, cfg))
    for dtype in (torch.float32, torch.bfloat16, torch.float16)[: 3 if setup.device == "cuda" else 2]:
        for masked_only in (False, True):
            case = make_case(bench, cfg.seed, masked_only, dtype)
            label, wanted = f"{str(dtype).removeprefix('torch.')} {case.queries}", exact(case)
            for name, make in kernels(bench.device).items():
                if name in (
                    "no_bias",
                    "flex",
                ):  # another function; `attention` has flex, which compiles for long
                    continue
                try:
                    report(attention={label: {name: relative_errors(results(make(), case), wanted)}})
                except Exception as error:  # a kernel that refuses a precision is no failure of the stage
                    report(attention={label: {name: f"{type(error).__name__}: {first_line(error)}"}})
    with report.part("tokens"):
        small = [side * bench.tokenizer.downsample for side in bench.module.model.grid]
        draw = torch.Generator(bench.device).manual_seed(cfg.seed)
        report(tokens=token_parity(bench, smooth_images(bench, small, draw)))


@torch.no_grad()
def token_parity(bench: Bench, image: Tensor) -> dict[str, float]:
    """Shares of tokens on which two encoders agree: ours, the package's module, and that in real fp32.

    `distinct`: tokens that occur. `far`: how far the logits of our tokens lie below fp32's largest, at the most, in
    standard deviations of all logits: 0 where they agree, little for near-ties.
    """
    assert isinstance(bench.tokenizer, OpenAITokenizer)
    logits_BVN = varied_logits(bench, image)
    fused = OpenAITokenizer.of(bench.tokenizer.encoder).to(bench.device)  # of the changed weights
    wanted, package, ours = logits_BVN.argmax(1), packages_encoder(bench)(image), fused.encode(image)
    below_BN = logits_BVN.amax(1) - logits_BVN.gather(1, ours.unsqueeze(1)).squeeze(1)
    same = {"ours_and_fp32": ours == wanted, "package_and_fp32": package == wanted, "ours_and_package": ours == package}
    shares = {name: equal.double().mean().item() for name, equal in same.items()}
    far = (below_BN / logits_BVN.std()).max().item()
    return {**shares, "far": far, "tokens": wanted.numel(), "distinct": len(wanted.unique())}


def varied_logits(bench: Bench, image: Tensor) -> Tensor:
    """Logits (B, V, N) of the package's encoder in real fp32, after its output bias was set to give many tokens.

    With random weights alone a few tokens win everywhere, on which any two encoders agree.
    """
    from dall_e import map_pixels

    encoder: Any = bench.tokenizer.encoder  # type: ignore[attr-defined]
    precise: Any = copy.deepcopy(encoder).to(bench.device)
    for module in precise.modules():
        module.use_float16 = False
    with allowing_tf32(False):
        logits = precise(map_pixels(image))
        shift_V = -logits.mean((0, 2, 3))
    encoder.blocks.output.conv.b.add_(shift_V.to(encoder.blocks.output.conv.b.device))
    return (logits + shift_V.view(1, -1, 1, 1)).flatten(2)


def compiled(setup: Setup, report: Report) -> None:
    """Loss and gradients of compiled and eager steps, in fp32 and in training's precision; one graph, compiled once.

    Raises RuntimeError if something was compiled in pieces or more than once, or is off.
    """
    sizes = setup.sizes
    shallow = () if setup.tiny else (f"+model.depth={sizes.shallow}",)
    in_fp32 = setup.config(f"batch_size={sizes.precise}", *shallow, forced=("trainer.precision=32-true",))
    cases: dict[str, Callable[[], list[str]]] = {
        "fp32": lambda: compare_compiled(report, "fp32", in_fp32),
        "training": lambda: compare_compiled(report, "training", setup.config(f"batch_size={sizes.base}")),
        "views": lambda: compare_views(setup, report),
    }
    wrong: list[str] = []
    for name, compare in cases.items():
        said = ["it raised an error"]
        with report.part(name):
            said = compare()
        wrong += [f"{name}: {line}" for line in said]
    if wrong:
        raise RuntimeError("; ".join(wrong))


def compare_compiled(report: Report, name: str, cfg: DictConfig) -> list[str]:
    """Compare one network; returns what is wrong."""
    bench = make_bench(cfg)
    report(about={name: facts(bench, cfg)})
    batches = [make_batch(bench, number) for number in range(BATCHES)]
    with allowing_tf32(False), bench.uncompiled():
        precise = gradients(bench._replace(bf16=False), batches[0])
    # In bf16 torch's own settings: code compiled under others would not be found in the cache by later stages.
    with allowing_tf32(False) if not bench.bf16 else nullcontext():
        with bench.uncompiled():
            eager = gradients(bench, batches[0])
        torch._dynamo.reset()  # another network before is no recompilation of this one
        before = compile_counts()
        fast = gradients(bench, batches[0])
        for batch in batches[1:]:
            gradients(bench, batch)
    counts = compile_counts().since(before)
    found = {
        "loss": {"eager": eager[0], "compiled": fast[0], "fp32": precise[0]},
        "from_eager": distance(fast[1], eager[1]),
        "eager_from_fp32": distance(eager[1], precise[1]),
        "compiled_from_fp32": distance(fast[1], precise[1]),
        **counts._asdict(),
    }
    report(compared={name: found})
    wrong = said_of(counts)
    off = max(abs(fast[0] / eager[0] - 1), found["from_eager"]["all"])
    if not bench.bf16 and not off < OFF:
        wrong.append(f"compiled and eager differ by {off:.2g}")
    return wrong


def gradients(bench: Bench, batch: Batch) -> tuple[float, dict[str, Tensor]]:
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


def compare_views(setup: Setup, report: Report) -> list[str]:
    """Compare the jittered view of a batch, as training with cached tokens makes it."""
    bench = make_bench(setup.config(f"batch_size={setup.sizes.base}"))
    cached = [{k: v for k, v in make_batch(bench, n).ours.items() if k != "token_image"} for n in range(BATCHES)]
    with bench.uncompiled():
        eager, _ = bench.module.prepare(cached[0])
    torch._dynamo.reset()
    before = compile_counts()
    compiled, *_ = [bench.module.prepare(batch)[0] for batch in cached]
    counts = compile_counts().since(before)
    report(views={"largest_difference": (compiled - eager).abs().max().item(), **counts._asdict()})
    return said_of(counts)


def said_of(counts: CompileCounts) -> list[str]:
    """A line if something was not one graph, compiled once."""
    if counts.clean and counts.graphs == 1:
        return []
    reasons = "; ".join(compile_reasons(counts)[:3])
    return [f"{counts}, {counts.fallbacks} not compiled ({reasons})"]
