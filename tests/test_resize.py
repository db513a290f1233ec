"""Resized position tables against an independent implementation of the release's interpolation, and its limits."""

import numpy as np
import pytest
import torch
from scipy.interpolate import RectBivariateSpline

from beit_pretrain.models.resize import progression, resize_positions, resize_state, resize_table


def table(grid: tuple[int, int], heads: int = 3, smooth: bool = False) -> torch.Tensor:
    torch.manual_seed(0)
    rows, columns = 2 * grid[0] - 1, 2 * grid[1] - 1
    if not smooth:
        return torch.randn(rows * columns + 3, heads)
    y, x = torch.meshgrid(torch.linspace(-2, 2, rows), torch.linspace(-2, 2, columns), indexing="ij")
    bumps = torch.stack([torch.exp(-(y**2 + (i + 1) * x**2)) for i in range(heads)], dim=-1).reshape(-1, heads)
    return torch.cat([bumps, torch.randn(3, heads)])


def by_fitpack(table_RH: torch.Tensor, old: tuple[int, int], new: tuple[int, int]) -> np.ndarray:
    """The scheme once more, written from its description: both axes at once, head by head, through FITPACK."""

    def places(reach: int, new_reach: int) -> np.ndarray:
        if reach == new_reach:
            return np.arange(-reach, reach + 1.0)
        left, right, ratio = 1.01, 1.5, 1.25
        while right - left > 1e-6:
            ratio = (left + right) / 2
            length = sum(ratio**i for i in range(reach))
            left, right = (left, ratio) if length > new_reach else (ratio, right)
        steps = [sum(ratio**i for i in range(n)) for n in range(1, reach + 1)]
        return np.array([-s for s in reversed(steps)] + [0.0] + steps)

    y, x = (places(o - 1, n - 1) for o, n in zip(old, new, strict=True))
    wanted = [np.arange(-(n - 1), n, dtype=float) for n in new]
    heads = []
    for head in table_RH[:-3].double().numpy().T:
        surface = RectBivariateSpline(y, x, head.reshape(len(y), len(x)), kx=3, ky=3)
        heads.append(surface(*wanted).reshape(-1))
    return np.concatenate([np.stack(heads, axis=1), table_RH[-3:].double().numpy()])


LARGER = [(24, 24), (32, 32), (14, 20), (20, 14), (15, 15), (40, 64)]
SMALLER = [(7, 7), (13, 13), (10, 10), (14, 10), (9, 14), (1, 3), (2, 2)]


@pytest.mark.parametrize("new", [*LARGER, *SMALLER, (7, 20), (24, 6)])
@pytest.mark.parametrize("smooth", [True, False])
def test_other_grids_agree_with_fitpack(new, smooth):
    old = (14, 14)
    resized = resize_table(table(old, smooth=smooth), old, new)
    assert resized.shape == ((2 * new[0] - 1) * (2 * new[1] - 1) + 3, 3)
    assert resized.dtype == torch.float32
    assert np.abs(resized.numpy() - by_fitpack(table(old, smooth=smooth), old, new)).max() < 1e-4


def test_from_a_grid_that_is_not_square():
    resized = resize_table(table((6, 9)), (6, 9), (10, 30))
    assert np.abs(resized.numpy() - by_fitpack(table((6, 9)), (6, 9), (10, 30))).max() < 1e-4
    resized = resize_table(table((6, 9)), (6, 9), (4, 5))
    assert np.abs(resized.numpy() - by_fitpack(table((6, 9)), (6, 9), (4, 5))).max() < 1e-4


@pytest.mark.parametrize("grid", [(14, 14), (3, 5), (1, 1)])
def test_the_same_grid_is_the_identity(grid):
    assert torch.equal(resize_table(table(grid), grid, grid), table(grid))


def test_a_smaller_grid_is_interpolated_at_ratio_1_01():
    """As in the release, whose bisection ends at its lower bound: close to the centre crop, but not the same."""
    steps = np.diff(progression(13, 6), prepend=0)
    assert steps[1:] / steps[:-1] == pytest.approx(1.01, abs=2e-6)
    whole = 0.05 * table((14, 14))
    crop = whole[:-3].reshape(27, 27, -1)[7:20, 7:20].reshape(-1, 3)
    resized = resize_table(whole, (14, 14), (7, 7))
    assert torch.equal(resized[-3:], whole[-3:])
    assert 0.01 < (resized[:-3] - crop).abs().max() < 0.05


@pytest.mark.parametrize("new", [(24, 24), (7, 7)])
def test_offset_zero_and_the_neighbours_stay(new):
    """The progression starts with a step of 1: what near patches are to each other does not change."""
    old, side = (14, 14), 2 * new[0] - 1
    before = table(old)[:-3].reshape(27, 27, -1)[12:15, 12:15]
    after = resize_table(table(old), old, new)[:-3].reshape(side, side, -1)[side // 2 - 1 :, side // 2 - 1 :][:3, :3]
    assert torch.allclose(before, after, atol=1e-5)


@pytest.mark.parametrize(
    ("old", "new"), [((1, 1), (4, 4)), ((2, 2), (4, 4)), ((2, 3), (8, 9)), ((4, 4), (60, 60)), ((2, 3), (1, 1))]
)
def test_tiny_grids(old, new):
    """Too few offsets for a cubic, or a grid that no ratio reaches: finite, within sight of what is known."""
    before, after = table(old), resize_table(table(old), old, new)
    assert after.shape == ((2 * new[0] - 1) * (2 * new[1] - 1) + 3, 3)
    assert after.abs().max() <= 4 * before.abs().max()


def test_progression():
    for terms, extent in ((13, 23), (13, 31), (5, 9)):
        places = progression(terms, extent)
        steps = np.diff(places, prepend=0)
        assert steps[0] == 1
        assert steps[1:] / steps[:-1] == pytest.approx(steps[1])
        assert places[-1] == pytest.approx(extent, abs=1e-3)


def test_absolute_positions():
    torch.manual_seed(0)
    positions = torch.randn(1, 17, 8)
    assert torch.equal(resize_positions(positions, (4, 4), (4, 4)), positions)
    resized = resize_positions(positions, (4, 4), (6, 8))
    assert resized.shape == (1, 49, 8)
    assert torch.equal(resized[:, 0], positions[:, 0])
    flat = resize_positions(torch.ones(1, 17, 8), (4, 4), (6, 8))
    assert torch.allclose(flat, torch.ones_like(flat), atol=1e-5)
    # Rows stay rows: a picture that only depends on the row still does.
    rows = torch.arange(4.0).repeat_interleave(4).view(1, 16, 1)
    picture = resize_positions(torch.cat([torch.zeros(1, 1, 1), rows], 1), (4, 4), (8, 8))[0, 1:, 0].view(8, 8)
    assert torch.allclose(picture, picture[:, :1].expand(8, 8), atol=1e-5)
    assert (picture[1:, 0] >= picture[:-1, 0]).all()


def test_state_dicts():
    state = {
        "rel_pos_bias.relative_position_bias_table": table((4, 4)),
        "blocks.0.attn.relative_position_bias_table": table((4, 4)),
        "pos_embed": torch.randn(1, 17, 8),
        "norm.weight": torch.randn(8),
    }
    resized = resize_state(state, (4, 4), (6, 6))
    assert [len(t) for n, t in resized.items() if n.endswith("table")] == [124, 124]
    assert resized["pos_embed"].shape == (1, 37, 8)
    assert resized["norm.weight"] is state["norm.weight"]
    assert resize_state(state, (4, 4), (4, 4)) is state
