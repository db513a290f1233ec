"""What a Hugging Face image processor does to an image, both ways, from and to preprocessor_config.json."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from beit_pretrain.errors import UserError
from beit_pretrain.transforms.jitter import HALF, per_channel
from beit_pretrain.transforms.processor_view import ProcessorView
from beit_pretrain.transforms.views import shorter_side

FILE = "preprocessor_config.json"
BICUBIC = 3
# Of BeitImageProcessor, for what a file leaves out.
DEFAULTS: dict[str, Any] = {
    "do_resize": True,
    "size": {"height": 224, "width": 224},
    "resample": BICUBIC,
    "do_center_crop": False,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": None,  # .5 of every channel
    "image_std": None,
}
# What a file says of every processor that we write.
WRITTEN = {**DEFAULTS, "do_reduce_labels": False, "image_processor_type": "BeitImageProcessor"}
KINDS = ("BeitImageProcessor", "BeitImageProcessorFast", "BeitImageProcessorPil", "BeitFeatureExtractor")


def preprocessing(processor: dict[str, Any], channels: int, folder: Path) -> dict[str, Any]:
    """Normalisation and view of a processor as metadata: mean, std, `view`, and crop_ratio if a ratio gives it.

    `view_differs`: in words, what we cannot do as the processor does. Raises UserError for values that it cannot have.
    """
    if not processor:
        return {"view_differs": [f"{folder} has no {FILE}: the preparation of its images is a guess"]}
    said = {name: default if processor.get(name) is None else processor[name] for name, default in DEFAULTS.items()}
    differs = []
    kind = processor.get("image_processor_type", processor.get("feature_extractor_type"))
    if kind not in (None, *KINDS):
        differs.append(f"{folder / FILE} is of a {str(kind)[:80]}; it is read as a BeitImageProcessor's")
    found = normalisation(said, channels, folder)
    try:
        resize = sizes(said["size"]) if said["do_resize"] else None
        crop = sizes(said["crop_size"]) if said["do_center_crop"] else None
        if isinstance(crop, int):
            raise TypeError
        view = ProcessorView(resize=resize, crop=crop, resample=said["resample"])
    except (TypeError, LookupError, ValueError, ValidationError):
        differs.append(
            f"size, crop_size or resample of {folder / FILE} are not understood: images are resized and cropped our way"
        )
        return {**found, "view_differs": differs}
    found["view"] = view.model_dump()
    if ratio := crop_ratio(view):
        found["crop_ratio"] = ratio
    return {**found, **({"view_differs": differs} if differs else {})}


def sizes(size: Any) -> list[int] | int:
    """(height, width), or the length of the shorter side. A number alone is a square, as BEiT's processors read it."""
    if isinstance(size, dict):
        if size.get("longest_edge") or size.get("max_height"):
            raise ValueError("a limit of the longer side")
        return size["shortest_edge"] if size.get("shortest_edge") else [size["height"], size["width"]]
    if isinstance(size, list | tuple):
        height, width = size
        return [height, width]
    return [size, size]


def crop_ratio(view: ProcessorView) -> float | None:
    """The ratio with which our evaluation view is this one up to rounding; None if there is none."""
    if not isinstance(view.resize, int) or view.crop is None or view.resample != BICUBIC:
        return None
    side = view.crop[0]
    ratio = side / view.resize
    return ratio if view.crop == [side, side] and ratio <= 1 and math.floor(side / ratio) == view.resize else None


def normalisation(said: dict[str, Any], channels: int, folder: Path) -> dict[str, Any]:
    """`mean` and `std` of images in [0, 1]: the processor's factor, if it is not 1/255, goes into both."""
    factor = said["rescale_factor"] if said["do_rescale"] else 1
    if not number(factor) or not 0 < factor < 1e6:
        raise UserError(f"{folder / FILE}: rescale_factor must be a number above 0, got {factor!r}")
    factor *= 255
    found: dict[str, Any] = {}
    for ours, theirs, idle in (("mean", "image_mean", 0.0), ("std", "image_std", 1.0)):
        values = said[theirs] if said["do_normalize"] else [idle] * channels
        values = values or [0.5] * channels
        if abs(factor - 1) > 1e-6 and isinstance(values, list) and all(map(number, values)):
            values = [value / factor for value in values]
        found[ours] = values
    return found


def number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def settings_of(view: dict[str, Any], side: int) -> dict[str, Any]:
    """A view in the words of a processor, for a network of images of `side` pixels."""
    scaled = ProcessorView.model_validate(view).scaled(side)
    return {
        "do_resize": scaled.resize is not None,
        "size": words([side, side] if scaled.resize is None else scaled.resize),
        "do_center_crop": scaled.crop is not None,
        "crop_size": words(scaled.crop or [side, side]),
        "resample": scaled.resample,
    }


def words(size: list[int] | int) -> dict[str, int]:
    """`sizes` the other way: as a processor's file has it."""
    return {"shortest_edge": size} if isinstance(size, int) else {"height": size[0], "width": size[1]}


def evaluation_settings(
    about: dict[str, Any], size: int | Sequence[int], channels: int, segments: bool
) -> dict[str, Any]:
    """The evaluation view of a network of ours in the words of a processor.

    Args:
        about: the checkpoint's metadata.
        size: of the network's images, pixels: their side, or height and width.
        segments: whether it is a segmenter, for which the whole image is resized if `about` has no view. So it is
            for images that are not square.
    """
    height, width = (size, size) if isinstance(size, int) else size
    half = per_channel(HALF, channels, "mean")
    levels: dict[str, Any] = {"image_mean": list(about.get("mean", half)), "image_std": list(about.get("std", half))}
    sides, view = words([height, width]), about.get("view")
    if segments or "reduce_labels" in about:
        levels["do_reduce_labels"] = bool(about.get("reduce_labels", True))
    if view and height == width:
        return {**levels, **settings_of(view, height)}
    if segments or height != width:
        resample = view["resample"] if view else BICUBIC
        return {**levels, "size": sides, "resample": resample, "do_center_crop": False}
    shorter = shorter_side(height, about.get("crop_ratio"))
    return {**levels, "size": words(shorter), "crop_size": sides, "do_center_crop": True}
