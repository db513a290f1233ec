"""Distributed runs: resolves devices, nodes and strategy, checks that all ranks agree, and explains failures.

Lightning runs the processes. This module fills in its settings from the launcher, rejects inconsistent counts before
the rendezvous, and compares every process with rank 0 before the first step.
"""

from __future__ import annotations

import hashlib
import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    KubeflowEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from torch import distributed

from beit_pretrain.data.datamodule import ShardData
from beit_pretrain.data.loader_workers import worker_died
from beit_pretrain.engine.dist_env import DistEnv, launched
from beit_pretrain.engine.preemption import Preempted
from beit_pretrain.engine.subprocess_launcher import DDP, FSDP, SubprocessLauncher
from beit_pretrain.errors import AllRanksError, UserError, first_line

MAY_DIFFER = ("data.train", "data.val", "data.cache_dir")  # paths may differ between machines; contents are compared

# Matches the errors of torch, gloo and NCCL when another process has ended or does not answer.
GONE = re.compile(
    r"gloo|nccl|connection (?:closed|reset|refused)|broken pipe|timed out|application timeout|pair closure|socket"
    r"|rendezvous|clients joined",
    re.I,
)


def resolve_trainer_args(trainer: dict[str, Any], minutes: float, compression: str | None = None) -> dict[str, Any]:
    """Fill in devices, nodes, strategy and cluster environment of the settings `trainer`.

    Raises AllRanksError if they contradict the launcher or the machine. `minutes` and `compression`: the settings
    `timeout_minutes` and `gradient_compression`.
    """
    launch = launched()
    settings = dict(trainer)
    gpus = visible_gpus(settings["accelerator"])
    if launch and settings["devices"] in ("auto", -1):
        settings["devices"] = launch.per_node
    if settings["num_nodes"] == "auto":
        settings["num_nodes"] = launch.nodes if launch else 1
    per_node, nodes = device_count(settings["devices"], gpus), settings["num_nodes"]
    check_counts(per_node, nodes, gpus, launch)
    settings["strategy"] = strategy(settings["strategy"], per_node * nodes, minutes, compression)
    settings["plugins"] = [environment(launch)]
    return settings


def visible_gpus(accelerator: str) -> int:
    """Number of GPUs for this accelerator; 0 = CPU. Raises UserError if GPUs are requested and there are none."""
    if accelerator not in ("auto", "gpu", "cuda"):
        return 0
    gpus = torch.cuda.device_count()
    if not gpus and accelerator != "auto":
        raise UserError(f"trainer.accelerator={accelerator}, but torch finds no GPU on {socket.gethostname()}")
    return gpus


def device_count(devices: Any, gpus: int) -> int:
    """Devices of one machine that the setting `trainer.devices` means."""
    if devices in ("auto", -1):
        return gpus or 1
    return len(devices) if isinstance(devices, list) else int(devices)


def check_counts(devices: int, nodes: int, gpus: int, launch: DistEnv | None) -> None:
    """Raise UserError if devices, nodes, GPUs and started processes are inconsistent (same on all ranks)."""
    if gpus and devices > gpus:
        raise AllRanksError(f"trainer.devices={devices}, but {socket.gethostname()} has {gpus} GPU{'s' * (gpus > 1)}")
    if launch and (devices, nodes) != (launch.per_node, launch.nodes):
        raise AllRanksError(
            f"trainer.devices={devices} x trainer.num_nodes={nodes} = {devices * nodes} processes, but {launch.by} "
            f"started {launch.processes}: {launch.per_node} on each of {launch.nodes} node{'s' * (launch.nodes > 1)}; "
            "leave both settings out, or start that many"
        )
    if launch is None and nodes > 1 and "MASTER_ADDR" not in os.environ:
        raise UserError(
            f"trainer.num_nodes={nodes} needs a launcher on every node, torchrun or srun (docs/cluster.md); "
            "or MASTER_ADDR, MASTER_PORT and NODE_RANK in the environment of each"
        )


def environment(launch: DistEnv | None) -> ClusterEnvironment:
    """Lightning's cluster environment for the launcher, without automatic requeue, which saves in mid-step."""
    if launch is None:  # also in a SLURM job with one task, where the run starts its processes itself
        return LightningEnvironment()
    if launch.by == "torchrun":
        return TorchElasticEnvironment()
    if launch.by == "srun":
        os.environ.setdefault("SLURM_NTASKS_PER_NODE", str(launch.per_node))  # unset after `srun --ntasks`
        return SLURMEnvironment(auto_requeue=False)
    return KubeflowEnvironment()


def strategy(name: str, world: int, minutes: float, compression: str | None = None) -> Any:
    """DDP for several processes, FSDP on request; other names are passed to Lightning."""
    wait, is_ddp = timedelta(minutes=minutes), name in ("auto", "ddp") and world > 1
    if compression is not None and not is_ddp:
        setup = f"trainer.strategy={name}" if world > 1 else "one process"
        raise AllRanksError(f"gradient_compression={compression} is for DDP on several processes, not for {setup}")
    if name == "fsdp":
        if world == 1:
            raise UserError("trainer.strategy=fsdp shards a network over processes: it needs more than one")
        return FSDP(data_parallel_size=world, tensor_parallel_size=1, save_distributed_checkpoint=False, timeout=wait)
    return DDP(compression, timeout=wait) if is_ddp else name


def shard(model: Any, mesh: Any) -> None:
    """Shard a network's parameters over the processes of `mesh` (FSDP), in place.

    The attention and MLP of each block are separate FSDP units; all other parameters, which are small, form one unit.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    if getattr(model, "is_sharded", False):  # a validation after training calls this again
        return
    for block in model.blocks:
        fully_shard(block.attn, mesh=mesh)
        fully_shard(block.mlp, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if hasattr(model, "forward_at"):
        register_fsdp_forward_method(model, "forward_at")
    model.is_sharded = True


class RankConsistencyCheck(Callback):
    """Compares every process with rank 0 after the rendezvous: `facts` must be equal. Raises AllRanksError."""

    facts: dict[str, str]

    def setup(self, trainer: Trainer, pl_module, stage: str) -> None:
        if trainer.world_size == 1 or not distributed.is_initialized():
            return
        everyone: list[Any] = [None] * trainer.world_size
        distributed.all_gather_object(everyone, (socket.gethostname(), self.facts))
        message = disagreement(everyone)
        if message:
            if not trainer.is_global_zero:
                time.sleep(2)  # launchers end all processes when one exits: let rank 0 print the error first
            raise AllRanksError(message)


def disagreement(everyone: list[tuple[str, dict[str, str]]]) -> str | None:
    """One line on the first process that differs from rank 0; None if all agree."""
    _, first = everyone[0]
    for rank, (host, facts) in enumerate(everyone):
        names = [name for name in sorted(first | facts) if first.get(name) != facts.get(name)]
        if names:
            parts = [f"{name}={facts.get(name)} (rank 0: {first.get(name)})" for name in names[:3]]
            return f"rank {rank} on {host} differs from rank 0: {'; '.join(parts)}"
    return None


def facts(cfg: dict[str, Any], images: dict[str, str], done: int) -> dict[str, str]:
    """Facts that must be equal on all processes: settings, `contents` of the data, resume step, torch version."""
    found = {f"images of data.{split}": digest for split, digest in images.items()}
    return {**flat(cfg), **found, "finished steps": str(done), "torch": torch.__version__}


def contents(data: ShardData) -> dict[str, str]:
    """{split: short SHA-256 digest of sample counts and checksums of its shards}; of a stream, "stream DIGEST"."""
    found = {}
    for split, reader in data.readers.items():
        shards = "\n".join(f"{shard.samples} {shard.sha256}" for shard in reader.shards)
        kind = "stream " if split == "train" and data.stream is not None else ""
        found[split] = kind + hashlib.sha256(shards.encode()).hexdigest()[:12]
    return found


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Flatten nested settings to {"optim.lr": "0.001", ...}, without `MAY_DIFFER`."""
    found: dict[str, str] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            found |= flat(value, f"{name}.")
        elif name not in MAY_DIFFER:
            found[name] = str(value)
    return found


@contextmanager
def distributed_errors(trainer: Trainer, minutes: float) -> Iterator[None]:
    """Turn errors from outside the program into one-line user errors: lost processes or workers, out of memory.

    Also stops the child processes that this process started.
    """
    launcher = trainer.strategy.launcher
    children = launcher if isinstance(launcher, SubprocessLauncher) else None
    try:
        yield
    except BaseException as error:
        if children and isinstance(error, Preempted):
            children.end(10, signal.SIGTERM)  # those that are already exiting ignore it
        elif children:
            children.end()  # they have had time to report their own errors
        user_error = in_one_line(error, trainer, minutes) if isinstance(error, RuntimeError) else None
        if user_error is None:
            raise
        raise user_error from error
    finally:
        if children:
            children.leaving.set()


def in_one_line(error: RuntimeError, trainer: Trainer, minutes: float) -> UserError | None:
    """The user error for a torch error; None = a bug in the program, which needs its traceback."""
    if user_error := worker_died(error):
        return user_error
    if isinstance(error, torch.OutOfMemoryError):
        return UserError(
            f"out of memory on {socket.gethostname()} ({first_line(error)[:80]}); a smaller batch_size gives the same "
            "steps, activation_checkpointing=true too"
        )
    cause = lost_connection(error) if trainer.world_size > 1 else None
    return UserError(lost(trainer, minutes, first_line(cause))) if cause else None


def lost_connection(error: BaseException | None) -> BaseException | None:
    """The network error in the chain of causes of an error; None if there is none."""
    while error is not None:
        if isinstance(error, distributed.DistError) or (isinstance(error, RuntimeError) and GONE.search(str(error))):
            return error
        error = error.__cause__ or error.__context__
    return None


def lost(trainer: Trainer, minutes: float, reason: str) -> str:
    """The message for a lost connection or a failed rendezvous."""
    reason = re.sub(r"^\[[^]]*\.(?:cpp|cc|h|hpp):\d+\]\s*", "", reason)[:160]
    if trainer.global_step == 0 and not distributed.is_initialized():
        place = f"{os.environ.get('MASTER_ADDR', 'MASTER_ADDR')}:{os.environ.get('MASTER_PORT', '?')}"
        return (
            f"the {trainer.world_size} processes of the run did not meet at {place} within {minutes:g} minutes "
            f"(timeout_minutes): were all of them started, and can they reach that address? ({reason})"
        )
    return (
        f"another process of the run ended, or did not answer for {minutes:g} minutes (timeout_minutes), after step "
        f"{trainer.global_step}; rerun the same command to resume from the last checkpoint ({reason})"
    )
