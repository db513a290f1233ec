"""Outputs of the models: dataclasses that can also be unpacked, and indexed by number or name.

Fields that are None are left out of the tuple, as in transformers: `loss, logits = model(images, labels=labels)`.
Shapes: B batch, N patches, D width, A heads, K classes, V visual tokens, M masked patches of the batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor
from torch.utils._pytree import register_dataclass


class ModelOutput:
    """What all outputs can do, of torch and of Flax; each is a dataclass. Iterating gives values, so that unpacking
    works; `keys()` and `items()` give names."""

    def items(self) -> list[tuple[str, Any]]:
        """(name, value) of the fields that are not None, in their order."""
        named = ((field.name, getattr(self, field.name)) for field in fields(self))  # type: ignore[arg-type]
        return [(name, value) for name, value in named if value is not None]

    def keys(self) -> list[str]:
        return [name for name, _ in self.items()]

    def values(self) -> list[Any]:
        return [value for _, value in self.items()]

    def to_tuple(self) -> tuple[Any, ...]:
        """The values of the fields that are not None."""
        return tuple(self.values())

    def get(self, name: str, default: Any = None) -> Any:
        return dict(self.items()).get(name, default)

    def __getitem__(self, key: str | int | slice) -> Any:
        return dict(self.items())[key] if isinstance(key, str) else self.to_tuple()[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.to_tuple())

    def __len__(self) -> int:
        return len(self.to_tuple())

    def __contains__(self, name: object) -> bool:
        return name in self.keys()


@dataclass(eq=False)
class BeitModelOutputWithPooling(ModelOutput):
    """Features of `BeitModel`.

    Attributes:
        last_hidden_state: (B, 1 + N, D), [CLS] first, then the patches row by row; after the final LayerNorm if the
            config says use_mean_pooling=False, else the raw output of the last block.
        pooler_output: (B, D), the mean of the patches after its LayerNorm, or [CLS]; None without a pooler.
        hidden_states: depth + 1 tensors (B, 1 + N, D): the embeddings, and the raw output of every block.
        attentions: depth tensors (B, A, 1 + N, 1 + N), after the softmax.
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass(eq=False)
class MaskedLMOutput(ModelOutput):
    """Output of `BeitForMaskedImageModeling`.

    Attributes:
        loss: the mean cross-entropy over the masked patches; None without labels.
        logits: (B, N, V), or (M, V) with `masked_only=True`.
        hidden_states, attentions: see `BeitModelOutputWithPooling`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass(eq=False)
class ImageClassifierOutput(MaskedLMOutput):
    """Output of `BeitForImageClassification`: loss (None without labels), logits (B, K), hidden_states, attentions."""


@dataclass(eq=False)
class SemanticSegmenterOutput(MaskedLMOutput):
    """Output of `BeitForSemanticSegmentation`: loss, logits (B, K, 4h, 4w) over h x w patches, and as above."""


# FSDP2's hooks and torch.export find tensors only in types that torch knows.
for _output in (BeitModelOutputWithPooling, MaskedLMOutput, ImageClassifierOutput, SemanticSegmenterOutput):
    register_dataclass(_output)
