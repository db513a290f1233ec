"""`BeitConfig`: transformers' names and defaults, its files both ways, and refusals."""

from __future__ import annotations

import json

import pytest
from foreign import hf_config
from tiny import refusal

from beit_pretrain import BeitConfig
from beit_pretrain.models.checkpoints.hf_config import HFConfig

NOT_OURS = {"transformers_version", "dtype", "architectures"}


def test_defaults_are_those_of_transformers():
    from transformers import BeitConfig as Theirs

    theirs = json.loads(Theirs().to_json_string(use_diff=False))
    ours = json.loads(json.dumps(BeitConfig().to_dict()))
    assert ours == {name: theirs[name] for name in ours}
    # What is left are settings that all models of transformers have.
    assert not {name for name in theirs if name.startswith(("use_", "aux", "num_", "layer", "hidden"))} - ours.keys()
    assert HFConfig.model_fields.keys() == BeitConfig.model_fields.keys()


def test_files_both_ways(tmp_path):
    from transformers import BeitConfig as Theirs

    settings = {"problem_type": "regression", "num_labels": 3, "out_indices": [1, 2], "initializer_range": 0.01}
    theirs = hf_config(absolute=True, scale=None, **settings)
    theirs.save_pretrained(tmp_path)
    ours = BeitConfig.from_pretrained(tmp_path)
    assert (ours.num_labels, ours.out_indices, ours.layer_scale_init_value) == (3, [1, 2], 0.0)
    ours.save_pretrained(tmp_path / "back")
    assert Theirs.from_pretrained(tmp_path / "back").to_dict() == theirs.to_dict()
    assert BeitConfig.from_json_file(tmp_path / "back/config.json") == ours == BeitConfig.from_dict(ours.to_dict())
    changed = BeitConfig.from_pretrained(tmp_path / "back/config.json", num_labels=5, drop_path_rate=0.5)
    assert (changed.num_labels, changed.drop_path_rate) == (5, 0.5)


def test_labels():
    assert BeitConfig(num_labels=3).id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    assert BeitConfig(label2id={"b": 1, "a": 0}).id2label == {0: "a", 1: "b"}
    assert BeitConfig(id2label={0: "crane", 1: "crane"}).num_labels == 2  # the released ImageNet models have two
    config = BeitConfig(id2label={"1": "b", "0": "a"})
    assert (config.num_labels, config.label2id) == (2, {"a": 0, "b": 1})
    config.num_labels = 2
    assert config.id2label == {0: "a", 1: "b"}
    config.num_labels = 1
    assert config.id2label == {0: "LABEL_0"}


def test_old_and_foreign_files(tmp_path):
    assert BeitConfig.from_dict({"segmentation_indices": [3, 5, 7, 11], "architectures": ["x"]}).out_indices == [
        3,
        5,
        7,
        11,
    ]
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    assert "is of a vit model" in refusal(BeitConfig.from_pretrained, tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "is no JSON" in refusal(BeitConfig.from_pretrained, tmp_path)
    assert "does not exist" in refusal(BeitConfig.from_json_file, tmp_path / "none.json")
    (tmp_path / "empty").mkdir()
    assert "does not exist" in refusal(BeitConfig.from_pretrained, tmp_path / "empty")


def test_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = BeitConfig(hidden_size=48)
    config.save_pretrained("~/a")
    assert BeitConfig.from_json_file("~/a/config.json") == BeitConfig.from_pretrained("~/a") == config
    for name in ("a.ckpt", "model.safetensors"):
        (tmp_path / name).write_bytes(b"\x80")
        assert "give a config.json, or the folder" in refusal(BeitConfig.from_pretrained, tmp_path / name)
    assert "save_pretrained writes a folder" in refusal(config.save_pretrained, tmp_path / "a.ckpt")
    assert "cannot be written" in refusal(config.save_pretrained, tmp_path / "a.ckpt/b")
    assert "a path is needed, got None" in refusal(config.save_pretrained, None)
    for source in (None, 3):
        assert f"OWNER/NAME on the Hub, is needed; got {source}" in refusal(BeitConfig.from_pretrained, source)
    with pytest.raises(TypeError, match="BeitConfig takes its values by name"):
        BeitConfig(768)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"hiden_size": 3}, "did you mean hidden_size?"),
        ({"hidden_size": 0}, "hidden_size must be a whole number of at least 1, got 0"),
        ({"hidden_size": "32"}, "hidden_size must be a whole number"),
        ({"drop_path_rate": 2}, "drop_path_rate must be a number of at least 0 and below 1, got 2"),
        ({"drop_path_rate": 1.0}, "drop_path_rate must be a number of at least 0 and below 1, got 1.0"),
        ({"image_size": (1, 2, 3)}, "image_size must be a whole number"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps must be"),
        ({"num_labels": 0}, "num_labels=0 must be a whole number of at least 1"),
        ({"num_labels": 3, "id2label": {0: "a"}}, "give one of the two"),
        ({"id2label": {1: "a"}}, "by their numbers"),
        ({"id2label": {"x": "a"}}, "by their numbers"),
        ({"id2label": ["a", "b"]}, "by their numbers"),
        ({"problem_type": "ranking"}, "problem_type must be null or one of regression"),
    ],
)
def test_values_that_cannot_be(settings, said):
    assert said in refusal(BeitConfig, **settings)
    config = BeitConfig()
    if "num_labels" not in settings:
        ((name, value),) = settings.items()
        refusal(setattr, config, name, value)
