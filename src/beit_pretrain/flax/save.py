"""Writes a Flax network as a folder of Hugging Face's layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flax import nnx
from safetensors.torch import save_file

from beit_pretrain.errors import UserError
from beit_pretrain.fileio import atomic_path, expand_home
from beit_pretrain.flax.weights import to_tensors
from beit_pretrain.models.checkpoints import hf, hf_processor
from beit_pretrain.models.checkpoints.export import hf_config, processor_settings, set_permissions
from beit_pretrain.models.checkpoints.formats import WEIGHTS


def save_folder(model: Any, folder: Path) -> Path:
    """Write config.json, model.safetensors and preprocessor_config.json. Raises UserError for grids not square."""
    folder = expand_home(folder)
    if model.grid[0] != model.grid[1]:
        raise UserError("transformers swaps height and width on grids that are not square: they cannot be written")
    if folder.is_file():
        raise UserError(f"{folder} is a file; save_pretrained writes a folder")
    named = hf.to_names(to_tensors(nnx.state(model, nnx.Param)), model.kind)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder, last="config.json") as temporary:
        temporary.mkdir()
        save_file({n: t.contiguous() for n, t in named.items()}, temporary / WEIGHTS[0], metadata={"format": "pt"})
        write_json(temporary / hf_processor.FILE, processor(model))
        write_json(temporary / "config.json", config(model))
        set_permissions(temporary)
    return folder


def config(model: Any) -> dict[str, Any]:
    """The network as a BeitConfig."""
    ours, classes = model.config, None
    if model.kind == "classifier":
        classes = model.about.get("classes") or [f"LABEL_{i}" for i in range(ours["num_classes"])]
    said = {"architectures": [hf.ARCHITECTURES[model.kind]], "model_type": "beit", "dtype": "float32"}
    said |= hf_config(model, classes)
    if model.kind == "backbone":
        said |= {"use_mask_token": ours["use_mask_token"], "use_mean_pooling": ours["pool"] == "avg"}
    return said


def processor(model: Any) -> dict[str, Any]:
    """The evaluation view of images as a BeitImageProcessor."""
    return {
        "image_processor_type": "BeitImageProcessor",
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        **processor_settings(model),
    }


def write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", "utf-8")
