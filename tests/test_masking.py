"""Blockwise masking: the distribution of the release (masking_generator.py), and what holds on every grid."""

import math

import numpy as np
import pytest

from beit_pretrain.data.order import MASK, generator
from beit_pretrain.errors import UserError
from beit_pretrain.transforms.masking import BlockwiseMask

PAPER = BlockwiseMask((14, 14), 75)


@pytest.fixture(scope="module")
def draws() -> np.ndarray:
    """20,000 masks with the paper's settings, (20000, 14, 14)."""
    return np.stack([PAPER.draw(generator(0, position, MASK)) for position in range(20_000)])


def test_number_of_masked_patches(draws):
    counts = draws.sum((1, 2))
    assert counts.mean() == pytest.approx(74.47, abs=0.1)
    assert counts.max() == 75
    assert counts.min() >= 60
    assert (counts == 75).mean() == pytest.approx(0.666, abs=0.02)


def test_spatial_distribution(draws):
    share = draws.mean(0)
    assert share[6:8, 6:8] == pytest.approx(0.72, abs=0.02)
    assert share[[0, 0, -1, -1], [0, -1, 0, -1]] == pytest.approx(0.04, abs=0.01)
    # Nothing prefers a side: 0.02 is more than five standard errors of a share over 20,000 draws.
    assert share == pytest.approx(share[::-1], abs=0.02)
    assert share == pytest.approx(share[:, ::-1], abs=0.02)
    assert share == pytest.approx(share.T, abs=0.02)


def released_generator(rng: np.random.Generator) -> np.ndarray:
    """`MaskingGenerator` of the release, on the same random numbers."""
    mask, count = np.zeros((14, 14), int), 0
    while count < 75:
        left_over, delta = 75 - count, 0
        for _ in range(10):
            low, high = sorted((16, left_over))
            area = low + (high - low) * rng.random()
            aspect = math.exp(math.log(0.3) + (math.log(1 / 0.3) - math.log(0.3)) * rng.random())
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if w < 14 and h < 14:
                top, left = int((15 - h) * rng.random()), int((15 - w) * rng.random())  # uniform, both ends inclusive
                already = mask[top : top + h, left : left + w].sum()
                if 0 < h * w - already <= left_over:
                    delta += h * w - already
                    mask[top : top + h, left : left + w] = 1
                if delta > 0:
                    break
        if delta == 0:
            break
        count += delta
    return mask.astype(bool)


def test_equals_release_given_same_random_numbers():
    for position in range(200):
        expected = released_generator(generator(7, position, MASK))
        assert np.array_equal(PAPER.draw(generator(7, position, MASK)), expected)


@pytest.fixture(scope="module")
def independent() -> np.ndarray:
    """20,000 masks of the release's loops with another generator and seed."""
    rng = np.random.Generator(np.random.PCG64(12345))
    return np.stack([released_generator(rng) for _ in range(20_000)])


def test_distribution_equals_release_with_other_generator(draws, independent):
    counts = independent.sum((1, 2))
    assert counts.mean() == pytest.approx(74.47, abs=0.1)
    assert (counts == 75).mean() == pytest.approx(0.666, abs=0.02)
    assert np.abs(draws.mean(0) - independent.mean(0)).max() < 0.02
    assert abs((draws.sum((1, 2)) == 75).mean() - (counts == 75).mean()) < 0.02


def test_mask_is_deterministic():
    masks = [PAPER.draw(generator(0, position, MASK)) for position in (5, 5, 6)]
    assert np.array_equal(masks[0], masks[1])
    assert not np.array_equal(masks[0], masks[2])


@pytest.mark.parametrize(
    ("grid", "cap", "smallest"),
    [
        ((4, 4), 6, 2),
        ((8, 8), 24, 4),
        ((28, 28), 300, 16),
        ((7, 10), 30, 4),
        ((2, 2), 1, 1),
        ((3, 3), 8, 8),
        ((1, 8), 3, 1),
    ],
)
def test_other_grids(grid, cap, smallest):
    masking = BlockwiseMask(grid, cap, smallest)
    masks = np.stack([masking.draw(generator(1, position, MASK)) for position in range(100)])
    counts = masks.sum((1, 2))
    assert masks.shape == (100, *grid)
    assert masks.dtype == bool
    assert counts.min() >= 1
    assert counts.max() <= cap
    assert len(np.unique(masks.reshape(100, -1), axis=0)) > 1


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"max_patches": 0}, "max_patches"),
        ({"max_patches": 196}, "max_patches"),
        ({"max_patches": -1}, "max_patches"),
        ({"max_patches": 75, "min_block": 0}, "min_block"),
        ({"max_patches": 75, "min_block": 76}, "min_block"),
        ({"max_patches": 75, "min_aspect": 0.0}, "min_aspect"),
        ({"max_patches": 75, "min_aspect": 1.1}, "min_aspect"),
    ],
)
def test_invalid_arguments(settings, named):
    with pytest.raises((ValueError, UserError), match=named):
        BlockwiseMask((14, 14), **settings)
