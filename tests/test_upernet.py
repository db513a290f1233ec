"""UPerNet against transformers' BeitForSemanticSegmentation: outputs, files both ways, errors."""

from __future__ import annotations

import json

import pytest
import torch
from foreign import hf_config, scrambled
from safetensors.torch import load_file
from tiny import MIM, write_checkpoint

from beit_pretrain.errors import UserError
from beit_pretrain.models.backbone import Classifier, FeatureExtractor, MaskedImageModel
from beit_pretrain.models.checkpoints.formats import read_checkpoint
from beit_pretrain.models.checkpoints.pretrained import load_pretrained, segmenter
from beit_pretrain.models.upernet import Segmenter, default_layers

NETWORK = {"image_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
ABOUT = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "classes": ["a", "b", "c"], "reduce_labels": False}


def hf_segmenter(**settings):
    from transformers import BeitForSemanticSegmentation

    settings = {"bias": "per_layer", "out_indices": [1, 2, 3, 4], "num_labels": 5, "auxiliary_channels": 16, **settings}
    config = hf_config(num_hidden_layers=4, **settings)
    return with_statistics(scrambled(BeitForSemanticSegmentation(config)))


def with_statistics(model):
    """Batch norms whose running statistics are not 0 and 1."""
    generator = torch.Generator().manual_seed(2)
    for name, buffer in sorted(model.named_buffers()):
        if name.endswith("running_mean"):
            buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.2)
        elif name.endswith("running_var"):
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return model


def ours(**settings) -> Segmenter:
    decoder = {"aux_channels": 16, **settings.pop("decoder", {})}
    return with_statistics(scrambled(Segmenter(3, decoder, **{**NETWORK, **settings}))).eval()


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    assert one.shape == other.shape
    return (one - other).abs().max() <= 1e-4 * max(1.0, float(other.abs().max()))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"bias": "shared"},
        {"bias": "none", "absolute": True, "scale": None},
        {"image_size": 80, "patch_size": 16},  # 5 x 5 patches: an odd number is pooled, and enlarged unevenly
        {"image_size": 64, "patch_size": 16, "pool_scales": [1, 2]},
        {"use_auxiliary_head": False},
        {"auxiliary_num_convs": 2},
        {"hidden_size": 64, "num_attention_heads": 4},
        {"num_channels": 1},
        {"use_mean_pooling": False},
    ],
)
def test_matches_transformers(settings, tmp_path):
    theirs = hf_segmenter(**settings)
    theirs.save_pretrained(tmp_path)
    mine = load_pretrained(tmp_path, "segment")
    size = settings.get("image_size", 32)
    image = torch.randn(2, settings.get("num_channels", 3), size, size)
    with torch.no_grad():
        assert close(mine(image).main, theirs(image).logits)
        if theirs.auxiliary_head is not None:
            states = theirs(image, output_hidden_states=True).hidden_states
            grid = (size // mine.config["patch_size"],) * 2
            third = states[2][:, 1:].transpose(1, 2).unflatten(2, grid)
            expected = theirs.auxiliary_head([None, None, third, None])
            assert close(mine(image).auxiliary, expected)


@pytest.mark.soak
@pytest.mark.long
def test_matches_transformers_base_640(tmp_path):
    from transformers import BeitConfig, BeitForSemanticSegmentation

    settings = {"use_relative_position_bias": True, "layer_scale_init_value": 0.1}
    config = BeitConfig(image_size=640, out_indices=[3, 5, 7, 11], num_labels=150, **settings)
    theirs = with_statistics(scrambled(BeitForSemanticSegmentation(config), std=0.02))
    theirs.save_pretrained(tmp_path)
    image = torch.randn(1, 3, 640, 640)
    with torch.no_grad():
        mine = load_pretrained(tmp_path, "segment")(image).main
        assert mine.shape == (1, 150, 160, 160)
        assert close(mine, theirs(image).logits)


def test_gradients_match_transformers(tmp_path):
    theirs = hf_segmenter()
    theirs.save_pretrained(tmp_path)
    mine = load_pretrained(tmp_path, "segment")
    gradients = []
    for model in (mine, theirs):
        image = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32).requires_grad_()
        out = model(image)
        (out.main if model is mine else out.logits).square().mean().backward()
        gradients.append(image.grad)
    assert close(*gradients)


@pytest.mark.parametrize("decoder", [{}, {"layers": [0, 1, 2, 3]}, {"aux_channels": None}, {"pool_scales": [1, 3]}])
def test_round_trip_to_hugging_face(decoder, run_cli, tmp_path):
    """Also with the last block among the four layers: transformers needs an extra idle block for it."""
    from transformers import BeitForSemanticSegmentation, BeitImageProcessor

    model = ours(decoder=decoder)
    write_checkpoint(tmp_path / "a.ckpt", "segmenter", model, **ABOUT)
    code, stdout, stderr = run_cli("export", f"init_from={tmp_path / 'a.ckpt'}", "to=hf", f"out={tmp_path / 'hf'}")
    assert code == 0, stderr
    assert "the same numbers" in stdout
    again = load_pretrained(tmp_path / "hf", "segment")
    assert again.config == {**model.config, "drop_path_rate": 0.0}
    assert {n: again.about[n] for n in ("classes", "mean", "reduce_labels")} == {
        n: ABOUT[n] for n in ("classes", "mean", "reduce_labels")
    }
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    image = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        theirs = BeitForSemanticSegmentation.from_pretrained(tmp_path / "hf").eval()
        assert close(model(image).main, theirs(image).logits)
    assert BeitImageProcessor.from_pretrained(tmp_path / "hf").do_reduce_labels is False
    assert "BeitForSemanticSegmentation" in (tmp_path / "hf" / "README.md").read_text()


def test_round_trip_from_hugging_face(run_cli, tmp_path):
    hf_segmenter().save_pretrained(tmp_path / "theirs")
    assert run_cli("export", f"init_from={tmp_path / 'theirs'}", "to=hf", f"out={tmp_path / 'back'}")[0] == 0
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_unilm_names(tmp_path):
    """`backbone.` before transformer and up-sampling, `conv_seg` for classifiers; the layers are not stored."""
    model = ours(image_size=32)
    renamed = {}
    for name, tensor in model.state_dict().items():
        head = name.startswith(("decode_head.", "auxiliary_head."))
        renamed[name.replace(".classifier.", ".conv_seg.") if head else f"backbone.{name}"] = tensor
    torch.save({"meta": {"epoch": 1}, "state_dict": renamed}, tmp_path / "upernet.pth")
    source = read_checkpoint(tmp_path / "upernet.pth")
    assert source.kind == "segmenter"
    image = torch.randn(1, 3, 32, 32)
    again = load_pretrained(tmp_path / "upernet.pth", "segment")
    with torch.no_grad():
        assert close(again(image).main, model(image).main)


class TestFromOtherCheckpoints:
    @pytest.fixture
    def pretrained(self, tmp_path):
        network = {**NETWORK, "vocab_size": 16}
        return write_checkpoint(tmp_path / "mim.ckpt", "mim", scrambled(MaskedImageModel(**network)))

    @pytest.mark.parametrize("size", [32, 64, (64, 32)])
    def test_new_decoder_on_backbone(self, size, pretrained):
        model = load_pretrained(pretrained, "segment", image_size=size, num_classes=7)
        features = load_pretrained(pretrained, "features", image_size=size)
        sides = (size, size) if isinstance(size, int) else size
        image = torch.randn(2, 3, *sides)
        with torch.no_grad():
            maps = model(image)
            third = features(image).patches[model.layers[2] - 1].transpose(1, 2).unflatten(2, model.grid)
            assert torch.allclose(model.pyramid(image)[2], third, atol=1e-5)
        assert maps.main.shape == (2, 7, sides[0] // 2, sides[1] // 2)
        assert maps.auxiliary.shape == (2, 7, sides[0] // 8, sides[1] // 8)
        assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())
        assert model.config["rel_pos_bias"] == "per_layer"

    def test_other_classes_replace_only_classifiers(self, tmp_path):
        model = ours()
        path = write_checkpoint(tmp_path / "a.ckpt", "segmenter", model, **ABOUT)
        other = load_pretrained(path, "segment", num_classes=9)
        old, new = model.state_dict(), other.state_dict()
        changed = {name for name in old if old[name].shape != new[name].shape or not torch.equal(old[name], new[name])}
        assert {name.rpartition(".")[0] for name in changed} == {"decode_head.classifier", "auxiliary_head.classifier"}

    def test_new_heads_do_not_keep_names_of_classes(self, tmp_path):
        path = write_checkpoint(tmp_path / "a.ckpt", "segmenter", ours(), **ABOUT)
        assert load_pretrained(path, "segment").about["classes"] == ABOUT["classes"]
        for head in ("segment", "classify"):
            assert "classes" not in load_pretrained(path, head, num_classes=9).about

    def test_other_heads_on_segmenter(self, tmp_path):
        path = write_checkpoint(tmp_path / "a.ckpt", "segmenter", ours(), **ABOUT)
        assert isinstance(load_pretrained(path), FeatureExtractor)
        assert isinstance(load_pretrained(path, "classify", num_classes=4), Classifier)
        with pytest.raises(UserError, match="num_classes is needed"):
            load_pretrained(path, "classify")
        with pytest.raises(UserError, match="without a token head"):
            load_pretrained(path, "mim")

    def test_other_layers_for_loaded_decoder(self, tmp_path):
        path = write_checkpoint(tmp_path / "a.ckpt", "segmenter", ours(), **ABOUT)
        assert segmenter(read_checkpoint(path), decoder={"layers": [1, 1, 2, 4], "channels": 8}).layers == [1, 1, 2, 4]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder, config: config.update(auxiliary_concat_input=True), "auxiliary_concat_input"),
        (lambda folder, config: config.update(pool_scales=[1, 2, 3]), "does not fit"),
        (lambda folder, config: config.update(out_indices=[1, 2, 3, 9]), "must be four numbers up to 4"),
    ],
)
def test_mismatched_files(change, said, tmp_path):
    hf_segmenter().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    change(tmp_path, config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=said):
        load_pretrained(tmp_path, "segment")


def test_backbone_needs_num_classes(mim_checkpoint):
    with pytest.raises(UserError, match="num_classes is needed"):
        load_pretrained(mim_checkpoint, "segment")
    assert MIM["depth"] == 2
    assert load_pretrained(mim_checkpoint, "segment", num_classes=3).layers == [1, 1, 1, 2]


def test_unsupported_decoder_is_not_exported(refused, tmp_path):
    write_checkpoint(tmp_path / "a.ckpt", "segmenter", ours(decoder={"channels": 8}), **ABOUT)
    write_checkpoint(tmp_path / "b.ckpt", "segmenter", ours(decoder={"layers": [1, 2, 2, 4]}), **ABOUT)
    assert "a block twice" in refused("export", f"init_from={tmp_path / 'b.ckpt'}", "to=hf", "out=x")
    for to, said in (("hf", "decoder has 8 channels"), ("timm", "to=hf alone")):
        out = "x" if to == "hf" else "x.safetensors"
        assert said in refused("export", f"init_from={tmp_path / 'a.ckpt'}", f"to={to}", f"out={out}")


def test_default_layers():
    assert default_layers(12) == [4, 6, 8, 12]
    assert default_layers(24) == [8, 12, 16, 24]


def test_drop_path_and_dropout_are_arguments():
    model = ours(drop_path_rate=0.5).train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    image = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        plain = model(image).main
        assert torch.equal(plain, model(image, torch.ones(1, model.branches) * 0.99).main) is False  # scaled branches
        assert torch.equal(plain, model(image).main)  # nothing is drawn inside
        none = model(image, keep_BF=torch.zeros(1, 32 + 16))
        bias = model.decode_head.classifier.bias
        assert torch.allclose(none.main, bias[:, None, None].expand_as(none.main))


def test_blocks_after_last_layer_are_frozen():
    model = Segmenter(3, {"layers": [1, 1, 2, 3]}, **NETWORK)
    assert [block.norm1.weight.requires_grad for block in model.blocks] == [True, True, True, False]
    torch.stack([x.sum() for x in model(torch.randn(2, 3, 32, 32))]).sum().backward()
    unused = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert unused == []  # with several processes, none may be left without a gradient
