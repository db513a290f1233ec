"""compare: the shuffled control, acceptance checks, and a small comparison that is interrupted and resumed."""

from __future__ import annotations

import json

import pytest
import torch
from test_cifar import NAMES, archive, as_python2, batch
from tiny import seeded

from beit_pretrain.config import compose
from beit_pretrain.data.reader import ShardReader
from beit_pretrain.data.write.make_shards import make_shards
from beit_pretrain.errors import UserError
from beit_pretrain.examples import compare as stages
from beit_pretrain.examples.compare_results import promises
from beit_pretrain.settings import to_dict
from beit_pretrain.tokenizers.dvae import DVAETokenizer
from beit_pretrain.tokenizers.shuffled import ShuffledTokenizer


def test_shuffled_tokenizer_gives_tokens_of_another_image(dvae_checkpoint):
    image = seeded(torch.rand, 5, 3, 32, 32)
    plain, shuffled = DVAETokenizer(dvae_checkpoint), ShuffledTokenizer(dvae_checkpoint)
    tokens, others = plain.encode(image), shuffled.encode(image)
    assert torch.equal(others, tokens[[4, 0, 1, 2, 3]])
    assert torch.equal(others.flatten().bincount(), tokens.flatten().bincount())
    assert shuffled.digest() != plain.digest()  # a head of one is refused by the other
    with pytest.raises(UserError, match="at least 2 images"):
        shuffled.encode(image[:1])


def numbers(pretrained, control, scratch) -> dict:
    kinds = {"pretrained": pretrained, "control": control, "scratch": scratch}
    return {"fine_tuned": {kind: {"accuracy": values} for kind, values in kinds.items()}}


@pytest.mark.parametrize(
    ("found", "kept"),
    [
        (([0.20, 0.21, 0.22], [0.10, 0.11, 0.09], [0.10, 0.11, 0.12]), [True, True]),
        (([0.11, 0.15, 0.13], [0.10, 0.11, 0.09], [0.10, 0.11, 0.12]), [False, True]),  # within the spread
        (([0.20, 0.21, 0.22], [0.14, 0.15, 0.16], [0.10, 0.11, 0.12]), [True, False]),  # the control helps
        (([0.05, 0.05, 0.05], [0.01, 0.01, 0.01], [0.10, 0.11, 0.12]), [False, True]),
    ],
)
def test_acceptance_checks_use_seed_spread(found, kept):
    assert [holds for _, holds in promises(numbers(*found))] == kept


@pytest.fixture
def settings(tmp_path, photos):
    return [f"src={photos}", f"held_out={photos}", f"run_dir={tmp_path / 'run'}", "seeds=1", "labels_per_class=2"] + [
        "steps={tokenizer:2,pretrain:2,finetune:2}",
        "probe_images=10",
    ]


@pytest.mark.long
def test_interrupted_comparison_resumes(settings, run_cli, refused, tmp_path, monkeypatch):
    fit, done = stages.fit, []

    def stopping(cfg):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(cfg.name)
        return fit(cfg)

    with monkeypatch.context() as patch:
        patch.setattr(stages, "fit", stopping)
        assert run_cli("compare", *settings)[0] == 130
    assert done == ["compare/tokenizer", "compare/seed-0/pretrained", "compare/seed-0/finetune-pretrained"]
    code, stdout, stderr = run_cli("compare", *settings)
    assert code == 0, stderr
    assert stdout.count("finished before") == 3
    for line in ("| pre-trained", "| control: shuffled targets", "| from scratch", "| not trained"):
        assert line in stdout
    found = json.loads((tmp_path / "run/results.json").read_text())
    assert found["labelled_images"] == 6
    assert len(found["layers"]["scratch"]["kNN"][0]) == 6
    assert {"tokenizer", "pretrained", "control", "finetune-scratch", "probe-control"} <= found["stages"].keys()
    for name in ("RESULTS.md", "accuracy.png", "layers.png", "curves.png"):
        assert (tmp_path / "run" / name).stat().st_size > 500
    assert "holds a comparison with labels_per_class=2" in refused("compare", *settings, "labels_per_class=3")
    code, stdout, _ = run_cli("compare", *settings)  # nothing is left to do but the table
    assert code == 0
    assert stdout.count("finished before") == 9


def test_occupied_folder_and_wrong_steps(settings, refused, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/precious.txt").write_text("mine")
    assert "not from an earlier comparison" in refused("compare", *settings)
    assert "steps is a group of settings: give them one by one, such as steps.tokenizer=" in refused(
        "compare", *settings, "steps=3", f"run_dir={tmp_path / 'other'}"
    )


def test_missing_source_creates_no_folder(settings, run_cli, refused, tmp_path, monkeypatch):
    def made(cfg, out):
        raise UserError("the shards are made")

    assert "nowhere" in refused("compare", *settings, "src=nowhere")
    monkeypatch.setattr(stages, "write_shards", made)
    assert "the shards are made" in run_cli("compare", *settings)[2]
    (tmp_path / "run/stages.jsonl").touch()
    assert "holds a comparison with labels_per_class=2" in refused("compare", *settings, "labels_per_class=3")


def test_classes_are_checked_before_training(settings, photos, refused, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "train", lambda *args, **settings: pytest.fail("a stage has begun"))
    for name, words, said in (
        ("one", [f"src={photos / 'cats'}", "held_out=null"], "classes; a comparison needs at least 2"),
        ("other", [f"held_out={photos / 'cats'}"], "has other classes than"),
    ):
        assert said in refused("compare", *settings, *words, f"run_dir={tmp_path / name}")


def test_all_initializations_share_finetuning_settings(tmp_path, monkeypatch, photos):
    """Labels, steps, batches and seeds are equal; only the initialization and the layer decay differ."""
    make_shards(photos, tmp_path / "data", num_workers=1)
    asked: dict[str, dict] = {}
    monkeypatch.setattr(stages, "fit", lambda cfg: asked.setdefault(cfg.name, cfg))
    cfg = compose("compare", [f"src={photos}", f"run_dir={tmp_path}"])
    data = {"data.train": tmp_path / "data/train", "data.val": tmp_path / "data/train"}
    for kind in stages.KINDS:
        stages.run_seed(cfg, tmp_path / "seed-4", kind, 4, data)
    tuned = {kind: to_dict(asked[f"compare/seed-4/finetune-{kind}"]) for kind in stages.KINDS}
    for settings in tuned.values():
        settings["optim"] = {**settings["optim"], "layer_decay": None}
        for name in ("name", "run_dir", "init_from", "from_scratch"):
            settings.pop(name)
    assert tuned["pretrained"] == tuned["control"] == tuned["scratch"]
    assert asked["compare/seed-4/control"].tokenizer.target.endswith("ShuffledTokenizer")
    first, second = (to_dict(asked[f"compare/seed-4/{kind}"]) for kind in ("pretrained", "control"))
    assert {key for key in first if first[key] != second[key]} == {"name", "run_dir", "tokenizer"}


def test_cifar_archive_has_its_own_validation_split(tmp_path):
    parts = {"train": as_python2(batch(20, 0)), "test": as_python2(batch(7, 1))}
    meta = as_python2({b"fine_label_names": NAMES, b"coarse_label_names": []})
    path = archive(tmp_path / "cifar-100-python.tar.gz", **parts, meta=meta)
    cfg = compose("compare", [f"src={path}", f"run_dir={tmp_path / 'run'}"])
    data = stages.write_shards(cfg, tmp_path / "data")
    assert [ShardReader(folder).samples for folder in data.values()] == [20, 7]
