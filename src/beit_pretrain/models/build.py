"""The network's arguments from the groups `model` and `data` of a run's settings."""

from __future__ import annotations

from typing import Any

from beit_pretrain.errors import UserError
from beit_pretrain.models.backbone import SIZES, Architecture
from beit_pretrain.settings import to_dict


def named_size(size: str | None) -> Architecture:
    """Width, depth, heads and layer scale of a size's name; empty for None. Raises UserError for an unknown name."""
    if size is not None and size not in SIZES:
        raise UserError(f"model.size={size} is not one of {', '.join(SIZES)}")
    return SIZES[size] if size else {}


def network(cfg: Any) -> Architecture:
    """Arguments of a new network: those of the named size, overridden by what the group `model` sets itself."""
    settings = to_dict(cfg.model)
    size = named_size(settings.pop("size", None))
    settings.pop("pool", None)
    for name in ("rel_pos_bias", "abs_pos_emb"):
        if settings.get(name) is None:  # the network's own default
            settings.pop(name, None)
    shape = {"image_size": cfg.image_size, "patch_size": cfg.patch_size or 16, "in_chans": cfg.data.channels}
    arguments: Architecture = {**size, **settings, **shape}
    for name in ("embed_dim", "depth", "num_heads"):
        if name not in arguments:
            raise UserError(f"model.size=null needs model.{name}")
    if arguments["embed_dim"] % arguments["num_heads"]:
        raise UserError(
            f"model.embed_dim={arguments['embed_dim']} is not divisible by model.num_heads={arguments['num_heads']}"
        )
    return arguments
