"""The view of a Hugging Face checkpoint is that of its processor: in predict, after an export, not in a fine-tuning."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from foreign import hf_classifier
from PIL import Image

from beit_pretrain.config import compose
from beit_pretrain.engine.task import find_task
from beit_pretrain.errors import UserError
from beit_pretrain.inference.predictor import Predictor
from beit_pretrain.models.checkpoints.hf_processor import DEFAULTS, preprocessing
from beit_pretrain.models.checkpoints.pretrained import load_pretrained

HALF = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.6, 0.7]}
SQUARE = {"height": 32, "width": 32}
CROP = {"do_center_crop": True, "crop_size": SQUARE}
FORMS = {
    "square": {"size": SQUARE},
    "bilinear": {"size": SQUARE, "resample": 2},
    "lanczos": {"size": SQUARE, "resample": 1},
    "integer": {"size": 32, "crop_size": 32, "resample": 2, "feature_extractor_type": "BeitFeatureExtractor"},
    "integer and crop": {"size": 40, "crop_size": 32, "do_center_crop": True},
    "list and crop": {"size": [40, 36], "crop_size": [32, 32], "do_center_crop": True, "resample": 2},
    "shorter side and crop": {"size": {"shortest_edge": 36}, **CROP},
    "bilinear shorter side": {"size": {"shortest_edge": 36}, "resample": 2, **CROP},
    "crop beyond the shorter side": {"size": {"shortest_edge": 24}, **CROP},
    "crop beyond the square": {"size": {"height": 20, "width": 28}, **CROP},
    "crop alone": {"do_resize": False, **CROP},
    "no normalisation": {"size": SQUARE, "do_normalize": False},
    "no factor": {"size": SQUARE, "do_rescale": False, "image_mean": [127.5] * 3, "image_std": [127.5] * 3},
    "another factor": {"size": SQUARE, "rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3},
    "neither": {"size": SQUARE, "do_rescale": False, "do_normalize": False},
    "halves": {"size": SQUARE, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
}
SIZES = [(150, 50), (50, 130), (32, 32), (20, 31), (33, 64)]


@pytest.fixture(scope="module")
def network():
    return hf_classifier()


def image(size: tuple[int, int]) -> Image.Image:
    coarse = np.random.default_rng(sum(size)).integers(0, 256, (6, 6, 3), np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def saved(network, folder, form: dict | None):
    network.save_pretrained(folder)
    if form is not None:
        text = {"image_processor_type": "BeitImageProcessor", **HALF, **form}
        (folder / "preprocessor_config.json").write_text(json.dumps(text))
    return folder


def seen(folder, size) -> torch.Tensor:
    """What the network of a folder sees of an image."""
    found = Predictor(folder)._network
    return found.normalised(torch.stack(found.views(image(size))))


@pytest.mark.parametrize("name", FORMS)
def test_view_is_the_processors(name, network, tmp_path, capsys):
    from transformers import AutoImageProcessor

    folder = saved(network, tmp_path / "hf", FORMS[name])
    theirs = AutoImageProcessor.from_pretrained(folder)
    capsys.readouterr()  # a progress bar of save_pretrained
    scale = 255.0 if name == "neither" else 1.0
    for size in SIZES:
        expected = theirs(image(size), return_tensors="pt")["pixel_values"]
        assert (seen(folder, size) - expected).abs().mean() < 0.01 * scale
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("to", "name"),
    [*product(["hf"], ["integer", "list and crop", "shorter side and crop", "no factor"]),
     ("unilm", "list and crop"), ("timm", "shorter side and crop")],
)  # fmt: skip
def test_exports_keep_the_view(to, name, network, run_cli, tmp_path):
    folder = saved(network, tmp_path / "hf", FORMS[name])
    out = tmp_path / {"hf": "out", "unilm": "out.pth", "timm": "out.safetensors"}[to]
    assert run_cli("export", f"init_from={folder}", f"to={to}", f"out={out}")[0] == 0
    for size in SIZES:
        torch.testing.assert_close(seen(out, size), seen(folder, size), atol=1e-5, rtol=1e-5)


def test_export_of_another_size_scales_the_view(network, run_cli, tmp_path):
    folder = saved(network, tmp_path / "hf", FORMS["list and crop"])
    assert run_cli("export", f"init_from={folder}", "to=hf", f"out={tmp_path / 'out'}", "image_size=64")[0] == 0
    said = json.loads((tmp_path / "out/preprocessor_config.json").read_text())
    assert (said["size"], said["crop_size"]) == ({"height": 80, "width": 72}, {"height": 64, "width": 64})
    assert (said["do_center_crop"], said["resample"]) == (True, 2)


def test_fine_tuning_has_its_own_view(network, shards, tmp_path):
    folder = saved(network, tmp_path / "hf", FORMS["integer"])
    words = [f"data.train={shards / 'train'}", f"init_from={folder}", "model.size=null", "model.embed_dim=32"]
    words += ["image_size=32", "patch_size=8", "model.depth=2", "model.num_heads=2", "data.num_workers=0"]
    module = find_task("finetune")(compose("fit", ["+experiment=demo_finetune", *words])).module
    assert not {"view", "view_differs"} & module.about.keys()
    assert module.about["mean"] == HALF["image_mean"]


@pytest.mark.parametrize(
    ("form", "said"),
    [
        (None, "has no preprocessor_config.json"),
        ({"image_processor_type": "CLIPImageProcessor", "size": SQUARE}, "is of a CLIPImageProcessor"),
        ({"size": {"shortest_edge": 32, "longest_edge": 64}}, "are not understood"),
        ({"size": "large"}, "are not understood"),
        ({"size": SQUARE, "resample": 9}, "are not understood"),
        ({"size": {"height": 64, "width": 64}}, "no images of 32 x 32 pixels"),
        ({"do_resize": False}, "no images of 32 x 32 pixels"),
        ({}, "no images of 32 x 32 pixels"),
    ],
)
def test_what_cannot_be_done_alike_is_said(form, said, network, tmp_path, capsys):
    folder = saved(network, tmp_path / "hf", form)
    capsys.readouterr()  # a progress bar of save_pretrained
    assert seen(folder, (50, 40)).shape == (1, 3, 32, 32)
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1
    assert warnings[0].startswith("warning: ")
    assert said in warnings[0]


@pytest.mark.parametrize("factor", [0, -1, "a", None, True])
def test_wrong_factors_are_refused(factor, tmp_path):
    with pytest.raises(UserError, match="rescale_factor must be a number above 0"):
        preprocessing({"rescale_factor": factor or 0, "size": 32}, 3, tmp_path)


def test_defaults_are_those_of_transformers():
    from transformers import BeitImageProcessor

    theirs = BeitImageProcessor().to_dict()
    assert {name: theirs[name] for name in DEFAULTS if not name.startswith("image_")} == {
        name: value for name, value in DEFAULTS.items() if not name.startswith("image_")
    }
    assert list(theirs["image_mean"]) == list(theirs["image_std"]) == [0.5] * 3
    assert preprocessing({"size": 32}, 2, Path())["mean"] == [0.5] * 2


def test_thin_images_take_no_memory(network, tmp_path):
    folder = saved(network, tmp_path / "hf", FORMS["bilinear shorter side"])
    assert seen(folder, (60_000, 1)).shape == (1, 3, 32, 32)


def test_metadata_of_a_file_is_checked(network, run_cli, tmp_path):
    folder = saved(network, tmp_path / "hf", FORMS["integer"])
    assert run_cli("export", f"init_from={folder}", "to=unilm", f"out={tmp_path / 'out.pth'}")[0] == 0
    content = torch.load(tmp_path / "out.pth")
    content["beit_pretrain"]["view"]["resize"] = [10**9, 1]
    torch.save(content, tmp_path / "bad.pth")
    with pytest.raises(UserError, match="view of its config"):
        load_pretrained(tmp_path / "bad.pth", "classify")
