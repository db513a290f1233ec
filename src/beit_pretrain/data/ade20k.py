"""The layout of ADE20K: photos in `images/`, label maps of the same names in `annotations/`."""

from __future__ import annotations

import os
from pathlib import Path

from beit_pretrain.data import layout
from beit_pretrain.data.left_out import LeftOut
from beit_pretrain.errors import UserError


def refuse_label_maps(source: Path, path: str, checked: set[Path]) -> None:
    """Raise UserError if a folder `path` of the source lies in ADE20K's layout: the label maps would be lost."""
    above, found, _ = f"{path}/".removeprefix(str(source)).partition("/images/")
    folder = Path(source, above.removeprefix("/"))
    if not found or folder in checked:
        return
    checked.add(folder)
    if has_label_maps(folder):
        said = f"give {folder}, or for the photos alone {folder / 'images'}"
        raise UserError(f"{source}: {folder / 'annotations'} holds label maps, no photos; {said}")


def has_label_maps(folder: Path) -> bool:
    """Whether a folder is in ADE20K's layout: `annotations` has PNGs of the names in `images`, folder by folder."""
    images, annotations = folder / "images", folder / "annotations"
    if not (images.is_dir() and annotations.is_dir()):
        return False
    for inner in ("", *sorted(entry.name for entry in os.scandir(images) if entry.is_dir())):
        maps = {Path(n).stem for n in _names(annotations / inner) if n.lower().endswith(".png")}
        if maps and any(Path(name).stem in maps for name in _names(images / inner)):
            return True
    return False


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def part(root: Path, split: str | None, left_out: LeftOut | None = None, top: str = "") -> tuple[Path, str]:
    """The part of a folder that `split` picks, and its key prefix; the folder itself if it has no parts.

    Other folders go into `left_out`, their keys beginning with `top`. Raises UserError if there is no such part.
    """
    found = (entry.name for entry in os.scandir(root) if entry.is_dir())
    folders = sorted(name for name in found if not layout.is_by_product(name))
    parts = layout.parts_of(folders)
    if not parts or split is None:
        return root, ""
    try:
        picked = min(layout.of_split(parts, split))
    except UserError as error:
        raise UserError(f"{root} {error}") from None
    for name in folders:
        if left_out is not None and name != picked:
            why = layout.OTHER_PART if parts.get(name, parts[picked]) != parts[picked] else layout.BESIDE
            left_out.add(f"{top}{name}/", why)
    return root / picked, f"{picked}/"
