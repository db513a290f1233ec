"""Mixtures: exact shares, each dataset in its own order, a pure function of the position."""

from __future__ import annotations

import numpy as np
import pytest

from beit_pretrain.data.mixture import Mixture, shares
from beit_pretrain.data.order import Order
from beit_pretrain.errors import UserError

A, B, C = [5, 7, 3], [12, 0, 4], [30]


def mixture(weights=(0.7, 0.3), sizes=(A, B), seed=1) -> Mixture:
    orders = [Order(list(s), seed + i, block_size=4, streams=2) for i, s in enumerate(sizes)]
    return Mixture(orders, weights, seed)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ((0.7, 0.3), (182, 78)),
        ((7, 3), (182, 78)),
        ((1, 1), (128, 128)),
        ((0.5, 0.25, 0.25), (128, 64, 64)),
        ((1 / 3, 2 / 3), (86, 172)),
        ((1,), (256,)),
        ((0.999, 0.001), (999, 1)),
        ((np.pi, np.e), (5361, 4639)),  # rounded to ten thousandths, largest remainders first
    ],
)
def test_shares(weights, expected):
    assert tuple(shares(weights, len(weights))) == expected


@pytest.mark.parametrize(
    ("weights", "said"), [((1,), "1 numbers for 2"), ((1, 2, 3), "3 numbers for 2"), ((1, 1e-6), "less than 1 of")]
)
def test_invalid_weights(weights, said):
    with pytest.raises(UserError, match=said):
        shares(weights, 2)


def test_block_counts_are_exact():
    mixed = mixture((0.5, 0.2, 0.3), (A, B, C))
    dataset, _ = mixed.places(range(20 * mixed.block))
    counts = np.bincount(dataset.reshape(20, -1)[0], minlength=3)
    assert (np.stack([np.bincount(row, minlength=3) for row in dataset.reshape(20, -1)]) == counts).all()
    assert (counts / mixed.block == [0.5, 0.2, 0.3]).all()
    assert len({tuple(row) for row in dataset.reshape(20, -1)}) == 20  # but not always at the same places


def test_each_dataset_keeps_its_own_order():
    """All its samples come once before any comes again."""
    mixed = mixture()
    positions = range(3 * mixed.block)
    dataset, own = mixed.places(positions)
    addresses = mixed.samples_at(positions)
    assert (mixture(seed=2).samples_at(positions) != addresses).any()
    for number, first in ((0, 0), (1, len(A))):
        assert own[dataset == number].tolist() == list(range((dataset == number).sum()))
        expected = mixed.orders[number].samples_at(own[dataset == number])
        assert (addresses[dataset == number] == expected + [first, 0]).all()
        samples = mixed.orders[number].samples
        epochs = [tuple(map(tuple, part)) for part in np.split(expected, range(samples, len(expected), samples))]
        assert all(len(set(epoch)) == len(epoch) for epoch in epochs)
        assert epochs[0] != epochs[1]


@pytest.mark.parametrize("world", [1, 3])
def test_upcoming_shards_cover_next_positions(world):
    mixed = mixture(sizes=([4] * 30, [4] * 20))
    for position in (0, 50, 3 * mixed.block - 1):
        for rank in range(world):
            soon = mixed.samples_at(range(position + (rank - position) % world, position + 6, world))
            assert set(soon[:, 0]) <= set(mixed.upcoming_shards(position, rank, world))


def test_mixture_is_stable_across_numpy_versions(monkeypatch):
    expected = mixture().samples_at(range(600))

    class Other(np.random.Generator):
        def shuffle(self, *args, **settings):
            raise AssertionError("not promised")

        permutation = shuffle

    monkeypatch.setattr(np.random, "Generator", Other)
    assert (mixture().samples_at(range(600)) == expected).all()
