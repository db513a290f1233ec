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
from lightning import Callback

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
# A pre-training run with all features (a loader worker, drop path, accumulation), for subprocesses.
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
    """`build(...)` with fixed weights; the global generator is left unchanged."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build(*args, **settings)


def write_checkpoint(path: Path, kind: str, model: torch.nn.Module, **about) -> Path:
    """Write the part of a checkpoint of `fit` that readers need."""
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    said = {"kind": kind, "model": dict(model.config), **about}
    torch.save({"beit_pretrain": said, "state_dict": state, "global_step": 10}, path)
    return path


def spoil(folder: Path, shard: int, rows: list[int]) -> None:
    """Overwrite images of a shard with garbage, and update the manifest."""
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


class Crash(Callback):
    """Raises after a given optimizer step, before the next one begins."""

    def __init__(self, step: int):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            raise RuntimeError("power cut")


def data_words(shards: Path) -> list[str]:
    return [f"data.train={shards / 'train'}", f"data.val={shards / 'val'}"]


def fit_words(task: str, shards: Path, *more: str) -> list[str]:
    """`fit` of the demo experiment of a task at the smallest size; `more` overrides."""
    return ["fit", f"+experiment=demo_{task}", *data_words(shards), *COMMON.split(), *TASKS[task].split(), *more]


def tiny_words(shards: Path, tokenizer: Path) -> list[str]:
    """Settings of TINY without steps and name."""
    return [*TINY, *data_words(shards), f"tokenizer.path={tokenizer}"]


def start(
    words: Sequence[str], folder: Path, log: Path, launcher: Sequence[str] = (), **variables: str
) -> subprocess.Popen:
    """`python [launcher] -m beit_pretrain WORDS` in a folder, in a new session, with its output in a file."""
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
    """Accept Ctrl-C, which shells make their background jobs ignore."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def signal_group(process: subprocess.Popen, signum: int) -> None:
    """Signal a process and its session."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signum)


def wait_until(
    process: subprocess.Popen, happened: Callable[[], bool], seconds: float = 120, pause: float = 0.01
) -> bool:
    """Wait until `happened()`; returns whether it did while the process ran."""
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        if happened():
            return True
        time.sleep(pause)
    return False


def tree(process: subprocess.Popen) -> list[int]:
    """A process and all its descendants, in any session, from /proc."""
    children: dict[int, list[int]] = {}
    for place in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, IndexError):
            children.setdefault(int(place.read_text().rpartition(")")[2].split()[1]), []).append(int(place.parent.name))
    found = [process.pid]
    for pid in found:  # grows on the way
        found += children.get(pid, [])
    return found


def gone(pid: int) -> bool:
    """Whether a process has ended (zombies count as ended)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def end_all() -> None:
    """Kill all processes that are left."""
    for process in STARTED:
        signal_group(process, signal.SIGKILL)
        process.wait()
    STARTED.clear()


def errors(log: Path) -> list[str]:
    """The error lines in the output of a process."""
    return [line for line in log.read_text(errors="replace").splitlines() if line.startswith("error:")]


def steps_written(run: Path) -> int:
    """The last step in the metrics of a run."""
    with suppress(OSError, ValueError):
        last = (run / "metrics.csv").read_text().rpartition("\n")[0].rpartition("\n")[2]
        return int(last.partition(",")[0])
    return 0


def rows_of(run: Path, every: int = 1) -> dict[int, dict[str, Any]]:
    """Metrics of a run by step without times; asserts that every (`every`-th) step occurs exactly once."""
    lines = (run / "metrics.csv").read_text().splitlines()[1:]
    assert [int(line.partition(",")[0]) for line in lines] == [every * n for n in range(1, len(lines) + 1)]
    return {step: comparable(row) for step, row in read_rows(run / "metrics.csv")[1].items()}


def comparable(row: dict[str, Any]) -> dict[str, Any]:
    """A row of metrics without times, with NaN as text so that it equals itself."""
    metrics = {k: v for k, v in row.items() if k.startswith(("train/", "val/")) and k not in CLOCKS}
    return {k: "nan" if v != v else v for k, v in metrics.items()}


def largest_difference(one: Path, other: Path) -> float:
    """The largest difference of a training loss between two runs with the same steps."""
    rows = rows_of(one), rows_of(other)
    assert rows[0].keys() == rows[1].keys()
    return max(abs(rows[0][step]["train/loss"] - rows[1][step]["train/loss"]) for step in rows[0])


def state_of(run: Path) -> dict[str, torch.Tensor]:
    """The weights in `last.ckpt` of a run."""
    return last_checkpoint(run)["state_dict"]


def last_checkpoint(run: Path) -> dict:
    """The content of `last.ckpt` of a run."""
    content: dict = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    return content


def same_run(one: Path, other: Path, every: int = 1) -> int:
    """Assert bit-identical metrics, weights and moments of two runs; returns the number of rows."""
    rows = rows_of(one, every)
    assert rows == rows_of(other, every)
    same_weights(last_checkpoint(one), last_checkpoint(other))
    return len(rows)


def same_weights(one: dict, other: dict) -> None:
    """Assert that two checkpoints have bit-identical weights and moments."""
    assert one["state_dict"].keys() == other["state_dict"].keys()
    for name, tensor in one["state_dict"].items():
        assert torch.equal(tensor, other["state_dict"][name]), name
    moments = [content["optimizer_states"][0]["state"] for content in (one, other)]
    assert moments[0].keys() == moments[1].keys()
    for number, entry in moments[0].items():
        assert all(torch.equal(value, moments[1][number][key]) for key, value in entry.items())
