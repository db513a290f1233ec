"""From a composed config to a network's arguments, or to the checkpoint that a run starts from."""

from __future__ import annotations

from typing import Any, cast

from beit_pretrain.errors import UserError
from beit_pretrain.models.backbone import SIZES, Architecture
from beit_pretrain.models.checkpoints.formats import Checkpoint, read_checkpoint, sizes
from beit_pretrain.settings import to_dict
from beit_pretrain.transforms.views import HALF, per_channel


def network(cfg: Any) -> Architecture:
    """Arguments of a new network: those of the named size, then what the group `model` sets by itself."""
    settings = to_dict(cfg.model)
    size = settings.pop("size", None)
    settings.pop("pool", None)
    for name in ("rel_pos_bias", "abs_pos_emb"):
        if settings.get(name) is None:  # the network's own default
            settings.pop(name, None)
    if size is not None and size not in SIZES:
        raise UserError(f"model.size={size} is not one of {', '.join(SIZES)}")
    shape = {"image_size": cfg.image_size, "patch_size": cfg.patch_size or 16, "in_chans": cfg.data.channels}
    arguments = {**SIZES.get(size, {}), **settings, **shape}
    for name in ("embed_dim", "depth", "num_heads"):
        if name not in arguments:
            raise UserError(f"model.size=null needs model.{name}")
    if arguments["embed_dim"] % arguments["num_heads"]:
        raise UserError(
            f"model.embed_dim={arguments['embed_dim']} is not divisible by model.num_heads={arguments['num_heads']}"
        )
    return cast(Architecture, arguments)


def read_source(cfg: Any, expands_bias: bool = False) -> Checkpoint | None:
    """The checkpoint that a run starts from (`init_from`), if any; its architecture is the run's.

    `expands_bias`: a table that all blocks share becomes one for each. Raises UserError where the config asks for another size: its learning rates would be for another network.
    """
    if not cfg.init_from:
        return None
    source = read_checkpoint(cfg.init_from)
    model = to_dict(cfg.model)
    size = model.get("size")
    if size is not None and size not in SIZES:
        raise UserError(f"model.size={size} is not one of {', '.join(SIZES)}")
    channels = source.architecture["in_chans"]
    if cfg.data.channels != channels:
        raise UserError(f"init_from={cfg.init_from} sees {channels} channels: set data.channels={channels}")
    scale = ("init_values" in model, model.get("init_values"), source.architecture["init_values"])
    if scale[0] and (scale[1] is None) != (scale[2] is None):
        raise UserError(
            f"init_from={cfg.init_from} has {sizes(source.architecture)}, but the experiment asks for "
            f"model.init_values={'null' if scale[1] is None else scale[1]}"
        )
    bias = source.architecture["rel_pos_bias"]
    expanded = "per_layer" if bias == "shared" and expands_bias else bias
    for name, own in (("rel_pos_bias", (bias, expanded)), ("abs_pos_emb", (source.architecture["abs_pos_emb"],))):
        if model.get(name) not in (None, *own):
            raise UserError(
                f"init_from={cfg.init_from} has {sizes(source.architecture)}, but the experiment asks for "
                f"model.{name}={model[name]}"
            )
    asked = {**SIZES.get(size or "", {}), **model, "patch_size": cfg.patch_size}
    for name in ("embed_dim", "depth", "num_heads", "patch_size"):
        if asked.get(name) not in (None, source.architecture[name]):
            setting = "patch_size" if name == "patch_size" else f"model.size={size}" if size else f"model.{name}"
            raise UserError(
                f"init_from={cfg.init_from} has {sizes(source.architecture)}, but {setting} asks for "
                f"{name}={asked[name]}; take an experiment of its size, or "
                f"{'patch_size' if name == 'patch_size' else 'model.size'}=null to go ahead"
            )
    return source


def origin(source: Checkpoint | None) -> str:
    """What a run starts from, in words, for its first lines."""
    return f"{source.path} ({source.format} {source.kind}: {sizes(source.architecture)})" if source else ""


def normalisation(cfg: Any, about: dict) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std): the config's, else those of the checkpoint, else .5."""
    mean, std = (
        per_channel(getattr(cfg, name) or about.get(name) or HALF, cfg.data.channels, name) for name in ("mean", "std")
    )
    return mean, std
