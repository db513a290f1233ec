"""The process of one stage: `python -m beit_pretrain.benchmarks.gpu.child JOB`, started by the runner ahead of its turn.

It imports what the stage needs, waits for a line with its deadline, runs the stage and ends. Exit code 0: done;
1: the stage failed, and the report says how; `NO_GPU`: there is none.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import sys
import time
import traceback
from pathlib import Path

from beit_pretrain.benchmarks.gpu.report import Report
from beit_pretrain.benchmarks.gpu.setup import Setup, light_compiler
from beit_pretrain.processes import end_with_parent

NO_GPU = 3
MARGIN = 3.0  # seconds before the limit at which a stage that still runs leaves the places of its threads in the log


def main() -> int:
    job = json.loads(sys.argv[1])
    end_with_parent()
    faulthandler.enable()
    report = Report(Path(job["partial"]))
    try:
        module, function = job["function"].split(":")
        stage = getattr(importlib.import_module(module), function)
        if job["device"] != "cpu":
            import torch

            if not torch.cuda.is_available():
                return NO_GPU
        line = sys.stdin.readline()
        if not line:  # the runner ended
            return 1
        deadline, start = float(line), time.monotonic()
        faulthandler.dump_traceback_later(max(1.0, deadline - start - MARGIN))
        if job["device"] == "cpu" and "torch" in sys.modules:
            light_compiler()
        stage(Setup.of(job, deadline), report)
        report.took(time.monotonic() - start)
    except BaseException as error:
        traceback.print_exc()
        report.failed(error)
        return 1
    finally:
        faulthandler.cancel_dump_traceback_later()
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # everything is on the disk; what libraries do at the end can hang or crash
