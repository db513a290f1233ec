"""Child processes of a run: if one fails, the run exits with one line, unless it reported an error itself."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

from beit_pretrain.engine import subprocess_launcher as children

LONG, KILLED, FAILED, GOOD = (
    [sys.executable, "-c", code]
    for code in ("import time; time.sleep(60)", "import os; os.kill(os.getpid(), 9)", "import sys; sys.exit(3)", "")
)


@pytest.mark.parametrize(
    ("speaks", "others", "code", "said"),
    [
        (False, [LONG, KILLED], 2, "process 2 of the run was killed (SIGKILL); the others are ended"),
        (False, [FAILED, LONG], 2, "process 1 of the run ended with exit code 3; the others are ended"),
        (True, [FAILED, LONG], 0, ""),
        (False, [GOOD, GOOD], 0, ""),
    ],
)
def test_failed_child_ends_run(speaks, others, code, said, tmp_path, monkeypatch):
    monkeypatch.setattr(children, "PATIENCE", 1.0)
    launcher = children.SubprocessLauncher(None, 2, 1)
    run = os.fork()  # the first process, which may hang
    if run == 0:
        with (tmp_path / "stderr").open("w") as file:
            os.dup2(file.fileno(), 2)
            sys.stderr = file
            launcher.children = [subprocess.Popen(words) for words in others]
            if speaks:
                threading.Timer(0.8, launcher.leaving.set).start()
            launcher._watch()  # does not come back from a run that hangs
            launcher.end()
            os._exit(0 if all(child.wait(10) is not None for child in launcher.children) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(run, 0)[1]) == code
    text = (tmp_path / "stderr").read_text()
    assert said in text
    assert text.count("error:") == bool(said)
