"""From checkpoints to Flax networks, and from these to torch's, by the readers in models/checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax
import torch
from flax import nnx
from torch import Tensor

from beit_pretrain.errors import UserError
from beit_pretrain.flax.backbone import check_drop_path_rate
from beit_pretrain.flax.weights import put, shapes, to_tensors
from beit_pretrain.library.base import warn_of_new_head, warn_of_new_norm
from beit_pretrain.models.checkpoints.files import check_fit
from beit_pretrain.models.checkpoints.formats import Checkpoint, read_checkpoint
from beit_pretrain.models.checkpoints.hf_config import said_of
from beit_pretrain.models.checkpoints.hub import local_copy
from beit_pretrain.models.checkpoints.pretrained import checked_sides, classifier, encoder, mim

Network = TypeVar("Network", bound=nnx.Module)
BUILDERS: dict[str, Callable[..., Any]] = {"mim": mim, "classifier": classifier, "backbone": encoder}


@dataclass
class Source:
    """A checkpoint as a network needs it: its arguments, its tensors under torch's names, and metadata."""

    path: Path
    config: dict[str, Any]
    state: dict[str, Tensor]
    about: dict[str, Any]
    said: dict[str, Any]  # by its config.json


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
    check_drop_path_rate(drop_path_rate)
    if rngs is not None and not isinstance(rngs, nnx.Rngs):
        raise UserError(f"rngs must be flax.nnx.Rngs, not {rngs!r}")
    source = read_checkpoint(local_copy(path, revision), checked_sides(image_size))
    own: dict[str, dict[str, Any]] = {"classifier": {"num_classes": num_labels}, "backbone": {"pooler": True}}
    with torch.random.fork_rng(devices=[]):  # a new head is torch's, of a seed from `rngs`
        torch.manual_seed(0 if rngs is None else int(jax.random.bits(rngs.params())))
        new = kind == "classifier" and warn_of_new_head(kind, source, num_labels)
        model = BUILDERS[kind](source, image_size, drop_path_rate=drop_path_rate, **own.get(kind, {}))
    if kind != "mim" and not new:
        warn_of_new_norm(model, source)
    config = dict(model.config)
    if kind == "backbone":
        config |= {"pool": model.global_pool or "token", "use_mask_token": hasattr(model, "mask_token")}
    return Source(source.path, config, model.state_dict(), model.about, said_of(source))


def to_network(model: Any) -> Any:
    """A Flax network as a network of torch, in eval mode, with the same weights."""
    config, state = model.config, to_tensors(nnx.state(model, nnx.Param))
    config.pop("use_mask_token", None)
    source = Checkpoint(Path(type(model).__name__), "Flax", model.kind, config, state, model.about)
    return BUILDERS[model.kind](source, drop_path_rate=config["drop_path_rate"])


def filled(build: Callable[[], Network], source: Source) -> Network:
    """The network with a checkpoint's tensors. Raises UserError for names or shapes that do not fit."""
    model = nnx.eval_shape(build)  # no initial weights are drawn only to be replaced
    check_fit(shapes(model), source.state, source.path)
    put(model, source.state)
    return model
