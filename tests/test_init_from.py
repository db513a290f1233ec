"""`init_from=` on the command line: continued pre-training and fine-tuning from checkpoints of every format."""

from __future__ import annotations

import re
import shutil

import pytest
import torch
from foreign import hf_classifier, hf_mim, scrambled, timm_beit, unilm_file
from tiny import MIM, data_words

from beit_pretrain.config import compose
from beit_pretrain.engine.task import Task, find_task
from beit_pretrain.models.backbone import SIZES, MaskedImageModel
from beit_pretrain.models.checkpoints.files import read
from beit_pretrain.models.checkpoints.pretrained import load_pretrained

BRIEF = ["epochs=null", "optim.warmup_epochs=null", "steps=2", "global_batch_size=4", "threads=1", "log_every=1"]


@pytest.fixture
def words(shards, tmp_path):
    return [*data_words(shards), "data.num_workers=0", *BRIEF, f"run_dir={tmp_path / 'run'}", "logger=csv"]


@pytest.fixture
def pretrain_words(words, dvae_checkpoint):
    tokenizer = ["tokenizer=dvae", f"tokenizer.path={dvae_checkpoint}"]
    masks = ["image_size=32", "mask.max_patches=6", "mask.min_block=1"]
    return ["fit", "+experiment=continue_own", *words, *tokenizer, *masks]


@pytest.fixture
def finetune_words(words):
    return ["fit", "+experiment=finetune_own", *words, "image_size=32"]


@pytest.fixture
def authors_file(tmp_path):
    """A pre-trained .pth of unilm with the 32 tokens of the dVAE fixture."""
    model = scrambled(MaskedImageModel(**MIM))
    return unilm_file(tmp_path / "beit_pt22k.pth", model.state_dict())


def started(words: list[str]) -> Task:
    cfg = compose("fit", words[1:])
    return find_task(cfg.task)(cfg)


class TestContinuedPreTraining:
    def test_from_unilm_file(self, pretrain_words, authors_file, run_cli, tmp_path):
        words = [*pretrain_words, f"init_from={authors_file}"]
        model = started(words).module.model
        state = torch.load(authors_file, weights_only=True)["model"]
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
        assert model.training  # drop path works: what load_pretrained returns is in eval mode
        assert model.config["drop_path_rate"] == 0.1
        code, stdout, stderr = run_cli(*words)
        assert code == 0, stderr
        assert f"from {authors_file} (unilm or timm mim: 2 blocks of width 32" in stdout
        # The run can be resumed, validated and visualized without that file.
        authors_file.unlink()
        code, stdout, stderr = run_cli(*words)
        assert "already finished" in stdout, stderr
        code, _, stderr = run_cli("visualize", f"run={tmp_path / 'run'}", "images=2")
        assert code == 0, stderr

    def test_other_tokenizer_needs_new_head(self, pretrain_words, run_cli, refused, tmp_path):
        hf_mim().save_pretrained(tmp_path / "hf")  # 64 tokens
        words = [*pretrain_words, f"init_from={tmp_path / 'hf'}"]
        assert "predicts 64 tokens, the tokenizer has 32; new_head=true" in refused(*words)
        assert run_cli(*words, "new_head=true")[0] == 0
        saved = load_pretrained(tmp_path / "run" / "checkpoints" / "last.ckpt", "mim")
        assert saved.vocab_size == 32
        assert saved.config["norm_eps"] == 1e-12  # from Hugging Face's config

    def test_at_another_image_size(self, pretrain_words, authors_file, run_cli, tmp_path):
        code, stdout, stderr = run_cli(*pretrain_words, f"init_from={authors_file}", "image_size=48")
        assert code == 0, stderr
        state = read(tmp_path / "run" / "checkpoints" / "last.ckpt")["state_dict"]
        assert len(state["model.rel_pos_bias.relative_position_bias_table"]) == 11**2 + 3

    def test_from_a_classifier(self, pretrain_words, refused, tmp_path):
        torch.save(timm_beit().state_dict(), tmp_path / "timm.pth")
        assert "cannot predict tokens" in refused(*pretrain_words, f"init_from={tmp_path / 'timm.pth'}")


class TestFineTuning:
    @pytest.mark.parametrize("kind", ["authors", "timm", "hf", "hf mim"])
    @pytest.mark.parametrize("size", [32, 48])
    def test_from_every_format(self, kind, size, finetune_words, authors_file, run_cli, tmp_path):
        source = {"authors": authors_file, "timm": tmp_path / "timm.pth"}.get(kind, tmp_path / "hf")
        torch.save(timm_beit().state_dict(), tmp_path / "timm.pth")
        (hf_mim() if kind == "hf mim" else hf_classifier()).save_pretrained(tmp_path / "hf")
        code, _, stderr = run_cli(*finetune_words, f"init_from={source}", f"image_size={size}")
        assert code == 0, stderr
        # It can be resumed without its source.
        shutil.rmtree(source) if source.is_dir() else source.unlink()
        code, stdout, stderr = run_cli(*finetune_words, f"init_from={source}", f"image_size={size}")
        assert "already finished" in stdout, stderr

    def test_absolute_positions_are_kept(self, finetune_words, tmp_path):
        """As the released 800-epoch model: no relative bias in fine-tuning either."""
        hf_mim(bias="none", absolute=True, scale=None).save_pretrained(tmp_path / "hf")
        config = started([*finetune_words, f"init_from={tmp_path / 'hf'}"]).module.model.config
        assert (config["rel_pos_bias"], config["abs_pos_emb"], config["init_values"]) == ("none", True, None)

    def test_head_is_kept_only_for_same_classes(self, finetune_words, tmp_path):
        classes = started([*finetune_words, "from_scratch=true", "model.size=tiny"]).data.classes
        for names, kept in ((list(classes), True), (None, True), ([f"other {i}" for i in range(10)], False)):
            model = hf_classifier(classes=10)
            if names:
                model.config.id2label = dict(enumerate(names))
            model.save_pretrained(tmp_path / "hf")
            head = started([*finetune_words, f"init_from={tmp_path / 'hf'}"]).module.model.head
            assert torch.equal(head.weight, model.classifier.weight) == kept

    def test_experiment_of_other_size_is_refused(self, words, authors_file, refused):
        error = refused("fit", "+experiment=finetune_base_1k", *words, f"init_from={authors_file}")
        assert "has 2 blocks of width 32" in error
        assert f"model.size=base asks for embed_dim={SIZES['base']['embed_dim']}" in error

    @pytest.mark.parametrize(
        ("setting", "advice"),
        [
            ("model.rel_pos_bias=none", "model.rel_pos_bias=null keeps the checkpoint's"),
            ("model.abs_pos_emb=true", "model.abs_pos_emb=null keeps the checkpoint's"),
            ("+model.init_values=null", "set model.init_values=0.1"),
        ],
    )
    def test_advice_is_right(self, setting, advice, finetune_words, authors_file, refused, run_cli):
        assert refused(*finetune_words, f"init_from={authors_file}", setting).rstrip().endswith(advice)
        followed = re.findall(r"model\.\w+=[\w.]+", advice)[0]
        plus = "+" * setting.startswith("+")
        code, _, stderr = run_cli(*finetune_words, f"init_from={authors_file}", plus + followed)
        assert code == 0, stderr

    @pytest.mark.parametrize(
        ("setting", "fits"),
        [
            ("model.rel_pos_bias=none", False),
            ("model.rel_pos_bias=per_layer", True),
            ("model.abs_pos_emb=true", False),
            ("model.abs_pos_emb=false", True),
            ("+model.init_values=null", False),
            ("+model.init_values=0.1", True),
            ("patch_size=16", False),
            ("data.channels=1", False),
        ],
    )
    def test_settings_that_contradict_checkpoint(self, setting, fits, finetune_words, authors_file, run_cli):
        code, _, stderr = run_cli(*finetune_words, f"init_from={authors_file}", setting)
        assert (code == 0) == fits, stderr
        if not fits:
            assert setting.split("=")[0].lstrip("+").split(".")[-1] in stderr
            assert stderr.count("\n") == 1

    def test_drop_path_and_pooling_come_from_config(self, finetune_words, authors_file):
        settings = [f"init_from={authors_file}", "model.drop_path_rate=0.3", "model.pool=token"]
        model = started([*finetune_words, *settings]).module.model
        assert model.training
        assert model.blocks[1].drop_path1.drop_prob == pytest.approx(0.3)
        assert model.config["pool"] == "token"
        assert torch.equal(model.norm.weight, torch.load(authors_file, weights_only=True)["model"]["norm.weight"])
