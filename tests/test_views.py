"""Views against torchvision's PIL pipeline, bit for bit where nothing is approximated."""

import io
import itertools
import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as F

from beit_pretrain.data.order import VIEW, generator
from beit_pretrain.errors import UserError
from beit_pretrain.transforms import mean_color_grid as tiles
from beit_pretrain.transforms.jitter import (
    BRIGHTNESS,
    CONTRAST,
    HALF,
    SATURATION,
    Jitter,
    color_jitter,
    draw_jitter,
    jittered_views,
    normalise,
    per_channel,
)
from beit_pretrain.transforms.scaled_decoding import Crop, cropped_array, scaled_decode
from beit_pretrain.transforms.views import (
    AugmentParams,
    ClassificationTransform,
    TwoViewTransform,
    centre_view,
    draw_crop,
    posterize,
    shorter_side,
    to_array,
)

ADJUST = {BRIGHTNESS: F.adjust_brightness, CONTRAST: F.adjust_contrast, SATURATION: F.adjust_saturation}
ORDERS = list(itertools.permutations((BRIGHTNESS, CONTRAST, SATURATION)))
PAPER_CROP = ((0.08, 1.0), (3 / 4, 4 / 3))
SMALL = TwoViewTransform(image_size=32, token_image_size=16)


def picture(width: int = 90, height: int = 70, seed: int = 0) -> Image.Image:
    """A decoded image with smooth and rough parts (so without scaled decoding)."""
    rng = np.random.default_rng(seed)
    smooth = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    noise = rng.normal(0, 12, (height, width, 3)) * (np.arange(width)[None, :, None] > width / 2)
    return Image.fromarray(np.clip(np.asarray(smooth) + noise, 0, 255).astype(np.uint8))


def as_jpeg(image: Image.Image) -> Image.Image:
    """The picture as an opened, not yet decoded JPEG."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95)
    return Image.open(io.BytesIO(buffer.getvalue()))


def rng(position: int) -> np.random.Generator:
    return generator(0, position, VIEW)


def drawn(views: TwoViewTransform, size: tuple[int, int], position: int):
    """Jitter, flip and crop that the views draw at a position; the order of the draws must not change."""
    numbers = rng(position)
    jitter = draw_jitter(numbers, views.jitter)
    flip, crop = numbers.random() < views.flip, draw_crop(numbers, *size, views.scale, views.ratio)
    if flip and not views.pil_reference:  # the box is drawn in the flipped image
        crop = crop._replace(left=size[0] - crop.left - crop.width)
    return jitter, flip, crop


def torchvision_crop(image: Image.Image, crop: Crop, size: int, how: InterpolationMode) -> np.ndarray:
    cropped = F.resized_crop(image, crop.top, crop.left, crop.height, crop.width, [size, size], how)
    return F.pil_to_tensor(cropped).numpy()


class TestCrop:
    @pytest.mark.parametrize("size", [(90, 70), (70, 90), (1, 1), (3, 200), (500, 375)])
    @pytest.mark.parametrize(("scale", "ratio"), [PAPER_CROP, ((1.0, 1.0), (1.0, 1.0)), ((0.4, 1.0), (0.9, 1.1))])
    def test_lies_inside(self, size, scale, ratio):
        for position in range(100):
            crop = draw_crop(rng(position), *size, scale, ratio)
            assert crop.height > 0
            assert crop.width > 0
            assert 0 <= crop.top <= size[1] - crop.height
            assert 0 <= crop.left <= size[0] - crop.width
            assert all(type(number) is int for number in crop)

    def test_area_and_aspect(self):
        crops = np.array([draw_crop(rng(k), 400, 400, *PAPER_CROP)[2:] for k in range(2000)], float)
        area, aspect = crops.prod(1) / 400**2, crops[:, 1] / crops[:, 0]
        assert area.min() > 0.075
        assert area.max() <= 1
        assert aspect.min() > 0.73
        assert aspect.max() < 1.37
        assert np.log(aspect).mean() == pytest.approx(0, abs=0.02)  # log-uniform: its own inverse on average
        torch.manual_seed(0)
        image = Image.new("RGB", (400, 400))
        reference = [RandomResizedCrop.get_params(image, *map(list, PAPER_CROP)) for _ in range(2000)]
        expected = np.mean([h * w for _, _, h, w in reference]) / 400**2
        assert area.mean() == pytest.approx(expected, abs=0.03)  # four standard errors of the difference

    @pytest.mark.parametrize("size", [(1000, 20), (20, 1000)])
    def test_falls_back_to_central_crop(self, size):
        """No box of 90 % of the area has an aspect below 4/3: torchvision takes the largest central box."""
        top, left, height, width = RandomResizedCrop.get_params(Image.new("RGB", size), [0.9, 1.0], [3 / 4, 4 / 3])
        assert draw_crop(rng(0), *size, (0.9, 1.0), (3 / 4, 4 / 3)) == (top, left, height, width)

    def test_falls_back_to_whole_image(self):
        assert draw_crop(rng(0), 50, 45, (2.0, 2.0), (3 / 4, 4 / 3)) == (0, 0, 45, 50)


class TestPretrainViews:
    @pytest.mark.parametrize("position", range(8))
    def test_backbone_view_matches_torchvision_within_rounding(self, position):
        """Without scaled decoding. The tokenizer's view is bicubic too; the release uses Lanczos."""
        image = picture()
        _, flip, crop = drawn(SMALL, image.size, position)
        view = SMALL(image, rng(position))
        for name, size, furthest in (("image", 32, 1.01), ("token_image", 16, 1.01)):
            expected = torchvision_crop(image, crop, size, InterpolationMode.BICUBIC)
            assert view[name].dtype == np.uint8
            difference = np.abs(view[name] - (expected[:, :, ::-1] if flip else expected).astype(float))
            assert difference.max() <= furthest + 8
            assert difference.mean() < 0.15
        lanczos = torchvision_crop(image, crop, 16, InterpolationMode.LANCZOS)
        assert np.abs(view["token_image"] - (lanczos[:, :, ::-1] if flip else lanczos).astype(float)).mean() < 3

    def test_no_tokenizer_view_without_size(self):
        """As with cached tokens; the backbone's view does not change."""
        one, both = TwoViewTransform(32, None)(picture(), rng(1)), TwoViewTransform(32, 16)(picture(), rng(1))
        assert one.keys() == both.keys() - {"token_image"}
        assert all(np.array_equal(one[name], both[name]) for name in one)
        assert "token_image" not in TwoViewTransform(32, None, pil_reference=True)(picture(), rng(1))

    def test_flips_half(self):
        flips = [drawn(SMALL, (90, 70), position)[1] for position in range(8)]
        assert 0 < sum(flips) < 8

    @pytest.mark.parametrize("position", range(8))
    def test_pil_reference_equals_release_pipeline(self, position):
        """Jitter and flip of the whole decoded JPEG, then the two crops, with PIL and torchvision."""
        views = TwoViewTransform(image_size=32, token_image_size=16, pil_reference=True)
        jpeg = as_jpeg(picture(300, 260))
        (factors, order), flip, crop = drawn(views, jpeg.size, position)
        view = views(as_jpeg(picture(300, 260)), rng(position))
        image = jpeg.convert("RGB")
        for operation in order:
            image = ADJUST[operation](image, float(factors[operation]))
        image = F.hflip(image) if flip else image
        assert np.array_equal(view["image"], torchvision_crop(image, crop, 32, InterpolationMode.BICUBIC))
        assert np.array_equal(view["token_image"], torchvision_crop(image, crop, 16, InterpolationMode.LANCZOS))

    def test_pil_reference_views_are_not_jittered_again(self):
        views = TwoViewTransform(image_size=32, token_image_size=16, pil_reference=True)
        view = views(picture(), rng(3))
        batch = {name: torch.from_numpy(array)[None] for name, array in view.items()}
        image, token_image = jittered_views(batch)
        assert torch.equal(image, batch["image"].float() / 255)
        assert torch.equal(token_image, batch["token_image"].float() / 255)

    def test_fast_views_are_close_to_pil_reference(self):
        """Jitter before or after the crop differs only by rounding and by resizing clipped values."""
        settings = {"image_size": 32, "token_image_size": 16, "jitter": (0.2, 0.4, 0.2), "flip": 0.0}
        for position in range(4):
            batches = [
                {
                    k: torch.from_numpy(v)[None]
                    for k, v in TwoViewTransform(**settings, pil_reference=e)(picture(), rng(position)).items()
                }
                for e in (False, True)
            ]
            for fast, exact in zip(*map(jittered_views, batches), strict=True):
                assert (fast - exact).abs().mean() < 0.02

    @pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
    def test_other_modes_become_rgb(self, mode):
        view = SMALL(picture().convert(mode), rng(0))
        assert view["image"].shape == (3, 32, 32)
        assert view["token_image"].shape == (3, 16, 16)

    def test_view_is_deterministic(self):
        first, again, other = (SMALL(picture(), rng(position)) for position in (1, 1, 2))
        assert all(np.array_equal(first[name], again[name]) for name in first)
        assert not np.array_equal(first["image"], other["image"])


class TestJitter:
    def test_matches_torchvision_in_every_order(self):
        torch.manual_seed(0)
        image = torch.rand(6, 3, 9, 7)
        factors = torch.empty(6, 3).uniform_(0.3, 1.9)  # wide enough that every operation clips somewhere
        jittered = color_jitter(image, factors, torch.tensor(ORDERS))
        for b, order in enumerate(ORDERS):
            expected = image[b]
            for operation in order:
                expected = ADJUST[operation](expected, factors[b, operation].item())
            assert torch.allclose(jittered[b], expected, atol=1e-5, rtol=0)

    @pytest.mark.parametrize("order", ORDERS)
    @pytest.mark.parametrize("factors", [(1.4, 0.6, 1.4), (0.6, 1.4, 0.6), (1.4, 0.7, 0.6), (1.0, 0.6, 1.0)])
    def test_matches_pillow_with_mean_color_grid(self, order, factors):
        """Every pixel of the whole image as in PIL, including the grey of contrast after earlier operations."""
        image = expected = picture(300, 200)
        for operation in order:
            expected = ADJUST[operation](expected, factors[operation])
        pixels = F.pil_to_tensor(image)[None].float() / 255
        whole = torch.from_numpy(tiles.of_image(image))[None].float() / 255
        jittered = 255 * color_jitter(pixels, torch.tensor([factors]), torch.tensor([order]), whole)[0]
        difference = (jittered - F.pil_to_tensor(expected)).abs()
        assert difference.mean() < 0.75
        assert difference.max() <= 3

    def test_contrast_uses_mean_of_whole_image(self):
        """A black crop of a half-white image: contrast changes it although the crop itself is uniform."""
        image = Image.new("RGB", (80, 40), "white")
        image.paste("black", (0, 0, 40, 40))
        jitter = Jitter(np.array([1, 0.6, 1], np.float32), np.arange(3))
        draws = [AugmentParams(jitter, False, Crop(0, left, 40, 40)) for left in (0, 40)]
        seen = []
        for draw in draws:
            arrays = TwoViewTransform(16, 8).apply(image, draw)
            views = jittered_views({name: torch.from_numpy(array)[None] for name, array in arrays.items()})
            exact = TwoViewTransform(16, 8, pil_reference=True).apply(image, draw)
            for name, view in zip(("image", "token_image"), views, strict=True):
                assert torch.allclose(view[0], torch.from_numpy(exact[name]) / 255, atol=0.01)
            seen.append(views[0].mean().item())
        assert seen == pytest.approx([0.2, 0.8], abs=0.01)

    def test_factors_and_orders_match_torchvision(self):
        jitters = [draw_jitter(rng(k), (0.4, 0.2, 0.0)) for k in range(3000)]
        factors = np.stack([jitter.factors for jitter in jitters])
        assert factors.min(0) == pytest.approx([0.6, 0.8, 1.0], abs=0.01)
        assert factors.max(0) == pytest.approx([1.4, 1.2, 1.0], abs=0.01)
        assert factors.mean(0) == pytest.approx([1, 1, 1], abs=0.02)
        orders, counts = np.unique([jitter.order for jitter in jitters], axis=0, return_counts=True)
        assert [tuple(order) for order in orders] == ORDERS
        assert counts == pytest.approx(500, abs=100)  # five standard deviations
        assert draw_jitter(rng(0), (2.0, 2.0, 2.0)).factors.min() >= 0

    def test_both_views_get_same_jitter(self):
        """An image of one colour has the same colour in both views, before and after jitter."""
        torch.manual_seed(0)
        colour = torch.randint(40, 200, (6, 3, 1, 1), dtype=torch.uint8)
        batch = {
            "image": colour.expand(-1, -1, 32, 32),
            "token_image": colour.expand(-1, -1, 16, 16),
            "jitter_factors": torch.empty(6, 3).uniform_(0.6, 1.4),
            "jitter_order": torch.tensor(ORDERS),
            "jitter_tiles": torch.full((6, 64, 3), 77, dtype=torch.uint8),
        }
        image, token_image = jittered_views(batch)
        assert torch.allclose(image[..., :16, :16], token_image, atol=1e-6)
        assert (image[..., :1, :1] - colour / 255).abs().max() > 0.05

    def test_one_channel_equals_grey_rgb(self):
        grey = torch.rand(6, 1, 8, 8)
        factors, order = torch.empty(6, 3).uniform_(0.6, 1.4), torch.tensor(ORDERS)
        rgb = color_jitter(grey.expand(-1, 3, -1, -1), factors, order)
        torch.testing.assert_close(color_jitter(grey, factors, order).expand(-1, 3, -1, -1), rgb, atol=1e-3, rtol=0)

    def test_saturation_skips_grey_and_alpha(self):
        grey, order = torch.rand(1, 1, 8, 8), torch.tensor(ORDERS[:1])
        torch.testing.assert_close(color_jitter(grey, torch.tensor([[1.0, 1.0, 0.2]]), order), grey)
        four = torch.rand(1, 4, 8, 8)
        jittered = color_jitter(four, torch.tensor([[1.3, 0.7, 0.2]]), order)
        assert torch.equal(jittered[:, 3], four[:, 3])
        assert (jittered[:, :3] - four[:, :3]).abs().max() > 0.1

    @pytest.mark.parametrize("channels", [1, 3, 4])
    @pytest.mark.parametrize("exact", [False, True])
    def test_channels(self, channels, exact):
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 4), np.uint8), "RGBA")
        views = TwoViewTransform(16, 8, pil_reference=exact, channels=channels)(image, np.random.default_rng(0))
        assert views["image"].shape == (channels, 16, 16)
        assert views["token_image"].shape == (channels, 8, 8)
        for train in (False, True):
            policy = "rand-m9-mstd0.5-inc1" if channels < 4 else None
            view = ClassificationTransform(16, train, auto_augment=policy, channels=channels)
            assert view(image, np.random.default_rng(0))["image"].shape == (channels, 16, 16)

    def test_mean_per_channel(self):
        assert per_channel([0.5, 0.5, 0.5], 1, "mean") == (0.5,)
        assert per_channel([0.1, 0.2, 0.3], 3, "mean") == (0.1, 0.2, 0.3)
        with pytest.raises(UserError, match=r"mean=\[0.1, 0.2, 0.3\] has 3 values for data.channels=4"):
            per_channel([0.1, 0.2, 0.3], 4, "mean")

    def test_normalise(self):
        image = torch.tensor([0.0, 0.5, 1.0]).view(1, 3, 1, 1)
        assert normalise(image, HALF, HALF).flatten().tolist() == [-1, 0, 1]
        assert normalise(image, (0, 0.25, 1), (1, 0.5, 2)).flatten().tolist() == [0, 0.5, 0]


class TestClassificationViews:
    @pytest.mark.parametrize(
        ("size", "crop_ratio", "shorter"), [(32, None, 36), (32, 1.0, 32), (56, 0.875, 64), (384, None, 384)]
    )
    @pytest.mark.parametrize("source", [(120, 120), (120, 80), (40, 64), (97, 131), (83, 57), (320, 20)])
    def test_evaluation_equals_torchvision(self, size, crop_ratio, shorter, source):
        image = picture(*source)
        view = centre_view(image, size, crop_ratio)
        assert view.size == (size, size)
        resized = F.resize(image, [shorter], InterpolationMode.BICUBIC)
        assert np.array_equal(view, F.center_crop(resized, [size, size]))
        evaluation = ClassificationTransform(size, train=False, crop_ratio=crop_ratio)(image, rng(0))
        assert np.array_equal(evaluation["image"], to_array(view))

    @pytest.mark.parametrize("size", [32, 384])
    @pytest.mark.parametrize("source", [(900, 30), (30, 900), (97, 5), (1, 40), (600, 1), (1, 600)])
    def test_only_centre_of_thin_image_is_resized(self, size, source, monkeypatch):
        image, made = picture(*source), []
        shorter = shorter_side(size)
        expected = F.center_crop(F.resize(image, [shorter], InterpolationMode.BICUBIC), [size, size])
        resize = Image.Image.resize
        monkeypatch.setattr(Image.Image, "resize", lambda self, to, *args: made.append(to) or resize(self, to, *args))
        view = np.asarray(centre_view(image, size), int)
        assert made == [(size, size)]
        off = np.abs(view - np.asarray(expected, int))
        assert off.max() <= 4
        assert off.mean() < 0.25

    def test_evaluation_of_large_jpeg_is_close_to_full_decoding(self):
        view = np.asarray(centre_view(as_jpeg(picture(1000, 800)), 64), float)
        full = np.asarray(centre_view(as_jpeg(picture(1000, 800)).convert("RGB"), 64), float)
        assert np.abs(view - full).mean() < 1.5

    def test_training_view_is_flipped_crop(self):
        views = ClassificationTransform(32)
        for position in range(6):
            numbers = rng(position)
            crop = draw_crop(numbers, 90, 70, views.scale, views.ratio)
            expected = torchvision_crop(picture(), crop, 32, InterpolationMode.BICUBIC)
            expected = expected[:, :, ::-1] if numbers.random() < views.flip else expected
            assert np.array_equal(views(picture(), rng(position))["image"], expected)

    def test_posterize_keeps_the_highest_bits_down_to_none(self):
        """timm draws 0 bits, which newer Pillows refuse; the older ones answered with a black image."""
        for bits in range(1, 9):
            assert posterize(picture(), bits).tobytes() == ImageOps.posterize(picture(), bits).tobytes()
        assert not np.asarray(posterize(picture(), 0)).any()
        views = ClassificationTransform(16, auto_augment="rand-m10-p1-inc1")
        for position in range(40):
            views(picture(), rng(position))
        assert any(operation.aug_fn is posterize for operation in views._randaugment.ops)

    def test_randaugment_depends_only_on_position(self):
        policy = "rand-m9-mstd0.5-inc1"
        views = ClassificationTransform(32, auto_augment=policy)
        random.seed(1)
        np.random.seed(1)
        first = [views(picture(), rng(position))["image"] for position in range(6)]
        random.seed(2)
        np.random.seed(2)
        fresh = ClassificationTransform(32, auto_augment=policy)  # as another worker builds it
        again = [fresh(picture(), rng(position))["image"] for position in reversed(range(6))][::-1]
        assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
        plain = [ClassificationTransform(32)(picture(), rng(position))["image"] for position in range(6)]
        assert sum(not np.array_equal(a, b) for a, b in zip(first, plain, strict=True)) >= 4


USES = {
    "centre_view": lambda image: np.asarray(centre_view(image, 16)),
    "training": lambda image: ClassificationTransform(16, True)(image, rng(0))["image"],
    "evaluation": lambda image: ClassificationTransform(16, False)(image, rng(0))["image"],
    "two views": lambda image: TwoViewTransform(32, 16, scale=(0.9, 1.0))(image, rng(0))["image"],
    "scaled_decode": lambda image: np.asarray(scaled_decode(image, Crop(0, 0, 256, 256), 32)[0]),
    "cropped_array": lambda image: cropped_array(image, Crop(0, 0, 256, 256), 32).array,
}


@pytest.mark.parametrize("use", USES)
def test_the_callers_image_stays_as_it_is(use, tmp_path):
    picture(320, 256).save(tmp_path / "photo.jpg", quality=95)
    with Image.open(tmp_path / "photo.jpg") as from_file:
        for image in (as_jpeg(picture(320, 256)), from_file):
            before = image.size, image.mode, image.tell(), len(image.tile)
            first, second = USES[use](image), USES[use](image)
            np.testing.assert_array_equal(first, second)
            assert (image.size, image.mode, image.tell(), len(image.tile)) == before
            assert not np.array_equal(first, USES[use](as_jpeg(picture(320, 256)).convert("RGB")))  # decoded smaller
            np.testing.assert_array_equal(np.asarray(image), np.asarray(as_jpeg(picture(320, 256))))


def test_images_at_a_later_frame_and_drafted_ones_are_used_as_they_are():
    frames, buffer = [Image.new("RGB", (96, 96), colour) for colour in ("red", "lime")], io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    animation = Image.open(buffer)
    animation.seek(1)
    assert centre_view(animation, 16).getpixel((8, 8)) == (0, 255, 0)
    assert animation.tell() == 1
    drafted = as_jpeg(picture(640, 512))
    drafted.draft(None, (320, 256))
    centre_view(drafted, 16)
    assert drafted.size == (320, 256)
    grey = as_jpeg(picture(640, 512))
    grey.draft("L", (640, 512))
    assert np.ptp(np.asarray(centre_view(grey, 16)), axis=2).max() == 0
