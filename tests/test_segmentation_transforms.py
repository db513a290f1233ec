"""Transforms for segmentation: ADE20K labels, shared geometry of image and labels, photometric distortion."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest
from PIL import Image

from beit_pretrain.data.order import VIEW, generator
from beit_pretrain.transforms.segmentation import (
    IGNORE,
    SegmentationEvalTransform,
    SegmentationTrainTransform,
    distorted,
    fitted,
    read_labels,
)


def coded(width: int, height: int, block: int = 16) -> tuple[Image.Image, Image.Image]:
    """An image whose colour encodes its label map: blocks of ids 1 ... 9, red = 20 x id."""
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 10, (-(-height // block), -(-width // block)))
    ids = np.kron(ids, np.ones((block, block), int))[:height, :width].astype(np.uint8)
    pixels = np.stack([ids * 20, ids * 20, 255 - ids * 20], axis=2)
    return Image.fromarray(pixels), Image.fromarray(ids)


class TestLabels:
    def labels(self, ids, reduce_labels=True, classes=150, mode="L") -> list[int]:
        array = np.array([ids], np.uint8)
        return read_labels(Image.fromarray(array, mode), classes, reduce_labels, (len(ids), 1)).tolist()[0]

    def test_reduce_labels(self):
        assert self.labels([0, 1, 2, 150, 255]) == [IGNORE, 0, 1, 149, IGNORE]

    def test_without_reduce_labels(self):
        assert self.labels([0, 1, 149, 255], reduce_labels=False) == [0, 1, 149, IGNORE]

    def test_palette_images_use_index(self):
        mask = Image.fromarray(np.array([[0, 1, 7]], np.uint8), "P")
        mask.putpalette([9] * 768)
        assert read_labels(mask, 10, True, (3, 1)).tolist() == [[IGNORE, 0, 6]]

    @pytest.mark.parametrize("array", [np.array([[0, 3]], np.uint16), np.array([[0, 3]], np.int32)])
    def test_16_bit_label_maps(self, array):
        assert read_labels(Image.fromarray(array), 10, True, (2, 1)).tolist() == [[IGNORE, 2]]

    @pytest.mark.parametrize(("ids", "found"), [([0, 11], 11), ([200, 1], 200)])
    def test_ids_above_num_classes(self, ids, found):
        with pytest.raises(ValueError, match=f"has the id {found}, beyond the 10"):
            self.labels(ids, classes=10)

    def test_ids_above_255(self):
        with pytest.raises(ValueError, match="has the id 300"):
            read_labels(Image.fromarray(np.array([[300]], np.uint16)), 150, True, (1, 1))

    @pytest.mark.parametrize(
        ("mask", "said"),
        [(Image.new("L", (3, 4)), "has 3 x 4 pixels, not 4 x 4"), (Image.new("RGB", (4, 4)), "of mode RGB")],
    )
    def test_invalid_label_maps(self, mask, said):
        with pytest.raises(ValueError, match=said):
            read_labels(mask, 10, True, (4, 4))


@pytest.mark.parametrize(
    ("size", "shorter", "expected"),
    [((683, 512), 512, (683, 512)), ((100, 200), 50, (50, 100)), ((1000, 100), 100, (400, 40)), ((5, 5), 64, (64, 64))],
)
def test_resize_shorter_side(size, shorter, expected):
    assert fitted(size, shorter) == expected


class TestCrops:
    @pytest.mark.parametrize("size", [(96, 64), (64, 96), (20, 30), (300, 40), (1, 1)])
    def test_image_and_labels_share_geometry(self, size):
        """After any crop, scaling and flip, colour and label agree."""
        image, mask = coded(*size)
        views = SegmentationTrainTransform(48, 9, distort=False, ratio=(0.5, 2.0), fill=(0.0, 0.0, 0.0))
        agree = counted = 0
        for position in range(30):
            view = views(image, generator(0, position, VIEW), mask)
            assert view["image"].shape == (3, 48, 48)
            assert view["target"].shape == (48, 48)
            inside = view["target"] != IGNORE
            assert (view["image"][:, ~inside] == 0).all()  # what is beyond the edge does not count
            difference = np.abs(view["image"][0][inside] / 20 - (view["target"][inside] + 1.0))
            agree += (difference < 0.6).sum()
            counted += inside.sum()
        assert agree / counted > 0.8  # the rest are edges of blocks, which the filter blends

    def test_ratio_scales_shorter_side(self):
        image, mask = coded(100, 50)
        view = SegmentationTrainTransform(64, 9, ratio=(0.5, 0.5), distort=False)(image, generator(0, 0, VIEW), mask)
        inside = view["target"] != IGNORE
        assert inside.any(1).sum() == 32  # half of the crop's side
        assert inside.any(0).sum() == 64

    def test_max_share_of_one_class(self):
        """Class 2 fills the first 20 of 256 columns: only 5 of 193 positions of a crop of 64 show enough of it."""
        ids = np.ones((64, 256), np.uint8)
        ids[:, :20] = 2
        image, mask = Image.new("RGB", (256, 64)), Image.fromarray(ids)

        def shares(limit: float) -> list[float]:
            views = SegmentationTrainTransform(64, 2, ratio=(1.0, 1.0), max_share=limit, distort=False)
            targets = [views(image, generator(0, k, VIEW), mask)["target"] for k in range(300)]
            return [max((t == c).mean() for c in (0, 1)) for t in targets]

        free, chosen = np.array(shares(1.0)), np.array(shares(0.75))
        assert (free <= 0.75).mean() == pytest.approx(5 / 193, abs=0.03)
        assert (chosen <= 0.75).mean() == pytest.approx(1 - (188 / 193) ** 10, abs=0.08)  # the best of ten tries

    def test_map_without_labels(self):
        image, mask = Image.new("RGB", (40, 40)), Image.new("L", (40, 40))
        assert (SegmentationTrainTransform(16, 3)(image, generator(0, 0, VIEW), mask)["target"] == IGNORE).all()

    def test_depends_only_on_position(self):
        image, mask = coded(96, 64)
        views = SegmentationTrainTransform(32, 9)
        one, again, other = (views(image, generator(3, k, VIEW), mask)["image"] for k in (5, 5, 6))
        assert np.array_equal(one, again)
        assert not np.array_equal(one, other)

    @pytest.mark.parametrize(("channels", "fill"), [(1, (0.5,)), (4, (0.5,) * 4)])
    def test_channels(self, channels, fill):
        image, mask = coded(96, 64)
        view = SegmentationTrainTransform(32, 9, channels=channels, fill=fill)(image, generator(0, 0, VIEW), mask)
        assert view["image"].shape == (channels, 32, 32)


def test_whole_images():
    image, mask = coded(90, 60)
    view = SegmentationEvalTransform(32, 9, scales=(0.5, 1.0))(image, None, mask)
    assert {name: array.shape for name, array in view.items()} == {
        "scale_0": (3, 16, 24),
        "scale_1": (3, 32, 48),
        "target": (60, 90),
    }
    assert np.array_equal(view["target"], np.asarray(mask) - 1)


class Fixed:
    """Fixed random numbers: which steps apply, then brightness, contrast and saturation, hue."""

    def __init__(self, applied, shift=0.0, contrast=1.0, saturation=1.0, turn=0.0):
        self.applied, self.values = np.where(applied, 0.0, 1.0), [shift, np.array([contrast, saturation]), turn]

    def random(self, size):
        return self.applied

    def uniform(self, low, high, size=None):
        return self.values.pop(0)


class TestDistortion:
    BLOCK = np.full((4, 4, 3), (200, 100, 50), np.uint8)

    def test_brightness_and_contrast(self):
        assert distorted(self.BLOCK, Fixed([1, 0, 0, 0, 0], shift=20))[0, 0].tolist() == [220, 120, 70]
        assert distorted(self.BLOCK, Fixed([0, 0, 1, 0, 0], contrast=1.5))[0, 0].tolist() == [255, 150, 75]

    def test_saturation_and_hue(self):
        hue, _, value = colorsys.rgb_to_hsv(200 / 255, 100 / 255, 50 / 255)
        grey = distorted(self.BLOCK, Fixed([0, 0, 0, 1, 0], saturation=0.5))[0, 0] / 255
        assert colorsys.rgb_to_hsv(*grey)[1] == pytest.approx(0.375, abs=0.02)
        turned = distorted(self.BLOCK, Fixed([0, 0, 0, 0, 1], turn=-0.1))[0, 0] / 255
        assert colorsys.rgb_to_hsv(*turned)[0] == pytest.approx((hue - 0.1) % 1, abs=0.01)
        assert colorsys.rgb_to_hsv(*turned)[2] == pytest.approx(value, abs=0.01)

    def test_disabled_distortion(self):
        assert np.array_equal(distorted(self.BLOCK, Fixed([0] * 5, 30, 1.5, 1.5, 0.1)), self.BLOCK)

    def test_grey_and_alpha(self):
        rng = np.random.default_rng(0)
        assert distorted(np.full((4, 4), 9, np.uint8), rng).shape == (4, 4)
        four = np.dstack([self.BLOCK, np.full((4, 4), 77, np.uint8)])
        assert all((distorted(four, rng)[..., 3] == 77).all() for _ in range(10))
