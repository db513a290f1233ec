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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from beit_pretrain.benchmarks.blocks import summary
from beit_pretrain.benchmarks.gpu.page import LINES, PAGE, append, keep_leftovers, write_page
from beit_pretrain.benchmarks.gpu.plan import STAGES, Stage
from beit_pretrain.benchmarks.gpu.process import NO_GPU, StageProcess
from beit_pretrain.benchmarks.report import PARTIAL
from beit_pretrain.cli import EXPERIMENT
from beit_pretrain.errors import UserError

LOG = "stages.log"
RESERVE = 6.0  # seconds reserved for the page
OWN = ("action=", "device=", "bench.seconds=", "bench.only=", "bench.tiny=", "bench.out=", "bench.scratch=")
SIGNALS = (signal.SIGTERM, signal.SIGHUP)


class Runner:
    """Runs stages, within so many `seconds`, and writes their lines.

    `job` is what every stage gets: words, device, tiny, out, scratch. Stages that were `chosen` may have the time of
    the others.
    """

    def __init__(self, stages: Sequence[Stage], job: dict[str, Any], seconds: float, chosen: bool = False):
        self.stages, self.job, self.chosen, self.out = stages, job, chosen, Path(job["out"])
        self.began, self.run = time.monotonic(), time.strftime("%Y-%m-%dT%H:%M:%S")
        self.deadline = self.began + seconds - min(RESERVE, seconds / 10)
        self.lines: list[dict[str, Any]] = []
        self.ready: StageProcess | None = None  # of the next stage in the foreground
        self.running: list[StageProcess] = []
        self.environment = {  # one cache of compiled code for all stages; no progress bars in the log
            **os.environ,
            "TORCHINDUCTOR_CACHE_DIR": f"{job['scratch']}/inductor",
            "TRITON_CACHE_DIR": f"{job['scratch']}/triton",
            "TORCHINDUCTOR_FX_GRAPH_CACHE": "1",
            "PYTHONUNBUFFERED": "1",
            "TQDM_DISABLE": "1",
            "HF_HUB_OFFLINE": "1",
        }
        if job["device"] == "cpu":  # Triton's interpreter runs our attention, if it is asked before Triton is imported
            self.environment["TRITON_INTERPRET"] = "1"

    def run_all(self) -> None:
        """Run what fits into the time. Raises UserError if the first stage finds no GPU."""
        try:
            for place, stage in enumerate(self.stages):
                while self.running and stage.timed and not stage.background:
                    self.join(self.running[0])
                if self.left() >= stage.least:
                    self.start(stage, [one for one in self.stages[place + 1 :] if not one.background])
                    continue
                self.drop_ready()
                why = f"{max(0.0, self.left()):.0f} s are left, it needs {stage.least:.0f}"
                self.write({"stage": stage.name, "status": "skipped", "seconds": 0.0, "error": why})
            while self.running:
                self.join(self.running[0])
        except BaseException:
            self.stop()
            raise
        finally:
            self.drop_ready()

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def start(self, stage: Stage, later: Sequence[Stage]) -> None:
        """Start a stage. Wait for it if it is in the foreground, while the next stage's process imports."""
        process, limit = self.take(stage), stage.limit
        self.running.append(process)
        if self.chosen and not stage.background:
            limit = max(limit, self.left() / (1 + len(later)))
        process.go(min(limit, self.left()))
        if not stage.background:
            print(f"{stage.name}: {stage.about} ...", file=sys.stderr, flush=True)
            if later and self.left() >= later[0].least:
                self.ready = self.take(later[0])
            self.join(process)

    def take(self, stage: Stage) -> StageProcess:
        """The stage's process: the one that was started ahead, or a new one."""
        if self.ready is not None and self.ready.stage == stage:
            process, self.ready = self.ready, None
            return process
        job = {**self.job, "partial": str(self.out / f"{stage.name}{PARTIAL}")}
        return StageProcess(stage, job, self.out / LOG, self.environment)

    def drop_ready(self) -> None:
        if self.ready is not None:
            self.ready.end()
            self.ready.partial.unlink(missing_ok=True)
            self.ready = None

    def join(self, process: StageProcess) -> None:
        """Wait for a stage and write its line. Raises UserError if the first stage to run found no GPU."""
        line = process.wait()
        if process.process.returncode == NO_GPU and all(line["status"] == "skipped" for line in self.lines):
            raise UserError(
                "torch finds no GPU on this machine; device=cpu bench.tiny=true tries on a CPU whether every stage runs"
            )
        self.running.remove(process)
        self.write(line)

    def stop(self) -> None:
        """End running stages and write their lines."""
        for process in self.running:
            if process.process.poll() is None:
                process.end()
                self.write(process.outcome("stopped", "the run was ended"))
            elif process.process.returncode != NO_GPU:
                self.write(process.wait())

    def write(self, line: dict[str, Any]) -> None:
        """Append a line, flushed to the disk; print it; update the page."""
        self.lines.append({"run": self.run, "at": round(time.monotonic() - self.began, 1), **line})
        print(append(self.out / LINES, self.lines[-1]), flush=True)
        write_page(self.out, plots=False)


def chosen(only: Any) -> list[Stage]:
    """The stages in `bench.only`, in their order. Raises UserError for an unknown name."""
    known = [stage.name for stage in STAGES]
    names = known if only is None else [name.strip() for name in (only.split(",") if isinstance(only, str) else only)]
    for name in names:
        if name not in known:
            raise UserError(f"bench.only={name}: there are {', '.join(known)}")
    return [stage for stage in STAGES if stage.name in names]


def prepared_folder(path: str, setting: str) -> Path:
    """Create a folder, if needed. Raises UserError if it cannot be written."""
    folder = Path(path).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"{setting}={path} cannot be written: {error.strerror}") from None
    return folder


def scratch_folder(path: str | None) -> Path:
    """Folder of caches, images and runs: the given one, or the user's own in the system's temporary folder."""
    if path is not None:
        return prepared_folder(path, "bench.scratch")
    folder = Path(tempfile.gettempdir()) / f"beit_pretrain_bench_{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():  # code is loaded from it
        raise UserError(f"{folder} belongs to somebody else; set bench.scratch=")
    return folder


def leave(signum: int, _: object) -> None:
    """Handler of SIGTERM and SIGHUP: raise SystemExit with a shell's exit code, and ignore the next ones."""
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    raise SystemExit(128 + signum)


def bench_gpu(cfg: Any) -> None:
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
    before = {signum: signal.signal(signum, leave) for signum in SIGNALS}
    try:
        runner.run_all()
    finally:
        for signum, old in before.items():
            signal.signal(signum, old)
        if runner.lines:
            write_page(out)
            print(f"\n{summary(runner.lines).markdown()}")
            print(f"wrote {out / PAGE}; caches, images and runs are in {scratch}", flush=True)
    if all(line["status"] == "skipped" for line in runner.lines):
        raise UserError(f"no stage ran: {runner.lines[0]['stage']}: {runner.lines[0]['error']}; set bench.seconds=")
