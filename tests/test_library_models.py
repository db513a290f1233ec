"""The models under transformers' names: the same numbers, files both ways, other sizes, training, refusals."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings

import pytest
import torch
from foreign import hf_classifier, hf_mim, scrambled, timm_beit, unilm_file
from library_parity import BIASES, NAMES, inputs_of, largest_difference, theirs_of
from safetensors.torch import load_file
from tiny import MIM, SIZE, refusal, write_checkpoint

import beit_pretrain
from beit_pretrain import (
    BeitConfig,
    BeitForImageClassification,
    BeitForMaskedImageModeling,
    BeitForSemanticSegmentation,
    BeitModel,
)
from beit_pretrain.library.losses import classification_loss
from beit_pretrain.models.backbone import Classifier, MaskedImageModel
from beit_pretrain.models.checkpoints.pretrained import load_pretrained
from beit_pretrain.models.other_size import at_size, interpolate_table
from beit_pretrain.models.upernet import Segmenter

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
TINY |= {"image_size": 32, "patch_size": 8, "vocab_size": 64}
SEGMENTER = {"num_hidden_layers": 4, "out_indices": [2, 3, 4, 5], "auxiliary_channels": 8, "num_labels": 3}


def built(name: str, **settings):
    """A fresh model of ours with random tensors."""
    extra = SEGMENTER if name == "BeitForSemanticSegmentation" else {}
    return scrambled(getattr(beit_pretrain, name)(BeitConfig(**{**TINY, **extra, **settings})))


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


class TestParity:
    """Outputs, losses, hidden states, attentions and pooled outputs equal transformers'."""

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize(
        "settings",
        [
            {"bias": "shared", "absolute": True},
            {"bias": "per_layer", "scale": None},
            {"bias": "none", "absolute": True},
        ],
    )
    def test_own_and_other_sizes(self, name, settings, tmp_path):
        pooling = {} if name == "BeitForMaskedImageModeling" else {"use_mean_pooling": settings["bias"] != "none"}
        theirs = theirs_of(name, **settings, **pooling)
        for size in (None, (48, 48), (32, 64)):
            assert largest_difference(name, theirs, tmp_path, size) < 1e-5

    def test_without_pooling_and_with_a_mask(self, tmp_path):
        import transformers

        theirs = theirs_of("BeitModel", use_mask_token=True)
        assert largest_difference("BeitModel", theirs, tmp_path) < 1e-5
        bare = transformers.BeitModel.from_pretrained(tmp_path, add_pooling_layer=False)
        ours = BeitModel.from_pretrained(tmp_path, add_pooling_layer=False)
        image = torch.randn(1, 3, 32, 32)
        with torch.no_grad():
            found, expected = ours(image), bare(image)
        assert found.pooler_output is expected.pooler_output is None
        assert torch.allclose(found.last_hidden_state, expected.last_hidden_state, atol=1e-5)

    @pytest.mark.parametrize("name", NAMES[1:])
    def test_gradients_of_losses(self, name, tmp_path):
        theirs = theirs_of(name)
        theirs.save_pretrained(tmp_path)
        ours = getattr(beit_pretrain, name).from_pretrained(tmp_path)
        given = inputs_of(name, theirs.config, (32, 32))
        images = [given["pixel_values"].clone().requires_grad_() for _ in range(2)]
        for model, image in zip((ours, theirs), images, strict=True):
            model(**{**given, "pixel_values": image}).loss.backward()
        assert (images[0].grad - images[1].grad).norm() < 1e-4 * images[1].grad.norm()

    @pytest.mark.parametrize(
        ("classes", "labels", "problem"),
        [
            (7, torch.tensor([3, 6]), None),
            (7, torch.rand(2, 7), None),
            (7, torch.rand(2, 7), "regression"),
            (1, torch.rand(2), None),
        ],
    )
    def test_losses_of_classification(self, classes, labels, problem, tmp_path):
        theirs = hf_classifier(classes=classes, problem_type=problem)
        theirs.save_pretrained(tmp_path)
        image = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            found = BeitForImageClassification.from_pretrained(tmp_path)(image, labels=labels).loss
            assert found == pytest.approx(theirs(image, labels=labels).loss.item(), rel=1e-5)

    @pytest.mark.parametrize("bias", BIASES)
    @pytest.mark.parametrize(("size", "pool"), [((32, 64), "avg"), ((48, 16), "token")])
    def test_timm_on_grids_that_are_not_square(self, bias, size, pool, tmp_path):
        theirs = timm_beit(size, 8, bias, True, 0.1, pool)
        network = Classifier(7, pool, **{**SIZE, "image_size": size}, rel_pos_bias=bias, abs_pos_emb=True)
        network.load_state_dict(theirs.state_dict())
        write_checkpoint(tmp_path / "own.ckpt", "classifier", network)
        ours = BeitForImageClassification.from_pretrained(tmp_path / "own.ckpt")
        image = torch.randn(2, 3, *size)
        with torch.no_grad():
            found = ours(image, output_hidden_states=True)
            outputs = theirs.forward_intermediates(image, return_prefix_tokens=True, output_fmt="NLC")[1]
            for state, (patches, cls) in zip(found.hidden_states[1:], outputs, strict=True):
                assert torch.allclose(state, torch.cat([cls, patches], 1), atol=1e-5)
            assert torch.allclose(found.logits, theirs(image), atol=1e-5)
            model = BeitModel.from_pretrained(tmp_path / "own.ckpt")
            features = theirs.forward_features(image)
            assert torch.allclose(model(image).last_hidden_state, features, atol=1e-5)
            assert torch.allclose(model(image)[1], theirs.forward_head(features, pre_logits=True), atol=1e-5)


class TestFiles:
    """`save_pretrained` and `from_pretrained`, ours and theirs."""

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("settings", [{"use_shared_relative_position_bias": True}, {"use_mean_pooling": False}])
    def test_through_transformers_and_back(self, name, settings, tmp_path):
        import transformers

        if name == "BeitForMaskedImageModeling":
            settings = {"use_absolute_position_embeddings": True, "use_relative_position_bias": True}
        ours = built(name, use_mask_token=name in NAMES[:2], **settings)
        ours.save_pretrained(tmp_path / "ours")
        theirs, report = getattr(transformers, name).from_pretrained(tmp_path / "ours", output_loading_info=True)
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        theirs.save_pretrained(tmp_path / "theirs")
        files = [load_file(tmp_path / side / "model.safetensors") for side in ("ours", "theirs")]
        assert same(*files)
        again = getattr(beit_pretrain, name).from_pretrained(tmp_path / "theirs")
        assert same(again.state_dict(), ours.state_dict())
        assert again.config == ours.config
        image = torch.randn(1, 3, 32, 32)
        with torch.no_grad():
            assert torch.allclose(again(image)[0], theirs.eval()(image)[0], atol=1e-5)

    @pytest.mark.parametrize("name", NAMES)
    def test_grids_that_are_not_square_come_back(self, name, tmp_path):
        ours = built(name, image_size=(64, 32), use_relative_position_bias=True)
        ours.network.about["mean"] = [0.1, 0.2, 0.3]
        ours.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "preprocessor_config.json").read_text())["size"] == {"height": 64, "width": 32}
        again = getattr(beit_pretrain, name).from_pretrained(tmp_path)
        assert same(again.state_dict(), ours.state_dict())
        assert again.config.image_size == [64, 32]

    def test_every_source(self, tmp_path):
        model = scrambled(MaskedImageModel(**MIM))
        unilm_file(tmp_path / "authors.pth", model.state_dict())
        write_checkpoint(tmp_path / "own.ckpt", "mim", model, mean=[0.1, 0.2, 0.3], std=[1.0] * 3)
        image, mask = torch.randn(2, 3, 32, 32), torch.rand(2, 16) < 0.5
        with torch.no_grad():
            for file in ("authors.pth", "own.ckpt"):
                ours = BeitForMaskedImageModeling.from_pretrained(tmp_path / file)
                assert torch.equal(ours(image, mask).logits[mask], model(image, mask))
                with pytest.warns(UserWarning, match="has no LayerNorm of the pooler"):
                    features = BeitModel.from_pretrained(tmp_path / file)
                assert torch.equal(features(image)[0], model.hidden_states(image)[-1])
                assert torch.equal(features.network.mask_token, model.mask_token)
                cls = BeitModel.from_pretrained(tmp_path / file, use_mean_pooling=False)
                assert torch.equal(cls(image)[0], model.encode(image))
        ours.save_pretrained(tmp_path / "hf")
        said = json.loads((tmp_path / "hf/preprocessor_config.json").read_text())
        assert said["image_mean"] == [0.1, 0.2, 0.3]
        assert not (tmp_path / "hf/README.md").exists()

    def test_a_new_head(self, tmp_path):
        hf_mim().save_pretrained(tmp_path)
        with pytest.warns(UserWarning, match="3 classes is new") as caught:
            model = BeitForImageClassification.from_pretrained(tmp_path, id2label={0: "a", 1: "b", 2: "c"})
        assert caught[0].filename == __file__
        assert (model.num_labels, model.config.label2id) == (3, {"a": 0, "b": 1, "c": 2})
        assert model.config.use_relative_position_bias  # the shared table starts one for every block
        assert not model.config.use_shared_relative_position_bias
        with pytest.warns(UserWarning, match="5 classes is new"):
            segmenter = BeitForSemanticSegmentation.from_pretrained(tmp_path, num_labels=5, drop_path_rate=0.3)
        assert segmenter.config.drop_path_rate == 0.3
        model.save_pretrained(tmp_path / "new")
        with warnings.catch_warnings(action="error"):
            again = BeitForImageClassification.from_pretrained(tmp_path / "new", num_labels=3, image_size=64)
        assert again.config.image_size == 64
        expected = load_pretrained(tmp_path / "new", "classify", image_size=64)
        assert same(again.network.state_dict(), expected.state_dict())  # resized the release's way

    def test_names_of_classes_and_settings_of_losses_are_kept(self, tmp_path):
        settings = {"semantic_loss_ignore_index": 7, "auxiliary_loss_weight": 0.1, "id2label": {0: "a", 1: "b"}}
        model = built("BeitForSemanticSegmentation", **{**SEGMENTER, "num_labels": None, **settings})
        model.save_pretrained(tmp_path)
        again = BeitForSemanticSegmentation.from_pretrained(tmp_path, auxiliary_loss_weight=0.2)
        assert again.config.id2label == {0: "a", 1: "b"}
        assert (again.config.semantic_loss_ignore_index, again.config.auxiliary_loss_weight) == (7, 0.2)
        assert again.config.num_hidden_layers == 4  # config.json says 5: transformers cannot use the last one
        assert json.loads((tmp_path / "config.json").read_text())["num_hidden_layers"] == 5
        counted = BeitForSemanticSegmentation.from_pretrained(tmp_path, num_labels=2)
        assert counted.config.id2label == {0: "a", 1: "b"}
        again.config.id2label = {0: "sky", 1: "sea"}
        again.save_pretrained(tmp_path)
        assert BeitForSemanticSegmentation.from_pretrained(tmp_path).config.id2label == {0: "sky", 1: "sea"}
        again.config.num_labels = 3
        assert "names 3 classes, the head has 2" in refusal(again.save_pretrained, tmp_path)

    def test_around_a_network(self):
        network = scrambled(Classifier(3, **SIZE))
        model = BeitForImageClassification.from_network(network)
        image = torch.randn(1, 3, 32, 32)
        assert torch.equal(model(image).logits, network(image))
        assert model.config.num_labels == 3
        assert "holds a MaskedImageModel, not a Classifier" in refusal(BeitForMaskedImageModeling.from_network, network)

    def test_a_full_path(self, tmp_path):
        (tmp_path / "file").touch()
        assert "is a file" in refusal(built("BeitModel").save_pretrained, tmp_path / "file")
        assert "needs the name of a folder" in refusal(built("BeitModel").save_pretrained, "")
        assert "cannot be written" in refusal(built("BeitModel").save_pretrained, tmp_path / "file" / "x")


class TestOutputs:
    def test_unpacks_and_indexes(self):
        model = built("BeitForMaskedImageModeling")
        image, mask = torch.randn(2, 3, 32, 32), torch.rand(2, 16) < 0.5
        mask[:, 0] = True
        labels = torch.randint(64, (2, 16))
        with torch.no_grad():
            output = model(image, mask, labels)
            loss, logits = output
            assert loss is output.loss is output[0] is output["loss"]
            assert len(output[:2]) == len(output) == 2
            assert output.hidden_states is None
            assert "hidden_states" not in output
            assert dict(output).keys() == {"loss", "logits"} == {**output}.keys()
            (found,) = model(image, return_dict=False)
            assert logits.shape == found.shape == (2, 16, 64)
            alone = model(image, mask, labels[mask], masked_only=True)
            assert torch.equal(alone.loss, loss)
            assert torch.allclose(alone.logits, logits[mask], atol=1e-6)

    def test_the_config_can_ask_for_everything(self):
        model = built("BeitModel", output_hidden_states=True, output_attentions=True, return_dict=False)
        last, pooled, states, attentions = model(torch.randn(1, 3, 32, 32))
        assert (len(states), len(attentions), attentions[0].shape) == (3, 2, (1, 2, 17, 17))
        assert torch.allclose(attentions[0].sum(-1), torch.ones(1, 2, 17))
        assert torch.equal(states[-1], last)


class TestModules:
    """Like any torch module."""

    def test_precision(self):
        model = built("BeitForImageClassification").half()
        with torch.no_grad():
            output = model(torch.randn(1, 3, 48, 48), output_attentions=True, interpolate_pos_encoding=True)
        assert (model.dtype, output.logits.dtype, output.attentions[0].dtype) == (torch.half,) * 3

    def test_half_precision_is_saved(self, tmp_path):
        built("BeitModel").bfloat16().save_pretrained(tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
        assert BeitModel.from_pretrained(tmp_path).dtype == torch.float32

    def test_training_drops_paths(self):
        model = built("BeitForImageClassification", drop_path_rate=0.5)
        image = torch.randn(32, 3, 32, 32)
        assert torch.equal(model(image).logits, model(image).logits)
        model.train()
        assert not torch.equal(model(image).logits, model(image).logits)
        model(image, labels=torch.zeros(32).long()).loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())

    def test_gradients_at_another_size(self):
        settings = {"use_absolute_position_embeddings": True, "use_relative_position_bias": True}
        model = built("BeitForSemanticSegmentation", **settings)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        image = torch.randn(2, 3, 48, 64)
        loss = model.train()(image, labels=torch.zeros(2, 48, 64).long(), interpolate_pos_encoding=True).loss
        loss.backward()
        assert model.network.pos_embed.grad.norm() > 0
        assert model.network.blocks[0].attn.relative_position_bias_table.grad.norm() > 0
        assert model.network.grid == (4, 4)  # as it was
        changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
        assert changed
        assert all("running_" in name or "num_batches" in name for name in changed)  # batch norm's, as in any training

    @pytest.mark.long
    def test_compiled(self):
        model = built("BeitForImageClassification", use_relative_position_bias=True)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        image = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            found, expected = compiled(image, output_hidden_states=True), model(image, output_hidden_states=True)
        assert torch.allclose(found.logits, expected.logits, atol=1e-6)
        assert len(found.hidden_states) == 3
        loose = torch.compile(model, backend="eager")
        larger = torch.randn(1, 3, 48, 48)
        with torch.no_grad():
            found, expected = (m(larger, interpolate_pos_encoding=True).logits for m in (loose, model))
        assert torch.allclose(found, expected, atol=1e-6)

    def test_parameters_are_shared_by_a_view_of_another_size(self):
        network = scrambled(Classifier(3, **SIZE))
        view = at_size(network, (64, 32))
        assert view.blocks[0].mlp.fc1.weight is network.blocks[0].mlp.fc1.weight
        assert view.grid == (8, 4)
        table = network.blocks[0].attn.relative_position_bias_table
        assert torch.allclose(interpolate_table(table, (4, 4), (4, 4)), table)
        # Row-major: a ramp over rows stays one, constant over columns.
        ramp = torch.cat([torch.arange(7.0).repeat_interleave(7), torch.zeros(3)])[:, None]
        wide = interpolate_table(ramp, (4, 4), (4, 8))[:-3].view(7, 15)
        assert torch.allclose(wide, torch.arange(7.0)[:, None].expand(7, 15))


IMAGE = torch.zeros(1, 3, 32, 32)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"pixel_values": torch.zeros(1, 3, 48, 48)}, r"images of \(32, 32\) pixels, got \(48, 48\); interpolate_pos"),
        ({"pixel_values": torch.zeros(1, 3, 30, 30), "interpolate_pos_encoding": True}, "not divisible"),
        ({"pixel_values": IMAGE.byte()}, "normalised images .* got .* of torch.uint8"),
        ({"pixel_values": IMAGE[0]}, r"must be normalised images \(B, 3"),
        ({}, "pixel_values must be .* got none"),
        ({"pixel_values": torch.zeros(1, 4, 32, 32)}, "sees 3 channels, got images of 4"),
        ({"pixel_values": IMAGE, "bool_masked_pos": torch.zeros(1, 9)}, r"must be \(1, 16\), got \(1, 9\)"),
        ({"pixel_values": IMAGE, "labels": torch.zeros(3)}, "bool_masked_pos is needed"),
        ({"pixel_values": IMAGE, "masked_only": True}, "bool_masked_pos is needed"),
        (
            {"pixel_values": IMAGE, "bool_masked_pos": torch.ones(1, 16), "labels": torch.zeros(3)},
            "tokens of the 16 masked patches",
        ),
        ({"pixel_values": IMAGE.numpy()}, "a tensor of floats; got an object of the type ndarray"),
        ({"pixel_values": IMAGE, "bool_masked_pos": [[True] * 16]}, "of 0 and 1; got an object of the type list"),
        ({"pixel_values": IMAGE, "bool_masked_pos": torch.full((1, 16), 0.5)}, "must be bools, or 0 and 1"),
        ({"pixel_values": IMAGE, "bool_masked_pos": torch.ones(16)}, r"must be \(1, 16\), got \(16,\)"),
        (
            {"pixel_values": IMAGE, "bool_masked_pos": torch.zeros(1, 16), "labels": torch.zeros(1, 16).long()},
            "no patch is masked",
        ),
        (
            {"pixel_values": IMAGE, "bool_masked_pos": torch.ones(1, 16), "labels": torch.full((1, 16), 64)},
            "from 0 to 63, or -100 for those that do not count; got 64",
        ),
        (
            {"pixel_values": IMAGE, "bool_masked_pos": torch.ones(1, 16), "labels": torch.zeros(1, 16)},
            "tensor of whole numbers, got .*float32",
        ),
        (
            {"pixel_values": IMAGE, "bool_masked_pos": torch.ones(1, 16), "labels": [0] * 16},
            "labels must be a tensor, got an object of the type list",
        ),
    ],
)
def test_inputs_that_cannot_be(given, said):
    assert re.search(said, refusal(built("BeitForMaskedImageModeling"), **given))


def test_more_inputs_that_cannot_be():
    assert "needs a mask token" in refusal(built("BeitModel"), IMAGE, torch.ones(1, 16))
    classifier, segmenter = built("BeitForImageClassification"), built("BeitForSemanticSegmentation")
    assert "do not fit" in refusal(classifier, IMAGE, labels=torch.zeros(2).long())
    assert "labels must be (1, height, width)" in refusal(segmenter, IMAGE, labels=torch.zeros(32, 32))
    assert "2 x 2 patches" in refusal(segmenter, torch.zeros(1, 3, 8, 64), interpolate_pos_encoding=True)
    single = built("BeitForSemanticSegmentation", num_labels=1)
    assert "must be above 1" in refusal(single, IMAGE, labels=torch.zeros(1, 32, 32))
    labels = torch.full((1, 32, 32), 254, dtype=torch.uint8)
    assert "from 0 to 2, or 255 for those that do not count; got 254" in refusal(segmenter, IMAGE, labels=labels)
    assert "whole numbers" in refusal(segmenter, IMAGE, labels=labels.bool())


def test_one_class_has_no_single_label():
    model = built("BeitForImageClassification", num_labels=1, problem_type="single_label_classification")
    assert "num_labels must be above 1" in refusal(model, IMAGE, labels=torch.zeros(1).long())


def test_add_pooling_layer_is_true_or_false(tmp_path):
    built("BeitModel").save_pretrained(tmp_path)
    said = refusal(beit_pretrain.BeitModel.from_pretrained, tmp_path, add_pooling_layer="no")
    assert "add_pooling_layer must be true or false, got 'no'" in said


@pytest.mark.parametrize("name", ["BeitForSemanticSegmentation", "BeitForImageClassification", "BeitModel"])
@pytest.mark.parametrize(
    "said",
    [
        {"resample": 2, "do_reduce_labels": True, "size": {"height": 32, "width": 32}, "do_center_crop": False},
        {"size": {"shortest_edge": 36}, "do_center_crop": True, "crop_size": {"height": 32, "width": 32}},
        {"do_resize": False, "do_reduce_labels": False},
    ],
)
def test_saved_model_prepares_images_as_before(name, said, tmp_path):
    built(name).save_pretrained(tmp_path / "a")
    (tmp_path / "a/preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "BeitImageProcessor", **said})
    )
    getattr(beit_pretrain, name).from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    found = json.loads((tmp_path / "b/preprocessor_config.json").read_text())
    assert {key: found[key] for key in said} == said


def test_config_of_another_number_of_classes_warns(tmp_path):
    built("BeitForImageClassification", num_labels=3).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="says num_labels=2, the weights have 3"):
        assert beit_pretrain.BeitForImageClassification.from_pretrained(tmp_path).num_labels == 3


def test_torch_knows_the_outputs():
    """FSDP2 hooks gradients into the tensors that it finds in an output; torch.export looks for them, too."""
    from torch.utils import _pytree

    output = built("BeitForImageClassification")(IMAGE, labels=torch.zeros(1).long(), output_hidden_states=True)
    leaves, spec = _pytree.tree_flatten(output)
    assert len([leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]) == 2 + len(output.hidden_states)
    again = _pytree.tree_unflatten(leaves, spec)
    assert (type(again), again.keys()) == (type(output), output.keys())
    assert output == output
    assert len({output, again}) == 2


@pytest.mark.long
def test_sharded_model_learns(tmp_path):
    """FSDP2 around a whole model, in a process of its own."""
    built("BeitForImageClassification", num_labels=2).save_pretrained(tmp_path / "model")
    script = """
import sys, torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from beit_pretrain import BeitForImageClassification
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=0, world_size=1)
model = BeitForImageClassification.from_pretrained(sys.argv[1]).train()
fully_shard(model)
optimiser = torch.optim.SGD(model.parameters(), lr=1.0)
losses = []
for _ in range(3):
    loss = model(torch.ones(2, 3, 32, 32), labels=torch.tensor([0, 0])).loss
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    losses.append(loss.item())
assert losses[2] < losses[0] / 2, losses
"""
    command = [sys.executable, "-c", script, tmp_path / "model", tmp_path / "store"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_export(tmp_path):
    model = built("BeitForMaskedImageModeling")
    with torch.no_grad():
        exported = torch.export.export(model, (IMAGE,)).module()(IMAGE)
        assert torch.allclose(exported.logits, model(IMAGE).logits, atol=1e-6)


def test_which_problem_labels_are_for():
    logits = torch.randn(2, 3)
    expected = classification_loss(logits, torch.tensor([2, 1]))
    for kind in (torch.uint8, torch.int8, torch.int16, torch.int32):
        assert classification_loss(logits, torch.tensor([2, 1], dtype=kind)) == expected
    several = torch.tensor([[1, 0, 1], [0, 0, 1]])
    expected = classification_loss(logits, several.float())
    assert classification_loss(logits, several) == classification_loss(logits, several.bool()) == expected
    assert "from 0 to 1" in refusal(classification_loss, logits, 2 * several)
    assert "from 0 to 1" in refusal(classification_loss, logits, several * float("nan"))
    assert "from 0 to 2, or -100" in refusal(classification_loss, logits, torch.tensor([0, 3]))
    assert "must be a tensor" in refusal(classification_loss, logits, [0, 1])
    assert "do not fit" in refusal(classification_loss, logits, torch.tensor([True, False]))


def test_a_config_of_another_model_is_told(tmp_path):
    built("BeitModel").save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**said, "num_hidden_layers": 3, "out_indices": [3]}))
    with pytest.warns(UserWarning, match="says num_hidden_layers=3, the weights have 2") as caught:
        assert BeitModel.from_pretrained(tmp_path).config.num_hidden_layers == 2
    assert caught[0].filename == __file__


def test_what_cannot_be_loaded(tmp_path):
    hf_mim().save_pretrained(tmp_path)
    assert "give num_labels=" in refusal(BeitForImageClassification.from_pretrained, tmp_path)
    assert "give num_labels=" in refusal(BeitForSemanticSegmentation.from_pretrained, tmp_path)
    load = BeitForMaskedImageModeling.from_pretrained
    assert "did you mean image_size" in refusal(load, tmp_path, imagesize=64)
    assert "known are revision, image_size" in refusal(load, tmp_path, torch_dtype=torch.half)
    assert "the file says that" in refusal(load, tmp_path, hidden_size=64)
    assert "not divisible" in refusal(load, tmp_path, image_size=33)
    assert "use_mean_pooling=...): the file says that" in refusal(load, tmp_path, use_mean_pooling=True)
    assert "is for models with classes; BeitForMaskedImageModeling has none" in refusal(load, tmp_path, num_labels=3)
    assert "OWNER/NAME on the Hub, is needed; got None" in refusal(load, None)
    assert "a path is needed, got None" in refusal(built("BeitModel").save_pretrained, None)
    classes = BeitForImageClassification.from_pretrained
    assert "num_labels=0" in refusal(classes, tmp_path, num_labels=0)
    assert "use_mean_pooling must be true or false" in refusal(classes, tmp_path, num_labels=2, use_mean_pooling="avg")
    assert "must be a number of pixels or (height, width)" in refusal(load, tmp_path, image_size="64")
    assert "is made from a beit_pretrain.BeitConfig, not from a builtins.dict" in refusal(BeitModel, TINY)
    hf_classifier().save_pretrained(tmp_path / "other")
    assert "without a token head" in refusal(load, tmp_path / "other")


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("BeitModel", {"hidden_act": "relu"}, "hidden_act=relu"),
        ("BeitModel", {"patch_size": [8, 4]}, "must be square"),
        ("BeitModel", {"num_attention_heads": 3}, "does not divide into num_attention_heads=3"),
        ("BeitModel", {"image_size": 33}, "not divisible"),
        (
            "BeitModel",
            {"use_relative_position_bias": True, "use_shared_relative_position_bias": True},
            "are both true",
        ),
        ("BeitForMaskedImageModeling", {"use_mean_pooling": False}, "two LayerNorms"),
        ("BeitForSemanticSegmentation", {"out_indices": None}, "out_indices=None must be four"),
        ("BeitForSemanticSegmentation", {"auxiliary_concat_input": True}, "not supported"),
    ],
)
def test_configs_that_no_network_can_have(name, settings, said):
    assert said in refusal(built, name, **settings)


def test_segmenter_of_ours_through_the_library(tmp_path):
    network = scrambled(Segmenter(3, {"aux_channels": 8}, **{**SIZE, "depth": 4}))
    write_checkpoint(tmp_path / "a.ckpt", "segmenter", network, classes=["a", "b", "c"], reduce_labels=False)
    model = BeitForSemanticSegmentation.from_pretrained(tmp_path / "a.ckpt")
    assert model.config.out_indices == [layer + 1 for layer in network.layers]
    image = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(image).logits, network(image).main)
    narrow = BeitForSemanticSegmentation.from_network(Segmenter(3, {"channels": 16}, **{**SIZE, "depth": 4}))
    assert "the decoder has 16 channels" in refusal(narrow.save_pretrained, tmp_path / "narrow")
    assert not (tmp_path / "narrow").exists()
