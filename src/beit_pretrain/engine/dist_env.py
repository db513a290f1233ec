"""Detects the launcher (torchrun, srun, Kubernetes, Lightning or none), the number of processes and the rank.

Reads only environment variables and does not import torch.
"""

from __future__ import annotations

import os
import socket
from typing import NamedTuple

from beit_pretrain.errors import AllRanksError

# Variables that a run sets for its processes. A run started from inside another run must not inherit them.
PROCESS_VARIABLES = (
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "ROLE_RANK", "ROLE_NAME"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT", "PL_GLOBAL_SEED"),
)


class DistEnv(NamedTuple):
    """Processes started by an external launcher: `processes` in total, on `nodes` machines with `per_node` each."""

    by: str  # "torchrun", "srun" or "WORLD_SIZE"
    processes: int
    nodes: int
    per_node: int


def launched() -> DistEnv | None:
    """The external launcher of this process; None if it has none (a single process, or a child of Lightning).

    Raises AllRanksError if the environment is inconsistent.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:  # first: torchrun may run inside a SLURM job
        found = ("torchrun", number("WORLD_SIZE"), number("GROUP_WORLD_SIZE"), number("LOCAL_WORLD_SIZE"))
    elif "SLURM_PROCID" in os.environ and (tasks := number("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")) > 1:
        nodes = number("SLURM_STEP_NUM_NODES", "SLURM_NNODES", "SLURM_JOB_NUM_NODES")
        found = ("srun", tasks, nodes, number("SLURM_NTASKS_PER_NODE", otherwise=tasks // nodes))
    elif "RANK" in os.environ and "LOCAL_RANK" not in os.environ and number("WORLD_SIZE") > 1:
        found = ("WORLD_SIZE", number("WORLD_SIZE"), number("WORLD_SIZE"), 1)  # Kubernetes: one process per pod
    else:
        return None
    launch = DistEnv(*found)
    if launch.nodes * launch.per_node != launch.processes:
        raise AllRanksError(
            f"{launch.by} started {launch.processes} processes on {launch.nodes} nodes: every node needs the same "
            "number"
        )
    return launch


def number(*names: str, otherwise: int = 1) -> int:
    """The first of these environment variables that is set, as an int >= 1. Raises AllRanksError for other values."""
    for name in names:
        if name in os.environ:
            if not os.environ[name].isdecimal() or int(os.environ[name]) < 1:
                raise AllRanksError(
                    f"the environment variable {name}={os.environ[name]!r} is not a number of at least 1"
                )
            return int(os.environ[name])
    return otherwise


def is_child() -> bool:
    """Whether another process of the run started this one, without an external launcher."""
    return launched() is None and number_of_this("LOCAL_RANK") > 0


def is_restarted() -> bool:
    """Whether this is a restart of the same job: SLURM after a requeue, torchrun after a failed process."""
    return any(number_of_this(name) for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))


def local_rank() -> int:
    """Local rank of this process according to the environment; 0 if unset."""
    return number_of_this("LOCAL_RANK", "SLURM_LOCALID")


def rank() -> int:
    """Global rank of this process according to the environment; 0 if unset."""
    return number_of_this("RANK", "LOCAL_RANK", "SLURM_PROCID")


def number_of_this(*names: str) -> int:
    """The first of these environment variables that is a number; 0 if none is."""
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdecimal()), 0)


def speaker() -> str:
    """Prefix of this process's messages: empty for rank 0, else rank and machine."""
    return f"rank {rank()} on {socket.gethostname()}: " if rank() else ""
