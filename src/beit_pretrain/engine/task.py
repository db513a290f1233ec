"""Base class of tasks. Each task is a file in `tasks/`: its settings, LightningModule, data, pictures and checks."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from lightning import Callback
from PIL import Image
from torch import Tensor, nn

from beit_pretrain.data.datamodule import ShardData, first_images
from beit_pretrain.data.sources import list_images, read_candidate
from beit_pretrain.engine.module import TrainedModule
from beit_pretrain.engine.settings import FitSettings, VisualizeSettings
from beit_pretrain.errors import UserError, stop_if_memory_was_short
from beit_pretrain.transforms.image_io import open_image, reason
from beit_pretrain.transforms.jitter import normalise
from beit_pretrain.transforms.views import centre_view, to_array
from beit_pretrain.visualization.attention_maps import attention_picture


class Task:
    """A task, built from its settings. The subclass in `tasks/NAME.py` is the task NAME.

    The constructor raises UserError for inconsistent settings.
    """

    settings: ClassVar[type[FitSettings]]
    best: ClassVar[tuple[str, Literal["min", "max"]]]  # metric on held-out images that selects `best.ckpt`, and mode
    fsdp = False  # whether it supports trainer.strategy=fsdp
    sync_batchnorm = False  # whether its batch norms are synchronised over all GPUs
    nondeterministic_on_gpu = ""  # its operation without a deterministic form on a GPU; "" = none

    module: TrainedModule
    data: ShardData
    callbacks: list[Callback]
    origin = ""  # initialisation of the network, as text

    def __init__(self, cfg: Any):
        self.cfg = cfg
        self.callbacks = []

    @property
    def network(self) -> nn.Module:
        """The network with the attention blocks."""
        return self.module.model

    def check_micro_batch(self, images: int, world: int, on_gpus: bool, given: str) -> None:
        """Raise UserError if the task cannot train on a micro-batch of `images`; `given`: the settings, as text."""

    def preflight(self) -> list[str]:
        """Checks of this task only; returns one line per check. Raises UserError."""
        return []

    def prepare(self) -> None:
        """Called just before the run starts."""

    @classmethod
    def resumed(cls, cfg: Any, last: Path) -> Any:
        """The settings with `init_from` set to the run's checkpoint: the original one may no longer exist."""
        own = {"init_from": str(last), "from_scratch": False, "new_head": False}
        return cfg.model_copy(update={name: value for name, value in own.items() if name in type(cfg).model_fields})

    def validation_pictures(self) -> Iterator[tuple[str, Image.Image]]:
        """(name, picture) of held-out images after a validation, in eval mode; the main one has no name."""
        yield "", cast(Image.Image, self.masked(VisualizeSettings(images=self.cfg.num_visualizations)))

    # Pictures for `visualize`, which sets eval mode before; None = this task has no such picture.

    def masked(self, options: Any) -> Image.Image | None:
        """The outputs of the model on held-out images."""
        return None

    def tokens(self, options: Any) -> Image.Image | None:
        """Token maps of the run's tokenizer."""
        return None

    def layers(self, options: Any, run: Path) -> Callable[[Path], Path] | None:
        """A function that draws the accuracy by layer into a file."""
        return None

    def attention(self, options: Any) -> Image.Image | None:
        """Attention maps of the backbone, with any head."""
        module: Any = self.module
        if not hasattr(module, "mean"):
            return None
        shown = chosen_images(self.data, options, self.network, count=min(options.images, 2))
        normalised = normalise(shown, module.mean, module.std)
        return attention_picture(self.network, normalised, shown, options.layers, options.heads, options.patches)

    def batch_of(self, options: Any) -> dict[str, Tensor]:
        """The first images of the split, after the run's transform."""
        check_split(self.data, options)
        return first_images(self.data.eval_dataset(options.split), options.images, self.module.device)


def task_names() -> list[str]:
    package = importlib.import_module("beit_pretrain.tasks")
    return [module.name for module in pkgutil.iter_modules(package.__path__) if module.name != "common"]


def find_task(name: str) -> type[Task]:
    """The task class in `tasks/NAME.py`. Raises UserError if there is none."""
    if name not in task_names():
        raise UserError(f"task={name} is not one of {', '.join(task_names())}")
    module = importlib.import_module(f"beit_pretrain.tasks.{name}")
    return next(
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Task) and value.__module__ == module.__name__
    )


def check_split(data: ShardData, options: Any) -> None:
    """Raise UserError if the run does not have the split `options.split`."""
    if options.split not in data.readers:
        raise UserError(f"split={options.split}: the run has {', '.join(data.readers)}")


def chosen_images(data: ShardData, options: Any, network: Any, count: int) -> Tensor:
    """(B, C, H, W) in [0, 1] at the network's input size: the user's images (`photos`), else the split's first ones.

    Raises UserError if an image cannot be read.
    """
    height, width = (side * network.config["patch_size"] for side in network.grid)
    channels = network.config["in_chans"]
    if options.photos is None:
        check_split(data, options)
        files = data.first_files(options.split, count)
    else:
        files = [read_candidate(candidate) for candidate in list_images(options.photos)[: options.images]]
    arrays = []
    for number, file in enumerate(files):
        try:
            with open_image(file) as image:
                view = centre_view(image, max(height, width), 1.0, channels)
        except Exception as error:  # Pillow's decoders raise nearly everything on broken files
            what = f"image {number} of {options.photos or options.split}"
            stop_if_memory_was_short(error, what)
            raise UserError(f"{what} cannot be read: {reason(error)}") from error
        arrays.append(torch.from_numpy(to_array(view.crop((0, 0, width, height)))))
    return torch.stack(arrays).float() / 255
