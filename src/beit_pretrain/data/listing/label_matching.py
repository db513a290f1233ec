"""Which name of a list of labels an image has.

* A listed name with an image's extension names only that file (a.jpg is not a.png). One without is the name of a file
  without its extension, which may have more dots (scan.0001, 22.05).
* A listed name with folders fits an image whose path ends with it, or whose path in the source is the end of it: other
  leading folders, a drive or \\ for / make no difference, but a/001.jpg is not b/001.jpg. Of several the longest common
  end counts; different classes for one image are an error, never a choice.
* Names are compared in Unicode's composed form (NFC), and with their case.
"""

from __future__ import annotations

import unicodedata
from array import array
from itertools import islice

from beit_pretrain.data.listing.label_text import IMAGE_NAME
from beit_pretrain.errors import UserError


class LabelList:
    """Classes by listed name. Memory: a dictionary entry and the name for each, and one of each class.

    Attributes:
        rows: listed name, in the form of `normal` -> its number.
        twice: number of a name, and an image that it named after another one; None if there is none.
    """

    def __init__(self, where: str):
        self.where = where  # for error messages
        self.rows: dict[str, int] = {}
        self.twice: tuple[int, str] | None = None
        self._numbers: dict[str, int] = {}
        self._classes: list[str] = []
        self._class = array("i")  # of every row, in `_classes`
        self._uses = bytearray()  # images of every row; 2 = several
        self._depths: list[int] = []  # numbers of parts that listed names have, descending
        self._ends: dict[int, tuple[dict[str, int], dict[str, int], set[str]]] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, name: str, class_name: str, line: int | None = None) -> None:
        """List a name. Raises UserError if it has another class already."""
        name, class_name = normal(name), unicodedata.normalize("NFC", class_name)
        number = self._numbers.setdefault(class_name, len(self._classes))
        if number == len(self._classes):
            self._classes.append(class_name)
        row = self.rows.setdefault(name, len(self._class))
        if row == len(self._class):
            self._class.append(number)
            self._uses.append(0)
            if (depth := name.count("/") + 1) not in self._depths:
                self._depths = sorted([*self._depths, depth], reverse=True)
        elif self._class[row] != number:
            said = f"{self.where}{'' if line is None else f', line {line}'}: {name!r} has two classes"
            raise UserError(f"{said}, {self._classes[self._class[row]]!r} and {class_name!r}")

    def classes(self) -> dict[str, str]:
        """Class by listed name."""
        return {name: self._classes[self._class[row]] for name, row in self.rows.items()}

    def class_names(self) -> list[str]:
        """All different classes, in the order of the list."""
        return [*self._classes]

    def class_of(self, key: str, path: str) -> str | None:
        """The class of an image; None if it is not listed. Raises UserError if the list gives it several.

        `key`: its path in the source; `path`: the whole one, which ends with `key`.
        """
        row = self._find(normal(key), normal(path))
        if row is None:
            return None
        self._uses[row] = min(2, self._uses[row] + 1)
        if self._uses[row] == 2 and self.twice is None:
            self.twice = row, key
        return self._classes[self._class[row]]

    def unused(self) -> tuple[int, str]:
        """How many names were of no image, and the first of these."""
        count = self._uses.count(0)
        return count, self.name(self._uses.index(0)) if count else ""

    def name(self, row: int) -> str:
        return next(islice(self.rows, row, None))

    def like(self, key: str) -> str:
        """The listed name that differs from an image's in case alone, or in its extension; else the first one."""
        wanted = _ends_of(normal(key).casefold())
        return next((name for name in self.rows if not wanted.isdisjoint(_ends_of(name.casefold()))), self.name(0))

    def _find(self, key: str, path: str) -> int | None:
        parts, own = path.split("/"), key.count("/") + 1
        for depth in self._depths:
            if depth < own and (row := self._longer(parts, key, own)) is not None:
                return row
            if depth <= len(parts) and (row := self._lookup(self.rows, "/".join(parts[-depth:]), key)) is not None:
                return row
        return self._longer(parts, key, own)

    def _longer(self, parts: list[str], key: str, own: int) -> int | None:
        """The row whose name ends with the last `own` parts of a path, and has more.

        If the folder above is one of the list's folders there, names in other folders are not meant.
        """
        if self._depths[0] <= own:
            return None
        if own not in self._ends:
            self._ends[own] = self._ends_with(own)
        ends, others, above = self._ends[own]
        if own < len(parts) and parts[-own - 1] in above:
            return self._longer(parts, key, own + 1)
        name = "/".join(parts[-own:])
        for end in (name, _without_extension(name)):
            if end in others:
                self._refuse(key, ends[end], others[end])
        return self._lookup(ends, name, key)

    def _ends_with(self, own: int) -> tuple[dict[str, int], dict[str, int], set[str]]:
        """Of the longer names the last `own` parts -> row; of those with several classes, one of another class; the
        folders before these parts."""
        ends: dict[str, int] = {}
        others: dict[str, int] = {}
        above: set[str] = set()
        for name, row in self.rows.items():
            parts = name.rsplit("/", own)
            if len(parts) > own:
                above.add(parts[0].rpartition("/")[2])
                if self._class[ends.setdefault(end := "/".join(parts[1:]), row)] != self._class[row]:
                    others[end] = row
        return ends, others, above

    def _lookup(self, rows: dict[str, int], name: str, key: str) -> int | None:
        """The row of a name, or of it without its extension. Raises UserError if both are listed with two classes."""
        row, other = rows.get(name), rows.get(_without_extension(name))
        if row is not None and other is not None and self._class[row] != self._class[other]:
            self._refuse(key, row, other)
        return other if row is None else row

    def _refuse(self, key: str, *rows: int) -> None:
        said = " and ".join(f"{self.name(row)!r} is {self._classes[self._class[row]]!r}" for row in rows)
        raise UserError(f"{self.where} gives {key!r} two classes: {said}")


def normal(name: str) -> str:
    """A path in the form in which names are compared: NFC, /, without ., what is before .., and .tar of folders."""
    if not name.isascii():
        name = unicodedata.normalize("NFC", name)
    if "\\" in name:
        name = name.replace("\\", "/")
    if "/" not in name:
        return name
    parts = [part.removesuffix(".tar") for part in name.split("/")[:-1] if part not in ("", ".")]
    after = len(parts) - parts[::-1].index("..") if ".." in parts else 0
    return "/".join([*parts[after:], name.rpartition("/")[2]])


def _without_extension(name: str) -> str:
    """A name without its extension; with it if it has none, or would still have an image's (a.jpg.png is not a.jpg)."""
    stem, dot, extension = name.rpartition(".")
    if not dot or "/" in extension or stem[-1:] in ("", "/") or IMAGE_NAME.fullmatch(stem):
        return name
    return stem


def _ends_of(name: str) -> set[str]:
    last = name.rpartition("/")[2]
    return {last, _without_extension(last)}
