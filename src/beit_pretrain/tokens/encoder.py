"""OpenAI's encoder, arranged for the device it runs on: the same function as the `dall_e` package's, sooner.

The package converts every weight at every call, scales each residual path in a pass of its own, and leaves the layout
of images to chance. Here weights are brought into shape once: on a CPU into oneDNN's blocks, on a GPU into half
precision with channels innermost, but for the output convolution, which stays in single precision as the authors have
it. The scale of a residual path is multiplied into its last convolution.

Shapes: B batch, C channels, H W pixels, V vocabulary, h w = H/8, W/8.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Convolution(NamedTuple):
    """Weights of a convolution that keeps the image's size."""

    weight: Tensor
    bias: Tensor
    padding: int

    def __call__(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, padding=self.padding)


class Block(NamedTuple):
    """A residual block: identity or a 1x1 convolution, plus ReLU and convolution four times."""

    identity: Convolution | None
    path: list[Convolution]

    def __call__(self, x: Tensor) -> Tensor:
        out = F.relu(x)
        for convolution in self.path[:-1]:
            out = F.relu_(convolution(out))
        return self.path[-1](out) + (x if self.identity is None else self.identity(x))


class ArrangedEncoder:
    """Logits of an encoder of the `dall_e` package, from weights arranged for one device.

    Args:
        encoder: the package's module; it is not changed, and not needed afterwards.
        device: where it will run.
        half: convolutions but the output one in fp16; None = on CUDA, as in the release.
    """

    def __init__(self, encoder: nn.Module, device: torch.device, half: bool | None = None):
        self.device = device
        self.half = device.type == "cuda" if half is None else half
        self.blocked = device.type == "cpu" and not self.half and torch.backends.mkldnn.is_available()
        blocks: Any = encoder.blocks
        self.input = self._arranged(blocks.input)
        self.groups = [
            [self._block(block) for name, block in group.named_children() if name != "pool"]
            for group in (blocks.group_1, blocks.group_2, blocks.group_3, blocks.group_4)
        ]
        self.output = self._arranged(blocks.output.conv, output=True)

    def _block(self, block: Any) -> Block:
        path = block.res_path
        convolutions = [self._arranged(c) for c in (path.conv_1, path.conv_2, path.conv_3)]
        identity = None if isinstance(block.id_path, nn.Identity) else self._arranged(block.id_path)
        return Block(identity, [*convolutions, self._arranged(path.conv_4, block.post_gain)])

    def _arranged(self, convolution: Any, gain: float = 1.0, output: bool = False) -> Convolution:
        weight, bias = (t.detach().to(self.device, torch.float32) * gain for t in (convolution.w, convolution.b))
        if self.half and not output:
            weight, bias = weight.half(), bias.half()
        padding = (convolution.kw - 1) // 2
        if self.blocked:
            return Convolution(weight.to_mkldnn(), bias.to_mkldnn(), padding)
        return Convolution(weight.contiguous(memory_format=torch.channels_last), bias, padding)

    def __call__(self, image_BCHW: Tensor) -> Tensor:
        """Logits (B, V, h, w) float32 of images after `map_pixels`."""
        return self._uncompiled(image_BCHW) if self.blocked else self._logits(image_BCHW)

    @torch.compiler.disable
    def _uncompiled(self, image_BCHW: Tensor) -> Tensor:  # it knows no layout of oneDNN
        return self._logits(image_BCHW)

    def _logits(self, image_BCHW: Tensor) -> Tensor:
        x = image_BCHW.half() if self.half else image_BCHW
        x = self.input(x.to_mkldnn() if self.blocked else x.contiguous(memory_format=torch.channels_last))
        for number, group in enumerate(self.groups):
            x = F.max_pool2d(x, 2) if number else x
            for block in group:
                x = block(x)
        x = F.relu(x)
        return self.output(x).to_dense() if self.blocked else self.output(x.float())
