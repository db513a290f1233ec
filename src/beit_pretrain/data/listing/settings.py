"""Settings of the listing of a source: the image of a sample, and classes that are not the names of folders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from beit_pretrain.settings import Name, PathStr, Rule, Settings, Text, about


def _extensions(given: Any) -> Any:
    """A text or a list of texts as a list; WebDataset separates extensions by semicolons."""
    given = given.split(";") if isinstance(given, str) else given
    if not isinstance(given, list | tuple):
        return given
    return [e.strip().lower().removeprefix(".") if isinstance(e, str) else e for e in given]


ImageKey = Annotated[list[Text] | None, BeforeValidator(_extensions), Rule("an extension, or a list of extensions")]


def _as_group(given: Any) -> Any:
    """`labels=FILE` is short for `labels.path=FILE`."""
    return given if isinstance(given, Mapping | Settings) else {"path": given}


FolderChoice = Literal["innermost", "outermost", "path"]


class LabelSettings(Settings):
    """Classes that are not the names of folders."""

    defaults = "shards.yaml:labels"

    path: PathStr | None = about(
        "make: ImageNet's devkit, or a list with a row per image (short: labels=FILE); index: class names, a line each"
    )
    file_column: Name | None = about("of a list: name or number (from 1) of the column of file names; null = found")
    class_column: Name | None = about("the same for the classes")
    folder: FolderChoice = about(
        "without a list: which of an image's folders is its class, innermost, outermost or path"
    )
    unlisted: Literal["error", "skip"] = about("images that the list does not name: stop, or leave them out")


class ClassSettings(Settings):
    """Where the classes come from."""

    defaults = "shards.yaml"

    labels: Annotated[LabelSettings, BeforeValidator(_as_group)] = about("classes that are not the names of folders")
