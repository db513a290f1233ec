"""Who started this process: torchrun, srun, a Kubernetes job, Lightning, or a person; and how many others there are.

Read from the environment alone, without torch.
"""

from __future__ import annotations

import os
import socket
from typing import NamedTuple

from beit_pretrain.errors import AllRanksError

# What one run tells its own processes. A run that is started from inside another must not take it for its own.
PROCESS_VARIABLES = (
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "ROLE_RANK", "ROLE_NAME"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT", "PL_GLOBAL_SEED"),
)


class DistEnv(NamedTuple):
    """Processes that a launcher outside of Python has started: `processes` on `nodes` machines, `per_node` on each."""

    by: str  # "torchrun", "srun" or "WORLD_SIZE"
    processes: int
    nodes: int
    per_node: int


def launched() -> DistEnv | None:
    """What started this process together with others; None if it is alone, or a child that Lightning started."""
    if "TORCHELASTIC_RUN_ID" in os.environ:  # first: torchrun may run inside a SLURM job
        found = ("torchrun", number("WORLD_SIZE"), number("GROUP_WORLD_SIZE"), number("LOCAL_WORLD_SIZE"))
    elif "SLURM_PROCID" in os.environ and (tasks := number("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")) > 1:
        nodes = number("SLURM_STEP_NUM_NODES", "SLURM_NNODES", "SLURM_JOB_NUM_NODES")
        found = ("srun", tasks, nodes, number("SLURM_NTASKS_PER_NODE", otherwise=tasks // nodes))
    elif "RANK" in os.environ and "LOCAL_RANK" not in os.environ and number("WORLD_SIZE") > 1:
        found = ("WORLD_SIZE", number("WORLD_SIZE"), number("WORLD_SIZE"), 1)  # one process a pod, by an operator
    else:
        return None
    launch = DistEnv(*found)
    if launch.nodes * launch.per_node != launch.processes:
        raise AllRanksError(
            f"{launch.by} started {launch.processes} processes on {launch.nodes} nodes: every node needs as many"
        )
    return launch


def number(*names: str, otherwise: int = 1) -> int:
    """The first of these environment variables that is set, as a whole number."""
    for name in names:
        if name in os.environ:
            if not os.environ[name].isdecimal() or int(os.environ[name]) < 1:
                raise AllRanksError(
                    f"the environment variable {name}={os.environ[name]!r} is not a number of at least 1"
                )
            return int(os.environ[name])
    return otherwise


def is_child() -> bool:
    """Whether a run has started this process for itself, without a launcher from outside."""
    return launched() is None and number_of_this("LOCAL_RANK") > 0


def is_restarted() -> bool:
    """Whether a scheduler has started this job before: SLURM after a requeue, torchrun after a process that failed."""
    return any(number_of_this(name) for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))


def local_rank() -> int:
    """Number of this process among those of its run on this machine, as far as the environment says."""
    return number_of_this("LOCAL_RANK", "SLURM_LOCALID")


def rank() -> int:
    """Number of this process among those of its run, as far as the environment says."""
    return number_of_this("RANK", "LOCAL_RANK", "SLURM_PROCID")


def number_of_this(*names: str) -> int:
    """The first of these environment variables that is a number; 0 = none is."""
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdecimal()), 0)


def speaker() -> str:
    """How a message names this process: nothing for the first one, else its rank and machine."""
    return f"rank {rank()} on {socket.gethostname()}: " if rank() else ""
