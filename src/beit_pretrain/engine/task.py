"""What the engine knows of a task. Each is a file in `tasks/`: settings, LightningModule, data, pictures, refusals."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning import Callback
from PIL import Image
from torch import Tensor, nn

from beit_pretrain.data.datamodule import ShardData, first_images
from beit_pretrain.data.sources import list_images, read_candidate
from beit_pretrain.engine.module import TrainedModule
from beit_pretrain.engine.settings import FitSettings
from beit_pretrain.errors import UserError, stop_if_memory_was_short
from beit_pretrain.transforms.image_io import open_image, reason
from beit_pretrain.transforms.jitter import normalise
from beit_pretrain.transforms.views import centre_view, to_array
from beit_pretrain.visualization.attention_maps import attention_picture


class Task:
    """A training, built from its settings. A subclass in `tasks/NAME.py` is the task NAME.

    Building raises UserError for settings that do not go together.
    """

    settings: ClassVar[type[FitSettings]]
    best: ClassVar[tuple[str, Literal["min", "max"]]]  # the held-out metric that says which checkpoint is the best
    fsdp = False  # whether trainer.strategy=fsdp can run it
    sync_batchnorm = False  # whether its batch norms count over all GPUs
    nondeterministic_on_gpu = ""  # what of it torch cannot do deterministically on a GPU

    module: TrainedModule
    data: ShardData
    callbacks: list[Callback]
    origin = ""  # what the network started from, in words

    def __init__(self, cfg: Any):
        self.cfg = cfg
        self.callbacks = []

    @property
    def network(self) -> nn.Module:
        """The network whose blocks attend."""
        network: nn.Module = self.module.model
        return network

    def check_micro_batch(self, images: int, world: int, on_gpus: bool, given: str) -> None:
        """Raise UserError for a micro-batch of so many images that cannot be trained on; `given`: the settings."""

    def preflight(self) -> list[str]:
        """Try what only this task needs; a line for each, for people. Raises UserError."""
        return []

    def prepare(self) -> None:
        """Called when the run is about to start."""

    @classmethod
    def resumed(cls, cfg: Any, last: Path) -> Any:
        """The settings with the network of the run's own checkpoint: what it started from need not exist any more."""
        own = {"init_from": str(last), "from_scratch": False, "new_head": False}
        return cfg.model_copy(update={name: value for name, value in own.items() if name in type(cfg).model_fields})

    # Pictures of what it learned, for `visualize`; None = it has none of that kind.

    def masked(self, options: Any) -> Image.Image | None:
        """What the run was trained for, on held-out images."""
        return None

    def tokens(self, options: Any) -> Image.Image | None:
        """Token maps of the run's tokenizer."""
        return None

    def layers(self, options: Any, run: Path) -> Callable[[Path], Path] | None:
        """Accuracy by layer, as something that draws it into a file."""
        return None

    def attention(self, options: Any) -> Image.Image | None:
        """Attention maps of a backbone, whatever head it has."""
        module: Any = self.module
        if not hasattr(module, "mean"):
            return None
        shown = chosen_images(self.data, options, self.network, count=min(options.images, 2))
        normalised = normalise(shown, module.mean, module.std)
        return attention_picture(
            self.network,
            normalised,
            shown,
            options.layers,
            options.heads,
            options.patches,
        )

    def batch_of(self, options: Any) -> dict[str, Tensor]:
        """The first images of the split, as the run sees them."""
        check_split(self.data, options)
        return first_images(self.data.eval_dataset(options.split), options.images, torch.device("cpu"))


def task_names() -> list[str]:
    """The tasks that there are."""
    package = importlib.import_module("beit_pretrain.tasks")
    return [module.name for module in pkgutil.iter_modules(package.__path__) if module.name != "common"]


def find_task(name: str) -> type[Task]:
    """The task of a name: the class in its file. Raises UserError if there is none."""
    if name not in task_names():
        raise UserError(f"task={name} is not one of {', '.join(task_names())}")
    module = importlib.import_module(f"beit_pretrain.tasks.{name}")
    return next(
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Task) and value.__module__ == module.__name__
    )


def check_split(data: ShardData, options: Any) -> None:
    """Raise UserError for a split that the run does not have."""
    if options.split not in data.readers:
        raise UserError(f"split={options.split}: the run has {', '.join(data.readers)}")


def chosen_images(data: ShardData, options: Any, network: Any, count: int) -> Tensor:
    """(B, C, H, W) in [0, 1], of the network's size: the user's own images (`photos`), else the split's first."""
    height, width = (side * network.config["patch_size"] for side in network.grid)
    channels = network.config["in_chans"]
    if options.photos is None:
        check_split(data, options)
        order = data.eval_dataset(options.split).order
        files = [data.readers[options.split].read(order.sample_at(i)).data for i in range(count)]
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
