"""Base class, shared types and error messages of settings, which are pydantic models.

Types, ranges and descriptions are in the models; default values are only in the YAML files of `conf/`. A model names
its file in `defaults`, so Python callers get the same defaults: `OptimSettings(lr=1e-3)`.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Mapping
from functools import cache, reduce
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, Union, get_args, get_origin

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo

from beit_pretrain.errors import UserError
from beit_pretrain.fileio import expanded

# Settings of version 0.0 -> new names.
RENAMED = {
    "ahead": "device_prefetch",
    "data.exact": "data.pil_reference",
    "data.max_bad": "data.max_corrupt_fraction",
    "data.per_class": "data.labels_per_class",
    "data.streams": "data.shuffle_streams",
    "data.window": "data.shuffle_block_size",
    "data.workers": "data.num_workers",
    "exact": "pil_reference",
    "global_batch": "global_batch_size",
    "max_skipped": "max_nonfinite_steps",
    "per_class": "labels_per_class",
    "pictures": "num_visualizations",
    "recipe.global_batch": "recipe.global_batch_size",
    "workers": "num_workers",
}
# Classes in settings of version 0.0 -> new paths.
MOVED = {
    "beit_pretrain.training.dvae.DVAETokenizer": "beit_pretrain.tokenizers.dvae.DVAETokenizer",
    "beit_pretrain.tokens.shuffled.ShuffledTokenizer": "beit_pretrain.tokenizers.shuffled.ShuffledTokenizer",
    "beit_pretrain.tokens.tokenizer.OpenAITokenizer": "beit_pretrain.tokenizers.tokenizer.OpenAITokenizer",
}
LARGEST = 2**63  # integers of numpy and torch must be smaller
BOUNDS = {"gt": "above", "ge": "of at least", "le": "at most", "lt": "below"}  # pydantic's names, in error messages


class Rule(str):
    """A description of valid values, for error messages, where the type alone does not give one."""


def config_dir() -> Path:
    """The folder `conf`: inside an installed package, or at the top of a checkout."""
    inside = Path(__file__).parent / "conf"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "conf"


def about(text: str, may_change: bool = False) -> Any:
    """A setting with its description. `may_change`: it may change on resume, since it does not change the result."""
    return Field(description=text, json_schema_extra={"may_change": True} if may_change else None)


class Settings(BaseModel):
    """A group of settings. Raises pydantic's ValidationError; `validated` raises a one-line UserError instead."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)
    defaults: ClassVar[str] = ""  # files of the defaults, separated by spaces: "fit.yaml" or "fit.yaml:optim"
    positional: ClassVar[tuple[str, ...]] = ()  # settings that Python callers may pass as positional arguments

    def __init__(self, *values: Any, **named: Any):
        if len(values) > len(self.positional):
            most = len(self.positional)
            raise TypeError(f"{type(self).__name__} takes at most {most} positional arguments, got {len(values)}")
        super().__init__(**dict(zip(self.positional, values, strict=False)), **named)

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        filled: dict[str, Any] = reduce(merged, map(yaml_defaults, cls.defaults.split()), {})
        keys = {key for name, field in cls.model_fields.items() for key in (name, field.alias)}
        return merged({key: value for key, value in filled.items() if key in keys}, given)

    @classmethod
    def validated(cls, given: Mapping[str, Any]) -> Self:
        """Validate the settings. Raises UserError, with one line, for the first wrong, missing or unknown setting."""
        if not isinstance(given, Mapping):
            raise TypeError(f"settings of {cls.__name__} are a dictionary, not {given!r}")
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            raise UserError(explain(error, cls, given)) from None


def merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Merge nested settings; `other` takes precedence."""
    result = dict(one)
    for key, value in other.items():
        mine = result.get(key)
        result[key] = merged(mine, value) if isinstance(mine, Mapping) and isinstance(value, Mapping) else value
    return result


@cache
def yaml_defaults(place: str) -> dict[str, Any]:
    """The defaults in "FILE.yaml", or in a group of it, "FILE.yaml:GROUP"; without missing and interpolated values."""
    file, _, group = place.partition(":")
    content = yaml.safe_load((config_dir() / file).read_text())
    return known(content[group] if group else content)


def known(content: dict[str, Any]) -> dict[str, Any]:
    return {
        key: known(value) if isinstance(value, dict) else value
        for key, value in content.items()
        if key != "defaults" and not (isinstance(value, str) and ("???" in value or "${" in value))
    }


def to_dict(settings: Any) -> dict[str, Any]:
    """Settings as a plain dictionary, without unset optional ones."""
    return settings.model_dump(by_alias=True, exclude_unset=True)


def renamed(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings of an earlier version, with their new names."""
    result: dict[str, Any] = {}
    for key, value in settings.items():
        new = RENAMED.get(f"{prefix}{key}", f"{prefix}{key}").rpartition(".")[2]
        if isinstance(value, dict):
            result[new] = renamed(value, f"{prefix}{key}.")
        else:
            result[new] = MOVED.get(value, value) if isinstance(value, str) else value
    return result


# --- types that settings share -----------------------------------------------------------------------------------


def _is_rising(pair: list[float]) -> list[float]:
    if pair[0] > pair[1]:
        raise ValueError("falls")
    return pair


def _is_ascending(pair: list[float]) -> list[float]:
    if pair[0] >= pair[1]:
        raise ValueError("does not rise")
    return pair


def _as_text(value: Any) -> Any:
    """Convert numbers and paths to text: a folder may be called 2024."""
    return str(value) if type(value) in (int, float) or isinstance(value, Path) else value


def _as_path(value: Any) -> Any:
    """`_as_text`, with the home folder in place of a leading `~`. Raises UserError for an unknown user."""
    text = _as_text(value)
    return expanded(text) if isinstance(text, str) else text


Count = Annotated[int, Strict(), Field(ge=1, lt=LARGEST)]
Whole = Annotated[int, Strict(), Field(ge=0, lt=LARGEST)]
Seed = Annotated[int, Strict(), Field(ge=0, le=2**32 - 1)]
Side = Annotated[int, Strict(), Field(ge=1, le=2**16 - 1)]
Number = Annotated[float, Strict(), Field(allow_inf_nan=False)]
NonNegative = Annotated[float, Strict(), Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Strict(), Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Strict(), Field(ge=0, le=1)]
ShareAboveZero = Annotated[float, Strict(), Field(gt=0, le=1)]
BelowOne = Annotated[float, Strict(), Field(ge=0, lt=1)]
Seconds = Annotated[float, Strict(), Field(gt=0, le=86_400)]
Gigabytes = Annotated[float, Strict(), Field(gt=0, le=1e9)]
Switch = Annotated[bool, Strict()]
Text = Annotated[str, Strict(), Field(min_length=1)]
Name = Annotated[str, BeforeValidator(_as_text), Strict(), Field(min_length=1)]
# A file, a folder or a remote location; `Paths`: one or several.
PathStr = Annotated[str, BeforeValidator(_as_path), Strict(), Field(min_length=1)]
Paths = Annotated[PathStr | Annotated[list[PathStr], Field(min_length=1)], Rule("a path, or a list of paths")]
Scale = Annotated[
    list[ShareAboveZero],
    Field(min_length=2, max_length=2),
    AfterValidator(_is_rising),
    Rule("a list of 2, each a number above 0 and at most 1, the second not below the first"),
]
Range = Annotated[
    list[Positive],
    Field(min_length=2, max_length=2),
    AfterValidator(_is_rising),
    Rule("a list of 2, each a number above 0, the second not below the first"),
]
Window = Annotated[
    list[Number],
    Field(min_length=2, max_length=2),
    AfterValidator(_is_ascending),
    Rule("a list of 2, each a number, the second above the first"),
]
Channels = Annotated[Literal[1, 3, 4], Rule("1, 3 or 4")]
Jitter = Annotated[
    Annotated[list[NonNegative], Field(min_length=3, max_length=3)] | None,
    AfterValidator(lambda v: v or [0.0, 0.0, 0.0]),
]
Pool = Literal["cls_avg", "avg", "cls"]


# --- errors in one line ------------------------------------------------------------------------------------------


def explain(error: ValidationError, model: type[Settings], given: Mapping[str, Any]) -> str:
    """The first error of a validation, as one line."""
    errors = error.errors()
    first = next((each for each in errors if each["type"] == "extra_forbidden"), errors[0])  # may be a renamed one
    path: list[str] = []
    place: Any = given
    for part in first["loc"]:
        fields = {field.alias or name: field for name, field in model.model_fields.items()}
        if part not in fields:
            return unknown(".".join([*path, str(part)]), [".".join([*path, name]) for name in fields])
        path.append(part)
        place, field = place.get(part), fields[part]
        inner = group_of(field.annotation)
        if inner is None or not isinstance(place, Mapping):  # the rest of `loc` is inside a value
            break
        model = inner
    key = ".".join(path)
    if first["type"] == "missing":
        return f"{key} is missing: set it with {key}=..."
    if (group := group_of(field.annotation)) and place is not None:
        return f"{key} is a group of settings: give them one by one, such as {key}.{next(iter(group.model_fields))}=..."
    text = rule(field.annotation, field.metadata)
    if type(place) is int and place >= LARGEST and "at most" not in text:
        text += " and below 2^63"
    return f"{key} must be {text}, got {'null' if place is None else repr(place)}"


def unknown(key: str, keys: list[str], verb: str = "", otherwise: str = "") -> str:
    """The message for an unknown setting: with its new name, the most similar known name, or `otherwise`."""
    group, _, name = key.rpartition(".")
    new = next((new.rpartition(".")[2] for old, new in RENAMED.items() if old.rpartition(".")[2] == name), None)
    if names := [known for known in keys if new and known.rpartition(".")[2] == new]:
        return f"{key} was renamed to {f'{group}.{new}' if f'{group}.{new}' in names else names[0]}"
    close = difflib.get_close_matches(key, keys, 1, cutoff=0.8)
    if not close:  # compare without the group
        leaves = {known.rpartition(".")[2]: known for known in reversed(keys)}
        close = [leaves[leaf] for leaf in difflib.get_close_matches(name, leaves, 1, cutoff=0.7)]
    hint = f"did you mean {close[0]}?" if close else otherwise
    return f"unknown key {key!r}{f' for {verb}' if verb else ''}" + (f"; {hint}" if hint else "")


def group_of(annotation: Any) -> type[Settings] | None:
    """The settings class of a field that is a group (or an optional group); None for other fields."""
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, Settings):
            return kind
    return None


def field_of(model: type[Settings], key: str) -> FieldInfo | None:
    """The field of a setting, such as data.train; None if there is none."""
    first, _, rest = key.partition(".")
    field = next((field for name, field in model.model_fields.items() if first in (field.alias, name)), None)
    if not rest or field is None:
        return field
    group = group_of(field.annotation)
    return field_of(group, rest) if group else None


def description(model: type[Settings], key: str) -> str | None:
    """The description of a setting; None if there is none."""
    field = field_of(model, key)
    return field.description if field else None


def forms(annotation: Any, metadata: list[Any] | tuple[Any, ...] = ()) -> set[str]:
    """What the values of a type are: "text", "texts" (a list), "path" (these are paths), "null", "other"."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return forms(arguments[0], [*arguments[1:], *metadata])
    if origin in (Union, types.UnionType):
        return set().union(*(forms(kind) for kind in arguments))
    if origin is list and "text" in (inner := forms(arguments[0])):
        return {"texts"} | inner - {"text"}
    if annotation is str:
        path = any(getattr(item, "func", None) is _as_path for item in metadata)
        return {"text", "path"} if path else {"text"}
    return {"null" if annotation is types.NoneType else "other"}


def rule(annotation: Any, metadata: list[Any] | tuple[Any, ...] = ()) -> str:
    """A description of the valid values of a type, such as `a whole number of at least 1`."""
    if own := next((item for item in metadata if isinstance(item, Rule)), None):
        return str(own)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return rule(arguments[0], [*arguments[1:], *metadata])
    if origin in (Union, types.UnionType):
        rest = [kind for kind in arguments if kind is not type(None)]
        words = " or ".join(rule(kind, metadata if len(rest) == 1 else ()) for kind in rest)
        return f"null or {words}" if len(rest) < len(arguments) else words
    if origin is Literal:
        return "one of " + ", ".join({None: "null", True: "true", False: "false"}.get(v, v) for v in arguments)
    limits = {name: limit for name, limit in bounds(metadata).items() if limit != LARGEST}
    if annotation is bool:
        return "true or false"
    if annotation in (int, float):
        kind, form = ("a number", "g") if annotation is float else ("a whole number", "d")
        said = [f"{word} {limits[name]:{form}}" for name, word in BOUNDS.items() if name in limits]
        return f"{kind} {' and '.join(said)}".rstrip()
    if origin is list:
        count = f" of {limits['max_length']}" if "max_length" in limits else ""
        return f"a list{count}, each {rule(arguments[0])}"
    if group_of(annotation):
        return "a group of settings"
    return "a text"


def bounds(metadata: Any) -> dict[str, Any]:
    """Limits of a type, such as {"ge": 1, "lt": LARGEST}; pydantic's FieldInfo holds further metadata."""
    items = [inner for item in metadata for inner in (getattr(item, "metadata", None) or [item])]
    return {name: getattr(item, name) for item in items for name in (*BOUNDS, "max_length") if hasattr(item, name)}


def help_text(model: type[Settings], values: Mapping[str, Any], prefix: str = "") -> str:
    """All settings of a model with defaults and descriptions, groups last, for `--help`."""
    lines, groups = [], []
    declared = [name for kind in model.__mro__ for name in getattr(kind, "__annotations__", ())]
    for name in dict.fromkeys(name for name in declared if name in model.model_fields):  # its own come first
        field = model.model_fields[name]
        key = prefix + (field.alias or name)
        value = values.get(field.alias or name, "???" if field.is_required() else field.default)
        inner = group_of(field.annotation)
        if inner is not None and isinstance(value, Mapping):
            text = field.description or (inner.__doc__ or "").splitlines()[0]
            groups += [f"\n{key}: {text}", help_text(inner, value, f"{key}.")]
        else:
            lines.append(f"  {f'{key}={shown(value)}':38} {field.description or ''}".rstrip())
    return "\n".join([*lines, *groups])


def shown(value: Any) -> str:
    """A value in the syntax of the command line."""
    if isinstance(value, Mapping | list) or value is None or isinstance(value, bool):
        return yaml.safe_dump(value, default_flow_style=True, width=10_000).split("\n")[0].replace(", ", ",")
    return str(value)
