"""Compares the models of `beit_pretrain.library` with transformers', for the tests and for larger grids by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from foreign import hf_config, scrambled
from torch import Tensor

import beit_pretrain

NAMES = ("BeitModel", "BeitForMaskedImageModeling", "BeitForImageClassification", "BeitForSemanticSegmentation")
BIASES = ("shared", "per_layer", "none")


def theirs_of(name: str, **settings: Any) -> Any:
    """A model of transformers with random tensors and statistics, whose attention gives its probabilities."""
    import transformers

    if name == "BeitForMaskedImageModeling":
        settings |= {"use_mask_token": True}
    if name == "BeitForSemanticSegmentation":
        settings = {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4], "auxiliary_channels": 16} | settings
    model = scrambled(getattr(transformers, name)(hf_config(**settings)))
    generator = torch.Generator().manual_seed(2)
    for key, buffer in sorted(model.named_buffers()):
        if key.endswith("running_mean"):
            buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.2)
        elif key.endswith("running_var"):
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    model.set_attn_implementation("eager")
    return model


def inputs_of(name: str, config: Any, size: tuple[int, int], batch: int = 2) -> dict[str, Tensor]:
    """Images, mask and labels."""
    generator = torch.Generator().manual_seed(3)
    found = {"pixel_values": torch.randn(batch, config.num_channels, *size, generator=generator)}
    patches = (size[0] // config.patch_size) * (size[1] // config.patch_size)
    if config.use_mask_token:
        mask = torch.rand(batch, patches, generator=generator) < 0.4
        mask[:, 0] = True
        found["bool_masked_pos"] = mask
    if name == "BeitForMaskedImageModeling":
        found["labels"] = torch.randint(config.vocab_size, (int(mask.sum()),), generator=generator)
    if name == "BeitForImageClassification":
        found["labels"] = torch.randint(config.num_labels, (batch,), generator=generator)
    if name == "BeitForSemanticSegmentation":
        labels = torch.randint(config.num_labels, (batch, size[0] + 3, size[1] - 5), generator=generator)
        labels[:, :4] = 255
        found["labels"] = labels
    return found


def flat(value: Any) -> list[Tensor]:
    """All tensors of an output."""
    return [value] if isinstance(value, Tensor) else [tensor for part in value for tensor in flat(part)]


def largest_difference(name: str, theirs: Any, folder: Path, size: tuple[int, int] | None = None) -> float:
    """The largest difference of any output, absolute for numbers up to 1 and relative above.

    Logits of label maps, behind ten convolutions that sum thousands of numbers, are relative to the largest of them:
    against float64, transformers' and ours differ by as much (measured: 1.3e-5 to 2.8e-5 of numbers up to 28).
    """
    theirs.save_pretrained(folder)
    ours = getattr(beit_pretrain, name).from_pretrained(folder)
    native = theirs.config.image_size
    native = (native, native) if isinstance(native, int) else tuple(native)
    given = inputs_of(name, theirs.config, size or native)
    asked = {"output_hidden_states": True, "output_attentions": True}
    asked |= {"interpolate_pos_encoding": True} if size else {}
    with torch.no_grad():
        expected, found = theirs(**given, **asked), ours(**given, **asked)
    assert list(found.keys()) == list(expected.keys())
    worst = 0.0
    for key, value in expected.items():
        for one, other in zip(flat(found[key]), flat(value), strict=True):
            assert one.shape == other.shape, (key, one.shape, other.shape)
            scale = other.abs().max() if other.ndim == 4 and key == "logits" else other.abs()
            worst = max(worst, ((one - other).abs() / scale.clamp(min=1)).max().item())
    return worst
