"""Blockwise masking (BEiT, section 2.3 and Algorithm 1, with the release's details).

Blocks of a uniform area and a log-uniform aspect ratio are laid on the patch grid until a cap is reached or no block
fits any more. The cap (75 of 14 x 14) is a cap and not a count: images end with between 64 and 75 masked patches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from typing import Self

import numpy as np
from pydantic import ConfigDict, model_validator

from beit_pretrain.errors import UserError
from beit_pretrain.settings import Count, Settings, ShareAboveZero, about


class MaskSettings(Settings):
    """Blockwise masking (BEiT, section 2.3)."""

    defaults = "tasks/pretrain.yaml:mask"

    max_patches: Count = about("cap on the masked patches of an image; not a count")
    min_block: Count = about("smallest block, in patches")
    min_aspect: ShareAboveZero = about("blocks have an aspect ratio between this and its inverse")


class BlockwiseMask(MaskSettings):
    """The masking distribution on a patch grid: `BlockwiseMask((14, 14), 75, 16)` in the paper.

    Raises ValueError if the cap or the smallest block do not fit the grid.
    """

    model_config = ConfigDict(frozen=True)
    positional = ("grid", "max_patches", "min_block")

    grid: tuple[int, int] = about("rows and columns of patches")
    attempts: int = 10  # draws of a block before the image is taken as full

    @model_validator(mode="after")
    def _fits_the_grid(self) -> Self:
        patches = self.grid[0] * self.grid[1]
        if self.max_patches >= patches:
            raise UserError(f"mask.max_patches must lie between 1 and {patches - 1}, got {self.max_patches}")
        if self.min_block > self.max_patches:
            raise UserError(f"mask.min_block must lie between 1 and max_patches, got {self.min_block}")
        return self

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """One mask, bool of shape `grid`, True = masked. At least one patch is masked, at most `max_patches`."""
        height, width = self.grid
        mask = 0  # a bit a patch, row after row: far faster to count and to fill than pieces of a small array
        count = 0
        numbers = _uniform(rng)
        while count < self.max_patches:
            block = self._block(mask, self.max_patches - count, numbers)
            if not block:
                break
            mask |= block
            count = mask.bit_count()
        if not mask:  # only possible on tiny grids; a sample without a target would be a wasted forward pass
            mask = 1 << (int(height * next(numbers)) * width + int(width * next(numbers)))
        bits = np.frombuffer(mask.to_bytes(-(-height * width // 8), "little"), np.uint8)
        return np.unpackbits(bits, count=height * width, bitorder="little").view(bool).reshape(height, width)

    def _block(self, mask: int, missing: int, numbers: Iterator[float]) -> int:
        """The bits of one more block that adds at most `missing` patches; 0 if none of the attempts fitted."""
        height, width = self.grid
        log_aspect = math.log(self.min_aspect)
        # The release draws uniform(min, missing) also when missing < min: the ends simply swap.
        low, high = (self.min_block, missing) if self.min_block < missing else (missing, self.min_block)
        for _ in range(self.attempts):
            area = low + (high - low) * next(numbers)
            aspect = math.exp(log_aspect - 2 * log_aspect * next(numbers))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if not (0 < h < height and 0 < w < width):  # strict: a block never spans the whole grid
                continue
            top, left = int((height - h + 1) * next(numbers)), int((width - w + 1) * next(numbers))
            block = (self._columns[h] * ((1 << w) - 1)) << (top * width + left)
            added = h * w - (mask & block).bit_count()
            if 0 < added <= missing:
                return block
        return 0

    @cached_property
    def _columns(self) -> list[int]:
        """The first column's bits of blocks of 0, 1, 2, ... rows."""
        height, width = self.grid
        return [sum(1 << (row * width) for row in range(h)) for h in range(height)]


def _uniform(rng: np.random.Generator) -> Iterator[float]:
    """Endless numbers in [0, 1), drawn in runs: one by one they would cost more than the rest of a mask."""
    while True:
        yield from rng.random(32).tolist()
