"""Checkpoints: what is refused and in which words, from pre-training to fine-tuning, and writing whole files."""

import os
import pickle
import resource

import pytest
import torch
from conftest import MIM, write_checkpoint

from beit_pretrain.backbone import Classifier, MaskedImageModel
from beit_pretrain.checkpoint import SHARED_TABLE, AtomicCheckpointIO, load_backbone, load_exactly, read, read_own
from beit_pretrain.errors import UserError

NETWORK = {name: value for name, value in MIM.items() if name != "vocab_size"}


def refusal(function, *args) -> str:
    with pytest.raises(UserError) as caught:
        function(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestRead:
    def test_a_folder(self, tmp_path, mim_checkpoint):
        assert "is a folder, a checkpoint file is needed" in refusal(read, tmp_path)
        assert f"did you mean {mim_checkpoint}?" in refusal(read, mim_checkpoint.parent)

    def test_missing(self, tmp_path):
        assert "does not exist" in refusal(read, tmp_path / "nowhere.ckpt")

    @pytest.mark.parametrize(
        "content", [b"", b"a text, no checkpoint\n" * 100, b"\0" * 1000, b"PK\x03\x04" + b"\0" * 100]
    )
    def test_something_else(self, tmp_path, content):
        path = tmp_path / "last.ckpt"
        path.write_bytes(content)
        assert "cannot be read as a checkpoint" in refusal(read, path)

    @pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
    def test_truncated(self, tmp_path, mim_checkpoint, share):
        whole = mim_checkpoint.read_bytes()
        path = tmp_path / "last.ckpt"
        path.write_bytes(whole[: int(share * len(whole))])
        assert "cannot be read as a checkpoint" in refusal(read, path)

    def test_no_dictionary(self, tmp_path):
        torch.save(torch.zeros(3), tmp_path / "tensor.pt")
        assert "holds a Tensor, not a checkpoint" in refusal(read, tmp_path / "tensor.pt")

    def test_nothing_is_executed(self, tmp_path):
        class Hostile:
            def __reduce__(self):
                return os.system, (f"touch '{tmp_path / 'executed'}'",)

        torch.save({"state_dict": Hostile()}, tmp_path / "a.ckpt")
        (tmp_path / "b.ckpt").write_bytes(pickle.dumps(Hostile(), 2))
        for name in ("a.ckpt", "b.ckpt"):
            assert "cannot be read as a checkpoint" in refusal(read, tmp_path / name)
        assert not (tmp_path / "executed").exists()


class TestReadOwn:
    def test_what_fit_wrote(self, mim_checkpoint):
        config, state, about = read_own(mim_checkpoint, "mim")
        model = MaskedImageModel(**config)
        load_exactly(model, state, mim_checkpoint)
        assert {name: config[name] for name in MIM} == MIM
        assert about["mean"] == [0.5, 0.5, 0.5]

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            ({"model": {"weight": torch.zeros(1)}}, "a torch checkpoint with the entry 'model'"),
            ({"state_dict": {"weight": torch.zeros(1)}, "epoch": 3}, "a torch checkpoint with the entry 'state_dict'"),
            ({"norm.weight": torch.zeros(1), "head.bias": torch.zeros(1)}, "its keys are head.bias, norm.weight"),
            ({"a": 1, "b": 2, "c": 3, "d": 4, "e": 5}, "its keys are a, b, c, d, ..."),
            ({}, "it is empty"),
        ],
    )
    def test_foreign(self, tmp_path, content, said):
        torch.save(content, tmp_path / "foreign.pt")
        line = refusal(read_own, tmp_path / "foreign.pt", "mim")
        assert "was not written by beit_pretrain fit" in line
        assert said in line

    def test_another_kind(self, mim_checkpoint, dvae_checkpoint):
        said = refusal(read_own, mim_checkpoint, "classifier")
        assert said.endswith("holds a pre-trained backbone with its token head; a fine-tuned classifier is needed here")
        assert "holds a tokenizer (dVAE)" in refusal(read_own, dvae_checkpoint, "mim")


class TestLoadBackbone:
    def classifier(self, **settings) -> Classifier:
        return Classifier(5, **NETWORK | settings)

    def state(self, **settings) -> dict:
        torch.manual_seed(0)
        model = MaskedImageModel(**MIM | settings)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.2)
        return dict(model.state_dict())

    def test_every_block_gets_the_shared_table(self):
        state, classifier = self.state(), self.classifier()
        head = {name: t.clone() for name, t in classifier.state_dict().items() if name.startswith(("head", "fc_norm"))}
        load_backbone(classifier, state, 2, "last.ckpt")
        loaded = classifier.state_dict()
        assert SHARED_TABLE in state  # the caller's dictionary is left alone
        for block in range(2):
            assert torch.equal(loaded[f"blocks.{block}.attn.relative_position_bias_table"], state[SHARED_TABLE])
        first, second = (block.attn.relative_position_bias_table for block in classifier.blocks)
        assert first.data_ptr() != second.data_ptr()
        same = state.keys() & loaded.keys()
        assert {"cls_token", "patch_embed.proj.weight", "blocks.1.mlp.fc2.weight", "blocks.0.gamma_1"} <= same
        assert all(torch.equal(loaded[name], state[name]) for name in same)
        assert all(torch.equal(loaded[name], head[name]) for name in head)  # the head stays new

    def test_the_features_are_those_of_pre_training(self):
        """The same blocks with one table each see what the backbone saw; the norm differs, so before it."""
        backbone = MaskedImageModel(**MIM)
        backbone.load_state_dict(self.state())
        classifier = self.classifier()
        load_backbone(classifier, backbone.state_dict(), 2, "last.ckpt")
        image = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            expected = backbone.eval().hidden_states(image)[-1]
            assert torch.allclose(classifier.eval().hidden_states(image)[-1], expected, atol=1e-5, rtol=1e-5)

    def test_absolute_positions(self):
        classifier = self.classifier(rel_pos_bias=False, abs_pos_emb=True)
        state = self.state(shared_rel_pos_bias=False, abs_pos_emb=True)
        load_backbone(classifier, state, 2, "last.ckpt")
        assert torch.equal(classifier.pos_embed, state["pos_embed"])

    @pytest.mark.parametrize(
        ("settings", "said"),
        [
            ({"embed_dim": 48}, "other shape: blocks.0.attn.proj.bias (32,) for (48,)"),
            ({"image_size": 64}, "other shape: blocks.0.attn.relative_position_bias_table (52, 2) for (228, 2)"),
            ({"patch_size": 16}, "other shape"),
            ({"depth": 3}, "missing: blocks.2."),
            ({"depth": 1}, "unexpected: blocks.1."),
            ({"init_values": None}, "unexpected: blocks.0.gamma_1, blocks.0.gamma_2"),
            ({"abs_pos_emb": True}, "missing: pos_embed"),
            ({"rel_pos_bias": False}, "unexpected: blocks.0.attn.relative_position_bias_table"),
        ],
    )
    def test_another_network(self, settings, said):
        classifier = self.classifier(**settings)
        before = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
        line = refusal(load_backbone, classifier, self.state(), len(classifier.blocks), "runs/x/last.ckpt")
        assert line.startswith("init_from=runs/x/last.ckpt does not fit this network")
        assert said in line
        assert all(torch.equal(before[name], tensor) for name, tensor in classifier.state_dict().items())


def test_load_exactly_names_what_differs(mim_checkpoint):
    _, state, _ = read_own(mim_checkpoint, "mim")
    model = MaskedImageModel(**MIM | {"vocab_size": 16})
    assert "lm_head.bias, lm_head.weight (2 tensors differ)" in refusal(load_exactly, model, state, "last.ckpt")
    del state["cls_token"]
    assert "cls_token (1 tensors differ)" in refusal(load_exactly, MaskedImageModel(**MIM), state, "last.ckpt")


class TestAtomicWriting:
    def test_writes_what_can_be_read(self, tmp_path):
        path = tmp_path / "new" / "folders" / "last.ckpt"
        AtomicCheckpointIO().save_checkpoint({"step": 3, "weight": torch.ones(2)}, path)
        assert read(path)["step"] == 3
        AtomicCheckpointIO().save_checkpoint({"step": 4}, str(path))
        assert read(path) == {"step": 4}
        assert list(path.parent.iterdir()) == [path]

    @pytest.fixture
    def path(self, tmp_path):
        """A checkpoint of an earlier step, which a failure must leave as it is."""
        path = tmp_path / "last.ckpt"
        AtomicCheckpointIO().save_checkpoint({"step": 1}, path)
        yield path
        assert read(path) == {"step": 1}
        assert list(tmp_path.iterdir()) == [path]

    def test_what_cannot_be_pickled(self, path):
        with pytest.raises(Exception, match="pickle"):
            AtomicCheckpointIO().save_checkpoint({"step": 2, "function": lambda: None}, path)

    def test_interrupted(self, path, monkeypatch):
        def interrupted(content, file):
            file.write(b"half")
            raise KeyboardInterrupt

        monkeypatch.setattr(torch, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            AtomicCheckpointIO().save_checkpoint({"step": 2}, path)

    def test_no_space_left(self, path):
        """A limit on the size of files stands for a full disk: both make a write fail half way."""
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        try:
            said = refusal(AtomicCheckpointIO().save_checkpoint, {"weight": torch.zeros(100_000)}, path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert said == f"checkpoint {path} cannot be written: File too large"

    def test_a_file_in_the_folders_place(self, path):
        said = refusal(AtomicCheckpointIO().save_checkpoint, {"step": 2}, path / "last.ckpt")
        assert "cannot be written" in said


def test_fixtures_are_written_as_fit_writes(tmp_path):
    model = MaskedImageModel(**MIM)
    path = write_checkpoint(tmp_path / "last.ckpt", "mim", model)
    assert all(name.startswith("model.") for name in read(path)["state_dict"])
