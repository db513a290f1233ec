"""Tests on a GPU: `make test-gpu`. They skip where there is none.

`GPU_TESTS_ON_CPU=1` runs on a CPU what a CPU can run of them, to try the tests themselves.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark everything in this folder `gpu`."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("gpu")


@pytest.fixture
def device() -> torch.device:
    """The GPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    if os.environ.get("GPU_TESTS_ON_CPU"):
        return torch.device("cpu")
    pytest.skip("needs a CUDA device")


@pytest.fixture
def cuda() -> torch.device:
    """The GPU, for tests that make no sense on a CPU."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda", 0)


@pytest.fixture
def accelerator(device) -> str:
    """`trainer.accelerator=...` of a command."""
    return f"trainer.accelerator={'gpu' if device.type == 'cuda' else 'cpu'}"


@pytest.fixture(autouse=True)
def exact_convolutions() -> Iterator[None]:
    """Disable TF32 in cuDNN, and restore global settings after each test."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    yield
    torch.backends.cudnn.allow_tf32 = before
    torch.use_deterministic_algorithms(False)
