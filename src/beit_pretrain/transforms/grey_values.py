"""The numbers of a grey image: as its file has them, which of them stand for no data, and their map to 8 bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

NOTES = "beit_pretrain notes"  # key in an image's `info`
IGNORE = 255  # of a label map: pixels that do not count
HUGE = 1e30  # no quantity: -3.4e38, 9.97e36 and 1e31 are what programs write where there is none
# Values that programs write where there is no data, if they lie farther from all others than these spread.
FILLS = (-999, -9999, -99999, -999999, -32767, -32768, -(2**31), 1 - 2**31, 32767, 65535)
LEVELS = 16  # values that the others must have at least beside the largest, which may be white


class Notes(NamedTuple):
    """What an image's file says that Pillow's image does not tell; kept in its `info`."""

    exact: np.ndarray | None = None  # (H, W), numbers that no mode of Pillow can hold
    factor: float = 1.0  # a number of the file is Pillow's value times this, plus `offset`
    offset: float = 0.0
    white_is_zero: bool = False  # the numbers rise from white to black
    nodata: float | None = None
    alpha: Image.Image | None = None  # L, of a grey image of more than 8 bits
    bits: int = 8  # of a channel of colours
    page: int = 1  # of the file, from 1
    left_out: int = 0  # further bands in the file


def notes(image: Image.Image) -> Notes:
    """The notes made when an image was opened, or those that its decoder's settings allow while it is not decoded."""
    found = image.info.get(NOTES)
    return found if isinstance(found, Notes) else Notes()._replace(**_levels(image))


def note(image: Image.Image, **changes: Any) -> Image.Image:
    """Add to an image's notes; returns the image."""
    image.info[NOTES] = notes(image)._replace(**changes)
    return image


def _levels(image: Image.Image) -> dict[str, Any]:
    """Factor and offset from Pillow's values of a grey image, not yet decoded, to the numbers in its file.

    Pillow stretches fewer than 8 bits to 0 ... 255, more than 8 that are not 16 to 0 ... 65535.
    """
    tiles: Sequence[Any] = getattr(image, "tile", None) or ()
    if not tiles or image.mode not in ("L", "I", "I;16"):
        return {}
    codec, args = tiles[0][0], tiles[0][3]
    raw, *more = args if isinstance(args, tuple) else (args,)
    if codec in ("ppm", "ppm_plain"):
        return {"factor": more[-1] / (255 if image.mode == "L" else 65535)}
    if not isinstance(raw, str) or not raw.startswith("L"):
        return {}
    depth = int(raw[2]) if raw[2:3] in ("2", "4") else 8
    top = 2**depth - 1
    if raw.rstrip("R").endswith("I"):  # a TIFF whose white is zero, which Pillow has turned round
        return {"factor": -top / 255, "offset": top}
    return {"factor": top / 255}


def is_deep(image: Image.Image) -> bool:
    """Whether an image is grey with more than 8 bits a pixel (12 bits to 64, integer or float), or with a sign."""
    return image.mode == "F" or image.mode.startswith("I")


def numbers(image: Image.Image) -> np.ndarray:
    """(H, W): the numbers of a grey image as they stand in its file."""
    about = notes(image)
    image.load()
    if about.exact is not None:
        return about.exact
    values = np.asarray(image)
    if (about.factor, about.offset) == (1.0, 0.0):
        return values
    return np.rint(values * about.factor + about.offset).astype(np.int32)


def label_ids(label_map: Image.Image) -> np.ndarray:
    """(H, W) int32: the ids of a label map, IGNORE where its file says that there is no data.

    Raises ValueError for an image of another kind than one number per pixel.
    """
    if label_map.mode not in ("1", "L", "P", "I") and not label_map.mode.startswith("I;16"):
        raise ValueError(f"its label map is of mode {label_map.mode}, not one number per pixel")
    nodata, ids = notes(label_map).nodata, numbers(label_map).astype(np.int32)
    return ids if nodata is None else np.where(ids == nodata, IGNORE, ids)


def to_grey8(
    image: Image.Image, window: Sequence[float] | None = None, percentiles: Sequence[float] = (0.5, 99.5)
) -> tuple[Image.Image, tuple[float, float]]:
    """A grey image as 8 bits, by a linear map to 0 ... 255, and the values that became 0 and 255.

    These are those of `window`, or else these percentiles of the image's own values (the other way round where white is
    zero). Pillow would clip at 255 instead (and turn X-rays white). Infinities become the nearer end. What is no data
    becomes black and has no part in the percentiles: NaN, the value that the file declares, floats beyond HUGE. Nor has
    one of FILLS, if it lies farther from all other values than these spread. The result's info["nodata"] lists them.
    """
    about = notes(image)
    values = numbers(image) if is_deep(image) else np.asarray(image)
    wide = values.dtype.itemsize > 4 or (values.dtype.kind in "iu" and bool((np.abs(values) > 2**24).any()))
    values = values.astype(np.float64 if wide else np.float32)
    empty, missing = _without_data(values, about.nodata)
    # Of a large image every n-th value: percentiles hardly differ, and memory stays bounded.
    every = slice(None, None, 1 + values.size // 2**22)
    sample = values.reshape(-1)[every]
    sample = sample[np.isfinite(sample) & ~empty.reshape(-1)[every]].astype(np.float64)
    if window is not None:
        low, high = window
    else:
        sample, fills = _without_fills(sample)
        missing += fills
        low, high = (float(v) for v in np.percentile(sample, percentiles)) if sample.size else (0.0, 0.0)
        if low == high and sample.size:  # nearly all of one value: what differs must stay to be seen
            low, high = float(sample.min()), float(sample.max())
        if low == high and empty.any():
            low -= 1
    scaled = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
    scaled = (np.clip(scaled, low, high) - low) * scaled.dtype.type(255 / ((high - low) or 1))
    grey = np.rint(255 - scaled if about.white_is_zero else scaled).astype(np.uint8)
    grey[empty] = 0
    result = Image.fromarray(grey)
    if missing:
        result.info["nodata"] = missing
    return result, (high, low) if about.white_is_zero else (low, high)


def _without_data(values: np.ndarray, nodata: float | None) -> tuple[np.ndarray, list[float | str]]:
    """Where (H, W) there is no data, and the values that say so ("nan" for NaN)."""
    empty = np.isnan(values)
    missing: list[float | str] = ["nan"] if empty.any() else []
    if nodata is not None and not np.isnan(nodata):  # the file has it as a text, maybe shortened
        declared = np.abs(values - nodata) <= abs(nodata) * (1e-5 if abs(nodata) >= HUGE else 1e-6)
        missing += [nodata] if declared.any() else []
        empty |= declared
    huge = (np.abs(values) >= HUGE) & np.isfinite(values) & ~empty
    if huge.any():
        missing += sorted({float(values[huge].min()), float(values[huge].max())})
    return empty | huge, missing


def _without_fills(sample: np.ndarray) -> tuple[np.ndarray, list[float | str]]:
    """Finite values without those of FILLS that lie farther from the others than these spread, and which they are."""
    present = [fill for fill in FILLS if (sample == fill).any()]
    rest = sample[~np.isin(sample, present)] if present else sample
    if not present or rest.size == 0:
        return sample, []
    low, high = rest.min(), rest.max()
    levels = len(np.unique(rest[:: 1 + rest.size // 2**16]))
    far = [fill for fill in present if max(low - fill, fill - high) > high - low]
    fills = sorted(float(fill) for fill in far if levels >= (LEVELS if fill > 0 else 2))
    return sample[~np.isin(sample, fills)], [*fills]
