"""Device prefetch, torch.compile, profiling and deterministic mode do not change the numbers of a step."""

from __future__ import annotations

import gzip
import json
import os
from types import SimpleNamespace

import pytest
import torch
from lightning import Callback
from test_datamodule import pretrain_data
from test_pretraining import module, trainer
from test_token_cache import Pretraining, data_of, tokens_of
from tiny import TINY
from torch.autograd import DeviceType

from beit_pretrain.engine.callbacks import ProgressBar
from beit_pretrain.engine.device_prefetch import DevicePrefetcher
from beit_pretrain.engine.module import read_numbers
from beit_pretrain.engine.speed import Profile, check_cuda_graphs, compile_mode, kernels, make_deterministic
from beit_pretrain.errors import UserError
from beit_pretrain.tables import curve


class KeepsLosses(Pretraining):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.losses = [*getattr(self, "losses", []), loss.item()]
        return loss


def losses(data, steps: int = 4, device_prefetch: bool = False, mode: str | None = None) -> list[float]:
    plain = module()
    training = KeepsLosses(plain.model, plain.tokenizer, plain.optim, plain.mean, plain.std)
    training.compile_mode = mode
    if device_prefetch:
        data.wrapped = lambda loader: DevicePrefetcher(loader, training.prepare, training.device)
    trainer(steps, micro_batches=2).fit(training, data)
    return training.losses


def test_device_prefetch_gives_same_batches(shards):
    assert losses(pretrain_data(shards), device_prefetch=True) == losses(pretrain_data(shards))


def test_device_prefetch_with_cached_tokens(shards, dvae_checkpoint, tmp_path):
    folder = tokens_of(shards / "train", tmp_path / "tokens", dvae_checkpoint)
    assert losses(data_of(shards, folder), device_prefetch=True) == losses(data_of(shards, folder))


@pytest.mark.long
def test_compiled_losses_equal_eager(shards, dvae_checkpoint, tmp_path):
    """With given tokens, since a tokenizer may decide a near-tie differently (see the next test)."""
    folder = tokens_of(shards / "train", tmp_path / "tokens", dvae_checkpoint)
    plain, compiled = (losses(data_of(shards, folder), mode=mode) for mode in (None, "default"))
    assert compiled == pytest.approx(plain, abs=1e-5)


@pytest.mark.long
def test_compiled_views_and_tokens_match_eager(shards):
    """A grey value between two tokens may be rounded to the other one."""
    differ, seen = 0, 0

    class Compares(KeepsLosses):
        def training_step(self, batch, batch_idx):
            nonlocal differ, seen
            (view, tokens), (expected, expected_tokens) = self.prepare(batch), self.image_and_tokens(batch)
            torch.testing.assert_close(view, expected, atol=1e-5, rtol=0)
            differ, seen = differ + int((tokens != expected_tokens).sum()), seen + tokens.numel()
            return super().training_step(batch, batch_idx)

    plain = module()
    training = Compares(plain.model, plain.tokenizer, plain.optim, plain.mean, plain.std)
    training.compile_mode = "default"
    trainer(4, micro_batches=2).fit(training, pretrain_data(shards))
    assert differ <= 0.02 * seen, (differ, seen)


def test_compile_modes():
    assert [compile_mode(asked, False, False) for asked in ("auto", True, False)] == [None, "default", None]
    assert compile_mode("auto", True, True) is None
    assert compile_mode("reduce-overhead", True, False) == "reduce-overhead"


def test_read_numbers_keeps_order():
    values = [torch.tensor(3), 0.5, torch.tensor(1.25), torch.tensor(7, dtype=torch.float64), 2, torch.tensor(4)]
    assert read_numbers(values) == [3, 0.5, 1.25, 7, 2, 4]
    assert read_numbers([]) == []


def test_profile(shards, dvae_checkpoint, run_cli, tmp_path):
    given = [f"data.train={shards / 'train'}", f"tokenizer.path={dvae_checkpoint}", f"run_dir={tmp_path / 'run'}"]
    # Enough images that some operations dominate: with 8, the top ten of a fast processor are only 40 % of a step.
    words = [
        "fit",
        *TINY,
        *given,
        "steps=20",
        "batch_size=32",
        "data.num_workers=0",
        "profile=true",
        "device_prefetch=true",
    ]
    code, stdout, stderr = run_cli(*words)
    assert code == 0, stderr
    events = json.loads(gzip.decompress((tmp_path / "run/profile/trace.json.gz").read_bytes()))["traceEvents"]
    assert any("aten::addmm" in event.get("name", "") for event in events)
    optimiser = [event for event in events if event.get("name", "").startswith("Optimizer.step")]
    assert len([event for event in optimiser if event.get("cat") == "user_annotation"]) == 5  # steps, not micro-batches
    table = (tmp_path / "run/profile/kernels.txt").read_text().splitlines()
    assert len(table) == 11
    assert "share" in table[0]
    assert sum(float(line.split("%")[0]) for line in table[1:]) > 40
    assert table[1].split()[-1].startswith(("aten::", "mkldnn::"))
    assert not any(name in line for line in table for name in ("ProfilerStep", "Optimizer.step", "DataLoader"))
    assert table[1] in stdout
    assert curve(tmp_path / "run/metrics.csv", "train/loss")[0] == list(range(1, 21))


class Stops(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop = trainer.global_step == 12


@pytest.mark.parametrize(("steps", "taken"), [(6, 6), (20, 12)])
def test_profile_of_short_run_warns(steps, taken, shards, tmp_path, capsys):
    short = trainer(steps)
    short.callbacks += [Stops(), Profile(tmp_path / "profile")]
    short.fit(module(), pretrain_data(shards))
    assert short.global_step == taken
    assert f"profile=true needs 15 steps, got {taken}: no profile is written" in capsys.readouterr().err
    assert not (tmp_path / "profile").exists()


def test_gpu_profile_lists_only_kernels():
    """Torch attributes kernel time also to the CPU operators that launch the kernels."""

    def event(key, device, microseconds, annotation=False):
        times = {"self_device_time_total": microseconds, "self_cpu_time_total": 9}
        return SimpleNamespace(key=key, device_type=device, is_user_annotation=annotation, count=5, **times)

    table = kernels(
        [
            event("aten::mm", DeviceType.CPU, 3000),
            event("sgemm_128x64", DeviceType.CUDA, 3000),
            event("Memcpy HtoD", DeviceType.CUDA, 1000),
            event("ProfilerStep*", DeviceType.CUDA, 5000),
            event("Optimizer.step#AdamW.step", DeviceType.CUDA, 800, annotation=True),
        ],
        10,
    )
    rows = [line.split(maxsplit=3) for line in table.splitlines()[1:]]
    assert [(share, ms, name) for share, ms, _, name in rows] == [
        ("75.0%", "0.60", "sgemm_128x64"),
        ("25.0%", "0.20", "Memcpy HtoD"),
    ]


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["batch_size=2"], "gradient accumulation (8 micro-batches"),
        (["batch_size=16", "device_prefetch=true"], "device_prefetch=true"),
    ],
)
def test_invalid_cuda_graph_settings(mode, given, said, shards, dvae_checkpoint, run_cli):
    data = [f"data.train={shards / 'train'}", f"data.val={shards / 'val'}", f"tokenizer.path={dvae_checkpoint}"]
    code, _, stderr = run_cli("fit", *TINY, *data, *given, f"compile={mode}", "steps=1", "run_dir=run")
    assert (code, stderr.count("\n")) == (2, 1)
    assert f"compile={mode}" in stderr
    assert said in stderr


@pytest.mark.parametrize("whole", [False, True])
def test_optimize_ddp(whole, shards, dvae_checkpoint, run_cli, tmp_path):
    given = [f"data.train={shards / 'train'}", f"tokenizer.path={dvae_checkpoint}", "data.val=null", "steps=1"]
    with torch._dynamo.config.patch(optimize_ddp=whole):  # set back afterwards
        code, _, stderr = run_cli("fit", *TINY, *given, f"optimize_ddp={not whole}", f"run_dir={tmp_path / 'run'}")
        assert code == 0, stderr
        assert torch._dynamo.config.optimize_ddp == (not whole)


def test_cuda_graphs_are_refused_for_fsdp():
    with pytest.raises(UserError, match="fsdp"):
        check_cuda_graphs("reduce-overhead", 1, device_prefetch=False, sharded=True)
    check_cuda_graphs("default", 1, device_prefetch=False, sharded=True)


def test_cuda_graph_step_begins_with_each_micro_batch(shards, monkeypatch):
    begun = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append(1))
    training = module()
    monkeypatch.setattr(training, "maybe_compile", lambda function: function)
    for mode, expected in (("default", 0), ("reduce-overhead", 3)):
        training.compile_mode = mode
        trainer(3).fit(training, pretrain_data(shards))
        assert len(begun) == expected


@pytest.fixture
def torchs_flags(monkeypatch):
    """Restore torch's global settings after the test."""
    import torch._inductor.config as inductor

    kept = torch.utils.deterministic.fill_uninitialized_memory, torch.backends.cudnn.benchmark, inductor.deterministic
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = kept[0]
    torch.backends.cudnn.benchmark, inductor.deterministic = kept[1:]


def test_deterministic(shards, dvae_checkpoint, run_cli, torchs_flags, tmp_path):
    """Torch uses deterministic algorithms; on a CPU the numbers do not change."""
    given = [
        f"data.train={shards / 'train'}",
        f"tokenizer.path={dvae_checkpoint}",
        "data.val=null",
        "data.num_workers=0",
    ]
    runs = {}
    for name in ("false", "true"):
        code, _, stderr = run_cli(
            "fit", *TINY, *given, "steps=2", f"deterministic={name}", f"run_dir={tmp_path / name}"
        )
        assert code == 0, stderr
        assert torch.are_deterministic_algorithms_enabled() == (name == "true")
        runs[name] = curve(tmp_path / name / "metrics.csv", "train/loss")
    assert runs["true"] == runs["false"]
    assert not torch.utils.deterministic.fill_uninitialized_memory
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_deterministic_segmentation_on_gpu_is_refused(torchs_flags):
    with pytest.raises(UserError, match="segmentation"):
        make_deterministic(on_gpu=True, impossible="segmentation's resizing")
    assert not torch.are_deterministic_algorithms_enabled()


def test_progress_bar_shows_host_numbers(shards):
    """Lightning's own metrics are device tensors, which every refresh would read."""
    training = module()
    training.log_every = 1
    bar = ProgressBar()
    training_loop = trainer(2)
    training_loop.fit(training, pretrain_data(shards))
    assert training_loop.progress_bar_metrics == {}
    shown = bar.get_metrics(training_loop, training)
    assert shown.keys() == {"loss", "masked_token_accuracy"}
    assert all(type(value) is float for value in shown.values())
