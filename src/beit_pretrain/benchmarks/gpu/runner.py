"""`bench gpu`: run the stages one after the other, each in a process of its own, within a time limit.

After every stage a line is added to `gpu.jsonl`, on the disk before the next stage begins, and the page is written. A
stage that fails or takes too long costs the others nothing. This process imports nothing heavy; while a stage runs, the
process of the next one starts and imports.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from omegaconf import DictConfig

from beit_pretrain.benchmarks.gpu.blocks import summary
from beit_pretrain.benchmarks.gpu.child import NO_GPU
from beit_pretrain.benchmarks.gpu.page import LINES, PAGE, append, as_markdown, keep_leftovers, write_page
from beit_pretrain.benchmarks.gpu.plan import EXPERIMENT, STAGES, Stage
from beit_pretrain.benchmarks.gpu.process import StageProcess
from beit_pretrain.benchmarks.gpu.report import PARTIAL
from beit_pretrain.errors import UserError

LOG = "stages.log"
RESERVE = 6.0  # seconds kept for the page
OWN = ("action=", "device=", "bench.seconds=", "bench.only=", "bench.tiny=", "bench.out=", "bench.scratch=")


class Terminated(BaseException):
    """SIGTERM or SIGHUP came."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class Runner:
    """Runs stages and writes their lines.

    Args:
        stages: in their order.
        job: what every stage is told: words, device, tiny, out, scratch.
        seconds: for everything.
        chosen: the stages are a choice, and may have the time of those that were not chosen.
    """

    def __init__(self, stages: Sequence[Stage], job: dict[str, Any], seconds: float, chosen: bool = False):
        self.stages, self.job, self.chosen = list(stages), job, chosen
        self.out, self.scratch = Path(job["out"]), Path(job["scratch"])
        self.began = time.monotonic()
        self.deadline = self.began + seconds - min(RESERVE, seconds / 10)
        self.run = time.strftime("%Y-%m-%dT%H:%M:%S")
        self.lines: list[dict[str, Any]] = []
        self.ready: StageProcess | None = None  # the next stage's
        self.current: StageProcess | None = None
        self.background: list[StageProcess] = []

    def run_all(self) -> None:
        """Run what fits into the time. Raises UserError if the first stage finds no GPU."""
        try:
            for place, stage in enumerate(self.stages):
                if stage.timed and not stage.background:
                    self.join_background()
                if self.left() < stage.least:
                    why = f"{max(0.0, self.left()):.0f} s are left, it needs {stage.least:.0f}"
                    self.write({"stage": stage.name, "status": "skipped", "seconds": 0.0, "error": why})
                elif stage.background:
                    child = self.take(stage)
                    self.background.append(child)
                    child.go(min(stage.limit, self.left()))
                else:
                    self.run_one(stage, self.stages[place + 1 :])
            self.join_background()
        except BaseException:
            self.stop()
            raise
        finally:
            if self.ready is not None:
                self.ready.end()
                self.ready.partial.unlink(missing_ok=True)

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def run_one(self, stage: Stage, later: Sequence[Stage]) -> None:
        self.current = self.take(stage)
        print(f"{stage.name}: {stage.about} ...", file=sys.stderr, flush=True)
        share = self.left() / (1 + sum(not one.background for one in later))
        self.current.go(min(max(stage.limit, share) if self.chosen else stage.limit, self.left()))
        self.prepare(next((one for one in later if not one.background), None))
        line = self.current.wait()
        self.check_gpu(self.current)
        self.current = None
        self.write(line)

    def check_gpu(self, child: StageProcess) -> None:
        """Raise UserError if the first stage to run has found no GPU."""
        if child.process.returncode == NO_GPU and all(line["status"] == "skipped" for line in self.lines):
            raise UserError(
                "torch finds no GPU on this machine; device=cpu bench.tiny=true tries on a CPU whether every stage runs"
            )

    def take(self, stage: Stage) -> StageProcess:
        """The stage's process: the one that is ready, if it is this stage's."""
        ready = self.ready
        if ready is not None and ready.stage == stage:
            self.ready = None
            return ready
        own = {"function": stage.function, "partial": str(self.out / f"{stage.name}{PARTIAL}")}
        return StageProcess(stage, {**self.job, **own}, self.out / LOG, self.environment)

    def prepare(self, stage: Stage | None) -> None:
        """Start the next stage's process ahead of its turn."""
        if stage is None or self.left() < stage.least:
            return
        if self.ready is not None and self.ready.stage != stage:
            self.ready.end()
            self.ready = None
        self.ready = self.ready or self.take(stage)

    def join_background(self) -> None:
        while self.background:
            line = self.background[0].wait()
            self.check_gpu(self.background[0])
            self.background.pop(0)
            self.write(line)

    def stop(self) -> None:
        """End what runs; keep what it has found."""
        for child in [*self.background, *([self.current] if self.current else [])]:
            if child.process.poll() is None:
                child.end()
                self.write(child.outcome("stopped", "the run was ended"))
            elif child.process.returncode != NO_GPU:
                self.write(child.wait())

    def write(self, line: dict[str, Any]) -> None:
        """Append a line, on the disk before anything else happens; print it; write the page."""
        line = {"run": self.run, "at": round(time.monotonic() - self.began, 1), **line}
        self.lines.append(line)
        text = append(self.out / LINES, line)
        print(text, flush=True)
        write_page(self.out, plots=False)

    @property
    def environment(self) -> dict[str, str]:
        """One cache of compiled code for all stages; no progress bars in the log."""
        caches = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
        return {
            **os.environ,
            **{name: str(self.scratch / folder) for name, folder in caches.items()},
            "TORCHINDUCTOR_FX_GRAPH_CACHE": "1",
            "PYTHONUNBUFFERED": "1",
            "TQDM_DISABLE": "1",
            "HF_HUB_OFFLINE": "1",
            # A trial on a CPU: Triton's interpreter runs our attention, if it is asked before Triton is imported.
            **({"TRITON_INTERPRET": "1"} if self.job.get("device") == "cpu" else {}),
        }


def chosen(only: Any) -> list[Stage]:
    """The stages that `bench.only` names, in their order. Raises UserError for a name that is none."""
    if only is None:
        return list(STAGES)
    names = [name.strip() for name in (only.split(",") if isinstance(only, str) else only)]
    known = [stage.name for stage in STAGES]
    for name in names:
        if name not in known:
            raise UserError(f"bench.only={name}: there are {', '.join(known)}")
    return [stage for stage in STAGES if stage.name in names]


def prepared_folder(path: str, setting: str) -> Path:
    """A folder that exists and can be written into. Raises UserError."""
    folder = Path(path).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{setting}={path} cannot be written: {error.strerror}") from None
    return folder


def scratch_folder(path: str | None) -> Path:
    """Where caches, images and runs are: as asked for, or the user's own in the system's temporary folder."""
    if path is not None:
        return prepared_folder(path, "bench.scratch")
    folder = Path(tempfile.gettempdir()) / f"beit_pretrain_bench_{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():  # code is loaded from it
        raise UserError(f"{folder} belongs to somebody else; set bench.scratch=")
    return folder


@contextmanager
def terminated_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP raise `Terminated` here; the next ones are ignored."""

    def handler(signum: int, frame: FrameType | None) -> None:
        for each in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(each, signal.SIG_IGN)
        raise Terminated(signum)

    before = {signum: signal.signal(signum, handler) for signum in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for signum, old in before.items():
            signal.signal(signum, old)


def bench_gpu(cfg: DictConfig) -> None:
    """Run the stages and write the page. Raises UserError if none ran, SystemExit(143) after SIGTERM."""
    plan = chosen(cfg.bench.only)
    if cfg.device == "cpu" and not cfg.bench.tiny:
        raise UserError("device=cpu needs bench.tiny=true: the full sizes are for a GPU")
    out, scratch = prepared_folder(cfg.bench.out, "bench.out"), scratch_folder(cfg.bench.scratch)
    keep_leftovers(out)
    words = [word for word in sys.argv[1:] if "=" in word and not word.startswith(OWN)]
    words = words if any(word.startswith("+experiment=") for word in words) else [f"+experiment={EXPERIMENT}", *words]
    job = {"words": words, "device": cfg.device, "tiny": cfg.bench.tiny, "out": str(out), "scratch": str(scratch)}
    runner = Runner(plan, job, cfg.bench.seconds, chosen=cfg.bench.only is not None)
    code = None
    try:
        with terminated_by_signals():
            runner.run_all()
    except Terminated as error:
        code = 128 + error.signum
    finally:
        if runner.lines:
            write_page(out)
            print(f"\n{as_markdown(summary(runner.lines))}")
            print(f"wrote {out / PAGE}; caches, images and runs are in {scratch}", flush=True)
    if code is not None:
        raise SystemExit(code)
    if all(line["status"] == "skipped" for line in runner.lines):
        raise UserError(f"no stage ran: {runner.lines[0]['stage']}: {runner.lines[0]['error']}; set bench.seconds=")
