"""From an image file to a sample's arrays: views and mask from the random numbers of its position; batches of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from beit_pretrain.data.order import MASK, VIEW, generator
from beit_pretrain.transforms.image_io import open_image
from beit_pretrain.transforms.masking import BlockwiseMask
from beit_pretrain.transforms.views import TwoViewTransform

NEIGHBOURS = 16  # images that are tried before the run stops

# (image, opened but not decoded; its position's random generator; label map, if the data have any) -> a sample's arrays
Transform = Callable[..., dict[str, np.ndarray]]
# Makes a sample's arrays, with its augmentation drawn already; raises any exception on broken files.
PendingViews = Callable[[], dict[str, np.ndarray]]


class SampleViews:
    """What data sets share: `views` and `masking` of a sample, drawn from (`seed`, its number)."""

    views: Any  # a Transform
    masking: BlockwiseMask | None
    seed: int
    label_maps: bool

    def pending_views(self, number: int, data: bytes, label_map: Callable[[], bytes]) -> PendingViews:
        """Draw the augmentation of an image file, without decoding it. `label_map`: reads its label map."""
        rng = generator(self.seed, number, VIEW)
        if isinstance(self.views, TwoViewTransform):
            return self.views.prepare_view(data, rng)
        return lambda: self._opened_and_seen(data, rng, label_map)

    def _opened_and_seen(
        self, data: bytes, rng: np.random.Generator, label_map: Callable[[], bytes]
    ) -> dict[str, np.ndarray]:
        with open_image(data) as image:
            if not self.label_maps:
                return self.views(image, rng)
            with open_image(label_map()) as opened:
                return self.views(image, rng, opened)

    def mask(self, number: int) -> dict[str, np.ndarray]:
        """The arrays `mask` and `mask_index` of a sample; none without masking."""
        if self.masking is None:
            return {}
        mask = self.masking.draw(generator(self.seed, number, MASK)).reshape(-1)
        index = np.full(self.masking.max_patches, -1, np.int64)
        masked = np.flatnonzero(mask)
        index[: len(masked)] = masked
        return {"mask": mask, "mask_index": index}


def collated(samples: list[dict[str, np.ndarray]], bad: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch of samples; with the records of replaced images under `bad`, if there are any."""
    batch: dict[str, Any] = {key: stacked([s[key] for s in samples]) for key in samples[0]}
    return {**batch, "bad": bad} if bad else batch


def stacked(arrays: list[np.ndarray]) -> torch.Tensor | list[torch.Tensor]:
    """Stack arrays of one shape into a tensor; return arrays of several shapes (whole images) as a list.

    Images (C, H, W) stored channels last keep that layout (torch's `channels_last`).
    """
    if all(array.shape == arrays[0].shape for array in arrays):
        if all(array.ndim == 3 and array.strides[0] == array.itemsize < array.strides[2] for array in arrays):
            return torch.from_numpy(np.stack([array.transpose(1, 2, 0) for array in arrays])).permute(0, 3, 1, 2)
        return torch.from_numpy(np.stack(arrays))
    return [torch.from_numpy(array) for array in arrays]
