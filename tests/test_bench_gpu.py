"""`bench gpu`: whatever becomes of a stage, the others run, and everything that was found is on the disk."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from fake_stages import lines, stage
from lean import lean_python, refused

from beit_pretrain.benchmarks import step as variants
from beit_pretrain.benchmarks.blocks import blocks_of, summary
from beit_pretrain.benchmarks.gpu import curves, machine, parity, process, run, runner, step
from beit_pretrain.benchmarks.gpu.plan import STAGES, Setup
from beit_pretrain.benchmarks.inputs import make_batch, make_bench
from beit_pretrain.benchmarks.report import Report, read
from beit_pretrain.benchmarks.settings import GpuGroup
from beit_pretrain.errors import UserError
from beit_pretrain.tasks.pretrain import MIMOutput, Pretraining
from beit_pretrain.tokenizers.tokenizer import OpenAITokenizer

HERE, SOURCE = Path(__file__).parent, Path(__file__).parents[1] / "src"


@pytest.fixture
def run_stages(run_cli, monkeypatch, tmp_path):
    """`run_stages(stages, *words)`: `bench gpu` with these in place of the real ones."""
    monkeypatch.setenv("PYTHONPATH", f"{HERE}:{SOURCE}")
    monkeypatch.setattr(process, "GRACE", 0.3)

    def run(stages, *words):
        monkeypatch.setattr(runner, "STAGES", tuple(stages))
        given = [
            "device=cpu",
            "bench.tiny=true",
            f"bench.out={tmp_path / 'out'}",
            f"bench.scratch={tmp_path / 'scratch'}",
        ]
        return run_cli("bench", "gpu", *given, *words)

    return run


def test_stages_run_in_their_order_and_leave_lines_and_a_page(run_stages, tmp_path):
    code, stdout, stderr = run_stages([stage("fine"), stage("timed")], "batch_size=7", "bench.seconds=100")
    assert code == 0, stderr
    first, second = lines(tmp_path / "out")
    assert [(line["stage"], line["status"]) for line in (first, second)] == [("fine", "ok"), ("timed", "ok")]
    assert first["found"]["words"] == ["+experiment=base_22k", "batch_size=7"]
    assert first["found"]["nested"] == {"a": 1, "b": 2.0}
    assert first["found"]["device"] == "cpu"
    assert first["found"]["cache"] == str(tmp_path / "scratch/triton")
    assert 20 < first["found"]["left"] <= 30
    assert [json.loads(line) for line in stdout.splitlines()[:2]] == [first, second]
    assert "| fine  | ok" in stdout
    assert "said by fine" in (tmp_path / "out/stages.log").read_text()
    written = {path.name: path.read_text() for path in (tmp_path / "out").iterdir()}
    assert written.keys() == {"gpu.jsonl", "page.html", "page.md", "stages.log"}
    assert all("fine" in text for text in written.values())


def test_a_stage_that_fails_or_dies_costs_no_other(run_stages, tmp_path):
    code, stdout, stderr = run_stages([stage("fails"), stage("dies"), stage("partly"), stage("fine")])
    assert code == 0, stderr
    fails, dies, partly, fine = lines(tmp_path / "out")
    assert fails["status"] == "failed"
    assert fails["error"] == "ValueError: the first line | the second line"
    assert fails["found"] == dies["found"] == {"before": 1}
    assert dies["status"] == "failed"
    assert "SIGKILL" in dies["error"]
    assert "about to die" in dies["error"]
    assert partly["status"] == "partly"
    assert partly["errors"] == {"one": "RuntimeError: no kernel"}
    assert partly["found"] == {"two": 2}
    assert fine["status"] == "ok"
    assert "Traceback" in (tmp_path / "out/stages.log").read_text()
    page = (tmp_path / "out/page.md").read_text()
    assert "the first line | the second line" in page
    assert "no kernel" in page


def test_a_stage_that_hangs_is_killed_at_its_limit_with_all_it_started(run_stages, tmp_path):
    started = time.monotonic()
    code, _, stderr = run_stages([stage("hangs", limit=1), stage("fine")])
    assert code == 0, stderr
    assert time.monotonic() - started < 20
    hangs, fine = lines(tmp_path / "out")
    assert hangs["status"] == "timeout"
    assert "still running after" in hangs["error"]
    assert all(tiny.gone(pid) for pid in hangs["found"]["children"])
    assert fine["status"] == "ok"


def test_a_stage_that_does_not_fit_is_skipped(run_stages, tmp_path):
    code, stdout, stderr = run_stages([stage("fine"), stage("timed", least=50), stage("slow")], "bench.seconds=40")
    assert code == 0, stderr
    assert [line["status"] for line in lines(tmp_path / "out")] == ["ok", "skipped", "ok"]
    assert "it needs 50" in lines(tmp_path / "out")[1]["error"]
    assert "skipped" in stdout


@pytest.mark.long
def test_no_stage_gets_more_time_than_is_left(run_stages, tmp_path):
    run_stages([stage("hangs", limit=1000)], "bench.seconds=2")
    (line,) = lines(tmp_path / "out")
    assert line["status"] == "timeout"
    assert line["seconds"] < 8


def test_no_stage_that_ran_is_an_error(run_stages):
    code, _, stderr = run_stages([stage("fine", least=50)], "bench.seconds=10")
    assert code == 2
    assert stderr.splitlines()[-1].startswith("error: no stage ran: fine: ")


def test_stages_in_the_background_end_before_one_that_is_timed(run_stages, tmp_path):
    plan = [stage("slow", background=True), stage("fine", timed=False), stage("timed")]
    code, _, stderr = run_stages(plan)
    assert code == 0, stderr
    found = {line["stage"]: line for line in lines(tmp_path / "out")}
    assert list(found) == ["fine", "slow", "timed"]
    assert found["slow"]["found"]["ended"] <= found["timed"]["found"]["began"]


def test_a_repeated_run_appends_and_the_page_shows_the_newest(run_stages, tmp_path):
    plan = [stage("fine"), stage("timed")]
    run_stages(plan)
    first = lines(tmp_path / "out")
    code, _, stderr = run_stages(plan, "bench.only=timed")
    assert code == 0, stderr
    every = lines(tmp_path / "out")
    assert every[:2] == first
    assert [line["stage"] for line in every] == ["fine", "timed", "timed"]
    page = (tmp_path / "out/page.md").read_text()
    assert page.count("## timed") == page.count("## fine") == 1
    assert str(every[2]["found"]["began"]) in page
    assert str(every[1]["found"]["began"]) not in page


def test_a_chosen_stage_may_have_the_time_of_the_others(run_stages, tmp_path):
    run_stages([stage("fine", limit=1), stage("timed")], "bench.only=fine", "bench.seconds=100")
    assert lines(tmp_path / "out")[0]["found"]["left"] > 80


@pytest.mark.parametrize("only", ["timed,fine", "[timed,fine]"])
def test_several_stages_may_be_chosen(only, run_stages, tmp_path):
    code, _, stderr = run_stages([stage("fine"), stage("fails"), stage("timed")], f"bench.only={only}")
    assert code == 0, stderr
    assert [line["stage"] for line in lines(tmp_path / "out")] == ["fine", "timed"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["bench.only=nonsense"], "bench.only=nonsense: there are facts, data, warm, parity, compile, curves, base"),
        (["bench.only=base,nonsense"], "bench.only=nonsense: there are"),
        (["bench.seconds=0"], "bench.seconds must be"),
        (["device=tpu"], "device must be one of auto, cpu"),
        (["bench.tiny=false"], "device=cpu needs bench.tiny=true"),
        (["+experiment=nonsense"], "unknown experiment 'nonsense'"),
        (["nonsense=1"], "unknown key 'nonsense' for bench gpu"),
        (["bench.out=a/file/out"], "bench.out=a/file/out cannot be written"),
        (["bench.scratch=a/file/out"], "cannot be written"),
    ],
)
def test_wrong_words(words, said, run_cli, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/file").touch()
    given = [] if words[0].startswith("device") else ["device=cpu"]
    code, _, stderr = run_cli("bench", "gpu", *given, "bench.tiny=true", *words)
    assert code == 2
    assert said in stderr.splitlines()[-1]
    assert not list(tmp_path.glob("**/gpu.jsonl"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_there_is_one_clear_line(run_cli, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(SOURCE))
    code, stdout, stderr = run_cli("bench", "gpu")
    assert code == 2
    assert stdout == ""
    assert "torch finds no GPU on this machine; device=cpu bench.tiny=true" in stderr.splitlines()[-1]


def test_a_gpu_that_is_lost_later_is_a_failed_stage(run_stages, tmp_path):
    code, _, _ = run_stages([stage("fine"), stage("no_gpu"), stage("timed")])
    assert code == 0
    assert [line["status"] for line in lines(tmp_path / "out")] == ["ok", "failed", "ok"]


DRIVER = """
import sys
from fake_stages import stage
from beit_pretrain.benchmarks.gpu import runner
from beit_pretrain.cli import main
runner.STAGES = (stage("fine"), stage("hangs"), stage("timed"))
sys.argv = ["beit_pretrain", "bench", "gpu", "device=cpu", "bench.tiny=true", "bench.out=out", "bench.scratch=scratch"]
sys.exit(main())
"""


@pytest.fixture
def started(tmp_path):
    """`bench gpu` in a process of its own, which hangs in its second stage."""
    (tmp_path / "driver.py").write_text(DRIVER)
    environment = {**os.environ, "PYTHONPATH": f"{HERE}:{SOURCE}"}
    child = subprocess.Popen(
        [sys.executable, "driver.py"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=tiny.hear_ctrl_c,
        start_new_session=True,
    )
    assert tiny.wait_until(child, (tmp_path / "out/hangs").exists)
    yield child
    child.kill()
    child.wait()


@pytest.mark.long
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_told_to_stop_it_ends_the_stage_and_writes_the_page(signum, code, started, tmp_path):
    started.send_signal(signum)
    stdout, stderr = started.communicate(timeout=60)
    assert started.returncode == code, stderr
    fine, hangs = lines(tmp_path / "out")
    assert (fine["status"], hangs["status"]) == ("ok", "stopped")
    assert all(tiny.gone(pid) for pid in hangs["found"]["children"])
    assert "## hangs" in (tmp_path / "out/page.md").read_text()
    assert "| hangs | stopped" in stdout


@pytest.mark.long
def test_killed_itself_it_leaves_what_was_found(started, tmp_path, run_cli):
    started.kill()
    started.wait()
    (partial,) = (tmp_path / "out").glob("hangs.partial.jsonl")
    stage_process = read(partial)["found"]["children"][0]
    deadline = time.monotonic() + 30
    while not tiny.gone(stage_process) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert tiny.gone(stage_process)  # a stage ends with the runner
    code, stdout, stderr = run_cli("bench", "page", "bench.out=out")
    assert code == 0, stderr
    assert [line["status"] for line in lines(tmp_path / "out")] == ["ok", "cut short"]
    assert "children" in (tmp_path / "out/page.md").read_text()
    assert "cut short" in stdout


def test_a_page_from_lines_of_some_stages_and_a_torn_one(run_cli, tmp_path):
    found = {"images_per_s": {"ours": 100.0}, "seconds": {"ours": [0.5, 0.6]}, "started": {"ours": {"first_step": 3.0}}}
    about = {"experiment": "base_22k", "batch_size": 50, "clock": "wall", "device": "a GPU", "parameters": 1}
    base = {"stage": "base", "status": "timeout", "seconds": 9.0, "run": "x", "found": {**found, "about": about}}
    curves = {"stage": "curves", "status": "ok", "seconds": 9.0, "run": "x", "found": {"losses": {"fast": [2.0, 1.0]}}}
    failed = {"stage": "parity", "status": "failed", "seconds": 1.0, "run": "x", "error": "OutOfMemoryError: too much"}
    text = "".join(json.dumps(line) + "\n" for line in (curves, base, failed)) + '{"stage": "large", "sta'
    (tmp_path / "gpu.jsonl").write_text(text)
    code, stdout, stderr = run_cli("bench", "page", f"bench.out={tmp_path}")
    assert code == 0, stderr
    page, web = (tmp_path / "page.md").read_text(), (tmp_path / "page.html").read_text()
    for text in (page, web):
        assert "OutOfMemoryError: too much" in text
        assert text.index("parity") < text.index("curves") < text.index("base")
        assert "large" not in text
    assert (tmp_path / "images_per_s.png").stat().st_size > 3000
    assert "curves.png" in page
    assert web.count("data:image/png;base64,") >= 1
    assert "a GPU" in page


def test_a_page_needs_lines(run_cli, tmp_path):
    for text in (None, "", "nothing\n"):
        if text is not None:
            (tmp_path / "gpu.jsonl").write_text(text)
        code, _, stderr = run_cli("bench", "page", f"bench.out={tmp_path}")
        assert code == 2
        assert "gpu.jsonl" in stderr.splitlines()[-1]


def test_nan_and_infinity_are_shown(run_cli, tmp_path):
    """The table that has it is the one that matters."""
    report, wrong = Report(tmp_path / "parity.partial.jsonl"), float("nan")
    report(attention={"bfloat16 197": {"sdpa": {"out": 2e-3}, "triton": {"out": wrong}}})
    report(tokens={"ours_and_fp32": wrong, "package_and_fp32": 1, "ours_and_package": 1})
    report(tokens={"tokens": 9, "distinct": 3, "far": float("inf")})
    Report(tmp_path / "curves.partial.jsonl")(losses={"fast": [2.0, wrong]}, difference={"mean": wrong})
    code, _, stderr = run_cli("bench", "page", f"bench.out={tmp_path}")
    assert code == 0, stderr
    assert "warning" not in stderr
    page = (tmp_path / "page.md").read_text()
    for name, value in {"triton": "out nan", "ours_and_fp32": "nan", "far": "inf"}.items():
        assert any(name in line and f"| {value} " in line for line in page.splitlines())
    assert (tmp_path / "curves.png").stat().st_size > 3000


def test_a_page_leaves_out_what_is_no_line_and_plots_that_fail(run_cli, tmp_path):
    base = {"stage": "base", "status": "ok", "seconds": 1.0, "found": {"seconds": {"ours": [1]}, "about": {"a": 1}}}
    torn = ({"stage": "large", "status": "ok"}, {"stage": "wide", "seconds": 1}, {"status": "ok", "seconds": 1})
    (tmp_path / "gpu.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (base, *torn)))
    code, _, stderr = run_cli("bench", "page", f"bench.out={tmp_path}")
    assert code == 0, stderr
    assert "a plot was not drawn" in stderr
    assert "large" not in (tmp_path / "page.md").read_text()


@pytest.mark.parametrize("name", [each.name for each in STAGES])
def test_findings_that_are_not_complete_are_no_reason_to_fail(name):
    for found in ({"about": {}}, {"started": {"ours": {}}}, {"compared": {"fp32": {}}}, {"queries": {"5": {"a": {}}}}):
        line = {"stage": name, "status": "timeout", "seconds": 1.0, "found": found}
        blocks_of(line)
        assert summary([line]).rows


def test_a_report_is_read_up_to_where_it_was_torn(tmp_path):
    report = Report(tmp_path / "x")
    report(a={"b": [1, 2.123456789]}, nan=float("nan"))
    report(a={"c": None})
    with (tmp_path / "x").open("a") as file:
        file.write('{"found": {"d"')
    assert read(tmp_path / "x") == {"found": {"a": {"b": [1, 2.12346], "c": None}, "nan": "nan"}}


def test_the_description_of_only_names_the_stages():
    assert ",".join(stage.name for stage in STAGES) in GpuGroup.model_fields["only"].description


def test_the_runner_imports_nothing_heavy():
    code = "import sys, beit_pretrain.benchmarks.gpu.runner; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "[]"


def on_a_lean_machine(tmp_path: Path, *words: str) -> list[dict]:
    """Lines of a tiny `bench gpu` on a CPU where nothing is installed that it does not need."""
    modules, _ = refused()
    assert {"scipy", "matplotlib", "wandb", "webdataset", "onnx", "pytest"} <= {*modules}
    assert not {"torch", "numpy", "PIL", "hydra", "dall_e", "timm", "transformers", "lightning", "yaml"} & {*modules}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **lean_python(tmp_path / "lean")}
    given = ["device=cpu", "bench.tiny=true", "bench.out=out", "bench.scratch=scratch"]
    done = subprocess.run(
        [sys.executable, "-m", "beit_pretrain", "bench", "gpu", *given, *words],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    log = (tmp_path / "out/stages.log").read_text() if (tmp_path / "out/stages.log").is_file() else ""
    assert done.returncode == 0, done.stderr + log
    assert "summary" not in done.stderr
    return lines(tmp_path / "out")


@pytest.mark.long
def test_some_stages_on_a_lean_machine(tmp_path):
    found = on_a_lean_machine(tmp_path, "bench.only=facts,attention")
    assert [(line["stage"], line["status"]) for line in found] == [("facts", "ok"), ("attention", "ok")]
    assert found[0]["found"]["flops"]["fp32"]["best"] > 0
    assert found[1]["found"]["queries"].keys() == {"17", "6"}
    assert not list((tmp_path / "out").glob("*.png"))  # matplotlib is not there


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_every_stage_on_a_lean_machine(tmp_path):
    """In the processor's time of at most 35 imports of the package: 16 stages, of which each imports it.

    Seconds differ by a factor of more than two between CPUs, and the cores may have other work.
    """
    start = os.times()
    subprocess.run([sys.executable, "-c", "import beit_pretrain.tasks.pretrain"], check=True)
    before = os.times()
    found = {line["stage"]: line for line in on_a_lean_machine(tmp_path, "bench.seconds=1000")}
    after = os.times()
    assert found.keys() == {each.name for each in STAGES}
    assert {name: line["status"] for name, line in found.items()} == dict.fromkeys(found, "ok")
    assert all("headline" in line for name, line in found.items() if name not in ("data", "warm"))
    base = found["base"]["found"]
    assert len(base["images_per_s"]) == 8
    assert base["started"]["ours"]["graphs"] == 1
    assert found["compile"]["found"]["compared"]["training"]["graphs"] == 1
    assert found["curves"]["found"]["difference"]["largest"] < 1e-3
    assert found["fit"]["found"]["compiled"]["graphs"] >= 1
    assert found["fit"]["found"]["images_per_s"] > 0
    assert "share" in found["fit"]["found"]["profile"]
    assert found["prefetch"]["found"]["prefetch"].keys() == {"off", "on"}
    assert (tmp_path / "out/trace.json.gz").is_file()
    assert len(list((tmp_path / "out").iterdir())) <= 8

    def used(first: os.times_result, last: os.times_result) -> float:
        return last.children_user + last.children_system - first.children_user - first.children_system

    assert used(before, after) < 35 * used(start, before)


def test_a_scratch_folder_of_somebody_else_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(runner.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = runner.scratch_folder(None)
    assert folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(UserError, match="belongs to somebody else"):
        runner.scratch_folder(None)


@pytest.fixture
def setup(tmp_path, monkeypatch) -> Setup:
    """Of a tiny stage in this process, on a CPU, uncompiled unless the test says otherwise."""
    for name in ("out", "scratch"):
        (tmp_path / name).mkdir()
    words = ("+experiment=base_22k", "compile=false")
    return Setup(words, "cpu", True, tmp_path / "out", tmp_path / "scratch", time.monotonic() + 100)


@pytest.fixture
def report(tmp_path) -> Report:
    return Report(tmp_path / "report")


@pytest.fixture
def traced(monkeypatch):
    """torch.compile that only traces."""
    compiled = torch.compile
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda f, mode=None, **how: compiled(f, backend="eager", **how))
    yield
    torch._dynamo.reset()


@pytest.mark.long
def test_the_compile_stage_fails_on_a_graph_break(setup, report, traced, monkeypatch):
    objective = Pretraining.objective

    def broken(self, image, *given):
        torch._dynamo.graph_break()
        return objective(self, image, *given)

    monkeypatch.setattr(Pretraining, "objective", broken)
    with pytest.raises(RuntimeError, match=r"training: .*1 graph break.*graph break: "):
        parity.compiled(setup._replace(words=("+experiment=base_22k", "compile=true")), report)
    found = read(report.path)["found"]["compared"]
    assert found["training"]["graph_breaks"] == found["fp32"]["graph_breaks"] == 1


@pytest.mark.long
def test_the_compile_stage_fails_on_a_recompilation(setup, report, traced, monkeypatch):
    make, sizes = parity.make_batch, itertools.count(2)
    monkeypatch.setattr(parity, "make_batch", lambda bench, n: make(bench._replace(batch_size=next(sizes)), n))
    with pytest.raises(RuntimeError, match=r"training: .*2 recompilations.*size mismatch"):
        parity.compiled(setup._replace(words=("+experiment=base_22k", "compile=true")), report)


@pytest.mark.long
def test_the_compile_stage_fails_on_other_numbers(setup, report, traced, monkeypatch):
    objective = Pretraining.objective

    def off(self, image, *given):
        loss_sum, masked, correct = objective(self, image, *given)
        return MIMOutput(loss_sum * (1.01 if torch.compiler.is_compiling() else 1), masked, correct)

    monkeypatch.setattr(Pretraining, "objective", off)
    with pytest.raises(RuntimeError, match=r"fp32: .*compiled and eager differ: loss 0\.01"):
        parity.compiled(setup._replace(words=("+experiment=base_22k", "compile=true")), report)


@pytest.mark.parametrize(
    ("found", "wrong"),
    [
        ({"sdpa_efficient": {"out": 1e-3}, "triton": {"out": 1.4e-3}, "eager": {"out": 1}, "sdpa_cudnn": "no"}, []),
        ({"sdpa_efficient": {"out": 1e-3}, "triton": {"out": 1.6e-3}}, ["triton: out is off by 1.6e-03"]),
        ({"sdpa_efficient": "refused", "ours": {"out": 1.0, "dq": float("nan")}}, ["ours: dq is not finite"]),
        ({"triton": "RuntimeError: an illegal memory access"}, ["triton: RuntimeError"]),
    ],
)
def test_kernels_of_our_own_are_judged(found, wrong):
    said = parity.wrong_kernels(found)
    assert len(said) == len(wrong)
    assert all(line.startswith(start) for line, start in zip(said, wrong, strict=True))


@pytest.mark.parametrize("factor", [1.0, 1.02, float("nan")])
def test_the_compile_stage_looks_at_numbers_in_training_precision_too(factor, setup, report, monkeypatch):
    """That is what all other stages run."""
    bench = make_bench(setup.config("batch_size=2"))._replace(bf16=True)
    taken, calls = parity.gradients, itertools.count()

    def off(bench, batch):
        loss, found = taken(bench, batch)
        scale = factor if next(calls) == 2 else 1.0  # the first one is in fp32, the second one eager
        return loss * scale, {name: gradient * scale for name, gradient in found.items()}

    monkeypatch.setattr(parity, "make_bench", lambda cfg: bench)
    monkeypatch.setattr(parity, "gradients", off)
    with pytest.raises(RuntimeError) as raised:  # nothing is compiled here, which is wrong by itself
        parity.compare_compiled(report, "x", setup.config("batch_size=2"))
    assert ("differ" in str(raised.value)) == (factor != 1)


def test_two_settings_that_give_other_numbers_are_seen(report):
    one, two = torch.ones(4), torch.tensor([1.0, 1.0, 1.0, 0.5])
    step.compare_numbers(report, {"a": (2.0, {"x": one})}, "a", "b")
    step.compare_numbers(report, {"a": (2.0, {"x": one}), "b": (2.001, {"x": one})}, "a", "b")
    assert read(report.path)["found"]["numbers"]["gradients"] == 0
    for loss, gradient in ((2.0, two), (2.1, one), (float("nan"), one), (2.0, one * float("nan"))):
        with pytest.raises(RuntimeError, match="b is not a"):
            step.compare_numbers(report, {"a": (2.0, {"x": one}), "b": (loss, {"x": gradient})}, "a", "b")


def test_a_run_that_is_cut_short_has_said_how_fast_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "POLL", 0.01)
    said: list[dict] = []
    rows = "step,train/loss,train/images_per_s,train/data_wait\n10,2.0,100,0.5\n20,1.5,200,0.25\n"
    with run.watched(tmp_path, said.append):
        time.sleep(0.05)
        assert not said  # nothing is written yet
        (tmp_path / "metrics.csv").write_text(rows)
        while not said:
            time.sleep(0.01)
    assert (said[-1]["images_per_s"], said[-1]["data_wait"]) == (150, 0.375)


def test_loader_workers_are_no_more_than_shared_memory_takes(setup, monkeypatch):
    monkeypatch.setattr(run, "cores", lambda: 17)
    full = setup._replace(tiny=False)
    for free, expected in ((2**26, 0), (2**30, 13), (2**40, 16)):
        monkeypatch.setattr(run.shutil, "disk_usage", lambda path, free=free: shutil._ntuple_diskusage(0, 0, free))
        assert run.loader_workers(full) == expected
    assert run.loader_workers(setup) == 0


def test_the_compile_stage_fails_where_compilation_does(setup, report, traced, monkeypatch):
    def refuses(self, *given):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(Pretraining, "objective", refuses)
    with pytest.raises(RuntimeError, match=r"fp32: .*no such instruction"):
        parity.compiled(setup._replace(words=("+experiment=base_22k", "compile=true")), report)
    assert "no such instruction" in read(report.path)["errors"]["training"]
    assert read(report.path)["found"]["views"]["graphs"] == 1


@pytest.mark.long
def test_both_paths_learn_the_same_and_other_drops_show(setup, report, monkeypatch):
    monkeypatch.setattr(curves, "WARM_UP", 1)
    monkeypatch.setattr(curves, "RATE", 3e-3)
    curves.curves(setup, report)
    found = read(report.path)["found"]
    assert found["difference"]["largest"] < 1e-4 < found["noise"]["largest"]
    assert len(found["losses"]["plain"]) == setup.sizes.curve
    monkeypatch.setattr(curves.GivenDrop, "forward", lambda self, x: x * 0)
    curves.curves(setup, report)
    assert read(report.path)["found"]["difference"]["largest"] > 1e-3


def test_tokens_that_differ_are_seen(setup, report, monkeypatch):
    bench = make_bench(setup.config("batch_size=2"))
    image = curves.smooth_images(bench, 8, torch.Generator().manual_seed(0))
    same = parity.token_parity(bench, image)
    assert (same["ours_and_fp32"], same["package_and_fp32"], same["far"]) == (1, 1, 0)
    assert same["distinct"] > 5
    encode, first = OpenAITokenizer.encode, torch.arange(16).eq(0)
    monkeypatch.setattr(OpenAITokenizer, "encode", lambda self, image: (encode(self, image) + first) % 512)
    other = parity.token_parity(bench, image)
    assert other["ours_and_fp32"] == other["ours_and_package"] == 1 - 1 / 16
    assert other["far"] > 0


@pytest.mark.long
def test_a_variant_that_fails_leaves_the_others(setup, report, monkeypatch):
    peer_step = variants.peer_step

    def no_memory(bench, name):
        if name == "timm":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 5 GiB.\nMore of it.")
        return peer_step(bench, name)

    monkeypatch.setattr(variants, "peer_step", no_memory)
    step.base(setup, report, names=("ours", *step.OURS, "timm", "reference"))
    found = read(report.path)
    assert list(found["errors"]) == ["timm"]
    assert found["errors"]["timm"].startswith("OutOfMemoryError: CUDA out of memory")
    assert found["found"]["images_per_s"].keys() == {"ours", "ours_cached", "ours_tokenizer", "reference"}
    assert len(found["found"]["seconds"]["ours"]) == setup.sizes.rounds


@pytest.mark.long
def test_a_peer_that_would_compile_too_long_is_left_out(setup, report, monkeypatch):
    small = [*setup.network, "batch_size=2", f"tokenizer.path={setup.encoder()}"]
    own = setup._replace(tiny=False, words=(*setup.words, *small), deadline=time.monotonic() + 50)
    monkeypatch.setattr(Setup, "sizes", SimpleNamespace(base=2, rounds=1))
    step.base(own, report, names=("ours", "reference_compiled"))
    found = read(report.path)
    assert "left out" in found["errors"]["reference_compiled"]
    assert found["found"]["images_per_s"].keys() == {"ours"}


@pytest.mark.long
def test_rounds_end_before_the_time_does(setup, report):
    step.wide(setup._replace(deadline=time.monotonic() + variants.SPARE), report)
    assert len(read(report.path)["found"]["seconds"]["ours_cached"]) == 1


def test_the_users_settings_win_but_for_what_is_compared(setup):
    words = ("+experiment=base_1k", "batch_size=5", "compile=default")
    own = setup._replace(words=words)
    assert own.config("batch_size=3").batch_size == 5
    assert own.config(forced=("compile=reduce-overhead",)).compile == "reduce-overhead"
    assert own.config().name == "base_1k"
    assert own.config(experiment="large_22k").name == "large_22k"


def test_stages_compile_the_same_code_and_find_it_in_the_cache(setup):
    """Torch looks it up by the inputs' layout and by the state of its own switches, among other things."""
    bench = make_bench(setup.config("batch_size=2"))
    given, own = make_batch(bench, 0), next(curves.stream(bench, 0))
    given = {**given.ours, "view": given.view}
    assert {name: (t.dtype, t.stride()) for name, t in own.items()} == {
        name: (given[name].dtype, given[name].stride()) for name in own
    }
    switches = torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn
    before = [switch.fp32_precision for switch in switches]
    with machine.allowing_tf32(False):
        assert [switch.fp32_precision == "tf32" for switch in switches] == [False] * 3
    with machine.allowing_tf32(True):
        assert [switch.fp32_precision for switch in switches] == ["tf32"] * 3
    assert [switch.fp32_precision for switch in switches] == before
