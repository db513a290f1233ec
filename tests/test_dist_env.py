"""Detection of the launcher (torchrun, srun, none) from faked environment variables."""

from __future__ import annotations

import pytest
from lightning.pytorch.utilities import rank_zero_only

from beit_pretrain.engine.dist_env import PROCESS_VARIABLES, launched, rank, speaker
from beit_pretrain.errors import AllRanksError

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "x",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_WORLD_SIZE": "2",
    "RANK": "3",
}
SRUN = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "4"}


@pytest.fixture
def variables(monkeypatch):
    for name in (*PROCESS_VARIABLES, *TORCHRUN, *SRUN, "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(rank_zero_only, "rank", 0)  # Lightning sets it for the process with the first Trainer

    def put(given: dict[str, str]) -> None:
        for name, value in given.items():
            monkeypatch.setenv(name, value)

    return put


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, None),
        (TORCHRUN, ("torchrun", 4, 2, 2)),
        (SRUN, ("srun", 8, 2, 4)),
        ({**SRUN, **TORCHRUN}, ("torchrun", 4, 2, 2)),  # torchrun in a SLURM job
        ({k: v for k, v in SRUN.items() if k != "SLURM_NTASKS_PER_NODE"}, ("srun", 8, 2, 4)),  # srun --ntasks=8
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "1"}, None),  # a shell inside a larger allocation
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, None),  # one task: the run starts its processes itself
        ({"SLURM_NTASKS": "8"}, None),  # an allocation from which nothing was started
        ({"RANK": "1", "WORLD_SIZE": "2"}, ("WORLD_SIZE", 2, 2, 1)),
        ({"LOCAL_RANK": "1", "WORLD_SIZE": "2"}, None),  # Lightning's own child
    ],
)
def test_launcher_is_detected(given, expected, variables):
    variables(given)
    assert launched() == expected


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({**SRUN, "SLURM_NTASKS": "7"}, "every node needs the same number"),
        ({**TORCHRUN, "WORLD_SIZE": "many"}, "WORLD_SIZE='many'"),
        ({**TORCHRUN, "GROUP_WORLD_SIZE": "0"}, "GROUP_WORLD_SIZE='0'"),
    ],
)
def test_inconsistent_environment(given, said, variables):
    variables(given)
    with pytest.raises(AllRanksError, match=said):
        launched()


@pytest.mark.parametrize(("given", "expected"), [({}, 0), (TORCHRUN, 3), (SRUN, 5), ({"LOCAL_RANK": "1"}, 1)])
def test_messages_name_rank_except_0(given, expected, variables):
    variables(given)
    assert rank() == expected
    assert (f"rank {expected} on " in speaker()) == (expected > 0)
