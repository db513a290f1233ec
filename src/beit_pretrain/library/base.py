"""What the four models share: a network of ours inside, `from_pretrained`, `save_pretrained`, and the pass over blocks.

Shapes: B batch, C channels, H W pixels, N patches, D width, R residual branches.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

import torch
from torch import Tensor, nn

from beit_pretrain.errors import UserError
from beit_pretrain.library.config import BeitConfig
from beit_pretrain.library.losses import described, readable
from beit_pretrain.library.outputs import ModelOutput
from beit_pretrain.models.attention_probabilities import attention_probabilities
from beit_pretrain.models.backbone import Backbone, embed
from beit_pretrain.models.blocks import block_outputs
from beit_pretrain.models.checkpoints.formats import Checkpoint, read_checkpoint
from beit_pretrain.models.checkpoints.hf_config import INITIAL_STD, said_of
from beit_pretrain.models.checkpoints.hf_writer import save_folder
from beit_pretrain.models.checkpoints.hub import local_copy
from beit_pretrain.models.checkpoints.pretrained import checked_sides
from beit_pretrain.models.other_size import at_size
from beit_pretrain.settings import unknown

Output = TypeVar("Output", bound=ModelOutput)
LABELS = ("num_labels", "id2label", "label2id")
# What may differ from the file's config without another network.
CHANGES = (
    "drop_path_rate",
    "auxiliary_loss_weight",
    "semantic_loss_ignore_index",
    "problem_type",
    "output_hidden_states",
    "output_attentions",
    "return_dict",
)


class Pass(NamedTuple):
    """One pass over the blocks."""

    network: Any  # of the image's size
    states: list[Tensor]  # the embeddings, and the output of every block that ran, (B, 1 + N, D)
    hidden_states: tuple[Tensor, ...] | None  # the same, if asked for
    attentions: tuple[Tensor, ...] | None  # if asked for


class PretrainedModel(nn.Module):
    """A network of ours under the names of transformers.

    Attributes:
        network: the network; `network.about` has what its file said of images (mean, std, classes).
        config: a `BeitConfig` of its own, not the one it was made from.
    """

    network_type: ClassVar[type[Backbone]] = Backbone
    options: ClassVar[tuple[str, ...]] = ()  # arguments of `from_pretrained` that only this model has
    network: Any
    config: BeitConfig

    def __init__(self, config: BeitConfig, **options: Any):
        super().__init__()
        if not isinstance(config, BeitConfig):
            raise UserError(
                f"{type(self).__name__} is made from a beit_pretrain.BeitConfig, not from a {type(config).__module__}."
                f"{type(config).__name__}; BeitConfig.from_dict(config.to_dict()) is one of transformers' as ours"
            )
        if config.initializer_range != INITIAL_STD:
            warnings.warn(
                f"initializer_range={config.initializer_range}: initial weights are those of the release, with a "
                f"standard deviation of {INITIAL_STD}",
                stacklevel=3,
            )
        self._hold(self._built(config, **options), config)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        image_size: int | Sequence[int] | None = None,
        ignore_mismatched_sizes: bool = True,
        **changes: Any,
    ) -> Self:
        """A model in eval mode, float32, from any BEiT checkpoint.

        Args:
            source: a file or folder (the authors' `.pth`, timm's, transformers', ours), `hf://OWNER/NAME[@REVISION]`
                or `OWNER/NAME` of the Hub.
            revision: branch, tag or commit on the Hub.
            image_size: side, or (height, width), pixels; position tables are resized the release's way.
            ignore_mismatched_sizes: accepted and not needed: a head of another number of classes is a new one, and a
                warning says so.
            changes: of the config: drop_path_rate, auxiliary_loss_weight, semantic_loss_ignore_index, problem_type,
                output_hidden_states, output_attentions, return_dict. Of a model with classes: num_labels, id2label or
                label2id. Of a model that pools: use_mean_pooling. Of BeitModel: add_pooling_layer.

        Raises UserError, in one line, for what cannot be read, or does not fit.
        """
        known = (*CHANGES, *cls.options)
        for name in changes.keys() - {*known}:
            if name in LABELS:
                raise UserError(f"from_pretrained(..., {name}=...) is for models with classes; {cls.__name__} has none")
            if name in BeitConfig.model_fields:
                raise UserError(
                    f"from_pretrained(..., {name}=...): the file says that; only {', '.join(known)} can change"
                )
            more = ["revision", "image_size", *known]
            raise UserError(f"from_pretrained: {unknown(name, more, otherwise='known are ' + ', '.join(more))}")
        sides = checked_sides(image_size)
        checkpoint = read_checkpoint(local_copy(source, revision), sides)
        said = said_of(checkpoint)
        labels = {name: changes.pop(name) for name in LABELS if changes.get(name) is not None}
        wanted = BeitConfig(**labels) if labels else None
        count = wanted.num_labels if wanted else None
        settings = BeitConfig(**{**said, **{n: v for n, v in changes.items() if n in BeitConfig.model_fields}})
        options = {name: changes[name] for name in cls.options if name in changes}
        network = cls._loaded(checkpoint, image_size, settings.drop_path_rate, count, **options)
        # A mere number that is the file's own leaves its names of classes.
        kept = checkpoint.kind == cls.network_type.kind and checkpoint.architecture.get("num_classes") == count
        if wanted is not None and not (kept and labels.keys() == {"num_labels"}):
            network.about["classes"] = list(wanted.id2label.values())
        model = cls.from_network(network, settings)
        model._after_loading(options)
        return model.eval()

    @classmethod
    def from_network(cls, network: Any, config: BeitConfig | None = None) -> Self:
        """The model around a network of ours, such as that of a training run; its weights are shared.

        `config` has what a network does not say (weights of losses, problem_type); None = the defaults.
        """
        if getattr(network, "kind", None) != cls.network_type.kind:
            raise UserError(f"{cls.__name__} holds a {cls.network_type.__name__}, not a {type(network).__name__}")
        model = cls.__new__(cls)
        nn.Module.__init__(model)
        model._hold(network, config or BeitConfig())
        return model.train(network.training)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json, model.safetensors and, where it is known, preprocessor_config.json, into a folder.

        `from_pretrained` of transformers and of this class open it, with the same numbers. A network for images that
        are not square is for this class alone: transformers reads position tables with height and width swapped.
        Files of other names in the folder stay. Raises UserError if it cannot be written.
        """
        said = BeitConfig.of_network(self.network, **dict(self.config))
        if "num_classes" in self.network.config:  # a person may have named the classes since
            if self.config.num_labels != said.num_labels:
                raise UserError(
                    f"config.id2label names {self.config.num_labels} classes, the head has {said.num_labels}; "
                    "from_pretrained(..., num_labels=) makes another head"
                )
            said.id2label = self.config.id2label
        save_folder(self.network, folder, said)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.network.cls_token.device

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the weights."""
        return self.network.cls_token.dtype

    @property
    def num_labels(self) -> int:
        """The number of classes."""
        return self.config.num_labels

    # --- what each model fills in -------------------------------------------------------------------------------------

    def _built(self, config: BeitConfig, **options: Any) -> Backbone:
        """A fresh network."""
        raise NotImplementedError

    @classmethod
    def _loaded(cls, checkpoint: Checkpoint, image_size: Any, drop: float, classes: int | None, **options: Any) -> Any:
        """The network with the file's tensors."""
        raise NotImplementedError

    def _after_loading(self, options: dict[str, Any]) -> None:
        """Take over the options of `from_pretrained`."""

    # --- inside -------------------------------------------------------------------------------------------------------

    def _hold(self, network: Backbone, config: BeitConfig) -> None:
        self.network = network
        self.config = BeitConfig.of_network(network, **dict(config))  # what the file says of the network is put right

    def _run(
        self,
        pixel_values: Tensor | None,
        bool_masked_pos: Tensor | None,
        interpolate: bool,
        hidden_states: bool | None,
        attentions: bool | None,
        blocks: int | None = None,
    ) -> Pass:
        """Embed and run all blocks, or the first `blocks` if no output of the others is asked for."""
        image = self._checked(pixel_values)
        network, size = self.network, (image.shape[-2], image.shape[-1])
        if size != tuple(network.patch_embed.img_size):
            if not interpolate:
                raise UserError(
                    f"the model is for images of {tuple(network.patch_embed.img_size)} pixels, got {size}; "
                    "interpolate_pos_encoding=True takes them, and from_pretrained(..., image_size=) is for training"
                )
            network = at_size(network, size)
        mask = None if bool_masked_pos is None else self._checked_mask(bool_masked_pos, network, len(image))
        hidden_states = self.config.output_hidden_states if hidden_states is None else hidden_states
        attentions = self.config.output_attentions if attentions is None else attentions
        embedded = embed(network, image, mask)
        drop_BR = None
        if self.training and self.config.drop_path_rate:
            drop_BR = torch.rand(len(image), network.branches, device=image.device)
        blocks = None if hidden_states or attentions else blocks
        states = [embedded, *block_outputs(network, embedded, drop_BR, blocks)]
        return Pass(
            network,
            states,
            tuple(states) if hidden_states else None,
            tuple(attention_probabilities(network, states)) if attentions else None,
        )

    def _checked(self, pixel_values: Tensor | None) -> Tensor:
        """The images (B, C, H, W). Raises UserError for anything else."""
        channels = self.config.num_channels
        if not isinstance(pixel_values, Tensor) or not pixel_values.is_floating_point() or pixel_values.ndim != 4:
            raise UserError(
                f"pixel_values must be normalised images (B, {channels}, height, width), a tensor of floats; got "
                f"{described(pixel_values)}"
            )
        if pixel_values.shape[1] != channels:
            raise UserError(f"the model sees {channels} channels, got images of {pixel_values.shape[1]}")
        return pixel_values

    def _checked_mask(self, mask: Tensor, network: Any, images: int) -> Tensor:
        """The mask (B, N) as booleans. Raises UserError for one that does not fit."""
        if not hasattr(network, "mask_token"):
            raise UserError(
                "bool_masked_pos needs a mask token: use_mask_token=True in the config, or a file that has one"
            )
        rows, columns = network.grid
        if not isinstance(mask, Tensor):
            raise UserError(f"bool_masked_pos must be a tensor of bools, or of 0 and 1; got {described(mask)}")
        if mask.ndim < 2 or mask.numel() != images * rows * columns or len(mask) != images:
            raise UserError(f"bool_masked_pos must be ({images}, {rows * columns}), got {tuple(mask.shape)}")
        if mask.dtype != torch.bool and readable(mask) and not bool(((mask == 0) | (mask == 1)).all()):
            raise UserError(f"bool_masked_pos must be bools, or 0 and 1; got {described(mask)} with others")
        return mask.flatten(1).bool()

    def _returned(self, output: Output, return_dict: bool | None) -> Output | tuple[Any, ...]:
        """The output, or as a tuple where that is asked for."""
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()


def warn_of_new_head(kind: str, checkpoint: Checkpoint, classes: int | None) -> bool:
    """Warn of a head that has to be trained, and say whether there is one.

    Raises UserError where nothing says how many classes it has.
    """
    own = checkpoint.architecture.get("num_classes") if checkpoint.kind == kind else None
    if classes is None and own is None:
        raise UserError(
            f"{checkpoint.path} holds a {checkpoint.kind} without such a head: give num_labels= for a new one"
        )
    if new := classes not in (None, own):
        warnings.warn(f"the head of {classes} classes is new: it has to be trained", stacklevel=4)
    return new


def warn_of_new_norm(network: Any, checkpoint: Checkpoint) -> None:
    """Warn of a LayerNorm that the file does not have."""
    for name, what in (("norm", "final LayerNorm"), ("fc_norm", "LayerNorm of the pooler")):
        if isinstance(getattr(network, name), nn.LayerNorm) and f"{name}.weight" not in checkpoint.state:
            warnings.warn(f"{checkpoint.path} has no {what}: it starts as ones and zeros", stacklevel=4)
