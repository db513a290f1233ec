"""Everyone's BEiT checkpoints in our names (RECIPE section 8): the authors', timm's, Hugging Face's, our own.

`read_checkpoint` finds out what a file or folder is, translates its names to those of `backbone.py`, and infers the
architecture from the tensors, or from the config that lies beside them. Nothing in a file is ever executed.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from beit_pretrain import hf
from beit_pretrain.checkpoint import read_tensors
from beit_pretrain.errors import UserError

TABLE = "relative_position_bias_table"
SHARED_TABLE = f"rel_pos_bias.{TABLE}"
# Buffers that follow from the architecture; some files hold them.
DERIVED = ("relative_position_index", "attn.k_bias", "position_ids")
# What the networks of RECIPE section 8 may be called, and in which entry a file keeps their tensors.
ENTRIES = ("state_dict", "model", "module")
PREFIXES = ("module.", "model.", "backbone.")
# The tensor that tells what a file holds.
HEADS = {"mim": "lm_head.weight", "segmenter": "decode_head.classifier.weight", "classifier": "head.weight"}
WEIGHTS = ("model.safetensors", "pytorch_model.bin")

# Names that give away what a file is, when it is no BEiT: (pattern, what it seems to be).
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
        path: where it was read.
        format: "beit_pretrain", "unilm or timm", or "hf".
        kind: "mim" (mask token and token head), "classifier", "segmenter", or "backbone" (none of these).
        architecture: arguments of `backbone.Backbone`; of a mim also `vocab_size`, of a classifier also
            `num_classes` and `pool`, of a segmenter also `num_classes` and `decoder`.
        state: tensors by the names of `backbone.py`.
        about: plain facts beside them, as far as the file has them: mean, std, classes, crop_ratio, ...
    """

    path: Path
    format: str
    kind: str
    architecture: dict[str, Any]
    state: dict[str, Tensor]
    about: dict[str, Any] = field(default_factory=dict)


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint of any known format. Raises UserError, in one line, for anything else."""
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    file = weights_file(path) if path.is_dir() and (path / "config.json").is_file() else path
    content, about = read_tensors(file)
    state, known = unwrap(content, about, path)
    if known.get("kind") == "tokenizer":
        raise UserError(f"{path} holds a tokenizer (dVAE), not a backbone")
    state = {name: floats(tensor) for name, tensor in state.items() if not name.endswith(DERIVED)}
    if hf.is_hf(state):
        state, architecture, about = hf.translate(state, folder, path)
        found = "hf"
    else:
        architecture = dict(known["model"]) if isinstance(known.get("model"), dict) else {}
        about = {name: value for name, value in known.items() if name not in ("kind", "model")}
        about = {**timm_facts(folder if file != path else None), **about}
        found = "beit_pretrain" if known else "unilm or timm"
        state = {name.replace(".conv_seg.", ".classifier."): tensor for name, tensor in state.items()}
    if not {"patch_embed.proj.weight", "cls_token"} <= state.keys():
        raise UserError(f"{path} is no BEiT: it seems to be {seems(state)}")
    kind = next((kind for kind, name in HEADS.items() if name in state), "backbone")
    return Checkpoint(path, found, kind, infer(state, kind, architecture, path), state, about)


def weights_file(folder: Path) -> Path:
    """The file with the tensors in a folder with a config.json. Raises UserError if there is none."""
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder} has a config.json, but neither {' nor '.join(WEIGHTS)}")


def unwrap(content: dict, known: dict[str, Any], path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors by name, what a file of ours says of itself) from the dictionary that a file holds."""
    entry = next((content[name] for name in ENTRIES if isinstance(content.get(name), dict)), content)
    if isinstance(content.get("beit_pretrain"), dict):
        known = content["beit_pretrain"]
    state = {str(name): tensor for name, tensor in entry.items() if isinstance(tensor, Tensor)}
    if not state:
        keys = sorted(map(str, content))
        listed = f"its keys are {', '.join(keys[:4])}{', ...' if len(keys) > 4 else ''}" if keys else "it is empty"
        raise UserError(f"{path} holds no tensors by name ({listed})")
    for prefix in PREFIXES:
        if all(name.startswith((prefix, "decode_head.", "auxiliary_head.")) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state, known


def floats(tensor: Tensor) -> Tensor:
    """float32, in which networks are built and trained; files of half precision lose nothing."""
    return tensor.float() if tensor.is_floating_point() else tensor


def timm_facts(folder: Path | None) -> dict[str, Any]:
    """Normalisation and crop of a timm model's folder (config.json with `pretrained_cfg`)."""
    if folder is None:
        return {}
    said = hf.read_json(folder / "config.json").get("pretrained_cfg", {})
    facts = {name: [float(x) for x in said[name]] for name in ("mean", "std") if name in said}
    return facts | ({"crop_ratio": float(said["crop_pct"])} if "crop_pct" in said else {})


def infer(state: dict[str, Tensor], kind: str, said: dict[str, Any], path: Path) -> dict[str, Any]:
    """The architecture, from the tensors; what tensors cannot tell comes from `said`, the file's own config.

    Heads without any bias table: 64 numbers each, as in every BEiT. Raises UserError for what no BEiT has.
    """
    conv = state["patch_embed.proj.weight"]
    if conv.ndim != 4 or conv.shape[2] != conv.shape[3]:
        raise UserError(f"{path} has patches of shape {tuple(conv.shape)}; square patches are needed")
    width, patch = int(conv.shape[0]), int(conv.shape[2])
    blocks = [int(found[1]) for name in state if (found := re.match(r"blocks\.(\d+)\.", name))]
    tables = [tensor for name, tensor in state.items() if name.endswith(TABLE)]
    shared = SHARED_TABLE in state
    if shared and len(tables) > 1:
        raise UserError(f"{path} has a shared bias table and one in each block; one or the other can be read")
    hidden = state.get("blocks.0.mlp.fc1.weight")
    scale = 1e-5 if width >= 1024 else 0.1
    architecture: dict[str, Any] = {
        "norm_eps": 1e-6,
        **{name: said[name] for name in ("norm_eps", "drop_path_rate") if name in said},
        "image_size": said.get("image_size") or image_size(state, tables, patch, path),
        "patch_size": patch,
        "in_chans": int(conv.shape[1]),
        "embed_dim": width,
        "depth": max(blocks, default=-1) + 1,
        "num_heads": int(tables[0].shape[1]) if tables else said.get("num_heads") or max(1, width // 64),
        "mlp_ratio": hidden.shape[0] / width if hidden is not None else 4.0,
        "init_values": (said.get("init_values") or scale) if "blocks.0.gamma_1" in state else None,
        "rel_pos_bias": "shared" if shared else "per_layer" if tables else "none",
        "abs_pos_emb": "pos_embed" in state,
    }
    if kind == "mim":
        architecture["vocab_size"] = len(state["lm_head.weight"])
    if kind == "classifier":
        architecture["num_classes"] = len(state["head.weight"])
        architecture["pool"] = "avg" if "fc_norm.weight" in state else "token"
    if kind == "segmenter":
        architecture["num_classes"] = len(state[HEADS["segmenter"]])
        architecture["decoder"] = decoder(state, said.get("decoder") or {}, path)
    return architecture


def decoder(state: dict[str, Tensor], said: dict[str, Any], path: Path) -> dict[str, Any]:
    """Arguments of a segmenter's heads (`upernet.Decoder`); `said` has the blocks and the pool scales, if anything."""
    merged = state.get("decode_head.fpn_bottleneck.conv.weight")
    if merged is None:
        raise UserError(f"{path} holds a segmentation model of another kind; UPerNet can be read")
    auxiliary = state.get(HEADS["segmenter"].replace("decode_", "auxiliary_"))
    convs = {name.split(".")[2] for name in state if name.startswith("auxiliary_head.convs.")}
    return {
        "layers": said.get("layers"),
        "channels": len(merged),
        "pool_scales": list(said.get("pool_scales") or (1, 2, 3, 6)),
        "aux_channels": None if auxiliary is None else int(auxiliary.shape[1]),
        "aux_convs": len(convs) or 1,
    }


def image_size(state: dict[str, Tensor], tables: list[Tensor], patch: int, path: Path) -> int:
    """Side of the (square) images that the position tables are for, pixels; 224 or so if there are none."""
    if tables:
        side = (math.isqrt(max(0, len(tables[0]) - 3)) + 1) // 2
        fits = len(tables[0]) == (2 * side - 1) ** 2 + 3
    elif "pos_embed" in state:
        patches = state["pos_embed"].shape[1] - 1
        side = math.isqrt(max(0, patches))
        fits = side * side == patches
    else:
        side, fits = max(1, 224 // patch), True
    if not fits or side < 1:
        raise UserError(f"{path} has position tables of no square grid, and says nowhere of which grid they are")
    return side * patch


def seems(names: Any) -> str:
    """What the tensors of a file seem to belong to."""
    for pattern, what in FOREIGN:
        if any(re.search(pattern, name) for name in names):
            return what
    first = sorted(names)[:3]
    return f"something else, with tensors such as {', '.join(first)}"


def sizes(architecture: dict[str, Any]) -> str:
    """An architecture in words, for people."""
    scale = "layer scale" if architecture["init_values"] is not None else "no layer scale"
    bias = {"shared": "one shared bias table", "per_layer": "a bias table per block", "none": "no relative bias"}
    return (
        f"{architecture['depth']} blocks of width {architecture['embed_dim']}, {architecture['num_heads']} heads, "
        f"patches of {architecture['patch_size']}, image size {architecture['image_size']}, "
        f"{bias[architecture['rel_pos_bias']]}, {'absolute positions, ' if architecture['abs_pos_emb'] else ''}{scale}"
    )
