"""Attention maps against the output of the blocks and against transformers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from foreign import hf_config, scrambled

from beit_pretrain.models.attention_probabilities import probabilities
from beit_pretrain.models.backbone import MaskedImageModel
from beit_pretrain.models.checkpoints.pretrained import load_pretrained
from beit_pretrain.visualization.attention_maps import attention_maps

SIZE = {"image_size": 32, "patch_size": 8, "vocab_size": 16, "embed_dim": 32, "depth": 3, "num_heads": 4}


@pytest.mark.parametrize("bias", ["shared", "per_layer", "none"])
def test_attention_maps_reproduce_block_output(bias):
    model = scrambled(MaskedImageModel(rel_pos_bias=bias, **SIZE)).eval()
    attention, x = model.blocks[1].attn, torch.randn(2, 17, 32)
    shared = model.rel_pos_bias() if bias == "shared" else None
    maps = probabilities(attention, x, shared)
    assert maps.shape == (2, 4, 17, 17)
    assert torch.allclose(maps.sum(-1), torch.ones(2, 4, 17), atol=1e-5)
    value = F.linear(x, attention.qkv.weight[64:], attention.v_bias).unflatten(2, (4, 8)).transpose(1, 2)
    expected = attention.proj((maps @ value).transpose(1, 2).flatten(2))
    assert torch.allclose(attention(x, shared_rel_pos_bias=shared), expected, atol=1e-5)


@pytest.mark.parametrize("bias", ["shared", "per_layer"])
def test_attention_maps_match_transformers(bias, tmp_path):
    from transformers import BeitModel

    config = hf_config(bias=bias, num_hidden_layers=3)
    config._attn_implementation = "eager"
    theirs = scrambled(BeitModel(config)).eval()
    theirs.save_pretrained(tmp_path)
    mine, image = load_pretrained(tmp_path), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = theirs(image, output_attentions=True).attentions
    found = attention_maps(mine, image, [1, 3])
    assert sorted(found) == [1, 3]
    for layer in found:
        assert torch.allclose(found[layer], expected[layer - 1], atol=1e-5)
