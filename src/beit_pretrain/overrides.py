"""Words of the command line, key=value, in Hydra's grammar: texts and paths are read as they are typed."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from beit_pretrain.errors import UserError
from beit_pretrain.settings import Settings, field_of, forms

# An item of a list: in quotes, or all up to the next comma that is neither escaped nor in an interpolation.
QUOTED = r"""(?:'(?:\\'|[^'])*'|"(?:\\"|[^"])*")(?=\s*(?:,|\Z))"""
ITEM = re.compile(rf"\s*({QUOTED}|(?:\\.|\$\{{[^}}]*\}}|[^,])*)\s*(,|\Z)")


def key_of(word: str) -> str:
    """The key of a word such as +experiment=base_1k, without Hydra's + and ~."""
    return word.partition("=")[0].lstrip("+~")


def check_words(words: Sequence[str], sweep: bool = False) -> None:
    """Raise UserError for a word that is no setting, or one of sweeps without a `sweep`."""
    wrong = [word for word in words if word.startswith("=") or ("=" not in word and not word.startswith("~"))]
    if wrong:
        raise UserError(f"settings are given as key=value, not {wrong[0]!r}")
    own = [word for word in words if key_of(word).startswith(("sweep.", "hydra.", "hydra/"))]
    if own and not sweep:
        raise UserError(f"{own[0]} is for sweeps: fit -m ...")


def readable(word: str, model: type[Settings] | None = None) -> str:
    """The setting in Hydra's grammar: quotes values that it would not read as they are, such as paths with commas.

    `model`: the settings of the verb. Their texts are then never numbers or switches, also in lists, and a path that
    exists under exactly the given name is always that path: [1], null, a${b}.
    """
    key, equals, value = word.partition("=")
    field = field_of(model, key_of(word)) if model else None
    form = forms(field.annotation, field.metadata) if field else {"other"}
    if not equals or word.startswith("~"):  # Hydra's ~key=value removes a setting
        return word
    if "path" in form and names_a_file(value) and not (value == "null" and "null" in form):
        return f"{key}={literal(value)}"
    kind, found = parsed(value)
    nested = isinstance(found, list) and any(isinstance(item, list | dict) for item in found)  # wrong: it is refused
    if nested and "path" in form:  # but [r] may be the name of a folder
        nested = not any(names_a_file(item.strip()) for item in value[1:-1].split(","))
    if "texts" in form and value[:1] == "[" and value[-1:] == "]" and not nested:
        items = quoted_items(value[1:-1], "path" in form)
        return f"{key}=[{','.join(items)}]" if items else word
    if kind == "wrong" and "text" not in form and value[:1] in ("", "[", "{", "'", '"'):
        return word  # probably meant as Hydra's syntax: let Hydra report the error
    if kind in ("sweep", "wrong") or ("text" in form and isinstance(found, bool | int | float)):
        return f"{key}={quoted(value)}"
    return word


def parsed(value: str) -> tuple[str, Any]:
    """What Hydra reads: "text", "other" (a number, list, ...), "sweep" or "wrong" (an error), and the value."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        override = OverridesParser.create().parse_override(f"key={value}")
    except HydraException:
        return "wrong", None
    if override.is_sweep_override():
        return "sweep", None
    found = override.value()
    return ("text" if isinstance(found, str) else "other"), found


def quoted_items(text: str, paths: bool) -> list[str]:
    """The items of a list of texts, such as "a=1,two words", in Hydra's grammar; empty if one of them is empty."""
    items, at, more = [], 0, ","
    while more:
        found = ITEM.match(text, at)
        if not found or not (item := found[1].rstrip()):
            return []
        kind, value = parsed(item)
        exists = paths and names_a_file(item)
        items.append(literal(item) if exists else quoted(value if kind == "text" else item))
        at, more = found.end(), found[2]
    return items


def names_a_file(value: str) -> bool:
    """Whether there is a file or folder of exactly this name."""
    try:
        return os.path.lexists(os.path.expanduser(value))
    except ValueError:  # a zero byte
        return False


def literal(value: str) -> str:
    """`quoted`, for a text in which ${ is no interpolation."""
    return quoted(escaped(value))


def escaped(text: str) -> str:
    """A text in which OmegaConf sees no interpolation."""
    return re.sub(r"(\\*)\$\{", lambda found: 2 * found[1] + r"\${", text)


def quoted(value: object) -> str:
    """A value quoted so that Hydra's grammar reads it back unchanged."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if not isinstance(value, (str, Path)):
        return str(value)
    # Inside quotes, backslashes are doubled only directly before a quote (also the closing one).
    text = re.sub(r"(\\*)('|\Z)", lambda found: 2 * found[1] + ("\\'" if found[2] else ""), str(value))
    return f"'{text}'"
