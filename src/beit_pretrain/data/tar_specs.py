"""WebDataset's ways to name many tars: braces, `::`, globs, folders, `pipe:`; expanded into paths and addresses.

    x-{0000..4095}.tar   x-{train,val}-0.tar     braces (package braceexpand), in paths, addresses and commands
    a-{0..3}.tar::b.tar                          several of these, also inside a command, as webdataset splits them
    data/x-*.tar         hf://datasets/o/n/*.tar globs: of paths, and of s3://, gs://, hf://
    data/train           s3://bucket/train       a folder: its tars by name; http cannot list one
    pipe:COMMAND                                 a command that writes the tar; with `{name}` it names a shard folder

What exists under exactly the typed name is that file or folder.
"""

from __future__ import annotations

import glob
import os
import re
from itertools import islice, pairwise
from pathlib import Path
from urllib.parse import unquote, urlsplit

from beit_pretrain.data.layout import COMPRESSED_TARS
from beit_pretrain.data.remote_listing import LISTABLE, glob_remote
from beit_pretrain.data.split_info import tars_in
from beit_pretrain.data.storage import is_remote, without_secrets
from beit_pretrain.errors import UserError
from beit_pretrain.fileio import expand_home, expanded

MOST = 1_000_000  # names of a specification
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?\}", re.ASCII)
_MAGIC = re.compile(r"[*?[]")


def is_tar_spec(source: str) -> bool:
    """Whether a source names tars by its spelling, rather than a folder or a location that must be looked at."""
    if _exists(source) or (source.startswith("pipe:") and "{name}" in source):
        return False
    return (
        source.startswith("pipe:")
        or "::" in source
        or "{" in source
        or _is_tar(source)
        or (bool(_MAGIC.search(source)) and not _is_http(source))
    )


def expand(spec: str) -> list[str]:
    """The paths and addresses of the tars that a specification names, in its order; local files exist.

    Raises UserError if nothing matches, a local file is missing, a name comes twice, braces do not close, there are
    more than `MOST` names, or an http folder would have to be listed.
    """
    if not spec:
        raise UserError("an empty name where the name of a tar belongs")
    names = [name for part in _split(spec) for name in _expand_part(part)]
    if len(names) > MOST:
        raise UserError(f"{_shown(spec)} has more than {MOST:,} names")
    if len({*names}) < len(names):
        twice = next(a for a, b in pairwise(sorted(names)) if a == b)
        raise UserError(f"{_shown(spec)} names {_shown(twice)} twice")
    return names


def _split(spec: str) -> list[str]:
    if _exists(spec) or "::" not in spec:
        return [spec]
    parts = spec.split("::")
    if not all(parts):
        raise UserError(f"{_shown(spec)} has a :: without a name on one of its sides")
    return parts


def _expand_part(part: str) -> list[str]:
    if part.startswith("pipe:") and "{name}" in part:
        raise UserError(f"{part}: {{name}} stands for the files of a shard folder; a tar's command has no {{name}}")
    if _exists(part) or "{" not in part.replace("}", "{"):
        return _find(part, part, by_name=False)
    names, found, missing = _braces(part), [], []
    for name in names:
        if is_remote(name) or _MAGIC.search(name) or _exists(name):
            found += _find(name, part, by_name=True)
        else:
            missing.append(name)
    if missing:
        if not found:
            raise UserError(f"{part}: nothing matches; the first of its {len(names):,} names, {names[0]}, is no file")
        raise UserError(f"{part}: {missing[0]} does not exist ({len(missing):,} of {len(names):,} names)")
    return found


def _braces(part: str) -> list[str]:
    from braceexpand import braceexpand

    for first, last, step in _RANGE.findall(part):  # braceexpand would write out every one before the first name
        if max(map(len, (first, last, step))) > 18 or abs(int(last) - int(first)) // (int(step or 1) or 1) >= MOST:
            raise UserError(f"{_shown(part)} has more than {MOST:,} names")
    try:
        names = [*islice(braceexpand(part), MOST + 1)]
    except (ValueError, RecursionError):
        raise UserError(f"{_shown(part)}: its braces do not close, or do not open") from None
    if len(names) > MOST:
        raise UserError(f"{_shown(part)} has more than {MOST:,} names")
    return names


def _find(name: str, spec: str, by_name: bool) -> list[str]:
    """What one name without braces stands for. `by_name`: it comes of braces, so that it need not end with .tar."""
    if is_remote(name):
        return _find_remote(name, by_name)
    path = expanded(name)
    if os.path.isdir(path):
        if not (names := tars_in(Path(path))):
            raise UserError(f"{path} holds no tars")
        return [os.path.join(path, name) for name in names]
    if os.path.exists(path):
        return [path]
    if _MAGIC.search(name):
        matches = sorted(match for match in glob.iglob(path, recursive=True) if _is_tar(match))
        if not matches:
            said = f", of which the first name is {name}" if name != spec else ""
            if next(glob.iglob(path, recursive=True), None) is not None:
                said += "; other files and folders are given without *: one folder, or a list"
            raise UserError(f"{spec}: no tar matches{said}")
        return matches
    raise UserError(f"{name} does not exist")


def _find_remote(name: str, by_name: bool) -> list[str]:
    scheme = name.partition(":")[0].lower()
    if scheme == "pipe":
        return [name]
    if scheme == "file":
        path = unquote(urlsplit(name).path)
        return _find(path, path, by_name)
    if scheme not in LISTABLE:
        if "*" in urlsplit(name).path:
            raise UserError(
                f"{_shown(name)}: http cannot list files; name them by braces, such as x-{{0000..0099}}.tar"
            )
        if not (by_name or _is_tar(name) or urlsplit(name).query):
            raise UserError(
                f"{_shown(name)} is no tar by its name, and http cannot list a folder; name its tars by braces, such "
                f"as {_shown(name).rstrip('/')}/x-{{0000..0099}}.tar"
            )
        return [name]
    if _MAGIC.search(name):
        matches = [match for match in glob_remote(name) if _is_tar(match)]
    elif by_name or _is_tar(name):
        return [name]
    else:
        matches = [match for match in glob_remote(f"{name.rstrip('/')}/*.tar") if _is_tar(match)]
    if not matches:
        raise UserError(f"{_shown(name)}: no tar matches")
    return matches


def _exists(name: str) -> bool:
    """Whether a local path of exactly this name exists."""
    try:
        return not is_remote(name) and expand_home(name).exists()
    except (OSError, ValueError):  # too long for a name, which long lists are
        return False


def _is_http(name: str) -> bool:
    return name.lower().startswith(("http://", "https://"))


def _is_tar(name: str) -> bool:
    """Whether the last part of a path or address says a tar."""
    path = urlsplit(name).path if _is_http(name) else name
    return path.lower().endswith((".tar", *COMPRESSED_TARS))


def _shown(name: str) -> str:
    """For messages: without secrets, and not longer than a line."""
    text = without_secrets(name) if is_remote(name) else name
    return text if len(text) <= 200 else f"{text[:200]}..."
