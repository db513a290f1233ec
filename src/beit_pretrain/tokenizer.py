"""Visual tokenizers: images -> token ids of a codebook -> images (BEiT, section 2.2).

A tokenizer is frozen, in eval mode and no part of the model that trains: it is a plain object and not an `nn.Module`,
so Lightning puts it neither into the checkpoint, nor into the optimiser, nor into DDP.
"""

from __future__ import annotations

import collections
import math
import re
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from beit_pretrain.errors import UserError, first_line


class Tokenizer(Protocol):
    """What the pre-training asks of a tokenizer. B batch, N = (side / downsample)^2 tokens, row-major."""

    vocab_size: int
    downsample: int  # pixels of its view per token, each way
    in_chans: int  # channels of the images it was trained on

    def encode(self, image_BCHW: Tensor) -> Tensor:
        """Ids (B, N) int64 of float32 images in [0, 1]."""
        ...

    def decode(self, ids_BN: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] of square id grids (B, N)."""
        ...

    def to(self, device: torch.device) -> Tokenizer:
        """Move the weights; returns itself."""
        ...


def view_size(grid: tuple[int, int], tokenizer: Tokenizer, asked: int | None = None) -> int:
    """Side in pixels of the tokenizer's view such that every patch of `grid` has one token.

    Raises UserError if `asked` (the config's `data.token_image_size`) gives another number of tokens.
    """
    size = grid[0] * tokenizer.downsample
    if asked is not None and asked != size:
        raise UserError(
            f"data.token_image_size={asked} gives {asked / tokenizer.downsample:g} x {asked / tokenizer.downsample:g} "
            f"tokens for {grid[0]} x {grid[1]} patches; one token per patch needs data.token_image_size={size}"
        )
    return size


def with_channels(image_BCHW: Tensor, channels: int) -> Tensor:
    """Images for a tokenizer of so many channels: grey is repeated, of more channels the first ones are taken."""
    if image_BCHW.shape[1] == 1:
        return image_BCHW.expand(-1, channels, -1, -1)
    return image_BCHW[:, :channels]


def check_channels(tokenizer: Tokenizer, channels: int) -> None:
    """Raise UserError if the tokenizer cannot see images of so many channels."""
    if (channels != 1 and channels < tokenizer.in_chans) or tokenizer.in_chans == 1 < channels:
        raise UserError(f"the tokenizer takes images of {tokenizer.in_chans} channels, but data.channels={channels}")


def square_grid(ids_BN: Tensor) -> Tensor:
    """Ids (B, N) as (B, h, w) with h = w."""
    side = math.isqrt(ids_BN.shape[1])
    if side * side != ids_BN.shape[1]:
        raise ValueError(f"{ids_BN.shape[1]} tokens are no square grid")
    return ids_BN.unflatten(1, (side, side))


def codebook_use(counts_V: Tensor) -> dict[str, float]:
    """Perplexity and number of distinct tokens of a histogram (V,): a collapsed codebook shows at once.

    Perplexity is exp of the entropy in nats: V for a codebook used evenly, 1 for a single token.
    """
    p_V = counts_V.double() / counts_V.sum().clamp(min=1)
    entropy = -(p_V * p_V.clamp(min=1e-12).log()).sum()
    return {"codebook_perplexity": entropy.exp().item(), "codebook_distinct": int((counts_V > 0).sum())}


class OpenAITokenizer:
    """OpenAI's dVAE of DALL-E (8192 tokens, 8 pixels a token each way), from its `encoder.pkl` and `decoder.pkl`.

    The files are pickled modules. Only tensors are taken from them, through `torch.load(weights_only=True)` with an
    allow-list of the `dall_e` package's classes; the modules are built anew, so that old pickles work with new torch.
    Convolutions run in fp16 on CUDA, as in the release, and in fp32 on a CPU; the output convolution is always fp32.

    Args:
        path: folder with `encoder.pkl` and, for decoding to pictures, `decoder.pkl`.
    """

    downsample = 8

    def __init__(self, path: str | Path):
        self.path = Path(path)
        tensors = _pickled_tensors(self.path / "encoder.pkl", "Encoder")
        self.encoder = _build(tensors, "encoder", self.path / "encoder.pkl")
        self.vocab_size = int(tensors["blocks.output.conv.w"].shape[0])
        self.in_chans = int(tensors["blocks.input.w"].shape[1])
        self._decoder: nn.Module | None = None
        self.device = torch.device("cpu")

    def to(self, device: torch.device) -> OpenAITokenizer:
        self.device = torch.device(device)
        self.encoder.to(device)
        if self._decoder is not None:
            self._decoder.to(device)
        return self

    @torch.no_grad()
    def encode(self, image_BCHW: Tensor) -> Tensor:
        from dall_e import map_pixels

        # Outside autocast: the package casts by itself, and bf16 logits would change the argmax.
        with torch.autocast(image_BCHW.device.type, enabled=False):
            return self.encoder(map_pixels(with_channels(image_BCHW.float(), self.in_chans))).argmax(1).flatten(1)

    @torch.no_grad()
    def decode(self, ids_BN: Tensor) -> Tensor:
        from dall_e import unmap_pixels

        one_hot = nn.functional.one_hot(square_grid(ids_BN), self.vocab_size).permute(0, 3, 1, 2).float()
        with torch.autocast(ids_BN.device.type, enabled=False):
            # Of its six channels the first three are the means of the logit-Laplace distribution.
            return unmap_pixels(torch.sigmoid(self.decoder(one_hot).float()[:, :3]))

    @property
    def decoder(self) -> nn.Module:
        """The decoder, read at first use: training needs the encoder alone."""
        if self._decoder is None:
            file = self.path / "decoder.pkl"
            self._decoder = _build(_pickled_tensors(file, "Decoder"), "decoder", file).to(self.device)
        return self._decoder


def _pickled_tensors(file: Path, kind: str) -> dict[str, Tensor]:
    """Names and tensors of the module pickled in `file`; nothing in the file is executed."""
    if not file.is_file():
        raise UserError(
            f"tokenizer.path: {file} does not exist; put OpenAI's encoder.pkl and decoder.pkl there (data/README.md "
            "says where they come from), or train a tokenizer of your own with: fit +experiment=tokenizer"
        )
    import dall_e.decoder
    import dall_e.encoder
    import dall_e.utils

    allowed = [
        dall_e.encoder.Encoder,
        dall_e.encoder.EncoderBlock,
        dall_e.decoder.Decoder,
        dall_e.decoder.DecoderBlock,
        dall_e.utils.Conv2d,
        collections.OrderedDict,
        *(nn.Sequential, nn.ReLU, nn.MaxPool2d, nn.Upsample, nn.Identity, nn.Parameter),
    ]
    try:
        with torch.serialization.safe_globals(allowed):
            module = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile pickle may raise anything
        raise UserError(f"{file} is not OpenAI's {kind.lower()}.pkl: {first_line(error)}") from error
    if type(module).__name__ != kind:
        raise UserError(f"{file} holds a {type(module).__name__}, not the {kind} of the dall_e package")
    return dict(_walk(module))


def _walk(module: nn.Module, prefix: str = ""):
    # Not state_dict(): a module pickled by an old torch may lack what today's state_dict() looks for.
    for name, parameter in module.__dict__.get("_parameters", {}).items():
        yield prefix + name, parameter.detach()
    for name, child in module.__dict__.get("_modules", {}).items():
        yield from _walk(child, f"{prefix}{name}.")


def _build(tensors: dict[str, Tensor], kind: str, file: Path) -> nn.Module:
    """A fresh frozen module of the `dall_e` package with the given tensors; sizes are read off their shapes."""
    from dall_e.decoder import Decoder
    from dall_e.encoder import Encoder

    try:
        blocks = max(int(m[1]) for name in tensors if (m := re.search(r"group_1\.block_(\d+)\.", name)))
        w_in, w_out = tensors["blocks.input.w"], tensors["blocks.output.conv.w"]
        if kind == "encoder":
            module: nn.Module = Encoder(
                n_hid=w_in.shape[0], n_blk_per_group=blocks, input_channels=w_in.shape[1], vocab_size=w_out.shape[0]
            )
        else:
            module = Decoder(
                n_init=w_in.shape[0],
                n_hid=w_out.shape[1],
                n_blk_per_group=blocks,
                output_channels=w_out.shape[0] // 2,
                vocab_size=w_in.shape[1],
            )
        module.load_state_dict(tensors)
    except (KeyError, ValueError, RuntimeError) as error:
        raise UserError(f"{file} does not have the tensors of OpenAI's {kind}: {first_line(error)}") from error
    return module.eval().requires_grad_(False)
