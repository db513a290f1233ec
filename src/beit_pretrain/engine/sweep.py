"""Sweeps: `fit -m optim.lr=1e-3,2e-3 seed=1,2,3` runs every combination, each in a separate process and folder.

The syntax of swept values is Hydra's: comma-separated lists, choice(), range(), glob(). A run's folder is named after
its swept values. Rerun the same command to resume a sweep: it skips finished runs and resumes the others.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

from beit_pretrain import fileio
from beit_pretrain.config import compose
from beit_pretrain.engine.dist_env import launched
from beit_pretrain.engine.metrics import last_metrics
from beit_pretrain.engine.run_folder import CONFIG, FINISHED, differences, read_config, resume_config
from beit_pretrain.engine.sweep_launchers import launcher, run_all
from beit_pretrain.errors import UserError, first_line
from beit_pretrain.overrides import key_of, quoted
from beit_pretrain.settings import config_dir, to_dict
from beit_pretrain.tables import table, write_csv

LOG = "log.txt"  # output of a run
LONGEST_NAME = 120
COLUMNS = 8  # of the printed table
FIRST = ("val/loss", "val/accuracy", "val/masked_token_accuracy", "val/knn_accuracy")  # first metrics of the table


class SweepRun(NamedTuple):
    """One run of a sweep."""

    name: str  # its swept values, such as lr_0.001_seed_1
    folder: Path
    swept: dict[str, str]  # swept key -> value
    words: list[str]  # command-line settings for `fit`


def sweep(words: list[str]) -> None:
    """Run a sweep, then print and write its summary. Exits with code 1 if any run failed."""
    if launched():
        raise UserError("a sweep starts its own processes: call fit -m once, not under torchrun or srun")
    own, launcher_words, settings = sort_words(words)
    jobs = compose("sweep", own).jobs
    folder, members = members_of(settings)
    folder.mkdir(parents=True, exist_ok=True)
    with fileio.exclusive_lock(folder / ".sweep.lock", f"another sweep is running in {folder}"):
        waiting = [member for member in members if not is_finished(member)]
        finished = len(members) - len(waiting)
        already = f"; {finished} finished already" if finished else ""
        print(f"sweep of {len(members)} runs in {folder}{already}", flush=True)
        start, at_once = launcher(launcher_words, folder, jobs, [(m.words, m.folder / LOG) for m in waiting])
        outcomes = run_all([m.name for m in waiting], start, at_once)
    codes = {member.name: code for member, code in zip(waiting, outcomes, strict=True) if code}
    header, rows = summary(members, codes)
    write_csv(folder / "sweep.csv", header, rows)
    print(overview(header, rows) + f"\nwrote {folder / 'sweep.csv'}", flush=True)
    if codes:
        print(f"error: {len(codes)} of {len(members)} runs failed:", file=sys.stderr)
        for name, code in codes.items():
            print(f"  {name}: exit code {code}: {last_words(folder / name / LOG)}", file=sys.stderr)
        print("rerun the same command to run only these again", file=sys.stderr)
        raise SystemExit(1)


def sort_words(words: list[str]) -> tuple[list[str], list[str], list[str]]:
    """Sort the words of the command line into settings of the sweep, of its launcher and of its runs."""
    own, launcher_words, settings = [], [], []
    for word in words:
        key = key_of(word)
        if key.startswith("sweep."):
            own.append(word.lstrip("+").removeprefix("sweep."))
        elif key == "hydra/launcher" or key.startswith("hydra.launcher."):
            launcher_words.append(word.lstrip("+"))
        elif key.startswith(("hydra.", "hydra/")):
            raise UserError(f"{word}: the only Hydra settings of a sweep are hydra/launcher and hydra.launcher.*")
        else:
            settings.append(word)
    return own, launcher_words, settings


def members_of(words: list[str]) -> tuple[Path, list[SweepRun]]:
    """The folder of a sweep, and its runs. Raises UserError if nothing is swept, or no run's config composes."""
    combinations = combine(words)
    if len(combinations) < 2:
        raise UserError("there is nothing to sweep: give a setting several values, such as seed=1,2,3")
    base = first_that_composes([settings for _, settings in combinations])
    swept_keys = {key for swept, _ in combinations for key in swept}
    if {"name", "run_dir"} & swept_keys:
        raise UserError("name and run_dir belong to the whole sweep; each run gets a separate folder in it")
    keys = {key_of(word) for word in words}
    name, folder = str(base.name), Path(base.run_dir)
    if "experiment" in {key_of(key) for key in swept_keys} and not keys & {"name", "run_dir"}:
        name, folder = "sweep", folder.parent / "sweep"  # each experiment sets a different name
    members = []
    for swept, settings in combinations:
        short = describe(swept)
        kept = [word for word in settings if key_of(word) not in ("name", "run_dir")]
        own = [f"name={quoted(f'{name}/{short}')}", f"run_dir={quoted(folder / short)}"]
        members.append(SweepRun(short, folder / short, swept, [*kept, *own]))
    if len({member.folder for member in members}) < len(members):
        raise UserError("two runs of the sweep have the same values")
    return folder, members


def combine(words: list[str]) -> list[tuple[dict[str, str], list[str]]]:
    """({swept key: value}, command-line settings) of each combination; the last swept key changes fastest."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    choices: dict[str, list[str]] = {}
    swept: set[str] = set()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        for word in words:
            try:
                (override,) = parser.parse_overrides([word])
            except HydraException:  # a path, or wrong syntax, which the run itself reports
                choices[word.partition("=")[0]] = [word]
                continue
            key = override.get_key_element()
            swept.discard(key)
            choices.pop(key, None)  # a repeated key: the last value counts
            if not override.is_sweep_override():
                choices[key] = [word]
            elif override.is_discrete_sweep():
                choices[key] = list(dict.fromkeys(f"{key}={value}" for value in override.sweep_string_iterator()))
                swept.add(key)
            else:
                raise UserError(f"{word} has no end of values: give a list, choice(), range() or glob()")
            if not choices[key]:
                raise UserError(f"{word} has no value")
    combinations = []
    for settings in itertools.product(*choices.values()):
        values = {key: word.partition("=")[2] for key, word in zip(choices, settings, strict=True) if key in swept}
        combinations.append((values, list(settings)))
    return combinations


def first_that_composes(candidates: list[list[str]]) -> Any:
    """The config of the first candidate that composes; the runs themselves report their errors.

    Raises the first candidate's UserError if none composes.
    """
    first: UserError | None = None
    for settings in candidates:
        try:
            return compose("fit", settings)
        except UserError as error:
            first = first or error
    assert first is not None
    raise first


def describe(swept: dict[str, str]) -> str:
    """Folder name from the swept values, such as lr_0.001_seed_1; equal values always give the same name."""
    keys = [key_of(key) for key in swept]
    last = [re.split(r"[./@]", key)[-1] for key in keys]
    keys = [short if last.count(short) == 1 else key for short, key in zip(last, keys, strict=True)]
    name = "_".join(f"{plain_text(key)}_{plain_text(value)}" for key, value in zip(keys, swept.values(), strict=True))
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 9]}-{short_hash(name)}"


def plain_text(value: str) -> str:
    """A value in characters that are safe in paths and settings, with a short hash if that changes it."""
    text = value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"" else value
    text = text.lower() if text in ("True", "False") else text  # as on the command line
    if re.fullmatch(r"[A-Za-z0-9_.+-]{1,40}", text) and text.strip("."):
        return text
    kept = re.sub(r"[^A-Za-z0-9.+-]+", "-", text).strip("-.")[-40:]
    return f"{kept}-{short_hash(text)}".lstrip("-")


def short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def is_finished(member: SweepRun) -> bool:
    """Whether a run has done all its steps with the same settings."""
    if not (member.folder / FINISHED).is_file():
        return False
    try:
        cfg, old = compose("fit", member.words), read_config(member.folder / CONFIG)
    except UserError:  # the run itself reports it
        return False
    kind = type(cfg)
    return cfg.resume != "never" and not differences(resume_config(old, kind), resume_config(to_dict(cfg), kind))


def last_words(log: Path) -> str:
    """The last error line in a run's log, or else its last line."""
    try:
        text = log.read_bytes()[-20_000:].decode(errors="replace")
    except OSError as error:
        return first_line(error)
    lines = [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]
    errors = [line for line in lines if line.startswith("error:")]
    return (errors or lines or ["it printed nothing"])[-1]


def summary(members: list[SweepRun], codes: dict[str, int]) -> tuple[tuple[str, ...], list[tuple]]:
    """Header and rows: name, state, swept values, step, last metrics; best run first, failed runs last."""
    last = {member.name: last_metrics(member.folder / "metrics.csv") for member in members}
    metrics = sorted({name for values in last.values() for name in values if name.startswith("val/")})
    if not metrics and any("train/loss" in values for values in last.values()):
        metrics = ["train/loss"]
    key = "val/accuracy" if "val/accuracy" in metrics else "val/loss" if "val/loss" in metrics else "train/loss"
    metrics.sort(key=lambda name: (name != key, name not in FIRST, name))
    sign = -1 if key == "val/accuracy" else 1

    def place(member: SweepRun) -> tuple:
        value = last[member.name].get(key)
        return member.name in codes, value is None, sign * (value or 0.0), member.name

    keys = list(members[0].swept)
    rows = []
    for member in sorted(members, key=place):
        state = f"failed ({codes[member.name]})" if member.name in codes else "finished"
        values = last[member.name]
        figures = [values.get(name, "") for name in ("step", *metrics)]
        rows.append((member.name, state, *(member.swept[k] for k in keys), *figures))
    return ("run", "state", *(k.lstrip("+") for k in keys), "step", *metrics), rows


def overview(header: tuple[str, ...], rows: list[tuple]) -> str:
    """The summary as text, without swept values (they are in the names) and with at most `COLUMNS` columns."""
    at = header.index("step")
    kept = [0, 1, *range(at, min(len(header), at + COLUMNS - 2))]
    cells = [[f"{row[i]:.5g}" if isinstance(row[i], float) else str(row[i]) for i in kept] for row in rows]
    return table([header[i] for i in kept], cells)
