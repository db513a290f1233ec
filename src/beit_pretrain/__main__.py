"""The command line: `python -m beit_pretrain VERB [+experiment=NAME] [key=value ...]`.

Turns a verb into a Hydra config and that into one function call. Nothing heavy is imported before a verb needs it, so
that --help answers at once. What the user can mend gets one line and exit code 2, not a traceback.
"""

from __future__ import annotations

import difflib
import importlib
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple, cast

from beit_pretrain.errors import SharedError, UserError, first_line
from beit_pretrain.launch import rank, speaker


class Verb(NamedTuple):
    """A verb of the command line: what it does, in which function."""

    about: str
    function: str  # module:function, taking the composed config


VERBS = {
    "fetch": Verb("OpenAI's dVAE, for tokenizer.path: download, check, convert", "beit_pretrain.fetch:fetch"),
    "shards": Verb("make, index, verify or show shards (make|index|verify|show)", "beit_pretrain.commands:shards"),
    "tokenize": Verb("tokens of shards, computed once for data.tokens", "beit_pretrain.tokenizing:tokenize"),
    "fit": Verb(
        "train: a tokenizer, a backbone, a classifier, a segmenter; +experiment= says", "beit_pretrain.runs:fit"
    ),
    "validate": Verb("metrics of a run on held-out images", "beit_pretrain.runs:validate"),
    "predict": Verb("class probabilities or label maps for a folder of images", "beit_pretrain.commands:predict"),
    "export": Verb("a checkpoint for the authors' code, timm, Hugging Face or ONNX", "beit_pretrain.export:export"),
    "show": Verb("pictures of what a run learned", "beit_pretrain.commands:show"),
    "bench": Verb("measure views or loader (views|loader)", "beit_pretrain.bench:bench"),
    "demo": Verb("the whole way on synthetic or your own images, with a report", "beit_pretrain.demo:demo"),
}

# Where a missing setting comes from. Said when a config is complete but for it.
HINTS = {
    "data.train": "shards of training images; make them with: python -m beit_pretrain shards make src=FOLDER out=DATA, "
    "then data.train=DATA/train",
    "tokenizer.path": "the folder of OpenAI's dVAE (encoder.pkl, decoder.pkl); get it with: "
    "python -m beit_pretrain fetch out=FOLDER; or a tokenizer of your own: fit +experiment=tokenizer, "
    "then tokenizer=dvae tokenizer.path=runs/tokenizer/checkpoints/last.ckpt",
    "init_from": "the checkpoint of a pre-training run, such as runs/base_22k/checkpoints/last.ckpt "
    "(or from_scratch=true)",
    "src": "where the images are: a folder, a tar file, or synthetic",
    "out": "where to write",
    "run": "the folder of a run, such as runs/base_22k",
    "to": "one of unilm, timm, hf, onnx",
    "action": "what to measure: bench views or bench loader",
    "task": "an experiment says it: +experiment=NAME",
}


def config_dir() -> Path:
    """The folder of configs: inside an installed package, or at the top of a checkout."""
    inside = Path(__file__).parent / "conf"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "conf"


def experiments() -> dict[str, str]:
    """Name -> first header line of every experiment."""
    files = sorted((config_dir() / "experiment").glob("*.yaml"))
    return {
        f.stem: next((s[1:].strip() for s in f.read_text().splitlines()[1:] if s.startswith("#")), "") for f in files
    }


def usage() -> str:
    """The answer to --help."""
    lines = ["usage: python -m beit_pretrain VERB [+experiment=NAME] [key=value ...]", "", "verbs:"]
    lines += [f"  {name:10} {verb.about}" for name, verb in VERBS.items()]
    lines += ["", "experiments (fit +experiment=NAME):"]
    lines += [f"  {name:20} {about}" for name, about in experiments().items()]
    lines += ["", "fit -m key=A,B ... runs every combination (a sweep); several machines: docs/cluster.md"]
    lines += ["", "VERB --help shows a verb's settings, VERB ... --cfg the composed config without running it."]
    return "\n".join(lines)


def compose_raw(verb: str, overrides: list[str]):
    """The verb's config with the user's overrides, not yet resolved. Raises UserError for what does not compose."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            return hydra_compose(verb, overrides=[readable(word) for word in overrides])
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise UserError(_explain(error, verb)) from error


def compose(verb: str, overrides: list[str]):
    """The verb's config with the user's overrides, complete and resolved, every value of its kind.

    Raises UserError, in one line, for whatever does not compose, is missing, or breaks a rule of `settings`.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from beit_pretrain.settings import check

    cfg = compose_raw(verb, overrides)
    if verb == "fit" and OmegaConf.is_missing(cfg, "task"):
        raise UserError(f"say what to train: +experiment=NAME, one of {', '.join(experiments())}")
    missing = sorted(OmegaConf.missing_keys(cfg))
    if "init_from" in missing and cfg.get("from_scratch"):
        cfg.init_from = None
        missing.remove("init_from")
    if "tokenizer.path" in missing and OmegaConf.select(cfg, "data.tokens") is not None:
        cfg.tokenizer = {"_target_": None, "path": None}  # cached tokens need none
        missing.remove("tokenizer.path")
    if missing:
        raise UserError(
            "; ".join(f"{key} is missing: {HINTS.get(key, 'set it with ' + key + '=...')}" for key in missing)
        )
    try:
        plain = cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))
    except OmegaConfBaseException as error:
        raise UserError(first_line(error)) from error
    check(plain)
    cfg = OmegaConf.create(plain)
    OmegaConf.set_struct(cfg, True)
    return cfg


def readable(word: str) -> str:
    """The setting as Hydra's grammar takes it: a path with '=', '$' or a comma is quoted."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    key, _, value = word.partition("=")
    try:
        plain = not OverridesParser.create().parse_override(word).is_sweep_override()
    except HydraException:
        plain = value[:1] in ("", "[", "{", "'", '"')  # meant as Hydra's own syntax: let it say what is wrong
    return word if plain else f"{key}={quoted(value)}"


def quoted(value: object) -> str:
    """A value as Hydra's grammar reads it back unchanged."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if not isinstance(value, (str, Path)):
        return str(value)
    escaped = str(value).replace("'", "\\'")
    return f"'{escaped}'"


def _explain(error: Exception, verb: str) -> str:
    """One line for an error of Hydra, whose own messages run over several."""
    text = str(error) if error.__cause__ is None else f"{error}\n{error.__cause__}"
    line = first_line(error)
    if override := getattr(error, "override", None):
        return f"cannot read the setting {override!r}: {line}"
    if found := re.search(r"Could not find 'experiment/([^']*)'", text):
        name = found[1]
        close = difflib.get_close_matches(name, experiments(), 1)
        guess = f"did you mean {close[0]}? " if close else ""
        return f"unknown experiment {name!r}; {guess}there are {', '.join(experiments())}"
    if "is not in struct" in text or "Could not override" in text:
        key = line.split("'")[1].split("=")[0].lstrip("+~") if "'" in line else line
        if key == "experiment":
            return "experiments are added with a plus: +experiment=NAME"
        return f"unknown key {key!r} for {verb}; {VERBS_HELP.format(verb=verb)}"
    return line


VERBS_HELP = "python -m beit_pretrain {verb} --help lists the settings"


def show_config(verb: str, overrides: list[str]) -> str:
    """The composed config as YAML, with what is missing as ???."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(compose_raw(verb, overrides))


def run(argv: list[str]) -> None:
    """Carry out one command line. Raises UserError for what the user can mend."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return
    if argv[0] == "--version":
        print(importlib.import_module("beit_pretrain").__version__)
        return
    verb, rest = argv[0], argv[1:]
    if verb not in VERBS:
        close = difflib.get_close_matches(verb, VERBS, 1)
        raise UserError(
            f"unknown verb {verb!r}; {'did you mean ' + close[0] + '? ' if close else ''}there are {', '.join(VERBS)}"
        )
    if "-h" in rest or "--help" in rest:
        print(f"{verb}: {VERBS[verb].about}\n\n{(config_dir() / (verb + '.yaml')).read_text()}")
        return
    multirun = "-m" in rest or "--multirun" in rest
    if multirun and verb != "fit":
        raise UserError(f"sweeps (-m) are for fit, not for {verb}")
    rest = [word for word in rest if word not in ("-m", "--multirun")]
    if verb in ("shards", "bench") and rest and "=" not in rest[0] and not rest[0].startswith("-"):
        rest = [f"action={rest[0]}", *rest[1:]]
    rest = ["tokenizer=none" if word == "tokenizer=null" else word for word in rest]  # a group cannot be null
    if verb == "tokenize":  # `data` is a group of configs to Hydra
        rest = [f"src={word[5:]}" if word.startswith("data=") else word for word in rest]
    if "--cfg" in rest:
        print(show_config(verb, [word for word in rest if word not in ("--cfg", "job")]))
        return
    wrong = [word for word in rest if "=" not in word and not word.startswith("~")]
    if wrong:
        raise UserError(f"settings are given as key=value, not {wrong[0]!r}")
    if multirun:
        importlib.import_module("beit_pretrain.sweep").sweep(rest)
        return
    cfg = compose(verb, rest)
    module, function = VERBS[verb].function.split(":")
    getattr(importlib.import_module(module), function)(cfg)


def main() -> int:
    """Entry point: exit code 0, 2 for what the user can mend, 130 after Ctrl-C."""
    try:
        run(sys.argv[1:])
    except UserError as error:
        if not isinstance(error, SharedError) or rank() == 0:
            print(f"error: {speaker()}{error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except OSError as error:  # a folder that cannot be written, a full disk, a file where a folder should be
        if isinstance(error, BrokenPipeError):  # the reader of a pipe, `head` say, has had enough
            return 0
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
