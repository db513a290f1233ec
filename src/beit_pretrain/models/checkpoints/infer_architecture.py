"""Infers the architecture from a file's tensors, and checks tensors and metadata of untrusted files.

Everything here raises UserError, in one line that names the file, before a network is built.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, Field, ValidationError
from torch import Tensor

from beit_pretrain.errors import UserError
from beit_pretrain.settings import Positive
from beit_pretrain.transforms.processor_view import ProcessorView

TABLE = "relative_position_bias_table"
SHARED_TABLE = f"rel_pos_bias.{TABLE}"
MOST_BLOCKS = 1000
# The tensor that tells what a file holds.
HEADS = {"mim": "lm_head.weight", "segmenter": "decode_head.classifier.weight", "classifier": "head.weight"}
# Dimensions of the tensors that the architecture is read from.
DIMENSIONS = {"patch_embed.proj.weight": 4, "cls_token": 3, "mask_token": 3, "pos_embed": 3, SHARED_TABLE: 2}
DIMENSIONS |= {"head.weight": 2, "lm_head.weight": 2, HEADS["segmenter"]: 4}
BLOCK_DIMENSIONS = {f"attn.{TABLE}": 2, "mlp.fc1.weight": 2}

Pixels = Annotated[int, Field(ge=1, lt=2**16)]


class Facts(BaseModel, strict=True):
    """Metadata that a file may have, in its config or in our own entry."""

    image_size: Pixels | Annotated[list[Pixels], Field(min_length=2, max_length=2)] | None = None
    num_heads: Annotated[int, Field(ge=1, lt=2**12)] | None = None
    init_values: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    norm_eps: Positive = 1e-6
    drop_path_rate: Annotated[float, Field(ge=0, le=1)] = 0.0
    classes: list[str] = []  # an empty or repeated name does no harm
    crop_ratio: Annotated[float, Field(gt=0, le=1)] | None = None
    view: ProcessorView | None = None
    view_differs: list[str] = []
    mean: list[Annotated[float, Field(allow_inf_nan=False)]] = []
    std: list[Positive] = []


def check_facts(values: dict[str, Any], path: Path) -> None:
    """Raise UserError for the first value that `Facts` refuses."""
    try:
        Facts.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name, needed = first["loc"][0], first["msg"].replace("Input should be", "must be")
        raise UserError(f"{path}: {name} of its config {needed}, got {str(values[str(name)])[:80]!r}") from None


def checked_facts(about: dict[str, Any], channels: int, classes: int | None, path: Path) -> dict[str, Any]:
    """The checked metadata; without class names if these are for another number of classes."""
    check_facts(about, path)
    for name in ("mean", "std"):
        if len(about.get(name, [0] * channels)) != channels:
            raise UserError(f"{path}: {name} of its config must be a list of {channels}, got {about[name]}")
    wrong = classes is not None and len(about.get("classes", [])) != classes
    return {name: value for name, value in about.items() if not (wrong and name == "classes")}


def floats(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors as float32, in which networks are built and trained.

    Raises UserError for integers, complex numbers, NaN, sparse tensors, and tensors larger than their storage.
    """
    found = {}
    for name, tensor in state.items():
        if name.endswith("num_batches_tracked"):  # a counter of batch norm, in segmentation heads
            found[name] = tensor
            continue
        if tensor.layout != torch.strided or not tensor.is_floating_point() or tensor.is_quantized:
            raise UserError(f"{path}: {name} holds {tensor.dtype} ({tensor.layout}); weights are real numbers")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise UserError(f"{path}: {name} claims more numbers than the file holds")
        if not tensor.isfinite().all():
            raise UserError(f"{path}: {name} holds NaN or infinite numbers; the training it is from has diverged")
        found[name] = tensor.float()
    return found


def infer(
    state: dict[str, Tensor], kind: str, said: dict[str, Any], path: Path, hint: Sequence[int] | None = None
) -> dict[str, Any]:
    """The architecture, from the tensors; what they do not determine comes from `said`, the file's own config.

    Without a bias table heads are taken to be 64 wide, as in every BEiT. `hint` is the (height, width) of the images
    for tables of a grid that is not square. Raises UserError for an architecture that no BEiT has.
    """
    check_facts(said, path)
    depth = number_of_blocks(state, path)
    blocks = {f"blocks.{i}.{name}": n for i in range(depth) for name, n in BLOCK_DIMENSIONS.items()}
    for name, dimensions in (DIMENSIONS | blocks).items():
        if name in state and (state[name].ndim != dimensions or 0 in state[name].shape):
            raise UserError(f"{path}: {name} has the shape {tuple(state[name].shape)}; no BEiT's has")
    conv = state["patch_embed.proj.weight"]
    if conv.shape[2] != conv.shape[3]:
        raise UserError(f"{path} has patches of shape {tuple(conv.shape)}; square patches are needed")
    width, patch = int(conv.shape[0]), int(conv.shape[2])
    tables = [tensor for name, tensor in state.items() if name.endswith(TABLE)]
    if SHARED_TABLE in state and len(tables) > 1:
        raise UserError(f"{path} has a shared bias table and one in each block; one or the other can be read")
    heads = int(tables[0].shape[1]) if tables else said.get("num_heads") or max(1, width // 64)
    if width % heads:
        raise UserError(f"{path}: a width of {width} does not divide into {heads} heads")
    hidden = state.get("blocks.0.mlp.fc1.weight")
    scale = 1e-5 if width >= 1024 else 0.1
    architecture: dict[str, Any] = {
        "norm_eps": 1e-6,
        **{name: said[name] for name in ("norm_eps", "drop_path_rate") if name in said},
        "image_size": said.get("image_size") or image_size(state, tables, patch, path, hint),
        "patch_size": patch,
        "in_chans": int(conv.shape[1]),
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": mlp_ratio(hidden.shape[0], width) if hidden is not None else 4.0,
        "init_values": (said.get("init_values") or scale) if "blocks.0.gamma_1" in state else None,
        "rel_pos_bias": "shared" if SHARED_TABLE in state else "per_layer" if tables else "none",
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


def mlp_ratio(hidden: int, width: int) -> float:
    """The ratio from which timm computes an MLP's hidden width, int(width * ratio): a quotient may be rounded down."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def decoder(state: dict[str, Tensor], said: dict[str, Any], path: Path) -> dict[str, Any]:
    """Arguments of a segmenter's heads (`upernet.DEFAULTS`); `said` may have the blocks and the pool scales."""
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


def number_of_blocks(state: dict[str, Tensor], path: Path) -> int:
    """The number of blocks. Raises UserError unless they are numbered from 0 without a gap."""
    numbers = {found[1] for name in state if (found := re.match(r"blocks\.(\d+)\.", name))}
    count = len(numbers)
    if odd := sorted(numbers - {str(i) for i in range(count)}, key=len):
        raise UserError(f"{path} has {count} blocks, but they are not numbered 0 to {count - 1}: {odd[0][:20]}")
    if count > MOST_BLOCKS:
        raise UserError(f"{path} has {count} blocks; {MOST_BLOCKS} at most")
    return count


def image_size(
    state: dict[str, Tensor], tables: list[Tensor], patch: int, path: Path, hint: Sequence[int] | None
) -> int | list[int]:
    """Side of the images, pixels, that the position tables are for; about 224 if there are none.

    Tables of a grid that is not square do not determine it: it must be that of `hint`.
    """
    if tables:
        rows = len(tables[0])
        side = (math.isqrt(max(0, rows - 3)) + 1) // 2
        fits = rows == (2 * side - 1) ** 2 + 3
    elif "pos_embed" in state:
        rows = state["pos_embed"].shape[1]
        side = math.isqrt(max(0, rows - 1))
        fits = side * side == rows - 1
    else:
        side, fits = max(1, 224 // patch), True
    if fits and side >= 1:
        return side * patch
    if hint is not None:
        height, width = hint[0] // patch, hint[1] // patch
        if rows == ((2 * height - 1) * (2 * width - 1) + 3 if tables else height * width + 1):
            return list(hint)
    raise UserError(
        f"{path} has position tables of no square grid, and says nowhere of which grid they are; "
        "load_pretrained(..., image_size=(height, width)) of its training can say it"
    )
