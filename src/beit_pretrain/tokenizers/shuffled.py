"""A control: a tokenizer that answers with the tokens of another image, so that nothing can be learned of an image.

What is left to learn are the frequencies of tokens at each place. Pre-training that helps with these targets too helps
for another reason than the method's.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from beit_pretrain.errors import UserError
from beit_pretrain.tokenizers.dvae import DVAETokenizer


class ShuffledTokenizer(DVAETokenizer):
    """A `DVAETokenizer` that gives every image the tokens of the next one in its batch.

    Args:
        path: `.ckpt` of a run of `fit +experiment=tokenizer`.
    """

    def __init__(self, path: str | Path):
        super().__init__(path)

    def digest(self) -> str:
        return f"shuffled-{super().digest()}"

    @torch.no_grad()
    def encode(self, image_BCHW: Tensor) -> Tensor:
        """Raises UserError for a batch of one image: there is no other."""
        if len(image_BCHW) < 2:
            raise UserError("tokenizer=shuffled needs batches of at least 2 images")
        return super().encode(image_BCHW).roll(1, 0)
