"""The smallest networks, checkpoints and runs, shared by all tests; runs in processes of their own.

The fixtures are in `conftest.py`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from beit_pretrain.data.reader import ShardReader
from beit_pretrain.errors import UserError
from beit_pretrain.tables import read_rows

DVAE = {"vocab_size": 32, "width": 8, "blocks": 1, "code_dim": 8, "in_chans": 3}
SIZE = {"image_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
MIM = {**SIZE, "vocab_size": 32}

# `fit` of a task with a network of SIZE, in this process.
NETWORK = "patch_size=8 model.embed_dim=32 model.num_heads=2 model.depth=2"
COMMON = "image_size=32 global_batch_size=8 data.num_workers=0 log_every=1 threads=1"
TASKS = {
    "pretrain": f"{NETWORK} mask.max_patches=6 mask.min_block=1 data.val_images=8",
    "tokenizer": "model.vocab_size=16 model.width=8 model.blocks=1 model.code_dim=8",
    "finetune": NETWORK,
    "segment": f"{NETWORK} decoder.channels=16 decoder.aux_channels=8",
}
# A pre-training run that has everything (a loader worker, drop path, accumulation), for processes of its own.
TINY = (
    "+experiment=demo_pretrain image_size=32 patch_size=8 mask.max_patches=6 mask.min_block=1 global_batch_size=16 "
    "batch_size=2 data.num_workers=1 model.embed_dim=32 model.num_heads=2 model.depth=2 model.drop_path_rate=.1 "
    "data.val_images=8 data.val_batch=4 log_every=1 threads=1 val_every=2 trainer.accelerator=cpu optim.warmup_steps=1"
).split()
OFFLINE = ("logger=wandb", "logger.mode=offline")
CLOCKS = ("train/images_per_s", "train/data_wait")  # metrics that are no two times the same

STARTED: list[subprocess.Popen] = []  # what a test has started ends with it


def labels(reader: ShardReader) -> np.ndarray:
    """Labels of all samples (samples,), in the order of the shards; -1 where there is none."""
    return np.concatenate([reader.labels(shard) for shard in range(len(reader.sizes))])


def seeded(build: Callable, *args, **settings):
    """`build(...)` with weights that do not depend on which test asked first; the global generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build(*args, **settings)


def write_checkpoint(path: Path, kind: str, model: torch.nn.Module, **about) -> Path:
    """The part of a checkpoint of `fit` that `checkpoint.read_own` reads."""
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    said = {"kind": kind, "model": dict(model.config), **about}
    torch.save({"beit_pretrain": said, "state_dict": state, "global_step": 10}, path)
    return path


def spoil(folder: Path, shard: int, rows: list[int]) -> None:
    """Overwrite images of a shard with what is none, and let the manifest say so."""
    manifest = json.loads((folder / "manifest.json").read_text())
    entry = manifest["shards"][shard]
    path = folder / entry["name"]
    index = np.load(path.with_suffix(".index.npy"))
    data = bytearray(path.read_bytes())
    for row in rows:
        offset = int(index[row]["image_offset"])
        data[offset : offset + 8] = b"no image"
    path.write_bytes(data)
    entry["sha256"] = sha256(data).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


def refusal(function: Callable, *args, **settings) -> str:
    """The one line of the UserError that a call raises."""
    with pytest.raises(UserError) as caught:
        function(*args, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def data_words(shards: Path) -> list[str]:
    return [f"data.train={shards / 'train'}", f"data.val={shards / 'val'}"]


def fit_words(task: str, shards: Path, *more: str) -> list[str]:
    """`fit` of the demo's experiment of a task, as small as it gets; what is given last counts."""
    return ["fit", f"+experiment=demo_{task}", *data_words(shards), *COMMON.split(), *TASKS[task].split(), *more]


def tiny_words(shards: Path, tokenizer: Path) -> list[str]:
    """Settings of `fit`; steps and name are still to be given."""
    return [*TINY, *data_words(shards), f"tokenizer.path={tokenizer}"]


def start(
    words: Sequence[str], folder: Path, log: Path, launcher: Sequence[str] = (), **variables: str
) -> subprocess.Popen:
    """`python [launcher] -m beit_pretrain WORDS` in a folder and a session of its own, its output in a file."""
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *launcher, "-m", "beit_pretrain", *map(str, words)],
            cwd=folder,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "WANDB_SILENT": "true", **variables},
            start_new_session=True,
            preexec_fn=hear_ctrl_c,
        )
    STARTED.append(process)
    return process


def hear_ctrl_c() -> None:
    """Undo what a shell does to jobs in its background, which the tests may be: it lets them ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def signal_group(process: subprocess.Popen, signum: int) -> None:
    """Signal a process and all that it has started in its session."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signum)


def wait_until(
    process: subprocess.Popen, happened: Callable[[], bool], seconds: float = 120, pause: float = 0.01
) -> bool:
    """Wait until `happened()`; whether it did while the process ran."""
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        if happened():
            return True
        time.sleep(pause)
    return False


def tree(process: subprocess.Popen) -> list[int]:
    """A process and all its descendants, in whatever session, as /proc knows them."""
    children: dict[int, list[int]] = {}
    for place in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, IndexError):
            children.setdefault(int(place.read_text().rpartition(")")[2].split()[1]), []).append(int(place.parent.name))
    found = [process.pid]
    for pid in found:  # grows on the way
        found += children.get(pid, [])
    return found


def gone(pid: int) -> bool:
    """Whether a process has ended. One whose parent ended first waits in /proc, as a zombie, until init sees to it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def end_all() -> None:
    """Kill what is left of what was started."""
    for process in STARTED:
        signal_group(process, signal.SIGKILL)
        process.wait()
    STARTED.clear()


def errors(log: Path) -> list[str]:
    """The lines of ours in what a process printed."""
    return [line for line in log.read_text(errors="replace").splitlines() if line.startswith("error:")]


def steps_written(run: Path) -> int:
    """The last step in a run's metrics."""
    with suppress(OSError, ValueError):
        last = (run / "metrics.csv").read_text().rpartition("\n")[0].rpartition("\n")[2]
        return int(last.partition(",")[0])
    return 0


def rows_of(run: Path, every: int = 1) -> dict[int, dict[str, Any]]:
    """A run's metrics by step, less clocks. No step may stand twice, and none (`every`-th) be missing to the last."""
    lines = (run / "metrics.csv").read_text().splitlines()[1:]
    assert [int(line.partition(",")[0]) for line in lines] == [every * n for n in range(1, len(lines) + 1)]
    return {step: comparable(row) for step, row in read_rows(run / "metrics.csv")[1].items()}


def comparable(row: dict[str, Any]) -> dict[str, Any]:
    """A row of metrics less clocks, where not-a-number equals itself."""
    metrics = {k: v for k, v in row.items() if k.startswith(("train/", "val/")) and k not in CLOCKS}
    return {k: "nan" if v != v else v for k, v in metrics.items()}


def largest_difference(one: Path, other: Path) -> float:
    """Of a training loss between two runs that have the same steps."""
    rows = rows_of(one), rows_of(other)
    assert rows[0].keys() == rows[1].keys()
    return max(abs(rows[0][step]["train/loss"] - rows[1][step]["train/loss"]) for step in rows[0])


def state_of(run: Path) -> dict[str, torch.Tensor]:
    """The weights in `last.ckpt` of a run."""
    return last_checkpoint(run)["state_dict"]


def last_checkpoint(run: Path) -> dict:
    """What `last.ckpt` of a run holds."""
    content: dict = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    return content


def same_run(one: Path, other: Path, every: int = 1) -> int:
    """Assert: every step once, every number to the last bit, the same weights and moments. Returns the rows."""
    rows = rows_of(one, every)
    assert rows == rows_of(other, every)
    same_weights(last_checkpoint(one), last_checkpoint(other))
    return len(rows)


def same_weights(one: dict, other: dict) -> None:
    """Assert that two checkpoints have the same weights and moments, to the last bit."""
    assert one["state_dict"].keys() == other["state_dict"].keys()
    for name, tensor in one["state_dict"].items():
        assert torch.equal(tensor, other["state_dict"][name]), name
    moments = [content["optimizer_states"][0]["state"] for content in (one, other)]
    assert moments[0].keys() == moments[1].keys()
    for number, entry in moments[0].items():
        assert all(torch.equal(value, moments[1][number][key]) for key, value in entry.items())
