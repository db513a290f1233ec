"""A network without its head as a function from views of images to vectors.

Shapes: B batch, C channels, H W pixels, N patches, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from beit_pretrain.errors import UserError
from beit_pretrain.inference.predictor import ImageNetwork, evaluation_view
from beit_pretrain.models.backbone import FeatureExtractor, embed
from beit_pretrain.models.blocks import block_outputs
from beit_pretrain.models.checkpoints.formats import Checkpoint
from beit_pretrain.models.checkpoints.pretrained import features

What = Literal["cls", "mean", "patches"]


class Embedder(ImageNetwork):
    """The backbone of any checkpoint; its only view of an image is the evaluation view, as `predict` has it.

    Args:
        source: the checkpoint.
        image_size: side of the view, pixels; None = the checkpoint's.

    Raises UserError for images that are not square or do not divide into patches.
    """

    model: FeatureExtractor

    def __init__(self, source: Checkpoint, image_size: int | None = None):
        super().__init__(features(source, image_size))
        self.depth = len(self.model.blocks)
        self.apply = evaluation_view(self.model, source.path)

    def layer(self, chosen: int | str, name: str = "layer") -> int:
        """The number of a layer, from 1; `chosen` may count from the end, -1 or "last" is the last.

        Raises UserError for a layer that the network does not have; `name` is the setting.
        """
        number = self.depth if chosen == "last" else int(chosen)
        number = self.depth + 1 + number if number < 0 else number
        if not 1 <= number <= self.depth:
            raise UserError(
                f"{name}={chosen}: the network has layers 1 to {self.depth} (from the end -1 to -{self.depth})"
            )
        return number

    @torch.no_grad()
    def states(self, image_BCHW: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """Raw outputs (B, 1 + N, D) of the given blocks, from 1, for views (uint8); blocks behind them do not run."""
        first = embed(self.model, self.normalised(image_BCHW))
        outputs = block_outputs(self.model, first, blocks=max(layers))
        return [outputs[layer - 1] for layer in layers]

    @torch.no_grad()
    def vectors(self, image_BCHW: Tensor, what: What, layer: int, normalise: bool = False) -> Tensor:
        """Vectors of views (uint8): (B, D), of `patches` (B, N, D) row-major over the grid; float32, on the CPU.

        `layer` counts from 1. Without `normalise` they equal what `load_pretrained(head="features")` returns.
        """
        (state_BND,) = self.states(image_BCHW, [layer])
        found = state_BND[:, 0] if what == "cls" else state_BND[:, 1:]
        found = found.mean(1) if what == "mean" else found
        found = F.normalize(found, dim=-1) if normalise else found
        return found.float().cpu()
