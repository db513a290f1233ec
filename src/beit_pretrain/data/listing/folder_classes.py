"""Classes from the folders that hold the images: which folder's name is the class.

By default it is the innermost one (`labels.folder=innermost`), after two kinds of folders are passed over: those whose
name says only that photos follow (`images`, `JPEGImages`: Tiny ImageNet's `n01443537/images`), and a last folder that
has the same name everywhere. Names are compared in Unicode's composed form (NFC), since macOS stores them decomposed.
Where something else may be meant, a note says so.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Iterable, Sequence
from itertools import islice

from beit_pretrain.data.layout import CLASSES_TOO, PHOTOS, is_part, parts_of, says_maps, says_photos
from beit_pretrain.data.listing.settings import FolderChoice

SHOWN = 3  # folders in a note


def classes_of(folders: Sequence[str], which: FolderChoice = "innermost") -> tuple[list[str | None], list[str]]:
    """The class of every folder (a path that ends with a slash; "" = no folder) and notes on what is doubtful.

    Folders may end with .tar. None: the images in it have no class.
    """
    whole = [tuple(_plain(part) for part in folder.split("/") if part) for folder in folders]
    notes: list[str] = []
    paths = _without_photo_folders(whole, notes)
    if which == "path":
        return ["/".join(path) or None for path in paths], notes
    if which == "outermost":
        return [path[0] if path else None for path in _without_common_start(paths)], notes
    return [path[-1] if path else None for path in paths], notes + _doubts(paths)


def _without_common_start(paths: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The paths without first folders that hold all classes."""
    while len({path[0] for path in paths if path}) == 1 and all(len(path) > 1 for path in paths if path):
        paths = [path[1:] for path in paths]
    return paths


def _plain(part: str) -> str:
    part = part.removesuffix(".tar") or part
    try:
        return unicodedata.normalize("NFC", part)
    except ValueError:  # no valid text
        return part


def _without_photo_folders(paths: list[tuple[str, ...]], notes: list[str]) -> list[tuple[str, ...]]:
    """The paths without last folders that name no class."""
    while True:
        last = {path[-1].casefold() for path in paths if path}
        deep = {path for path in paths if path}
        # All end alike: cats/originals, dogs/originals; or there is only `images`.
        generic = all(word in PHOTOS or is_part(word) for word in last)
        alike = len(last) == 1 and (generic or (len(deep) > 1 and all(len(path) > 1 for path in deep)))
        if alike and not generic:
            notes.append(
                f"every class folder holds its images in a folder {min(last)!r}; the class is the folder above"
            )
        taken = set(paths)
        shorter = [path[:-1] if alike or _names_photos(path, taken) else path for path in paths]
        if shorter == paths:
            return paths
        paths = shorter


def _names_photos(path: tuple[str, ...], taken: set[tuple[str, ...]]) -> bool:
    """Whether the last folder says only that photos follow, and the one above is free to be their class."""
    return len(path) > 1 and path[-1].casefold() in PHOTOS and path[:-1] not in taken


def _names_no_class(name: str, classes: Collection[str]) -> bool:
    """Whether a name says only photos or label maps, and stands beside classes that do not have it in theirs."""
    if len(classes) < 2 or name.casefold() in ("photo", "photos", "picture", "pictures", *CLASSES_TOO - {"label"}):
        return False
    others = (other.casefold() for other in classes if other != name)
    return says_photos(name) or (says_maps(name) and not any(name.casefold() in other for other in others))


def _doubts(paths: list[tuple[str, ...]]) -> list[str]:
    """Where the innermost folder may not be the class."""
    notes: list[str] = []
    above: dict[str, set[tuple[str, ...]]] = {}
    for path in paths:
        if path:
            above.setdefault(path[-1], set()).add(path)
    if several := [places for places in above.values() if len(places) > 1]:
        first = sorted("/".join(path) for path in several[0])[:SHOWN]
        others = {path[0] for path in paths if path}, {path for path in paths if path}
        notes.append(
            f"{len(several):,} of {len(above):,} gather folders of the same name ({', '.join(first)}); "
            f"labels.folder=outermost would make {len(others[0]):,} classes, labels.folder=path {len(others[1]):,}"
        )
    if named := [*islice((name for name in above if _names_no_class(name, above)), SHOWN)]:
        notes.append(
            f"{', '.join(map(repr, named))} among the classes: a name of folders of photos or label maps; if it is no "
            "class, give the folder of the photos as src="
        )
    if len(parts := sorted(parts_of({*above, "train"}).keys() & above)) > 1:
        shown = ", ".join(map(repr, parts[:SHOWN]))
        notes.append(f"{shown} among the classes: names of parts of a set; if they are none, give one part as src=")
    taken = set(paths)
    if nested := sorted("/".join(path) for path in taken if any(path[:n] in taken for n in range(1, len(path)))):
        parent = nested[0].rpartition("/")[0]
        notes.append(f"{parent} holds images and class folders ({nested[0]}); both are classes; see labels.folder=")
    return notes + alike(above)


def alike(classes: Iterable[str]) -> list[str]:
    """A note on class names that differ by case, blanks or Unicode's form alone, if there are any."""
    by_look: dict[str, list[str]] = {}
    for name in classes:
        by_look.setdefault(" ".join(unicodedata.normalize("NFKC", name).casefold().split()), []).append(name)
    names = next((names for names in by_look.values() if len(names) > 1), None)
    return [f"classes that read alike are kept apart: {', '.join(map(repr, sorted(names)))}"] if names else []
