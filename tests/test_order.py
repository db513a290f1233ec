"""The order of samples: exact epochs, streams, locality of reads, no hidden state."""

import itertools
import time

import numpy as np
import pytest

from beit_pretrain.data.dataset import BatchSchedule
from beit_pretrain.data.order import MASK, VIEW, Order, Sample, generator, permutation

UNEVEN = [5, 7, 3, 12, 1, 9, 0, 4]


def epoch(order: Order, number: int) -> list[Sample]:
    return [order.sample_at(k) for k in range(number * order.samples, (number + 1) * order.samples)]


def everything(sizes: list[int]) -> list[Sample]:
    return [Sample(shard, i) for shard, size in enumerate(sizes) for i in range(size)]


def test_epochs_and_seeds_differ():
    order = Order(UNEVEN, seed=0, block_size=4096, streams=64)
    first, second = epoch(order, 0), epoch(order, 1)
    other = epoch(Order(UNEVEN, seed=1, block_size=4096, streams=64), 0)
    assert len({tuple(first), tuple(second), tuple(other), tuple(everything(UNEVEN))}) == 4


def test_without_shuffling_samples_are_sequential():
    order = Order(UNEVEN, seed=3, shuffle=False)
    assert epoch(order, 0) == epoch(order, 5) == everything(UNEVEN)


@pytest.mark.parametrize("sizes", [[], [0, 0], [3, -1]])
def test_empty_order(sizes):
    with pytest.raises(ValueError, match="at least one sample"):
        Order(sizes)


def test_uneven_global_batch_is_refused():
    with pytest.raises(ValueError, match="cannot be dealt evenly"):
        BatchSchedule(8, 0, 3).positions(0)


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_read_disjoint_shards(world):
    order = Order([10] * 16, seed=0, block_size=20, streams=4)
    shards = [
        {order.sample_at(k).shard for step in range(20) for k in BatchSchedule(8, rank, world).positions(step)}
        for rank in range(world)
    ]
    assert [len(s) for s in shards] == [16 // world] * world
    assert len(set().union(*shards)) == 16


def test_shuffle_block_limits_open_shards():
    order = Order([10] * 100, seed=0, block_size=40, streams=4)
    first_epoch = epoch(order, 0)
    for stream in range(4):
        samples = first_epoch[stream::4]
        shards = [len({s.shard for s in samples[i : i + 40]}) for i in range(0, len(samples), 40)]
        assert max(shards) <= 5  # 40 samples are four shards, or three and the ends of two
        # Within a window the samples are mixed: neighbours mostly come from different shards.
        assert np.mean([a.shard != b.shard for a, b in itertools.pairwise(samples)]) > 0.5


def test_random_access_is_fast():
    order = Order([1000] * 14_200, seed=0, block_size=4096, streams=64)
    start = time.perf_counter()
    sample = order.sample_at(100_000_000)
    assert time.perf_counter() - start < 0.5
    assert 0 <= sample.shard < 14_200
    assert 0 <= sample.row < 1000


@pytest.mark.parametrize("streams", [1, 3, 64])
@pytest.mark.parametrize("shuffle", [True, False])
def test_vectorized_lookup_equals_single_lookup(streams, shuffle):
    order = Order(UNEVEN, seed=1, block_size=4, streams=streams, shuffle=shuffle)
    for some in (range(0, 130), range(100, 3, -7), np.array([5, 5, 400, 0]), range(0)):
        assert order.samples_at(some).tolist() == [list(order.sample_at(int(k))) for k in some]


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("position", [0, 77, 155, 163, 10**6])
def test_upcoming_shards_cover_next_block(world, position):
    """The shards of the next window of every stream, and nothing that is far away."""
    order = Order([5] * 32, seed=2, block_size=10, streams=4)
    for rank in range(world):
        first = position + (rank - position) % world
        soon = order.samples_at(range(first, position + 40, world))[:, 0]
        ahead = order.upcoming_shards(position, rank, world)
        assert set(soon) <= set(ahead)
        assert len(ahead) == len(set(ahead)) <= 2 * 4 * 4 // world
        now = order.upcoming_shards(position, rank, world, windows=1)
        assert ahead[: len(now)] == now  # soonest first
        assert order.sample_at(first).shard in now


def test_shuffling_quality():
    """As docs/design.md states it, at a tenth of its size: how far a sample moves, and what becomes of neighbours."""
    order = Order([100] * 1420, seed=0, block_size=4096, streams=64)
    n, batch = order.samples, 2048
    place = [order.samples_at(range(e * n, (e + 1) * n)) @ [100, 1] for e in (0, 1)]
    for flat in place:
        assert np.abs(flat - np.arange(n)).mean() / n == pytest.approx(1 / 3, abs=0.02)  # as of a perfect shuffle
        assert abs(np.corrcoef(flat[:-1], flat[1:])[0, 1]) < 0.05
    at = [np.argsort(flat) for flat in place]
    assert abs(np.corrcoef(*at)[0, 1]) < 0.05
    assert np.abs(at[0] - at[1]).mean() / n == pytest.approx(1 / 3, abs=0.02)
    # Of two images in one batch, how many are in one batch again: hardly more than by chance.
    again = np.mean(
        [(np.bincount(at[1][place[0][b : b + batch]] // batch) ** 2).sum() - batch for b in range(0, n, batch)]
    )
    assert again / (batch * (batch - 1)) < 2 * batch / n


def test_generator_is_keyed_by_seed_position_and_purpose():
    keys = list(itertools.product((0, 1, 2**40), (0, 1, 2**40, 2**60), (VIEW, MASK)))
    numbers = [tuple(generator(*key).random(4)) for key in keys]
    assert len(set(itertools.chain(*numbers))) == 4 * len(keys)
    assert numbers == [tuple(generator(*key).random(4)) for key in keys]


def test_purposes_are_independent():
    """The random numbers of a view never overlap with those of the mask of its position."""
    view = generator(0, 5, VIEW).random(10_000)
    mask = generator(0, 5, MASK).random(10_000)
    assert not np.isin(mask, view).any()
    assert abs(np.corrcoef(view, mask)[0, 1]) < 0.05  # five standard errors


def test_random_numbers_are_portable():
    assert generator(7, 123_456_789, MASK).integers(0, 1000, 6).tolist() == [351, 934, 584, 962, 178, 141]


def test_order_is_stable_across_numpy_versions(monkeypatch):
    """NumPy guarantees the raw draws of a bit generator, but not Generator.permutation or shuffle."""
    assert permutation(8, 7, 123_456_789, MASK).tolist() == [4, 5, 2, 3, 6, 7, 0, 1]
    assert sorted(permutation(1000, 0, 5, MASK)) == list(range(1000))

    class Other(np.random.Generator):
        def permutation(self, *args, **settings):
            raise AssertionError("not promised")

        shuffle = permutation

    expected = epoch(Order(UNEVEN, seed=3, block_size=4, streams=3), 1)
    monkeypatch.setattr(np.random, "Generator", Other)
    assert epoch(Order(UNEVEN, seed=3, block_size=4, streams=3), 1) == expected
