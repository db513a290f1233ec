"""BeitImageProcessor: from images, and label maps, to what a network takes, as Hugging Face's class of that name."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from beit_pretrain.errors import UserError, first_line
from beit_pretrain.fileio import atomic_write, expand_home
from beit_pretrain.library.batch_feature import BatchFeature
from beit_pretrain.library.image_inputs import FIRST, LAST, flat, image_values, label_maps
from beit_pretrain.library.pixel_values import labels, pixel_values
from beit_pretrain.library.processor_options import DEFAULTS, Options, checked, refuse_misspelt
from beit_pretrain.library.semantic_maps import semantic_maps
from beit_pretrain.models.checkpoints.formats import WEIGHTS, read_checkpoint
from beit_pretrain.models.checkpoints.hf import read_json
from beit_pretrain.models.checkpoints.hf_processor import FILE, evaluation_settings
from beit_pretrain.models.checkpoints.hub import local_copy

OLD_NAME = "reduce_labels"  # of do_reduce_labels, until 2022
PREPARATION = ("mean", "std", "view", "crop_ratio")  # what a checkpoint may say of its images
KINDS = ("image_processor_type", "feature_extractor_type", "processor_class")  # a file's, of no meaning here


class BeitImageProcessor:
    """Resizes, crops, rescales and normalises images, and resizes label maps with them.

    Images come out as transformers' PIL backend (`BeitImageProcessorPil`) makes them: resized by Pillow in 8 bits, as
    in transformers 4 when the models were published. The torchvision backend, the default of transformers 5, differs
    from both by some levels of 8 bits (docs/transformers.md). Different on purpose from transformers 5.23:

    * label maps are resized to the nearest pixel; there by the images' filter, which invents classes between others;
    * `do_reduce_labels` never touches images (#38042 of transformers, mended there), nor the caller's array, and the
      0 beyond the edges of a centre crop is reduced too; `reduce_labels`, its old name, is read, and there ignored;
    * grey and RGBA images are converted to the channels of `image_mean`; there they end in an error about shapes;
    * floats are rounded to 8 bits, not cut off, and those in [0, 1] are never taken for levels;
    * None is the default, in files too; `data_format` is heeded.

    Args (also of each call; None = the processor's own, or the default):
        do_resize, size, resample: resize to `size`: (height, width), {"height", "width"}, one number for a square, or
            {"shortest_edge": n}; with a filter of `PIL.Image.Resampling`. Default (224, 224), bicubic.
        do_center_crop, crop_size: then crop, with 0 where the image is smaller. Default no, (224, 224).
        do_rescale, rescale_factor: then multiply. Default yes, 1/255.
        do_normalize, image_mean, image_std: then subtract and divide, by channel. Default yes, 0.5 for all.
        do_reduce_labels: subtract 1 from the ids of label maps; 0 and 255 become 255, which is ignored. Default no.
        do_convert_rgb: None = to the channels of `image_mean`, without blending alpha; True = to RGB, alpha blended
            with white; False = channels as they are.
        extra: further entries of a file, of the constructor alone; they are kept and saved. Of these,
            default_to_square=False makes a `size` of one number the shortest edge. Names close to an option's are
            refused.

    Raises TypeError and ValueError for options that cannot be.

    Example:
        >>> from beit_pretrain import BeitImageProcessor
        >>> processor = BeitImageProcessor(size=224, do_reduce_labels=True)
        >>> inputs = processor(photo, segmentation_maps=label_map, return_tensors="pt")
        >>> inputs.pixel_values.shape, inputs.labels.shape
        (torch.Size([1, 3, 224, 224]), torch.Size([1, 224, 224]))
    """

    model_input_names = ["pixel_values"]
    do_resize: bool
    size: dict[str, int]
    resample: int
    do_center_crop: bool
    crop_size: dict[str, int]
    do_rescale: bool
    rescale_factor: float
    do_normalize: bool
    image_mean: list[float] | float
    image_std: list[float] | float
    do_reduce_labels: bool
    do_convert_rgb: bool | None
    extra: dict[str, Any]

    def __init__(
        self,
        *,
        do_resize: bool | None = None,
        size: int | Sequence[int] | Mapping[str, int] | None = None,
        resample: int | None = None,
        do_center_crop: bool | None = None,
        crop_size: int | Sequence[int] | Mapping[str, int] | None = None,
        do_rescale: bool | None = None,
        rescale_factor: float | None = None,
        do_normalize: bool | None = None,
        image_mean: float | Sequence[float] | None = None,
        image_std: float | Sequence[float] | None = None,
        do_reduce_labels: bool | None = None,
        do_convert_rgb: bool | None = None,
        reduce_labels: bool | None = None,
        **extra: Any,
    ):
        given = {
            "do_resize": do_resize,
            "size": size,
            "resample": resample,
            "do_center_crop": do_center_crop,
            "crop_size": crop_size,
            "do_rescale": do_rescale,
            "rescale_factor": rescale_factor,
            "do_normalize": do_normalize,
            "image_mean": image_mean,
            "image_std": image_std,
            "do_reduce_labels": reduce_labels if do_reduce_labels is None else do_reduce_labels,
            "do_convert_rgb": do_convert_rgb,
        }
        refuse_misspelt(extra)
        self.extra = {name: value for name, value in extra.items() if name not in KINDS}
        for name, value in checked(given, self._square).items():
            setattr(self, name, value)

    def __getattr__(self, name: str) -> Any:
        """Further entries of the file, and the old name `reduce_labels`."""
        if name == OLD_NAME:
            return self.do_reduce_labels
        if name in (extra := self.__dict__.get("extra", {})):
            return extra[name]
        raise AttributeError(f"{type(self).__name__} has no {name!r}")

    def __call__(self, images: Any, segmentation_maps: Any = None, **options: Any) -> BatchFeature:
        """The same as `preprocess`."""
        return self.preprocess(images, segmentation_maps, **options)

    def preprocess(
        self,
        images: Any,
        segmentation_maps: Any = None,
        *,
        return_tensors: str | None = None,
        input_data_format: str | None = None,
        data_format: str | None = None,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> BatchFeature:
        """Prepare images, and optionally their label maps.

        Args:
            images: a PIL image of any mode, a NumPy array or torch tensor (H, W), (C, H, W) or (H, W, C), a batch of
                such in a further first dimension, the path of a file (turned upright by EXIF; PIL images are taken as
                they are), or a list of all these, also nested. For a resize, floats lie in [0, 1] or are levels up to
                255; integers are levels.
            segmentation_maps: a label map for every image: PIL, (H, W) or (H, W, 1), a batch (B, H, W), or lists of
                these.
            return_tensors: "pt" or "np" = stacked, torch or NumPy; None = lists of NumPy arrays.
            input_data_format: "channels_first" or "channels_last", of arrays; None = found from their shapes.
            data_format: of the result.
            device: for "pt".
            options: instead of the processor's own, for this call.

        Returns:
            `pixel_values` (B, C, H, W), float32 if rescaled or normalised; with label maps also `labels` (B, H, W)
            int64.

        Raises TypeError, ValueError, and UserError for an image that cannot be decoded.
        """
        chosen = Options.of(self._settings(options))
        order, order_out = (
            _order(*each) for each in (("input_data_format", input_data_format), ("data_format", data_format))
        )
        if (kind := getattr(return_tensors, "value", return_tensors)) not in (None, "pt", "np"):
            raise ValueError(f'return_tensors must be "pt", "np" or None, got {return_tensors!r}')
        singles = flat(images, 3)
        if not singles:
            raise ValueError("there are no images")
        found = [pixel_values(image_values(image, chosen.channels, chosen.convert, order), chosen) for image in singles]
        if order_out == LAST:
            found = [image_CHW.permute(1, 2, 0) for image_CHW in found]
        features = {"pixel_values": found}
        if segmentation_maps is not None:
            maps = label_maps(segmentation_maps)
            if len(maps) != len(found):
                raise ValueError(f"{len(found)} images with {len(maps)} segmentation_maps")
            features["labels"] = [labels(ids, chosen) for ids in maps]
        return BatchFeature({name: _tensors(name, values, kind, device) for name, values in features.items()})

    def post_process_semantic_segmentation(
        self,
        outputs: Any,
        target_sizes: Sequence[Sequence[int]] | Tensor | None = None,
        return_segmentation_scores: bool = False,
    ) -> list[Any]:
        """Label maps from a segmenter's outputs; see `semantic_maps`."""
        return semantic_maps(outputs, target_sizes, return_segmentation_scores)

    @property
    def _square(self) -> bool:
        return self.extra.get("default_to_square") is not False

    def _settings(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The processor's options with those of a call. Raises TypeError for unknown ones."""
        own = {name: getattr(self, name) for name in DEFAULTS}
        return checked(
            own | {name: value for name, value in _known(options).items() if value is not None}, self._square
        )

    @classmethod
    def from_pretrained(cls, source: str | Path, revision: str | None = None, **options: Any) -> Self:
        """The processor of a model.

        Args:
            source: a folder with preprocessor_config.json, that file, a model on the Hugging Face Hub (OWNER/NAME or
                hf://OWNER/NAME), or a checkpoint (a file, or a folder without preprocessor_config.json), whose
                evaluation view it becomes. A warning says if the checkpoint does not know how images are prepared.
            revision: on the Hub.
            options: instead of the file's.

        Raises UserError, in one line, for files that are missing, damaged or hold options that cannot be, and
        TypeError for unknown `options`.
        """
        options = _known(options)
        path = local_copy(_path("from_pretrained", source), revision, names=(FILE,))
        if path.name == "config.json":
            raise UserError(f"{path} is of a model; its processor is {FILE}")
        if path.name in WEIGHTS and any((path.parent / name).is_file() for name in (FILE, "config.json")):
            path = path.parent  # what is beside the weights says more than they do
        if path.is_dir():
            path = path / FILE if (path / FILE).is_file() else _weights(path) or path / FILE
        if path.is_dir() or (path.is_file() and path.suffix != ".json"):
            found = read_checkpoint(path)
            size, segments = found.architecture["image_size"], found.kind == "segmenter"
            settings = evaluation_settings(found.about, size, found.architecture["in_chans"], segments)
            guess = [] if found.about.keys() & {*PREPARATION} else [_guess(path)]
            for note in found.about.get("view_differs") or guess:
                warnings.warn(note, stacklevel=2)
            return cls.from_dict(settings, **options)
        if not path.is_file():
            raise UserError(f"{path} does not exist; BeitImageProcessor() has the defaults of BEiT")
        try:
            return cls.from_dict(read_json(path), **options)
        except (TypeError, ValueError) as error:
            raise UserError(f"{path}: {first_line(error)}") from None

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any], **options: Any) -> Self:
        """A processor from the entries of a file, with `options` instead of some of them."""
        options = {name: value for name, value in _known(options).items() if value is not None}
        if "do_reduce_labels" in options:
            settings = {name: value for name, value in settings.items() if name != OLD_NAME}
        return cls(**{**settings, **options})

    def to_dict(self) -> dict[str, Any]:
        """All options, as preprocessor_config.json has them."""
        found = {name: value for name, value in self._settings({}).items() if value is not None}
        return {**self.extra, **found, "image_processor_type": "BeitImageProcessor"}

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write preprocessor_config.json, which transformers reads as well; returns its path."""
        path = expand_home(_path("save_pretrained", folder)) / FILE
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(path, self.to_json_string())
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror or first_line(error)}") from None
        return path

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"


BeitFeatureExtractor = BeitImageProcessor  # its name until 2022


def _path(method: str, place: Any) -> str | Path:
    """A place as it is given. Raises TypeError for what is no path."""
    if not isinstance(place, str | os.PathLike):
        raise TypeError(f"{method} needs the name of a folder, got {place!r}")
    return place if isinstance(place, str) else Path(place)


def _weights(folder: Path) -> Path | None:
    """What `read_checkpoint` reads of a folder with weights: itself if config.json is there, else their file."""
    whole = (folder / "config.json").is_file()
    files = [folder / f"{name}{end}" for name in WEIGHTS for end in (("", ".index.json") if whole else ("",))]
    found = next((file for file in files if file.is_file()), None)
    return folder if whole and found else found


def _guess(path: Path) -> str:
    """A warning in the words of `preprocessing` (hf_processor.py)."""
    if path.is_dir():
        return f"{path} has no {FILE}: the preparation of its images is a guess"
    return f"{path} does not say how its images are prepared: the preparation of its images is a guess"


def _known(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a call by their present names. Raises TypeError for unknown ones."""
    options = dict(options)
    if OLD_NAME in options:
        options.setdefault("do_reduce_labels", options.pop(OLD_NAME))
    if unknown := sorted(set(options) - set(DEFAULTS)):
        raise TypeError(f"{', '.join(unknown)}: no option of BeitImageProcessor; it has {', '.join(DEFAULTS)}")
    return options


def _order(name: str, value: Any) -> str | None:
    value = getattr(value, "value", value)  # transformers has an enumeration
    if value not in (None, FIRST, LAST):
        raise ValueError(f"{name} must be {FIRST} or {LAST}, got {value!r}")
    return value


def _tensors(name: str, values: list[Tensor], kind: str | None, device: torch.device | str | None) -> Any:
    """The values of a batch as `return_tensors` asks for."""
    if kind is None:
        return [value.numpy() for value in values]
    if len(sizes := sorted({tuple(value.shape) for value in values})) > 1:
        raise ValueError(
            f"{name} have the shapes {sizes[0]} and {sizes[1]}: set a size or crop_size, or return_tensors=None"
        )
    stacked = torch.stack(values)
    return stacked.numpy() if kind == "np" else stacked.to(device)
