"""The command line: `python -m beit_pretrain VERB [+experiment=NAME] [key=value ...]`.

Composes the verb's Hydra config and calls the verb's function with it. Heavy modules are imported only when needed, so
--help is fast. User errors print one line and exit with code 2, without a traceback.
"""

from __future__ import annotations

import importlib
import sys
from contextlib import nullcontext
from itertools import pairwise
from typing import NamedTuple

from beit_pretrain.config import compose, experiments, help_of, show_config, unknown_name
from beit_pretrain.engine.dist_env import local_rank, rank, speaker
from beit_pretrain.engine.preemption import early_signals
from beit_pretrain.errors import AllRanksError, UserError
from beit_pretrain.overrides import check_words, key_of
from beit_pretrain.processes import print_any_name


class Verb(NamedTuple):
    """A verb of the command line: its description and its function."""

    about: str
    function: str  # "module:function" of this package; takes the composed config


VERBS = {
    "download": Verb("download, check and convert OpenAI's dVAE, for tokenizer.path", "tokenizers.download:download"),
    "shards": Verb("make, index, verify or show shards (make|index|verify|show)", "data.write.shards:shards"),
    "tokenize": Verb("compute the tokens of shards once, for data.tokens", "tokenizers.tokenize:tokenize"),
    "fit": Verb("train a tokenizer, backbone, classifier or segmenter (+experiment=NAME)", "engine.fit:fit"),
    "probe": Verb("linear probes and kNN on the frozen features of every layer", "evaluation.probe_layers:probe"),
    "validate": Verb("metrics of a run on held-out images", "engine.fit:validate"),
    "predict": Verb("class probabilities or label maps of images", "inference.predict:predict"),
    "embed": Verb("vectors of images without labels, nearest images, patch features", "inference.embed:embed"),
    "export": Verb(
        "a checkpoint for the authors' code, timm, Hugging Face or ONNX", "models.checkpoints.export:export"
    ),
    "visualize": Verb("draw pictures of runs (masked|attention|tokens|curves|layers)", "engine.visualize:visualize"),
    "bench": Verb("measure (views|loader|step|loop|attention|memory|all|gpu|page)", "benchmarks.verb:bench"),
    "compare": Verb(
        "the effect of pre-training: pre-trained, from scratch and a control, over seeds", "examples.compare:compare"
    ),
    "demo": Verb("all stages on synthetic or your images, with a report", "examples.demo:demo"),
}

RENAMED_VERBS = {"fetch": "download", "show": "visualize"}
# Verbs with a first word without "=": the setting that it stands for.
WORDS = {"shards": "action", "bench": "action", "visualize": "what"}


def usage() -> str:
    """The answer to --help."""
    lines = ["usage: python -m beit_pretrain VERB [+experiment=NAME] [key=value ...]", "", "verbs:"]
    lines += [f"  {name:10} {verb.about}" for name, verb in VERBS.items()]
    lines += ["", "experiments (fit +experiment=NAME):"]
    lines += [f"  {name:20} {about}" for name, about in experiments().items()]
    lines += ["", "fit -m key=A,B ... runs every combination (a sweep); several machines: docs/cluster.md"]
    lines += ["", "VERB --help shows a verb's settings, VERB ... --cfg the composed config without running it."]
    return "\n".join(lines)


# Actions of `bench` that take the settings of `fit`, but need none of SPARED: they make images and a tokenizer.
TRAINED = {
    **dict.fromkeys(("step", "loop", "attention", "memory", "all"), "bench_step"),
    **dict.fromkeys(("gpu", "page"), "bench_gpu"),
}
EXPERIMENT = "base_22k"  # default experiment of `bench gpu`
SOURCES = ("data.train", "data.val", "src")
SPARED = ("data.train", "tokenizer.path")


def config_of(verb: str, words: list[str]) -> str:
    """The name of the verb's config; that of `bench` depends on its action."""
    if verb != "bench":
        return verb
    return next((TRAINED[word[7:]] for word in words if word.startswith("action=") and word[7:] in TRAINED), verb)


def check_braces(words: list[str]) -> None:
    """Raise UserError where the shell has written out the braces of a source: only its last word would be read."""
    for first, second in pairwise(words):
        key = key_of(first)
        tars = first != second and first.endswith(".tar") and second.endswith(".tar")
        if key in SOURCES and key == key_of(second) and tars:
            raise UserError(
                f"{first} is followed by {second}, as if the shell had expanded braces; put quotes around them, such "
                f"as '{key}=x-{{0000..0099}}.tar', or give a list, {key}=[A,B]"
            )


def run(argv: list[str]) -> None:
    """Run one command line. Raises UserError."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return
    if argv[0] == "--version":
        print(importlib.import_module("beit_pretrain").__version__)
        return
    verb, rest = argv[0], argv[1:]
    if verb in RENAMED_VERBS:
        raise UserError(f"the verb {verb} was renamed to {RENAMED_VERBS[verb]}")
    if verb not in VERBS:
        raise UserError(unknown_name("verb", verb, VERBS))
    if "-h" in rest or "--help" in rest:
        words = [word for word in rest if word not in ("-h", "--help")]
        actions = [f"action={word}" for word in words[:1] if "=" not in word]
        print(f"{verb}: {VERBS[verb].about}\n\n{help_of(config_of(verb, actions), words[len(actions) :])}")
        return
    multirun = "-m" in rest or "--multirun" in rest
    if multirun and verb != "fit":
        raise UserError(f"sweeps (-m) are for fit, not for {verb}")
    rest = [word for word in rest if word not in ("-m", "--multirun")]
    if verb in WORDS and rest and "=" not in rest[0] and not rest[0].startswith("-"):
        rest = [f"{WORDS[verb]}={rest[0]}", *rest[1:]]
    if verb == "tokenize":  # for Hydra, `data` is a config group
        rest = [f"src={word[5:]}" if word.startswith("data=") else word for word in rest]
    if verb == "shards":  # for Hydra, `labels` is a group of settings
        rest = [f"labels.path={word[7:]}" if word.startswith("labels=") and word[7:8] != "{" else word for word in rest]
    config = config_of(verb, rest)
    if config == "bench_gpu" and not any(word.startswith("+experiment=") for word in rest):
        rest.append(f"+experiment={EXPERIMENT}")
    if "--cfg" in rest:
        print(show_config(config, [word for word in rest if word not in ("--cfg", "job")]))
        return
    check_words(rest, multirun)
    check_braces(rest)
    if multirun:
        importlib.import_module("beit_pretrain.engine.sweep").sweep(rest)
        return
    try:
        cfg = compose(config, rest, spared=SPARED if config in TRAINED.values() else ())
    except UserError as error:
        if local_rank():  # every machine's first process prints the same error
            raise AllRanksError(str(error)) from error
        raise
    module, function = VERBS[verb].function.split(":")
    getattr(importlib.import_module(f"beit_pretrain.{module}"), function)(cfg)


def main() -> int:
    """Entry point. Returns exit code 0, 2 for user errors, 130 after Ctrl-C; other codes raise SystemExit."""
    words = sys.argv[1:]
    print_any_name()
    try:
        with early_signals("fit") if words[:1] == ["fit"] and not {"-m", "--multirun"} & {*words} else nullcontext():
            run(words)
    except UserError as error:
        if not isinstance(error, AllRanksError) or rank() == 0:
            print(f"error: {speaker()}{error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except MemoryError:
        print("error: not enough memory; use fewer workers or smaller batches", file=sys.stderr)
        return 2
    except OSError as error:  # an unwritable folder, a full disk, a file in place of a folder
        if isinstance(error, BrokenPipeError):  # the reader of the pipe, such as `head`, has closed it
            return 0
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        return 2
    return 0
