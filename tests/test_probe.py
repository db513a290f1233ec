"""Linear probes: what they see, that the backbone stays as it is, layers by name, and the whole run."""

from __future__ import annotations

import shutil
from hashlib import sha256

import numpy as np
import pytest
import torch
from foreign import scrambled
from tiny import MIM, write_checkpoint

from beit_pretrain.engine.settings import OptimSettings
from beit_pretrain.models.backbone import Features, MaskedImageModel
from beit_pretrain.models.checkpoints.formats import digest
from beit_pretrain.models.checkpoints.pretrained import load_pretrained
from beit_pretrain.models.linear_probe import LayerProbes, pooled
from beit_pretrain.tables import read_rows
from beit_pretrain.tasks.probe import Probing
from beit_pretrain.transforms.jitter import HALF


def batch(count: int = 6) -> dict:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return {"image": image, "label": torch.arange(count) % 3}


def probing(checkpoint, layers=(1, 2), pool="cls_avg") -> Probing:
    return Probing(LayerProbes(layers, 32, 3, pool), load_pretrained(checkpoint), OptimSettings(lr=1e-2), HALF, HALF)


@pytest.mark.parametrize(("pool", "width"), [("cls_avg", 8), ("avg", 4), ("cls", 4)])
def test_pooling(pool, width):
    cls, patches = torch.randn(2, 4), torch.randn(2, 9, 4)
    vector = pooled(cls, patches, pool)
    assert vector.shape == (2, width)
    if pool != "avg":
        assert torch.equal(vector[:, :4], cls)
    if pool != "cls":
        assert torch.allclose(vector[:, -4:], patches.mean(1))


def test_every_layer_has_its_own_features():
    probes = LayerProbes([1, 3], 4, 5, "cls")
    features = Features([torch.randn(2, 4) for _ in range(3)], [torch.randn(2, 9, 4) for _ in range(3)])
    for logits, head, layer in zip(probes(features), probes.heads, (1, 3), strict=True):
        assert torch.equal(logits, head(features.cls[layer - 1]))


def test_gradients_reach_the_probes_alone(mim_checkpoint):
    module = probing(mim_checkpoint)
    module.training_step(batch(), 0).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.model.parameters())
    backbone = module._backbone[0]
    assert not backbone.training
    assert not any(p.requires_grad for p in backbone.parameters())
    assert not [name for name in module.state_dict() if not name.startswith("model.heads.")]


def test_a_layer_is_trained_as_if_it_were_alone(mim_checkpoint):
    torch.manual_seed(0)
    both = probing(mim_checkpoint)
    alone = probing(mim_checkpoint, layers=(2,))
    alone.model.heads[0].load_state_dict(both.model.heads[1].state_dict())
    both.training_step(batch(), 0).backward()
    alone.training_step(batch(), 0).backward()
    assert torch.allclose(both.model.heads[1].weight.grad, alone.model.heads[0].weight.grad, rtol=1e-5, atol=1e-7)


@pytest.fixture
def words(shards, mim_checkpoint, tmp_path):
    data = [f"data.train={shards / 'train'}", f"data.val={shards / 'val'}", "data.num_workers=0", "threads=1"]
    size = [
        "image_size=32",
        "epochs=null",
        "steps=4",
        "global_batch_size=6",
        "val_every=2",
        "save_every=2",
        "log_every=1",
    ]
    where = [f"init_from={mim_checkpoint}", f"run_dir={tmp_path / 'run'}", "logger=csv"]
    return ["fit", "+experiment=probe_1k", *data, *size, *where]


def test_a_run(words, run_cli, tmp_path):
    code, stdout, stderr = run_cli(*words)
    assert code == 0, stderr
    assert "2 blocks of width 32" in stdout
    _, rows = read_rows(tmp_path / "run" / "metrics.csv")
    last = rows[4]
    layers = [last["val/accuracy_layer_01"], last["val/accuracy_layer_02"]]
    assert last["val/accuracy"] == max(layers)
    assert layers[int(last["val/best_layer"]) - 1] == max(layers)
    # It resumes from its checkpoint, and validates, with the backbone from its original place.
    code, stdout, stderr = run_cli(*words, "resume=auto")
    assert "already finished" in stdout, stderr
    code, stdout, stderr = run_cli("validate", f"run={tmp_path / 'run'}", "trainer.accelerator=cpu")
    assert code == 0, stderr
    assert f"{last['val/accuracy']:.4f}" in stdout
    code, stdout, stderr = run_cli("visualize", f"run={tmp_path / 'run'}")
    assert code == 0, stderr
    for name in ("layers", "attention", "curves"):
        assert (tmp_path / "run/pictures" / f"{name}.png").is_file()


def test_a_segmentation_model_is_probed_too(words, segmenter_checkpoint, run_cli):
    """Its counters of batch norm are tensors without a dimension."""
    code, stdout, stderr = run_cli(*words, f"init_from={segmenter_checkpoint}", "steps=1")
    assert code == 0, stderr
    assert "segmenter: 2 blocks" in stdout
    state = {"b": torch.arange(6.0).view(2, 3).T, "a": torch.ones(2, dtype=torch.bfloat16)}
    by_hand = sha256(b"a" + b"\x80\x3f" * 2 + b"b" + np.array([0, 3, 1, 4, 2, 5], "<f4").tobytes())
    assert digest(state) == by_hand.hexdigest()


def test_probes_are_never_put_on_another_backbone(words, mim_checkpoint, run_cli, tmp_path):
    other = tmp_path / "source.ckpt"
    shutil.copy(mim_checkpoint, other)
    words = [*words, f"init_from={other}"]
    assert run_cli(*words)[0] == 0
    write_checkpoint(other, "mim", scrambled(MaskedImageModel(**MIM)))
    for again in (["validate", f"run={tmp_path / 'run'}", "trainer.accelerator=cpu"], [*words, "resume=auto"]):
        code, _, stderr = run_cli(*again)
        assert code == 2
        assert "was trained on another backbone" in stderr


@pytest.mark.parametrize("verb", ["predict", "export"])
def test_probes_are_refused_by_predict_and_export(verb, words, run_cli, tmp_path, photos):
    assert run_cli(*words)[0] == 0
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    more = {
        "predict": [f"init_from={last}", f"src={photos}"],
        "export": [f"init_from={last}", "to=hf", "out=x"],
    }[verb]
    code, _, stderr = run_cli(verb, *more)
    assert code == 2
    assert "probes" in stderr
    assert stderr.count("\n") == 1


def test_a_layer_that_is_not_there(words, run_cli, tmp_path):
    code, _, stderr = run_cli(*words, "probe.layer=3")
    assert code == 2
    assert "has 2 blocks" in stderr
    assert not (tmp_path / "run").exists()
