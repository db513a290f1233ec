"""Shipped settings satisfy their rules; invalid values are one line before anything is written."""

from __future__ import annotations

from functools import cache

import pytest
from omegaconf import OmegaConf

from beit_pretrain.__main__ import VERBS
from beit_pretrain.compose import compose_raw, experiments
from beit_pretrain.errors import UserError
from beit_pretrain.settings import NAMES, RULES, check

PLACES = ["data.train=x", "data.val=x"]
NEEDED = {
    "fetch": ["out=y"],
    "shards": ["src=x", "out=y"],
    "bench": ["action=views", "src=x"],
    "demo": [],
    "predict": ["src=x", "init_from=z"],
    "tokenize": ["data=x", "tokenizer.path=y"],
    "show": ["run=w"],
    "probe": ["init_from=z", *PLACES],
    "compare": ["src=x"],
}


# Every shipped config: (verb, overrides).
CONFIGS = [("fit", (f"+experiment={name}",)) for name in experiments()]
CONFIGS += [(verb, ()) for verb in sorted((VERBS.keys() | {"sweep", "bench_step", "bench_gpu"}) - {"fit"})]
composed = cache(compose_raw)


@pytest.mark.parametrize(("verb", "overrides"), [c for c in CONFIGS if c[0] == "fit" or c[0] in {*NEEDED}])
def test_shipped_settings_satisfy_rules(verb, overrides):
    cfg = composed(verb, overrides).copy()
    for key in sorted(OmegaConf.missing_keys(cfg)):
        OmegaConf.update(cfg, key, "x")
    check(OmegaConf.to_container(cfg, resolve=True))


def test_every_rule_has_a_setting():
    """A rule whose setting was renamed would check nothing."""
    found: set[str] = set()

    def walk(settings: dict, prefix: str = "") -> None:
        for key, value in settings.items():
            found.add(f"{prefix}{key}")
            if isinstance(value, dict):
                walk(value, f"{prefix}{key}.")

    for config in CONFIGS:
        walk(OmegaConf.to_container(composed(*config)))
    assert not sorted(RULES.keys() - found)
    assert NEEDED.keys() <= VERBS.keys()


@pytest.mark.parametrize(
    "word",
    "seed=null seed=1.7 seed=-1 steps=1.5 steps=abc steps=true epochs=0 global_batch_size=0 batch_size=abc threads=0 "
    "mean=abc std=[0,0,0] optim.betas=[2,3] optim.betas=[0.9] optim.lr=0 optim.lr=fast "
    "optim.clip=-1 optim.layer_decay=2 "
    "data.jitter=abc data.jitter=[1,2] data.flip=abc data.flip=2 data.val_batch=0 data.val_images=0 "
    "data.shuffle_block_size=abc data.shuffle_streams=0 data.scale=[-1,-.5] data.scale=[1,.5] data.ratio=[0,1] data.num_workers=-1 "
    "data.weights=1 data.weights=[1,0] data.weights=[a] data.max_corrupt_fraction=2 data.max_corrupt_fraction=-1 data.cache_gb=0 data.retries=-1 "
    "data.timeout=0 data.timeout=soon data.train=[] data.val=[1,[2]] "
    "data.pil_reference=maybe knn.bank=0 knn.k=abc num_visualizations=-1 model.depth=0 model.drop_path_rate=2 "
    "model.embed_dim=-4 mask.min_aspect=0 "
    "logger.kind=paper resume=sometimes optim.warmup_steps=1.5 val_minutes=0 gradient_compression=fp16".split(),
)
def test_invalid_values_of_fit(word, refused, tmp_path):
    words = ["fit", "+experiment=demo_pretrain", *PLACES, "tokenizer.path=x", f"run_dir={tmp_path / 'run'}"]
    assert refused(*words, word).startswith(f"error: {word.split('=')[0]} must be ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("verb", "word"),
    [
        ("download", "encoder=ftp://host/encoder.pkl"),
        ("download", "decoder=null"),
        ("download", "timeout=0"),
        ("download", "attempts=0"),
        ("shards", "val=abc"),
        ("shards", "images=abc"),
        ("shards", "resize=0"),
        ("shards", "quality=null"),
        ("shards", "samples_per_shard=1.5"),
        ("bench", "rounds=0"),
        ("bench", "token_image_size=abc"),
        ("demo", "seeds=0"),
        ("demo", "threads=abc"),
        ("demo", "steps.pretrain=0"),
        ("predict", "top=0"),
        ("visualize", "images=0"),
    ],
)
def test_invalid_values_of_other_verbs(verb, word, refused, tmp_path):
    assert f"{word.split('=')[0]} must be " in refused(verb, *NEEDED[verb], word)


@pytest.mark.parametrize(
    ("verb", "word", "said"),
    [
        ("shards", "quality=101", "quality must be a whole number of at least 1 and at most 100, got 101"),
        ("tokenize", "views=2000", "views must be a whole number of at least 1 and at most 1024, got 2000"),
        ("shards", f"seed={10**20}", f"at least 0 and at most 4294967295, got {10**20}"),
        ("shards", f"images={10**20}", f"images must be a whole number of at least 1 and below 2^63, got {10**20}"),
        ("tokenize", "cache_gb=1e300", "cache_gb must be a number above 0 and at most 1e+09, got 1e+300"),
        ("fit", "data.cache_gb=1e300", "data.cache_gb must be a number above 0 and at most 1e+09, got 1e+300"),
        ("fit", "data.timeout=1e30", "data.timeout must be a number above 0 and at most 86400, got 1e+30"),
    ],
)
def test_error_names_upper_limit(verb, word, said, refused):
    words = ["+experiment=demo_pretrain", *PLACES, "tokenizer.path=x"] if verb == "fit" else NEEDED[verb]
    assert said in refused(verb, *words, word)


def test_numeric_names_become_text():
    settings = {"src": 2024, "data": {"train": [1.5, "a"], "val": 3}}
    check(settings)
    assert settings == {"src": "2024", "data": {"train": ["1.5", "a"], "val": "3"}}
    assert set(NAMES) <= RULES.keys()


def test_error_quotes_text():
    with pytest.raises(UserError, match="steps must be null or a whole number of at least 1, got 'many'"):
        check({"steps": "many"})
