"""Everyone's checkpoints: the same numbers as timm and transformers, inferred architectures, heads, and refusals."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import pickle

import pytest
import torch
import torch.nn.functional as F
from foreign import hf_classifier, hf_mim, scrambled, timm_beit, unilm_file
from safetensors.torch import save_file
from tiny import DVAE, MIM, seeded, write_checkpoint
from torch import nn

import beit_pretrain
from beit_pretrain.errors import UserError
from beit_pretrain.models.backbone import SIZES, Classifier, FeatureExtractor, MaskedImageModel
from beit_pretrain.models.checkpoints.formats import read_checkpoint
from beit_pretrain.models.checkpoints.pretrained import load_pretrained
from beit_pretrain.tokenizers.dvae import DiscreteVAE

BIASES = ("shared", "per_layer", "none")
GEOMETRY = [(32, 4), (32, 8), (48, 16), (64, 32), (224, 32), (512, 32)]


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-5) -> bool:
    """Within the tolerance, absolute for numbers up to 1 and relative above."""
    return ours.shape == theirs.shape and bool(((ours - theirs).abs() <= tolerance * theirs.abs().clamp(min=1)).all())


def picture(size, batch: int = 2) -> torch.Tensor:
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(2))


def random_mask(batch: int, patches: int) -> torch.Tensor:
    mask = torch.rand(batch, patches, generator=torch.Generator().manual_seed(3)) < 0.4
    mask[:, 0] = True
    return mask


def patches_of(size, patch: int) -> int:
    height, width = (size, size) if isinstance(size, int) else size
    return (height // patch) * (width // patch)


def refusal(path, **settings) -> str:
    with pytest.raises(UserError) as caught:
        load_pretrained(path, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestParity:
    """Same weights, same input: same numbers."""

    @pytest.mark.parametrize(("bias", "absolute", "scale"), itertools.product(BIASES, (False, True), (0.1, None)))
    @pytest.mark.parametrize(("size", "patch"), GEOMETRY[1:3])
    def test_masked_image_models_of_transformers(self, bias, absolute, scale, size, patch, tmp_path):
        theirs = hf_mim(image_size=size, patch_size=patch, bias=bias, absolute=absolute, scale=scale)
        theirs.save_pretrained(tmp_path)
        ours = load_pretrained(tmp_path, "mim")
        image, mask = picture(size), random_mask(2, patches_of(size, patch))
        with torch.no_grad():
            assert close(ours(image, mask), theirs(image, bool_masked_pos=mask).logits[mask])

    @pytest.mark.parametrize(("size", "patch"), GEOMETRY)
    def test_sizes_and_patches(self, size, patch, tmp_path):
        theirs = hf_mim(image_size=size, patch_size=patch)
        theirs.save_pretrained(tmp_path)
        image, mask = picture(size), random_mask(2, patches_of(size, patch))
        with torch.no_grad():
            expected = theirs(image, bool_masked_pos=mask).logits[mask]
            assert close(load_pretrained(tmp_path, "mim")(image, mask), expected)

    @pytest.mark.parametrize(("bias", "absolute", "pool"), itertools.product(BIASES, (False, True), ("avg", "token")))
    def test_classifiers_of_transformers(self, bias, absolute, pool, tmp_path):
        theirs = hf_classifier(bias=bias, absolute=absolute, pool=pool)
        theirs.save_pretrained(tmp_path)
        with torch.no_grad():
            assert close(load_pretrained(tmp_path, "classify")(picture(32)), theirs(picture(32)).logits)

    @pytest.mark.parametrize("size", [32, (32, 64), (48, 16)])
    @pytest.mark.parametrize(("bias", "absolute"), itertools.product(BIASES, (False, True)))
    @pytest.mark.parametrize(("scale", "pool"), itertools.product((0.1, None), ("avg", "token")))
    def test_classifiers_of_timm(self, size, bias, absolute, scale, pool):
        """Also on grids that are not square, where transformers swaps height and width."""
        theirs = timm_beit(size, 8, bias, absolute, scale, pool)
        ours = Classifier(
            7, pool, image_size=size, patch_size=8, embed_dim=32, depth=2, num_heads=2, init_values=scale,
            rel_pos_bias=bias, abs_pos_emb=absolute,
        ).eval()  # fmt: skip
        ours.load_state_dict(theirs.state_dict())
        with torch.no_grad():
            assert close(ours(picture(size)), theirs(picture(size)))

    @pytest.mark.parametrize("bias", BIASES)
    def test_masked_image_models_on_grids_that_are_not_square(self, bias):
        """timm has no mask token; with the embeddings replaced by hand, the rest is timm's."""
        theirs = timm_beit((32, 64), 8, bias, True, 0.1, "", classes=0)
        settings = {"image_size": (32, 64), "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
        ours = scrambled(MaskedImageModel(64, **settings, rel_pos_bias=bias, abs_pos_emb=True))
        ours.load_state_dict(theirs.state_dict(), strict=False)
        image, mask = picture((32, 64)), random_mask(2, 32)
        with torch.no_grad():
            embedded = theirs.patch_embed(image)
            embedded[mask] = ours.mask_token[0, 0]
            theirs.patch_embed = nn.Identity()
            assert close(ours(image, mask), ours.lm_head(theirs.forward_features(embedded)[:, 1:][mask]))

    @pytest.mark.parametrize(("bias", "absolute"), [("shared", False), ("per_layer", True), ("none", True)])
    def test_gradients_of_the_objective(self, bias, absolute, tmp_path):
        theirs = hf_mim(bias=bias, absolute=absolute)
        theirs.save_pretrained(tmp_path)
        ours = load_pretrained(tmp_path, "mim")
        image, mask = picture(32), random_mask(2, 16)
        target = torch.randint(64, (int(mask.sum()),), generator=torch.Generator().manual_seed(4))
        F.cross_entropy(ours(image, mask), target).backward()
        theirs(image, bool_masked_pos=mask, labels=target).loss.backward()
        ours_by_size, theirs_by_size = (
            sorted((p.grad.norm().item() for p in m.parameters() if p.grad is not None), reverse=True)
            for m in (ours, theirs)
        )
        total = [sum(g**2 for g in norms) for norms in (ours_by_size, theirs_by_size)]
        assert total[0] == pytest.approx(total[1], rel=1e-4)
        pairs = {
            "cls_token": theirs.beit.embeddings.cls_token,
            "mask_token": theirs.beit.embeddings.mask_token,
            "patch_embed.proj.weight": theirs.beit.embeddings.patch_embeddings.projection.weight,
            "norm.weight": theirs.layernorm.weight,
            "lm_head.weight": theirs.lm_head.weight,
        }
        for i, layer in enumerate(theirs.beit.layers):
            pairs |= {f"blocks.{i}.gamma_1": layer.lambda_1, f"blocks.{i}.norm2.weight": layer.layernorm_after.weight}
            pairs |= {f"blocks.{i}.attn.q_bias": layer.attention.q_proj.bias}
            pairs |= {f"blocks.{i}.mlp.fc2.weight": layer.mlp.fc2.weight}
            if bias == "per_layer":
                table = layer.relative_position_bias.relative_position_bias_table
                pairs[f"blocks.{i}.attn.relative_position_bias_table"] = table
        if bias == "shared":
            table = theirs.beit.shared_position_bias.relative_position_bias_table
            pairs["rel_pos_bias.relative_position_bias_table"] = table
        own = dict(ours.named_parameters())
        for name, parameter in pairs.items():
            difference = (own[name].grad - parameter.grad).norm() / parameter.grad.norm()
            assert difference < 1e-4, name

    def test_base(self, tmp_path):
        """The paper's size, against transformers."""
        from transformers import BeitConfig, BeitForMaskedImageModeling

        config = BeitConfig(use_mask_token=True, use_shared_relative_position_bias=True)
        theirs = scrambled(BeitForMaskedImageModeling(config), std=0.02)
        theirs.save_pretrained(tmp_path)
        ours = load_pretrained(tmp_path, "mim")
        assert {name: ours.config[name] for name in SIZES["base"]} == SIZES["base"]
        image, mask = picture(224, batch=1), random_mask(1, 196)
        with torch.no_grad():
            assert close(ours(image, mask), theirs(image, bool_masked_pos=mask).logits[mask])


class TestFormats:
    """What a file is, is found out; nobody is asked."""

    ARCHITECTURES = (
        {"rel_pos_bias": "shared"},
        {"rel_pos_bias": "per_layer", "init_values": None},
        {"rel_pos_bias": "none", "abs_pos_emb": True, "init_values": None},
        {"patch_size": 4, "in_chans": 1, "mlp_ratio": 2.0, "embed_dim": 48, "num_heads": 3},
    )

    @pytest.mark.parametrize("changes", ARCHITECTURES)
    @pytest.mark.parametrize("entry", ["model", "module", None])
    def test_the_authors_self_supervised_files(self, changes, entry, tmp_path):
        model = scrambled(MaskedImageModel(**{**MIM, "num_heads": MIM["num_heads"], **changes}))
        if changes.get("rel_pos_bias") == "none":  # nothing in such a file tells the heads: 64 numbers each
            model = scrambled(MaskedImageModel(**{**MIM, "embed_dim": 128, **changes}))
        state = model.state_dict()
        torch.save({entry: state} if entry else state, tmp_path / "a.pth")
        loaded = load_pretrained(tmp_path / "a.pth", "mim")
        forgotten = {"init_values", "drop_path_rate"}  # initial values and training: not in the tensors
        assert {n: v for n, v in loaded.config.items() if n not in forgotten} == {
            n: v for n, v in model.config.items() if n not in forgotten
        }
        assert (loaded.config["init_values"] is None) == (model.config["init_values"] is None)
        assert not loaded.training
        assert all(torch.equal(t, state[n]) for n, t in loaded.state_dict().items())

    @pytest.mark.parametrize("head", ["mim", "features", "classify", "segment"])
    def test_the_blocks_and_head_for_cls_of_beit_v2_are_ignored(self, head, tmp_path):
        state = scrambled(MaskedImageModel(**MIM)).state_dict()
        extra = {f"cls_pt_layers.{i}.{n.removeprefix('blocks.0.')}": t for i in (0, 1) for n, t in state.items()}
        extra = {name: tensor for name, tensor in extra.items() if ".norm" in name or ".mlp" in name}
        extra |= {f"cls_pt_{n}": t for n, t in state.items() if n.startswith(("norm.", "lm_head."))}
        assert {"cls_pt_norm.weight", "cls_pt_lm_head.weight", "cls_pt_layers.1.mlp.fc1.weight"} <= extra.keys()
        torch.save({"model": state | extra}, tmp_path / "v2.pth")
        torch.save({"model": state}, tmp_path / "v1.pth")
        classes = {"num_classes": 3} if head in ("classify", "segment") else {}
        found, expected = (load_pretrained(tmp_path / f"{v}.pth", head, **classes).state_dict() for v in ("v2", "v1"))
        assert found.keys() == expected.keys()
        assert all(torch.equal(t, found[n]) for n, t in expected.items() if n.startswith("blocks."))
        torch.save({"model": state | {"cls_pt_other.weight": torch.zeros(1)}}, tmp_path / "other.pth")
        with pytest.raises(UserError, match=r"unexpected: cls_pt_other\.weight"):
            load_pretrained(tmp_path / "other.pth", head, **classes)

    @pytest.mark.parametrize(("bias", "pool"), [("per_layer", "avg"), ("per_layer", "token"), ("none", "avg")])
    def test_the_authors_fine_tuned_files(self, bias, pool, tmp_path):
        absolute = bias == "none"
        model = scrambled(Classifier(7, pool, **{**NETWORK, "embed_dim": 128}, rel_pos_bias=bias, abs_pos_emb=absolute))
        unilm_file(tmp_path / "a.pth", model.state_dict(), args=argparse.Namespace(lr=1e-3), epoch=3)
        loaded = load_pretrained(tmp_path / "a.pth", "classify")
        assert loaded.config["pool"] == pool
        assert torch.equal(loaded(picture(32)), model(picture(32)))

    @pytest.mark.parametrize("suffix", ["safetensors", "bin", "pth"])
    def test_files_of_timm(self, suffix, tmp_path):
        model = timm_beit()
        path = tmp_path / f"beit.{suffix}"
        save_file(model.state_dict(), path) if suffix == "safetensors" else torch.save(model.state_dict(), path)
        with torch.no_grad():
            assert close(load_pretrained(path, "classify")(picture(32)), model(picture(32)))

    def test_a_folder_of_timm(self, tmp_path):
        save_file(timm_beit().state_dict(), tmp_path / "model.safetensors")
        said = {"architecture": "beit_base_patch16_224", "pretrained_cfg": {"mean": [0.1] * 3, "std": [0.2] * 3}}
        (tmp_path / "config.json").write_text(json.dumps(said))
        loaded = load_pretrained(tmp_path, "classify")
        assert (loaded.about["mean"], loaded.about["std"]) == ([0.1] * 3, [0.2] * 3)

    @pytest.mark.parametrize("binary", [False, True])
    def test_folders_of_hugging_face(self, binary, tmp_path):
        model = hf_classifier()
        model.config.id2label = {i: f"class {i}" for i in range(7)}
        model.save_pretrained(tmp_path)
        if binary:
            from safetensors.torch import load_file

            torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
            (tmp_path / "model.safetensors").unlink()
        (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.4, 0.3], "image_std": [1, 1, 1]}')
        loaded = load_pretrained(tmp_path, "classify")
        assert loaded.about["classes"] == [f"class {i}" for i in range(7)]
        assert loaded.about["mean"] == [0.5, 0.4, 0.3]
        assert load_pretrained(tmp_path / ("pytorch_model.bin" if binary else "model.safetensors"), "classify")

    def test_a_bare_model_of_hugging_face(self, tmp_path):
        model = hf_classifier()
        model.beit.save_pretrained(tmp_path)
        loaded = load_pretrained(tmp_path, "features")
        with torch.no_grad():
            states = model.beit(picture(32), output_hidden_states=True).hidden_states[1:]
            found = loaded(picture(32))
        for theirs, cls, patches in zip(states, found.cls, found.patches, strict=True):
            assert close(cls, theirs[:, 0])
            assert close(patches, theirs[:, 1:])

    def test_our_own(self, mim_checkpoint):
        loaded = beit_pretrain.load_pretrained(mim_checkpoint, "mim")
        assert {name: loaded.config[name] for name in MIM} == MIM
        assert loaded.about["tokenizer"] == "dvae/last.ckpt"

    def test_half_precision_becomes_float32(self, tmp_path):
        state = {name: tensor.half() for name, tensor in timm_beit().state_dict().items()}
        save_file(state, tmp_path / "half.safetensors")
        loaded = load_pretrained(tmp_path / "half.safetensors", "classify")
        assert {p.dtype for p in loaded.parameters()} == {torch.float32}

    def test_files_of_a_segmenter_and_of_data_parallel(self, tmp_path):
        state = seeded(FeatureExtractor, **NETWORK).state_dict()
        named = {f"backbone.{name}": tensor for name, tensor in state.items()}
        torch.save({"state_dict": {**named, "decode_head.conv.weight": torch.zeros(1)}}, tmp_path / "seg.pth")
        torch.save({"model": {f"module.{n}": t for n, t in state.items()}}, tmp_path / "ddp.pth")
        for name in ("seg.pth", "ddp.pth"):
            loaded = load_pretrained(tmp_path / name, "features")
            assert all(torch.equal(t, state[n]) for n, t in loaded.state_dict().items())


NETWORK = {name: value for name, value in MIM.items() if name != "vocab_size"}


class TestHeads:
    def test_from_pre_training_to_a_classifier(self, mim_checkpoint):
        """The shared table starts every block's own; the final norm makes room for a new one (modeling_finetune.py)."""
        before = load_pretrained(mim_checkpoint, "mim")
        after = load_pretrained(mim_checkpoint, "classify", num_classes=5, drop_path_rate=0.2)
        shared = before.rel_pos_bias.relative_position_bias_table
        tables = [block.attn.relative_position_bias_table for block in after.blocks]
        assert all(torch.equal(table, shared) for table in tables)
        assert len({table.data_ptr() for table in [shared, *tables]}) == 1 + len(tables)
        assert (after.fc_norm.weight == 1).all()
        assert after.head.weight.shape == (5, 32)
        assert after.config["drop_path_rate"] == 0.2
        with torch.no_grad():
            for ours, theirs in zip(after.hidden_states(picture(32)), before.hidden_states(picture(32)), strict=True):
                assert close(ours, theirs)

    def test_cls_pooling_keeps_the_final_norm(self, mim_checkpoint):
        from beit_pretrain.models.checkpoints.pretrained import classifier

        model = classifier(read_checkpoint(mim_checkpoint), num_classes=5, pool="token")
        assert torch.equal(model.norm.weight, read_checkpoint(mim_checkpoint).state["norm.weight"])
        assert isinstance(model.fc_norm, nn.Identity)

    def test_another_number_of_classes_is_a_new_head_on_the_same_norm(self, tmp_path):
        torch.save({"model": timm_beit(classes=7).state_dict()}, tmp_path / "a.pth")
        source = read_checkpoint(tmp_path / "a.pth")
        same = load_pretrained(tmp_path / "a.pth", "classify", num_classes=7)
        other = load_pretrained(tmp_path / "a.pth", "classify", num_classes=9)
        assert torch.equal(same.head.weight, source.state["head.weight"])
        assert other.head.weight.abs().max() < 1e-3
        assert torch.equal(other.fc_norm.weight, source.state["fc_norm.weight"])

    def test_features(self, mim_checkpoint):
        found = load_pretrained(mim_checkpoint)(picture(32))
        assert [x.shape for x in found.cls] == [(2, 32)] * 2
        assert [x.shape for x in found.patches] == [(2, 16, 32)] * 2

    @pytest.mark.parametrize("size", [64, (32, 64), 16])
    @pytest.mark.parametrize("head", ["mim", "classify", "features"])
    def test_another_image_size(self, mim_checkpoint, size, head):
        model = load_pretrained(mim_checkpoint, head, image_size=size, num_classes=3)
        patches = patches_of(size, 8)
        image = picture(size)
        result = model(image, random_mask(2, patches)) if head == "mim" else model(image)
        if head == "features":
            assert result.patches[-1].shape == (2, patches, 32)
        tables = [t for n, t in model.state_dict().items() if n.endswith("bias_table")]
        height, width = (size, size) if isinstance(size, int) else size
        assert {len(table) for table in tables} == {(2 * height // 8 - 1) * (2 * width // 8 - 1) + 3}

    def test_the_same_image_size_is_the_identity(self, mim_checkpoint):
        one, other = (load_pretrained(mim_checkpoint, "mim", image_size=size).state_dict() for size in (None, 32))
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())

    def test_missing_heads_and_wrong_arguments_are_refused(self, tmp_path, mim_checkpoint, dvae_checkpoint):
        torch.save({"model": timm_beit().state_dict()}, tmp_path / "a.pth")
        assert "without a token head" in refusal(tmp_path / "a.pth", head="mim")
        assert "num_classes is needed" in refusal(mim_checkpoint, head="classify")
        assert "is not divisible by patch_size=8" in refusal(mim_checkpoint, image_size=30)
        assert "holds a tokenizer" in refusal(dvae_checkpoint)
        assert "head=tail is not one of" in refusal(mim_checkpoint, head="tail")


class TestRefusals:
    def test_missing_and_left_over_names_are_listed(self, tmp_path):
        state = timm_beit().state_dict()
        for i in (0, 1):
            del state[f"blocks.{i}.attn.q_bias"]
        torch.save({"model": {**state, "extra.weight": torch.zeros(1), "another": torch.zeros(1)}}, tmp_path / "a.pth")
        said = refusal(tmp_path / "a.pth", head="classify")
        assert "missing: blocks.0-1.attn.q_bias" in said
        assert "unexpected: another, extra.weight" in said

    def test_a_shape_that_does_not_fit(self, tmp_path):
        state = timm_beit().state_dict()
        state["blocks.1.mlp.fc2.weight"] = torch.zeros(32, 7)
        torch.save({"model": state}, tmp_path / "a.pth")
        assert "blocks.1.mlp.fc2.weight (32, 7) for (32, 128)" in refusal(tmp_path / "a.pth", head="classify")

    @pytest.mark.parametrize(
        ("names", "said"),
        [
            (["decoder_embed.weight", "patch_embed.proj.weight"], "MAE"),
            (["layer1.0.conv1.weight", "fc.weight"], "ResNet"),
            (["visual.conv1.weight"], "CLIP"),
            (["student.backbone.cls_token", "teacher.x"], "DINO"),
            (["layers.0.blocks.0.norm1.weight"], "Swin"),
            (["something.weight"], "something.weight"),
        ],
    )
    def test_other_models(self, names, said, tmp_path):
        torch.save({"model": {name: torch.zeros(4, 3, 2, 2) for name in names}}, tmp_path / "a.pth")
        assert said in refusal(tmp_path / "a.pth")

    def test_a_vit_of_timm(self, tmp_path):
        import timm

        vit = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=3, img_size=32)
        torch.save(vit.state_dict(), tmp_path / "vit.pth")
        assert "a ViT or DeiT (its k has a bias)" in refusal(tmp_path / "vit.pth", head="classify")

    def test_a_tokenizer_file(self, tmp_path):
        torch.save({"model": seeded(DiscreteVAE, **DVAE).state_dict()}, tmp_path / "dvae.pth")
        assert "is no BEiT" in refusal(tmp_path / "dvae.pth")

    def test_both_kinds_of_tables(self, tmp_path):
        state = timm_beit().state_dict()
        state["rel_pos_bias.relative_position_bias_table"] = torch.zeros(52, 2)
        torch.save({"model": state}, tmp_path / "a.pth")
        assert "one or the other" in refusal(tmp_path / "a.pth")

    def test_tables_of_an_unknown_grid(self, tmp_path):
        torch.save({"model": timm_beit((32, 64)).state_dict()}, tmp_path / "a.pth")
        assert "no square grid" in refusal(tmp_path / "a.pth")

    @pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.99])
    @pytest.mark.parametrize("suffix", ["pth", "safetensors"])
    def test_half_downloaded(self, share, suffix, tmp_path):
        path = tmp_path / f"whole.{suffix}"
        state = timm_beit().state_dict()
        save_file(state, path) if suffix == "safetensors" else torch.save({"model": state}, path)
        whole = path.read_bytes()
        path.write_bytes(whole[: int(share * len(whole))])
        assert "cannot be read as" in refusal(path)

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            (b"", "is empty"),
            (b"just a text\n" * 50, "no file of torch"),
            (b"<!DOCTYPE html><html>403</html>", "web page"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git-lfs"),
            (b"\x08\0\0\0\0\0\0\0{broken", "cannot be read as safetensors"),
            (b"\xff\xff\xff\xff\xff\xff\xff\x7f{", "cannot be read as safetensors"),
        ],
    )
    def test_renamed_files(self, content, said, tmp_path):
        for name in ("model.pth", "model.safetensors", "model.ckpt"):
            (tmp_path / name).write_bytes(content)
            assert said in refusal(tmp_path / name)

    @pytest.mark.parametrize("protocol", [2, 4])
    def test_hostile_pickles_run_nothing(self, protocol, tmp_path, run_cli):
        class Hostile:
            def __reduce__(self):
                return os.system, (f"touch '{tmp_path / 'executed'}'",)

        torch.save({"model": {"cls_token": Hostile()}}, tmp_path / "zip.pth", pickle_protocol=protocol)
        (tmp_path / "raw.pth").write_bytes(pickle.dumps({"model": Hostile()}, protocol))
        torch.save(
            {"model": Hostile()}, tmp_path / "old.pth", pickle_protocol=protocol, _use_new_zipfile_serialization=False
        )
        for name in ("zip.pth", "raw.pth", "old.pth"):
            said = refusal(tmp_path / name)
            assert "cannot be read as a checkpoint" in said
            code, _, stderr = run_cli("predict", f"init_from={tmp_path / name}", f"src={tmp_path}", "out=x.csv")
            assert code == 2
            assert stderr.count("\n") == 1
        assert not (tmp_path / "executed").exists()

    def test_a_module_that_was_pickled_whole(self, tmp_path):
        torch.save(timm_beit(), tmp_path / "whole.pth")
        assert "holds code or objects (timm.models.beit.Beit)" in refusal(tmp_path / "whole.pth")

    @pytest.mark.parametrize(
        ("config", "said"),
        [
            ('{"model_type": "vit"}', "is of a vit model"),
            ("no json", "is no JSON"),
            ("[1]", "holds a list"),
            ('{"model_type": "beit", "hidden_act": "relu"}', "BEiT has gelu"),
            (None, "its config.json is missing"),
        ],
    )
    def test_configs_of_hugging_face(self, config, said, tmp_path):
        hf_classifier().save_pretrained(tmp_path)
        (tmp_path / "config.json").unlink() if config is None else (tmp_path / "config.json").write_text(config)
        assert said in refusal(tmp_path if config else tmp_path / "model.safetensors")

    def test_a_folder_with_a_config_alone(self, tmp_path):
        (tmp_path / "config.json").write_text('{"model_type": "beit"}')
        assert "neither model.safetensors nor pytorch_model.bin" in refusal(tmp_path)


def test_checkpoints_of_fit_say_their_grid(tmp_path):
    """Where tensors alone could not: tables of 4 x 8 patches."""
    model = scrambled(MaskedImageModel(**{**MIM, "image_size": (32, 64)}))
    loaded = load_pretrained(write_checkpoint(tmp_path / "a.ckpt", "mim", model), "mim")
    assert loaded.config["image_size"] == [32, 64]
    image, mask = picture((32, 64)), random_mask(2, 32)
    assert torch.equal(loaded(image, mask), model(image, mask))
