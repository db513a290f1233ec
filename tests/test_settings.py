"""Shipped settings satisfy their rules; invalid values are one line before anything is written."""

from __future__ import annotations

import os
from functools import cache

import pytest
from omegaconf import OmegaConf

from beit_pretrain.cli import VERBS
from beit_pretrain.config import compose, compose_raw, experiments, model_of
from beit_pretrain.data.settings import DataSettings
from beit_pretrain.engine.settings import OptimSettings
from beit_pretrain.errors import UserError
from beit_pretrain.models.checkpoints.pretrained import load_pretrained
from beit_pretrain.settings import RENAMED, Settings, group_of
from beit_pretrain.transforms.views import ClassificationTransform

PLACES = ["data.train=x", "data.val=x"]
NEEDED = {
    "download": ["out=y"],
    "shards": ["src=x", "out=y"],
    "bench": ["action=views", "src=x"],
    "demo": [],
    "predict": ["src=x", "init_from=z"],
    "tokenize": ["data=x", "tokenizer.path=y"],
    "visualize": ["run=w"],
    "probe": ["init_from=z", *PLACES],
    "compare": ["src=x"],
}


def placeholders(cfg) -> dict:
    """The composed settings with something in place of those that the user must give."""
    for key in sorted(OmegaConf.missing_keys(cfg)):
        OmegaConf.update(cfg, key, "hf" if key == "to" else "x")
    return OmegaConf.to_container(cfg, resolve=True)


@pytest.mark.parametrize("name", experiments())
def test_experiments_have_valid_settings(name):
    given = placeholders(compose_raw("fit", [f"+experiment={name}", *PLACES]))
    model_of("fit", given["task"]).validated(given)


@pytest.mark.parametrize("verb", sorted(VERBS.keys() - {"fit"}))
def test_verbs_have_valid_settings(verb):
    model_of(verb).validated(placeholders(compose_raw(verb, [])))


def keys_of(model: type[Settings], prefix: str = ""):
    for name, field in model.model_fields.items():
        yield f"{prefix}{field.alias or name}", field
        if group := group_of(field.annotation):
            yield from keys_of(group, f"{prefix}{field.alias or name}.")


ONE_EACH = ["base_22k", "tokenizer", "finetune_own", "probe_1k", "segment_ade20k_base", "mae_base_1k"]  # of each task


@pytest.mark.parametrize("verb", [*VERBS, "sweep", "bench_step", "bench_gpu", *ONE_EACH])
def test_every_setting_has_a_default_in_yaml_and_a_description(verb):
    """One place for the default, the YAML; one for the description, the model. Optional ones are named by it alone."""
    task = None
    if verb in experiments():
        cfg = OmegaConf.to_container(compose_raw("fit", [f"+experiment={verb}"]))
        task = cfg["task"]
    else:
        cfg = OmegaConf.to_container(compose_raw(verb, []))
    for key, field in keys_of(model_of("fit" if task else verb, task)):
        value, group = cfg, key.rpartition(".")[0]
        for part in key.split("."):
            value = value.get(part, "not there") if isinstance(value, dict) else "not there"
        parent = cfg
        for part in group.split(".") if group else ():
            parent = parent.get(part) if isinstance(parent, dict) else None
        if isinstance(parent, dict):
            assert value != "not there" or not field.is_required(), key
        assert field.description or group_of(field.annotation) or key.endswith("size"), key


@pytest.mark.parametrize(
    "word",
    "seed=null seed=1.7 seed=-1 steps=1.5 steps=abc steps=true epochs=0 global_batch_size=0 batch_size=abc threads=0 "
    "mean=abc std=[0,0,0] optim.betas=[2,3] optim.betas=[0.9] optim.lr=0 optim.lr=fast "
    "optim.clip=-1 optim.layer_decay=2 "
    "data.jitter=abc data.jitter=[1,2] data.flip=abc data.flip=2 data.val_batch=0 data.val_images=0 "
    "data.shuffle_block_size=abc data.shuffle_streams=0 data.scale=[-1,-.5] data.scale=[1,.5] "
    "data.ratio=[0,1] data.num_workers=-1 "
    "data.weights=1 data.weights=[1,0] data.weights=[a] data.max_corrupt_fraction=2 "
    "data.max_corrupt_fraction=-1 data.cache_gb=0 data.retries=-1 "
    "data.timeout=0 data.timeout=soon data.train=[] data.val=[1,[2]] "
    "data.pil_reference=maybe knn.bank=0 knn.k=abc num_visualizations=-1 model.depth=0 model.drop_path_rate=2 "
    "model.embed_dim=-4 mask.min_aspect=0 "
    "dense_knn.k=0 dense_knn.reduce_labels=2 collapse.images=2049 "
    "resume=sometimes optim.warmup_steps=1.5 val_minutes=0 gradient_compression=fp16".split(),
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


def test_names_may_be_numbers():
    assert DataSettings(train=[1.5, "a"], val=3).train == ["1.5", "a"]
    assert DataSettings(train=2024, val=3).val == "3"


def test_python_callers_get_the_defaults_of_the_yaml():
    assert OptimSettings(lr=1.0).betas == [0.9, 0.999]
    assert DataSettings(train="x").shuffle_block_size == 4096


def test_errors_repeat_the_value_as_it_was_given():
    with pytest.raises(UserError, match="warmup_steps must be a whole number of at least 0, got 'many'"):
        OptimSettings.validated({"lr": 1.0, "warmup_steps": "many"})


def test_settings_of_a_wrong_form_are_refused():
    with pytest.raises(TypeError, match=r"settings of OptimSettings are a dictionary, not \[1\]"):
        OptimSettings.validated([1])
    with pytest.raises(TypeError, match="ClassificationTransform takes at most 2 positional arguments, got 3"):
        ClassificationTransform(32, True, 0.5)


PATH_SETTINGS = {
    "download": "out src",
    "shards": "src out labels.path",
    "tokenize": "src out tokenizer.path cache_dir",
    "probe": "init_from out data.train data.val data.cache_dir",
    "validate": "run data.val",
    "predict": "init_from src out",
    "export": "init_from out",
    "visualize": "run runs out photos",
    "bench": "src",
    "compare": "src held_out run_dir",
    "demo": "src run_dir",
    "base_22k": "run_dir init_from data.train data.val data.tokens data.cache_dir tokenizer.path",
    "mae_base_1k": "run_dir init_from data.train data.val data.cache_dir",
    "finetune_own": "run_dir init_from data.train data.val",
    "probe_1k": "run_dir init_from data.train data.val",
    "segment_ade20k_base": "run_dir init_from data.train data.val",
    "tokenizer": "run_dir data.train data.val",
}


@cache
def model_and_settings(name: str) -> tuple[type[Settings], dict]:
    verb, words = ("fit", [f"+experiment={name}"]) if name in experiments() else (name, [])
    given = placeholders(compose_raw(verb, words))
    return model_of(verb, given.get("task")), given


@pytest.mark.parametrize(("name", "key"), [(n, key) for n, keys in PATH_SETTINGS.items() for key in keys.split()])
def test_every_path_setting_expands_the_home_folder(name, key, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    model, given = model_and_settings(name)
    group, _, leaf = key.rpartition(".")

    def read(value):
        written = {**given, group: {**(given[group] or {}), leaf: value}} if group else {**given, leaf: value}
        settings = model.validated(written)
        return getattr(getattr(settings, group) if group else settings, leaf)

    assert read("~/x y") == "/home/someone/x y"
    with pytest.raises(UserError, match=r"there is no user 'nobody_here'; .* is written ./~nobody_here/x"):
        read("~nobody_here/x")


@pytest.mark.parametrize(
    ("given", "path"),
    [
        ("~", "/home/someone"),
        ("~/", "/home/someone/"),
        ("~root/x", os.path.expanduser("~root/x")),
        ("./~x", "./~x"),
        ("a/~/b~", "a/~/b~"),
        ("hf://~x/y", "hf://~x/y"),
        ("pipe:cat ~/x", "pipe:cat ~/x"),
        ("${oc.env:DATA}/x", "/home/someone/data/x"),
        (["~/a", "b", "~"], ["/home/someone/a", "b", "/home/someone"]),
    ],
)
def test_only_a_leading_tilde_is_the_home_folder(given, path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("DATA", "~/data")
    word = f"[{','.join(given)}]" if isinstance(given, list) else given
    assert compose("shards", ["action=make", f"src={word}", "out=x"]).src == path
    assert compose("shards", ["action=make", "src=x", "out=~/y"]).out == "/home/someone/y"


def test_python_callers_may_write_a_tilde(mim_checkpoint, monkeypatch):
    monkeypatch.setenv("HOME", str(mim_checkpoint.parent))
    assert load_pretrained(f"~/{mim_checkpoint.name}", "mim").about["tokenizer"]
    with pytest.raises(UserError, match="there is no user"):
        load_pretrained("~nobody_here/last.ckpt")


@pytest.mark.parametrize("policy", ["foo", "rand-x9", "rand-m9x"])
def test_augmentation_that_timm_does_not_know(policy, run_cli):
    code, _, stderr = run_cli("fit", "+experiment=finetune_own", *PLACES, "init_from=x", f"data.auto_augment={policy}")
    assert code == 2
    assert stderr.startswith(
        "error: data.auto_augment must be null or timm's name of a RandAugment policy, such as rand"
    )


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_errors_of_old_names_give_the_new_ones(old, new, run_cli):
    words = ["fit", "+experiment=base_1k", *PLACES, "tokenizer.path=x"]
    if old in ("exact", "workers", "per_class"):
        words = {"exact": ["tokenize", *NEEDED["tokenize"]], "per_class": ["demo"]}.get(old, ["shards", "src=x"])
    for sign in ("", "+"):
        code, _, stderr = run_cli(*words, f"{sign}{old}=1")
        assert (code, stderr) == (2, f"error: {old} was renamed to {new}\n")


@pytest.mark.parametrize(
    ("word", "guess"), [("optim.lrr=1", "optim.lr"), ("+optim.lrr=1", "optim.lr"), ("max_patch=3", "mask.max_patches")]
)
def test_errors_of_unknown_settings_give_the_nearest(word, guess, run_cli):
    code, _, stderr = run_cli("fit", "+experiment=demo_pretrain", *PLACES, "tokenizer.path=x", word)
    assert code == 2
    assert stderr.endswith(f"did you mean {guess}?\n")


@pytest.mark.parametrize("verb", sorted(VERBS.keys() - {"fit"}))
def test_experiments_are_for_training_alone(verb, run_cli):
    code, _, stderr = run_cli(verb, *NEEDED.get(verb, []), "+experiment=base_22k")
    assert code == 2
    assert stderr.startswith(f"error: {verb}")
    assert stderr.endswith(" takes no experiment (+experiment=)\n")


UNSET = ["+experiment=small_own", "tokenizer.path=t"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fit", "+experiment=base_22k", "name=${nope}"], "name: ${nope} is no setting; "),
        (["fit", "+experiment=base_22k", "task=${nope}"], "task: ${nope} is no setting; "),
        (["fit", "-m", "+experiment=base_22k", "seed=1,2", "name=${nope}"], "name: ${nope} is no setting; "),
        (["fit", *UNSET, "data.train=${DATA}/train"], "data.train: ${DATA} is no setting; "),
        (
            ["fit", *UNSET, "data.train=${oc.env:NOT_SET}/train"],
            "data.train: the environment variable NOT_SET is not set; ",
        ),
        (["fit", *UNSET, "data.train=${data.val}", "data.val=${data.train}"], "data."),
        (["fit", *UNSET, "data.train=a${b"], "data.train='a${b' is no interpolation that is complete; "),
        (["fit", *UNSET, "data.train=d", "steps=${nope}"], "steps: ${nope} is no setting; "),
        (["predict", "src=${env:HOME}"], "src: ${env:...} is no setting; "),
        (["predict", "src=[a=1,${nope}]"], "src[1]: ${nope} is no setting; "),
        (["predict", "src=${"], "src='${' is no interpolation that is complete; "),
        (["predict", "src=${..src}"], "src: ConfigKeyError while resolving"),
        (
            ["predict", "src=${oc.env:NOT_SET}"],
            "src: the environment variable NOT_SET is not set; set it, or give a default: ${oc.env:NOT_SET,DEFAULT}",
        ),
        (["demo", "run_dir=${run_dir}"], "run_dir: the value refers to itself by ${...}"),
    ],
)
def test_interpolations_that_fail_name_their_key(words, message, run_cli, tmp_path):
    code, _, stderr = run_cli(*words, *(["init_from=x"] if words[0] == "predict" else []))
    assert (code, stderr.count("\n")) == (2, 1), stderr
    assert stderr.startswith(f"error: {message}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["task=null"], "choose what to train: +experiment=NAME, one of base_1k,"),
        (["data.train=x"], "choose what to train: +experiment=NAME, one of base_1k,"),
        (["+experiment=null"], "+experiment=null: choose one of base_1k,"),
        (["+experiment=base_22k", "logger=null"], "logger=null: choose one of csv, tensorboard, wandb"),
        (["+experiment=base_22k", "=3"], "settings are given as key=value, not '=3'"),
        (
            ["+experiment=base_22k", "hydra/launcher=submitit_slurm"],
            "hydra/launcher=submitit_slurm is for sweeps: fit -m",
        ),
        (["+experiment=base_22k", "model.depth=2"], "model.depth has no default; add it with a plus: +model.depth=..."),
        (["+experiment=base_22k", "optim.learning_rate=1"], "unknown key 'optim.learning_rate' for fit; python -m"),
        (["+experiment=mae_base_1k", "mask.max_patches=3"], "unknown key 'mask.max_patches' for fit; python -m"),
    ],
)
def test_settings_of_another_kind_are_explained(words, message, run_cli):
    code, _, stderr = run_cli("fit", *words)
    assert code == 2
    assert stderr.startswith(f"error: {message}")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["fit"], "+experiment=NAME --help"),
        (["fit", "+experiment=base_22k"], "optim.lr=0.0015                        peak learning rate"),
        (["fit", "+experiment=mae_base_1k"], "mask.ratio=0.75"),
        (["shards"], "samples_per_shard=1000"),
        (["bench", "gpu"], "bench.seconds=540"),
        (["bench", "views"], "src=???"),
    ],
)
def test_help_shows_defaults_and_descriptions(words, said, run_cli):
    code, stdout, _ = run_cli(*words, "--help")
    assert code == 0
    assert said in stdout
