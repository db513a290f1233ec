"""Segments whole images with sliding windows at several scales, optionally averaged with mirrored images.

Follows the test procedure of the release.

Shapes: B batch, C channels, H W pixels, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from beit_pretrain.inference.settings import SlidingWindow
from beit_pretrain.models.upernet import Segmenter

WINDOWS = 8  # windows that go through the network at once
AT_ONCE = 2**28  # elements of an upsampled map: 1 GB in float32


def upsampled(logits_BKhw: Tensor, size: Sequence[int]) -> Tensor:
    """Logits (B, K, H, W) at another size, float32."""
    return F.interpolate(logits_BKhw.float(), tuple(size), mode="bilinear", align_corners=False)


@torch.no_grad()
def segmented(
    model: Segmenter, images: Sequence[Sequence[Tensor]], sizes: Sequence[Sequence[int]], windows: SlidingWindow
) -> list[Tensor]:
    """Classes (H, W) at its size of every image, each given at several scales, (1, C, h, w) normalised.

    Probabilities of all scales and of the mirrored images are averaged at the final size.
    """
    scales = len(images[0])
    views = [(scale, False) for scale in range(scales)] + [(scale, True) for scale in range(scales) if windows.flip]
    found: list[list[Tensor]] = [[] for _ in images]  # logits of each image in each view
    for scale, mirrored in views:
        seen = [some[scale].flip(-1) if mirrored else some[scale] for some in images]
        for own, logits in zip(found, slide(model, seen, windows.stride), strict=True):
            own.append(logits.flip(-1) if mirrored else logits)
    return [best_classes(own, size) for own, size in zip(found, sizes, strict=True)]


def best_classes(views: Sequence[Tensor], size: Sequence[int], limit: int = AT_ONCE) -> Tensor:
    """Classes (H, W) at `size` from logits (1, K, h, w) of several views of one image; averages probabilities.

    At most `limit` elements are upsampled at a time: all 150 classes of a photo of 50 megapixels would take 30 GB.
    """
    classes, pixels = views[0].shape[1], size[0] * size[1]
    some = max(1, min(classes, limit // pixels))
    parts = [slice(first, first + some) for first in range(0, classes, some)]
    norms: list[Tensor] = []  # log of the softmax's denominator at every pixel
    for view in views if len(views) > 1 else ():
        sums = [upsampled(view[:, part], size).logsumexp(1) for part in parts]
        norms.append(sums[0] if len(sums) == 1 else torch.stack(sums).logsumexp(0))
    best = index = None
    for part in parts:
        shares = [upsampled(view[:, part], size) for view in views]
        if norms:
            shares = [(share - norm.unsqueeze(1)).exp() for share, norm in zip(shares, norms, strict=True)]
        values, places = sum(shares[1:], shares[0])[0].max(0)
        if best is None or index is None:
            best, index = values, places
        else:
            index = torch.where(values > best, places + part.start, index)
            best = torch.maximum(values, best)
    assert index is not None
    return index


def label_maps(logits_BKhw: Tensor, sizes: Sequence[Sequence[int]] | None = None) -> list[Tensor]:
    """Classes (H, W) int64 from a segmenter's logits, at the original images' sizes, (height, width) each.

    Like transformers' `post_process_semantic_segmentation`, resizes the logits before the argmax. `sizes` None = no
    resizing. Raises ValueError if the number of sizes differs from the number of images.
    """
    if sizes is None:
        return list(logits_BKhw.argmax(1))
    if len(sizes) != len(logits_BKhw):
        raise ValueError(f"{len(sizes)} sizes for {len(logits_BKhw)} images")
    return [upsampled(logits[None], size)[0].argmax(0) for logits, size in zip(logits_BKhw, sizes, strict=True)]


def slide(model: Segmenter, images: Sequence[Tensor], stride: float = 2 / 3) -> list[Tensor]:
    """Logits (1, K, H, W) of images (1, C, H, W) of any size: at each pixel the mean over the windows that contain it.

    Windows have the network's input size, and the step is `stride` times that; windows of several images share batches.
    The last windows end at the edges. A smaller image is padded with the mean colour, which is 0 after normalisation.
    """
    sides = [side * model.config["patch_size"] for side in model.grid]
    padded = [F.pad(x, (0, max(0, sides[1] - x.shape[-1]), 0, max(0, sides[0] - x.shape[-2]))) for x in images]
    places = [
        (i, top, left)
        for i, image in enumerate(padded)
        for top in starts(image.shape[-2], sides[0], stride)
        for left in starts(image.shape[-1], sides[1], stride)
    ]
    totals = [x.new_zeros(1, model.num_classes, *x.shape[-2:], dtype=torch.float32) for x in padded]
    seen = [x.new_zeros(1, 1, *x.shape[-2:], dtype=torch.float32) for x in padded]
    for first in range(0, len(places), WINDOWS):
        some = places[first : first + WINDOWS]
        crops = torch.cat([padded[i][..., top : top + sides[0], left : left + sides[1]] for i, top, left in some])
        logits = upsampled(model(crops).main, sides)
        for (i, top, left), one in zip(some, logits, strict=True):
            totals[i][0, :, top : top + sides[0], left : left + sides[1]] += one
            seen[i][..., top : top + sides[0], left : left + sides[1]] += 1
    return [
        (total / count)[..., : image.shape[-2], : image.shape[-1]]
        for total, count, image in zip(totals, seen, images, strict=True)
    ]


def starts(length: int, side: int, stride: float) -> list[int]:
    """Starts of windows of size `side` along `length` >= side, `stride` x side apart; the last ends at the edge."""
    step = max(1, int(side * stride))
    count = -(-(length - side) // step) + 1
    return [min(i * step, length - side) for i in range(count)]
