"""Reading checkpoints, with clear errors for what is refused; atomic writing."""

import os
import pickle
import resource

import pytest
import torch
from tiny import MIM, refusal, write_checkpoint

from beit_pretrain.models.backbone import MaskedImageModel
from beit_pretrain.models.checkpoints.files import AtomicCheckpointIO, load_exactly, read, read_own


class TestRead:
    def test_folder_instead_of_file(self, tmp_path, mim_checkpoint):
        assert refusal(read, tmp_path).endswith("is a folder, a checkpoint file is needed")
        assert f"did you mean {mim_checkpoint}?" in refusal(read, mim_checkpoint.parent)

    def test_a_run_stands_for_its_last_checkpoint(self, tmp_path):
        (tmp_path / "checkpoints").mkdir()
        for name in ("best.ckpt", "last.ckpt", "previous.ckpt"):
            (tmp_path / "checkpoints" / name).touch()
        assert refusal(read, tmp_path).endswith(f"did you mean {tmp_path / 'checkpoints/last.ckpt'}?")

    def test_missing_file(self, tmp_path):
        assert "does not exist" in refusal(read, tmp_path / "nowhere.ckpt")

    @pytest.mark.parametrize(
        "content", [b"", b"a text, no checkpoint\n" * 100, b"\0" * 1000, b"PK\x03\x04" + b"\0" * 100]
    )
    def test_not_a_checkpoint(self, tmp_path, content):
        path = tmp_path / "last.ckpt"
        path.write_bytes(content)
        assert "cannot be read as a checkpoint" in refusal(read, path)

    @pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
    def test_truncated_file(self, tmp_path, mim_checkpoint, share):
        whole = mim_checkpoint.read_bytes()
        path = tmp_path / "last.ckpt"
        path.write_bytes(whole[: int(share * len(whole))])
        assert "cannot be read as a checkpoint" in refusal(read, path)

    def test_not_a_dictionary(self, tmp_path):
        torch.save(torch.zeros(3), tmp_path / "tensor.pt")
        assert "holds a Tensor, not a checkpoint" in refusal(read, tmp_path / "tensor.pt")

    def test_pickled_code_is_not_executed(self, tmp_path):
        class Hostile:
            def __reduce__(self):
                return os.system, (f"touch '{tmp_path / 'executed'}'",)

        torch.save({"state_dict": Hostile()}, tmp_path / "a.ckpt")
        (tmp_path / "b.ckpt").write_bytes(pickle.dumps(Hostile(), 2))
        for name in ("a.ckpt", "b.ckpt"):
            assert "cannot be read as a checkpoint" in refusal(read, tmp_path / name)
        assert not (tmp_path / "executed").exists()


class TestReadOwn:
    def test_checkpoint_of_fit(self, mim_checkpoint):
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
    def test_foreign_checkpoint(self, tmp_path, content, said):
        torch.save(content, tmp_path / "foreign.pt")
        line = refusal(read_own, tmp_path / "foreign.pt", "mim")
        assert "was not written by beit_pretrain fit" in line
        assert said in line

    def test_wrong_kind(self, mim_checkpoint, dvae_checkpoint):
        said = refusal(read_own, mim_checkpoint, "classifier")
        assert said.endswith("holds a pre-trained backbone with its token head; a fine-tuned classifier is needed here")
        assert "holds a tokenizer (dVAE)" in refusal(read_own, dvae_checkpoint, "mim")


def test_load_exactly_names_mismatches(mim_checkpoint):
    _, state, _ = read_own(mim_checkpoint, "mim")
    model = MaskedImageModel(**MIM | {"vocab_size": 16})
    said = refusal(load_exactly, model, state, "last.ckpt")
    assert "of another shape: lm_head.bias (32,) for (16,), lm_head.weight (32, 32) for (16, 32)" in said
    del state["cls_token"], state["blocks.0.gamma_1"], state["blocks.1.gamma_1"]
    said = refusal(load_exactly, MaskedImageModel(**MIM), state | {"more": torch.zeros(1)}, "last.ckpt")
    assert said.endswith("(missing: blocks.0-1.gamma_1, cls_token; unexpected: more)")


class TestAtomicWriting:
    def test_round_trip(self, tmp_path):
        path = tmp_path / "new" / "folders" / "last.ckpt"
        AtomicCheckpointIO().save_checkpoint({"step": 3, "weight": torch.ones(2)}, path)
        assert read(path)["step"] == 3
        AtomicCheckpointIO().save_checkpoint({"step": 4}, str(path))
        assert read(path) == {"step": 4}
        previous = path.with_name("previous.ckpt")
        assert read(previous)["step"] == 3
        assert sorted(path.parent.iterdir()) == [path, previous]

    @pytest.fixture
    def path(self, tmp_path):
        """A checkpoint of an earlier step, which a failure must not change."""
        path = tmp_path / "last.ckpt"
        AtomicCheckpointIO().save_checkpoint({"step": 1}, path)
        yield path
        assert read(path) == {"step": 1}
        assert list(tmp_path.iterdir()) == [path]

    def test_unpicklable_content(self, path):
        with pytest.raises(Exception, match="pickle"):
            AtomicCheckpointIO().save_checkpoint({"step": 2, "function": lambda: None}, path)

    def test_interrupted(self, path, monkeypatch):
        def interrupted(content, file):
            file.write(b"half")
            raise KeyboardInterrupt

        monkeypatch.setattr(torch, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            AtomicCheckpointIO().save_checkpoint({"step": 2}, path)

    def test_disk_full(self, path):
        """A file size limit stands for a full disk: both make a write fail half way."""
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        try:
            said = refusal(AtomicCheckpointIO().save_checkpoint, {"weight": torch.zeros(100_000)}, path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert said == f"checkpoint {path} cannot be written: File too large; the one before is intact"

    def test_file_in_place_of_folder(self, path):
        said = refusal(AtomicCheckpointIO().save_checkpoint, {"step": 2}, path / "last.ckpt")
        assert "cannot be written" in said


def test_fixtures_use_names_of_fit(tmp_path):
    model = MaskedImageModel(**MIM)
    path = write_checkpoint(tmp_path / "last.ckpt", "mim", model)
    assert all(name.startswith("model.") for name in read(path)["state_dict"])
