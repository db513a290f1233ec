"""A ready network from any BEiT checkpoint: `load_pretrained`, and the steps between a file and a network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
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
from beit_pretrain.models.upernet import HEADS as DECODER

Network = TypeVar("Network", bound=Backbone)
MOST_PATCHES = 2**14  # the position indices of more would take gigabytes
# Beginnings of names outside the embeddings and blocks. A network leaves behind those that it does not have, among them
# BEiT v2's extra blocks and head for [CLS]; everything else in a file must fit.
OF_CLS = ("cls_pt_layers.", "cls_pt_norm.", "cls_pt_lm_head.")
HEADS = ("mask_token", "lm_head.", "decoder_", "norm.", "fc_norm.", "head.", *DECODER, *OF_CLS)
OF_HEADS = ("num_classes", "pool", "vocab_size", "decoder")  # arguments
ImageSize = int | Sequence[int] | None


def load_pretrained(
    path: str | Path,
    head: str = "features",
    image_size: int | tuple[int, int] | None = None,
    num_classes: int | None = None,
    *,
    drop_path_rate: float = 0.0,
) -> MaskedImageModel | Classifier | Segmenter | FeatureExtractor:
    """A network in eval mode from any BEiT checkpoint.

    Args:
        path: the authors' `.pth`, a timm `beit*` file, a Hugging Face BEiT folder, a `.ckpt` of `fit`, or what
            `export` wrote (except ONNX); or an address of the Hub, hf://OWNER/NAME[@REVISION][/FILE]. The architecture
            is inferred.
        head: "mim": `model(image_BCHW, mask_BN)` returns logits (M, V) of the masked patches (True = masked);
            "classify": `model(image_BCHW)` returns logits (B, classes);
            "segment": `model(image_BCHW).main` returns logits (B, classes, 4h, 4w) over h x w patches;
            "features": `model(image_BCHW)` returns `Features`, [CLS] and patches of every layer.
            Images are normalised by the caller with `model.about["mean"]` and `["std"]`, where the file has them.
        image_size: side, or (height, width), in pixels; if not the file's, position tables are resized. None = the
            file's.
        num_classes: of a new head where the file has none, or one of another size. None = the file's.
        drop_path_rate: stochastic depth of the last block, for training.

    Raises UserError, in one line, for what cannot be read or does not fit; nothing in a file is executed.
    """
    builders: dict[str, Callable[[Checkpoint], Any]] = {
        "mim": lambda source: mim(source, image_size, drop_path_rate),
        "classify": lambda source: classifier(source, image_size, num_classes, drop_path_rate),
        "segment": lambda source: segmenter(source, image_size, num_classes, drop_path_rate),
        "features": lambda source: features(source, image_size),
    }
    if head not in builders:
        raise UserError(f"head={head} is not one of {', '.join(builders)}")
    return builders[head](read_checkpoint(path, checked_sides(image_size, num_classes)))


def checked_sides(image_size: ImageSize, num_classes: int | None = None) -> Sequence[int] | None:
    """(height, width) of an image size. Raises UserError for sizes and numbers of classes that cannot be."""
    if isinstance(image_size, np.integer):
        image_size = int(image_size)
    sides = [image_size, image_size] if isinstance(image_size, int) else image_size
    pair = isinstance(sides, (tuple, list)) and len(sides) == 2
    if sides is not None and not (pair and all(type(side) is int and 0 < side < 2**16 for side in sides)):
        raise UserError(f"image_size={image_size!r} must be a number of pixels or (height, width)")
    if num_classes is not None and (type(num_classes) is not int or num_classes < 1):
        raise UserError(f"num_classes={num_classes!r} must be a whole number of at least 1")
    return sides


def mim(
    source: Checkpoint, image_size: ImageSize = None, drop_path_rate: float = 0.0, new_vocab_size: int | None = None
) -> MaskedImageModel:
    """The backbone with its token head; with `new_vocab_size`, with a new head for another tokenizer."""
    if source.kind != "mim":
        raise UserError(f"{source.path} holds a {source.kind} without a token head: it cannot predict tokens")
    new = ("lm_head.",) if new_vocab_size else ()
    vocab_size = new_vocab_size or source.architecture["vocab_size"]
    architecture, state = prepared(source, image_size, drop_path_rate, ("mask_token", "norm.", "lm_head."), new)
    return finished(lambda: MaskedImageModel(vocab_size, **architecture), state, source, new)


def classifier(
    source: Checkpoint,
    image_size: ImageSize = None,
    num_classes: int | None = None,
    drop_path_rate: float = 0.0,
    pool: str | None = None,
    new_head: bool = False,
) -> Classifier:
    """The backbone under a classification head: the file's own if it has one of `num_classes`, else a new one.

    Without one of the file's, the shared bias table starts every block's own, and with pool="avg" (the default) a new
    LayerNorm over the mean takes the place of the final one (the release's modeling_finetune.py).
    """
    own = source.architecture.get("num_classes") if source.kind == "classifier" else None
    classes = num_classes if num_classes is not None else own
    if classes is None:
        raise UserError(f"{source.path} holds a {source.kind} without classes: num_classes is needed for a new head")
    pool = pool or source.architecture.get("pool", "avg")
    norm = "fc_norm." if pool == "avg" else "norm."
    new = (
        *(() if classes == own and not new_head else ("head.",)),
        *(() if any(name.startswith(norm) for name in source.state) else (norm,)),
    )
    architecture, state = prepared(source, image_size, drop_path_rate, (norm, "head."), new)
    spread_table(source, architecture, state)
    return finished(lambda: Classifier(classes, pool, **architecture), state, source, new)


def segmenter(
    source: Checkpoint,
    image_size: ImageSize = None,
    num_classes: int | None = None,
    drop_path_rate: float = 0.0,
    decoder: Decoder | None = None,
    new_head: bool = False,
) -> Segmenter:
    """The backbone under UPerNet: the file's own decoder if it has one, else a new one with the arguments `decoder`.

    With `new_head`, or another number of classes than the file's, its two classifiers start afresh. Of the arguments of
    the file's own decoder, `decoder` may only change `layers`.
    """
    own = source.architecture.get("num_classes") if source.kind == "segmenter" else None
    classes = num_classes if num_classes is not None else own
    if classes is None:
        raise UserError(f"{source.path} holds a {source.kind} without a decoder: num_classes is needed for a new one")
    new: tuple[str, ...] = DECODER
    settings = {**(decoder or {})}
    if source.kind == "segmenter":
        new = () if classes == own and not new_head else CLASSIFIERS
        layers = settings.get("layers") or source.architecture["decoder"]["layers"]
        settings = {**source.architecture["decoder"], "layers": layers}
    architecture, state = prepared(source, image_size, drop_path_rate, DECODER, new)
    spread_table(source, architecture, state)
    if not settings.get("aux_channels", True):
        new = tuple(name for name in new if "auxiliary" not in name)
    return finished(lambda: Segmenter(classes, settings, **architecture), state, source, new)


def features(source: Checkpoint, image_size: ImageSize = None, drop_path_rate: float = 0.0) -> FeatureExtractor:
    """The backbone without any head."""
    architecture, state = prepared(source, image_size, drop_path_rate)
    return finished(lambda: FeatureExtractor(**architecture), state, source)


def encoder(
    source: Checkpoint,
    image_size: ImageSize = None,
    drop_path_rate: float = 0.0,
    mean_pooling: bool | None = None,
    pooler: bool | None = None,
) -> Backbone:
    """The backbone with its mask token, if the file has one, and without a head.

    With `mean_pooling` its LayerNorm is that of the pooler, over the mean of the patches (without `pooler` there is
    none); else it is the final one, over all tokens. One that the file lacks starts afresh. None = as in the file; of
    a file with a token head, as transformers takes it: mean pooling.
    """
    names = source.state.keys()
    if mean_pooling is None:
        mean_pooling = source.kind == "mim" or "norm.weight" not in names
    if pooler is None:
        pooler = not mean_pooling or "fc_norm.weight" in names
    norm = ("fc_norm.",) if mean_pooling and pooler else () if mean_pooling else ("norm.",)
    decoder = any(name.startswith("decoder_") for name in names)  # MAE's, whose input the mask token is
    mask_token = ("mask_token",) if "mask_token" in names and not decoder else ()
    new = tuple(name for name in norm if f"{name}weight" not in names)
    architecture, state = prepared(source, image_size, drop_path_rate, norm + mask_token, new)
    return finished(lambda: base(architecture, mean_pooling, pooler, bool(mask_token)), state, source, new)


def base(architecture: dict[str, Any], mean_pooling: bool, pooler: bool, mask_token: bool) -> Backbone:
    """A backbone without a head; arguments as of `encoder`."""
    model = Backbone("avg" if mean_pooling and pooler else "", 0, **architecture)
    if mean_pooling:
        model.norm = nn.Identity()
    if mask_token:
        model.mask_token = nn.Parameter(torch.zeros(1, 1, int(model.embed_dim)))
    return model


def spread_table(source: Checkpoint, architecture: dict[str, Any], state: dict[str, Tensor]) -> None:
    """For fine-tuning, start a bias table for every block from the shared one, in place."""
    if source.kind not in ("classifier", "segmenter") and architecture["rel_pos_bias"] == "shared":
        table = state.pop(SHARED_TABLE)
        state |= {f"blocks.{i}.attn.{TABLE}": table.clone() for i in range(architecture["depth"])}
        architecture["rel_pos_bias"] = "per_layer"


def prepared(
    source: Checkpoint,
    image_size: ImageSize,
    drop_path_rate: float,
    heads: tuple[str, ...] = (),
    new: tuple[str, ...] = (),
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(architecture, tensors) for another image size; of the heads' tensors those of `heads` that are not `new`."""
    architecture = {name: value for name, value in source.architecture.items() if name not in OF_HEADS}
    architecture["drop_path_rate"] = drop_path_rate
    if image_size is not None:
        architecture["image_size"] = image_size
    patch = architecture["patch_size"]
    old, grid = patch_grid(source.architecture["image_size"], patch), patch_grid(architecture["image_size"], patch)
    if (patches := grid[0] * grid[1]) > MOST_PATCHES:
        raise UserError(f"image_size={architecture['image_size']} has {patches} patches; {MOST_PATCHES} at most")
    left = (*(name for name in HEADS if name not in heads), *new)
    state = {name: tensor for name, tensor in source.state.items() if not name.startswith(left)}
    return architecture, resize_state(state, old, grid)


def finished(
    build: Callable[[], Network], state: dict[str, Tensor], source: Checkpoint, new: tuple[str, ...] = ()
) -> Network:
    """The network with the file's tensors, in eval mode; the modules named in `new` start afresh.

    Raises UserError with the sorted names of whatever is missing, left over or of another shape.
    """
    with torch.device("meta"):  # no initial weights are drawn only to be replaced: seconds for a large network
        model = build()
    expected = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(new)}
    try:
        check_fit(expected, state, source.path)  # before memory is allocated
    except UserError as error:
        said = seems(source.state)
        guess = f"a {source.kind} in the format of {source.format}" if said.startswith("something") else said
        raise UserError(f"{error}; it seems to be {guess}") from None
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
    renewed = bool({"head.", *CLASSIFIERS, *DECODER} & {*new})  # the file's classes are not those of a new head
    model.about = {name: value for name, value in source.about.items() if not (name == "classes" and renewed)}
    return model.eval()
