"""`bench views`: what is exact has no distance, what departs has one, and the controls bracket it."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from beit_pretrain.benchmarks.loader import Sides
from beit_pretrain.benchmarks.views import EXACT, PLAIN, VARIANTS, authors, compare, half_a_pixel, jitter_after, ours
from beit_pretrain.data.order import VIEW, generator
from beit_pretrain.transforms.jitter import jittered_views
from beit_pretrain.transforms.views import TwoViewTransform

SIDES = Sides(32, 16)
JITTER = "only jitter after the crop"


@pytest.fixture(scope="module")
def files(photos) -> list[bytes]:
    return [path.read_bytes() for path in sorted(photos.rglob("*.jpg"))]


@pytest.fixture(scope="module")
def found(files) -> dict:
    return compare(files, 24, 0, SIDES, None)


@pytest.mark.parametrize(("recipe", "exact"), [(authors, True), (ours, False)])
def test_the_ends_are_what_training_sees(files, recipe, exact):
    """`authors` and `ours` are the two settings of the views' own class, bit for bit."""
    views = TwoViewTransform(*SIDES, pil_reference=exact)
    for position in range(6):
        arrays = views(Image.open(io.BytesIO(files[position])), generator(0, position, VIEW))
        expected = jittered_views({name: torch.from_numpy(array)[None] for name, array in arrays.items()})
        image = Image.open(io.BytesIO(files[position]))
        pair = recipe(image, views.draw(image.size, generator(0, position, VIEW)), SIDES)
        assert all(torch.equal(a, b[0]) for a, b in zip(pair, expected))


def test_both_orders_show_the_same_box():
    """A picture with a mark on one side: flipped before or after the crop, the mark stays in the view or out of it."""
    array = np.zeros((60, 90, 3), np.uint8)
    array[:, :20] = 255
    image = Image.fromarray(array)
    views = TwoViewTransform(*SIDES, jitter=(0.0, 0.0, 0.0))
    flips = 0
    for position in range(12):
        draw = views.draw(image.size, generator(0, position, VIEW))
        flips += draw.flip
        first, second = (recipe(image, draw, SIDES).image for recipe in (authors, jitter_after))
        assert torch.equal(first, second)
    assert 0 < flips < 12


def test_exact_views_have_no_difference(found):
    for name in (EXACT, PLAIN):
        for key in ("image_difference", "token_image_difference", "mean_ks", "std_ks"):
            assert found[name][key] == 0
    assert found[EXACT]["mean_sd"] > 0


def test_departures_lie_between_nothing_and_another_jitter(found):
    another = found["control: another jitter"]["image_difference"]
    assert 5 < another < 80
    for name in ("fast: all departures", JITTER, "control: half a pixel", "control: JPEG at quality 92"):
        assert 0.1 < found[name]["image_difference"] < another / 2


def test_contrast_of_the_crop_would_be_further_away(found):
    assert found[JITTER]["image_difference"] < 0.95 * found["the same, crop's contrast"]["image_difference"]


def test_scaled_decoding_counts_where_images_are_large(files):
    small = compare(files, 12, 0, Sides(8, 8), None)["only scaled decoding"]["image_difference"]
    whole = compare(files, 12, 0, Sides(64, 64), None)["only scaled decoding"]["image_difference"]
    assert whole == 0 < small


def test_half_a_pixel_moves_less_than_one():
    ramp = np.tile(np.arange(90, dtype=np.uint8)[None, :, None], (60, 1, 3))
    image = Image.fromarray(ramp)
    views = TwoViewTransform(*SIDES, jitter=(0.0, 0.0, 0.0), flip=0.0)
    for position in range(4):
        draw = views.draw(image.size, generator(1, position, VIEW))
        moved = half_a_pixel(image, draw, SIDES).image - authors(image, draw, SIDES).image
        assert 0.2 < 255 * moved.abs().mean() < 0.8


class Greys:
    """A tokenizer of 16 levels of grey, 8 pixels a token."""

    vocab_size, downsample = 16, 8

    def encode(self, image: torch.Tensor) -> torch.Tensor:
        return (torch.nn.functional.avg_pool2d(image.mean(1), 8) * 15.99).long().flatten(1)


def test_changed_tokens_are_counted(files):
    found = compare(files, 12, 0, SIDES, Greys())
    assert found[EXACT]["tokens_changed"] == found[PLAIN]["tokens_changed"] == 0
    assert found["control: JPEG at quality 92"]["tokens_changed"] < 0.2
    assert 0.3 < found["control: another jitter"]["tokens_changed"] <= 1


def test_the_command_with_a_tokenizer(run_cli, photos, dvae_checkpoint):
    words = [f"src={photos}", "tokenizer=dvae", f"tokenizer.path={dvae_checkpoint}", "image_size=32", "positions=5"]
    code, stdout, stderr = run_cli("bench", "views", *words, "images=3")
    assert code == 0, stderr
    last = json.loads(stdout.splitlines()[-1])
    assert (last["images"], last["positions"], last["tokens"], last["vocab_size"]) == (3, 5, 4, 32)
    assert last["variants"].keys() == VARIANTS.keys()
    assert last["variants"][EXACT]["tokens_changed"] == 0
    assert "tokens changed" in stdout


def test_the_command_on_shards_without_a_tokenizer(run_cli, shards):
    code, stdout, stderr = run_cli("bench", "views", f"src={shards / 'train'}", "image_size=32", "images=4")
    assert code == 0, stderr
    assert "tokens changed" not in stdout
    assert json.loads(stdout.splitlines()[-1])["variants"][EXACT]["tokens_changed"] is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["bench"], "bench views"),
        (["bench", "tea", "src=x"], "there are views"),
        (["bench", "views"], "src is missing"),
        (["bench", "views", "src=nowhere"], "nowhere does not exist"),
        (["bench", "views", "src=[a,b]"], "one src="),
        (["bench", "views", "src={text}"], "none of the 1 files"),
        (["bench", "views", "src=x", "positions=0"], "positions must be"),
        (["bench", "views", "src=x", "tokenizer=dvae"], "tokenizer.path is missing"),
        (["bench", "views", "src=x", "tokenizer=dvae", "tokenizer.path={dvae}", "image_size=50"], "divisible by 8"),
    ],
)
def test_wrong_words(words, said, run_cli, tmp_path, dvae_checkpoint):
    (tmp_path / "text.jpg").write_text("no image")
    code, _, stderr = run_cli(*(w.format(text=tmp_path / "text.jpg", dvae=dvae_checkpoint) for w in words))
    assert code == 2
    assert said in stderr
    assert "Traceback" not in stderr


def test_a_broken_file_among_others_is_counted(run_cli, photos, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(next(iter(sorted(photos.rglob("*.jpg")))).read_bytes())
    (tmp_path / "in" / "b.jpg").write_text("no image")
    code, stdout, stderr = run_cli("bench", "views", f"src={tmp_path / 'in'}", "image_size=16")
    assert code == 0, stderr
    assert (json.loads(stdout.splitlines()[-1])["images"], json.loads(stdout.splitlines()[-1])["not_decoded"]) == (1, 1)
