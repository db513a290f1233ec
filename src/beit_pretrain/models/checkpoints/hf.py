"""Hugging Face's names for BEiT, both ways: as they stand in files (`BeitFor...`, transformers 4 and 5 alike)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from beit_pretrain.errors import UserError, first_line
from beit_pretrain.settings import is_number

TABLE = "relative_position_bias_table"
# Ours -> theirs, inside a block and outside. q, k, v are one matrix here and three there.
BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
BLOCK_NAMES = {
    f"{ours}.{part}": f"{theirs}.{part}" for ours, theirs in BLOCK.items() for part in ("weight", "bias")
} | {
    "gamma_1": "lambda_1",
    "gamma_2": "lambda_2",
    "attn.q_bias": "attention.attention.query.bias",
    "attn.v_bias": "attention.attention.value.bias",
    f"attn.{TABLE}": f"attention.attention.relative_position_bias.{TABLE}",
}
STEM = {
    "cls_token": "embeddings.cls_token",
    "mask_token": "embeddings.mask_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    f"rel_pos_bias.{TABLE}": f"encoder.relative_position_bias.{TABLE}",
    "fc_norm.weight": "pooler.layernorm.weight",
    "fc_norm.bias": "pooler.layernorm.bias",
}
QKV = ("query", "key", "value")
ARCHITECTURES = {
    "mim": "BeitForMaskedImageModeling",
    "classifier": "BeitForImageClassification",
    "segmenter": "BeitForSemanticSegmentation",
}
# Of our exports: the blocks that are BEiT's. transformers' segmentation cannot look at the last block, so one more,
# which nothing looks at, follows it.
USED = "beit_pretrain_blocks"


def is_hf(state: dict[str, Tensor]) -> bool:
    """Whether the names are Hugging Face's BEiT's."""
    return any(name.removeprefix("beit.").startswith("embeddings.patch_embeddings.") for name in state)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file's dictionary; empty if there is no such file. Raises UserError if it is damaged."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is no JSON: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} holds a {type(content).__name__}, not settings by name")
    return content


def translate(
    state: dict[str, Tensor], folder: Path, path: Path
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """(tensors in our names, what config.json says of the architecture, facts) of a Hugging Face BEiT.

    Raises UserError if config.json is missing or describes something else.
    """
    config = read_json(folder / "config.json")
    if not config:
        raise UserError(f"{path} has the names of Hugging Face's BEiT; its config.json is missing in {folder}")
    if config.get("model_type") != "beit":
        raise UserError(f"{folder}/config.json is of a {config.get('model_type', 'nameless')} model, not of a beit")
    if config.get("hidden_act", "gelu") != "gelu":
        raise UserError(f"{folder}/config.json: hidden_act={config['hidden_act']}, BEiT has gelu")
    if any(name.startswith("decode_head.") for name in state):
        refuse_other_segmenters(config, folder)
    mim = "lm_head.weight" in state
    theirs = {"classifier.weight": "head.weight", "classifier.bias": "head.bias"}
    theirs |= {f"{'' if mim else 'beit.'}layernorm.{part}": f"norm.{part}" for part in ("weight", "bias")}
    theirs |= {f"beit.{name}": ours for ours, name in STEM.items()}
    if not any(name.startswith("beit.") for name in state):  # a BeitModel by itself
        state = {name if name.startswith(("lm_head", "classifier")) else f"beit.{name}": t for name, t in state.items()}
    if mim:  # a leftover of some versions; the token head does not look at it
        state = {name: t for name, t in state.items() if not name.startswith("beit.pooler.")}
    else:  # a classifier has no use for it
        state.pop("beit.embeddings.mask_token", None)
    if isinstance(used := config.get(USED), int):
        idle = re.compile(r"beit\.encoder\.layer\.(\d+)\.")
        state = {n: t for n, t in state.items() if not ((found := idle.match(n)) and int(found[1]) >= used)}
    inside = {name: ours for ours, name in BLOCK_NAMES.items()}
    renamed: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        if found := re.fullmatch(r"beit\.encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)\.weight", name):
            parts.setdefault(found[1], {})[found[2]] = tensor
        elif (found := re.fullmatch(r"beit\.encoder\.layer\.(\d+)\.(.+)", name)) and found[2] in inside:
            renamed[f"blocks.{found[1]}.{inside[found[2]]}"] = tensor
        else:
            renamed[theirs.get(name, name)] = tensor
    for block, three in parts.items():
        if len(three) == 3:
            renamed[f"blocks.{block}.attn.qkv.weight"] = torch.cat([three[part] for part in QKV])
    return renamed, architecture(config), facts(config, folder)


def architecture(config: dict[str, Any]) -> dict[str, Any]:
    """What tensors cannot tell, from config.json."""
    return {
        "image_size": config.get("image_size", 224),
        "num_heads": config.get("num_attention_heads"),
        "init_values": config.get("layer_scale_init_value"),
        "drop_path_rate": config.get("drop_path_rate", 0.1),
        "norm_eps": config.get("layer_norm_eps", 1e-12),
        "decoder": decoder(config),
    }


def decoder(config: dict[str, Any]) -> dict[str, Any]:
    """What config.json says of a segmentation head, as far as tensors cannot tell.

    transformers counts the embeddings as 1: its layer i is the output of block i - 1.
    """
    indices = config.get("out_indices") or config.get("segmentation_indices")  # that of transformers below 4.37
    layers = [int(i) - 1 for i in indices] if isinstance(indices, list) and len(indices) == 4 else None
    return {"layers": layers, "pool_scales": list(config.get("pool_scales") or (1, 2, 3, 6))}


def refuse_other_segmenters(config: dict[str, Any], folder: Path) -> None:
    """Raise UserError for a segmentation head with options that no released BEiT has."""
    if config.get("auxiliary_concat_input"):
        raise UserError(f"{folder}/config.json: auxiliary_concat_input=true is not supported")
    if config.get("add_fpn"):
        raise UserError(f"{folder}/config.json: add_fpn=true is of a backbone, not of a segmentation model")


def facts(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Class names, and the normalisation of preprocessor_config.json."""
    found: dict[str, Any] = {}
    names = config.get("id2label") or {}
    if not isinstance(names, dict) or not all(re.fullmatch(r"\d{1,9}", str(key)) for key in names):
        raise UserError(f"{folder}/config.json: id2label must name classes by number")
    if names and not all(str(label).startswith("LABEL_") for label in names.values()):
        found["classes"] = [str(names[key]) for key in sorted(names, key=int)]
    processor = read_json(folder / "preprocessor_config.json")
    for ours, theirs in (("mean", "image_mean"), ("std", "image_std")):
        if theirs in processor:
            found[ours] = processor[theirs]
    if isinstance(reduced := processor.get("do_reduce_labels", processor.get("reduce_labels")), bool):
        found["reduce_labels"] = reduced
    size, crop = processor.get("size"), processor.get("crop_size")
    if processor.get("do_center_crop") and isinstance(size, dict) and isinstance(crop, dict):
        shorter, height = size.get("shortest_edge"), crop.get("height")
        if is_number(shorter) and is_number(height) and 0 < height <= shorter:
            found["crop_ratio"] = height / shorter
    return found


def to_names(state: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Our tensors under the names of a `BeitForMaskedImageModeling` (kind "mim") or another `ARCHITECTURES` file."""
    named: dict[str, Tensor] = {}
    outside = {ours: f"beit.{theirs}" for ours, theirs in STEM.items()}
    for part in ("weight", "bias"):
        outside[f"norm.{part}"] = f"layernorm.{part}" if kind == "mim" else f"beit.layernorm.{part}"
        outside[f"head.{part}"] = f"classifier.{part}"
    for name, tensor in state.items():
        found = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
        if found is None:
            named[outside.get(name, name)] = tensor
        elif found[2] == "attn.qkv.weight":
            for part, third in zip(QKV, tensor.chunk(3), strict=True):
                named[f"beit.encoder.layer.{found[1]}.attention.attention.{part}.weight"] = third.clone()
        else:
            named[f"beit.encoder.layer.{found[1]}.{BLOCK_NAMES[found[2]]}"] = tensor
    return named
