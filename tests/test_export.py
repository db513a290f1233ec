"""Exports: every format opened by its own software, exact round trips, and errors."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from foreign import hf_classifier, hf_mim, scrambled, timm_beit, unilm_file
from PIL import Image
from safetensors.torch import load_file
from tiny import MIM, SIZE, write_checkpoint

from beit_pretrain.models.backbone import Classifier, MaskedImageModel
from beit_pretrain.models.checkpoints import export as exporting
from beit_pretrain.models.checkpoints.pretrained import load_pretrained
from beit_pretrain.transforms.views import ClassificationTransform

NAMES = ["cat", "dog", "a, b 'c'"]
ABOUT = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
OUT = {"unilm": "x.pth", "timm": "x.safetensors", "hf": "folder", "onnx": "x.onnx"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A MIM and a classifier in run folders as `fit` saves them, with random tensors."""
    folder = tmp_path_factory.mktemp("runs")
    for kind, model, about in (
        ("mim", scrambled(MaskedImageModel(**MIM)), ABOUT),
        ("classifier", scrambled(Classifier(3, **SIZE)), {**ABOUT, "classes": NAMES, "crop_ratio": None}),
    ):
        run = folder / kind
        (run / "checkpoints").mkdir(parents=True)
        write_checkpoint(run / "checkpoints" / "last.ckpt", kind, model, **about)
        (run / "config.yaml").write_text("task: finetune\nglobal_batch: 64\noptim: {lr: 0.001}\nsteps: 10\n")
        (run / "metrics.csv").write_text("step,train/loss,val/accuracy\n5,1.0,\n10,0.5,0.875\n")
    return folder


def checkpoint(trained, kind):
    return trained / kind / "checkpoints" / "last.ckpt"


def exported(run_cli, source, to, out, *words):
    code, stdout, stderr = run_cli("export", f"init_from={source}", f"to={to}", f"out={out}", *words)
    assert code == 0, stderr
    assert stderr == ""
    assert "opened again and compared: the same numbers" in stdout
    return stdout


def state(path, kind):
    return load_pretrained(path, "mim" if kind == "mim" else "classify").state_dict()


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("kind", ["mim", "classifier"])
@pytest.mark.parametrize("to", ["unilm", "hf", "onnx"])
def test_every_format(kind, to, trained, run_cli, tmp_path):
    out = tmp_path / "new folder" / OUT[to]
    exported(run_cli, checkpoint(trained, kind), to, out)
    if to != "onnx":
        assert same(state(out, kind), state(checkpoint(trained, kind), kind))
    assert [path.name for path in out.parent.iterdir()] == [out.name]  # nothing half-written is left


def test_printed_timm_command_loads_export(trained, run_cli, tmp_path):
    for kind in ("mim", "classifier"):
        out = tmp_path / f"{kind}.safetensors"
        line = exported(run_cli, checkpoint(trained, kind), "timm", out).splitlines()[-1]
        import timm

        model = eval(line, {"timm": timm}).eval()
        image = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            if kind == "mim":
                ours = load_pretrained(checkpoint(trained, kind), "mim").encode(image)
                assert torch.allclose(model.forward_features(image), ours, atol=1e-5)
            else:
                ours = load_pretrained(checkpoint(trained, kind), "classify")(image)
                assert torch.allclose(model(image), ours, atol=1e-5)
                assert same(state(out, kind), state(checkpoint(trained, kind), kind))
                assert load_pretrained(out, "classify").about["classes"] == NAMES


@pytest.mark.parametrize("kind", ["mim", "classifier"])
def test_round_trip_from_hugging_face(kind, run_cli, tmp_path):
    """Hugging Face -> unilm -> ours -> Hugging Face: every tensor of the file is bit-identical."""
    (hf_mim() if kind == "mim" else hf_classifier()).save_pretrained(tmp_path / "theirs")
    exported(run_cli, tmp_path / "theirs", "unilm", tmp_path / "a.pth")
    exported(run_cli, tmp_path / "a.pth", "hf", tmp_path / "back")
    assert same(load_file(tmp_path / "back/model.safetensors"), load_file(tmp_path / "theirs/model.safetensors"))
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("theirs", "back"))
    unknown = {"id2label", "label2id", "vocab_size", "transformers_version"}  # to a file of the authors, and to us
    assert {k for k in before if before[k] != after.get(k)} <= unknown


@pytest.mark.parametrize("kind", ["mim", "classifier"])
def test_round_trip_from_unilm(kind, run_cli, tmp_path):
    model = scrambled(MaskedImageModel(**MIM) if kind == "mim" else Classifier(3, **SIZE))
    unilm_file(tmp_path / "authors.pth", model.state_dict())
    exported(run_cli, tmp_path / "authors.pth", "hf", tmp_path / "hf")
    exported(run_cli, tmp_path / "hf", "unilm", tmp_path / "back.pth")
    before, after = (torch.load(tmp_path / name, weights_only=True)["model"] for name in ("authors.pth", "back.pth"))
    assert same(before, after)  # index buffers too


def test_round_trip_from_timm(run_cli, tmp_path):
    model = timm_beit()
    torch.save(model.state_dict(), tmp_path / "timm.pth")
    exported(run_cli, tmp_path / "timm.pth", "hf", tmp_path / "hf")
    exported(run_cli, tmp_path / "hf", "timm", tmp_path / "back.safetensors")
    assert same(load_file(tmp_path / "back.safetensors"), dict(model.state_dict()))


@pytest.mark.parametrize(
    "changes",
    [
        {"rel_pos_bias": "none", "abs_pos_emb": True, "init_values": None},
        {"rel_pos_bias": "shared"},
        {"pool": "token"},
        {"in_chans": 1, "patch_size": 16},
    ],
)
@pytest.mark.parametrize("to", ["timm", "hf"])
def test_other_classifiers(changes, to, run_cli, tmp_path):
    settings = {**SIZE, **changes}
    pool = settings.pop("pool", "avg")
    write_checkpoint(tmp_path / "a.ckpt", "classifier", scrambled(Classifier(3, pool, **settings)))
    exported(run_cli, tmp_path / "a.ckpt", to, tmp_path / OUT[to])


def test_files_of_hugging_face_export(trained, run_cli, tmp_path):
    from transformers import BeitForImageClassification, BeitImageProcessor, BeitModel

    exported(run_cli, checkpoint(trained, "classifier"), "hf", tmp_path / "hf")
    files = {path.name for path in (tmp_path / "hf").iterdir()}
    assert files == {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"}
    model = BeitForImageClassification.from_pretrained(tmp_path / "hf")
    assert model.config.id2label == dict(enumerate(NAMES))
    assert BeitModel.from_pretrained(tmp_path / "hf").pooler.layernorm is not None
    card = (tmp_path / "hf" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers")
    assert "| accuracy | 0.875 |" in card
    assert "After 10 optimiser steps." in card
    assert "global_batch_size: 64" in card
    # The processor makes our evaluation view: same resize, crop and normalisation.
    rng = torch.Generator().manual_seed(0)
    small = torch.randint(0, 256, (3, 4, 3), generator=rng, dtype=torch.uint8).numpy()
    photo = Image.fromarray(small).resize((90, 60), Image.Resampling.BICUBIC)
    theirs = BeitImageProcessor.from_pretrained(tmp_path / "hf")(photo, return_tensors="pt").pixel_values[0]
    view = torch.from_numpy(ClassificationTransform(32, False)(photo, None)["image"]).float() / 255
    ours = (view - torch.tensor(ABOUT["mean"])[:, None, None]) / torch.tensor(ABOUT["std"])[:, None, None]
    assert theirs.shape == ours.shape
    assert (theirs - ours).abs().mean() < 0.02  # torchvision's resize on tensors, Pillow's on images


def test_another_image_size(trained, run_cli, tmp_path):
    exported(run_cli, checkpoint(trained, "classifier"), "hf", tmp_path / "hf", "image_size=64")
    resized = load_pretrained(checkpoint(trained, "classifier"), "classify", image_size=64)
    assert same(state(tmp_path / "hf", "classifier"), resized.state_dict())


def test_non_square_grids(run_cli, refused, tmp_path):
    model = scrambled(Classifier(3, **{**SIZE, "image_size": (32, 64)}))
    write_checkpoint(tmp_path / "a.ckpt", "classifier", model, **ABOUT)
    exported(run_cli, tmp_path / "a.ckpt", "unilm", tmp_path / "a.pth")
    assert load_pretrained(tmp_path / "a.pth", "classify").config["image_size"] == [32, 64]
    exported(run_cli, tmp_path / "a.ckpt", "onnx", tmp_path / "a.onnx")
    assert "transformers swaps height and width" in refused(
        "export", f"init_from={tmp_path / 'a.ckpt'}", "to=hf", f"out={tmp_path / 'hf'}"
    )
    assert not (tmp_path / "hf").exists()


def test_export_with_different_outputs_is_discarded(trained, run_cli, tmp_path, monkeypatch):
    """If the other software computes other numbers, nothing is published."""
    import timm

    create = timm.create_model

    def spoiled(*args, **settings):
        model = create(*args, **settings)
        torch.nn.init.constant_(model.cls_token, 5.0)
        return model

    monkeypatch.setattr(timm, "create_model", spoiled)
    source = checkpoint(trained, "classifier")
    code, _, stderr = run_cli("export", f"init_from={source}", "to=timm", f"out={tmp_path / 'x.safetensors'}")
    assert code == 2
    assert re.search("outputs differ from ours by .* of their size", stderr)
    assert list(tmp_path.iterdir()) == []


def test_refuses_to_overwrite_its_input(trained, refused, tmp_path):
    shutil.copy(checkpoint(trained, "mim"), tmp_path / "a.pth")
    before = (tmp_path / "a.pth").read_bytes()
    for to, out in (("unilm", tmp_path / "a.pth"), ("hf", tmp_path), ("hf", ".")):
        assert "is where init_from=" in refused(
            "export", f"init_from={tmp_path / 'a.pth'}", f"to={to}", f"out={out}", "image_size=64"
        )
    assert (tmp_path / "a.pth").read_bytes() == before


@pytest.mark.parametrize("name", ["README.md", "config.json"])
def test_refuses_to_overwrite_foreign_files(name, trained, refused, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text("# my notes")
    assert f"has a {name} that no export wrote" in refused(
        "export", f"init_from={checkpoint(trained, 'mim')}", "to=hf", f"out={tmp_path / 'mine'}"
    )
    assert (tmp_path / "mine" / name).read_text() == "# my notes"


@pytest.mark.parametrize("text", ["[1, 2]", "{broken", "task: [", "name: x"])
def test_unreadable_run_config_is_ignored(text, trained, run_cli, tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    shutil.copy(checkpoint(trained, "mim"), tmp_path / "run" / "checkpoints" / "last.ckpt")
    (tmp_path / "run" / "config.yaml").write_text(text)
    exported(run_cli, tmp_path / "run" / "checkpoints" / "last.ckpt", "hf", tmp_path / "hf")
    assert "Not known" in (tmp_path / "hf" / "README.md").read_text()


@pytest.mark.parametrize("to", ["unilm", *(pytest.param(to, marks=pytest.mark.long) for to in ("timm", "hf", "onnx"))])
def test_disk_full(to, trained, tmp_path):
    """The shell's file size limit, in its own process: one line, nothing half-written."""
    command = f"ulimit -f 20; exec '{sys.executable}' -m beit_pretrain export to={to} out={OUT[to]}"
    result = subprocess.run(
        ["bash", "-c", f"trap '' XFSZ; {command} init_from='{checkpoint(trained, 'classifier')}'"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_model_card_has_metrics_of_checkpoint_step(trained, run_cli, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained / "classifier", run)
    (run / "metrics.csv").write_text("step,val/accuracy\n10,0.5\n20,0.9\n")
    exported(run_cli, run / "checkpoints" / "last.ckpt", "hf", tmp_path / "hf", "image_size=64")
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "| accuracy | 0.5 |" in card
    assert "Images of 32 pixels." in card


def test_leaves_other_files_of_folder(trained, run_cli, tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "notes.txt").write_text("mine")
    exported(run_cli, checkpoint(trained, "mim"), "hf", tmp_path / "hf")
    exported(run_cli, checkpoint(trained, "mim"), "hf", tmp_path / "hf")  # again, over itself
    assert (tmp_path / "hf" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["to=unilm", "out=x.bin"], "must end with .pth"),
        (["to=timm", "out=x.pth"], "must end with .safetensors"),
        (["to=keras", "out=x"], "to must be one of unilm, timm, onnx, hf"),
        (["out=x"], "to is missing"),
        (["to=hf"], "out is missing"),
        (["to=hf", "out=a-file"], "is a file"),
        (["to=onnx", "out=folder.onnx"], "is a folder"),
        (["to=hf", "out=x", "image_size=33"], "not divisible"),
    ],
)
def test_invalid_arguments(words, said, trained, refused, tmp_path):
    (tmp_path / "a-file").touch()
    (tmp_path / "folder.onnx").mkdir()
    assert said in refused("export", f"init_from={checkpoint(trained, 'mim')}", *words)
    assert {path.name for path in tmp_path.iterdir()} == {"a-file", "folder.onnx"}


def test_missing_software(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(exporting.UserError, match=r"pip install 'beit_pretrain\[export\]'"):
        exporting.needed("onnxruntime")


def test_model_card_without_run_folder(trained, run_cli, tmp_path):
    shutil.copy(checkpoint(trained, "mim"), tmp_path / "alone.ckpt")
    exported(run_cli, tmp_path / "alone.ckpt", "hf", tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "Not known" in card
    assert "Nothing is on record" in card
