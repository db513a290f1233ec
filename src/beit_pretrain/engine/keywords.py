"""Settings of `fit` as Python keyword arguments: data_train= is data.train, and values arrive as they are."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from beit_pretrain.config import (
    MOVED_KEYS,
    choose,
    compose_raw,
    experiments,
    model_of,
    needs_logger,
    unknown_name,
    validated,
)
from beit_pretrain.errors import UserError
from beit_pretrain.overrides import check_words, escaped, literal, quoted
from beit_pretrain.settings import Settings, field_of, group_of, to_dict, unknown

GROUPS = ("logger", "tokenizer")  # files of conf/: a text, None or a list of texts chooses from them


def fit_settings(experiment: str, overrides: Sequence[str], named: Mapping[str, Any]) -> Any:
    """The validated settings of a training: an experiment, then words of the command line, then `named` ones.

    Raises UserError, with one line, as the command line does.
    """
    if not isinstance(experiment, str):
        raise UserError(choose())
    if experiment not in (known := experiments()):
        raise UserError(unknown_name("experiment", experiment, known))
    if not isinstance(overrides or (), Sequence):
        raise UserError(f"overrides are a list of texts such as 'optim.lr=1e-3', not {overrides!r}")
    words = [overrides] if isinstance(overrides, str) else list(overrides or ())
    if other := [word for word in words if not isinstance(word, str)]:
        raise UserError(f"overrides are texts such as 'optim.lr=1e-3', not {other[0]!r}")
    check_words(words)
    words = [f"+experiment={experiment}", *words]
    values = current(named)
    for group in GROUPS:
        if group in values and not isinstance(values[group], Mapping | Settings):
            words.append(f"{group}={choice(values.pop(group))}")
    raw = compose_raw("fit", words)
    place(raw, model_of("fit", raw.get("task")), values)
    return validated(raw, "fit")


def current(named: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords, of settings that were moved with their new names. Raises UserError for one that is given twice."""
    moved = MOVED_KEYS | {old.replace(".", "_"): new for old, new in MOVED_KEYS.items()}
    values: dict[str, Any] = {}
    for name, value in named.items():
        if (new := moved.get(name, name)) in values:
            raise UserError(f"{new} is given twice")
        values[new] = value
    return values


def choice(value: Any) -> str:
    """The choice of files of a group, in Hydra's grammar."""
    if isinstance(value, list | tuple):
        return f"[{','.join(map(choice, value))}]"
    return literal(value) if isinstance(value, str) else quoted(value)


def place(raw: Any, model: type[Settings], named: Mapping[str, Any]) -> None:
    """Set `named` settings in a composed config.

    Raises UserError for unknown names, values of other types, and settings of a logger that was not chosen.
    """
    from omegaconf import OmegaConf

    seen: set[str] = set()
    for name, value in named.items():
        full = full_name(name, model)
        kind = ".".join(full.split(".")[:2])
        if kind.startswith("logger.") and group_at(model, kind) and OmegaConf.select(raw, kind) is None:
            raise UserError(needs_logger(full))  # else a mere setting would switch its logger on
        for key, single in flat(full, value, model):
            if key in seen:
                raise UserError(f"{key} is given twice")
            seen.add(key)
            OmegaConf.update(raw, key, plain(single, key), merge=False, force_add=True)


def full_name(name: str, model: type[Settings]) -> str:
    """The setting that a keyword means: data.train for data_train; names with a dot are left as they are.

    Raises UserError, with the closest name, if there is none, and if it may mean several.
    """
    known = names_of(model)
    if "." in name or name in known:
        return name
    found = [key for key in known if key.replace(".", "_") == name]
    # Groups whose name it begins with, the longest last; some, such as `trainer`, take settings that are not listed.
    groups = sorted((k for k in known if name.startswith(f"{k.replace('.', '_')}_") and group_at(model, k)), key=len)
    guess = f"{groups[-1]}.{name[len(groups[-1]) + 1 :]}" if groups else name
    if not found and groups and group_at(model, groups[-1]).model_config.get("extra") == "allow":
        found = [guess]
    if len(found) > 1:
        raise UserError(f"{name} may mean {' or '.join(found)}: write **{{{found[0]!r}: ...}}")
    if not found:
        raise UserError(unknown(guess, known, "fit"))
    return found[0]


def names_of(model: type[Settings], prefix: str = "") -> list[str]:
    """The names of all settings and groups of a model, such as data and data.train."""
    names = []
    for name, field in model.model_fields.items():
        names.append(key := prefix + (field.alias or name))
        if group := group_of(field.annotation):
            names += names_of(group, f"{key}.")
    return names


def group_at(model: type[Settings], key: str) -> Any:
    """The settings class of the group `key`; None if it is no group."""
    field = field_of(model, key)
    return group_of(field.annotation) if field else None


def flat(key: str, value: Any, model: type[Settings]) -> Iterator[tuple[str, Any]]:
    """The single settings in a value: a dictionary for a group gives several."""
    value = to_dict(value) if isinstance(value, Settings) else value
    if isinstance(value, Mapping) and (group_at(model, key) or not field_of(model, key)):
        for name, inner in value.items():
            yield from flat(f"{key}.{name}", inner, model)
    else:
        yield key, value


def plain(value: Any, name: str) -> Any:
    """A value for a config of OmegaConf, in which texts are literal. Raises UserError for other types."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str):
        return escaped(str(value))
    if hasattr(value, "tolist"):  # NumPy, torch
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [plain(item, name) for item in value]
    if isinstance(value, Mapping):
        return {str(key): plain(item, name) for key, item in value.items()}
    if value is None or isinstance(value, bool | int | float):
        return value
    raise UserError(f"{name} takes None, a number, a text, a path or a list of them, not {type(value).__name__}")
