"""Writes a network as the folder that `from_pretrained` opens, transformers' or ours; needs no transformers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from beit_pretrain.errors import UserError, first_line
from beit_pretrain.fileio import atomic_path, atomic_write, expand_home
from beit_pretrain.models.backbone import Backbone, Classifier, MaskedImageModel
from beit_pretrain.models.checkpoints import hf, hf_processor
from beit_pretrain.models.checkpoints.hf_config import HFConfig
from beit_pretrain.models.upernet import Segmenter

Model = Backbone | MaskedImageModel | Classifier | Segmenter


def save_folder(model: Model, folder: str | Path, config: HFConfig | None = None) -> None:
    """Write a network into a folder, which is made if there is none; its files of other names stay.

    config.json comes last. preprocessor_config.json is written where the network's file said how images are prepared.
    `config`: see `write_folder`. Raises UserError if the folder cannot be written.
    """
    path = expand_home(folder).absolute()
    if path.is_file():
        raise UserError(f"{folder} is a file; save_pretrained writes a folder")
    if not str(folder):
        raise UserError("save_pretrained needs the name of a folder; it is empty")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path, last="config.json") as temporary:
            write_folder(model, temporary, config, processor=knows_its_images(model))
            set_permissions(temporary)
    except (OSError, SafetensorError) as error:  # a full disk, in the words of the system or of safetensors
        why = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"{folder} cannot be written: {why}") from error


def write_folder(model: Model, path: Path, config: HFConfig | None = None, processor: bool = True) -> None:
    """Write config.json, model.safetensors and, with `processor`, preprocessor_config.json into the folder `path`.

    `config`: the network's, with the settings of losses that it does not know; None = their defaults. Raises UserError
    for what transformers cannot be told.
    """
    check_decoder(model)
    path.mkdir(exist_ok=True)
    config = config or HFConfig.of_network(model)
    said = {"architectures": [hf.ARCHITECTURES[model.kind]], **config.to_dict()}
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    said["dtype"] = str(model.cls_token.dtype).removeprefix("torch.")
    if said["num_hidden_layers"] > len(model.blocks):  # see hf.USED
        first = {n: t for n, t in state.items() if n.startswith("blocks.0.")}
        last = f"blocks.{len(model.blocks)}."
        state |= {n.replace("blocks.0.", last): torch.zeros_like(t) for n, t in first.items()}
    named = hf.to_names(state, model.kind)
    save_file({n: t.contiguous() for n, t in named.items()}, path / "model.safetensors", metadata={"format": "pt"})
    if processor:
        size, channels, segments = model.config["image_size"], model.config["in_chans"], isinstance(model, Segmenter)
        view = hf_processor.evaluation_settings(model.about, size, channels, segments)
        write_json(path / hf_processor.FILE, {**hf_processor.WRITTEN, **view})
    write_json(path / "config.json", said)


def check_decoder(model: Model) -> None:
    """Raise UserError for a segmenter with options that transformers lacks."""
    if not isinstance(model, Segmenter):
        return
    ours = model.config
    decoder = ours["decoder"]
    if decoder["channels"] != ours["embed_dim"]:
        raise UserError(
            f"the decoder has {decoder['channels']} channels; transformers' has as many as the backbone is "
            f"wide ({ours['embed_dim']})"
        )
    if len(set(decoder["layers"])) < 4:
        raise UserError(f"transformers refuses decoder.layers={decoder['layers']}, with a block twice")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write settings by name, in alphabetical order."""
    atomic_write(path, json.dumps(content, indent=2, sort_keys=True) + "\n")


def set_permissions(written: Path) -> None:
    """Give a file, or the files of a folder, the usual permissions: only the owner can read safetensors' files."""
    umask = os.umask(0)
    os.umask(umask)
    for file in [written] if written.is_file() else written.iterdir():
        file.chmod(0o666 & ~umask)


def knows_its_images(model: Model) -> bool:
    """Whether a network's file said how its images are prepared."""
    return bool(model.about.keys() & {"mean", "std", "view", "crop_ratio"})
