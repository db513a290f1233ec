"""What a set of tars says of itself: which tars belong to a split, and how many images each holds.

timm's `_info.json` or `info.json`, beside the tars or above them:

    {"splits": {"train": {"name": "train", "num_samples": 2504, "filenames": ["x-train-0000.tar", "x-train-0001.tar"],
                          "shard_lengths": [1252, 1252]}, "validation": {...}}}

img2dataset's `00000_stats.json` beside `00000.tar`: {"count": 10000, "successes": 9213, "failed_to_download": 780,
"failed_to_resize": 7, ...}.

Without either, the parts are told apart by names: `x-train-0000.tar`, `val/0000.tar`. These files are untrusted: names
must not lead out of the folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit, urlunsplit

from beit_pretrain.data import layout
from beit_pretrain.data.remote_listing import LISTABLE, list_folder
from beit_pretrain.data.settings import RemoteOptions
from beit_pretrain.data.storage import MissingError, check_json, join, read_file, without_secrets
from beit_pretrain.data.tars import inside
from beit_pretrain.errors import UserError, first_line

INFO_FILES = ("_info.json", "info.json")  # in timm's order
LARGEST = 1 << 26  # bytes of an info file
AT_ONCE = 32  # small files that are read at a time
Read = Callable[[str], bytes | None]  # the content of a file beside the tars by its name, None = there is none


class TarSet(NamedTuple):
    """The tars of a split: paths or addresses, images of each, a line to print, images of all where only these are
    known."""

    urls: list[str]
    lengths: list[int] | None
    note: str = ""
    samples: int | None = None


class StatedSplit(NamedTuple):
    """A split of an info file: names of its tars, images of each and of all."""

    names: list[str]
    lengths: list[int] | None
    samples: int | None


def tars_of_location(location: str, split: str, access: RemoteOptions) -> TarSet | None:
    """The tars of a split at a location: by its info file, else (s3, gs, hf) by a listing. None if there are no tars.

    Raises UserError if it has no such split, DownloadError if it cannot be read, or a listable one does not exist.
    """
    scheme = location.partition(":")[0].lower()
    if scheme == "pipe":
        return None
    names: list[str] | None = None
    if scheme in LISTABLE:
        names = _names_at(location, access)
    elif scheme == "file":
        return tars_of_folder(unquote(urlsplit(location).path), split)

    def read(name: str) -> bytes | None:
        return _read_at(location, access, name) if names is None or name in names else None

    tars = [name for name in names or () if _is_tar(name)]
    found = _tars_of_split(tars, read, split, without_secrets(location))
    return found and found._replace(urls=[join(location, name) for name in found.urls])


def tars_of_folder(folder: str | Path, split: str) -> TarSet | None:
    """The tars of a split in a local folder, or in folders of its parts. None if there are none. Raises UserError."""
    folder = Path(folder)

    def read(name: str) -> bytes | None:
        try:
            with open(folder / name, "rb") as file:
                return file.read(LARGEST + 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(f"{folder / name} cannot be read: {error.strerror}") from None

    tars = tars_in(folder)
    if not tars:
        parts = [path.name for path in folder.iterdir() if path.is_dir() and layout.is_part(path.name)]
        tars = [f"{part}/{name}" for part in sorted(parts) for name in tars_in(folder / part)]
    found = _tars_of_split(tars, read, split, str(folder))
    return found and found._replace(urls=[str(folder / name) for name in found.urls])


def stated_lengths(urls: list[str], access: RemoteOptions) -> tuple[list[int], str, str] | None:
    """Images of each of these tars by the info files or statistics beside them; None = not stated.

    Also a line to print, or "", and who says it, for messages.

    Raises UserError for an info file that is damaged, DownloadError if one cannot be read.
    """
    folders = {url: split_address(url)[0] for url in urls if not url.startswith("pipe:")}
    if len(folders) < len(urls):
        return None
    known: dict[str, int] = {}
    for folder in dict.fromkeys(folders.values()):
        splits = read_info(partial(_read_at, folder, access), without_secrets(folder)) or {}
        for stated in splits.values():
            for name, length in zip(stated.names, stated.lengths or (), strict=False):
                known[without_secrets(join(folder, name))] = length
    plain = [without_secrets(url) for url in urls]
    if all(url in known for url in plain):
        return [known[url] for url in plain], "", f"its {INFO_FILES[0]} says"
    counts = _statistics(urls, lambda url: _read_at(*_beside(url, access)))
    return counts and (*counts, "its statistics of img2dataset say")


# --- info files ----------------------------------------------------------------------------------------------------


def read_info(read: Read, where: str) -> dict[str, StatedSplit] | None:
    """The splits of a folder by its info file; None if it has none. Raises UserError if the file is damaged."""
    for name in INFO_FILES:
        data = read(name)
        if data is None or data.lstrip()[:1] == b"<":  # a page instead of HTTP 404
            continue
        try:
            info = json.loads(data)
            splits = info.get("splits") if isinstance(info, dict) else None
            if not isinstance(splits, dict) or not all(_is_timms(of) for of in splits.values()):
                continue  # some other info.json
            return {str(name): _stated(of) for name, of in splits.items()}
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}/{name} is damaged: {first_line(error)}") from None
    return None


def _is_timms(split: Any) -> bool:
    return isinstance(split, dict) and isinstance(split.get("filenames"), list)


def _stated(split: dict[str, Any]) -> StatedSplit:
    """Raises ValueError."""
    names, lengths, samples = split["filenames"], split.get("shard_lengths"), split.get("num_samples")
    for name in names:
        if not isinstance(name, str) or not name or not inside(name) or {*name} & {":", "\\", "\n", "\0", "?", "#"}:
            raise ValueError(f"the file name {str(name)[:80]!r} is not one in its folder")
    if len({*names}) < len(names):
        raise ValueError("it names a file twice")
    if lengths is not None and not _are_counts(lengths):
        raise ValueError("its shard_lengths are no counts")
    if lengths is not None and len(lengths) != len(names):
        raise ValueError(f"it has {len(names):,} filenames, but {len(lengths):,} shard_lengths")
    if samples is not None and not _are_counts([samples]):
        raise ValueError(f"its num_samples is {str(samples)[:80]}")
    if lengths is not None and samples is not None and sum(lengths) != samples:
        raise ValueError(f"its shard_lengths add up to {sum(lengths):,}, but its num_samples is {samples:,}")
    return StatedSplit(names, lengths, samples if lengths is None else sum(lengths))


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**40 for value in values)


# --- splits --------------------------------------------------------------------------------------------------------


def _tars_of_split(tars: list[str], read: Read, split: str, where: str) -> TarSet | None:
    """The tars of a split, by the info file, else among `tars` by their names: relative to the folder `where`."""
    if (splits := read_info(read, where)) is not None:
        parts = {name: (layout.role_of(name) or (name,))[0] for name in splits}
        stated = [splits[name] for name in _of_split(parts, split, where)]
        names = [name for of in stated for name in of.names]
        if not names:
            raise UserError(f"{where}: its info file names no tars of the split {split}")
        lengths = [length for of in stated for length in of.lengths or ()]
        samples = None if any(of.samples is None for of in stated) else sum(of.samples or 0 for of in stated)
        return TarSet(names, lengths if len(lengths) == len(names) else None, "", samples)
    if not tars:
        return None
    # In folders of parts the folder says the part: train/set-train-000.tar says it twice.
    says = {name: name.partition("/")[0] if "/" in name else name.rpartition(".")[0] for name in tars}
    parts = layout.parts_of(says.values())
    if parts:
        wanted = {*_of_split(parts, split, where)}
        tars = [name for name in tars if says[name] in wanted]
    found = _statistics(tars, lambda name: read(f"{name.removesuffix('.tar')}_stats.json"))
    return TarSet(tars, *(found or (None, "")))


def _of_split(parts: dict[str, str], split: str, where: str) -> list[str]:
    """`layout.of_split`; the parts themselves are named in the message, not each tar."""
    try:
        return layout.of_split(parts, split)
    except UserError:
        has = sorted({*parts}) if len(parts) <= 10 else sorted({*parts.values()})
        raise UserError(f"{where} has the parts {', '.join(has)}; split={split} is none of them") from None


# --- img2dataset ---------------------------------------------------------------------------------------------------


def _statistics(tars: list[str], read: Read) -> tuple[list[int], str] | None:
    """Images of each tar by img2dataset's statistics, and a line about its failures; None if a tar has no statistics.

    `read`: gives the statistics of a tar.
    """
    if not tars or (first := _counts(read(tars[0]))) is None:
        return None
    with ThreadPoolExecutor(AT_ONCE) as pool:
        rest = [*pool.map(lambda tar: _counts(read(tar)), tars[1:])]
    counts = [first, *(found for found in rest if found is not None)]
    if len(counts) < len(tars):
        return None
    wanted, images = sum(count for count, _ in counts), sum(good for _, good in counts)
    note = f"img2dataset could not download or resize {wanted - images:,} of {wanted:,} images"
    return [good for _, good in counts], note if wanted > images else ""


def _counts(data: bytes | None) -> tuple[int, int] | None:
    """Images asked for and written; None if these are no statistics of img2dataset."""
    try:
        stats = json.loads(data or b"")
        found = stats["count"], stats["successes"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return found if _are_counts([*found]) else None


# --- places --------------------------------------------------------------------------------------------------------


def split_address(url: str) -> tuple[str, str]:
    """The folder of a file, with the query, and the file's name."""
    if not url.lower().startswith(("http", "file")):
        folder, _, name = url.rpartition("/")
        return folder, name
    parts = urlsplit(url)
    folder, _, name = parts.path.rpartition("/")
    return urlunsplit(parts._replace(path=folder)), unquote(name)


def _beside(url: str, access: RemoteOptions) -> tuple[str, RemoteOptions, str]:
    folder, name = split_address(url)
    return folder, access, f"{name.removesuffix('.tar')}_stats.json"


def _read_at(location: str, access: RemoteOptions, name: str) -> bytes | None:
    """A small file at a location; None if it is missing or refused."""
    try:
        return read_file(join(location, name), LARGEST, access.retries, access.timeout, check_json)
    except MissingError:
        return None


def _names_at(location: str, access: RemoteOptions) -> list[str]:
    """Files in a listable location, and in its folders of parts (or its folder `data`) if it has no tars itself."""
    from beit_pretrain.data.transports import file_system

    names = [file.url.rpartition("/")[2] for file in list_folder(location, access)]
    if any(map(_is_tar, names)) or any(name in INFO_FILES for name in names):
        return names
    entries = file_system(location.partition(":")[0].lower()).ls(location.rstrip("/"), detail=True)
    folders = sorted(entry["name"].rpartition("/")[2] for entry in entries if entry["type"] == "directory")
    for folder in folders:
        if layout.is_part(folder) or folder in layout.PHOTOS:
            inner = [file.url.rpartition("/")[2] for file in list_folder(f"{location.rstrip('/')}/{folder}", access)]
            names += [f"{folder}/{name}" for name in inner]
    return names


def tars_in(folder: Path) -> list[str]:
    """The names of the tars in a local folder, sorted. Raises UserError if it cannot be read."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}") from None
    return [name for name in names if _is_tar(name) and os.path.isfile(folder / name)]


def _is_tar(name: str) -> bool:
    return name.lower().endswith(".tar") and not layout.is_by_product(name.rpartition("/")[2])
