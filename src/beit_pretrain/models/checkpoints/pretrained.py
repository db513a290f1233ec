"""A ready network from any BEiT checkpoint: `load_pretrained`, and the steps between a file and a network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from beit_pretrain.errors import UserError
from beit_pretrain.models.backbone import (
    Backbone,
    Classifier,
    FeatureExtractor,
    MaskedImageModel,
    init_class_head,
    init_token_head,
    patch_grid,
)
from beit_pretrain.models.checkpoints.files import check_fit
from beit_pretrain.models.checkpoints.formats import Checkpoint, read_checkpoint, seems
from beit_pretrain.models.checkpoints.infer_architecture import SHARED_TABLE, TABLE
from beit_pretrain.models.resize import resize_state
from beit_pretrain.models.upernet import CLASSIFIERS, Decoder, Segmenter, init_heads
from beit_pretrain.models.upernet import HEADS as SEGMENTATION_HEADS

Network = TypeVar("Network", bound=Backbone)
MOST_PATCHES = 2**14  # the position indices of more would fill gigabytes
HEADS = ("mim", "classify", "segment", "features")
# What a network with another head leaves behind. The rest of a file must fit to the last tensor.
TOKEN_HEAD = ("mask_token", "lm_head.", "decoder_")  # of tokens, or of pixels
CLASS_HEAD = ("head.", "fc_norm.")
AGGREGATION = ("cls_pt_layers.", "cls_pt_norm.")  # BEiT v2's branch for [CLS], of its pre-training alone


def load_pretrained(
    path: str | Path,
    head: str = "features",
    image_size: int | tuple[int, int] | None = None,
    num_classes: int | None = None,
    *,
    drop_path_rate: float = 0.0,
) -> MaskedImageModel | Classifier | Segmenter | FeatureExtractor:
    """A network in eval mode from any BEiT checkpoint (RECIPE section 8).

    Args:
        path: the authors' `.pth`, a timm `beit*` file, a Hugging Face BEiT folder, a `.ckpt` of `fit`, or what
            `export` wrote (ONNX excepted). The architecture is inferred.
        head: "mim": `model(image_BCHW, mask_BN)` gives logits (M, V) of the masked patches (True = masked);
            "classify": `model(image_BCHW)` gives logits (B, classes);
            "segment": `model(image_BCHW).main` gives logits (B, classes, 4h, 4w) over h x w patches;
            "features": `model(image_BCHW)` gives `Features`, [CLS] and patches of every layer.
            Images are normalised by the caller with `model.about["mean"]` and `["std"]`, where the file says them.
        image_size: side, or (height, width), in pixels; other than the file's, position tables are resized
            (RECIPE section 5). None = the file's.
        num_classes: of a new head where the file has none, or one of another size. None = the file's.
        drop_path_rate: stochastic depth of the last block, for those who train the network.

    Raises UserError, in one line, for what cannot be read or does not fit; nothing in a file is executed.
    """
    if head not in HEADS:
        raise UserError(f"head={head} is not one of {', '.join(HEADS)}")
    if image_size is not None and not (is_pixels(image_size) or is_pair(image_size)):
        raise UserError(f"image_size={image_size!r} must be a number of pixels or (height, width)")
    if num_classes is not None and (type(num_classes) is not int or num_classes < 1):
        raise UserError(f"num_classes={num_classes!r} must be a whole number of at least 1")
    source = read_checkpoint(path, (image_size, image_size) if isinstance(image_size, int) else image_size)
    if head == "mim":
        return mim(source, image_size, drop_path_rate)
    if head == "classify":
        return classifier(source, image_size, num_classes, drop_path_rate)
    if head == "segment":
        return segmenter(source, image_size, num_classes, drop_path_rate)
    return features(source, image_size)


def is_pixels(value: object) -> bool:
    """Whether a value is a number of pixels."""
    return type(value) is int and 0 < value < 2**16


def is_pair(value: object) -> bool:
    """Whether a value is a height and a width in pixels."""
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(map(is_pixels, value))


def mim(
    source: Checkpoint,
    image_size: int | Sequence[int] | None = None,
    drop_path_rate: float = 0.0,
    new_vocab_size: int | None = None,
) -> MaskedImageModel:
    """The backbone with its token head; with `new_vocab_size`, with a new head for another tokenizer."""
    if source.kind != "mim":
        raise UserError(f"{source.path} holds a {source.kind} without a token head: it cannot predict tokens")
    leave = (*CLASS_HEAD, *AGGREGATION, *SEGMENTATION_HEADS, *(("lm_head.",) if new_vocab_size else ()))
    architecture, state = prepared(source, image_size, drop_path_rate, leave)
    vocab_size = new_vocab_size or source.architecture["vocab_size"]
    new = ("lm_head.",) if new_vocab_size else ()
    return finished(lambda: MaskedImageModel(vocab_size, **architecture), state, source, new)


def classifier(
    source: Checkpoint,
    image_size: int | Sequence[int] | None = None,
    num_classes: int | None = None,
    drop_path_rate: float = 0.0,
    pool: str | None = None,
    new_head: bool = False,
) -> Classifier:
    """The backbone under a classification head: the file's own if it has one of `num_classes`, else a new one.

    Without one of the file's, the shared bias table starts every block's own, and with pool="avg" (the default) a new
    LayerNorm over the mean takes the place of the final one (RECIPE section 5).
    """
    own = source.architecture.get("num_classes") if source.kind == "classifier" else None
    classes = num_classes if num_classes is not None else own
    if classes is None:
        raise UserError(f"{source.path} holds a {source.kind} without classes: num_classes is needed for a new head")
    kept = source.kind == "classifier" and classes == own and not new_head
    pool = pool or source.architecture.get("pool", "avg")
    norm, other_norm = ("fc_norm.", "norm.") if pool == "avg" else ("norm.", "fc_norm.")
    new = (*(() if kept else ("head.",)), *(() if has(source.state, norm) else (norm,)))
    leave = (*TOKEN_HEAD, *AGGREGATION, *SEGMENTATION_HEADS, other_norm, *(() if kept else ("head.",)))
    architecture, state = prepared(source, image_size, drop_path_rate, leave)
    if source.kind not in ("classifier", "segmenter"):
        spread_table(architecture, state)
    return finished(lambda: Classifier(classes, pool, **architecture), state, source, new)


def segmenter(
    source: Checkpoint,
    image_size: int | Sequence[int] | None = None,
    num_classes: int | None = None,
    drop_path_rate: float = 0.0,
    decoder: Decoder | None = None,
    new_head: bool = False,
) -> Segmenter:
    """The backbone under UPerNet: the file's own decoder if it has one, else a new one (`decoder` says of which kind).

    With `new_head`, or another number of classes than the file's, its two classifiers start afresh. Of the file's own
    decoder, `decoder` may only change the blocks that it looks at.
    """
    kept = source.kind == "segmenter"
    own = source.architecture.get("num_classes") if kept else None
    classes = num_classes if num_classes is not None else own
    if classes is None:
        raise UserError(f"{source.path} holds a {source.kind} without a decoder: num_classes is needed for a new one")
    fresh: tuple[str, ...] = (
        () if kept and classes == own and not new_head else CLASSIFIERS if kept else SEGMENTATION_HEADS
    )
    settings: Decoder = {**(decoder or {})}
    if kept:
        settings = {**source.architecture["decoder"]}
        if decoder and decoder.get("layers"):
            settings["layers"] = decoder["layers"]
    leave = (*TOKEN_HEAD, *CLASS_HEAD, *AGGREGATION, "norm.", *fresh)
    architecture, state = prepared(source, image_size, drop_path_rate, leave)
    if source.kind not in ("classifier", "segmenter"):
        spread_table(architecture, state)
    fresh = tuple(name for name in fresh if settings.get("aux_channels", True) or "auxiliary" not in name)
    return finished(lambda: Segmenter(classes, settings, **architecture), state, source, fresh)


def spread_table(architecture: dict[str, Any], state: dict[str, Tensor]) -> None:
    """Start a bias table for every block from the shared one, in place (RECIPE section 3)."""
    if architecture["rel_pos_bias"] == "shared":
        table = state.pop(SHARED_TABLE)
        state |= {f"blocks.{i}.attn.{TABLE}": table.clone() for i in range(architecture["depth"])}
        architecture["rel_pos_bias"] = "per_layer"


def features(
    source: Checkpoint, image_size: int | Sequence[int] | None = None, drop_path_rate: float = 0.0
) -> FeatureExtractor:
    """The backbone without any head."""
    leave = (*TOKEN_HEAD, *CLASS_HEAD, *AGGREGATION, *SEGMENTATION_HEADS, "norm.")
    architecture, state = prepared(source, image_size, drop_path_rate, leave)
    return finished(lambda: FeatureExtractor(**architecture), state, source)


def prepared(
    source: Checkpoint, image_size: int | Sequence[int] | None, drop_path_rate: float, leave: tuple[str, ...]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(architecture, tensors) for another image size, without what is left behind."""
    heads = ("num_classes", "pool", "vocab_size", "decoder")
    architecture = {name: value for name, value in source.architecture.items() if name not in heads}
    architecture["drop_path_rate"] = drop_path_rate
    if image_size is not None:
        architecture["image_size"] = image_size
    patch = architecture["patch_size"]
    old, new = patch_grid(source.architecture["image_size"], patch), patch_grid(architecture["image_size"], patch)
    if new[0] * new[1] > MOST_PATCHES:
        raise UserError(
            f"image_size={architecture['image_size']} has {new[0] * new[1]} patches; {MOST_PATCHES} at most"
        )
    return architecture, resize_state(without(source.state, leave), old, new)


def finished(
    build: Callable[[], Network], state: dict[str, Tensor], source: Checkpoint, new: tuple[str, ...] = ()
) -> Network:
    """The network with the file's tensors, in eval mode; the modules named in `new` start afresh.

    Raises UserError with the sorted names of whatever is missing, left over or of another shape.
    """
    with torch.device("meta"):  # draws no weights that the file's would replace: seconds for a large network
        model = build()
    left = {name for name in model.state_dict() if name.startswith(new)} if new else set()
    expected = {name: tensor for name, tensor in model.state_dict().items() if name not in left}
    try:
        check_fit(expected, state, source.path)  # before memory is taken
    except UserError as error:
        raise UserError(f"{error}; it seems to be {guess(source)}") from None
    model.to_empty(device="cpu")
    for part in model.modules():
        if hasattr(part, "init_non_persistent_buffers"):  # timm's: position indices, the zero bias of k
            cast(Any, part).init_non_persistent_buffers()
    for prefix in new:
        module = model.get_submodule(prefix.removesuffix("."))
        if isinstance(module, nn.LayerNorm):
            module.reset_parameters()
        elif isinstance(module, nn.Linear):
            (init_token_head if prefix == "lm_head." else init_class_head)(module)
        else:
            init_heads(module)
    model.load_state_dict(state, strict=False)
    model.about = {name: value for name, value in source.about.items() if not (name == "classes" and "head." in new)}
    return model.eval()


def guess(source: Checkpoint) -> str:
    """What a BEiT-like file that does not fit seems to be."""
    said = seems(source.state)
    return f"a {source.kind} in the format of {source.format}" if said.startswith("something") else said


def without(state: dict[str, Tensor], prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors whose names start with none of the prefixes."""
    return {name: tensor for name, tensor in state.items() if not name.startswith(prefixes)}


def has(state: dict[str, Tensor], prefix: str) -> bool:
    """Whether any name starts with the prefix."""
    return any(name.startswith(prefix) for name in state)
