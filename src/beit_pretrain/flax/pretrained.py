"""From a checkpoint of any known format to a Flax network; reading and resizing are torch's (models/checkpoints)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax
import torch
from flax import nnx
from torch import Tensor

from beit_pretrain.flax.weights import put, shapes
from beit_pretrain.models.checkpoints.files import check_fit
from beit_pretrain.models.checkpoints.formats import Checkpoint, read_checkpoint
from beit_pretrain.models.checkpoints.hub import local_copy
from beit_pretrain.models.checkpoints.pretrained import checked_sides, classifier, mim, prepared

Network = TypeVar("Network", bound=nnx.Module)


@dataclass
class Source:
    """A checkpoint as a network needs it: its arguments, its tensors under torch's names, and metadata."""

    path: Path
    config: dict[str, Any]
    state: dict[str, Tensor]
    about: dict[str, Any]


def read_source(
    kind: str,
    path: str | Path,
    revision: str | None,
    image_size: int | Sequence[int] | None,
    num_labels: int | None,
    drop_path_rate: float,
    rngs: nnx.Rngs | None,
) -> Source:
    """A checkpoint for a network of a kind, with new heads where they are needed. Raises UserError."""
    sides = checked_sides(image_size, num_labels)
    source = read_checkpoint(local_copy(path, revision), sides)
    if kind == "backbone":
        return of_backbone(source, image_size, drop_path_rate)
    with torch.random.fork_rng(devices=[]):  # a new head is torch's, of a seed from `rngs`
        torch.manual_seed(0 if rngs is None else int(jax.random.bits(rngs.params())))
        model: Any = (
            mim(source, image_size, drop_path_rate)
            if kind == "mim"
            else classifier(source, image_size, num_labels, drop_path_rate)
        )
    return Source(source.path, model.config, model.state_dict(), model.about)


def of_backbone(source: Checkpoint, image_size: int | Sequence[int] | None, drop_path_rate: float) -> Source:
    """The backbone with the LayerNorm over the mean of the patches that the file has, or with the final LayerNorm.

    A network with a token head has none of its own: the LayerNorm of its head is not the backbone's. There, and in
    files that have neither, a new one over the mean.
    """
    token = source.kind != "mim" and "norm.weight" in source.state and "fc_norm.weight" not in source.state
    norm = "norm." if token else "fc_norm."
    config, state = prepared(source, image_size, drop_path_rate, ("mask_token", norm))
    if not token:
        width = config["embed_dim"]
        state = {"fc_norm.weight": torch.ones(width), "fc_norm.bias": torch.zeros(width), **state}
    config |= {"pool": "token" if token else "avg", "use_mask_token": "mask_token" in state}
    return Source(source.path, config, state, dict(source.about))


def filled(build: Callable[[], Network], source: Source) -> Network:
    """The network with a checkpoint's tensors. Raises UserError for names or shapes that do not fit."""
    model = nnx.eval_shape(build)  # no initial weights are drawn only to be replaced
    check_fit(shapes(model), source.state, source.path)
    put(model, source.state)
    return model
