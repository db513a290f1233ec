"""Fine-tuning: soft targets, mixing keyed by position, exact validation, EMA, and a classifier for PIL images."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image
from tiny import SIZE, fit_words, seeded, state_of, write_checkpoint

from beit_pretrain.data.reader import ShardReader
from beit_pretrain.data.write.make_shards import make_shards
from beit_pretrain.engine.settings import OptimSettings
from beit_pretrain.inference.predictor import ImageClassifier
from beit_pretrain.models.backbone import Classifier
from beit_pretrain.models.checkpoints.formats import read_checkpoint
from beit_pretrain.tables import curve
from beit_pretrain.tasks.finetune import Finetuning, MixConfig
from beit_pretrain.transforms.jitter import HALF


def module(**regularisation) -> Finetuning:
    model = seeded(Classifier, 10, **SIZE)
    return Finetuning(model, OptimSettings(lr=1e-3), MixConfig(**regularisation), HALF, HALF)


def test_smoothed_targets():
    label = torch.tensor([3, 0])
    _, target = module(label_smoothing=0.1).regularise(torch.zeros(2, 3, 32, 32), label, 0)
    assert target[0, 3] == pytest.approx(0.91)
    assert target[0, 4] == pytest.approx(0.01)
    assert target.sum(1).tolist() == pytest.approx([1, 1])


def test_mixing_and_erasing_depend_only_on_position():
    image, label = torch.rand(4, 3, 32, 32), torch.arange(4)
    mixing = module(mixup=0.8, cutmix=1.0, erasing=0.9)
    state = torch.random.get_rng_state()
    first, again, other = (mixing.regularise(image.clone(), label, k) for k in (8, 8, 16))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
    assert torch.equal(torch.random.get_rng_state(), state)  # the global generator is unchanged


def test_overfits_one_batch():
    tuned = module(label_smoothing=0.0)
    image, label = torch.rand(8, 3, 32, 32), torch.arange(8)
    optimizer = torch.optim.AdamW(tuned.model.parameters(), lr=3e-3)
    for _ in range(80):
        loss = torch.nn.functional.cross_entropy(tuned(image), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


@pytest.mark.parametrize("val_batch", [1, 5, 12])
def test_validation_counts_every_image_once(val_batch, shards, run_cli, tmp_path):
    """The metrics depend neither on the batch size nor on a smaller last batch."""
    words = finetune_words(shards, tmp_path, "steps=1", "val_every=1", "global_batch_size=4", "data.labels_per_class=2")
    assert run_cli(*words, f"run_dir={tmp_path / 'one'}", "data.val_batch=64")[0] == 0
    assert run_cli(*words, f"run_dir={tmp_path / 'other'}", f"data.val_batch={val_batch}")[0] == 0
    for name in ("val/loss", "val/accuracy", "val/top5_accuracy"):
        one, other = (curve(tmp_path / run / "metrics.csv", name)[1][-1] for run in ("one", "other"))
        assert other == pytest.approx(one, abs=1e-6)
    assert (tmp_path / "one/checkpoints/best.ckpt").is_file()


def test_image_classifier(tmp_path):
    tuned = seeded(Classifier, 3, **SIZE)
    about = {"mean": list(HALF), "std": list(HALF), "classes": ["a", "b", "c"]}
    classifier = ImageClassifier(
        read_checkpoint(write_checkpoint(tmp_path / "last.ckpt", "classifier", tuned, **about))
    )
    views = torch.stack([classifier.views(Image.new(mode, (50, 70)))[0] for mode in ("RGB", "L", "CMYK")])
    best = classifier.classify(views, top=5)
    assert [len(b) for b in best] == [3, 3, 3]
    assert sum(p for _, p, _ in best[0]) == pytest.approx(1, abs=1e-5)
    assert best[0][0][1] >= best[0][1][1]


def finetune_words(shards, run_dir, *more: str) -> list[str]:
    words = ["from_scratch=true", "val_every=2", "save_every=1", "data.labels_per_class=null", "optim.warmup_steps=0"]
    return fit_words("finetune", shards, *words, f"run_dir={run_dir}", *more)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixup_targets(smoothing):
    """Image and label are mixed with the reversed batch by the same share; cutmix boxes are timm's."""
    image, label = torch.rand(4, 3, 32, 32), torch.tensor([1, 2, 3, 4])
    mixed, target = module(mixup=0.8, label_smoothing=smoothing).regularise(image.clone(), label, 8)
    off, on = smoothing / 10, 1 - smoothing + smoothing / 10
    share = ((target[0, 1] - off) / (on - off)).item()
    assert 0 < share < 1
    assert torch.allclose(mixed, share * image + (1 - share) * image.flip(0), atol=1e-5)
    for i, (own, other) in enumerate([(1, 4), (2, 3), (3, 2), (4, 1)]):
        expected = torch.full((10,), off)
        expected[own] += share * (on - off)
        expected[other] += (1 - share) * (on - off)
        assert torch.allclose(target[i], expected, atol=1e-5)
    pasted, target = module(cutmix=1.0, label_smoothing=smoothing).regularise(image.clone(), label, 8)
    kept = (pasted == image).all(1)
    assert torch.equal(pasted[0][:, ~kept[0]], image[3][:, ~kept[0]])  # the rest is the partner's
    assert target[0, 1].item() == pytest.approx(off + kept[0].float().mean().item() * (on - off), abs=1e-5)


@pytest.mark.parametrize(
    ("more", "images"),
    [
        (["global_batch_size=6", "trainer.devices=2", "trainer.accelerator=cpu"], 3),
        (["global_batch_size=3", "batch_size=4", "regularisation.cutmix=1"], 3),
        (["global_batch_size=6", "batch_size=3"], 3),
        (["global_batch_size=2", "batch_size=5"], None),  # of the 5 never more than 2 come
    ],
)
def test_mixing_needs_even_micro_batch(more, images, shards, run_cli, tmp_path):
    words = finetune_words(shards, tmp_path / "run", "steps=1", "regularisation.mixup=0.8", "preflight=only", *more)
    code, _, stderr = run_cli(*words)
    assert code == (0 if images is None else 2)
    assert images is None or f"pair images: {images} at once" in stderr
    assert stderr.count("\n") == (images is not None)


def test_ema_weights(shards, run_cli, tmp_path):
    """decay x average + (1 - decay) x weights after every step; the average starts with the weights of step 1."""
    constant = ["optim.min_lr=2e-3", "model.drop_path_rate=0"]
    states = []
    for steps in (1, 2, 3):
        assert run_cli(*finetune_words(shards, tmp_path / f"plain{steps}", f"steps={steps}", *constant))[0] == 0
        states.append(state_of(tmp_path / f"plain{steps}"))
    code, _, stderr = run_cli(*finetune_words(shards, tmp_path / "ema", "steps=3", "ema=0.75", *constant))
    assert code == 0, stderr
    averaged = state_of(tmp_path / "ema")
    for name, tensor in averaged.items():
        expected = states[0][name]
        for state in states[1:]:
            expected = 0.75 * expected + 0.25 * state[name]
        assert torch.allclose(tensor, expected, atol=1e-6), name
    assert any(not torch.equal(averaged[n], states[-1][n]) for n in averaged)


def test_resume_with_ema(shards, run_cli, crash, tmp_path):
    more = ["steps=4", "ema=0.9", "model.drop_path_rate=0"]
    assert run_cli(*finetune_words(shards, tmp_path / "whole", *more))[0] == 0
    words = finetune_words(shards, tmp_path / "died", *more)
    crash(3, *words)
    code, stdout, stderr = run_cli(*words)
    assert code == 0, stderr
    assert "after step 3" in stdout
    one, other = state_of(tmp_path / "whole"), state_of(tmp_path / "died")
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("batch_size", [2, 8])
def test_gradient_accumulation_equals_full_batch(batch_size, shards, run_cli, tmp_path):
    """4 x 8 and 16 x 2 images as 1 x 32."""
    more = ["steps=3", "global_batch_size=32", "model.drop_path_rate=0"]
    assert run_cli(*finetune_words(shards, tmp_path / "one", *more))[0] == 0
    assert run_cli(*finetune_words(shards, tmp_path / "many", *more, f"batch_size={batch_size}"))[0] == 0
    losses = [curve(tmp_path / run / "metrics.csv", "train/loss")[1] for run in ("one", "many")]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    one, many = state_of(tmp_path / "one"), state_of(tmp_path / "many")
    assert max((one[name] - many[name]).abs().max().item() for name in one) < 1e-5


def test_activation_checkpointing_changes_nothing(shards, run_cli, tmp_path):
    more = ["steps=2", "model.drop_path_rate=0.5"]
    assert run_cli(*finetune_words(shards, tmp_path / "plain", *more))[0] == 0
    assert run_cli(*finetune_words(shards, tmp_path / "saving", *more, "activation_checkpointing=true"))[0] == 0
    one, other = state_of(tmp_path / "plain"), state_of(tmp_path / "saving")
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_early_stopping(shards, run_cli, refused, tmp_path):
    words = finetune_words(shards, tmp_path / "run", "steps=40", "early_stopping=2", "optim.lr=1e-9", "val_every=2")
    code, stdout, stderr = run_cli(*words, "optim.min_lr=0")
    assert code == 0, stderr
    steps, _ = curve(tmp_path / "run" / "metrics.csv", "val/accuracy")
    assert steps == [2, 4, 6]  # nothing is learned: the first is the best, two more are waited for
    assert "stopped early after step 6 of 40" in stdout
    assert "data.val is needed" in refused(
        *finetune_words(shards, tmp_path / "no", "steps=2", "early_stopping=2", "data.val=null")
    )


def test_intermediate_fine_tuning(shards, photos, mim_checkpoint, run_cli, tmp_path):
    """Pre-trained -> classes of one dataset -> classes of another: blocks are kept, the head is new."""
    make_shards(photos, tmp_path / "data", val=0.2, num_workers=1)
    first = ["from_scratch=false", "model.drop_path_rate=0", "steps=2"]
    assert run_cli(*finetune_words(shards, tmp_path / "large", *first, f"init_from={mim_checkpoint}"))[0] == 0
    data = [f"data.train={tmp_path / 'data/train'}", f"data.val={tmp_path / 'data/val'}", "optim.lr=1e-9"]
    source = f"init_from={tmp_path / 'large/checkpoints/last.ckpt'}"
    code, stdout, stderr = run_cli(*finetune_words(shards, tmp_path / "small", *first, *data, source))
    assert code == 0, stderr
    assert "classifier: 2 blocks" in stdout
    large, small = state_of(tmp_path / "large"), state_of(tmp_path / "small")
    assert (large["model.head.weight"].shape[0], small["model.head.weight"].shape[0]) == (10, 3)
    kept = [name for name in large if ".head." not in name]
    assert max((large[name] - small[name]).abs().max().item() for name in kept) < 1e-6
    assert small["model.head.weight"].std() < 1e-4  # nearly nothing, as a new head is


COUNTS = """
import json, sys
from beit_pretrain.config import compose
from beit_pretrain.engine import fit
found = fit.validate(compose("validate", sys.argv[2:]))
fit.is_first_process() and open(sys.argv[1], "w").write(json.dumps(found))
"""


@pytest.mark.long
@pytest.mark.timeout(900)  # six processes start
def test_validation_is_exact_on_1_2_and_3_processes(run_cli, tmp_path):
    """Exactly the same counts and the same losses within 1e-6, with batches of 7 that end differently on each."""
    make_shards("synthetic", tmp_path / "data", images=121, val=101 / 121, size=32, num_workers=1)
    val = ShardReader(tmp_path / "data/val").samples
    assert val == 101
    words = finetune_words(tmp_path / "data", tmp_path / "run", "steps=2", "global_batch_size=4", "data.val_batch=7")
    assert run_cli(*words)[0] == 0
    (tmp_path / "count.py").write_text(COUNTS)
    found = []
    for processes in (1, 2, 3):
        out = tmp_path / f"{processes}.json"
        command = [sys.executable, str(tmp_path / "count.py"), str(out), f"run={tmp_path / 'run'}"]
        subprocess.run(
            [*command, "trainer.accelerator=cpu", f"trainer.devices={processes}"],
            check=True, timeout=250, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        found.append(json.loads(out.read_text()))
    for metrics in found:
        assert metrics["val/images"] == 101
        for name in ("val/accuracy", "val/top5_accuracy"):
            assert metrics[name] == found[0][name]
            assert metrics[name] * 101 == pytest.approx(round(metrics[name] * 101), abs=1e-4)
        assert metrics["val/loss"] == pytest.approx(found[0]["val/loss"], abs=1e-6)
