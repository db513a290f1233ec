"""Every shipped experiment composes and builds its data, network and optimizer; numbers match the papers."""

from __future__ import annotations

import pytest
import torch

from beit_pretrain.config import compose, experiments
from beit_pretrain.engine.preflight import lr_hint
from beit_pretrain.engine.task import find_task
from beit_pretrain.engine.trainer import total_steps
from beit_pretrain.models.build import network
from beit_pretrain.settings import config_dir

NAMES = sorted(path.stem for path in (config_dir() / "experiment").glob("*.yaml"))


def words(name: str, shards, dvae_checkpoint, mim_checkpoint) -> list[str]:
    text = (config_dir() / "experiment" / f"{name}.yaml").read_text()
    result = [
        f"+experiment={name}",
        f"data.train={shards / 'train'}",
        f"data.val={shards / 'val'}",
        "data.num_workers=0",
    ]
    if "tokenizer.path=" in text:
        result += ["tokenizer=dvae", f"tokenizer.path={dvae_checkpoint}"]
    if name == "continue_own":
        result += [f"init_from={mim_checkpoint}", "image_size=32", "mask.max_patches=6", "mask.min_block=1"]
    elif name.startswith("probe"):
        result += [f"init_from={mim_checkpoint}", "image_size=32"] + (["probe.layer=2"] if "paper" in name else [])
    elif "init_from=" in text or "from_scratch=true" in text:
        result += ["from_scratch=true", f"init_from={mim_checkpoint}"]
    if name == "finetune_own":
        result += ["model.size=small"]
    return result


@pytest.mark.parametrize("name", NAMES)
def test_composes_and_builds(name, shards, dvae_checkpoint, mim_checkpoint):
    cfg = compose("fit", words(name, shards, dvae_checkpoint, mim_checkpoint))
    if getattr(cfg.model, "size", None) in ("base", "large"):
        cfg.model.depth = 2  # its real width; more blocks would only cost time
    task = find_task(cfg.task)(cfg)
    assert total_steps(cfg, 1_281_167) > 0
    with torch.no_grad():
        assert sum(p.numel() for p in task.module.model.parameters()) > 300


@pytest.mark.parametrize("name", NAMES)
def test_experiment_has_header_and_is_small(name):
    lines = (config_dir() / "experiment" / f"{name}.yaml").read_text().splitlines()
    assert len(lines) <= 40
    for word in ("# command", "# hardware", "# time", "# expected"):
        assert any(line.startswith(word) for line in lines), f"{word} is missing"
    assert experiments()[name]


def composed(name: str, *words: str):
    text = (config_dir() / "experiment" / f"{name}.yaml").read_text()
    keys = ["data.train", "init_from"] if "init_from=" in text else ["data.train", "tokenizer.path"]
    return compose("fit", [f"+experiment={name}", *(f"{key}=x" for key in keys), *words])


# Clip and layer scale of pre-training, and a row of settings for each fine-tuning run, as the release has them.
PRETRAINING = {
    "base_22k": (768, 3.0, 150, 14_197_122, 10_000),
    "base_22k_24gb": (768, 3.0, 150, 14_197_122, 10_000),
    "large_22k": (1024, 1.0, 150, 14_197_122, 10_000),
    "base_1k": (768, 3.0, 800, 1_281_167, 6256),  # 10 epochs
    "base_1k_paper": (768, 3.0, 800, 1_281_167, 6256),
    "large_1k": (1024, 1.0, 800, 1_281_167, 6256),
}
FINETUNING = {  # lr, batch, epochs, warm-up epochs, layer decay, drop path, weight decay, mixup, cutmix, clip, erasing
    "finetune_base_1k": (4e-3, 1024, 100, 20, 0.65, 0.1, 0.05, 0.8, 1.0, None, 0.25),
    "finetune_large_1k": (1e-3, 1024, 50, 5, 0.75, 0.2, 0.05, 0.8, 1.0, None, 0.25),
    "finetune_base_1k_22kft": (2e-5, 512, 30, 5, 0.85, 0.1, 1e-8, 0, 0, None, 0.25),
    "finetune_large_1k_22kft": (2e-5, 512, 30, 5, 0.9, 0.4, 1e-8, 0, 0, None, 0.25),
    "intermediate_base_22k": (3e-3, 4096, 90, 5, 0.65, 0.2, 0.05, 0, 0, 3.0, 0.25),
    "intermediate_large_22k": (2e-3, 2048, 90, 5, 0.75, 0.2, 0.05, 0, 0, 1.0, 0.25),
    "finetune_cifar100": (3e-3, 512, 150, 20, 0.65, 0.1, 0.3, 0.8, 1.0, None, 0),
}
SEGMENTATION = {  # lr, layer decay, drop path, image size, width
    "segment_ade20k_base": (7e-4, 0.65, 0.1, 512, 768),
    "segment_ade20k_base_640": (3e-5, 0.9, 0.1, 640, 768),
    "segment_ade20k_large_640": (2e-5, 0.95, 0.2, 640, 1024),
}
SAME_BUT_SIZE = {
    "finetune_base_1k_384": ("finetune_base_1k", 384),
    "finetune_large_1k_384": ("finetune_large_1k", 384),
    "finetune_base_1k_22kft_384": ("finetune_base_1k_22kft", 384),
    "finetune_large_1k_22kft_384": ("finetune_large_1k_22kft", 384),
    "finetune_large_1k_22kft_512": ("finetune_large_1k_22kft", 512),
}


@pytest.mark.parametrize("name", PRETRAINING)
def test_pretraining_matches_paper(name):
    width, clip, epochs, images, warmup = PRETRAINING[name]
    cfg = composed(name)
    settings = cfg.optim.with_warmup_in_steps(images, cfg.global_batch_size)
    assert (settings.lr, settings.min_lr, settings.warmup_steps, settings.clip) == (1.5e-3, 1e-5, warmup, clip)
    assert (settings.weight_decay, settings.layer_decay, tuple(settings.betas)) == (0.05, None, (0.9, 0.999))
    assert settings.eps == 1e-8
    assert (cfg.global_batch_size, cfg.epochs, cfg.mask.max_patches, cfg.mask.min_block) == (2048, epochs, 75, 16)
    assert (cfg.recipe.global_batch_size, cfg.recipe.lr) == (2048, 1.5e-3)
    assert total_steps(cfg, images) == int(epochs * images / 2048)
    arguments = network(cfg)
    paper = name == "base_1k_paper"
    assert arguments["embed_dim"] == width
    assert arguments["init_values"] == (None if paper else 0.1 if width == 768 else 1e-5)
    bias = (arguments.get("rel_pos_bias", "shared"), arguments.get("abs_pos_emb", False))
    assert bias == (("none", True) if paper else ("shared", False))
    assert arguments["drop_path_rate"] == 0.1
    assert (cfg.data.jitter, cfg.data.flip, cfg.data.scale) == ([0.4, 0.4, 0.4], 0.5, [0.08, 1.0])
    assert cfg.mean == ([0.485, 0.456, 0.406] if "1k" in name else None)  # null: .5


@pytest.mark.parametrize("name", FINETUNING)
def test_finetuning_matches_paper(name):
    cfg = composed(name)
    o, r = cfg.optim, cfg.regularisation
    found = (o.lr, cfg.global_batch_size, cfg.epochs, o.warmup_epochs, o.layer_decay, cfg.model.drop_path_rate)
    assert (*found, o.weight_decay, r.mixup, r.cutmix, o.clip, r.erasing) == FINETUNING[name]
    assert (o.min_lr, r.label_smoothing, cfg.data.auto_augment) == (1e-6, 0.1, "rand-m9-mstd0.5-inc1")
    assert cfg.image_size == 224
    assert (cfg.recipe.global_batch_size, cfg.recipe.lr) == (cfg.global_batch_size, o.lr)


@pytest.mark.parametrize("name", SAME_BUT_SIZE)
def test_higher_resolutions_change_only_size(name):
    base, size = SAME_BUT_SIZE[name]
    high, low = composed(name), composed(base)
    assert high.image_size == size
    for cfg in (high, low):
        for key in ("image_size", "batch_size", "name", "run_dir"):
            setattr(cfg, key, None)
    assert high == low


def test_probes_match_paper():
    release, base, large = (composed(f"probe_{name}") for name in ("1k", "base_1k_paper", "large_1k_paper"))
    assert (release.probe.layer, release.probe.pool, release.epochs) == (None, "cls_avg", 100)
    assert (base.probe.layer, base.probe.pool, base.epochs) == (9, "avg", 50)
    assert (large.probe.layer, large.probe.pool, large.epochs) == (14, "avg", 50)
    for cfg in (release, base, large):
        assert (cfg.optim.lr, cfg.global_batch_size, cfg.optim.weight_decay) == (4e-3, 1024, 1e-4)
        assert cfg.data.auto_augment is None


@pytest.mark.parametrize("name", SEGMENTATION)
def test_segmentation_matches_paper(name):
    cfg = composed(name)
    settings = cfg.optim.with_warmup_in_steps(20_210, cfg.global_batch_size)
    found = (settings.lr, settings.layer_decay, cfg.model.drop_path_rate, cfg.image_size, network(cfg)["embed_dim"])
    assert found == SEGMENTATION[name]
    assert (settings.schedule, settings.warmup_steps, settings.warmup_start, settings.min_lr) == ("poly", 1500, 1e-6, 0)
    assert (settings.weight_decay, tuple(settings.betas), settings.clip) == (0.05, (0.9, 0.999), None)
    assert (cfg.steps, cfg.global_batch_size, cfg.recipe.lr) == (160_000, 16, settings.lr)
    assert (cfg.decoder.pool_scales, cfg.decoder.channels, cfg.decoder.aux_channels) == ([1, 2, 3, 6], None, 256)
    assert (cfg.data.resize, cfg.data.max_share, cfg.data.flip, cfg.data.distort) == ([0.5, 2.0], 0.75, 0.5, True)
    assert (cfg.mean, cfg.std) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert cfg.data.reduce_labels
    assert (cfg.test.stride, cfg.test.scales, cfg.test.flip) == (pytest.approx(2 / 3), [1.0], False)


def test_every_paper_experiment_is_checked():
    own = {"probe_1k", "probe_base_1k_paper", "probe_large_1k_paper"}  # test_the_probes_are_the_recipes
    own |= {"tokenizer", "small_own", "finetune_own", "continue_own", "mae_base_1k"}
    rest = {name for name in NAMES if not name.startswith(("demo_", "compare_"))} - own
    assert rest == PRETRAINING.keys() | FINETUNING.keys() | SAME_BUT_SIZE.keys() | SEGMENTATION.keys()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], None),
        (["global_batch_size=512"], "suggested: optim.lr=0.000375 (linear rule; square root: 0.00075)"),
        (["global_batch_size=512", "optim.lr=3.75e-4"], None),
        (["global_batch_size=4096"], "suggested: optim.lr=0.003 (linear"),
        (["global_batch_size=512", "recipe=null"], None),
    ],
)
def test_hint_for_other_global_batch_size(words, said):
    lines = lr_hint(composed("base_22k", *words))
    assert len(lines) == (said is not None)
    assert said is None or said in lines[0]
