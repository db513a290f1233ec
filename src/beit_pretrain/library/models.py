"""BEiT under the names of transformers: `BeitModel`, and with heads for tokens, classes and label maps.

Each holds one of our networks (`model.network`) and computes transformers' numbers. `forward` returns an output of
`outputs.py`, or with `return_dict=False` a tuple. Arguments that all share:

* pixel_values (B, C, H, W): normalised images.
* output_hidden_states, output_attentions: also return those of every layer; None = as the config says.
* interpolate_pos_encoding: take images of another size; position tables are interpolated as in transformers
  (`models/other_size.py`). Without it they are refused.

Shapes: B batch, C channels, H W pixels, N patches, D width, K classes, V visual tokens, M masked patches of the batch.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from beit_pretrain.errors import UserError
from beit_pretrain.library.base import LABELS, PretrainedModel, warn_of_new_head, warn_of_new_norm
from beit_pretrain.library.config import BeitConfig
from beit_pretrain.library.losses import IGNORED, check_tensor, checked_ids, classification_loss, segmentation_loss
from beit_pretrain.library.outputs import (
    BeitModelOutputWithPooling,
    ImageClassifierOutput,
    MaskedLMOutput,
    SemanticSegmenterOutput,
)
from beit_pretrain.models.backbone import Backbone, Classifier, MaskedImageModel, init_for_finetuning
from beit_pretrain.models.checkpoints.formats import Checkpoint
from beit_pretrain.models.checkpoints.pretrained import base, classifier, encoder, mim, segmenter
from beit_pretrain.models.upernet import Segmenter


class BeitModel(PretrainedModel):
    """Features of images, without a head.

    Args:
        config: the architecture; weights are initialised as in the release.
        add_pooling_layer: compute `pooler_output`.
    """

    options = ("add_pooling_layer", "use_mean_pooling")

    def __init__(self, config: BeitConfig, add_pooling_layer: bool = True):
        super().__init__(config, pooler=_switch(add_pooling_layer))
        self.add_pooling_layer = add_pooling_layer

    def forward(
        self,
        pixel_values: Tensor | None = None,
        bool_masked_pos: Tensor | None = None,
        *,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        interpolate_pos_encoding: bool = False,
        return_dict: bool | None = None,
    ) -> BeitModelOutputWithPooling | tuple[Any, ...]:
        """Features; `bool_masked_pos` (B, N) is True where a patch is replaced by the mask token."""
        found = self._run(
            pixel_values, bool_masked_pos, interpolate_pos_encoding, output_hidden_states, output_attentions
        )
        last = found.network.norm(found.states[-1])
        pooled = None
        if self.add_pooling_layer:
            mean = self.config.use_mean_pooling
            pooled = found.network.fc_norm(last[:, 1:].mean(1)) if mean else last[:, 0]
        output = BeitModelOutputWithPooling(last, pooled, found.hidden_states, found.attentions)
        return self._returned(output, return_dict)

    def _built(self, config: BeitConfig, **options: Any) -> Backbone:
        network = base(config.architecture(), config.use_mean_pooling, options["pooler"], config.use_mask_token)
        init_for_finetuning(network)
        return network

    @classmethod
    def _loaded(cls, checkpoint: Checkpoint, image_size: Any, drop: float, classes: int | None, **options: Any) -> Any:
        pooler = _switch(options.get("add_pooling_layer", True))
        network = encoder(checkpoint, image_size, drop, options.get("use_mean_pooling"), pooler)
        warn_of_new_norm(network, checkpoint)
        return network

    def _after_loading(self, options: dict[str, Any]) -> None:
        self.add_pooling_layer = self.add_pooling_layer and options.get("add_pooling_layer", True)

    def _hold(self, network: Backbone, config: BeitConfig) -> None:
        super()._hold(network, config)
        self.add_pooling_layer = not (self.config.use_mean_pooling and isinstance(network.fc_norm, nn.Identity))


class BeitForMaskedImageModeling(PretrainedModel):
    """Predicts the visual token of every patch (BEiT, section 2.3)."""

    network_type = MaskedImageModel

    def forward(
        self,
        pixel_values: Tensor | None = None,
        bool_masked_pos: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        interpolate_pos_encoding: bool = False,
        return_dict: bool | None = None,
        masked_only: bool = False,
    ) -> MaskedLMOutput | tuple[Any, ...]:
        """Logits (B, N, V), and with `labels` the mean cross-entropy over the masked patches.

        Args:
            bool_masked_pos: (B, N), True where a patch is masked.
            labels: tokens (M,) of the masked patches, row by row, or (B, N) of all patches, as tokenizers give them;
                -100 do not count.
            masked_only: logits (M, V) of the masked patches; the head is computed for these alone.
        """
        if bool_masked_pos is None and (labels is not None or masked_only):
            raise UserError("labels and masked_only are about masked patches: bool_masked_pos is needed")
        found = self._run(
            pixel_values, bool_masked_pos, interpolate_pos_encoding, output_hidden_states, output_attentions
        )
        hidden_BND = found.network.norm(found.states[-1])[:, 1:]
        mask = None if bool_masked_pos is None else bool_masked_pos.flatten(1).bool()
        logits = found.network.lm_head(hidden_BND[mask] if masked_only else hidden_BND)
        loss = None
        if labels is not None and mask is not None:
            check_tensor(labels)
            logits_MV = logits if masked_only else logits[mask]
            of_all = labels.ndim > 1 and labels.numel() == mask.numel()
            tokens = labels.flatten(1)[mask.to(labels.device)] if of_all else labels.flatten()
            if len(tokens) != len(logits_MV):
                raise UserError(
                    f"labels must be the tokens of the {len(logits_MV)} masked patches, or of all {mask.numel()}; "
                    f"got {tuple(labels.shape)}"
                )
            if not len(logits_MV):
                raise UserError("no patch is masked in bool_masked_pos: there is no loss of none")
            ids_M = checked_ids(tokens, logits_MV.shape[1])
            loss = F.cross_entropy(logits_MV, ids_M.to(logits.device), ignore_index=IGNORED)
        return self._returned(MaskedLMOutput(loss, logits, found.hidden_states, found.attentions), return_dict)

    def _built(self, config: BeitConfig, **options: Any) -> Backbone:
        if not config.use_mean_pooling:
            raise UserError("use_mean_pooling=False would put two LayerNorms one after the other before the token head")
        return MaskedImageModel(config.vocab_size, **config.architecture())

    @classmethod
    def _loaded(cls, checkpoint: Checkpoint, image_size: Any, drop: float, classes: int | None, **options: Any) -> Any:
        return mim(checkpoint, image_size, drop)


class BeitForImageClassification(PretrainedModel):
    """Classifies images by the mean of the patches, or by [CLS] where the config says use_mean_pooling=False."""

    network_type = Classifier
    options = (*LABELS, "use_mean_pooling")

    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        interpolate_pos_encoding: bool = False,
        return_dict: bool | None = None,
    ) -> ImageClassifierOutput | tuple[Any, ...]:
        """Logits (B, K), and with `labels` the loss.

        The loss is that of the config's problem_type. None = by the labels: (B,) whole numbers of any integer type are
        classes, (B, K) in [0, 1] of any type several labels an image, and with K = 1 any numbers are a regression.
        """
        found = self._run(pixel_values, None, interpolate_pos_encoding, output_hidden_states, output_attentions)
        logits = found.network.forward_head(found.network.norm(found.states[-1]))
        loss = None if labels is None else classification_loss(logits, labels, self.config.problem_type)
        return self._returned(ImageClassifierOutput(loss, logits, found.hidden_states, found.attentions), return_dict)

    def _built(self, config: BeitConfig, **options: Any) -> Backbone:
        network = Classifier(config.num_labels, "avg" if config.use_mean_pooling else "token", **config.architecture())
        network.about["classes"] = list(config.id2label.values())
        return network

    @classmethod
    def _loaded(cls, checkpoint: Checkpoint, image_size: Any, drop: float, classes: int | None, **options: Any) -> Any:
        pool = {True: "avg", False: "token", None: None}[options.get("use_mean_pooling")]
        new = warn_of_new_head(cls.network_type.kind, checkpoint, classes)
        network = classifier(checkpoint, image_size, classes, drop, pool)
        if not new:
            warn_of_new_norm(network, checkpoint)
        return network


class BeitForSemanticSegmentation(PretrainedModel):
    """A class for every pixel, by UPerNet (BEiT, section 3.2)."""

    network_type = Segmenter
    options = LABELS

    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        interpolate_pos_encoding: bool = False,
        return_dict: bool | None = None,
    ) -> SemanticSegmenterOutput | tuple[Any, ...]:
        """Logits (B, K, 4h, 4w) over h x w patches, and with `labels` (B, H, W), a label map of any size, the loss.

        It is the cross-entropy, and auxiliary_loss_weight times that of the auxiliary head; pixels of
        semantic_loss_ignore_index do not count.
        """
        if labels is not None and self.num_labels == 1:
            raise UserError(
                "with one class there is nothing to learn: num_labels must be above 1 where labels are given"
            )
        used = self.network.layers[-1]
        found = self._run(pixel_values, None, interpolate_pos_encoding, output_hidden_states, output_attentions, used)
        if min(found.network.grid) < 2:
            raise UserError(f"label maps need 2 x 2 patches or more; there are {found.network.grid}")
        main, auxiliary = found.network.decode(found.network.rescaled(found.states))
        loss = None
        if labels is not None:
            config = self.config
            check_tensor(labels)
            if labels.ndim != 3 or len(labels) != len(main):
                raise UserError(f"labels must be ({len(main)}, height, width), got {tuple(labels.shape)}")
            ignored, weight = config.semantic_loss_ignore_index, config.auxiliary_loss_weight
            loss = segmentation_loss(main, auxiliary, labels, ignored, weight)
        return self._returned(SemanticSegmenterOutput(loss, main, found.hidden_states, found.attentions), return_dict)

    def _built(self, config: BeitConfig, **options: Any) -> Backbone:
        network = Segmenter(config.num_labels, config.decoder(), **config.architecture())
        network.about["classes"] = list(config.id2label.values())
        return network

    @classmethod
    def _loaded(cls, checkpoint: Checkpoint, image_size: Any, drop: float, classes: int | None, **options: Any) -> Any:
        warn_of_new_head(cls.network_type.kind, checkpoint, classes)
        return segmenter(checkpoint, image_size, classes, drop)


def _switch(add_pooling_layer: object) -> bool:
    """The value. Raises UserError for other types: a text would count as true."""
    if not isinstance(add_pooling_layer, bool):
        raise UserError(f"add_pooling_layer must be true or false, got {add_pooling_layer!r}")
    return add_pooling_layer
