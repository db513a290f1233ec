"""The runner's side of a stage's process: start it ahead of its turn, let it begin, wait for it or end it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from beit_pretrain.benchmarks.gpu.child import NO_GPU
from beit_pretrain.benchmarks.gpu.plan import Stage
from beit_pretrain.benchmarks.gpu.report import read

GRACE = 2.0  # seconds between asking a process to end and killing it, and for it to be gone


class StageProcess:
    """A stage's process, which imports what it needs and waits for `go`."""

    def __init__(self, stage: Stage, job: dict[str, Any], log: Path, environment: dict[str, str]):
        self.stage, self.partial, self.log = stage, Path(job["partial"]), log
        self.partial.unlink(missing_ok=True)
        command = [sys.executable, "-m", "beit_pretrain.benchmarks.gpu.child", json.dumps(job)]
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=file, stderr=file, env=environment, start_new_session=True
            )
        self.began = self.deadline = 0.0
        self.log_start = 0

    def go(self, seconds: float) -> None:
        """Let the stage begin; it has so many seconds."""
        self.began = time.monotonic()
        self.deadline = self.began + seconds
        with self.log.open("a") as file:
            file.write(f"== {self.stage.name}\n")
        self.log_start = self.log.stat().st_size
        with suppress(OSError):  # it has ended already: its exit code will say so
            assert self.process.stdin is not None
            self.process.stdin.write(f"{self.deadline}\n".encode())  # a clock that all processes share
            self.process.stdin.close()

    def wait(self) -> dict[str, Any]:
        """Wait until the stage has ended, or end it. What became of it."""
        try:
            code = self.process.wait(max(0.1, self.deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.end()
            return self.outcome("timeout", f"still running after {self.deadline - self.began:.0f} s")
        self.end()  # what it has started
        if code == 0:
            return self.outcome("ok")
        if code == NO_GPU:
            return self.outcome("failed", "torch finds no GPU")
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return self.outcome("failed", f"{how}: {self.last_lines()}")

    def outcome(self, status: str, error: str | None = None) -> dict[str, Any]:
        """The stage's line, from its report."""
        found = read(self.partial)
        self.partial.unlink(missing_ok=True)
        if status == "ok" and found.get("errors"):
            status = "partly"
        said = found.pop("error", error) if status != "timeout" else error
        waited = round(time.monotonic() - self.began, 1) if self.began else 0.0
        line = {"stage": self.stage.name, "status": status, "seconds": found.pop("seconds", waited), **found}
        return {**line, "error": said} if said else line

    def last_lines(self, count: int = 4) -> str:
        """The end of what the stage has printed."""
        with self.log.open("rb") as file:
            file.seek(max(self.log_start, self.log.stat().st_size - 4000))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
        return " | ".join(lines[-count:])[-400:]

    def end(self) -> None:
        """End the process and all that it has started: they are one process group."""
        for signum, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, GRACE)):
            if signum == signal.SIGTERM and self.process.poll() is not None:
                continue
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signum)
            with suppress(subprocess.TimeoutExpired):  # a process that hangs in the driver: go on without it
                self.process.wait(patience)
