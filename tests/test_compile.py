"""A run reports once what torch.compile did: graphs, breaks, recompilations, fallbacks."""

from __future__ import annotations

import pytest
import torch
from tiny import TINY

from beit_pretrain.engine.compile import CompileCounts, compile_counts, compile_reasons


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def counts_of(function, *inputs) -> CompileCounts:
    before = compile_counts()
    compiled = torch.compile(function, backend="eager", dynamic=False)
    for given in inputs:
        compiled(given)
    return compile_counts().since(before)


def test_single_graph_is_reported_clean():
    found = counts_of(lambda x: x.sin() + 1, torch.ones(3), torch.zeros(3))
    assert found.clean
    assert found[:4] == (1, 0, 0, 0)
    assert found.seconds > 0


def test_graph_breaks_are_counted():
    def breaks(x):
        x = x.sin()
        torch._dynamo.graph_break()
        return x.cos()

    found = counts_of(breaks, torch.ones(3))
    assert found[:4] == (2, 1, 0, 0)
    assert not found.clean
    assert any(reason.startswith("graph break: ") for reason in compile_reasons(found))


def test_recompilations_are_counted():
    found = counts_of(lambda x: x.sin() + 2, torch.ones(3), torch.ones(4), torch.ones(4))
    assert found[:4] == (2, 0, 1, 0)
    assert not found.clean
    assert any(reason.startswith("recompiled <lambda>: ") for reason in compile_reasons(found))


def test_uncompiled_functions_are_counted():
    def fails(graph, inputs):
        raise RuntimeError("no such instruction")

    before = compile_counts()
    with torch._dynamo.config.patch(suppress_errors=True):
        torch.compile(lambda x: x.sin() + 3, backend=fails)(torch.ones(3))
    found = compile_counts().since(before)
    assert found[:4] == (0, 0, 0, 1)
    assert not found.clean
    assert any("not compiled, <lambda>: BackendCompilerFailed" in reason for reason in compile_reasons(found))


def test_recompile_limit_counts_as_uncompiled():
    found = counts_of(lambda x: x.sin() + 4, *(torch.ones(n) for n in range(2, 13)))
    assert found.recompilations > 5
    assert found.fallbacks > 0


def fitted(run_cli, shards, tokenizer, *words) -> list[str]:
    given = [
        f"data.train={shards / 'train'}",
        f"tokenizer.path={tokenizer}",
        "data.num_workers=0",
        "model.drop_path_rate=0",
    ]
    code, stdout, stderr = run_cli("fit", *TINY, *given, "steps=5", "batch_size=16", "run_dir=run", *words)
    assert code == 0, stderr
    return [line for line in stderr.splitlines() if "compile" in line]


def with_backend(monkeypatch, backend) -> None:
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, mode=None, **how: compiled(f, backend=backend, **how))


def test_run_reports_compilation_once(run_cli, shards, dvae_checkpoint, monkeypatch):
    with_backend(monkeypatch, "eager")
    lines = fitted(run_cli, shards, dvae_checkpoint, "compile=true")
    assert len(lines) == 1, lines
    assert lines[0].startswith("compiled: ")
    assert " 0 recompilations" in lines[0]
    assert not lines[0].startswith("compiled: 0 graphs")


@pytest.mark.long
def test_run_warns_about_fallback_to_eager(run_cli, shards, dvae_checkpoint, monkeypatch):
    def fails(graph, inputs):
        raise RuntimeError("no such instruction")

    with_backend(monkeypatch, fails)
    with torch._dynamo.config.patch(suppress_errors=True):  # as compile=auto has it on a GPU
        lines = fitted(run_cli, shards, dvae_checkpoint, "compile=true")
    assert [line for line in lines if line.startswith("compiled: 0 graphs")], lines
    warnings = [line for line in lines if line.startswith("warning: ")]
    assert len(warnings) == 1
    assert "fell back to eager" in warnings[0]
    assert "BackendCompilerFailed: backend='fails' raised: RuntimeError: no such instruction" in warnings[0]


def test_task_without_compiled_parts_warns_if_compile_is_set(run_cli, shards, tmp_path):
    words = [f"data.train={shards / 'train'}", "data.val=null", "data.num_workers=0", "steps=2", "logger=csv"]
    note = "note: compile=true has no effect: runs of this task are not compiled"
    for asked, said in (("true", [note]), ("auto", [])):
        given = ["fit", "+experiment=demo_tokenizer", *words, f"compile={asked}", f"run_dir={tmp_path / asked}"]
        code, _, stderr = run_cli(*given)
        assert code == 0, stderr
        assert [line for line in stderr.splitlines() if "compile" in line] == said


def test_ddp_graph_pieces_are_reported():
    assert str(CompileCounts(2, seconds=1.0, pieces=3)).startswith("2 graphs (for DDP in 5 pieces), 0 graph breaks")


def test_uncompiled_run_reports_nothing(run_cli, shards, dvae_checkpoint):
    assert fitted(run_cli, shards, dvae_checkpoint) == []
