"""Rows cut out of a JPEG by bytes decode bit for bit to the rows of the whole image; other files are unchanged."""

import io

import numpy as np
import pytest
from PIL import Image
from test_views import picture

from beit_pretrain.transforms.jpeg_rows import cut_rows

MARKED = {"quality": 92, "restart_marker_rows": 1}


def encoded(size=(130, 301), **settings) -> bytes:
    buffer = io.BytesIO()
    picture(*size).save(buffer, "JPEG", **settings)
    return buffer.getvalue()


def decoded(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("size", [(130, 301), (16, 160), (301, 33), (17, 47)])
def test_cut_rows_equal_rows_of_whole_image(size, subsampling):
    data = encoded(size, subsampling=subsampling, **MARKED)
    whole = decoded(data)
    cut = 0
    for top in range(0, size[1], 3):
        for height in (1, 2, 15, 16, 40, size[1]):
            bottom = min(size[1], top + height)
            if (found := cut_rows(data, top, bottom)) is None:
                continue
            cut += 1
            band, first = found
            rows = decoded(band)
            assert rows.shape[0] < whole.shape[0]
            assert np.array_equal(rows[top - first : bottom - first], whole[top:bottom])
    assert cut > 5


@pytest.mark.parametrize("rows", [(0, 301), (1, 300)])
def test_nothing_is_cut_if_all_rows_are_needed(rows):
    assert cut_rows(encoded(**MARKED), *rows) is None


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xd8",
        b"not a JPEG at all",
        encoded(),  # no restart markers
        encoded(restart_marker_rows=2),
        encoded(restart_marker_blocks=3),
        encoded(progressive=True, restart_marker_rows=1),
        encoded(**MARKED)[:1500],  # truncated
        encoded(**MARKED)[:180],  # inside the header
    ],
)
def test_other_files_are_unchanged(data):
    assert cut_rows(data, 20, 40) is None


def test_damaged_files_do_not_raise():
    data = encoded((60, 90), **MARKED)
    rng = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(data[: rng.integers(len(data))])
        for place in rng.integers(0, max(1, len(damaged)), 5 if damaged else 0):
            damaged[place] = rng.integers(256)
        cut_rows(bytes(damaged), 20, 40)  # raises nothing
