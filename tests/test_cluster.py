"""Many processes: counts that cannot be true, processes that do not agree, do not meet, or die; FSDP."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from test_launch import SRUN, TORCHRUN, variables  # noqa: F401 (a fixture)
from tiny import errors, start, tiny_words

from beit_pretrain import load_pretrained
from beit_pretrain.errors import UserError
from beit_pretrain.runs.cluster import arranged, disagreement, flat, lost_connection
from beit_pretrain.training.metrics import curve

TRAINER = {"accelerator": "cpu", "devices": "auto", "num_nodes": "auto", "strategy": "auto", "precision": "32-true"}


@pytest.fixture
def words(shards, dvae_checkpoint):
    return ["fit", *tiny_words(shards, dvae_checkpoint)]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.mark.parametrize(
    ("given", "kind", "devices", "nodes"),
    [
        ({}, LightningEnvironment, "auto", 1),
        (SRUN, SLURMEnvironment, 4, 2),
        (TORCHRUN, TorchElasticEnvironment, 2, 2),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, LightningEnvironment, "auto", 1),
    ],
)
def test_counts_come_from_the_launcher(given, kind, devices, nodes, variables):  # noqa: F811
    variables(given)
    settings = arranged(TRAINER, 3)
    assert (settings["devices"], settings["num_nodes"]) == (devices, nodes)
    (environment,) = settings["plugins"]
    assert type(environment) is kind
    assert getattr(environment, "auto_requeue", False) is False
    if given and nodes > 1:
        assert isinstance(settings["strategy"], DDPStrategy)
        assert settings["strategy"]._timeout.total_seconds() == 180


@pytest.mark.parametrize(
    ("given", "asked", "gpus", "said"),
    [
        (
            SRUN,
            {"devices": 2},
            0,
            "trainer.devices=2 x trainer.num_nodes=2 = 4 processes, but srun started 8: 4 on each",
        ),
        (SRUN, {"num_nodes": 1}, 0, "= 4 processes, but srun started 8"),
        (TORCHRUN, {"devices": 4, "num_nodes": 1}, 0, "but torchrun started 4: 2 on each of 2 nodes"),
        ({}, {"accelerator": "auto", "devices": 8}, 2, "has 2 GPUs"),
        (TORCHRUN, {"accelerator": "gpu"}, 1, "trainer.devices=2, but .* has 1 GPU$"),
        ({}, {"accelerator": "gpu"}, 0, "torch finds no GPU"),
        ({}, {"num_nodes": 2}, 0, "needs a launcher on every node"),
        ({}, {"strategy": "fsdp"}, 0, "more than one"),
    ],
)
def test_wrong_counts_are_refused(given, asked, gpus, said, variables, monkeypatch):  # noqa: F811
    variables(given)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(UserError, match=said):
        arranged({**TRAINER, **asked}, 3)


def test_wrong_counts_are_said_once_with_exit_code_2(words, run_cli, variables):  # noqa: F811
    for rank, lines in (("0", 1), ("5", 0)):
        variables({**SRUN, "SLURM_PROCID": rank})
        code, _, stderr = run_cli(*words, "steps=1", "trainer.devices=3")
        assert code == 2
        assert len([line for line in stderr.splitlines() if line.startswith("error:")]) == lines, stderr


def test_fsdp_is_a_strategy(variables):  # noqa: F811
    variables({})
    assert isinstance(arranged({**TRAINER, "strategy": "fsdp", "devices": 2}, 3)["strategy"], ModelParallelStrategy)


@pytest.mark.parametrize("value", ["0", "two", "[]", "true", "-2"])
def test_devices_are_numbers(value, words, run_cli):
    code, _, stderr = run_cli(*words, "steps=1", f"trainer.devices={value}")
    assert code == 2
    assert "trainer.devices must be auto" in stderr


def test_the_first_process_that_differs_is_named():
    same = {"optim.lr": "0.1", "images of data.train": "abc"}
    assert disagreement([("a", same), ("b", dict(same))]) is None
    said = disagreement([("a", same), ("b", same), ("c", {**same, "images of data.train": "abd"})])
    assert said is not None
    assert "rank 2 on c" in said
    assert "images of data.train=abd (rank 0: abc)" in said
    assert disagreement([("a", same), ("b", {**same, "more": "1"})]) is not None


def test_places_on_a_machine_may_differ():
    assert flat({"data": {"train": "/here", "cache_dir": "/there", "scale": [1, 2]}, "seed": 0}) == {
        "data.scale": "[1, 2]",
        "seed": "0",
    }


def test_the_network_error_behind_another_one():
    def fail():
        try:
            raise RuntimeError("[/x/pair.cc:538] Read error [127.0.0.1]:1: Connection reset by peer")
        except RuntimeError as error:
            raise RuntimeError("DataLoader worker is killed") from error

    with pytest.raises(RuntimeError) as caught:
        fail()
    assert "reset by peer" in str(lost_connection(caught.value))
    assert lost_connection(RuntimeError("shapes differ")) is None


def wait_for(path: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert path.exists()


def nodes(words: list[str], folder: Path, port: str, *more: str):
    """Two torchrun of two processes each, as two machines would start them; their logs are `node0`, `node1`."""
    launcher = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2", "--master-addr=127.0.0.1"]
    return [
        start([*words, *more], folder, folder / f"node{n}", [*launcher, f"--master-port={port}", f"--node-rank={n}"])
        for n in range(2)
    ]


def process_of(rank: int, of: int) -> int:
    """The process of a rank among the descendants of a torchrun."""
    for place in Path("/proc").glob("[0-9]*"):
        try:
            variables = (place / "environ").read_bytes().split(b"\0")
            parent = int((place / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
        if parent == of and f"RANK={rank}".encode() in variables:
            return int(place.name)
    raise AssertionError(f"no process of rank {rank}")


@pytest.mark.soak
@pytest.mark.long
def test_one_of_four_processes_on_two_nodes_is_killed_and_the_run_goes_on(words, tmp_path):
    words = [*words, "name=two", "save_every=1", "timeout_minutes=.5"]
    last = tmp_path / "runs/two/checkpoints/last.ckpt"
    both = nodes(words, tmp_path, free_port(), "steps=24")
    wait_for(last)
    os.kill(process_of(3, both[1].pid), signal.SIGKILL)
    killed = time.monotonic()
    assert [node.wait(60) != 0 for node in both] == [True, True]
    assert time.monotonic() - killed < 35
    said = errors(tmp_path / "node0") + errors(tmp_path / "node1")
    assert any("another process of the run ended" in line for line in said), said
    steps = torch.load(last, weights_only=True)["global_step"]
    assert steps < 24
    both = nodes(words, tmp_path, free_port(), "steps=24")
    assert [node.wait(120) for node in both] == [0, 0], (tmp_path / "node0").read_text()[-2000:]
    assert "continuing two after step" in (tmp_path / "node0").read_text()
    assert torch.load(last, weights_only=True)["global_step"] == 24
    assert curve(tmp_path / "runs/two/metrics.csv", "train/loss")[0][-1] == 24
    assert "pretrain two" not in (tmp_path / "node1").read_text()  # only rank 0 speaks


@pytest.mark.soak
@pytest.mark.long
def test_a_process_with_other_settings_ends_the_run_with_one_line(words, tmp_path):
    port = free_port()
    slurm = {"SLURM_NTASKS": "2", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_LOCALID": "0"}
    slurm |= {"SLURM_JOB_ID": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    both = [
        start([*words, "steps=2", "name=x", f"optim.lr=1e-{2 + n}", "timeout_minutes=.5"], tmp_path, tmp_path / f"{n}",
              SLURM_PROCID=str(n), SLURM_NODEID=str(n), **slurm)
        for n in range(2)
    ]  # fmt: skip
    assert [process.wait(60) for process in both] == [2, 2]
    (said,) = errors(tmp_path / "0")
    assert "rank 1 on" in said
    assert "optim.lr=0.001 (rank 0: 0.01)" in said
    assert errors(tmp_path / "1") == []


@pytest.mark.soak
@pytest.mark.long
def test_a_meeting_place_that_nobody_is_at(words, tmp_path):
    slurm = {"SLURM_NTASKS": "2", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_LOCALID": "0"}
    slurm |= {"SLURM_JOB_ID": "1", "MASTER_ADDR": "127.0.0.1"}
    both = [
        start([*words, "steps=2", f"name={n}", "timeout_minutes=.05"], tmp_path, tmp_path / f"{n}",
              SLURM_PROCID=str(n), SLURM_NODEID=str(n), MASTER_PORT=free_port(), **slurm)
        for n in range(2)
    ]  # fmt: skip
    assert [process.wait(60) for process in both] == [2, 2]
    for n in range(2):
        (said,) = errors(tmp_path / f"{n}")
        assert "did not meet at 127.0.0.1" in said


@pytest.mark.soak
@pytest.mark.long
def test_fsdp_takes_the_steps_of_one_process_also_after_a_kill(words, tmp_path):
    log = tmp_path / "log"
    assert start([*words, "name=one", "steps=12"], tmp_path, log).wait(60) == 0
    cut = [*words, "name=cut", "steps=12", "save_every=1", "trainer.devices=2", "trainer.strategy=fsdp"]
    killed = start(cut, tmp_path, log)
    wait_for(tmp_path / "runs/cut/checkpoints/last.ckpt")
    killed.kill()
    killed.wait()
    assert start(cut, tmp_path, log).wait(90) == 0, log.read_text()[-2000:]
    assert "continuing cut after step" in log.read_text()
    for metric in ("train/loss", "train/gradient_norm", "val/loss"):
        expected, found = (dict(zip(*curve(tmp_path / f"runs/{n}/metrics.csv", metric))) for n in ("one", "cut"))
        assert found == pytest.approx({step: expected[step] for step in found}, rel=1e-3), metric
        assert max(found) == 12
    last = tmp_path / "runs/cut/checkpoints/last.ckpt"
    whole, other = (torch.load(tmp_path / f"runs/{n}/checkpoints/last.ckpt", weights_only=True) for n in ("one", "cut"))
    for name, tensor in whole["state_dict"].items():
        torch.testing.assert_close(other["state_dict"][name], tensor, rtol=1e-3, atol=1e-5)
    assert load_pretrained(last, head="mim") is not None
