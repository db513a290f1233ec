"""Composes Hydra configs from the command line, and validates them.

Imports Hydra only to compose a config, so that --help is fast.
"""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from typing import Any, cast

import yaml

from beit_pretrain.errors import UserError, first_line
from beit_pretrain.overrides import key_of, parsed, readable
from beit_pretrain.settings import Settings, config_dir, description, help_text, unknown

# How to get the value of a missing setting, for error messages, where its description does not say so.
HINTS = {
    "data.train": "shards of training images; make them with: python -m beit_pretrain shards make src=FOLDER out=DATA, "
    "then data.train=DATA/train",
    "tokenizer.path": "the folder of OpenAI's dVAE (encoder.pkl, decoder.pkl); get it with: "
    "python -m beit_pretrain download out=FOLDER; or train a tokenizer: fit +experiment=tokenizer, "
    "then tokenizer=dvae tokenizer.path=runs/tokenizer/checkpoints/last.ckpt",
    "run": "the folder of a run, such as runs/base_22k",
    "action": "what to measure: bench views, loader, step, loop, attention, memory, all, gpu or page",
}
MOVED_KEYS = {"logger.kind": "logger", "logger.mode": "logger.wandb.mode", "logger.project": "logger.wandb.project"}
# For error messages.
INTERPOLATION = "${KEY} is the value of a setting, ${oc.env:NAME} an environment variable; a plain ${ is written \\${"


def experiments() -> dict[str, str]:
    """{name: first line of its header} of all experiments."""
    files = sorted((config_dir() / "experiment").glob("*.yaml"))
    return {
        f.stem: next((s[1:].strip() for s in f.read_text().splitlines()[1:] if s.startswith("#")), "") for f in files
    }


def choose() -> str:
    """The message for a training without a task."""
    return f"choose what to train: +experiment=NAME, one of {', '.join(experiments())}"


def unknown_name(kind: str, name: str, known: Mapping[str, Any]) -> str:
    """The message for a verb or an experiment that does not exist: with the most similar one."""
    close = difflib.get_close_matches(name, known, 1)
    return f"unknown {kind} {name!r}; {f'did you mean {close[0]}? ' if close else ''}there are {', '.join(known)}"


def compose_raw(verb: str, overrides: list[str]):
    """The verb's config with the user's overrides, unresolved. Raises UserError if it does not compose."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    if verb not in TRAINING and any(key_of(word) == "experiment" for word in overrides):
        raise UserError(f"{typed(verb, overrides)} takes no experiment (+experiment=)")
    overrides = [current(word) for word in overrides]
    callers, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None  # a notebook may use Hydra itself
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            # First without what may be no syntax of Hydra's: that finds the task, and so which settings are texts.
            plain = [readable(word) for word in overrides if parsed(word.partition("=")[2])[0] != "wrong"]
            plain = [word for word in plain if "${" not in word]
            cfg = hydra_compose(verb, overrides=plain)
            words = [readable(word, _model_of(verb, cfg)) for word in overrides]
            return cfg if words == plain else hydra_compose(verb, overrides=words)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise UserError(_explain(error, verb, overrides)) from error
    finally:
        GlobalHydra.instance().hydra = callers


def current(word: str) -> str:
    """A word as Hydra takes it: with the new one of a key that was moved; a group cannot be null.

    Raises UserError for loggers that do not exist.
    """
    old, new = key_of(word), MOVED_KEYS.get(key_of(word))
    word = word.replace(old, new, 1) if new else word
    key, _, value = word.partition("=")
    if key == "logger" and "${" not in value:
        chosen = parsed(value)[1]
        names = [file.stem for file in sorted((config_dir() / "logger").glob("*.yaml"))]
        if not chosen or any(name not in names for name in (chosen if isinstance(chosen, list) else [chosen])):
            raise UserError(f"{word}: choose one of {', '.join(names)}, or several: logger=[wandb,tensorboard]")
    return "tokenizer=none" if word == "tokenizer=null" else word


def compose_plain(verb: str, overrides: list[str]) -> dict[str, Any]:
    """`compose_raw` as a dictionary, with missing values as ???."""
    from omegaconf import OmegaConf

    return cast(dict[str, Any], OmegaConf.to_container(compose_raw(verb, overrides), resolve=False))


def help_of(verb: str, overrides: list[str]) -> str:
    """The text of `VERB --help`: settings with defaults and descriptions, with an experiment those of its task too."""
    composed = compose_plain(verb, overrides)
    task = composed.get("task")
    if task != "???":
        return help_text(model_of(verb, task), composed)
    return help_text(model_of(verb), composed) + "\n\n+experiment=NAME --help adds the settings of its task"


def compose(verb: str, overrides: list[str], spared: tuple[str, ...] = ()) -> Any:
    """The verb's settings with the user's overrides, complete and validated; an instance of `model_of`.

    Missing settings become null if `spared` names them. Raises UserError, with one line, if the config does not compose
    or a setting is missing, unknown or invalid.
    """
    return validated(compose_raw(verb, overrides), verb, spared)


def validated(cfg: Any, verb: str, spared: tuple[str, ...] = ()) -> Any:
    """The settings of a config of `compose_raw`, as `compose` gives them."""
    from omegaconf.errors import OmegaConfBaseException

    try:
        given, absent = _completed(cfg, verb, spared)
    except OmegaConfBaseException as error:  # such as an interpolation of a key that does not exist
        raise UserError(_unresolved(error)) from error
    settings = model_of(verb, given.get("task")).validated(given)
    for key in absent:
        *groups, name = key.split(".")
        setattr(reduce(getattr, groups, settings), name, None)
    return settings


def _completed(cfg: Any, verb: str, spared: tuple[str, ...]) -> tuple[dict[str, Any], set[str]]:
    """The resolved config as a dictionary, and the missing settings that `spared` allows."""
    from omegaconf import OmegaConf

    if OmegaConf.is_missing(cfg, "task") or ("task" in cfg and cfg.task is None):
        raise UserError(choose())
    if OmegaConf.is_missing(cfg, "init_from") and cfg.get("from_scratch"):
        cfg.init_from = None
    if "tokenizer.path" in OmegaConf.missing_keys(cfg) and OmegaConf.select(cfg, "data.tokens") is not None:
        cfg.tokenizer = {"_target_": None, "path": None}  # cached tokens need no tokenizer
    absent = OmegaConf.missing_keys(cfg) & set(spared)
    for key in absent:
        OmegaConf.update(cfg, key, "absent")
    if missing := sorted(OmegaConf.missing_keys(cfg)):
        model = model_of(verb, cfg.get("task"))
        hints = {key: HINTS.get(key) or description(model, key) or f"set it with {key}=..." for key in missing}
        if "init_from" in hints and "from_scratch" in cfg:
            hints["init_from"] += " (or from_scratch=true)"
        raise UserError("; ".join(f"{key} is missing: {hint}" for key, hint in hints.items()))
    return cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True)), absent


TRAINING = ("fit", "bench_step", "bench_gpu")  # configs with the settings of a task, which an experiment chooses
# Config name -> "module:class" of its settings. Strings, since some modules take seconds to import.
MODELS = {
    "download": "tokenizers.settings:DownloadSettings",
    "shards": "data.write.settings:ShardsSettings",
    "tokenize": "tokenizers.settings:TokenizeSettings",
    "fit": "engine.settings:FitSettings",
    "sweep": "engine.settings:SweepSettings",
    "probe": "evaluation.settings:ProbeSettings",
    "validate": "engine.settings:ValidateSettings",
    "predict": "inference.settings:PredictSettings",
    "embed": "inference.settings:EmbedSettings",
    "export": "models.settings:ExportSettings",
    "visualize": "engine.settings:VisualizeSettings",
    "bench": "benchmarks.settings:ImageBenchSettings",
    "bench_step": "benchmarks.settings:StepBenchSettings",
    "bench_gpu": "benchmarks.settings:GpuBenchSettings",
    "compare": "examples.settings:CompareSettings",
    "demo": "examples.settings:DemoSettings",
}


def model_of(verb: str, task: str | None = None) -> type[Settings]:
    """The settings class of a verb; for `fit`, and benchmarks with its settings, that of the task."""
    module, name = MODELS[verb].split(":")
    model: type[Settings] = getattr(importlib.import_module(f"beit_pretrain.{module}"), name)
    if task is None or verb not in TRAINING:
        return model
    own: type[Settings] = importlib.import_module("beit_pretrain.engine.task").find_task(task).settings
    return own if verb == "fit" else type(name, (model, own), {"defaults": own.defaults})


def _model_of(verb: str, cfg: Any) -> type[Settings] | None:
    """`model_of` for a composed config; None if it has no task, or an unknown one."""
    try:
        return model_of(verb, cfg.task if verb in TRAINING else None)
    except Exception:  # the task is missing, unknown, or an interpolation that fails: `_completed` reports it
        return None


def typed(verb: str, overrides: list[str]) -> str:
    """The verb as typed on the command line: some actions of `bench` have separate configs."""
    verb = verb.partition("_")[0]
    action = next((word.partition("=")[2] for word in overrides if word.startswith("action=")), "")
    return f"{verb} {action}".rstrip()


def _explain(error: Exception, verb: str, overrides: list[str]) -> str:
    """A one-line message for an error of Hydra or OmegaConf."""
    text = str(error) if error.__cause__ is None else f"{error}\n{error.__cause__}"
    line = first_line(error)
    if "Error merging override" in text and "${" in line:
        return f"{line.removeprefix('Error merging override ')} is no interpolation that is complete; {INTERPOLATION}"
    if override := getattr(error, "override", None):
        return f"cannot read the setting {override!r}: {line}"
    if found := re.search(r"Could not find 'experiment/([^']*)'", text):
        return unknown_name("experiment", found[1], experiments())
    if "is not in struct" in text or "Could not override" in text:
        key = key_of(line.split("'")[1]) if "'" in line else line
        if key == "experiment":
            return "experiments are added with a plus: +experiment=NAME"
        command = typed(verb, overrides)
        composed = compose_plain(verb, [word for word in overrides if word.startswith("+experiment=")])
        task = composed.get("task")
        if task == "???":  # without a task, most settings are unknown
            return choose()
        if key.startswith("logger.") and description(model_of(verb, task), key):
            return needs_logger(key)
        if description(model_of(verb, task), key):
            return f"{key} has no default; add it with a plus: +{key}=..."
        return unknown(key, keys_of(composed), command, f"python -m beit_pretrain {command} --help lists the settings")
    if line.startswith("Config group override must be"):
        for word in overrides:
            names = [file.stem for file in sorted((config_dir() / key_of(word)).glob("*.yaml"))]
            if names and not isinstance(yaml.safe_load(word.partition("=")[2]), str):
                return f"{word}: choose one of {', '.join(names)}"
    return line


def needs_logger(key: str) -> str:
    """The message for a setting, logger.NAME.*, of a logger that was not chosen."""
    return f"{key} needs logger={key.split('.')[1]}, or logger=[...] with it"


def _unresolved(error: Exception) -> str:
    """The message for an interpolation that fails: what is wrong with it, and what may have been meant."""
    key, line = getattr(error, "full_key", None), first_line(error)
    if found := re.search(r"Environment variable '(.*)' not found", line):
        name = found[1]
        line = f"the environment variable {name} is not set; set it, or give a default: ${{oc.env:{name},DEFAULT}}"
    elif found := re.search(r"Interpolation key '(.*)' not found|Unsupported interpolation type (.*)", line):
        name = found[1] or found[2]
        line = f"${{{name}{'' if found[1] else ':...'}}} is no setting; {INTERPOLATION}"
    elif "Recursive interpolation" in line:
        line = "the value refers to itself by ${...}"
    else:
        line = f"{line}; {INTERPOLATION}"
    return f"{key}: {line}" if key else line


def keys_of(group: dict[str, Any], prefix: str = "") -> list[str]:
    """The names of all settings and groups of a composed config."""
    keys = []
    for key, value in group.items():
        keys.append(f"{prefix}{key}")
        if isinstance(value, dict):
            keys += keys_of(value, f"{prefix}{key}.")
    return keys


def show_config(verb: str, overrides: list[str]) -> str:
    """The composed config as YAML, with missing values as ???."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(compose_raw(verb, overrides))


@contextmanager
def as_user_errors() -> Iterator[None]:
    """Turn errors during construction, which come from wrong settings, into one-line user errors."""
    try:
        yield
    except (ValueError, TypeError, LookupError, ArithmeticError, AssertionError, RuntimeError) as error:
        raise UserError(first_line(error)) from error
    except Exception as error:
        # Names of exceptions of Hydra, OmegaConf and Lightning, to avoid importing these packages here.
        kinds = {kind.__name__ for kind in type(error).__mro__}
        if not kinds & {"InstantiationException", "OmegaConfBaseException", "MisconfigurationException"}:
            raise
        raise UserError(first_line(error.__cause__ or error)) from error
