"""BEiT's networks in Flax under the names they had in transformers 4: model, masked image modelling, classification.

All take `pixel_values` (B, C, H, W), channels first, normalised, and can be jitted and differentiated (`nnx.jit`,
`nnx.value_and_grad`, also `jax.jit` with the network as an argument).
Shapes: B batch, C channels, H W pixels, N patches, D width, V vocabulary, K masked positions of one image, padded.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from beit_pretrain.errors import UserError
from beit_pretrain.flax.backbone import CUT_NORMAL, NORMAL, Backbone, times
from beit_pretrain.flax.outputs import (
    FlaxBeitModelOutputWithPooling,
    FlaxMaskedLMOutput,
    FlaxSequenceClassifierOutput,
)
from beit_pretrain.flax.pretrained import filled, read_source, to_network
from beit_pretrain.models.checkpoints.hf_config import HFConfig
from beit_pretrain.models.checkpoints.hf_writer import save_folder


class FlaxBeit(Backbone):
    """What the three networks share: calling, reading and writing."""

    output: type[Any]

    def __call__(
        self,
        pixel_values: ArrayLike,
        bool_masked_pos: ArrayLike | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        return_dict: bool = True,
        train: bool | None = None,
        dropout_rng: Array | None = None,
    ) -> Any:
        """The network's `output`, one of the dataclasses in outputs.py; with `return_dict=False` a tuple.

        Args:
            pixel_values: images (B, C, H, W).
            bool_masked_pos: (B, N), True or 1 = masked; for networks with a mask token.
            output_attentions, output_hidden_states: whether to return them.
            train: whether drop path is on; None = as `model.train()` or `model.eval()` has set it.
            dropout_rng: a key of jax.random for drop path; None = from the network's `rngs`.
        """
        states, found = self.hidden_states(
            pixel_values, bool_masked_pos, attentions=output_attentions, train=train, dropout_rng=dropout_rng
        )
        output = self.output(*self.readout(states[-1]), tuple(states) if output_hidden_states else None, found)
        return output if return_dict else output.to_tuple()

    def readout(self, last_BTD: Array) -> tuple[Array, ...]:
        """The first fields of `output`, from the last block's raw output."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        revision: str | None = None,
        image_size: int | Sequence[int] | None = None,
        num_labels: int | None = None,
        *,
        dtype: DTypeLike = jnp.float32,
        drop_path_rate: float = 0.0,
        rngs: nnx.Rngs | None = None,
    ) -> Self:
        """The network of any BEiT checkpoint.

        Args:
            path: what `load_pretrained` reads: the authors' `.pth`, a timm `beit*` file, a Hugging Face BEiT folder, a
                `.ckpt` of `fit`, what `export` wrote; or an id on the Hugging Face Hub.
            revision: branch, tag or commit on the Hub.
            image_size: side, or (height, width), in pixels; if not the file's, position tables are resized.
            num_labels: classes of a new head, where the file has none or another number; of a classifier alone.
            dtype: of products; parameters are float32.
            drop_path_rate: stochastic depth of the last block, in training.
            rngs: random numbers of a new head and of drop path; None: a new head is always the same, and drop path
                needs `dropout_rng` at every call.

        Raises UserError, in one line, for what cannot be read or does not fit; nothing in a file is executed.
        """
        if num_labels is not None and cls.kind != "classifier":
            raise UserError(f"num_labels={num_labels} is for FlaxBeitForImageClassification, not for {cls.__name__}")
        if num_labels is not None and (type(num_labels) is not int or num_labels < 1):
            raise UserError(f"num_labels={num_labels!r} must be a whole number of at least 1")
        source = read_source(cls.kind, path, revision, image_size, num_labels, drop_path_rate, rngs)
        model = filled(lambda: cls(**source.config, dtype=dtype, rngs=nnx.Rngs(0)), source)
        model.rngs = nnx.data(None)
        model.draw_from(rngs)
        model.about, model._said = source.about, json.dumps(source.said)
        return model

    def to_torch(self) -> Any:
        """The same network in torch, in eval mode: a `MaskedImageModel`, a `Classifier` or a `Backbone`."""
        return to_network(self)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder of Hugging Face's layout: transformers, `load_pretrained`, `Predictor` and this class read it.

        Other files in the folder stay. A network for images that are not square is for us alone: transformers reads
        position tables with height and width swapped. Raises UserError if it cannot be written.
        """
        network = self.to_torch()
        save_folder(network, folder, HFConfig.of_network(network, **json.loads(self._said)))


class FlaxBeitModel(FlaxBeit):
    """The backbone without a head.

    Args:
        pool: "avg": `last_hidden_state` is the last block's raw output, `pooler_output` a LayerNorm of its patches'
            mean; "token": `last_hidden_state` follows the final LayerNorm, `pooler_output` is its [CLS].
        use_mask_token: whether calls may have `bool_masked_pos`.

    Of other arguments see `Backbone`. `from_pretrained` of a network for masked image modelling, which has no pooling,
    gives "avg" with a new LayerNorm, as in transformers.
    """

    output = FlaxBeitModelOutputWithPooling

    def __init__(
        self,
        pool: str = "avg",
        use_mask_token: bool = False,
        *,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
        **architecture: Any,
    ):
        super().__init__(pool, use_mask_token, False, dtype=dtype, rngs=rngs, **architecture)
        self.add_config(pool=pool, use_mask_token=use_mask_token)

    def readout(self, last_BTD: Array) -> tuple[Array, ...]:
        return pooling(self, last_BTD)


def pooling(model: Backbone, last_BTD: Array) -> tuple[Array, Array]:
    """(all tokens (B, T, D), one vector (B, D) for each image), after the network's LayerNorm."""
    if model.fc_norm is not None:
        return last_BTD, model.fc_norm(last_BTD[:, 1:].mean(1))
    assert model.norm is not None
    normed = model.norm(last_BTD)
    return normed, normed[:, 0]


class FlaxBeitForMaskedImageModeling(FlaxBeit):
    """The backbone with a token head: predicts the visual token of every patch; `vocab_size` is V.

    Calls return logits (B, N, V), float32, of all patches; `logits_at` those of the masked ones alone.
    """

    kind, output = "mim", FlaxMaskedLMOutput

    def __init__(self, vocab_size: int = 8192, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs, **architecture: Any):
        super().__init__("token", True, False, dtype=dtype, rngs=rngs, **architecture)
        self.add_config(vocab_size=vocab_size)
        self.lm_head = head(self, vocab_size, CUT_NORMAL, rngs)

    def readout(self, last_BTD: Array) -> tuple[Array, ...]:
        return (self.lm_head(pooling(self, last_BTD)[0][:, 1:]),)

    def logits_at(
        self,
        pixel_values: ArrayLike,
        bool_masked_pos: ArrayLike,
        positions_BK: ArrayLike,
        train: bool | None = None,
        dropout_rng: Array | None = None,
    ) -> Array:
        """Logits (B, K, V), float32, at the given patches alone (`masked_positions`): much less computing for training.

        Those of padded positions, -1, are of no use; `masked_token_loss` leaves them out.
        """
        position_BK = jnp.maximum(jnp.asarray(positions_BK), 0)
        states, _ = self.hidden_states(pixel_values, bool_masked_pos, position_BK, False, train, dropout_rng)
        return self.lm_head(pooling(self, states[-1])[0])


class FlaxBeitForImageClassification(FlaxBeit):
    """The backbone with a classification head, by default with a bias table for every block.

    Args:
        num_classes: number of classes.
        pool: "avg", the mean of the patch tokens -> a LayerNorm -> linear head; "token", the final LayerNorm -> [CLS]
            -> linear head.

    Calls return logits (B, classes), float32.
    """

    kind, output = "classifier", FlaxSequenceClassifierOutput

    def __init__(
        self,
        num_classes: int,
        pool: str = "avg",
        *,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
        **architecture: Any,
    ):
        architecture.setdefault("rel_pos_bias", "per_layer")
        super().__init__(pool, False, True, dtype=dtype, rngs=rngs, **architecture)
        self.add_config(num_classes=num_classes, pool=pool)
        self.head = head(self, num_classes, times(NORMAL, 0.001), rngs)

    @property
    def num_labels(self) -> int:
        return self.config["num_classes"]

    def readout(self, last_BTD: Array) -> tuple[Array, ...]:
        return (self.head(pooling(self, last_BTD)[1]),)


def head(model: Backbone, outputs: int, init: Any, rngs: nnx.Rngs) -> nnx.Linear:
    """A linear layer with outputs in float32 also where products are bfloat16. Raises UserError for a size of 0."""
    if outputs < 1:
        raise UserError(f"a head of {outputs} outputs: at least 1 is needed")
    width, wide = model.config["embed_dim"], jnp.float32
    return nnx.Linear(width, outputs, kernel_init=init, dtype=model.dtype, preferred_element_type=wide, rngs=rngs)
