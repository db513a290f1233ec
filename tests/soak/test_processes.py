"""Several processes: two nodes; a process that dies, hangs, differs or never joins; FSDP."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
import torch
from offline import same_history
from tiny import errors, gone, largest_difference, last_checkpoint, rows_of, start, steps_written, tree, wait_until

from beit_pretrain import load_pretrained

pytestmark = [pytest.mark.soak, pytest.mark.long, pytest.mark.timeout(1800)]

STEPS, TIMEOUT = 24, 45  # seconds, of timeout_minutes below
PATIENCE = 40  # of torchrun with what it ends


@pytest.fixture
def words(made) -> list[str]:
    """Micro-batches of one: four processes take two each, two processes four each."""
    return [
        *made.words,
        "global_batch_size=16",
        "batch_size=2",
        "data.num_workers=1",
        f"timeout_minutes={TIMEOUT / 60}",
    ]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def nodes(words: list[str], folder: Path) -> list[subprocess.Popen]:
    """Two torchrun of two processes each, as two machines would start them; their logs are `node0`, `node1`."""
    launcher = "-m torch.distributed.run --nnodes=2 --nproc-per-node=2 --master-addr=127.0.0.1".split()
    port = f"--master-port={free_port()}"
    return [
        start(words, folder, folder / f"node{n}", [*launcher, port, f"--node-rank={n}"], GLOO_SOCKET_IFNAME="lo")
        for n in range(2)
    ]


def process_of(rank: int, of: subprocess.Popen) -> int:
    """The process of a rank among the descendants of a launcher (its loader workers follow it)."""
    for pid in tree(of):
        if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            return pid
    raise AssertionError(f"no process of rank {rank}")


def test_two_nodes_of_two_processes(words, tmp_path, measured):
    """2 torchrun x 2 processes: one is killed, one hangs, one node is told to stop; each time the run resumes."""
    words = [*words, f"steps={STEPS}", "save_every=2"]
    assert [node.wait(600) for node in nodes([*words, "name=whole"], tmp_path)] == [0, 0], log_of(tmp_path)
    words, run, took = [*words, "name=two"], tmp_path / "runs/two", []
    for aim, rank, signum in ((5, 3, signal.SIGKILL), (11, 2, signal.SIGSTOP), (17, None, signal.SIGTERM)):
        both = nodes(words, tmp_path)
        assert wait_until(both[0], lambda aim=aim: steps_written(run) >= aim, 300), log_of(tmp_path)
        os.kill(both[0].pid if rank is None else process_of(rank, both[1]), signum)
        happened = time.monotonic()
        codes = [both[0].wait(300), both[1].wait(300)]
        took.append(time.monotonic() - happened)
        assert all(codes), codes
        said = log_of(tmp_path)
        if signum == signal.SIGTERM:
            assert "stopped by SIGTERM after step" in said
        else:
            assert "error: another process of the run ended, or did not answer for" in said, said[-3000:]
            assert took[-1] < (TIMEOUT if signum == signal.SIGKILL else TIMEOUT + PATIENCE)
    both = nodes(words, tmp_path)
    assert [node.wait(600) for node in both] == [0, 0], log_of(tmp_path)
    assert "resuming two after step" in (tmp_path / "node0").read_text()
    assert "pretrain two" not in (tmp_path / "node1").read_text()  # only rank 0 speaks
    # DDP rebuilds its buckets after the first step, and gloo's order of summing four numbers depends on them.
    found = largest_difference(tmp_path / "runs/whole", run)
    assert found < 1e-5
    same_history(run)
    measured(
        f"all ended {took[0]:.0f} s after the SIGKILL, {took[1]:.0f} s after one hung (time-out {TIMEOUT} s), each"
    )
    measured(
        f"with a line; {took[2]:.0f} s after SIGTERM to one torchrun. {STEPS} steps once, losses within {found:.1e}"
    )


def log_of(folder: Path) -> str:
    return "".join((folder / f"node{n}").read_text(errors="replace") for n in range(2))


@pytest.mark.parametrize(("signum", "within"), [(signal.SIGKILL, 20), (signal.SIGSTOP, TIMEOUT + 20)])
def test_child_process_dies(signum, within, words, tmp_path, measured):
    """trainer.devices=2 with the second process killed or hanging: the first exits with one line; the run resumes."""
    log, run = tmp_path / "log", tmp_path / "runs/run"
    words = [*words, "steps=40", "name=run", "trainer.devices=2"]
    process = start(words, tmp_path, log)
    assert wait_until(process, lambda: steps_written(run) >= 8), log.read_text()
    child = process_of_local(1, process)
    os.kill(child, signum)
    happened = time.monotonic()
    assert process.wait(200) == 2, log.read_text()[-3000:]
    took = time.monotonic() - happened
    (said,) = errors(log)
    assert "another process of the run ended, or did not answer" in said or "process 1 of the run was killed" in said
    assert took < within
    assert gone(child)
    assert start(words, tmp_path, log).wait(300) == 0, log.read_text()[-3000:]
    assert list(rows_of(run)) == list(range(1, 41))
    measured(f"{signum.name}: ended after {took:.0f} s, exit code 2; {said.removeprefix('error: ')[:70]}...")


def process_of_local(rank: int, of: subprocess.Popen) -> int:
    for pid in tree(of)[1:]:
        if f"LOCAL_RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            return pid
    raise AssertionError(f"no process of local rank {rank}")


def as_slurm_starts(words: list[list[str]], ports: list[str], folder: Path) -> list[subprocess.Popen]:
    """One process on each of two nodes, as srun starts them; their logs are `0`, `1`."""
    slurm = {"SLURM_NTASKS": "2", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_LOCALID": "0"}
    slurm |= {"SLURM_JOB_ID": "1", "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    return [
        start(
            words[n], folder, folder / f"{n}", SLURM_PROCID=f"{n}", SLURM_NODEID=f"{n}", MASTER_PORT=ports[n], **slurm
        )
        for n in range(2)
    ]


@pytest.mark.parametrize("what", ["settings", "data"])
def test_inconsistent_process_is_named(what, words, made, tmp_path, measured):
    """A process whose config or images differ from rank 0: one line on rank 0, and all exit."""
    words = [*words, "steps=2", "name=x"]
    other = [*words, "optim.lr=1e-3"]
    if what == "data":
        line = "shards make src=synthetic out=other images=480 val=.1 size=48 samples_per_shard=36 num_workers=1 seed=1"
        assert start(line.split(), tmp_path, tmp_path / "make").wait(120) == 0
        other = [*words, f"data.train={tmp_path / 'other/train'}"]
    both = as_slurm_starts([words, other], [free_port()] * 2, tmp_path)
    assert [process.wait(200) for process in both] == [2, 2]
    (said,) = errors(tmp_path / "0")
    assert "rank 1 on" in said
    assert ("optim.lr=0.001 (rank 0: 0.003)" if what == "settings" else "images of data.train=") in said
    assert errors(tmp_path / "1") == []
    measured(said.removeprefix("error: ").replace(socket.gethostname(), "HOST"))


def test_rendezvous_timeout(words, tmp_path, measured):
    """An unreachable rendezvous: after the configured time-out each process says where it waited."""
    words = [word for word in words if "timeout_minutes" not in word] + ["steps=2", "timeout_minutes=.05"]
    began = time.monotonic()
    both = as_slurm_starts([[*words, f"name={n}"] for n in range(2)], [free_port(), free_port()], tmp_path)
    assert [process.wait(200) for process in both] == [2, 2]
    for n in range(2):
        (said,) = errors(tmp_path / f"{n}")
        assert "did not meet at 127.0.0.1" in said
    measured(f"time-out 3 s, all ended {time.monotonic() - began:.0f} s after their start; {said[:60]}...")


def test_fsdp(words, watch, tmp_path, measured):
    """FSDP on 2 processes gives the steps of one process, also after a kill, a NaN, and resumed on one process."""
    log, words = tmp_path / "log", [*words, f"steps={STEPS}"]
    one = start([*words, "name=one"], tmp_path, log, **watch(LEAVE_OUT="7"))
    assert one.wait(300) == 0, log.read_text()[-3000:]
    cut, run = [*words, "name=cut", "save_every=1"], tmp_path / "runs/cut"
    sharded = [*cut, "trainer.devices=2", "trainer.strategy=fsdp"]
    killed = start(sharded, tmp_path, log, **watch(POISON="7"))
    assert wait_until(killed, lambda: steps_written(run) >= 3, 300), log.read_text()[-3000:]
    killed.kill()
    killed.wait()
    again = start(sharded, tmp_path, log, **watch(POISON="7"))
    assert wait_until(again, lambda: steps_written(run) >= 16, 300), log.read_text()[-3000:]
    again.send_signal(signal.SIGTERM)
    assert again.wait(200) == 75, log.read_text()[-3000:]
    assert "step 8: 1 update was skipped" in log.read_text()
    assert start(cut, tmp_path, log).wait(300) == 0, log.read_text()[-3000:]
    found = largest_difference(tmp_path / "runs/one", run)
    assert len(rows_of(run)) == STEPS
    assert found < 1e-4
    for name, tensor in last_checkpoint(tmp_path / "runs/one")["state_dict"].items():
        torch.testing.assert_close(last_checkpoint(run)["state_dict"][name], tensor, rtol=1e-3, atol=1e-5)
    assert load_pretrained(run / "checkpoints/last.ckpt", head="mim") is not None
    same_history(run)
    measured(f"{STEPS} steps, the last ones without FSDP: largest difference of a loss from one process {found:.1e}")
