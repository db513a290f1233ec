"""Visual tokenizers: images -> token ids of a codebook -> images (BEiT, section 2.2).

A tokenizer is frozen and in eval mode. It is a plain object, not an `nn.Module`, so Lightning leaves it out of the
checkpoint, the optimiser and DDP.
"""

from __future__ import annotations

import collections
import hashlib
import io
import json
import math
import re
import sys
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
import torch
from torch import Tensor, nn

from beit_pretrain.errors import UserError, first_line
from beit_pretrain.fileio import expand_home
from beit_pretrain.tokenizers.dalle_encoder import FusedEncoder

RECORD = "weights.json"  # size and SHA-256 of the files in its folder, recorded by `download`


class Tokenizer(Protocol):
    """Interface of a tokenizer. Shapes: B batch, N = (side / downsample)^2 tokens, row-major."""

    vocab_size: int
    downsample: int  # pixels of its view per token, each way
    in_chans: int  # channels of the images it was trained on

    def encode(self, image_BCHW: Tensor) -> Tensor:
        """Ids (B, N) int64 of float32 images in [0, 1]."""

    def decode(self, ids_BN: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] of square id grids (B, N)."""

    def to(self, device: torch.device) -> Tokenizer:
        """Move the weights; returns itself."""

    def digest(self) -> str:
        """SHA-256 of what the ids depend on: equal for equal weights, from any file."""


def weights_digest(network: nn.Module) -> str:
    """SHA-256 over names, shapes and float32 values of a network's tensors."""
    sha = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        values = tensor.detach().float().cpu().contiguous().numpy()
        sha.update(f"{name} {list(values.shape)} ".encode())
        sha.update(values.data)
    return sha.hexdigest()


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
    """Images with as many channels as the tokenizer takes: grey is repeated, surplus channels are dropped."""
    if image_BCHW.shape[1] == 1:
        return image_BCHW.expand(-1, channels, -1, -1)
    return image_BCHW[:, :channels]


def check_channels(tokenizer: Tokenizer, channels: int) -> None:
    """Raise UserError if the tokenizer cannot encode images with this number of channels."""
    if (channels != 1 and channels < tokenizer.in_chans) or tokenizer.in_chans == 1 < channels:
        raise UserError(f"the tokenizer takes images of {tokenizer.in_chans} channels, but data.channels={channels}")


def square_grid(ids_BN: Tensor) -> Tensor:
    """Ids (B, N) as (B, h, w) with h = w."""
    side = math.isqrt(ids_BN.shape[1])
    if side * side != ids_BN.shape[1]:
        raise ValueError(f"{ids_BN.shape[1]} tokens are no square grid")
    return ids_BN.unflatten(1, (side, side))


def codebook_use(counts_V: Tensor) -> dict[str, float]:
    """Perplexity and number of distinct tokens of a histogram (V,); both are small if the codebook has collapsed.

    Perplexity is exp of the entropy in nats: V for a codebook used evenly, 1 for a single token.
    """
    p_V = counts_V.double() / counts_V.sum().clamp(min=1)
    entropy = -(p_V * p_V.clamp(min=1e-12).log()).sum()
    return {"codebook_perplexity": entropy.exp().item(), "codebook_distinct": int((counts_V > 0).sum())}


class OpenAITokenizer:
    """OpenAI's dVAE of DALL-E (8192 tokens, 8 pixels a token each way).

    Reads `encoder.safetensors` and `decoder.safetensors`, which `download` makes from OpenAI's `encoder.pkl` and
    `decoder.pkl`. If they are missing, the pickles are read with `pickled_tensors`. Files that `download` recorded must
    still have the recorded size and SHA-256. Convolutions run in fp16 on CUDA, as in the release, and in fp32 on a CPU;
    the output is fp32 on both (`dalle_encoder.py`).

    Args:
        path: folder with the encoder and, for decoding to images, the decoder.
        encoder: in the place of the folder's, in memory.
    """

    downsample = 8

    def __init__(self, path: str | Path, encoder: nn.Module | None = None):
        self.path = expand_home(path)
        encoder = read_module(self.path, "encoder") if encoder is None else encoder
        self.encoder = encoder
        self.vocab_size = int(encoder.get_parameter("blocks.output.conv.w").shape[0])
        self.in_chans = int(encoder.get_parameter("blocks.input.w").shape[1])
        self._fused: FusedEncoder | None = None
        self._decoder: nn.Module | None = None
        self.device = torch.device("cpu")

    @classmethod
    def of(cls, encoder: nn.Module) -> OpenAITokenizer:
        """A tokenizer from an encoder of the `dall_e` package in memory; it cannot decode."""
        return cls("(in memory)", encoder)

    def to(self, device: torch.device) -> OpenAITokenizer:
        """Prepare the encoder's weights for a device. This must not happen inside a compiled step or a CUDA graph."""
        self.device = torch.device(device)
        if self._fused is None or self._fused.device != self.device:
            self._fused = FusedEncoder(self.encoder, self.device)
        if self._decoder is not None:
            self._decoder.to(device)
        return self

    def digest(self) -> str:
        return weights_digest(self.encoder)

    @torch.no_grad()
    def encode(self, image_BCHW: Tensor) -> Tensor:
        from dall_e import map_pixels

        # Outside autocast: the package casts by itself, and bf16 logits would change the argmax.
        with torch.autocast(image_BCHW.device.type, enabled=False):
            return self.fused(map_pixels(with_channels(image_BCHW.float(), self.in_chans))).argmax(1).flatten(1)

    @property
    def fused(self) -> FusedEncoder:
        """The encoder prepared for the device (a copy of the weights); made by `to`, or at first use."""
        if self._fused is None:
            self.to(self.device)
        assert self._fused is not None
        return self._fused

    @torch.no_grad()
    def decode(self, ids_BN: Tensor) -> Tensor:
        from dall_e import unmap_pixels

        one_hot = nn.functional.one_hot(square_grid(ids_BN), self.vocab_size).permute(0, 3, 1, 2).float()
        with torch.autocast(ids_BN.device.type, enabled=False):
            # The first three of the six output channels are the means of the logit-Laplace distribution.
            return unmap_pixels(torch.sigmoid(self.decoder(one_hot).float()[:, :3]))

    @property
    def decoder(self) -> nn.Module:
        """The decoder, read at first use: training needs only the encoder."""
        if self._decoder is None:
            self._decoder = read_module(self.path, "decoder").to(self.device)
        return self._decoder


def read_module(folder: Path, kind: str) -> nn.Module:
    """The frozen "encoder" or "decoder" of a folder. Raises UserError if it is missing, changed or not this network."""
    file = folder / f"{kind}.safetensors"
    if file.exists():
        return build(safe_tensors(read_verified(file), kind, file), kind, file)
    file = folder / f"{kind}.pkl"
    if not file.is_file():
        raise UserError(
            f"tokenizer.path: {file} does not exist; get OpenAI's files with: python -m beit_pretrain download "
            f"out={folder} (data/README.md says more), or train a tokenizer of your own with: fit +experiment=tokenizer"
        )
    module = build(pickled_tensors(read_verified(file), kind, file), kind, file)
    if kind == "encoder":  # one hint per folder is enough
        hint = f"convert it once to safetensors with: python -m beit_pretrain download out={folder}"
        print(f"{file} was read as a pickle, nothing in it was executed; {hint}", file=sys.stderr, flush=True)
    return module


def recorded(folder: Path) -> dict[str, dict[str, Any]]:
    """File name -> {"bytes", "sha256", "source"} of the folder's record; empty without one."""
    file = folder / RECORD
    if not file.exists():
        return {}
    try:
        record = json.loads(file.read_text())
        if all(type(entry["bytes"]) is int and isinstance(entry["sha256"], str) for entry in record.values()):
            return record
        reason = "a size or checksum is invalid"
    except (ValueError, AttributeError, TypeError, KeyError, RecursionError) as error:
        reason = first_line(error)
    raise UserError(
        f"{file} is no record of weights ({reason}); delete it and run: python -m beit_pretrain download out={folder}"
    )


def read_verified(file: Path) -> bytes:
    """The bytes of a file. Raises UserError if they do not match the folder's record; without an entry, no check."""
    entry = recorded(file.parent).get(file.name)
    data = file.read_bytes()  # check and use the same bytes, even if the file changes
    if entry and (len(data) != entry["bytes"] or hashlib.sha256(data).hexdigest() != entry["sha256"]):
        same_size = len(data) == entry["bytes"]
        found = "another SHA-256" if same_size else f"{len(data)} bytes, not {entry['bytes']}"
        raise UserError(
            f"{file} has changed since it was recorded in {RECORD}: {found}; delete it and run: "
            f"python -m beit_pretrain download out={file.parent}"
        )
    return data


def safe_tensors(data: bytes, kind: str, source: Path | str) -> dict[str, Tensor]:
    """Names and tensors of a safetensors file's bytes."""
    try:
        return safetensors.torch.load(data)
    except Exception as error:  # a damaged header may raise anything
        raise UserError(f"{source} is not a safetensors file of the {kind}: {first_line(error)}") from error


def pickled_tensors(data: bytes, kind: str, source: Path | str) -> dict[str, Tensor]:
    """Names and tensors of OpenAI's pickled "encoder" or "decoder"; nothing in the pickle is executed.

    They are read with `torch.load(weights_only=True)` and an allow-list of the `dall_e` package's classes.
    """
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
    wrong = f"{source} is not OpenAI's {kind}.pkl"
    if not data:
        raise UserError(f"{wrong}: it is empty")
    if data[:512].lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise UserError(f"{wrong}: it is a web page")
    try:
        with torch.serialization.safe_globals(allowed):
            module = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        found = type(module).__name__
        tensors = dict(_walk(module)) if found == kind.capitalize() else {}
        stored = sum(t.nbytes for t in tensors.values())
    except Exception as error:  # a damaged or hostile pickle may raise anything
        raise UserError(f"{wrong}: {first_line(error)}") from error
    if not tensors:
        raise UserError(f"{source} holds a {found}, not the {kind.capitalize()} of the dall_e package")
    if stored > len(data):
        raise UserError(f"{wrong}: it names more numbers than it holds")
    return tensors


def _walk(module: nn.Module, prefix: str = ""):
    # Not state_dict(): a module pickled by an old torch may lack what today's state_dict() looks for.
    for name, parameter in module.__dict__.get("_parameters", {}).items():
        yield prefix + name, parameter.detach()
    for name, child in module.__dict__.get("_modules", {}).items():
        yield from _walk(child, f"{prefix}{name}.")


def build(tensors: dict[str, Tensor], kind: str, source: Path | str) -> nn.Module:
    """A frozen module of the `dall_e` package with the given tensors; their shapes determine its sizes."""
    from dall_e.decoder import Decoder
    from dall_e.encoder import Encoder

    # On the meta device: hostile shapes allocate no memory, and no weights are initialised only to be replaced.
    meta = {"device": torch.device("meta")}
    try:
        blocks = len({m[1] for name in tensors if (m := re.search(r"group_1\.block_(\d+)\.", name))})
        w_in, w_out = tensors["blocks.input.w"], tensors["blocks.output.conv.w"]
        if kind == "encoder":
            module: nn.Module = Encoder(
                n_hid=w_in.shape[0],
                n_blk_per_group=blocks,
                input_channels=w_in.shape[1],
                vocab_size=w_out.shape[0],
                **meta,
            )
        else:
            module = Decoder(
                n_init=w_in.shape[0],
                n_hid=w_out.shape[1],
                n_blk_per_group=blocks,
                output_channels=w_out.shape[0] // 2,
                vocab_size=w_in.shape[1],
                **meta,
            )
        module.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    except Exception as error:  # shapes and names may be anything
        missing = f"it has no {error}" if isinstance(error, KeyError) else first_line(error)
        raise UserError(f"{source} does not have the tensors of OpenAI's {kind}: {missing}") from error
    return module.eval().requires_grad_(False)
