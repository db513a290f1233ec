"""Mean colours of an image in the comment of its file: round trip, and other comments."""

import io

import numpy as np
import pytest
from PIL import Image
from test_views import picture

from beit_pretrain.transforms import mean_color_grid as tiles
from beit_pretrain.transforms.scaled_decoding import Crop, cropped_array, turbo_jpeg


def with_comment(text: bytes) -> bytes:
    buffer = io.BytesIO()
    picture(160, 120).save(buffer, "JPEG", quality=95, restart_marker_rows=1, comment=text)
    return buffer.getvalue()


def test_round_trip():
    image = picture(160, 120)
    expected = np.asarray(image).reshape(8, 15, 8, 20, 3).mean((1, 3)).reshape(64, 3)
    data = with_comment(tiles.comment(image))
    found = tiles.in_jpeg(data)
    assert np.abs(found - expected).max() <= 1
    assert np.array_equal(found, tiles.in_comment(Image.open(io.BytesIO(data)).info["comment"]))
    grey = tiles.in_comment(tiles.comment(image), channels=1)
    assert grey.shape == (64, 1)
    assert abs(grey.mean() - np.asarray(image.convert("L")).mean()) < 1


@pytest.mark.parametrize(
    "text", [b"a cat", tiles.PREFIX, tiles.PREFIX + b"z" * 384, tiles.PREFIX + b"\xff" * 384, tiles.PREFIX + b"0" * 500]
)
def test_other_comments_are_ignored(text):
    data = with_comment(text)
    assert tiles.in_jpeg(data) is None
    assert tiles.in_comment(text) is None
    assert tiles.in_jpeg(data[:60]) is None
    opened = Image.open(io.BytesIO(data))
    crop = Crop(40, 20, 33, 50)
    of_image = cropped_array(opened, crop, 32)
    assert np.array_equal(of_image.tiles, tiles.of_image(np.asarray(opened)))
    if (jpeg := turbo_jpeg(data)) is not None:
        assert np.array_equal(cropped_array(jpeg, crop, 32).tiles, of_image.tiles)


@pytest.mark.parametrize("size", [(1, 1), (3, 500), (31, 64), (500, 375), (127, 1001), (4000, 60)])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_image_and_array_give_same_colors(size, mode):
    image = Image.effect_noise(size, 60).convert(mode)
    array = np.asarray(image).reshape(*size[::-1], -1)
    assert np.array_equal(tiles.of_image(image), tiles.of_image(array))
    assert tiles.of_image(array).shape == (64, array.shape[2])


def test_mean_colors():
    image = picture(320, 240)
    expected = np.asarray(image).reshape(8, 30, 8, 40, 3).mean((1, 3)).reshape(64, 3)
    assert np.abs(tiles.of_image(image) - expected).mean() < 4  # of 16 pixels, in parts of noise
    assert np.abs(tiles.of_image(image).mean(0) - expected.mean(0)).max() < 1
