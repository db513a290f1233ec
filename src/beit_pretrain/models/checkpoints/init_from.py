"""Reads the checkpoint of `init_from`, and refuses one of another size, channels or position tables."""

from __future__ import annotations

from typing import Any

from beit_pretrain.errors import UserError
from beit_pretrain.models.build import named_size
from beit_pretrain.models.checkpoints.formats import Checkpoint, read_checkpoint, sizes
from beit_pretrain.settings import shown, to_dict
from beit_pretrain.transforms.jitter import HALF, per_channel


def read_source(cfg: Any, expands_bias: bool = False) -> Checkpoint | None:
    """The checkpoint of `init_from`, if any; its architecture is the run's.

    `expands_bias`: a bias table that all blocks share becomes one for each. Raises UserError where the config asks
    for another size: its learning rates would be for another network.
    """
    if not cfg.init_from:
        return None
    source, model = read_checkpoint(cfg.init_from), to_dict(cfg.model)
    own, size = source.architecture, model.get("size")
    asked = {**named_size(size), **model, "patch_size": cfg.patch_size}
    check_channels(cfg, source)
    refusal = f"init_from={cfg.init_from} has {sizes(own)}, but"
    if "init_values" in model and (model["init_values"] is None) != (own["init_values"] is None):
        value, kept = (shown(settings["init_values"]) for settings in (model, own))
        raise UserError(f"{refusal} the experiment asks for model.init_values={value}; set model.init_values={kept}")
    spread = own["rel_pos_bias"] == "shared" and expands_bias
    for name, also in (("rel_pos_bias", "per_layer" if spread else None), ("abs_pos_emb", None)):
        if (asks := model.get(name)) not in (None, own[name], also):
            setting = f"model.{name}"
            raise UserError(
                f"{refusal} the experiment asks for {setting}={shown(asks)}; {setting}=null keeps the checkpoint's"
            )
    for name in ("embed_dim", "depth", "num_heads", "patch_size"):
        if asked.get(name) not in (None, own[name]):
            patch = name == "patch_size"
            setting = name if patch else f"model.size={size}" if size else f"model.{name}"
            raise UserError(
                f"{refusal} {setting} asks for {name}={asked[name]}; take an experiment of its size, or "
                f"{name if patch else 'model.size'}=null to keep the checkpoint's"
            )
    return source


def check_channels(cfg: Any, source: Checkpoint) -> None:
    """Raise UserError if the images have another number of channels than the network takes."""
    if cfg.data.channels != (channels := source.architecture["in_chans"]):
        raise UserError(f"init_from={cfg.init_from} sees {channels} channels: set data.channels={channels}")


def origin(source: Checkpoint | None) -> str:
    """What a run starts from, in words, for its first lines."""
    return f"{source.path} ({source.format} {source.kind}: {sizes(source.architecture)})" if source else ""


def normalisation(cfg: Any, about: dict) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std): the config's, else those of the checkpoint, else .5."""
    mean, std = (
        per_channel(getattr(cfg, name) or about.get(name) or HALF, cfg.data.channels, name) for name in ("mean", "std")
    )
    return mean, std
