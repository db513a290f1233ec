"""A faster version of the `dall_e` package's encoder, with weights prepared once for one device.

The package converts every weight and scales every residual path at each call. Here this happens once, when the weights
are moved to a device:
* CPU: weights in oneDNN's blocked layout, everything in float32 (`models/cpu_kernels.py` has the switch).
* CUDA: convolutions in fp16, channels last, as in the release, each fused with its bias and ReLU. The output
  convolution, float32 in the release, is one fp16 matrix product with float32 sums: each weight is split into two fp16
  numbers whose sum is exact to 2^-22. Its input is fp16 already, so only the sums are rounded. cuDNN's float32
  convolution would use TF32 (2^-11) by default and choose other tokens at near-ties.

Shapes: B batch, C channels, H W pixels, V vocabulary, h w = H/8, W/8, N = h w.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit_pretrain.errors import first_line
from beit_pretrain.models import cpu_kernels

FUSED_OFF = 0.01  # largest accepted error of a fused kernel, relative to the largest output
FP16_TOP = 2.0**15  # weights are scaled by a power of two to just below this, so that their low halves do not underflow


@torch.library.custom_op("beit_pretrain::conv_relu", mutates_args=(), device_types="cuda")
def conv_relu(x_BCHW: Tensor, weight: Tensor, bias: Tensor, padding: int) -> Tensor:
    """Convolution of stride 1 with bias, then ReLU; in one cuDNN kernel if that works for the shapes."""
    shapes = (x_BCHW.device, x_BCHW.dtype, x_BCHW.shape, weight.shape)
    if shapes not in _FUSED:
        _FUSED[shapes] = one_kernel_works(x_BCHW, weight, bias, padding)
    way = in_one_kernel if _FUSED[shapes] else in_two_kernels
    return way(x_BCHW, weight, bias, padding)


_FUSED: dict[tuple, bool] = {}  # shapes -> whether cuDNN's fused kernel works for them


def in_one_kernel(x_BCHW: Tensor, weight: Tensor, bias: Tensor, padding: int) -> Tensor:
    one = [1, 1]
    return torch.cudnn_convolution_relu(x_BCHW, weight, bias, one, [padding] * 2, one, 1)


@conv_relu.register_kernel("cpu")
def in_two_kernels(x_BCHW: Tensor, weight: Tensor, bias: Tensor, padding: int) -> Tensor:
    return F.relu_(F.conv2d(x_BCHW, weight, bias, padding=padding))


def one_kernel_works(x_BCHW: Tensor, weight: Tensor, bias: Tensor, padding: int) -> bool:
    """Whether cuDNN has a fused kernel for these shapes that gives correct results. Prints a warning if not.

    torch adds the old content of the output's memory, times zero. To test this, that memory holds NaN first.
    """
    expected = in_two_kernels(x_BCHW, weight, bias, padding)
    try:
        poison = torch.full_like(expected, torch.nan)
        del poison
        found = in_one_kernel(x_BCHW, weight, bias, padding)
        if bool((found - expected).abs().max() <= FUSED_OFF * expected.abs().max()):  # False for NaN
            return True
        reason = "other numbers"
    except (RuntimeError, NotImplementedError) as error:
        reason = first_line(error)
    shape = "x".join(map(str, weight.shape))
    print(f"warning: the tokenizer's {shape} convolutions are not fused with ReLU ({reason})", file=sys.stderr)
    return False


@conv_relu.register_fake
def _(x_BCHW: Tensor, weight: Tensor, bias: Tensor, padding: int) -> Tensor:
    shape = (x_BCHW.shape[0], weight.shape[0], *x_BCHW.shape[2:])
    return x_BCHW.new_empty(shape).to(memory_format=torch.channels_last)


class Convolution(NamedTuple):
    """Weights of a convolution that keeps the image's size."""

    weight: Tensor
    bias: Tensor
    padding: int
    fused: bool  # with the ReLU that follows, if any

    def __call__(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, padding=self.padding)

    def relu(self, x: Tensor) -> Tensor:
        """The convolution, then ReLU."""
        return conv_relu(x, self.weight, self.bias, self.padding) if self.fused else F.relu_(self(x))


class Block(NamedTuple):
    """A residual block: identity or a 1x1 convolution, plus ReLU and convolution four times."""

    identity: Convolution | None
    path: list[Convolution]

    def __call__(self, x: Tensor) -> Tensor:
        out = F.relu(x)
        for convolution in self.path[:-1]:
            out = convolution.relu(out)
        return self.path[-1](out) + (x if self.identity is None else self.identity(x))


class SplitProduct:
    """A 1x1 convolution of fp16 images with float32 weights (V, C, 1, 1): one product in fp16, summed in float32.

    W * scale = high + low, both fp16, and [x, x] [low, high]^T / scale + b is the result, exact to 2^-22 of W. The low
    halves are summed first: tensor cores round sums towards zero, and the error is smaller while the sums are small.
    """

    def __init__(self, weight_VC11: Tensor, bias_V: Tensor):
        weight_VC = weight_VC11.flatten(1)
        self.scale = (FP16_TOP / weight_VC.abs().max().clamp(min=1e-30)).log2().floor().exp2()
        scaled = weight_VC * self.scale
        high = scaled.half()
        low = (scaled - high.float()).half()
        self.weight_2CV = torch.cat([low, high], 1).contiguous().t()
        self.bias_V = bias_V

    def __call__(self, x_BChw: Tensor) -> Tensor:
        """(B, V, h, w) float32, V innermost in memory."""
        x_MC = x_BChw.permute(0, 2, 3, 1).flatten(0, 2)
        twice_M2C = torch.cat([x_MC, x_MC], 1)
        if x_MC.is_cuda:
            out_MV = torch.mm(twice_M2C, self.weight_2CV, out_dtype=torch.float32)
        else:  # the same result: products of fp16 numbers are exact in float32
            out_MV = twice_M2C.float() @ self.weight_2CV.float()
        out_MV = out_MV / self.scale + self.bias_V
        batch, _, height, width = x_BChw.shape
        return out_MV.unflatten(0, (batch, height, width)).permute(0, 3, 1, 2)


class FusedEncoder:
    """Logits of an encoder of the `dall_e` package, from weights prepared for one device.

    Args:
        encoder: the package's module; it is not changed, and not needed afterwards.
        device: the device it runs on.
        half: convolutions in fp16, with a `SplitProduct` at the end; None = on CUDA.
    """

    def __init__(self, encoder: nn.Module, device: torch.device, half: bool | None = None):
        self.device = device
        self.half = device.type == "cuda" if half is None else half
        self.blocked = cpu_kernels.active(device) and not self.half and torch.backends.mkldnn.is_available()
        # cuDNN's fused kernel may use any algorithm: it ignores torch's determinism setting.
        self.fused = self.half and not torch.are_deterministic_algorithms_enabled()
        blocks: Any = encoder.blocks
        self.input = self._prepared(blocks.input)
        self.groups = [
            [self._block(block) for name, block in group.named_children() if name != "pool"]
            for group in (blocks.group_1, blocks.group_2, blocks.group_3, blocks.group_4)
        ]
        last = blocks.output.conv
        self.output: Convolution | SplitProduct = (
            SplitProduct(*(self._moved(t) for t in (last.w, last.b))) if self.half else self._prepared(last)
        )

    def _block(self, block: Any) -> Block:
        path = block.res_path
        convolutions = [self._prepared(c) for c in (path.conv_1, path.conv_2, path.conv_3)]
        identity = None if isinstance(block.id_path, nn.Identity) else self._prepared(block.id_path)
        return Block(identity, [*convolutions, self._prepared(path.conv_4, block.post_gain)])

    def _moved(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to(self.device, torch.float32)

    def _prepared(self, convolution: Any, gain: float = 1.0) -> Convolution:
        weight, bias = (self._moved(t) * gain for t in (convolution.w, convolution.b))
        if self.half:
            weight, bias = weight.half(), bias.half()
        padding = (convolution.kw - 1) // 2
        if self.blocked:
            return Convolution(weight.to_mkldnn(), bias.to_mkldnn(), padding, False)
        return Convolution(weight.contiguous(memory_format=torch.channels_last), bias, padding, self.fused)

    def __call__(self, image_BCHW: Tensor) -> Tensor:
        """Logits (B, V, h, w) float32 of images after `map_pixels`."""
        return self._uncompiled(image_BCHW) if self.blocked else self._logits(image_BCHW)

    @torch.compiler.disable
    def _uncompiled(self, image_BCHW: Tensor) -> Tensor:  # it does not support oneDNN layouts
        return self._logits(image_BCHW)

    def _logits(self, image_BCHW: Tensor) -> Tensor:
        x = image_BCHW.half() if self.half else image_BCHW
        x = self.input(x.to_mkldnn() if self.blocked else x.contiguous(memory_format=torch.channels_last))
        for number, group in enumerate(self.groups):
            x = F.max_pool2d(x, 2) if number else x
            for block in group:
                x = block(x)
        logits = self.output(F.relu(x))
        return logits.to_dense() if self.blocked else logits
