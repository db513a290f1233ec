"""Control experiment: a tokenizer that returns the tokens of another image, unrelated to the image.

Only the token frequencies at each position can be learned. If pre-training on such targets helps too, the gain does not
come from the method.
"""

from __future__ import annotations

import torch
from torch import Tensor

from beit_pretrain.errors import UserError
from beit_pretrain.tokenizers.dvae import DVAETokenizer


class ShuffledTokenizer(DVAETokenizer):
    """A `DVAETokenizer` that gives every image the tokens of the next one in its batch."""

    def digest(self) -> str:
        return f"shuffled-{super().digest()}"

    @torch.no_grad()
    def encode(self, image_BCHW: Tensor) -> Tensor:
        """Raises UserError for a batch of one image."""
        if len(image_BCHW) < 2:
            raise UserError("tokenizer=shuffled needs batches of at least 2 images")
        return super().encode(image_BCHW).roll(1, 0)
