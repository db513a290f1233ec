"""UPerNet (Xiao et al. 2018) with an auxiliary FCN head on features of four blocks of a BEiT (BEiT, section 3.2).

The features of four blocks are rescaled to x4, x2, x1 and x1/2 of the patch grid; the coarsest level is pooled at
several scales, the levels are merged from the coarsest to the finest, and a 1x1 convolution classifies the finest grid.

Module names are those of Hugging Face's files and, but for the classifiers, of the authors' segmentation checkpoints.
Shapes: B batch, C channels, H W pixels, h w patches, D width, F channels of the decoder, K classes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit_pretrain.errors import UserError
from beit_pretrain.models.backbone import Backbone, embed, init_for_finetuning
from beit_pretrain.models.blocks import block_outputs

DROPOUT = 0.1  # of whole channels in front of the two classifiers
HEADS = ("fpn1.", "fpn2.", "decode_head.", "auxiliary_head.")
CLASSIFIERS = ("decode_head.classifier.", "auxiliary_head.classifier.")

Decoder = dict[str, Any]  # arguments of the heads, some of these:
DEFAULTS: Decoder = {
    "layers": None,  # numbers of four blocks, from 1 (0 = the embeddings), ascending; None = `default_layers`
    "channels": None,  # F; None = the width of the backbone
    "pool_scales": (1, 2, 3, 6),  # grids of the pyramid pooling
    "aux_channels": 256,  # of the auxiliary head; None = no such head
    "aux_convs": 1,  # its 3x3 convolutions
}


class Maps(NamedTuple):
    """Logits (B, K, 4h, 4w) of the decoder, and (B, K, h, w) of the auxiliary head (None without one)."""

    main: Tensor
    auxiliary: Tensor | None


def default_layers(depth: int) -> list[int]:
    """Thirds and the end of the depth: 4, 6, 8, 12 of 12 blocks, 8, 12, 16, 24 of 24."""
    return [max(1, round(depth * share)) for share in (1 / 3, 1 / 2, 2 / 3, 1)]


class Conv(nn.Conv2d):
    """A convolution in front of a ReLU: He initialisation over the outputs."""

    def reset_parameters(self) -> None:
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")


class PixelClassifier(nn.Conv2d):
    """1x1 convolution to classes, near zero at first."""

    def __init__(self, channels: int, classes: int):
        super().__init__(channels, classes, kernel_size=1)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.01)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


def conv_unit(channels_in: int, channels: int, kernel: int = 1) -> nn.Sequential:
    """Convolution without bias, batch norm, ReLU."""
    conv = Conv(channels_in, channels, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(channels), relu=nn.ReLU()))


class UPerHead(nn.Module):
    """Pyramid pooling of the coarsest level, then merging down to the finest."""

    def __init__(self, width: int, channels: int, pool_scales: Sequence[int], classes: int):
        super().__init__()
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), conv_unit(width, channels)) for scale in pool_scales
        )
        self.bottleneck = conv_unit(width + len(pool_scales) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(conv_unit(width, channels) for _ in range(3))
        self.fpn_convs = nn.ModuleList(conv_unit(channels, channels, 3) for _ in range(3))
        self.fpn_bottleneck = conv_unit(4 * channels, channels, 3)
        self.classifier = PixelClassifier(channels, classes)

    def forward(self, pyramid: list[Tensor], keep_BF: Tensor | None = None) -> Tensor:
        coarsest = pyramid[-1]
        pooled = [_resized(pool(coarsest), coarsest) for pool in self.psp_modules]
        levels = [conv(x) for conv, x in zip(self.lateral_convs, pyramid, strict=False)]
        levels.append(self.bottleneck(torch.cat([coarsest, *pooled], dim=1)))
        for i in (2, 1, 0):
            levels[i] = levels[i] + _resized(levels[i + 1], levels[i])
        levels[:3] = [conv(x) for conv, x in zip(self.fpn_convs, levels, strict=False)]
        merged = self.fpn_bottleneck(torch.cat([_resized(x, levels[0]) for x in levels], dim=1))
        return self.classifier(_dropped(merged, keep_BF))


class FCNHead(nn.Module):
    """3x3 convolutions and a classifier on one level."""

    def __init__(self, width: int, channels: int, convs: int, classes: int):
        super().__init__()
        self.convs = nn.Sequential(*(conv_unit(width if i == 0 else channels, channels, 3) for i in range(convs)))
        self.classifier = PixelClassifier(channels, classes)

    def forward(self, x: Tensor, keep_BF: Tensor | None = None) -> Tensor:
        return self.classifier(_dropped(self.convs(x), keep_BF))


class Segmenter(Backbone):
    """A BEiT under UPerNet: K classes for every pixel.

    For `decoder` see `DEFAULTS`, for `architecture` those of `backbone.py`; by default every block has a bias table.
    """

    kind = "segmenter"

    def __init__(self, num_classes: int, decoder: Decoder | None = None, **architecture: Any):
        architecture.setdefault("rel_pos_bias", "per_layer")
        super().__init__("", 0, **architecture)
        self.norm = nn.Identity()  # the raw outputs of blocks are used
        given = {**DEFAULTS, **(decoder or {})}
        depth, width = len(self.blocks), int(self.embed_dim)
        layers = list(given["layers"] or default_layers(depth))
        if len(layers) != 4 or layers != sorted(layers) or layers[0] < 0 or layers[-1] > depth:
            raise UserError(f"decoder.layers={layers} must be four numbers up to {depth}, in ascending order")
        channels, scales, aux = given["channels"] or width, list(given["pool_scales"]), given["aux_channels"]
        self.layers, self.num_classes = layers, num_classes
        self.channels, self.aux_channels = channels, aux or 0
        self.fpn1 = nn.Sequential(_doubling(width), nn.BatchNorm2d(width), nn.GELU(), _doubling(width))
        self.fpn2 = nn.Sequential(_doubling(width))
        self.decode_head = UPerHead(width, channels, scales, num_classes)
        self.auxiliary_head = FCNHead(width, aux, given["aux_convs"], num_classes) if aux else None
        self.config["num_classes"] = num_classes
        self.config["decoder"] = {**given, "layers": layers, "channels": channels, "pool_scales": scales}
        init_for_finetuning(self)
        self.blocks[layers[-1] :].requires_grad_(False)  # nothing reads them

    def forward(self, image_BCHW: Tensor, drop_BR: Tensor | None = None, keep_BF: Tensor | None = None) -> Maps:  # type: ignore[override]
        """Logits on four times the patch grid, as in transformers, of normalised images of the network's size.

        `drop_BR`: see `Backbone.hidden_states`. `keep_BF` (B, F + aux_channels), factors of the channels in front of
        the two classifiers, is their dropout; None = no dropout.
        """
        return self.decode(self.pyramid(image_BCHW, drop_BR), keep_BF)

    def pyramid(self, image_BCHW: Tensor, drop_BR: Tensor | None = None) -> list[Tensor]:
        """Features (B, D, ., .) of the four blocks at x4, x2, x1 and x1/2 of the patch grid."""
        embedded = embed(self, image_BCHW)
        return self.rescaled([embedded, *block_outputs(self, embedded, drop_BR, self.layers[-1])])

    def rescaled(self, states: Sequence[Tensor]) -> list[Tensor]:
        """The same from the embeddings and outputs (B, 1 + N, D) of the blocks, up to the last one that is used."""
        maps = [states[layer][:, 1:].transpose(1, 2).unflatten(2, self.grid) for layer in self.layers]
        return [self.fpn1(maps[0]), self.fpn2(maps[1]), maps[2], F.max_pool2d(maps[3], 2)]

    def decode(self, pyramid: list[Tensor], keep_BF: Tensor | None = None) -> Maps:
        """Logits of both heads."""
        keep = keep_BF.split([self.channels, self.aux_channels], dim=1) if keep_BF is not None else (None, None)
        auxiliary = self.auxiliary_head(pyramid[2], keep[1]) if self.auxiliary_head else None
        return Maps(self.decode_head(pyramid, keep[0]), auxiliary)


def init_heads(part: nn.Module) -> None:
    """Initial weights and statistics of a decoder, or of a part of one."""
    for module in part.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d)):
            module.reset_parameters()


def _doubling(width: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(width, width, kernel_size=2, stride=2)


def _resized(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=False)


def _dropped(x_BFhw: Tensor, keep_BF: Tensor | None) -> Tensor:
    return x_BFhw if keep_BF is None else x_BFhw * keep_BF.to(x_BFhw.dtype)[:, :, None, None]
