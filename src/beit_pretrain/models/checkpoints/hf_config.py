"""Hugging Face's BeitConfig: names, defaults and limits, both ways to our architecture, without transformers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from beit_pretrain.errors import UserError
from beit_pretrain.models.backbone import Backbone
from beit_pretrain.models.checkpoints import hf
from beit_pretrain.models.checkpoints.formats import Checkpoint
from beit_pretrain.models.checkpoints.infer_architecture import mlp_ratio
from beit_pretrain.settings import BelowOne, Count, NonNegative, Positive, Share, Side, Switch, Whole, rule, unknown

INITIAL_STD = 0.02  # of our initial weights
Sides = Side | Annotated[list[Side], Field(min_length=2, max_length=2)]


class HFConfig(BaseModel):
    """The architecture and the heads of a BEiT under Hugging Face's names, with its defaults.

    `num_labels` and `label2id` follow from `id2label`; both can be given instead of it. `image_size` may be (height,
    width). Raises UserError, in one line, for unknown names and values that cannot be.
    """

    model_config = ConfigDict(extra="forbid", validate_assignment=True)
    model_type: ClassVar[str] = "beit"

    vocab_size: Count = 8192
    hidden_size: Count = 768
    num_hidden_layers: Count = 12
    num_attention_heads: Count = 12
    intermediate_size: Count = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: Share = 0.0
    attention_probs_dropout_prob: Share = 0.0
    initializer_range: Positive = INITIAL_STD
    layer_norm_eps: Positive = 1e-12
    image_size: Sides = 224
    patch_size: Sides = 16
    num_channels: Count = 3
    use_mask_token: Switch = False
    use_absolute_position_embeddings: Switch = False
    use_relative_position_bias: Switch = False
    use_shared_relative_position_bias: Switch = False
    layer_scale_init_value: NonNegative = 0.1
    drop_path_rate: BelowOne = 0.1
    use_mean_pooling: Switch = True
    pool_scales: Annotated[list[Count], Field(min_length=1)] = [1, 2, 3, 6]
    use_auxiliary_head: Switch = True
    auxiliary_loss_weight: NonNegative = 0.4
    auxiliary_channels: Count = 256
    auxiliary_num_convs: Whole = 1
    auxiliary_concat_input: Switch = False
    semantic_loss_ignore_index: int = 255
    out_indices: list[Whole] | None = None
    add_fpn: Switch = False
    reshape_hidden_states: Switch = True
    id2label: dict[int, str] = {0: "LABEL_0", 1: "LABEL_1"}
    problem_type: Literal["regression", "single_label_classification", "multi_label_classification"] | None = None
    output_hidden_states: Switch = False
    output_attentions: Switch = False
    return_dict: Switch = True

    def __init__(self, *positional: Any, **values: Any):
        if positional:
            raise TypeError("BeitConfig takes its values by name: BeitConfig(hidden_size=768), BeitConfig(**settings)")
        values = {name: value.item() if isinstance(value, np.generic) else value for name, value in values.items()}
        with _one_line(values):
            super().__init__(**_labelled(values))

    def __setattr__(self, name: str, value: Any) -> None:
        with _one_line({name: value}):
            super().__setattr__(name, _labelled({"id2label": value})["id2label"] if name == "id2label" else value)

    @property
    def num_labels(self) -> int:
        """The number of classes; setting another one names them LABEL_0, LABEL_1, ..."""
        return len(self.id2label)

    @num_labels.setter
    def num_labels(self, count: int) -> None:
        if count != self.num_labels:
            self.id2label = numbered(count)

    @property
    def label2id(self) -> dict[str, int]:
        """The number of each class; of classes of the same name, as ImageNet's two cranes are, the last one's."""
        return {label: number for number, label in self.id2label.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """From the content of a config.json; its keys of no meaning for the network are left out."""
        known = {n: v for n, v in values.items() if n in cls.model_fields or n in ("num_labels", "label2id")}
        if "out_indices" not in values and "segmentation_indices" in values:  # of transformers below 4.37
            known["out_indices"] = values["segmentation_indices"]
        if isinstance(blocks := values.get(hf.USED), int):
            known["num_hidden_layers"] = blocks
        if known.get("out_indices") == [known.get("num_hidden_layers")]:  # transformers' default, for a backbone
            del known["out_indices"]
        return cls(**{name: value for name, value in known.items() if value is not None})

    def to_dict(self) -> dict[str, Any]:
        """The content of a config.json, as transformers writes and reads it."""
        values = self.model_dump(exclude={"output_hidden_states", "output_attentions", "return_dict", "problem_type"})
        values |= {n: v for n in ("output_hidden_states", "output_attentions") if (v := getattr(self, n))}
        values |= {"problem_type": self.problem_type} if self.problem_type else {}
        indices = self.out_indices or [self.num_hidden_layers]
        if (blocks := max(self.num_hidden_layers, *indices)) > self.num_hidden_layers:
            values |= {"num_hidden_layers": blocks, hf.USED: self.num_hidden_layers}
        stages = ["stem", *(f"stage{i}" for i in range(1, blocks + 1))]
        values |= {"out_indices": indices, "out_features": [stages[i] for i in indices], "stage_names": stages}
        return {"model_type": self.model_type, **values, "label2id": self.label2id}

    def architecture(self) -> dict[str, Any]:
        """Arguments of a `Backbone`. Raises UserError for what our networks cannot be; warns of what they leave out."""
        if self.hidden_act != "gelu":
            raise UserError(f"hidden_act={self.hidden_act}: BEiT has gelu, and nothing else can be built")
        if self.use_relative_position_bias and self.use_shared_relative_position_bias:
            raise UserError(
                "use_relative_position_bias and use_shared_relative_position_bias are both true; one of them can be"
            )
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"hidden_size={self.hidden_size} does not divide into num_attention_heads={self.num_attention_heads}"
            )
        patch = [self.patch_size] * 2 if isinstance(self.patch_size, int) else self.patch_size
        if patch[0] != patch[1]:
            raise UserError(f"patch_size={patch}: patches must be square")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            if getattr(self, name):
                warnings.warn(
                    f"{name}={getattr(self, name)}: no BEiT is trained with dropout, and none is done here",
                    stacklevel=3,
                )
        bias = "per_layer" if self.use_relative_position_bias else "none"
        return {
            **{ours: getattr(self, theirs) for ours, theirs in hf.CONFIG.items()},
            "patch_size": patch[0],
            "mlp_ratio": mlp_ratio(self.intermediate_size, self.hidden_size),
            "init_values": self.layer_scale_init_value or None,
            "rel_pos_bias": "shared" if self.use_shared_relative_position_bias else bias,
        }

    def decoder(self) -> dict[str, Any]:
        """Arguments of the heads of a `Segmenter`. Raises UserError for what it cannot be."""
        most, given = self.num_hidden_layers + 1, self.out_indices or []
        if len(given) != 4 or given != sorted(given) or given[0] < 1 or given[3] > most:
            raise UserError(
                f"out_indices={self.out_indices} must be four numbers from 1 to {most}, in ascending order: layer i "
                "of transformers' head is the output of block i - 1, so that the authors' blocks 4, 6, 8, 12 are "
                "out_indices=[5, 7, 9, 13]"
            )
        if self.auxiliary_concat_input:
            raise UserError("auxiliary_concat_input=True is not supported; no released BEiT has it")
        return {
            "layers": [index - 1 for index in given],
            "channels": self.hidden_size,
            "pool_scales": self.pool_scales,
            "aux_channels": self.auxiliary_channels if self.use_auxiliary_head else None,
            "aux_convs": self.auxiliary_num_convs,
        }

    @classmethod
    def of_network(cls, model: Backbone, **more: Any) -> Self:
        """The configuration of one of our networks; `more` has what networks do not say, such as weights of losses."""
        ours = model.config
        said: dict[str, Any] = {theirs: ours[name] for name, theirs in hf.CONFIG.items()}
        said |= {
            "intermediate_size": int(ours["embed_dim"] * ours["mlp_ratio"]),
            "layer_scale_init_value": ours["init_values"] or 0.0,
            "use_relative_position_bias": ours["rel_pos_bias"] == "per_layer",
            "use_shared_relative_position_bias": ours["rel_pos_bias"] == "shared",
            "use_mask_token": hasattr(model, "mask_token"),
            "use_mean_pooling": ours["pool"] == "avg" if "pool" in ours else True,
        }
        if model.kind == "backbone":
            said["use_mean_pooling"] = isinstance(model.norm, nn.Identity)
        if "vocab_size" in ours:
            said["vocab_size"] = ours["vocab_size"]
        if (count := ours.get("num_classes")) is not None:
            said["id2label"] = dict(enumerate(model.about.get("classes") or numbered(count).values()))
        if "decoder" in ours:
            said |= _decoder(ours)
        return cls(**{**more, **said})


def said_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Values of the file's own config.json, if it is Hugging Face's; of others, what the file says of training.

    Warns of those that contradict the weights.
    """
    if checkpoint.format != "hf":
        return {"drop_path_rate": checkpoint.architecture.get("drop_path_rate", 0.0)}
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    file = folder / "config.json"
    config = HFConfig.from_dict(hf.read_json(file))
    for field, name, ours in (
        ("hidden_size", "hidden_size", "embed_dim"),
        ("num_hidden_layers", "num_hidden_layers", "depth"),
        ("id2label", "num_labels", "num_classes"),
    ):
        own = checkpoint.architecture.get(ours)
        if field in config.model_fields_set and own is not None and getattr(config, name) != own:
            warnings.warn(
                f"{file} says {name}={getattr(config, name)}, the weights have {own}: these are taken; is it the "
                "config.json of another model?",
                stacklevel=3,
            )
    return dict(config)


def numbered(count: int) -> dict[int, str]:
    """Names of classes that have none."""
    if type(count) is not int or count < 1:
        raise UserError(f"num_labels={count!r} must be a whole number of at least 1")
    return {number: f"LABEL_{number}" for number in range(count)}


def _decoder(ours: dict[str, Any]) -> dict[str, Any]:
    """A segmenter's heads; their number of channels has no name there."""
    decoder = ours["decoder"]
    return {
        "out_indices": [layer + 1 for layer in decoder["layers"]],
        "pool_scales": decoder["pool_scales"],
        "use_auxiliary_head": decoder["aux_channels"] is not None,
        "auxiliary_channels": decoder["aux_channels"] or 256,
        "auxiliary_num_convs": decoder["aux_convs"],
    }


def _labelled(values: dict[str, Any]) -> dict[str, Any]:
    """The values with `num_labels` and `label2id` in the place of `id2label`. Raises UserError for contradictions."""
    rest = {name: value for name, value in values.items() if name not in ("num_labels", "label2id")}
    count, numbers, labels = values.get("num_labels"), values.get("label2id"), rest.get("id2label")
    if labels is None and isinstance(numbers, Mapping) and numbers:
        labels = {number: label for label, number in numbers.items()}
    if labels is None and count is not None:
        labels = numbered(count)
    if labels is None:
        return {name: value for name, value in rest.items() if name != "id2label"}
    try:
        labels = {int(number): str(label) for number, label in dict(labels).items()}
    except (TypeError, ValueError):
        labels = {}
    if sorted(labels) != list(range(len(labels))) or not labels:
        raise UserError("id2label must name classes by their numbers, 0, 1, 2, ...")
    if count not in (None, len(labels)):
        raise UserError(f"num_labels={count}, but id2label names {len(labels)} classes; give one of the two")
    return {**rest, "id2label": dict(sorted(labels.items()))}


@contextmanager
def _one_line(values: Mapping[str, Any]) -> Any:
    """Turn a validation's error into a UserError."""
    try:
        yield
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0])
        if name not in HFConfig.model_fields:
            raise UserError(
                f"BeitConfig: {unknown(name, [*HFConfig.model_fields, 'num_labels', 'label2id'])}"
            ) from None
        field = HFConfig.model_fields[name]
        wanted = rule(field.annotation, field.metadata)
        raise UserError(f"BeitConfig: {name} must be {wanted}, got {values.get(name)!r}") from None
