"""Drop path by position: the numbers, their distribution, and what is dropped."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from timm.layers import DropPath
from tiny import MIM, seeded

from beit_pretrain.models.backbone import MaskedImageModel
from beit_pretrain.models.blocks import residual
from beit_pretrain.models.drop_path import uniforms


def reference(seed: int, position: int, branches: int) -> list[float]:
    """SplitMix64 on Python's whole numbers."""

    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
        return x ^ (x >> 31)

    key = mix((position + (seed + 1) * 0x9E3779B97F4A7C15) % 2**64)
    return [(mix((key + i * 0x9E3779B97F4A7C15) % 2**64) >> 40) / 2**24 for i in range(1, branches + 1)]


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
def test_the_numbers(seed):
    positions = [0, 1, 7, 2**31, 2_129_568_300]
    drawn = uniforms(seed, torch.tensor(positions), 24)
    assert drawn.dtype == torch.float32
    assert drawn.tolist() == [reference(seed, p, 24) for p in positions]


def test_random_numbers_are_uniform_and_independent():
    drawn = uniforms(3, torch.arange(20_000), 24).double().numpy()
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert drawn.mean(0) == pytest.approx(0.5, abs=5 / np.sqrt(12 * 20_000))
    assert (drawn < 0.1).mean(0) == pytest.approx(0.1, abs=0.011)
    correlation = np.corrcoef(drawn.T) - np.eye(24)
    assert np.abs(correlation).max() < 0.035  # between branches
    assert abs(np.corrcoef(drawn[:-1].ravel(), drawn[1:].ravel())[0, 1]) < 0.01  # between neighbours
    assert abs(np.corrcoef(drawn.ravel(), uniforms(4, torch.arange(20_000), 24).numpy().ravel())[0, 1]) < 0.01


def test_residual_is_timms():
    x, kept = torch.randn(64, 3, 5), torch.rand(64)
    out = residual(x, lambda t: 2 * t, 0.25, kept)
    for i in range(64):
        expected = x[i] if kept[i] < 0.25 else x[i] + 2 * x[i] / 0.75
        assert torch.allclose(out[i], expected)
    torch.manual_seed(0)
    scales = sorted(set(DropPath(0.25)(torch.ones(64, 1)).flatten().tolist()))
    assert scales == pytest.approx([0.0, 1 / 0.75])
    assert torch.equal(residual(x, torch.sin, 0.0, kept), x + x.sin())
    assert torch.equal(residual(x, torch.sin, 0.5, None), x + x.sin())


def test_an_image_is_treated_alike_in_every_batch():
    model = seeded(MaskedImageModel, **{**MIM, "drop_path_rate": 0.5})
    positions = torch.arange(6)
    image, mask = torch.randn(6, 3, 32, 32), torch.rand(6, 16) < 0.4
    with torch.no_grad():
        whole = model.encode(image, mask, uniforms(0, positions, model.branches))
        parts = [
            model.encode(image[i : i + 1], mask[i : i + 1], uniforms(0, positions[i : i + 1], model.branches))
            for i in range(6)
        ]
        assert torch.allclose(whole, torch.cat(parts), atol=1e-5)
        assert not torch.allclose(whole, model.encode(image, mask), atol=1e-3)


def test_the_first_block_is_never_dropped_and_the_last_as_often_as_set():
    model = seeded(MaskedImageModel, **{**MIM, "depth": 3, "drop_path_rate": 0.4})
    assert [getattr(b.drop_path1, "drop_prob", 0.0) for b in model.blocks] == pytest.approx([0, 0.2, 0.4])
    drop = uniforms(0, torch.arange(500), 6)
    image = torch.randn(1, 3, 32, 32).expand(500, -1, -1, -1)
    with torch.no_grad():
        states = model.hidden_states(image, drop_BR=drop)
    kept = ((drop[:, 4:] >= 0.4).sum(1) > 0).float().mean()
    moved = (states[2] != states[1]).flatten(1).any(1).float().mean()
    assert moved == pytest.approx(kept.item(), abs=1e-6)
    assert (states[0] != image.new_zeros(1)).any()
