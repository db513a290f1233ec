"""Scaled decoding of crops: enough pixels, the right place, equal with and without simplejpeg."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from test_views import PAPER_CROP, as_jpeg, picture, rng

from beit_pretrain.transforms import mean_color_grid as tiles
from beit_pretrain.transforms import scaled_decoding as decoding
from beit_pretrain.transforms.scaled_decoding import Crop, TurboJpeg, cropped_array, resized, scaled_decode, turbo_jpeg
from beit_pretrain.transforms.views import TwoViewTransform, draw_crop


class TestScaledDecoding:
    WHOLE = Crop(0, 0, 512, 640)

    @pytest.mark.parametrize(
        ("crop", "decoded"),
        [
            (WHOLE, (80, 64)),  # 512 / 64 = 8: an eighth
            (Crop(100, 200, 300, 300), (160, 128)),  # 300 / 64 = 4.7: a quarter
            (Crop(11, 13, 128, 190), (320, 256)),  # exactly half
            (Crop(11, 13, 127, 190), (640, 512)),  # half of 127 is less than 64: whole
        ],
    )
    def test_keeps_enough_pixels(self, crop, decoded):
        image, scaled = scaled_decode(as_jpeg(picture(640, 512)), crop, 64)
        assert image.size == decoded
        assert min(scaled.height, scaled.width) >= 64
        assert 0 <= scaled.top <= image.height - scaled.height
        assert 0 <= scaled.left <= image.width - scaled.width

    @pytest.mark.parametrize("position", range(6))
    def test_scaled_decoding_is_close_to_full_decoding(self, position):
        views = TwoViewTransform(image_size=64, token_image_size=32, scale=(0.3, 1.0))
        scaled = views(as_jpeg(picture(640, 512)), rng(position))
        full = views(as_jpeg(picture(640, 512)).convert("RGB"), rng(position))
        for name in ("image", "token_image"):
            assert not np.array_equal(scaled[name], full[name])
            assert np.abs(scaled[name].astype(float) - full[name]).mean() < 2.5

    def test_only_jpegs_are_scaled(self):
        image, crop = scaled_decode(picture(640, 512), self.WHOLE, 64)
        assert (image.size, crop) == ((640, 512), self.WHOLE)

    @pytest.mark.parametrize("size", [(641, 513), (639, 511), (127, 1001)])
    def test_crops_stay_inside_odd_images(self, size):
        for position in range(20):
            crop = draw_crop(rng(position), *size, *PAPER_CROP)
            image, scaled = scaled_decode(as_jpeg(Image.new("RGB", size)), crop, 16)
            assert 0 <= scaled.top <= image.height - scaled.height
            assert 0 <= scaled.left <= image.width - scaled.width


VIEWS = TwoViewTransform(32, 16)
TILES = tiles.comment(picture(50, 40, seed=3))


def as_bytes(image: Image.Image, extension: str = "JPEG", **settings) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, extension, **settings)
    return buffer.getvalue()


class TestCroppedArray:
    SIZES = [(640, 512), (641, 513), (639, 511), (127, 1001), (64, 64), (20, 30)]

    @pytest.mark.parametrize("size", SIZES)
    def test_equals_crop_of_scaled_image(self, size):
        for position in range(8):
            crop = draw_crop(rng(position), *size, *PAPER_CROP)
            image, box = scaled_decode(as_jpeg(picture(*size)), crop, 64)
            expected = np.asarray(image)[box.top : box.top + box.height, box.left : box.left + box.width]
            assert np.array_equal(cropped_array(as_jpeg(picture(*size)), crop, 64).array, expected)

    @pytest.mark.parametrize(
        "marks",
        [
            {},
            {"restart_marker_rows": 1},
            {"restart_marker_rows": 1, "comment": TILES},
            {"mode": "L"},
            {"keep_rgb": True},
            {"progressive": True},
        ],
    )
    @pytest.mark.parametrize("size", SIZES)
    def test_simplejpeg_gives_the_same_pixels(self, size, marks):
        pytest.importorskip("simplejpeg", reason="there is no simplejpeg for this machine")
        settings = dict(marks)
        data = as_bytes(picture(*size).convert(settings.pop("mode", "RGB")), quality=95, **settings)
        for position in range(8):
            crop = draw_crop(rng(position), *size, *PAPER_CROP)
            fast, tiles_of_fast = cropped_array(turbo_jpeg(data), crop, 32)
            expected = cropped_array(Image.open(io.BytesIO(data)), crop, 32)
            assert np.array_equal(fast, expected.array)
            assert np.array_equal(tiles_of_fast, expected.tiles)

    def test_falls_back_to_pillow_if_simplejpeg_fails(self, monkeypatch):
        def refuse(*args, **settings):
            raise ValueError("corrupt")

        monkeypatch.setattr(decoding, "simplejpeg", type("Refusing", (), {"decode_jpeg": staticmethod(refuse)}))
        crop = Crop(3, 5, 40, 50)
        image = TurboJpeg(as_bytes(picture(), quality=95), (90, 70))
        assert np.array_equal(cropped_array(image, crop, 32).array, np.asarray(as_jpeg(picture()))[3:43, 5:55])

    def test_damaged_jpegs_raise_as_in_pillow(self):
        pytest.importorskip("simplejpeg", reason="there is no simplejpeg for this machine")
        data = as_bytes(picture(300, 200))
        with pytest.raises(OSError, match="truncated"):
            VIEWS.prepare_view(data[:-800], rng(0))()
        for broken in (b"", data[:3], data[:100], b"\xff\xd8\xff" + bytes(50)):
            assert turbo_jpeg(broken) is None
            with pytest.raises((OSError, SyntaxError)):  # as Pillow has it
                VIEWS.prepare_view(broken, rng(0))()

    @pytest.mark.parametrize("channels", [1, 3, 4])
    @pytest.mark.parametrize("mode", ["L", "CMYK", "RGB"])
    def test_views_of_bytes_equal_views_of_image(self, mode, channels):
        views = TwoViewTransform(32, 16, channels=channels)
        for extension in ("JPEG", "TIFF"):
            data = as_bytes(picture(300, 200).convert(mode), extension)
            for position in range(4):
                one, other = (
                    views.prepare_view(data, rng(position))(),
                    views(Image.open(io.BytesIO(data)), rng(position)),
                )
                assert one["image"].shape == (channels, 32, 32)
                assert all(np.array_equal(one[name], other[name]) for name in one)

    @pytest.mark.parametrize("mode", ["L", "CMYK"])
    def test_grey_and_cmyk_jpegs_use_pillow(self, mode):
        buffer = io.BytesIO()
        picture().convert(mode).save(buffer, "JPEG")
        expected = np.asarray(Image.open(buffer).convert("RGB"))
        assert np.array_equal(cropped_array(Image.open(buffer), Crop(0, 0, 70, 90), 64).array, expected)

    def test_truncated_jpegs_raise(self):
        buffer = io.BytesIO()
        picture(300, 200).save(buffer, "JPEG")
        with pytest.raises(OSError, match="truncated"):
            cropped_array(Image.open(io.BytesIO(buffer.getvalue()[:-800])), Crop(0, 0, 200, 300), 32)


@pytest.mark.parametrize(("side", "furthest"), [(16, 9), (32, 9), (100, 9)])
def test_resize_matches_pillow_within_rounding(side, furthest):
    array = np.array(picture())[3:60, 7:80]
    expected = np.asarray(Image.fromarray(array).resize((side, side), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    difference = np.abs(resized(array, side).numpy() - expected.astype(float))
    assert difference.max() <= furthest
    assert difference.mean() < 0.1
    assert resized(array, side)[None].is_contiguous(memory_format=torch.channels_last)
