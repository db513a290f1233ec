"""Stages of `bench gpu` that measure nothing: they succeed, fail, hang or die, as the runner's tests need them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from beit_pretrain.benchmarks.gpu.plan import Stage

FOR_EVER = 1000


def fine(setup, report) -> None:
    report(words=list(setup.words), device=setup.device, left=setup.left(), cache=os.environ["TRITON_CACHE_DIR"])
    report(nested={"a": 1})
    report(nested={"b": 2.00000001})
    print("said by fine")


def fails(setup, report) -> None:
    report(before=1)
    raise ValueError("the first line\nthe second line")


def partly(setup, report) -> None:
    with report.part("one"):
        raise RuntimeError("no kernel")
    with report.part("two"):
        report(two=2)


def hangs(setup, report) -> None:
    child = subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({FOR_EVER})"])
    report(children=[os.getpid(), child.pid])
    (setup.out / "hangs").touch()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(FOR_EVER)


def dies(setup, report) -> None:
    report(before=1)
    print("about to die", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def no_gpu(setup, report) -> None:
    os._exit(3)


def slow(setup, report) -> None:
    time.sleep(1)
    report(ended=f"{time.time():.4f}")


def timed(setup, report) -> None:
    report(began=f"{time.time():.4f}")


def stage(name: str, least: float = 0, limit: float = 30, **how) -> Stage:
    return Stage(name, f"about {name}", f"fake_stages:{name}", least, limit, **how)


def lines(out: Path) -> list[dict]:
    """What gpu.jsonl says."""
    return [json.loads(line) for line in (out / "gpu.jsonl").read_text().splitlines()]
