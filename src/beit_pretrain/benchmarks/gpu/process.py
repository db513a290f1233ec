"""The process of a stage of `bench gpu`, from both sides: `StageProcess` in the runner, `main` in the process itself.

It is started ahead of its turn, imports what the stage needs, waits for a line with its deadline, runs the stage and
ends. Exit code 0: done; 1: the stage failed, and its report says how; `NO_GPU`: there is none.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from beit_pretrain.benchmarks.gpu.plan import Setup, Stage
from beit_pretrain.benchmarks.report import Report, read, short
from beit_pretrain.processes import end_with_parent

NO_GPU = 3
GRACE = 2.0  # seconds between SIGTERM and SIGKILL, and to wait after it
MARGIN = 3.0  # seconds before the limit at which the stack of every thread is written to the log


class StageProcess:
    """A stage's process: it imports what the stage needs and waits for `go`."""

    def __init__(self, stage: Stage, job: dict[str, Any], log: Path, environment: dict[str, str]):
        self.stage, self.partial, self.log = stage, Path(job["partial"]), log
        self.partial.unlink(missing_ok=True)
        self.began, self.seconds, self.log_start = time.monotonic(), 0.0, 0
        command = [sys.executable, "-m", __name__, json.dumps({**job, "function": stage.function})]
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=file, stderr=file, env=environment, start_new_session=True
            )

    def go(self, seconds: float) -> None:
        """Start the stage, with a limit in seconds."""
        with self.log.open("a") as file:
            file.write(f"== {self.stage.name}\n")
        self.began, self.seconds, self.log_start = time.monotonic(), seconds, self.log.stat().st_size
        assert self.process.stdin is not None
        with suppress(OSError):  # the process has ended already; its exit code tells
            self.process.stdin.write(f"{self.began + seconds}\n".encode())  # a clock that all processes share
            self.process.stdin.close()

    def wait(self) -> dict[str, Any]:
        """Wait for the stage, or end it at its limit; returns its line."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(max(0.1, self.began + self.seconds - time.monotonic()))
        code = self.process.poll()
        self.end()  # also processes that it started
        if code is None:
            return self.outcome("timeout", f"still running after {self.seconds:.0f} s")
        if code == NO_GPU:
            return self.outcome("failed", "torch finds no GPU")
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return self.outcome("failed" if code else "ok", f"{how}: {self.last_lines()}" if code else None)

    def outcome(self, status: str, error: str | None = None) -> dict[str, Any]:
        """The stage's line for gpu.jsonl; an error in its report replaces `error`, except after a timeout."""
        found = read(self.partial)
        self.partial.unlink(missing_ok=True)
        if status == "ok" and found.get("errors"):
            status = "partly"
        if error and (status == "timeout" or "error" not in found):
            found["error"] = error
        return {"stage": self.stage.name, "status": status, "seconds": round(time.monotonic() - self.began, 1), **found}

    def last_lines(self, count: int = 4) -> str:
        """The end of what the stage has printed."""
        printed = self.log.read_bytes()[self.log_start :].decode(errors="replace")
        lines = [line.strip() for line in printed.splitlines() if line.strip()]
        return " | ".join(lines[-count:])[-400:]

    def end(self) -> None:
        """End the process and its children, which are one process group."""
        for signum in (signal.SIGTERM, signal.SIGKILL):
            if signum == signal.SIGKILL or self.process.poll() is None:
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(self.process.pid, signum)
                with suppress(subprocess.TimeoutExpired):  # it hangs in the driver; continue without it
                    self.process.wait(GRACE)


def main() -> int:
    """Run the stage of the job on the command line."""
    job = json.loads(sys.argv[1])
    end_with_parent()
    faulthandler.enable()
    report = Report(Path(job["partial"]))
    try:
        stage = resolve_name(job["function"])
        torch: Any = sys.modules.get("torch")  # of a stage that needs it
        if job["device"] != "cpu":
            torch = importlib.import_module("torch")
            if not torch.cuda.is_available():
                return NO_GPU
        line = sys.stdin.readline()
        if not line:  # the runner ended
            return 1
        deadline, start = float(line), time.monotonic()
        faulthandler.dump_traceback_later(max(1.0, deadline - start - MARGIN))
        if job["device"] == "cpu" and torch:
            # Trace only: C++ would be generated and compiled for a minute, which says nothing about a GPU.
            torch.compile = partial(torch.compile, backend="eager")
        stage(Setup.of(job, deadline), report)
        report.write(seconds=round(time.monotonic() - start, 1))
    except BaseException as error:
        traceback.print_exc()
        report.write(error=short(error))
        return 1
    finally:
        faulthandler.cancel_dump_traceback_later()
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # everything is on the disk; what libraries do at the end can hang or crash
