"""The loss of masked image modelling in JAX, at the masked patches alone (BEiT, equation 1).

Shapes: B batch, N patches, V vocabulary, K masked positions of one image, padded.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

PADDING = -1


def masked_positions(mask_BN: ArrayLike, most: int) -> np.ndarray:
    """Positions (B, most) of the masked patches, ascending, padded with -1: the data modules' `mask_index`.

    On the host, before a jitted step, which needs static shapes. Raises ValueError if a mask has more than `most`, or
    another shape.
    """
    mask_BN = np.asarray(mask_BN).astype(bool)
    if mask_BN.ndim != 2:
        raise ValueError(f"a mask must be (images, patches), got {mask_BN.shape}")
    count_B1 = mask_BN.sum(1, keepdims=True)
    if count_B1.max(initial=0) > most:
        raise ValueError(f"a mask has {count_B1.max()} masked patches, more than {most}")
    first_BK = np.argsort(~mask_BN, axis=1, kind="stable")[:, :most]
    found_BK = np.where(np.arange(first_BK.shape[1]) < count_B1, first_BK, PADDING)
    return np.pad(found_BK, ((0, 0), (0, most - found_BK.shape[1])), constant_values=PADDING)


def masked_token_loss(logits_BKV: Array, labels_BN: ArrayLike, positions_BK: ArrayLike) -> Array:
    """Mean cross-entropy over the masked patches, from `FlaxBeitForMaskedImageModeling.logits_at`.

    `labels_BN`: the visual tokens of all patches. Padded positions and negative tokens, such as -100, do not count; a
    token of V or more makes it NaN.
    """
    positions_BK = jnp.asarray(positions_BK)
    target_BK = jnp.take_along_axis(jnp.asarray(labels_BN), jnp.maximum(positions_BK, 0), axis=1)
    kept_BK = (positions_BK >= 0) & (target_BK >= 0)
    found_BKV = jax.nn.log_softmax(logits_BKV.astype(jnp.float32))
    found_BK = jnp.take_along_axis(found_BKV, jnp.maximum(target_BK, 0)[..., None], axis=2)[..., 0]
    return -jnp.sum(found_BK, where=kept_BK) / jnp.maximum(kept_BK.sum(), 1)
