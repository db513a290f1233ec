"""Reads BEiT checkpoints of anyone under our names; of other files, says what they seem to be.

`read_checkpoint` recognises a file or folder, translates its names to those of `backbone.py`, and infers the
architecture from the tensors, or from the config in the same folder. Nothing in a file is executed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from beit_pretrain.errors import UserError
from beit_pretrain.fileio import expand_home
from beit_pretrain.models.checkpoints import hf
from beit_pretrain.models.checkpoints.files import KINDS, listed_keys, read_tensors
from beit_pretrain.models.checkpoints.hub import is_address, local_copy
from beit_pretrain.models.checkpoints.infer_architecture import HEADS, checked_facts, floats, infer

DERIVED = ("relative_position_index", "attn.k_bias", "position_ids")  # buffers that some files hold
ENTRIES = ("state_dict", "model", "module")  # in which a file may keep its tensors
PREFIXES = ("module.", "model.", "backbone.", "_orig_mod.")
SEGMENTATION = ("decode_head.", "auxiliary_head.")  # without a prefix beside a backbone that has one
WEIGHTS = ("model.safetensors", "pytorch_model.bin")

# Other kinds of files: (pattern of a tensor's name, what the file seems to be).
FOREIGN = (
    (r"decoder_(embed|blocks)\.", "a masked autoencoder (MAE)"),
    (r"^beit3\.", "a BEiT-3"),
    (r"(student|teacher)\.|dino_head", "a DINO or iBOT pre-training"),
    (r"^encoder\.blocks\.\d+\.(to_logits|net)|^blocks\.group_\d|codebook|quantize", "a tokenizer (dVAE)"),
    (r"^(visual|vision_model|text_model)\.", "a CLIP-like model"),
    (r"layers\.\d+\.(blocks|downsample)\.", "a Swin transformer"),
    (r"^(conv1|layer1\.\d+)\.", "a ResNet"),
    (r"^vit\.", "a ViT of Hugging Face"),
    (
        r"attention\.(q|k|v)_proj",
        "the state dict of a transformers 5 model in memory; give its save_pretrained() folder",
    ),
    (r"^blocks\.\d+\.attn\.qkv\.bias", "a ViT or DeiT (its k has a bias), no BEiT"),
    (r"decode_head\.", "a segmentation model of another kind"),
)


@dataclass
class Checkpoint:
    """A BEiT in our names.

    Attributes:
        path: file or folder it was read from.
        format: "beit_pretrain", "unilm or timm", or "hf".
        kind: "mim" (mask token and token head), "classifier", "segmenter", or "backbone" (none of these).
        architecture: arguments of `backbone.Backbone`; of a mim also `vocab_size`, of a classifier also
            `num_classes` and `pool`, of a segmenter also `num_classes` and `decoder`.
        state: tensors by the names of `backbone.py`.
        about: metadata, as far as the file has it: mean, std, classes, crop_ratio, ...
    """

    path: Path
    format: str
    kind: str
    architecture: dict[str, Any]
    state: dict[str, Tensor]
    about: dict[str, Any] = field(default_factory=dict)


def read_checkpoint(path: str | Path, image_size: Sequence[int] | None = None) -> Checkpoint:
    """Read a checkpoint of any known format. Raises UserError, in one line, for anything else.

    `path`: a file, a folder, or an address of the Hub, hf://OWNER/NAME[@REVISION][/FILE]. `image_size`, (height,
    width), is needed where position tables are of a grid that is not square.
    """
    path = local_copy(path) if is_address(path) else expand_home(path)
    folder = path if path.is_dir() else path.parent
    in_folder = path.is_dir() and (path / "config.json").is_file()
    content, said = read_folder(path) if in_folder else read_tensors(path)
    state, known = unwrap(content, said, path)
    if known.get("kind") in ("tokenizer", "probe"):
        raise UserError(f"{path} holds {KINDS[known['kind']]}, not a backbone")
    for name in [name for name in state if name.endswith(DERIVED)]:
        if name.endswith("k_bias") and state[name].any():
            raise UserError(f"{path}: {name} is not zero; BEiT's k has no bias")
        del state[name]
    if hf.is_hf(state):
        state, architecture, about = hf.translate(state, folder, path)
        found = "hf"
    else:
        architecture = dict(known["model"]) if isinstance(known.get("model"), dict) else {}
        about = {name: value for name, value in known.items() if name not in ("kind", "model")}
        about = {**(timm_facts(folder) if in_folder else {}), **about}
        if isinstance(content.get("global_step"), int):
            about["step"] = content["global_step"]
        found = "beit_pretrain" if known else "unilm or timm"
        state = {name.replace(".conv_seg.", ".classifier."): tensor for name, tensor in state.items()}
    if not {"patch_embed.proj.weight", "cls_token"} <= state.keys():
        raise UserError(f"{path} is no BEiT: it seems to be {seems(state)}")
    kind = next((kind for kind, name in HEADS.items() if name in state), "backbone")
    state = floats(state, path)
    architecture = infer(state, kind, architecture, path, image_size)
    about = checked_facts(about, architecture["in_chans"], architecture.get("num_classes"), path)
    return Checkpoint(path, found, kind, architecture, state, about)


def read_folder(folder: Path) -> tuple[dict, dict]:
    """What `read_tensors` gives, of the weights in a folder with a config.json, in one file or in several."""
    for name in WEIGHTS:
        if (folder / name).is_file():
            return read_tensors(folder / name)
    for name in WEIGHTS:
        parts = hf.read_json(folder / f"{name}.index.json").get("weight_map")
        if isinstance(parts, dict):
            content: dict = {}
            for part in sorted({str(part) for part in parts.values()}):
                if part != Path(part).name:
                    raise UserError(f"{folder / name}.index.json names {part!r}, which is no file beside it")
                content |= read_tensors(folder / part)[0]
            return content, {}
    raise UserError(f"{folder} has a config.json, but neither {' nor '.join(WEIGHTS)}")


def unwrap(content: dict, known: dict[str, Any], path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors by name, metadata of our own files) from the dictionary that a file holds."""
    entry = next((content[name] for name in ENTRIES if isinstance(content.get(name), dict)), content)
    if isinstance(content.get("beit_pretrain"), dict):
        known = content["beit_pretrain"]
    state = {str(name): tensor for name, tensor in entry.items() if isinstance(tensor, Tensor)}
    if not state:
        raise UserError(f"{path} holds no tensors by name ({listed_keys(content)})")
    while prefix := next((p for p in PREFIXES if all(name.startswith((p, *SEGMENTATION)) for name in state)), None):
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state, known


def timm_facts(folder: Path) -> dict[str, Any]:
    """Normalisation and crop of a timm model's folder (config.json with `pretrained_cfg`)."""
    said = hf.read_json(folder / "config.json").get("pretrained_cfg")
    names = {"mean": "mean", "std": "std", "crop_ratio": "crop_pct"}
    return {ours: said[name] for ours, name in names.items() if name in said} if isinstance(said, dict) else {}


def digest(state: dict[str, Tensor]) -> str:
    """SHA-256 over names and values: equal if two files hold the same network."""
    found = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        found.update(name.encode())
        found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)  # counters are 0-d
    return found.hexdigest()


def seems(names: Any) -> str:
    """What the tensors of a file seem to belong to."""
    for pattern, what in FOREIGN:
        if any(re.search(pattern, name) for name in names):
            return what
    first = sorted(names)[:3]
    return f"something else, with tensors such as {', '.join(first)}"


def sizes(architecture: dict[str, Any]) -> str:
    """An architecture in words, for messages."""
    scale = "layer scale" if architecture["init_values"] is not None else "no layer scale"
    bias = {"shared": "one shared bias table", "per_layer": "a bias table per block", "none": "no relative bias"}
    return (
        f"{architecture['depth']} blocks of width {architecture['embed_dim']}, {architecture['num_heads']} heads, "
        f"patches of {architecture['patch_size']}, image size {architecture['image_size']}, "
        f"{bias[architecture['rel_pos_bias']]}, {'absolute positions, ' if architecture['abs_pos_emb'] else ''}{scale}"
    )
