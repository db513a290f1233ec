"""BeitImageProcessor against transformers': pixels and labels over input kinds and options, files both ways, errors."""

from __future__ import annotations

import copy
import json
import pickle
import re
import warnings
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from foreign import hf_classifier
from PIL import Image
from test_hf_processor import FORMS, SIZES, image, saved, seen
from tiny import MIM, refusal, seeded, write_checkpoint

import beit_pretrain
from beit_pretrain import BeitImageProcessor
from beit_pretrain.library.batch_feature import BatchFeature
from beit_pretrain.models.backbone import MaskedImageModel

H, W = 36, 54
ROOT = Path(__file__).parents[1]
CROP = {"do_center_crop": True, "crop_size": 20}
OPTIONS = {
    "square": {"size": 24},
    "enlarged": {"size": (60, 70)},
    "shorter side": {"size": {"shortest_edge": 24}},
    "shorter side and crop": {"size": {"shortest_edge": 24}, **CROP},
    "crop beyond the edges": {"size": 24, "do_center_crop": True, "crop_size": (30, 16)},
    "crop alone": {"do_resize": False, "do_center_crop": True, "crop_size": {"height": 40, "width": 20}},
    "nothing resized": {"do_resize": False},
    "nearest": {"size": 24, "resample": 0},
    "bilinear": {"size": (24, 32), "resample": Image.Resampling.BILINEAR},
    "lanczos": {"size": 24, "resample": 1},
    "box": {"size": 24, "resample": 4},
    "hamming": {"size": 24, "resample": 5},
    "no normalisation": {"size": 24, "do_normalize": False},
    "mean and std": {"size": 24, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]},
    "one mean for all": {"size": 24, "image_mean": 0.4, "image_std": 0.2},
    "another factor": {"size": 24, "rescale_factor": 1 / 127.5},
}
# Of the torchvision backend: it has no box and Hamming filter, and takes bicubic for Lanczos.
ABSENT = ("lanczos", "box", "hamming")


def noise(channels: int = 3, seed: int = 0) -> np.ndarray:
    """(C, H, W) uint8, the worst case of a filter."""
    return np.random.default_rng(seed).integers(0, 256, (channels, H, W), np.uint8)


def smooth(seed: int = 0) -> np.ndarray:
    """(C, H, W) uint8, as photos are."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((W, H), Image.Resampling.BILINEAR)).transpose(2, 0, 1)


def pil(image_CHW: np.ndarray) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(image_CHW.transpose(1, 2, 0)))


# Of an image (C, H, W): what is given, and options that it needs.
KINDS = {
    "PIL": lambda x: (pil(x), {}),
    "grey PIL": lambda x: (Image.fromarray(x[0]), {"do_convert_rgb": True}),
    "RGBA PIL": lambda x: (pil(np.concatenate([x, noise(1, 5)])), {"do_convert_rgb": True}),
    "palette PIL": lambda x: (pil(x).quantize(17), {"do_convert_rgb": True}),
    "NumPy": lambda x: (x, {}),
    "NumPy, channels last": lambda x: (x.transpose(1, 2, 0), {}),
    "NumPy, order said": lambda x: (x.transpose(1, 2, 0), {"input_data_format": "channels_last"}),
    "grey NumPy": lambda x: (x[:1], {"do_convert_rgb": True}),
    "torch": lambda x: (torch.from_numpy(x.copy()), {}),
    "torch, channels last": lambda x: (torch.from_numpy(x.transpose(1, 2, 0).copy()), {}),
    "list": lambda x: ([x, x[:, ::-1].copy()], {}),
    "mixed list": lambda x: ([pil(x), x, torch.from_numpy(x.copy())], {}),
    "nested list": lambda x: ([[x, x[:, ::-1].copy()], [x]], {}),
    "batch": lambda x: (np.stack([x, x[:, :, ::-1]]), {}),
    "batch, torch, channels last": lambda x: (torch.from_numpy(np.stack([x.transpose(1, 2, 0)] * 2)), {}),
    "list of batches": lambda x: ([np.stack([x, x])], {}),
    "integers": lambda x: (x.astype(np.int64), {}),
    "floats up to 255": lambda x: (x.astype(np.float32), {}),
    "floats up to 1": lambda x: (x.astype(np.float32) / 255, {"do_rescale": False}),
    "doubles up to 1": lambda x: (torch.from_numpy(x / 255), {"do_rescale": False}),
}
EIGHT_BITS = [kind for kind in KINDS if not kind.startswith(("integers", "floats", "doubles"))]
PIL_GRID = list(product(KINDS, OPTIONS))
TORCHVISION_GRID = [(kind, name) for kind in EIGHT_BITS for name in OPTIONS if name not in ABSENT]


@pytest.fixture(scope="module")
def theirs():
    """Both backends of transformers: Pillow's, and torchvision's, which has the name BeitImageProcessor."""
    import transformers
    from transformers.models.beit.image_processing_pil_beit import BeitImageProcessorPil

    return {"PIL": BeitImageProcessorPil, "torchvision": transformers.BeitImageProcessor}


@pytest.fixture(scope="module")
def network():
    return hf_classifier()


def levels_apart(their_class, given, options) -> float:
    """The largest difference of pixels before the normalisation, in levels of 8 bits."""
    expected = their_class(**options)(given, return_tensors="np")["pixel_values"]
    found = BeitImageProcessor(**options)(given, return_tensors="pt").pixel_values
    assert found.dtype == torch.float32
    assert found.shape == expected.shape
    scale = options.get("image_std", 0.5) if options.get("do_normalize", True) else 1.0
    factor = options.get("rescale_factor", 1 / 255) if options.get("do_rescale", True) else 1 / 255
    levels = np.abs(found.numpy() - expected) * np.reshape(scale, (-1, 1, 1)) / factor
    return float(levels.max())


def test_enough_combinations_are_compared():
    assert len(PIL_GRID) == 320
    assert len(TORCHVISION_GRID) == 208


@pytest.mark.parametrize(("kind", "name"), PIL_GRID)
def test_pixels_are_those_of_the_pil_backend(kind, name, theirs):
    given, needs = KINDS[kind](noise())
    assert levels_apart(theirs["PIL"], given, {**OPTIONS[name], **needs}) < 0.001


@pytest.mark.parametrize(("kind", "name"), TORCHVISION_GRID)
def test_pixels_are_those_of_the_torchvision_backend_within_a_level(kind, name, theirs):
    given, needs = KINDS[kind](smooth())
    assert levels_apart(theirs["torchvision"], given, {**OPTIONS[name], **needs}) < 1.001


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_a_call(name, theirs):
    given, options = noise(), OPTIONS[name]
    processor = BeitImageProcessor(size=18)
    before = processor.to_dict()
    called = processor(given, **options, return_tensors="np").pixel_values
    np.testing.assert_array_equal(called, BeitImageProcessor(**options)(given, return_tensors="np").pixel_values)
    assert processor.to_dict() == before


@pytest.mark.parametrize("crop", [21, (31, 33), (9, 40)])
def test_odd_margins_are_those_of_the_torchvision_backend(crop, theirs):
    """The PIL backend has the odd row of zeros above and not below."""
    options = {"do_resize": False, "do_center_crop": True, "crop_size": crop}
    small = noise()[:, :24, :26]
    assert levels_apart(theirs["torchvision"], small, options) < 0.001


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.float64])
def test_values_may_stay_as_they_are(dtype, theirs):
    given = noise().astype(dtype)
    options = {"do_resize": False, "do_rescale": False, "do_normalize": False, **CROP}
    (found,) = BeitImageProcessor(**options)(given)["pixel_values"]
    (expected,) = theirs["PIL"](**options)(given)["pixel_values"]
    assert isinstance(found, np.ndarray)
    assert found.dtype == expected.dtype == dtype
    np.testing.assert_array_equal(found, expected)


def test_images_without_resize_keep_their_range():
    given = np.random.default_rng(0).normal(0, 1000, (3, 8, 8)).astype(np.float32)
    options = {"do_resize": False, "do_rescale": False, "do_normalize": False}
    np.testing.assert_array_equal(BeitImageProcessor(**options)(given).pixel_values[0], given)


def test_floats_are_rounded_to_levels():
    """transformers' PIL backend cuts them off, and takes floats of 0 and 1 alone for levels."""
    processor = BeitImageProcessor(size=24, do_rescale=False, do_normalize=False)
    constant = np.full((3, H, W), 100.7 / 255, np.float32)
    np.testing.assert_allclose(processor(constant).pixel_values[0], 101 / 255, atol=1e-6)
    corner = np.zeros((3, H, W), np.float32)
    corner[:, :13, :20] = 1
    found = processor(corner, resample=2).pixel_values[0]
    assert len(np.unique(found)) > 4
    assert found.max() == 1


def test_scaled_floats_are_scaled_again_with_a_warning(theirs):
    given = smooth().astype(np.float32) / 255
    with pytest.warns(UserWarning, match="do_rescale=False leaves them"):
        found = BeitImageProcessor(size=24)(given, return_tensors="np").pixel_values
    np.testing.assert_allclose(found, theirs["PIL"](size=24)(given, return_tensors="np")["pixel_values"], atol=1e-6)
    with warnings.catch_warnings(action="error"):
        BeitImageProcessor(size=24)(np.zeros_like(given))
        BeitImageProcessor(size=24, do_rescale=False)(given)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV", "I;16", "F", "LAB"])
def test_any_mode_becomes_the_channels_of_the_mean(mode):
    if mode in ("I;16", "F"):
        given = Image.fromarray(noise()[0].astype(np.uint16 if mode == "I;16" else np.float32))
    else:
        given = Image.new("LAB", (W, H), 90) if mode == "LAB" else pil(smooth()).convert(mode)
    assert given.mode == mode
    assert BeitImageProcessor(size=24)(given, return_tensors="pt").pixel_values.shape == (1, 3, 24, 24)
    grey = BeitImageProcessor(size=24, image_mean=[0.5], image_std=[0.5])
    assert grey(given, return_tensors="pt").pixel_values.shape == (1, 1, 24, 24)
    if mode in ("RGBA", "CMYK", "HSV", "L"):
        same = BeitImageProcessor(size=24)(given.convert("RGB")).pixel_values[0]
        np.testing.assert_array_equal(BeitImageProcessor(size=24)(given).pixel_values[0], same)


def test_channels_of_arrays():
    processor = BeitImageProcessor(size=24)
    colours = noise(4)
    grey = processor(colours[0]).pixel_values[0]
    for form in (colours[:1], colours[0][..., None], np.repeat(colours[:1], 3, 0)):
        np.testing.assert_array_equal(processor(form).pixel_values[0], grey)
    np.testing.assert_array_equal(processor(colours).pixel_values[0], processor(colours[:3]).pixel_values[0])
    seven = BeitImageProcessor(size=24, image_mean=[0.5] * 7, image_std=[0.5] * 7)
    found = seven(noise(7), return_tensors="np").pixel_values
    np.testing.assert_array_equal(found[0, :3], processor(noise(7)[:3]).pixel_values[0])
    raw = BeitImageProcessor(size=24, do_convert_rgb=False, do_normalize=False)
    assert raw(Image.fromarray(colours[0]), return_tensors="pt").pixel_values.shape == (1, 1, 24, 24)


def test_forms_of_the_result():
    processor, given = BeitImageProcessor(size=(16, 24)), [noise(), noise(seed=1)]
    listed = processor(given)
    assert [type(value) for value in listed.pixel_values] == [np.ndarray] * 2
    stacked = processor(given, return_tensors="pt")
    assert isinstance(stacked.pixel_values, torch.Tensor)
    assert stacked.pixel_values.shape == (2, 3, 16, 24)
    assert isinstance(processor(given, return_tensors="np").pixel_values, np.ndarray)
    last = processor(given, return_tensors="pt", data_format="channels_last").pixel_values
    torch.testing.assert_close(last, stacked.pixel_values.permute(0, 2, 3, 1), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"shapes .*: set a size or crop_size, or return_tensors=None"):
        processor([noise(), noise()[:, 1:]], do_resize=False, return_tensors="pt")


def test_features_move_and_convert():
    features = BeitImageProcessor(size=8)(noise(), noise()[0], return_tensors="pt")
    assert dict(**features).keys() == {"pixel_values", "labels"}
    assert features.to(torch.float16) is features
    assert (features.pixel_values.dtype, features.labels.dtype) == (torch.float16, torch.int64)
    features.to("meta", torch.float64)
    assert {value.device.type for value in features.values()} == {"meta"}
    assert features.pixel_values.dtype == torch.float64
    lists = BatchFeature(some=[torch.zeros(2)], array=np.zeros(2)).to(dtype=torch.bfloat16)
    assert lists.some[0].dtype == torch.bfloat16
    with pytest.raises(TypeError, match=r"device or a dtype, got 3\.5"):
        lists.to(3.5)
    with pytest.raises(AttributeError, match="no 'pixels' here; there are some, array"):
        _ = lists.pixels
    assert pickle.loads(pickle.dumps(copy.copy(lists))).keys() == lists.keys()


def label_map(high: int = 151) -> np.ndarray:
    """(H, W) uint8 of blocks, with 0, 254 and 255 among them."""
    ids = np.random.default_rng(3).integers(0, high, (6, 9)).astype(np.uint8)
    ids[0, :4] = 0, 255, 254, 1
    return ids.repeat(6, 0).repeat(6, 1)


LABEL_KINDS = {
    "PIL": Image.fromarray,
    "palette": lambda ids: palette(ids),
    "NumPy": lambda ids: ids,
    "torch": torch.from_numpy,
    "int64": lambda ids: ids.astype(np.int64),
    "batch": lambda ids: ids[None],
    "list": lambda ids: [ids],
}
LABEL_OPTIONS = ["square", "enlarged", "shorter side and crop", "nothing resized", "crop alone"]


def palette(ids: np.ndarray) -> Image.Image:
    made = Image.fromarray(ids).convert("P")
    made.putdata(ids.ravel().tolist())
    made.putpalette(list(range(256)) * 3)
    return made


@pytest.mark.parametrize("backend", ["PIL", "torchvision"])
@pytest.mark.parametrize("reduce", [False, True])
@pytest.mark.parametrize(("kind", "name"), product(LABEL_KINDS, LABEL_OPTIONS))
def test_labels_are_those_of_the_nearest_filter(kind, name, reduce, backend, theirs):
    """Where nothing is beyond an edge: see test_edges_of_a_crop_are_ignored."""
    options = {**OPTIONS[name], "resample": 0, "do_reduce_labels": reduce}
    if name == "crop alone":
        options["crop_size"] = 30
    ids = label_map()
    expected = theirs[backend](**options)(noise(), LABEL_KINDS[kind](ids.copy()), return_tensors="pt")
    found = BeitImageProcessor(**options)(noise(), LABEL_KINDS[kind](ids.copy()), return_tensors="pt")
    assert found.labels.dtype == torch.int64
    torch.testing.assert_close(found.labels, expected["labels"], rtol=0, atol=0)


def test_labels_are_never_mixed(theirs):
    """transformers resizes label maps with the filter of the images, which makes classes that no map has."""
    ids = (label_map() > 75).astype(np.uint8) * 100
    (found,) = BeitImageProcessor(size=25)(noise(), ids).labels
    assert set(np.unique(found)) == {0, 100}
    (faulty,) = theirs["PIL"](size=25)(noise(), ids.copy())["labels"]
    assert len(np.unique(faulty)) > 2


def test_reducing_leaves_images_and_the_callers_arrays_alone(theirs):
    """#38042 of transformers reduced images; its PIL backend writes into the caller's label map."""
    given, ids = np.zeros((3, H, W), np.uint8), label_map()
    before = ids.copy()
    options = {"do_resize": False, "do_rescale": False, "do_normalize": False, "do_reduce_labels": True}
    found = BeitImageProcessor(**options)([given] * 2, [ids, ids])
    assert not np.any(found.pixel_values)
    np.testing.assert_array_equal(ids, before)
    for labels in found.labels:  # once, and all of them
        np.testing.assert_array_equal(labels[0, ::6][:4], [255, 255, 253, 0])
    (kept,) = BeitImageProcessor(**options)(given, ids, do_reduce_labels=False).labels
    np.testing.assert_array_equal(kept, before)


def test_edges_of_a_crop_are_ignored():
    options = {"do_resize": False, "do_center_crop": True, "crop_size": (H + 4, W)}
    ones = np.ones((H, W), np.uint8)
    (labels,) = BeitImageProcessor(**options, do_reduce_labels=True)(noise(), ones).labels
    assert (labels[:2] == 255).all()
    assert (labels[-2:] == 255).all()
    assert (labels[2:-2] == 0).all()
    (labels,) = BeitImageProcessor(**options)(noise(), ones).labels
    assert (labels[:2] == 0).all()


def test_ids_beyond_8_bits():
    ids = label_map().astype(np.int32) * 300
    (labels,) = BeitImageProcessor(size=12)(noise(), ids).labels
    np.testing.assert_array_equal(np.unique(labels), np.unique(ids[3::3, 3::3]))
    for form in (ids[None, None], ids[..., None], ids[None, ..., None], [torch.from_numpy(ids[..., None])]):
        (again,) = BeitImageProcessor(size=12)(noise(), form).labels
        np.testing.assert_array_equal(labels, again)


@pytest.mark.parametrize("sizes", [None, [(20, 31), (7, 7)], torch.tensor([[9, 12], [16, 16]])])
def test_post_process_is_identical(sizes, theirs):
    logits = torch.randn(2, 5, 8, 8, generator=torch.Generator().manual_seed(0))
    outputs = SimpleNamespace(logits=logits)
    ours = BeitImageProcessor().post_process_semantic_segmentation(outputs, sizes)
    listed = sizes.tolist() if isinstance(sizes, torch.Tensor) else sizes
    for backend in theirs.values():
        expected = backend().post_process_semantic_segmentation(outputs, listed)
        scores = backend().post_process_semantic_segmentation(outputs, listed, return_segmentation_scores=True)
        for found, other in zip(ours, expected, strict=True):
            assert found.dtype == other.dtype
            torch.testing.assert_close(found, other, rtol=0, atol=0)
        both = BeitImageProcessor().post_process_semantic_segmentation({"logits": logits}, sizes, True)
        for found, other in zip(both, scores, strict=True):
            torch.testing.assert_close(found.segmentation, other["segmentation"], rtol=0, atol=0)
            torch.testing.assert_close(found.segmentation_scores, other["segmentation_scores"], rtol=0, atol=0)


FILES = {
    **FORMS,
    "nothing": {},
    "old name of the type": {"feature_extractor_type": "BeitFeatureExtractor", "size": 384, "crop_size": 224},
    "shorter side as a number": {"size": 40, "default_to_square": False},
    "unknown entries": {"size": 32, "some_new_option": {"a": [1, 2]}, "do_reduce_labels": True},
    "RGB": {"do_convert_rgb": True},
}


def settings(processor) -> dict:
    return json.loads(processor.to_json_string())


@pytest.mark.parametrize("name", FILES)
def test_files_have_the_same_settings_both_ways(name, theirs, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(FILES[name]))
    ours = BeitImageProcessor.from_pretrained(tmp_path)
    read = {key: backend.from_pretrained(tmp_path) for key, backend in theirs.items()}
    for key, processor in read.items():
        assert settings(ours) == settings(processor)
        assert repr(ours).partition(" ")[2] == repr(processor).partition(" ")[2]
        ours.save_pretrained(tmp_path / "a/b")
        assert settings(theirs[key].from_pretrained(tmp_path / "a/b")) == settings(processor)
        processor.save_pretrained(tmp_path / key)
        again = BeitImageProcessor.from_pretrained(tmp_path / key / "preprocessor_config.json")
        assert settings(again) == settings(ours)
    given = image((50, 40))
    for processor in (ours, BeitImageProcessor.from_dict(settings(read["PIL"]))):
        found = processor(given).pixel_values[0]
        np.testing.assert_allclose(found, read["PIL"](given)["pixel_values"][0], atol=1e-4)


def test_null_is_the_default(tmp_path):
    """As in transformers 4; 5 neither resizes nor normalises by such a file, or fails."""
    text = '{"size": null, "image_mean": null, "do_resize": null, "resample": 2}'
    (tmp_path / "preprocessor_config.json").write_text(text)
    assert settings(BeitImageProcessor.from_pretrained(tmp_path)) == settings(BeitImageProcessor(resample=2))


def test_old_and_further_names(theirs, tmp_path):
    """transformers reads over `reduce_labels`, the name of do_reduce_labels in files of 2022."""
    (tmp_path / "preprocessor_config.json").write_text('{"reduce_labels": true, "note": "x", "image_mean": 0.4}')
    processor = BeitImageProcessor.from_pretrained(tmp_path)
    assert (processor.do_reduce_labels, processor.reduce_labels, processor.note) == (True, True, "x")
    assert processor.to_dict()["do_reduce_labels"] is True
    assert "reduce_labels" not in processor.to_dict()
    assert not BeitImageProcessor.from_pretrained(tmp_path, do_reduce_labels=False).do_reduce_labels
    assert not processor.from_pretrained(tmp_path, reduce_labels=False).do_reduce_labels
    (labels,) = BeitImageProcessor(do_resize=False)(noise(), label_map(), reduce_labels=True).labels
    assert labels[0, 0] == 255
    assert not hasattr(processor, "nothing")
    assert settings(pickle.loads(pickle.dumps(copy.deepcopy(processor)))) == settings(processor)


def test_options_are_attributes_that_can_be_set():
    processor = BeitImageProcessor.from_dict(
        BeitImageProcessor().to_dict(), size=np.int64(40), image_std=(0.2, 0.3, 0.4)
    )
    assert processor.size == {"height": 40, "width": 40}
    processor.size, processor.do_rescale = 20, False
    assert processor(noise(), return_tensors="pt").pixel_values.shape[2:] == (20, 20)
    assert processor.to_dict()["size"] == {"height": 20, "width": 20}


def test_filters_of_torchvision():
    from torchvision.transforms import InterpolationMode

    for mode, number in ((InterpolationMode.NEAREST_EXACT, 0), (InterpolationMode.BICUBIC, 3)):
        assert BeitImageProcessor(resample=mode).resample == number


def test_enumerations_of_transformers():
    from transformers.image_utils import ChannelDimension
    from transformers.utils import TensorType

    made = BeitImageProcessor(size=8)(noise(), return_tensors=TensorType.PYTORCH, data_format=ChannelDimension.LAST)
    assert made.pixel_values.shape == (1, 8, 8, 3)


@pytest.mark.parametrize("name", ["list and crop", "crop beyond the shorter side", "crop alone", "another factor"])
def test_predict_sees_what_the_processor_makes(name, network, tmp_path):
    folder = saved(network, tmp_path / "hf", FORMS[name])
    processor = BeitImageProcessor.from_pretrained(folder)
    for size in SIZES:
        made = processor(image(size), return_tensors="pt").pixel_values
        torch.testing.assert_close(seen(folder, size), made, atol=1e-4, rtol=1e-5)


def test_checkpoints_have_a_processor(mim_checkpoint, segmenter_checkpoint):
    processor = BeitImageProcessor.from_pretrained(mim_checkpoint)
    assert (processor.size, processor.crop_size) == ({"shortest_edge": 36}, {"height": 32, "width": 32})
    assert processor.do_center_crop
    processor = BeitImageProcessor.from_pretrained(segmenter_checkpoint, do_normalize=False)
    assert (processor.size, processor.do_reduce_labels) == ({"height": 32, "width": 32}, True)
    assert not processor.do_normalize


@pytest.mark.parametrize("image_size", [32, (64, 32)])
def test_weights_without_a_processor_have_their_evaluation_view(image_size, tmp_path):
    """A fresh model saves none; its folder and its file, and those of a trained one, give the same."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    config = beit_pretrain.BeitConfig(**sizes, image_size=image_size, patch_size=8)
    model = seeded(beit_pretrain.BeitModel, config)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "preprocessor_config.json").exists()
    cropped = {"size": {"shortest_edge": 36}, "do_center_crop": True, "crop_size": 32}
    expected = BeitImageProcessor(**cropped if image_size == 32 else {"size": image_size})
    for place in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.warns(UserWarning, match=r"has no preprocessor_config.json: the preparation .* is a guess"):
            assert settings(BeitImageProcessor.from_pretrained(place)) == settings(expected)
    model.network.about["mean"] = [0.1, 0.2, 0.3]
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings(action="error"):
        found = [BeitImageProcessor.from_pretrained(place) for place in (tmp_path, tmp_path / "model.safetensors")]
    assert settings(found[0]) == settings(found[1]) == {**settings(expected), "image_mean": [0.1, 0.2, 0.3]}
    line = refusal(BeitImageProcessor.from_pretrained, tmp_path / "config.json")
    assert line.endswith("config.json is of a model; its processor is preprocessor_config.json")


def test_checkpoints_that_do_not_say_are_a_guess(tmp_path):
    made = []
    for size in (32, (64, 32)):
        model = seeded(MaskedImageModel, **{**MIM, "image_size": size})
        path = write_checkpoint(tmp_path / "a.ckpt", "mim", model)
        with pytest.warns(UserWarning, match=r"a\.ckpt does not say how its images are prepared"):
            made.append(BeitImageProcessor.from_pretrained(path))
    assert [each.crop_size for each in made] == [{"height": 32, "width": 32}, {"height": 224, "width": 224}]
    assert (made[1].size, made[1].do_center_crop) == ({"height": 64, "width": 32}, False)


def test_misspelt_options_are_refused():
    for name, meant in {
        "do_normalise": "do_normalize",
        "img_mean": "image_mean",
        "sise": "size",
        "do_reduce_label": "do_reduce_labels",
    }.items():
        with pytest.raises(TypeError, match=f"^{name}: no option of BeitImageProcessor; did you mean {meant}"):
            BeitImageProcessor(**{name: 1})
    further = {"do_pad": 1, "size_divisor": 1, "pad_size": 1, "crop_pct": 1, "rescale_offset": 1, "do_flip": 1}
    further |= {"do_reduce_zero_label": 1, "do_convert_grayscale": 1, "default_to_square": True}
    assert BeitImageProcessor(**further).extra == further


def test_none_is_no_place():
    for call in (BeitImageProcessor.from_pretrained, BeitImageProcessor().save_pretrained):
        with pytest.raises(TypeError, match="_pretrained needs the name of a folder, got None"):
            call(None)


def test_paths_are_opened_and_turned_upright(theirs, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    pil(smooth()).save(tmp_path / "turned.png", exif=exif)
    for given in (tmp_path / "turned.png", str(tmp_path / "turned.png"), [tmp_path / "turned.png"]):
        made = BeitImageProcessor(size={"shortest_edge": 24})(given).pixel_values[0]
        assert made.shape == (3, W * 24 // H, 24)
    expected = theirs["PIL"](size={"shortest_edge": 24})(str(tmp_path / "turned.png"))["pixel_values"][0]
    np.testing.assert_allclose(made, expected, atol=1e-5)


def test_thin_images_take_no_memory():
    thin = Image.new("RGB", (60_000, 1), (9, 99, 199))
    made = BeitImageProcessor(size={"shortest_edge": 36}, do_center_crop=True, crop_size=32)(thin)
    np.testing.assert_allclose(made.pixel_values[0][:, 5, 5], np.array([9, 99, 199]) / 127.5 - 1, atol=1e-5)
    with pytest.raises(ValueError, match="60000 pixels would become 3000 x 180000000: set a crop_size"):
        BeitImageProcessor(size={"shortest_edge": 3000})(thin)


X = np.zeros((3, 8, 8), np.uint8)
WRONG = [
    (TypeError, dict(do_resize="yes"), "do_resize must be True or False, got 'yes'"),
    (TypeError, dict(size="large"), "size must be a number of pixels"),
    (TypeError, dict(size=True), "size must be a number of pixels"),
    (ValueError, dict(size=0), "from 1 to 65535 pixels; got 0"),
    (ValueError, dict(size=10**9), "from 1 to 65535 pixels"),
    (TypeError, dict(size=22.5), "size must be a number of pixels"),
    (ValueError, dict(size=(1, 2, 3)), "size must be a number of pixels"),
    (ValueError, dict(size={"longest_edge": 9}), "size must be a number of pixels"),
    (ValueError, dict(size={"height": 9}), "size must be a number of pixels"),
    (ValueError, dict(resample=9), "resample must be a filter from 0 to 5"),
    (TypeError, dict(resample="bicubic"), "resample must be a PIL.Image.Resampling"),
    (TypeError, dict(rescale_factor="1/255"), "rescale_factor must be a number"),
    (ValueError, dict(rescale_factor=float("nan")), "rescale_factor must be finite"),
    (TypeError, dict(image_mean=["a"]), "each value of image_mean must be a number"),
    (TypeError, dict(image_mean=[]), "image_mean must be a number or a list"),
    (ValueError, dict(image_std=[0.5, 0, 0.5]), "image_std must not be 0"),
    (ValueError, dict(image_std=[0.5, 0.5]), "image_std has 2 values for an image of 3 channels"),
    (ValueError, dict(image_mean=[0.5] * 2), "has 3 channels|has 2 values for an image of 3 channels"),
    (ValueError, dict(do_center_crop=True, crop_size={"shortest_edge": 9}), "crop_size must be a height and a width"),
    (TypeError, dict(do_resise=True), "do_resise: no option of BeitImageProcessor; it has do_resize"),
    (ValueError, dict(return_tensors="tf"), 'return_tensors must be "pt", "np" or None, got \'tf\''),
    (ValueError, dict(input_data_format="last"), "input_data_format must be channels_first or channels_last"),
    (ValueError, dict(images=[]), "there are no images"),
    (TypeError, dict(images=None), "images must be a PIL image, .* got NoneType"),
    (TypeError, dict(images=[[1, 2], [3, 4]]), "got int"),
    (TypeError, dict(images=np.array(["a", "b"])), "images must hold numbers"),
    (ValueError, dict(images=np.zeros((3, 0, 8), np.uint8)), "has no pixels"),
    (ValueError, dict(images=Image.new("RGB", (0, 8)), size={"shortest_edge": 8}), "an image of 0 x 8 has no pixels"),
    (ValueError, dict(images=np.zeros(8)), r"of shape \(8,\) is no image and no batch"),
    (ValueError, dict(images=np.zeros((2, 2, 3, 8, 8))), "is no image and no batch"),
    (ValueError, dict(images=np.zeros((8, 9, 10))), "3 channels neither first nor last; say input_data_format"),
    (ValueError, dict(images=np.full((4, 8, 8), 2.0), do_convert_rgb=True), "RGBA with values from 2.0 to 2.0"),
    (ValueError, dict(images=X - 0.5), "values from -0.5 to -0.5 cannot be resized"),
    (ValueError, dict(images=X + np.nan), "values from nan to nan cannot be resized"),
    (ValueError, dict(images=X.astype(np.uint16) + 999), "values from 999 to 999 cannot be resized"),
    (ValueError, dict(images="https://example.com/a.jpg"), "images are not fetched from the network"),
    (ValueError, dict(images=X, segmentation_maps=[X[0], X[0]]), "1 images with 2 segmentation_maps"),
    (ValueError, dict(images=X, segmentation_maps=X[0] + 0.5), "a label map must hold whole numbers"),
    (ValueError, dict(images=X, segmentation_maps=X[0][:0]), "has no pixels"),
    (ValueError, dict(images=X, segmentation_maps=X[None, None]), "is no label map and no batch"),
    (TypeError, dict(segmentation_maps=[X[0], None]), "segmentation_maps must be a PIL image, .* got NoneType"),
    (TypeError, dict(segmentation_maps=[1, 2]), "segmentation_maps must be a PIL image, .* got int"),
    (TypeError, dict(segmentation_maps=np.array([["a"]])), "segmentation_maps must hold numbers"),
    (ValueError, dict(segmentation_maps=X[0] - np.int64(1), do_reduce_labels=True), "has the id -1: do_reduce_labels"),
    (ValueError, dict(images=X, segmentation_maps=Image.new("RGB", (8, 8))), "of mode RGB, not one number per pixel"),
]  # fmt: skip


@pytest.mark.parametrize(("error", "given", "said"), WRONG, ids=range(len(WRONG)))
def test_wrong_input_is_refused_in_one_line(error, given, said):
    with pytest.raises(error, match=said) as caught:
        BeitImageProcessor()(**{"images": X, **given})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("outputs", "sizes", "error", "said"),
    [
        (SimpleNamespace(), None, TypeError, "outputs must have logits"),
        ({"logits": torch.zeros(2, 5)}, None, TypeError, "outputs must have logits"),
        ({"logits": torch.zeros(2, 5, 4, 4)}, [(4, 4)], ValueError, "target_sizes has 1 entries for 2 images"),
        ({"logits": torch.zeros(1, 5, 4, 4)}, [(4, 0)], ValueError, "in pixels"),
        *(
            ({"logits": torch.zeros(2, 5, 4, 4)}, sizes, ValueError, r"^target_sizes must hold \(height, width\)")
            for sizes in ((30, 20), 4, "ab", ["12", "34"], [(4, 4), "44"], [(4.5, 4)] * 2, [(4, float("nan"))] * 2)
        ),
    ],
)
def test_wrong_outputs_are_refused(outputs, sizes, error, said):
    with pytest.raises(error, match=said):
        BeitImageProcessor().post_process_semantic_segmentation(outputs, sizes)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "does not exist; BeitImageProcessor() has"),
        ("{", "is no JSON"),
        ("[1]", "holds a list, not settings by name"),
        ('{"size": "large"}', "size must be a number of pixels"),
        ('{"resample": 17}', "resample must be a filter"),
        ('{"self": 1}', "self"),
    ],
)
def test_wrong_files_are_refused(text, said, tmp_path):
    if text:
        (tmp_path / "preprocessor_config.json").write_text(text)
    line = refusal(BeitImageProcessor.from_pretrained, tmp_path)
    assert said in line
    assert str(tmp_path) in line


def test_unreadable_images_and_places(tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    assert "text.jpg cannot be read as an image: not an image" in refusal(BeitImageProcessor(), tmp_path / "text.jpg")
    assert "none.jpg cannot be read as an image: FileNotFoundError" in refusal(BeitImageProcessor(), "none.jpg")
    pil(noise()).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:3000])
    with Image.open(tmp_path / "cut.png") as opened:
        assert "of mode RGB cannot be decoded" in refusal(BeitImageProcessor(), opened)
    Image.fromarray(noise()[0]).save(tmp_path / "map.png")
    (tmp_path / "map.png").write_bytes((tmp_path / "map.png").read_bytes()[:1000])
    with Image.open(tmp_path / "map.png") as opened:
        assert "label map of mode L cannot be decoded" in refusal(BeitImageProcessor(), X, opened)
    assert "cannot be written" in refusal(BeitImageProcessor().save_pretrained, tmp_path / "text.jpg")
    with pytest.raises(TypeError, match="sise: no option"):
        BeitImageProcessor.from_pretrained(tmp_path, sise=3)


def test_public_names():
    assert beit_pretrain.BeitFeatureExtractor is beit_pretrain.BeitImageProcessor is BeitImageProcessor


def test_example_of_the_docs(tmp_path, monkeypatch):
    """The code of the section "Image processor"."""
    pages = [page.read_text() for page in sorted((ROOT / "docs").glob("*.md"))]
    sections = [
        found[1] for page in pages if (found := re.search(r"\n## Image processor\n(.*?)(?=\n## |\Z)", page, re.S))
    ]
    assert len(sections) == 1
    code = re.findall(r"```python\n(.*?)```", sections[0], re.S)
    assert code
    pil(smooth()).save(tmp_path / "photo.jpg")
    Image.fromarray(label_map(20)).save(tmp_path / "labels.png")
    BeitImageProcessor(size=32).save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    exec(compile("\n".join(code), "docs", "exec"), {"__name__": "docs"})
    assert (tmp_path / "mine/preprocessor_config.json").is_file()
