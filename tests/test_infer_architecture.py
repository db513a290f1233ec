"""Invalid tensors and configs are refused in one line before memory is allocated; harmless oddities are accepted."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from foreign import hf_classifier, scrambled, timm_beit
from safetensors.torch import load_file, save_file

from beit_pretrain.models.checkpoints.formats import digest, read_checkpoint
from beit_pretrain.models.checkpoints.pretrained import load_pretrained


def refusal(path, head="classify", **settings) -> str:
    return tiny.refusal(load_pretrained, path, head, **settings)


@pytest.fixture(scope="module")
def state():
    return timm_beit().state_dict()


TABLE = "blocks.0.attn.relative_position_bias_table"


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        ("head.weight", torch.tensor(1.0), "has the shape ()"),
        (TABLE, torch.zeros(52), "has the shape (52,)"),
        (TABLE, torch.zeros(52, 0), "has the shape (52, 0)"),
        ("pos_embed", torch.zeros(7), "has the shape (7,)"),
        ("blocks.0.mlp.fc1.weight", torch.tensor(1.0), "has the shape ()"),
        ("patch_embed.proj.weight", torch.zeros(0, 3, 8, 8), "has the shape (0, 3, 8, 8)"),
        ("patch_embed.proj.weight", torch.zeros(32, 3, 8, 4), "square patches"),
        (TABLE, torch.full((52, 2), torch.nan), "holds NaN or infinite"),
        ("cls_token", torch.full((1, 1, 32), torch.inf), "holds NaN or infinite"),
        ("cls_token", torch.zeros(1, 1, 32).to_sparse(), "weights are real numbers"),
        ("cls_token", torch.zeros(1, 1, 32, dtype=torch.int8), "weights are real numbers"),
        ("cls_token", torch.zeros(1, 1, 32, dtype=torch.complex64), "weights are real numbers"),
        ("head.weight", torch.zeros(1).expand(10**9, 32), "claims more numbers"),
        ("blocks.0.attn.k_bias", torch.ones(32), "k has no bias"),
        ("blocks.999999.attn.q_bias", torch.zeros(32), "not numbered 0 to 2: 999999"),
        (f"blocks.{'9' * 5000}.attn.q_bias", torch.zeros(32), "not numbered 0 to 2"),
        ("blocks.x.attn.q_bias", torch.zeros(32), "unexpected: blocks.x.attn.q_bias"),
        (TABLE, torch.zeros(52, 5), "does not divide into 5 heads"),
    ],
)
def test_invalid_tensors(name, tensor, said, state, tmp_path):
    torch.save({"model": {**state, name: tensor}}, tmp_path / "a.pth")
    assert said in refusal(tmp_path / "a.pth")


def test_too_many_blocks(state, tmp_path):
    more = {f"blocks.{i}.attn.q_bias": torch.zeros(32) for i in range(1001)}
    torch.save({"model": {**state, **more}}, tmp_path / "a.pth")
    assert "has 1001 blocks; 1000 at most" in refusal(tmp_path / "a.pth")


def test_zero_k_bias_is_accepted(state, tmp_path):
    torch.save({"model": {**state, "blocks.0.attn.k_bias": torch.zeros(32)}}, tmp_path / "a.pth")
    assert load_pretrained(tmp_path / "a.pth", "classify")


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    hf_classifier().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("file", "key", "value", "said"),
    [
        ("config.json", "layer_norm_eps", "abc", "norm_eps"),
        ("config.json", "layer_norm_eps", None, "norm_eps"),
        ("config.json", "layer_norm_eps", -1, "norm_eps"),
        ("config.json", "drop_path_rate", None, "drop_path_rate"),
        ("config.json", "image_size", "64", "image_size"),
        ("config.json", "image_size", 64.0, "image_size"),
        ("config.json", "image_size", [64], "image_size"),
        ("config.json", "image_size", 65535, "not divisible"),
        ("config.json", "image_size", 65528, "patches"),
        ("config.json", "num_attention_heads", "x", "num_heads"),
        ("config.json", "id2label", ["a", "b"], "id2label"),
        ("config.json", "id2label", {"x": "a"}, "id2label"),
        ("preprocessor_config.json", "image_mean", 0.5, "mean"),
        ("preprocessor_config.json", "image_mean", [0.5, 0.5], "mean"),
        ("preprocessor_config.json", "image_mean", "abc", "mean"),
        ("preprocessor_config.json", "image_std", [0.5, 0.0, 0.5], "std"),
    ],
)
def test_invalid_configs(file, key, value, said, hf_folder, tmp_path):
    for source in hf_folder.iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    path = tmp_path / file
    config = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**config, key: value}))
    assert said in refusal(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("size", 64),
        ("size", {"shortest_edge": 0}),
        ("crop_size", 3),
        ("do_center_crop", True),
        ("image_mean", [0.1] * 3),
    ],
)
def test_odd_processors_are_accepted(key, value, hf_folder, tmp_path):
    for source in hf_folder.iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    config = {"do_center_crop": True, "size": {"shortest_edge": 36}, "crop_size": {"height": 32}, key: value}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    assert load_pretrained(tmp_path, "classify")


def test_deeply_nested_json(hf_folder, tmp_path):
    for source in hf_folder.iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    (tmp_path / "preprocessor_config.json").write_text("[" * 200_000)
    assert "is no JSON" in refusal(tmp_path)


@pytest.mark.parametrize("said", [None, {"mean": "abc"}, {"crop_pct": "x"}, {"crop_pct": 2.0}])
def test_timm_folders(said, state, tmp_path):
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "beit", "pretrained_cfg": said}))
    if said is None:
        assert load_pretrained(tmp_path, "classify")
    else:
        assert "of its config must be" in refusal(tmp_path)


def test_sharded_weights(hf_folder, tmp_path):
    model = hf_classifier()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    one, several = (load_pretrained(folder, "classify").state_dict() for folder in (hf_folder, tmp_path))
    assert all(torch.equal(tensor, several[name]) for name, tensor in one.items())
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001", "../model-00001"))
    assert "is no file beside it" in refusal(tmp_path)


def test_mismatched_class_names_are_dropped(hf_folder, tmp_path):
    for source in hf_folder.iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "id2label": {"0": "cat", "1": "dog"}}))
    assert "classes" not in load_pretrained(tmp_path, "classify").about


def test_new_head_drops_class_names(hf_folder, tmp_path):
    model = hf_classifier()
    model.config.id2label = {i: f"class {i}" for i in range(7)}
    model.save_pretrained(tmp_path)
    assert "classes" in load_pretrained(tmp_path, "classify").about
    assert "classes" not in load_pretrained(tmp_path, "classify", num_classes=3).about


def test_non_square_grid_needs_image_size(tmp_path):
    model = timm_beit((32, 64))
    torch.save(model.state_dict(), tmp_path / "a.pth")
    assert "image_size=(height, width)" in refusal(tmp_path / "a.pth")
    assert "image_size=(height, width)" in refusal(tmp_path / "a.pth", image_size=(64, 64))
    ours = load_pretrained(tmp_path / "a.pth", "classify", image_size=(32, 64))
    image = torch.randn(2, 3, 32, 64)
    with torch.no_grad():
        assert torch.allclose(ours(image), model(image), atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        *({"image_size": size} for size in (32.0, "64", (64.0, 32), (32,), -32, True)),
        *({"num_classes": count} for count in (2.5, "3", True, 0, -1)),
        {"image_size": 8 * 1000},
    ],
)
def test_invalid_arguments(settings, state, tmp_path):
    torch.save({"model": state}, tmp_path / "a.pth")
    assert next(iter(settings)) in refusal(tmp_path / "a.pth", **settings)


def test_prefixes_in_any_order(state, tmp_path):
    for prefix in ("module.model.", "model.module.", "_orig_mod.", "module._orig_mod."):
        torch.save({"state_dict": {prefix + name: tensor for name, tensor in state.items()}}, tmp_path / "a.pth")
        assert load_pretrained(tmp_path / "a.pth", "classify")


def test_onnx_file_is_refused(tmp_path):
    (tmp_path / "a.onnx").write_bytes(b"\x08\x0a\x12\x07pytorch" + bytes(100))
    assert "an ONNX graph is for running elsewhere" in refusal(tmp_path / "a.onnx")


def test_digest(state, hf_folder):
    assert digest(state) == digest({name: state[name].clone() for name in reversed(state)})
    changed = {**state, "cls_token": state["cls_token"] + 1e-3}
    assert digest(changed) != digest(state)
    assert digest(read_checkpoint(hf_folder).state) != digest(load_file(hf_folder / "model.safetensors"))
    assert scrambled(timm_beit()) is not None
