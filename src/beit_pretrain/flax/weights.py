"""Parameters of the Flax networks as tensors of torch under the names of `models/backbone.py`, and back."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from jax import Array
from torch import Tensor

# Axes of torch's weight in our kernel's: (in, out) -> (out, in), (height, width, in, out) -> (out, in, height, width).
AXES = {2: (1, 0), 4: (3, 2, 0, 1)}
BACK = {2: (1, 0), 4: (2, 3, 1, 0)}
LAST = {"kernel": "weight", "scale": "weight"}


def name_of(path: tuple[Any, ...]) -> str:
    """blocks, 0, mlp, fc1, kernel -> blocks.0.mlp.fc1.weight."""
    return ".".join([*map(str, path[:-1]), LAST.get(str(path[-1]), str(path[-1]))])


def shapes(model: nnx.Module) -> dict[str, Tensor]:
    """Tensors without memory of torch's names and shapes, also of an abstract network."""
    found = {}
    for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        shape = param.get_value().shape
        if path[-1] == "kernel":
            shape = tuple(shape[axis] for axis in AXES[len(shape)])
        found[name_of(path)] = torch.empty(shape, device="meta")
    return found


def to_tensors(state: Any) -> dict[str, Tensor]:
    """Tensors of torch's names and shapes, float32, of `nnx.state(model, nnx.Param)` or of its gradients."""
    found = {}
    for path, param in nnx.to_flat_state(state):
        values = np.asarray(param.get_value())
        values = values.transpose(AXES[values.ndim]) if path[-1] == "kernel" else values
        found[name_of(path)] = torch.from_numpy(values.copy())
    return found


def put(model: nnx.Module, tensors: dict[str, Tensor]) -> None:
    """Give every parameter its tensor; the names and shapes must be those of `shapes(model)`."""

    def values(path: tuple[Any, ...]) -> Array:
        found = tensors[name_of(path)].numpy()
        return jnp.array(found.transpose(BACK[found.ndim]) if path[-1] == "kernel" else found)

    state = nnx.state(model, nnx.Param)
    flat = [(path, param.replace(values(path))) for path, param in nnx.to_flat_state(state)]
    nnx.update(model, nnx.from_flat_state(flat))
