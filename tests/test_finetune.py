"""Fine-tuning: soft targets, mixing keyed by position, exact validation, and a classifier for PIL images."""

from __future__ import annotations

import pytest
import torch
from conftest import seeded, write_checkpoint
from PIL import Image

from beit_pretrain.backbone import Classifier
from beit_pretrain.finetune import Finetuning, ImageClassifier, Regularisation
from beit_pretrain.metrics import curve
from beit_pretrain.optim import Optim
from beit_pretrain.views import HALF

SIZE = {"image_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "drop_path_rate": 0.0}


def module(**regularisation) -> Finetuning:
    model = seeded(Classifier, 10, **SIZE)
    return Finetuning(model, Optim(lr=1e-3), Regularisation(**regularisation), HALF, HALF)


def test_smoothed_targets():
    label = torch.tensor([3, 0])
    _, target = module(label_smoothing=0.1).regularise(torch.zeros(2, 3, 32, 32), label, 0)
    assert target[0, 3] == pytest.approx(0.91)
    assert target[0, 4] == pytest.approx(0.01)
    assert target.sum(1).tolist() == pytest.approx([1, 1])


def test_mixing_and_erasing_depend_on_the_position_alone():
    image, label = torch.rand(4, 3, 32, 32), torch.arange(4)
    mixing = module(mixup=0.8, cutmix=1.0, erasing=0.9)
    state = torch.random.get_rng_state()
    first, again, other = (mixing.regularise(image.clone(), label, k) for k in (8, 8, 16))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
    assert torch.equal(torch.random.get_rng_state(), state)  # drop path, say, goes on undisturbed


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
    """The metrics do not depend on how the images are cut into batches, nor on a last batch that is smaller."""
    words = ["fit", "+experiment=demo_finetune", "from_scratch=true", "steps=1", "val_every=1", "global_batch=4"]
    words += [f"data.train={shards / 'train'}", f"data.val={shards / 'val'}", "data.workers=0", "log_every=1"]
    words += ["image_size=32", "model.embed_dim=32", "model.depth=2", "model.num_heads=2", "data.per_class=2"]
    assert run_cli(*words, f"run_dir={tmp_path / 'one'}", "data.val_batch=64")[0] == 0
    assert run_cli(*words, f"run_dir={tmp_path / 'other'}", f"data.val_batch={val_batch}")[0] == 0
    for name in ("val/loss", "val/accuracy", "val/top5_accuracy"):
        one, other = (curve(tmp_path / run / "metrics.csv", name)[1][-1] for run in ("one", "other"))
        assert other == pytest.approx(one, abs=1e-6)
    assert (tmp_path / "one/checkpoints/best.ckpt").is_file()


def test_image_classifier(tmp_path):
    tuned = seeded(Classifier, 3, **SIZE)
    about = {"mean": list(HALF), "std": list(HALF), "classes": ["a", "b", "c"]}
    classifier = ImageClassifier(write_checkpoint(tmp_path / "last.ckpt", "classifier", tuned, **about))
    views = torch.stack([classifier.view(Image.new(mode, (50, 70))) for mode in ("RGB", "L", "CMYK")])
    best = classifier.classify(views, top=5)
    assert [len(b) for b in best] == [3, 3, 3]
    assert sum(p for _, p in best[0]) == pytest.approx(1, abs=1e-5)
    assert best[0][0][1] >= best[0][1][1]
