"""What the Flax networks return: dataclasses that are pytrees, and that unpack and index like tuples.

Shapes: B batch, N patches, D width, H heads, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import jax
from jax import Array


class TupleOutput:
    """The fields that are there, in order, as a tuple's elements; `output["logits"]` too."""

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in self.keys())

    def keys(self) -> list[str]:
        """The names of the fields that are there."""
        names = [field.name for field in fields(self)]  # type: ignore[arg-type]
        return [name for name in names if getattr(self, name) is not None]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.to_tuple())

    def __len__(self) -> int:
        return len(self.keys())

    def __getitem__(self, key: int | slice | str) -> Any:
        return (
            dict(zip(self.keys(), self.to_tuple(), strict=True))[key] if isinstance(key, str) else self.to_tuple()[key]
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FlaxBeitModelOutputWithPooling(TupleOutput):
    """Of `FlaxBeitModel`."""

    last_hidden_state: Array  # (B, 1 + N, D), [CLS] first
    pooler_output: Array  # (B, D)
    hidden_states: tuple[Array, ...] | None = None  # (B, 1 + N, D) of the embeddings and of every block
    attentions: tuple[Array, ...] | None = None  # (B, H, 1 + N, 1 + N) of every block, after the softmax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FlaxMaskedLMOutput(TupleOutput):
    """Of `FlaxBeitForMaskedImageModeling`; hidden states and attentions as in `FlaxBeitModelOutputWithPooling`."""

    logits: Array  # (B, N, V)
    hidden_states: tuple[Array, ...] | None = None
    attentions: tuple[Array, ...] | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FlaxSequenceClassifierOutput(TupleOutput):
    """Of `FlaxBeitForImageClassification`; hidden states and attentions as in `FlaxBeitModelOutputWithPooling`."""

    logits: Array  # (B, classes)
    hidden_states: tuple[Array, ...] | None = None
    attentions: tuple[Array, ...] | None = None
