"""What the Flax networks return: dataclasses that are pytrees, and that unpack and index like tuples.

Shapes: B batch, N patches, D width, H heads, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
from jax import Array

from beit_pretrain.library.outputs import ModelOutput


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FlaxBeitModelOutputWithPooling(ModelOutput):
    """Of `FlaxBeitModel`."""

    last_hidden_state: Array  # (B, 1 + N, D), [CLS] first
    pooler_output: Array  # (B, D)
    hidden_states: tuple[Array, ...] | None = None  # (B, 1 + N, D) of the embeddings and of every block
    attentions: tuple[Array, ...] | None = None  # (B, H, 1 + N, 1 + N) of every block, after the softmax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FlaxMaskedLMOutput(ModelOutput):
    """Of `FlaxBeitForMaskedImageModeling`; hidden states and attentions as in `FlaxBeitModelOutputWithPooling`."""

    logits: Array  # (B, N, V)
    hidden_states: tuple[Array, ...] | None = None
    attentions: tuple[Array, ...] | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FlaxSequenceClassifierOutput(ModelOutput):
    """Of `FlaxBeitForImageClassification`; hidden states and attentions as in `FlaxBeitModelOutputWithPooling`."""

    logits: Array  # (B, classes)
    hidden_states: tuple[Array, ...] | None = None
    attentions: tuple[Array, ...] | None = None
