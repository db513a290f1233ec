"""`bench step`, `loop`, `memory`, `all`: everyone computes the same loss, and what is reported is what was measured."""

from __future__ import annotations

import itertools
import json
import shlex
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from beit_pretrain.benchmarks import attention, inputs, loop, measure, step
from beit_pretrain.benchmarks.blocks import Results, interval
from beit_pretrain.benchmarks.inputs import make_batch, make_bench
from beit_pretrain.benchmarks.loop import run_in_turn
from beit_pretrain.benchmarks.measure import compared, counted_flops, kept_bytes, measured_peak
from beit_pretrain.benchmarks.memory import MOST, WORKSPACE, kept, predicted
from beit_pretrain.benchmarks.peers import PlainModel, Transformers
from beit_pretrain.benchmarks.report import Report
from beit_pretrain.benchmarks.step import host_batches, measure_rounds, on_images, our_steps, variant_names
from beit_pretrain.config import compose
from beit_pretrain.engine.compile import compile_counts
from beit_pretrain.engine.module import TrainedModule
from beit_pretrain.engine.trainer import silence_warnings
from beit_pretrain.errors import UserError
from beit_pretrain.models import cpu_kernels

TINY = (
    "+experiment=base_22k image_size=32 patch_size=8 mask.max_patches=6 mask.min_block=1 model.size=null "
    "+model.embed_dim=32 +model.depth=2 +model.num_heads=2 +model.init_values=0.1 batch_size=3 threads=1 "
    "trainer.accelerator=cpu tokenizer=dvae bench.rounds=2 bench.warm_up=1"
).split()
VARIANTS = {
    *("ours", "ours_tokenizer", "ours_cached", "reference", "reference_tokenizer"),
    *("transformers", "transformers_eager", "timm"),
}


def config(words: list[str], *more: str):
    """The config of a measurement of a step."""
    return compose("bench_step", ["action=step", *words, *more], spared=("data.train",))


@pytest.fixture
def words(dvae_checkpoint) -> list[str]:
    return [*TINY, f"tokenizer.path={dvae_checkpoint}"]


@pytest.fixture
def bench(words):
    cfg = config(words, "model.drop_path_rate=0")
    bench = make_bench(cfg)
    for parameter in bench.model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return bench


def test_a_measurement_obeys_deterministic(words, monkeypatch):
    asked: list = []
    monkeypatch.setattr(inputs, "make_deterministic", lambda *given: asked.append(given))
    for switch in ("false", "true"):
        make_bench(config(words, f"deterministic={switch}"))
    assert asked == [(False,)]


@pytest.mark.parametrize("as_timm", [False, True])
def test_peers_on_timm_have_our_loss_and_gradients(bench, as_timm):
    batch = make_batch(bench, 0)
    model = PlainModel(bench.model, as_timm).train()
    loss = model(batch.image, batch.ours["mask"], batch.token_M)
    found = on_images(bench, batch)
    ours = found.loss_sum / found.masked
    torch.testing.assert_close(loss, ours, atol=1e-5, rtol=1e-5)
    loss.backward()
    ours.backward()
    for peer, own in ((model, bench.model), (model.body.blocks[0].attn.qkv, bench.model.blocks[0].attn.qkv)):
        name = "mask_token" if peer is model else "weight"
        torch.testing.assert_close(getattr(peer, name).grad, getattr(own, name).grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_transformers_has_as_many_parameters_and_attends_as_asked(bench, attention):
    """Its weights' parity is tested in test_pretrained.py; here that it is the same network, not a smaller one."""
    model = Transformers(bench.model, attention)
    assert model.model.config._attn_implementation == attention
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in bench.model.parameters())
    batch = make_batch(bench, 0)
    loss = model.train()(batch.image, batch.ours["mask"], batch.token_M)
    assert loss.item() == pytest.approx(np.log(bench.tokenizer.vocab_size), rel=0.2)


def test_our_step_is_the_modules(bench, monkeypatch):
    """`ours_tokenizer` jitters and tokenizes; `ours_cached` takes the tokens; all three move the weights."""
    encoded = []
    encode = bench.tokenizer.encode
    monkeypatch.setattr(bench.tokenizer, "encode", lambda image: encoded.append(len(image)) or encode(image))
    for name, calls in (("ours", 0), ("ours_cached", 0), ("ours_tokenizer", 1)):
        before = bench.model.lm_head.weight.clone()
        our_steps(bench)[name](make_batch(bench, 0))
        assert len(encoded) == calls
        assert not torch.equal(bench.model.lm_head.weight, before)


def test_an_interval_from_order_statistics():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(400):
        fast = rng.lognormal(0, 0.3, 20)
        ratio = compared(1.1 * rng.lognormal(0, 0.3, 20), fast)
        inside += ratio["low"] <= 1.1 <= ratio["high"]
        assert ratio["low"] <= ratio["median"] <= ratio["high"]
    assert inside / 400 > 0.93
    assert compared([2.0] * 6, [1.0] * 6) == {"median": 2.0, "low": 2.0, "high": 2.0, "pairs": 6}
    ratios = (compared([2.0] * pairs, [1.0] * pairs) for pairs in (5, 6))
    assert [interval(ratio) for ratio in ratios] == ["range", "95 % interval"]


def test_operations_are_counted():
    layer = nn.Linear(10, 20)
    assert counted_flops(lambda: layer(torch.ones(3, 10)).sum().backward()) == 2 * 2 * 3 * 10 * 20  # and the weight's


def test_bytes_that_are_kept_are_the_same_without_computing(bench):
    batch = make_batch(bench, 0)
    ours = batch.ours
    given = (batch.view, ours["mask"], ours["mask_index"], ours["tokens"])
    assert kept(bench) == kept_bytes(lambda: bench.module.objective(*given)) > 10_000
    x = torch.ones(5, 7, requires_grad=True)
    assert kept_bytes(lambda: (x * 2).sin().cos()) == 2 * 4 * 35


@pytest.mark.parametrize("room", [0, 1, 3, 20, 24, 100, 1000, 10**9])
@pytest.mark.parametrize("bend", [1.0, 1.05])
def test_the_largest_batch_is_predicted_from_two_and_tried(room, bend):
    """`room` images of 10 bytes beside 50 fixed ones; `bend`: large batches take more than the line says."""
    limit, asked = int((50 + 10 * room) / (1 - WORKSPACE)) + 1, []

    def used(batch: int) -> int:
        return 50 + int(10 * batch * (bend if batch > 24 else 1))

    def peak_of(batch: int) -> int | None:
        asked.append(batch)
        return used(batch) if used(batch) <= 50 + 10 * room else None

    batch, taken = predicted(peak_of, limit)
    most = min(MOST, int(room / bend) if room > 24 else room)
    small = {0: 0, 1: 1, 3: 3, 20: 20, 24: 24}  # these lie between the batches that are measured first
    assert taken == (used(batch) if batch else 0)
    assert batch == small[room] if room in small else 0.9 * most < batch <= most
    assert batch == 0 or batch in asked  # nothing is promised that was not tried
    assert len(asked) <= 8


def last(stdout: str) -> dict:
    return json.loads(stdout.splitlines()[-1])


def test_step(words, run_cli):
    code, stdout, stderr = run_cli("bench", "step", *words)
    assert code == 0, stderr
    found = last(stdout)
    assert all(found[name] > 0 for name in VARIANTS)
    assert found["seconds"].keys() == VARIANTS
    assert {len(values) for values in found["seconds"].values()} == {2}
    for pair, ratio in found["ratios"].items():
        fast, slow = pair.split("/")
        each = np.array(found["seconds"][slow]) / found["seconds"][fast]
        assert ratio["median"] == pytest.approx(np.median(each))
    assert "range" in stdout
    assert "95 %" not in stdout  # which two pairs cannot say
    assert found["ratios"].keys() >= {"ours/transformers", "ours/reference", "ours_cached/reference_tokenizer"}
    parts = ["transfer", "device transforms", "tokenizer", "forward", "backward", "optimiser", "logging"]
    assert list(found["shares"]) == parts
    assert found["memory"]["state"] == 16 * found["parameters"]


def test_step_on_real_batches(words, run_cli, shards):
    code, stdout, stderr = run_cli(
        "bench", "step", *words, "bench.variants=[ours]", f"data.train={shards / 'train'}", "data.num_workers=0"
    )
    assert code == 0, stderr
    assert last(stdout)["shares"]["data wait"] > 0
    assert last(stdout)["seconds"].keys() == {"ours"}


def test_wrong_data_is_said_before_the_rounds(words, run_cli):
    code, stdout, stderr = run_cli("bench", "step", *words, "data.train=/nonexistent")
    assert code == 2
    assert "/nonexistent" in stderr.splitlines()[-1]
    assert "measuring" not in stderr


def test_real_batches_are_seen_as_the_experiment_says(words, shards):
    given = [f"data.train={shards / 'train'}", "data.num_workers=0", "data.jitter=[0,0,0]", "data.flip=0"]
    whole = ["data.scale=[1,1]", "data.ratio=[1,1]"]  # of square images: nothing is left to chance
    cfg = config(words, *given, *whole)
    bench = make_bench(cfg)
    batch = next(iter(host_batches(cfg, bench)))
    assert (batch["jitter_factors"] == 1).all()
    cfg.data.token_image_size = 24
    with pytest.raises(UserError, match="one token per patch"):
        host_batches(cfg, bench)


def test_one_clock_for_all_that_is_divided(words, run_cli, monkeypatch):
    clocks = []
    monkeypatch.setattr(measure, "measured_peak", lambda *given: clocks.append(given[-1]) or 1e9)
    code, stdout, stderr = run_cli("bench", "step", *words, "bench.variants=[ours]", "bench.clock=cpu")
    assert code == 0, stderr
    assert clocks == [time.process_time]
    assert "images/s of processor time" in stdout
    assert "TFLOP/s of processor time" in stdout


def test_the_peak_is_by_the_clock_that_is_given():
    ticks = itertools.count()
    assert measured_peak(torch.device("cpu"), False, lambda: float(next(ticks))) == 2 * 2 * 2048**3


def test_loop(words, run_cli, recwarn):
    code, stdout, stderr = run_cli("bench", "loop", *words, "bench.rounds=3")
    assert code == 0, stderr
    found = last(stdout)
    assert {len(values) for values in found["seconds"].values()} == {3}
    assert found["checkpoint"]["bytes"] > 12 * found["parameters"]
    assert found["loop_over_bare"]["pairs"] == 3
    assert found["checkpoint"]["until_written"] >= found["checkpoint"]["seconds"] > 0
    assert "Epoch" not in stdout  # the bar is no result
    assert not [str(warning.message) for warning in recwarn if "val_dataloader" in str(warning.message)]


def test_the_loop_in_blocks_waits_once_a_block(words, monkeypatch, tmp_path):
    cfg = config(words, "bench.warm_up=0", "bench.rounds=3")
    bench, waits = make_bench(cfg), []
    monkeypatch.setattr(type(bench), "wait", lambda self: waits.append(1))
    silence_warnings()
    batches, _ = run_in_turn(cfg, bench, tmp_path, 4)
    assert len(batches.bare) == len(batches.trained) == 3
    assert batches.bench.model.training
    assert len(waits) == 4 + 2  # each end of a block, each of two checkpoints


def test_the_loop_waits_for_a_checkpoint_that_a_thread_writes(words, run_cli, monkeypatch):
    def slow(*given) -> None:
        time.sleep(0.3)
        save(*given)

    save = torch.save
    monkeypatch.setattr(torch, "save", slow)
    code, stdout, stderr = run_cli("bench", "loop", *words, "bench.rounds=1")
    assert code == 0, stderr
    saved = last(stdout)["checkpoint"]
    assert saved["seconds"] < 0.29 < saved["until_written"]


def test_the_loop_sees_metrics_being_written(words, run_cli, monkeypatch):
    flush = TrainedModule.flush

    def slow(self) -> None:
        time.sleep(0.5)
        flush(self)

    monkeypatch.setattr(TrainedModule, "flush", slow)
    code, stdout, stderr = run_cli("bench", "loop", *words, "bench.rounds=10")
    assert code == 0, stderr
    found = last(stdout)
    assert found["loop_over_bare_together"] > 1 + 0.9 / sum(found["seconds"]["bare"])  # two of them


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_attention(words, run_cli, precision):
    code, stdout, stderr = run_cli("bench", "attention", *words, f"trainer.precision={precision}")
    assert code == 0, stderr
    found = last(stdout)
    assert found["seconds"].keys() == {"eager", "ours", "sdpa", "no_bias"}
    assert found["difference"].keys() == {"eager", "ours", "sdpa"}
    assert max(found["difference"].values()) < (1e-5 if precision == "32-true" else 0.1)
    assert found["queries"].keys() == {"17", "6"}  # all tokens, and the masked alone
    for of_case in found["queries"].values():
        for name, of_kernel in of_case.items():
            assert of_kernel["forward"] > 0
            assert of_kernel["backward"] > 0
            assert of_kernel.get("errors", {}).keys() == ({*attention.OUTPUTS} if name != "no_bias" else set())
            assert max(of_kernel.get("errors", {"": 0}).values()) < (1e-5 if precision == "32-true" else 0.02)


def test_a_kernel_that_is_wrong_or_refuses_is_reported(words, run_cli, monkeypatch):
    def wrong(q, k, v, bias):
        return attention.eager(q, k, v, 2 * bias)

    def refuses(q, k, v, bias):
        raise RuntimeError("No available kernel.\nAborting.")

    for name, kernel in {"wrong": wrong, "refuses": refuses}.items():
        monkeypatch.setitem(attention.KERNELS, name, attention.on_heads(kernel))
    code, stdout, stderr = run_cli("bench", "attention", *words, "bench.rounds=1")
    assert code == 0, stderr
    found = last(stdout)["queries"]["17"]
    assert found["refuses"] == {"failed": "RuntimeError: No available kernel."}
    assert "No available kernel" in stdout
    assert found["wrong"]["errors"]["dbias"] > 0.1
    assert found["ours"]["errors"]["dbias"] < 1e-5


@pytest.fixture
def counting_backend(monkeypatch):
    """torch.compile without its slow part; calls of the compiled programs are counted."""
    calls, compiled = [], torch.compile

    def backend(graph, inputs):
        return lambda *given: calls.append(len(inputs)) or graph(*given)

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda f, mode=None, **how: compiled(f, backend=backend, **how))
    yield calls
    torch._dynamo.reset()


def test_compiled_variants_are_compiled(words, run_cli, counting_backend, monkeypatch):
    """Operations are counted by hooks into the dispatcher, under which Dynamo would give a function up for good."""
    monkeypatch.setattr(measure, "measured_peak", lambda *given: 1e9)  # it takes two seconds
    before = compile_counts()
    code, stdout, stderr = run_cli(
        "bench", "step", *words, "compile=true", "bench.variants=[ours,reference_compiled]", "data.jitter=[0,0,0]"
    )
    assert code == 0, stderr
    found, counts = last(stdout), compile_counts().since(before)
    assert counts.graphs >= 2
    assert counts.fallbacks == 0
    ours = found["started"]["ours"]
    assert [ours[name] for name in ("graphs", "graph_breaks", "recompilations", "fallbacks")] == [1, 0, 0, 0]
    assert found["started"]["reference_compiled"]["graphs"] >= 1
    assert found["compiled_later"]["fallbacks"] == 0
    assert "| 1 / 0 / 0 " in next(line for line in stdout.splitlines() if line.startswith("| ours "))
    assert len(counting_backend) >= 2 * 4  # the first step, two rounds and the warm-up; of two variants
    assert found["flops_per_image"] > 0


def test_a_failed_compilation_is_an_error_of_bench(words, run_cli, monkeypatch):
    compiled = torch.compile

    def backend(graph, inputs):
        raise RuntimeError("no such instruction")

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda f, mode=None, **how: compiled(f, backend=backend, **how))
    as_after_fit = torch._dynamo.config.patch(suppress_errors=True)  # compile=auto on a GPU leaves it so
    with as_after_fit, pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="no such instruction"):
        run_cli("bench", "step", *words, "compile=true", "bench.variants=[ours]")


def test_the_peak_is_of_ours_alone(bench, monkeypatch):
    """As on a GPU, where the allocator knows the peak of the whole process."""
    order, report, peer_step = [], Report(), step.peer_step
    monkeypatch.setattr(measure, "measured_peak", lambda *given: 1e9)
    monkeypatch.setattr(inputs.Bench, "on_gpu", True)
    monkeypatch.setattr(measure, "peak_bytes", lambda device, work: (work(), order.append("peak"), 5)[-1])
    monkeypatch.setattr(step, "peer_step", lambda *given: order.append("others") or peer_step(*given))
    assert list(step.started(bench, ["ours", "timm"], report)) == ["ours", "timm"]
    assert order == ["peak", "others"]
    assert report.found["memory"]["peak"] == 5


def test_on_a_gpu_a_kernel_is_finished_before_the_next(words, monkeypatch):
    def late(given):
        raise RuntimeError("too late")

    cfg = config(words)
    bench = make_bench(cfg)
    monkeypatch.setattr(inputs.Bench, "on_gpu", True)
    monkeypatch.setattr(attention, "kernel_seconds", lambda work: (work(), 0.5)[1])
    monkeypatch.setitem(attention.KERNELS, "late", late)
    reports: list[dict] = []
    attention.measure_case(bench, attention.make_case(bench, False), lambda **found: reports.append(found), 1, 0)
    found = [each["queries"]["17"] for each in reports if "queries" in each]
    assert [list(each) for each in found] == [["eager"], ["ours"], ["sdpa"], ["no_bias"], ["late"]]
    found = {name: result for each in found for name, result in each.items()}
    assert found["ours"]["forward"] == found["ours"]["backward"] == 0.5
    assert found["late"] == {"failed": "RuntimeError: too late"}


def test_compiled_peers_only_where_ours_are(words):
    cfg = config(words)
    bench = make_bench(cfg)
    assert "reference_compiled" not in variant_names(cfg, bench)
    bench.module.compile_mode = "default"
    assert variant_names(cfg, bench) == list(cfg.bench.variants)


def test_a_sample_is_the_mean_of_several_steps(bench):
    ticks = itertools.count()
    timed, taken, report = bench._replace(now=lambda: float(next(ticks))), [], Report()
    measure_rounds(timed, {"a": taken.append}, report, rounds=2, warm_up=0, steps=5)
    assert report.found["seconds"] == {"a": [1 / 5, 1 / 5]}
    assert len(taken) == 10
    assert len({id(batch) for batch in taken}) == 4


@pytest.mark.long
def test_all_on_one_page(words, run_cli, tmp_path, monkeypatch):
    monkeypatch.setattr("beit_pretrain.benchmarks.memory.SIZES", ("tiny",))
    code, stdout, stderr = run_cli(
        *("bench", "all", *words[:-1], words[-1], "bench.memory_gb=1", f"bench.out={tmp_path / 'page'}"),
        "bench.variants=[ours,reference]",
    )
    assert code == 0, stderr
    text = (tmp_path / "page/page.md").read_text()
    assert all(f"## bench {name}" in text for name in ("step", "loop", "attention", "memory"))
    commands = [shlex.split(line) for line in text.splitlines() if line.startswith("    python -m beit_pretrain ")]
    assert len(commands) == 4
    assert all({*words, "bench.memory_gb=1"} < {*command} for command in commands)
    assert (tmp_path / "page/images_per_s.png").stat().st_size > 5000
    assert json.loads((tmp_path / "page/results.json").read_text())["memory"]["tiny"]["batch"] > 0
    assert Path(last(stdout)["page"]) == tmp_path / "page/page.md"


def a_step(cfg) -> Results:
    """In place of `bench_step`, as much of its last line as the page takes."""
    about = {"experiment": "x", "device": "x", "clock": "cpu", "threads": 1, "torch": "x", "precision": "x"}
    return [], {"bench": "step", **about, "batch_size": 3, "ours": 2.0, "seconds": {"ours": [1.5]}}


def test_a_part_that_fails_costs_no_other(words, run_cli, tmp_path, monkeypatch):
    def fails(cfg) -> None:
        raise UserError("no kernel")

    monkeypatch.setattr(step, "bench_step", a_step)
    monkeypatch.setattr(loop, "bench_loop", fails)
    code, _, stderr = run_cli("bench", "all", *words, f"bench.out={tmp_path / 'page'}")
    assert (code, stderr.splitlines()[-1]) == (2, "error: no kernel")
    assert json.loads((tmp_path / "page/results.json").read_text())["step"]["ours"] == 2
    assert "## bench step" in (tmp_path / "page/page.md").read_text()
    assert (tmp_path / "page/images_per_s.png").is_file()


def test_photos_are_looked_at_before_anything_is_measured(words, run_cli, monkeypatch):
    monkeypatch.setattr(step, "bench_step", lambda cfg: pytest.fail("measured"))
    code, _, stderr = run_cli("bench", "all", *words, "bench.src=/nonexistent")
    assert code == 2
    assert "/nonexistent" in stderr.splitlines()[-1]


@pytest.mark.long
def test_named_sizes_whatever_the_experiments_own(words, run_cli, monkeypatch):
    monkeypatch.setattr("beit_pretrain.benchmarks.memory.SIZES", ("tiny", "small"))
    code, stdout, stderr = run_cli("bench", "memory", *words, "bench.memory_gb=1")
    assert code == 0, stderr
    found = last(stdout)
    assert found["tiny"]["batch"] > 1.5 * found["small"]["batch"] > 0


def test_memory_of_a_cpu_that_has_a_gpu_beside_it(words, run_cli, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    code, _, stderr = run_cli("bench", "memory", *words)
    assert code == 2
    assert "bench.memory_gb=" in stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["step"], "+experiment="),
        *((["step", *TINY, f"trainer.precision={name}"], name) for name in ("foo", "64-true", "16-mixed")),
        (["loop", *TINY, "trainer.precision=foo"], "trainer.precision="),
        (["step", *TINY, "trainer.accelerator=gpu"], "has no GPU"),
        (["step", *TINY, "trainer.accelerator=tpu"], "trainer.accelerator="),
        (["step", *TINY, "trainer.devices=2"], "trainer.devices must be"),
        (["step", *TINY, "init_from=runs/x"], "init_from="),
        (["step", *TINY, "ema=.9"], "python -m beit_pretrain bench step --help"),
        (["loop", *TINY, "ema=.9"], "python -m beit_pretrain bench loop --help"),
        (["step", "+experiment=tokenizer"], "bench measures the task pretrain"),
        (["step", *TINY, "bench.variants=[theirs]"], "bench.variants must be"),
        (["step", *TINY, "bench.rounds=0"], "bench.rounds must be"),
        (["memory", *TINY], "bench.memory_gb="),
        (["steps", "src=x"], "there are views, loader, step, loop, attention, memory, all"),
    ],
)
def test_wrong_words(given, said, run_cli, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, stderr = run_cli("bench", *given)
    assert code == 2
    assert said in stderr.splitlines()[-1]


@pytest.mark.parametrize("mode", [None, pytest.param("default", marks=pytest.mark.long)])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("large", [cpu_kernels.LARGE, 0], ids=["torch", "onednn"])
def test_the_fast_and_the_plain_path_agree(bench, bf16, large, mode, monkeypatch):
    """Loss and gradients: 1e-5 in fp32; in bf16 both paths lie within 3 % of fp32, tensor by tensor, the loss .2 %.

    Also where every product is large enough for oneDNN, which takes those in fp32.
    """
    products, product = [], cpu_kernels.product
    monkeypatch.setattr(cpu_kernels, "LARGE", large)
    monkeypatch.setattr(cpu_kernels, "product", lambda *given: products.append(given) or product(*given))
    batch = make_batch(bench, 0)
    own = bench.model
    plain = PlainModel(bench.model).train()
    bench.module.compile_mode = mode

    def fast_loss(half: bool) -> torch.Tensor:
        found = on_images(bench._replace(bf16=half), batch)
        return found.loss_sum / found.masked

    def plain_loss(half: bool) -> torch.Tensor:
        with bench._replace(bf16=half).precision():
            return plain(batch.image, batch.ours["mask"], batch.token_M)

    def results(loss: torch.Tensor, model: nn.Module) -> tuple[float, dict[str, torch.Tensor]]:
        model.zero_grad()
        loss.backward()
        return loss.item(), {n.removeprefix("body."): p.grad.clone() for n, p in model.named_parameters()}

    exact_loss, exact = results(plain_loss(False), plain)
    losses, gradients = zip(results(fast_loss(bf16), own), results(plain_loss(bf16), plain), strict=True)
    assert bool(products) == (large == 0 and not bf16 and mode is None and cpu_kernels.ONEDNN is not None)
    bound = 2e-3 if bf16 else 1e-6
    assert losses == pytest.approx([exact_loss] * 2, rel=bound)
    for name, wanted in exact.items():
        for found in gradients:
            error = (found[name] - wanted).norm() / wanted.norm()
            assert error < (0.03 if bf16 else 1e-5), (name, error)
