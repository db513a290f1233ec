"""Which parquet and Arrow files make up a source, by part and by subset, as Hugging Face `datasets` lays them out.

* `data/train-00000-of-00004.parquet`, `train/0000.parquet`, `train.parquet`; the part is the innermost name that says
  one (rules: layout.py). What other folders say is the subset (config).
* `save_to_disk`: a folder with state.json and data-*.arrow, or several of these and dataset_dict.json.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from beit_pretrain.data import layout
from beit_pretrain.data.table_rows import holds_images
from beit_pretrain.data.tars import inside
from beit_pretrain.errors import UserError
from beit_pretrain.transforms.image_io import IMAGE_EXTENSIONS

SUFFIXES = (".parquet", ".arrow")
NUMBER = re.compile(r"[-_.]?\d+(-of-\d+)?(-[0-9a-f]{6,})?$")  # at the end of a file's name
DEPTH = 4  # folders below the source in which tables are looked for
OTHER_FILES = 64  # images without a table, after which a folder holds no tables
METADATA = "metadata.parquet"  # of a folder of images


class Subset(NamedTuple):
    """The files of one configuration (subset) of a source, by part; the part "" if their names say none."""

    name: str
    parts: dict[str, list[str]]


def local_tables(source: Path, split: str | None) -> list[Path] | None:
    """The table files of a file or folder in the order of their names; None if it holds something else.

    `split`: the part, None = all. Raises UserError if there is no such part, or there are several subsets.
    """
    if not source.is_dir():
        return [source] if source.suffix.lower() in SUFFIXES else None
    if (source / "dataset_dict.json").is_file():
        parts = _json(source / "dataset_dict.json").get("splits")
        if not isinstance(parts, list) or not all(isinstance(part, str) and part and inside(part) for part in parts):
            raise UserError(f"{source}/dataset_dict.json does not list the parts of the data set")
        chosen = parts_of_split({part: [part] for part in parts}, split, str(source))
        return [file for part in chosen for file in _saved(source / part)]
    if (source / "state.json").is_file() and (source / "dataset_info.json").is_file():
        return _saved(source)
    names = _walk(source)
    return None if not names else [source / name for name in choose(names, split, str(source))]


def choose(names: Sequence[str], split: str | None, where: str) -> list[str]:
    """The files of a part, of a source with these files (paths with /), sorted. Raises as `local_tables` does."""
    subsets = _subsets(names)
    if len(subsets) > 1:
        own = [subset for subset in subsets if subset.name == "default"]
        if not own:
            shown = ", ".join(subset.name or "(top)" for subset in subsets[:20])
            raise UserError(f"{where} has the subsets {shown}; add the folder of one to the path")
        subsets = own
    return parts_of_split(subsets[0].parts, split, where)


def parts_of_split(parts: dict[str, list[str]], split: str | None, where: str) -> list[str]:
    """The files of a part. All of them for None, where names say no part, and of the only part for split=train.

    Raises UserError for a part that is not there.
    """
    if split is None or not any(parts) or (len(parts) == 1 and _role(split) == "train" and split not in parts):
        return sorted(file for files in parts.values() for file in files)
    roles = {name: _role(name) or name for name in parts}
    if "" in parts and "train" not in roles.values():
        roles[""] = "train"
    try:
        return sorted(file for name in layout.of_split(roles, split) for file in parts[name])
    except UserError as error:
        raise UserError(f"{where} {error}") from None


def _role(name: str) -> str:
    """The part that a name says: "train", "val", "test"; "" if none."""
    return (layout.role_of(name) or ("",))[0]


def _subsets(names: Sequence[str]) -> list[Subset]:
    found: dict[str, dict[str, list[str]]] = {}
    for name in names:
        path = PurePosixPath(name)
        steps = [*path.parent.parts, NUMBER.sub("", path.stem)]
        at = next((i for i in reversed(range(len(steps))) if _role(steps[i])), None)
        again = "" if at is None else _role(steps[at])  # train/train-00000.parquet says it twice
        steps_above = [step for i, step in enumerate(steps[:-1]) if i != at and layout.role_of(step) != (again, ())]
        rest = [step for step in steps_above if not layout.says_photos(step)]
        found.setdefault("/".join(rest), {}).setdefault("" if at is None else steps[at], []).append(name)
    return [Subset(name, found[name]) for name in sorted(found)]


def are_tables(names: Sequence[str]) -> list[str]:
    """The files among `names` that may hold images as rows, sorted.

    Not a table beside a tar or folder of its name (img2dataset writes what it knows of the images there), nor the
    metadata of a folder of images.
    """
    lower = {name.lower() for name in names}
    folders = {str(parent) for name in lower for parent in PurePosixPath(name).parents}
    found = []
    for name in names:
        stem, suffix = os.path.splitext(name.lower())
        about = f"{stem}.tar" in lower or stem in folders or os.path.basename(name).lower() == METADATA
        if suffix == ".parquet" and not about and not any(map(layout.is_by_product, name.split("/"))):
            found.append(name)
    return sorted(found)


def _walk(source: Path) -> list[str]:
    """The tables in a folder; none as soon as it is clear that it is one of images.

    Of a folder with both, the tables if they hold images: those beside them may be those of a README.
    """
    names: list[str] = []  # of tables, tars and, with a further part, of folders: see `are_tables`
    images, tables = 0, False
    level = [""]
    for _ in range(DEPTH):
        below = []
        for folder in level:
            try:
                entries = os.scandir(source / folder)
            except OSError as error:
                raise UserError(f"cannot read the folder {source / folder}: {error.strerror}") from None
            for entry in entries:
                suffix = os.path.splitext(entry.name)[1].lower()
                if layout.is_by_product(entry.name):
                    continue
                if suffix in (".parquet", ".tar"):
                    names.append(folder + entry.name)
                    tables = tables or suffix == ".parquet"
                elif suffix[1:] in IMAGE_EXTENSIONS:
                    images += 1
                elif os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                    below.append(f"{folder}{entry.name}/")
                    names.append(f"{folder}{entry.name}/-")
                if images >= OTHER_FILES and not tables:
                    return []
        level = sorted(below)
    found = are_tables(names)
    return [] if found and images and not holds_images(source / found[0]) else found


def _saved(folder: Path) -> list[Path]:
    """The Arrow files of `save_to_disk`."""
    state = _json(folder / "state.json")
    if state.get("_indices_data_files"):
        raise UserError(f"{folder} holds a selection of rows; save it after flatten_indices()")
    try:
        names = [os.path.basename(entry["filename"]) for entry in state["_data_files"]]
    except (KeyError, TypeError):
        raise UserError(f"{folder}/state.json does not list the files of the data set") from None
    return [folder / name for name in names]


def _json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text("utf-8"))
        if isinstance(found, dict):
            return found
        why = "no object"
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or f"no JSON ({error})"
    raise UserError(f"{path} cannot be read: {why}")
