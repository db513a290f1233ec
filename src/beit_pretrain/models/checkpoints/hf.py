"""Hugging Face's names for BEiT, both ways, as they are in files (`BeitFor...` of transformers 4 and 5 alike)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from beit_pretrain.errors import UserError, first_line
from beit_pretrain.models.checkpoints.hf_processor import FILE, preprocessing

TABLE = "relative_position_bias_table"
QKV = ("query", "key", "value")  # one matrix here, three there
# Ours -> theirs, inside a block and outside.
LAYERS = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
BLOCK = {f"{ours}.{part}": f"{theirs}.{part}" for ours, theirs in LAYERS.items() for part in ("weight", "bias")}
BLOCK |= {f"attn.qkv.weight.{part}": f"attention.attention.{part}.weight" for part in QKV}
BLOCK |= {"attn.q_bias": "attention.attention.query.bias", "attn.v_bias": "attention.attention.value.bias"}
BLOCK |= {f"attn.{TABLE}": f"attention.attention.relative_position_bias.{TABLE}"}
BLOCK |= {"gamma_1": "lambda_1", "gamma_2": "lambda_2"}
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
# What is the same number in our architecture and in BeitConfig.
CONFIG = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "in_chans": "num_channels",
    "embed_dim": "hidden_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "norm_eps": "layer_norm_eps",
    "drop_path_rate": "drop_path_rate",
    "abs_pos_emb": "use_absolute_position_embeddings",
}
ARCHITECTURES = {
    "backbone": "BeitModel",
    "mim": "BeitForMaskedImageModeling",
    "classifier": "BeitForImageClassification",
    "segmenter": "BeitForSemanticSegmentation",
}
# Our exports' entry for the number of BEiT's blocks. transformers' segmentation cannot use the last block, so there one
# more follows it that nothing uses.
USED = "beit_pretrain_blocks"
LAYER = re.compile(r"beit\.encoder\.layer\.(\d+)\.(.+)")


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
    """(tensors in our names, architecture from config.json, metadata) of a Hugging Face BEiT.

    Raises UserError if config.json is missing or describes something else.
    """
    config = read_json(folder / "config.json")
    if not config:
        raise UserError(f"{path} has the names of Hugging Face's BEiT; its config.json is missing in {folder}")
    if config.get("model_type") != "beit":
        raise UserError(f"{folder}/config.json is of a {config.get('model_type', 'nameless')} model, not of a beit")
    if config.get("hidden_act", "gelu") != "gelu":
        raise UserError(f"{folder}/config.json: hidden_act={config['hidden_act']}, BEiT has gelu")
    for option in ("auxiliary_concat_input", "add_fpn"):  # of segmentation heads; no released BEiT has them
        if config.get(option) and any(name.startswith("decode_head.") for name in state):
            raise UserError(f"{folder}/config.json: {option}=true is not supported")
    kind = "mim" if "lm_head.weight" in state else "classifier"
    if not any(name.startswith("beit.") for name in state):  # a BeitModel by itself
        state = {name if name.startswith(("lm_head", "classifier")) else f"beit.{name}": t for name, t in state.items()}
    # Leftovers of some versions: a token head does not use the pooler, other heads not the mask token.
    headed = any(name.startswith(("classifier.", "decode_head.")) for name in state)
    idle = ("beit.pooler.",) if kind == "mim" else ("beit.embeddings.mask_token",) if headed else ()
    state = {name: tensor for name, tensor in state.items() if not name.startswith(idle)}
    if isinstance(used := config.get(USED), int):
        state = {n: t for n, t in state.items() if not ((found := LAYER.match(n)) and int(found[1]) >= used)}
    outside = {theirs: ours for ours, theirs in outside_blocks(kind).items()}
    inside = {theirs: ours for ours, theirs in BLOCK.items()}
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        found = LAYER.fullmatch(name)
        ours = inside.get(found[2]) if found else None
        renamed[f"blocks.{found[1]}.{ours}" if found and ours else outside.get(name, name)] = tensor
    for whole in {name.rpartition(".")[0] for name in renamed if name.endswith(QKV)}:
        parts = [renamed.pop(f"{whole}.{part}") for part in QKV if f"{whole}.{part}" in renamed]
        if len(parts) == 3:
            renamed[whole] = torch.cat(parts)
    return renamed, architecture(config), facts(config, folder)


def architecture(config: dict[str, Any]) -> dict[str, Any]:
    """The part of the architecture that tensors do not determine, from config.json.

    transformers counts the embeddings as 1: layer i of its segmentation head is the output of block i - 1.
    """
    indices = config.get("out_indices") or config.get("segmentation_indices")  # that of transformers below 4.37
    layers = [int(i) - 1 for i in indices] if isinstance(indices, list) and len(indices) == 4 else None
    return {
        "image_size": config.get("image_size", 224),
        "num_heads": config.get("num_attention_heads"),
        "init_values": config.get("layer_scale_init_value"),
        "drop_path_rate": config.get("drop_path_rate", 0.1),
        "norm_eps": config.get("layer_norm_eps", 1e-12),
        "decoder": {"layers": layers, "pool_scales": config.get("pool_scales")},
    }


def facts(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Class names, and what preprocessor_config.json does to images."""
    found: dict[str, Any] = {}
    names = config.get("id2label") or {}
    if not isinstance(names, dict) or not all(re.fullmatch(r"\d{1,9}", str(key)) for key in names):
        raise UserError(f"{folder}/config.json: id2label must name classes by number")
    if names and not all(str(label).startswith("LABEL_") for label in names.values()):
        found["classes"] = [str(names[key]) for key in sorted(names, key=int)]
    processor = read_json(folder / FILE)
    channels = config.get("num_channels", 3)
    found |= preprocessing(processor, channels if isinstance(channels, int) and 0 < channels < 2**10 else 3, folder)
    if isinstance(reduced := processor.get("do_reduce_labels", processor.get("reduce_labels")), bool):
        found["reduce_labels"] = reduced
    return found


def outside_blocks(kind: str) -> dict[str, str]:
    """Ours -> theirs, outside of the blocks, of the network in `ARCHITECTURES`."""
    found = {ours: f"beit.{theirs}" for ours, theirs in STEM.items()}
    for part in ("weight", "bias"):
        found[f"norm.{part}"] = f"layernorm.{part}" if kind == "mim" else f"beit.layernorm.{part}"
        found[f"head.{part}"] = f"classifier.{part}"
    return found


def to_names(state: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Our tensors under the names of a file of the network in `ARCHITECTURES`."""
    outside, named = outside_blocks(kind), {}
    for name, tensor in state.items():
        _, number, inside = name.split(".", 2) if name.startswith("blocks.") else ("", "", "")
        if not inside:
            named[outside.get(name, name)] = tensor
            continue
        whole = {f"{inside}.{p}": t.clone() for p, t in zip(QKV, tensor.chunk(3))} if "qkv" in inside else None
        for part, values in (whole or {inside: tensor}).items():
            named[f"beit.encoder.layer.{number}.{BLOCK[part]}"] = values
    if kind == "backbone":  # a BeitModel by itself
        return {name.removeprefix("beit."): tensor for name, tensor in named.items()}
    return named
