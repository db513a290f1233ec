"""Many processes and machines: how many take part, how they meet, what they share, and what is said when that fails.

Lightning runs the processes. Here its settings are completed from what the launcher says, counts that cannot be true
are refused before anyone waits, and every process is compared with the first one before the first step.
"""

from __future__ import annotations

import hashlib
import os
import re
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

MAY_DIFFER = ("data.train", "data.val", "data.cache_dir")  # places on a machine; what is in them is compared

# What torch says, over several libraries, when a process does not answer or is gone.
GONE = re.compile(
    r"gloo|nccl|connection (?:closed|reset|refused)|broken pipe|timed out|application timeout|pair closure|socket"
    r"|rendezvous|clients joined",
    re.I,
)


def resolve_trainer_args(trainer: dict[str, Any], minutes: float, compression: str | None = None) -> dict[str, Any]:
    """The settings of `trainer` with devices, nodes, strategy and cluster environment filled in for this process.

    `compression`: how DDP sends gradients. Raises AllRanksError if they contradict the launcher or the machine.
    """
    launch = launched()
    settings = dict(trainer)
    gpus = visible_gpus(settings["accelerator"])
    if launch and settings["devices"] in ("auto", -1):
        settings["devices"] = launch.per_node
    if settings["num_nodes"] == "auto":
        settings["num_nodes"] = launch.nodes if launch else 1
    devices = count(settings["devices"], gpus)
    check_counts(devices, settings["num_nodes"], gpus, launch)
    settings["strategy"] = strategy(settings["strategy"], devices * settings["num_nodes"], minutes, compression)
    settings["plugins"] = [environment(launch)]
    return settings


def visible_gpus(accelerator: str) -> int:
    """GPUs that a run with this accelerator may use; 0 = it runs on CPUs. Raises UserError where some are asked for."""
    if accelerator not in ("auto", "gpu", "cuda"):
        return 0
    gpus = torch.cuda.device_count()
    if not gpus and accelerator != "auto":
        raise UserError(f"trainer.accelerator={accelerator}, but torch finds no GPU on {socket.gethostname()}")
    return gpus


def count(devices: int | str | list[int], gpus: int) -> int:
    """How many devices of a machine are meant."""
    if devices in ("auto", -1):
        return gpus or 1
    return len(devices) if isinstance(devices, list) else int(devices)


def check_counts(devices: int, nodes: int, gpus: int, launch: DistEnv | None) -> None:
    """Raise AllRanksError if devices, nodes, GPUs and started processes do not belong together."""
    if gpus and devices > gpus:
        raise AllRanksError(f"trainer.devices={devices}, but {socket.gethostname()} has {gpus} GPU{'s' * (gpus > 1)}")
    if launch and (devices, nodes) != (launch.per_node, launch.nodes):
        raise AllRanksError(
            f"trainer.devices={devices} x trainer.num_nodes={nodes} = {devices * nodes} processes, but {launch.by} "
            f"started {launch.processes}: {launch.per_node} on each of {launch.nodes} node{'s' * (launch.nodes > 1)}; "
            "leave both settings out, or start as many"
        )
    if launch is None and nodes > 1 and "MASTER_ADDR" not in os.environ:
        raise UserError(
            f"trainer.num_nodes={nodes} needs a launcher on every node, torchrun or srun (docs/cluster.md); "
            "or MASTER_ADDR, MASTER_PORT and NODE_RANK in the environment of each"
        )


def environment(launch: DistEnv | None) -> ClusterEnvironment:
    """Lightning's view of the launcher. It must not requeue by itself: it would save in the middle of a step."""
    if launch is None:  # also a SLURM job of one task: the run then makes its processes itself
        return LightningEnvironment()
    if launch.by == "torchrun":
        return TorchElasticEnvironment()
    if launch.by == "srun":
        os.environ.setdefault("SLURM_NTASKS_PER_NODE", str(launch.per_node))  # unset after `srun --ntasks`
        return SLURMEnvironment(auto_requeue=False)
    return KubeflowEnvironment()


def strategy(name: str, world: int, minutes: float, compression: str | None = None) -> Any:
    """DDP for more than one process, FSDP when it is asked for; other names are Lightning's."""
    wait, is_ddp = timedelta(minutes=minutes), name in ("auto", "ddp") and world > 1
    if compression is not None and not is_ddp:
        found = f"trainer.strategy={name}" if world > 1 else "one process"
        raise AllRanksError(f"gradient_compression={compression} is for DDP on several processes, not for {found}")
    if name == "fsdp":
        if world == 1:
            raise UserError("trainer.strategy=fsdp shares a network among processes: it needs more than one")
        return FSDP(data_parallel_size=world, tensor_parallel_size=1, save_distributed_checkpoint=False, timeout=wait)
    return DDP(compression, timeout=wait) if is_ddp else name


def shard(model: Any, mesh: Any) -> None:
    """Cut a network's parameters over the processes of `mesh` (FSDP), in place.

    A block's attention and MLP are gathered when they are needed; the small rest stays together for the whole step.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    if getattr(model, "is_sharded", False):  # a validation after the training asks again
        return
    for block in model.blocks:
        fully_shard(block.attn, mesh=mesh)
        fully_shard(block.mlp, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if hasattr(model, "forward_at"):
        register_fsdp_forward_method(model, "forward_at")
    model.is_sharded = True


class RankConsistencyCheck(Callback):
    """Compares every process with the first one as soon as they have met: `facts` must be the same on all of them."""

    facts: dict[str, str]

    def setup(self, trainer: Trainer, pl_module, stage: str) -> None:
        if trainer.world_size == 1 or not distributed.is_initialized():
            return
        everyone: list[Any] = [None] * trainer.world_size
        distributed.all_gather_object(everyone, (socket.gethostname(), self.facts))
        said = disagreement(everyone)
        if said:
            if not trainer.is_global_zero:
                time.sleep(2)  # a launcher ends all processes when one ends: the first one is to speak before
            raise AllRanksError(said)


def disagreement(everyone: list[tuple[str, dict[str, str]]]) -> str | None:
    """What the first process that differs from rank 0 has else, in one line; None if all agree."""
    _, first = everyone[0]
    for rank, (host, facts) in enumerate(everyone):
        names = [name for name in sorted(first | facts) if first.get(name) != facts.get(name)]
        if names:
            parts = [f"{name}={facts.get(name)} (rank 0: {first.get(name)})" for name in names[:3]]
            return f"rank {rank} on {host} was started with something else than rank 0: {'; '.join(parts)}"
    return None


def facts(cfg: dict[str, Any], data: ShardData, done: int) -> dict[str, str]:
    """What all processes must have alike: settings, contents of the data, the step from which they go on."""
    return {
        **flat(cfg),
        **{f"images of data.{split}": found for split, found in contents(data).items()},
        "finished steps": str(done),
        "torch": torch.__version__,
    }


def contents(data: ShardData) -> dict[str, str]:
    """{split: a short name for the contents of its shards, as their manifests say them}."""
    return {split: digest(reader.shards) for split, reader in data.readers.items()}


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """{"optim.lr": "0.001", ...} of nested settings, less the places on a machine."""
    found: dict[str, str] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            found |= flat(value, f"{name}.")
        elif name not in MAY_DIFFER:
            found[name] = str(value)
    return found


def digest(shards: list[Any]) -> str:
    """A short name for the contents of shards, as their manifests say them."""
    return hashlib.sha256("\n".join(f"{s.samples} {s.sha256}" for s in shards).encode()).hexdigest()[:12]


@contextmanager
def distributed_errors(trainer: Trainer, minutes: float) -> Iterator[None]:
    """Say in one line what ended a run that is not its own fault: lost processes, a loader worker, the GPU's memory.

    The first process takes those that it has started with it.
    """
    launcher = trainer.strategy.launcher
    try:
        yield
    except Preempted:
        if isinstance(launcher, SubprocessLauncher):
            launcher.forward_signal()
        raise
    except BaseException as error:
        if isinstance(launcher, SubprocessLauncher):
            launcher.end()
        told = in_one_line(error, trainer, minutes) if isinstance(error, RuntimeError) else None
        if told is None:
            raise
        raise told from error
    finally:
        if isinstance(launcher, SubprocessLauncher):
            launcher.leaving.set()


def in_one_line(error: RuntimeError, trainer: Trainer, minutes: float) -> UserError | None:
    """What to tell about an error of torch; None = it is a mistake in the program, and wants its traceback."""
    if told := worker_died(error):
        return told
    if isinstance(error, torch.OutOfMemoryError):
        return UserError(
            f"out of memory on {socket.gethostname()} ({first_line(error)[:80]}); a smaller batch_size gives the same "
            "steps, activation_checkpointing=true too"
        )
    cause = lost_connection(error) if trainer.world_size > 1 else None
    return UserError(lost(trainer, minutes, first_line(cause))) if cause else None


def lost_connection(error: BaseException | None) -> BaseException | None:
    """The error of the network behind an error: the others that follow from it hide it."""
    while error is not None:
        if isinstance(error, distributed.DistError) or (isinstance(error, RuntimeError) and GONE.search(str(error))):
            return error
        error = error.__cause__ or error.__context__
    return None


def lost(trainer: Trainer, minutes: float, reason: str) -> str:
    """What to tell about a lost connection."""
    reason = re.sub(r"^\[[^]]*\.(?:cpp|cc|h|hpp):\d+\]\s*", "", reason)[:160]
    if trainer.global_step == 0 and not distributed.is_initialized():
        place = f"{os.environ.get('MASTER_ADDR', 'MASTER_ADDR')}:{os.environ.get('MASTER_PORT', '?')}"
        return (
            f"the {trainer.world_size} processes of the run did not meet at {place} within {minutes:g} minutes "
            f"(timeout_minutes): were all of them started, and can they reach that address? ({reason})"
        )
    return (
        f"another process of the run ended, or did not answer for {minutes:g} minutes (timeout_minutes), after step "
        f"{trainer.global_step}; the same command goes on from the last checkpoint ({reason})"
    )
