"""The options of an image processor: defaults, checks, and their form in preprocessor_config.json."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from PIL import Image
from pydantic import ValidationError

from beit_pretrain.models.checkpoints import hf_processor
from beit_pretrain.models.checkpoints.hf_processor import number, sizes, words
from beit_pretrain.transforms.jitter import HALF
from beit_pretrain.transforms.processor_view import ProcessorView

DEFAULTS: dict[str, Any] = {
    **hf_processor.DEFAULTS,
    "image_mean": list(HALF),
    "image_std": list(HALF),
    "do_reduce_labels": False,
    "do_convert_rgb": None,
}
SIZES = 'a number of pixels, (height, width), {"height": h, "width": w} or {"shortest_edge": n}'


@dataclass(frozen=True)
class Options:
    """Checked options of one call.

    Attributes:
        view: resize and crop.
        channels: number of them that images are converted to.
        convert: `do_convert_rgb`.
        factor: for `do_rescale`; None = values stay as they are.
        mean, std: for `do_normalize`, one value a channel, or one for all; None = no normalisation.
        reduce_labels: whether ids of label maps are reduced by 1.
    """

    view: ProcessorView
    channels: int
    convert: bool | None
    factor: float | None
    mean: list[float] | float | None
    std: list[float] | float | None
    reduce_labels: bool

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> Options:
        """From options in the form of `checked`. Raises ValueError."""
        crop = sizes(said["crop_size"]) if said["do_center_crop"] else None
        if isinstance(crop, int):
            raise ValueError(f"crop_size must be a height and a width, got {said['crop_size']}")
        resize = sizes(said["size"]) if said["do_resize"] else None
        mean, std, normalize = said["image_mean"], said["image_std"], said["do_normalize"]
        return cls(
            view=ProcessorView(resize=resize, crop=crop, resample=said["resample"]),
            channels=len(mean) if isinstance(mean, list) else 3,
            convert=said["do_convert_rgb"],
            factor=said["rescale_factor"] if said["do_rescale"] else None,
            mean=mean if normalize else None,
            std=std if normalize else None,
            reduce_labels=said["do_reduce_labels"],
        )


def checked(given: Mapping[str, Any], default_to_square: bool = True) -> dict[str, Any]:
    """Options of DEFAULTS as a file has them; None is the default.

    Args:
        default_to_square: a size that is one number is a square; else it is the length of the shorter side.

    Raises TypeError for a value of a wrong kind, ValueError for one that cannot be.
    """
    found = {}
    for name, value in given.items():
        value = DEFAULTS[name] if value is None else value
        value = value.tolist() if hasattr(value, "tolist") else value  # NumPy and torch, of any number of dimensions
        if name.startswith("do_"):
            if not isinstance(value, bool) and not (name == "do_convert_rgb" and value is None):
                raise TypeError(f"{name} must be True or False, got {value!r}")
        elif name in ("size", "crop_size"):
            if name == "size" and not default_to_square and number(value):
                value = {"shortest_edge": value}
            value = checked_size(name, value)
        elif name == "resample":
            value = checked_resample(value)
        elif name == "rescale_factor":
            value = checked_number(name, value)
        else:
            value = checked_levels(name, value)
        found[name] = value
    return found


def refuse_misspelt(names: Iterable[str]) -> None:
    """Raise TypeError for further entries that differ from an option by a letter or so; others have other names."""
    for name in names:
        # above do_reduce_zero_label, an option of other processors; "size" is too short for that
        cutoff = 0.85 if len(name) > 5 else 0.75
        if close := difflib.get_close_matches(name, DEFAULTS, 1, cutoff):
            raise TypeError(f"{name}: no option of BeitImageProcessor; did you mean {close[0]}?")


def checked_size(name: str, value: Any) -> dict[str, int]:
    """A size as files have it."""
    if not isinstance(value, int | list | tuple | Mapping) or isinstance(value, bool):
        raise TypeError(f"{name} must be {SIZES}, got {value!r}")
    try:
        read = sizes(dict(value) if isinstance(value, Mapping) else value)
        ProcessorView(resize=read)
    except (LookupError, ValueError, TypeError):  # a ValidationError is a ValueError
        raise ValueError(f"{name} must be {SIZES}, from 1 to 65535 pixels; got {value!r}") from None
    return words(read)


def checked_resample(value: Any) -> int:
    """The number of a filter, of Pillow's or torchvision's."""
    if isinstance(value, Enum):
        name = value.name.removesuffix("_EXACT")  # torchvision's name of the pixel that Pillow takes
        value = Image.Resampling[name] if name in Image.Resampling.__members__ else value
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"resample must be a PIL.Image.Resampling or its number, got {value!r}")
    try:
        return ProcessorView(resample=int(value)).resample
    except ValidationError:
        raise ValueError(f"resample must be a filter from 0 to 5 (PIL.Image.Resampling), got {value!r}") from None


def checked_number(name: str, value: Any) -> float:
    if not number(value):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value!r}")
    return value


def checked_levels(name: str, value: Any) -> list[float] | float:
    """A mean or a standard deviation: a number for each channel, or one for all."""
    if number(value):
        found = [checked_number(name, value)]
    elif isinstance(value, list | tuple) and value:
        found = [checked_number(f"each value of {name}", each) for each in value]
    else:
        raise TypeError(f"{name} must be a number or a list of them, one a channel; got {value!r}")
    if name == "image_std" and 0 in found:
        raise ValueError(f"image_std must not be 0, got {value!r}")
    return found if isinstance(value, list | tuple) else found[0]
