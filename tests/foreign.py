"""Checkpoints in other formats, made by their own libraries or after the description of their files."""

from __future__ import annotations

from pathlib import Path

import torch
from timm.models.beit import Beit, gen_relative_position_index
from torch import nn

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2}


def scrambled(model: nn.Module, seed: int = 1, std: float = 0.1) -> nn.Module:
    """Make every parameter random: initial tables, biases and norms are 0 or 1 and would hide a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            # In timm and transformers k has no bias, and in no file has it one.
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std + ("norm" in name))
    return model.eval()


def timm_beit(image_size=32, patch_size=8, bias="per_layer", absolute=False, scale=0.1, pool="avg", classes=7) -> Beit:
    return scrambled(
        Beit(
            img_size=image_size,
            patch_size=patch_size,
            **SMALL,
            num_classes=classes,
            global_pool=pool,
            init_values=scale,
            use_abs_pos_emb=absolute,
            use_rel_pos_bias=bias == "per_layer",
            use_shared_rel_pos_bias=bias == "shared",
        )
    )


def hf_config(image_size=32, patch_size=8, bias="shared", absolute=False, scale=0.1, **extra):
    from transformers import BeitConfig

    settings = dict(
        image_size=image_size,
        patch_size=patch_size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        vocab_size=64,
        use_shared_relative_position_bias=bias == "shared",
        use_relative_position_bias=bias == "per_layer",
        use_absolute_position_embeddings=absolute,
        layer_scale_init_value=scale or 0.0,
    )
    return BeitConfig(**settings | extra)


def hf_mim(**settings):
    from transformers import BeitForMaskedImageModeling

    return scrambled(BeitForMaskedImageModeling(hf_config(use_mask_token=True, **settings)))


def hf_classifier(pool="avg", classes=7, **settings):
    from transformers import BeitForImageClassification

    settings = {"bias": "per_layer", **settings}
    return scrambled(
        BeitForImageClassification(hf_config(num_labels=classes, use_mean_pooling=pool == "avg", **settings))
    )


def unilm_file(path: Path, state: dict[str, torch.Tensor], grid=(4, 4), **more) -> Path:
    """As the authors' scripts write: the state dict under "model", with index buffers beside every table."""
    index = gen_relative_position_index(grid)
    state = dict(state)
    for name in list(state):
        if name.endswith("relative_position_bias_table"):
            state[name.replace("bias_table", "index")] = index
    torch.save({"model": state, **more}, path)
    return path
