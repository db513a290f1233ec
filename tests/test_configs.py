"""Every shipped experiment composes and builds its data, network and optimiser; the numbers are the recipe's."""

from __future__ import annotations

import pytest
import torch
from omegaconf import OmegaConf

from beit_pretrain.__main__ import compose, config_dir, experiments
from beit_pretrain.runs import total_steps
from beit_pretrain.tasks import TASKS, optim

NAMES = sorted(path.stem for path in (config_dir() / "experiment").glob("*.yaml"))


def words(name: str, shards, dvae_checkpoint, mim_checkpoint) -> list[str]:
    text = (config_dir() / "experiment" / f"{name}.yaml").read_text()
    result = [f"+experiment={name}", f"data.train={shards / 'train'}", f"data.val={shards / 'val'}", "data.workers=0"]
    if "tasks: pretrain" in text:
        result += ["tokenizer=dvae", f"tokenizer.path={dvae_checkpoint}"]
    if "tasks: finetune" in text:
        result += ["from_scratch=true", f"init_from={mim_checkpoint}"]
    return result


@pytest.mark.parametrize("name", NAMES)
def test_composes_and_builds(name, shards, dvae_checkpoint, mim_checkpoint):
    cfg = compose("fit", words(name, shards, dvae_checkpoint, mim_checkpoint))
    if OmegaConf.select(cfg, "model.size") == "large":
        OmegaConf.update(cfg, "model.depth", 2, force_add=True)  # its real width; 24 blocks would only cost time
    task = TASKS[cfg.task](cfg)
    assert total_steps(cfg, 1_281_167) > 0
    with torch.no_grad():
        assert sum(p.numel() for p in task.module.model.parameters()) > 10_000


@pytest.mark.parametrize("name", NAMES)
def test_has_a_header_and_is_a_small_diff(name):
    lines = (config_dir() / "experiment" / f"{name}.yaml").read_text().splitlines()
    assert len(lines) <= 40
    for word in ("# command", "# hardware", "# time", "# expected"):
        assert any(line.startswith(word) for line in lines), f"{word} is missing"
    assert experiments()[name]


def test_the_papers_runs_have_the_recipes_numbers():
    def composed(name: str, **extra: str):
        given = {"data.train": "x", "tokenizer.path": "x", "init_from": "x"} | extra
        keys = ("data.train", "init_from") if name.startswith("finetune") else ("data.train", "tokenizer.path")
        return compose("fit", [f"+experiment={name}", *(f"{key}={given[key]}" for key in keys)])

    cfg = composed("base_22k")
    assert (cfg.global_batch, cfg.epochs, cfg.mask.max_patches, cfg.mask.min_block) == (2048, 150, 75, 16)
    settings = optim(cfg, 14_197_122)
    assert (settings.lr, settings.min_lr, settings.warmup_steps, settings.clip) == (1.5e-3, 1e-5, 10_000, 3.0)
    assert (settings.weight_decay, settings.layer_decay, tuple(settings.betas)) == (0.05, None, (0.9, 0.999))
    assert total_steps(cfg, 14_197_122) == 1_039_828  # 150 x 14,197,122 / 2048
    assert optim(composed("base_1k"), 1_281_167).warmup_steps == 6256  # 10 epochs
    assert composed("large_22k").optim.clip == 1.0
    cfg = composed("finetune_1k")
    assert (cfg.optim.lr, cfg.optim.layer_decay, cfg.optim.min_lr, cfg.global_batch) == (4e-3, 0.65, 1e-6, 1024)
    assert (cfg.regularisation.mixup, cfg.regularisation.cutmix, cfg.regularisation.erasing) == (0.8, 1.0, 0.25)
    cfg = composed("finetune_cifar100")
    assert (cfg.optim.weight_decay, cfg.regularisation.erasing, cfg.epochs) == (0.3, 0.0, 150)
