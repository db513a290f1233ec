"""Reads lists of labels as rows of fields: text separated by tabs, commas, semicolons or blanks, or JSON lines.

* Text is UTF-8, or UTF-16 with a byte order mark. Blank lines are skipped, and so are lines at the top with a #.
* The separator is the one that gives every row the same number of fields. "Quoted" fields may hold separators and line
  ends. Where none fits, or a blank follows the name of an image in every line, a blank ends the name and the rest of
  the line is the class.
* Of JSON lines all keys are columns, those of the first line first.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from beit_pretrain.errors import UserError
from beit_pretrain.transforms.image_io import IMAGE_EXTENSIONS

NO_TEXT = {
    b"\x1f\x8b": "gzip",
    b"PK\3\4": "zip or Excel",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PAR1": "Parquet",
    b"\x89HDF": "HDF5",
    b"MATLAB": "MATLAB",
    b"\x93NUMPY": "NumPy",
    b"SQLite": "SQLite",
}
MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
SEPARATORS = {"\t": "tab", ",": "comma", ";": "semicolon"}
BLANK, BLANKS = " ", "  "  # a blank ends the name alone; blanks separate all fields
LINE_END = re.compile(r"\r\n|\r|\n")
_EXTENSIONS = "|".join(sorted(IMAGE_EXTENSIONS))
IMAGE_NAME = re.compile(rf".*\.({_EXTENSIONS})", re.IGNORECASE | re.DOTALL)
NAME_AND_BLANK = re.compile(rf"[^\s,;\"]+\.({_EXTENSIONS}) +[^\s,;]", re.IGNORECASE)
Row = tuple[int, list[str]]  # line number and fields


def read_text(path: Path, setting: str) -> str:
    """The text of a file. Raises UserError if it is compressed or of another encoding; OSError."""
    data = path.read_bytes()
    if kind := next((kind for start, kind in NO_TEXT.items() if data.startswith(start)), None):
        raise UserError(f"{setting}={path} is a {kind} file; unpack it, or save it as CSV in UTF-8")
    encoding = next((name for mark, name in MARKS.items() if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding).removeprefix("\ufeff")
        if "\0" not in text:
            return text
        wrong = "holds zero bytes, as UTF-16 without a byte order mark does"
    except ValueError as error:
        wrong = f"is not {encoding.removesuffix('-sig').upper()} text (byte {getattr(error, 'start', 0)})"
    raise UserError(f"{setting}={path} {wrong}; save it as UTF-8, such as: iconv -f LATIN1 -t UTF-8 FILE > NEW")


def lines_of(text: str) -> list[str]:
    """The lines of a text of any system; `splitlines` would split at rare characters inside a name, too."""
    return LINE_END.split(text)


class Table(NamedTuple):
    """A list of labels as rows of the same number of fields."""

    text: str
    separator: str  # of SEPARATORS, BLANK, BLANKS, or "" for JSON lines
    start: int = 0  # of the first row in the text, after comments
    before: int = 0  # lines before that
    width: int | None = None  # columns; further ones are blank
    keys: tuple[str, ...] = ()  # of JSON lines: the names of the columns

    def rows(self) -> Iterator[Row]:
        """All rows, a header included. Raises ValueError for one that cannot be read."""
        rows = self._json_rows() if not self.separator else self._rows()
        for line, fields in rows:
            if any(fields := [field.strip() for field in fields]):
                yield self.before + line, fields[: self.width]

    def spread(self) -> Table | None:
        """Of rows with blanks the table with a column for every word; None if their number varies, or is two."""
        if self.separator != BLANK:
            return None
        wide = self._replace(separator=BLANKS, width=None)
        counts = {len(fields) for _, fields in wide.rows()}
        return wide if len(counts) == 1 and counts != {2} else None

    def _rows(self) -> Iterator[Row]:
        if self.separator in SEPARATORS:
            # Not split by `lines_of`: quoted fields may hold line ends.
            text = io.StringIO(self.text[self.start :], newline="")
            reader = csv.reader(text, delimiter=self.separator, skipinitialspace=True)  # a, "b, c"
            last = 0
            try:
                for fields in reader:
                    yield last + 1, fields
                    last = reader.line_num
            except csv.Error as error:
                raise ValueError(f"line {self.before + last + 1}: {error}; is a quote without its partner?") from None
            return
        for number, line in enumerate(lines_of(self.text[self.start :]), 1):
            quoted = re.match(r'\s*"([^"]+)"\s+(.*)', line)
            fields = [*quoted.groups()] if quoted else line.split(None, 1)
            if self.separator == BLANKS and len(fields) == 2:
                fields = [fields[0], *fields[1].split()]
            elif len(fields) == 2:
                fields[1] = fields[1].strip()
                fields[1] = fields[1][1:-1] if re.fullmatch('"[^"]*"', fields[1]) else fields[1]
            yield number, fields

    def _json_rows(self) -> Iterator[Row]:
        yield 0, [*self.keys]
        for number, entry in _objects(self.text):
            texts = (entry.get(key, "") for key in self.keys)
            yield number, [t if isinstance(t, str) else "" if t is None else json.dumps(t) for t in texts]


def table_of(text: str) -> Table:
    """The table in a text. Raises ValueError if it is empty or no separator gives every row a file name and a class."""
    if re.match(r"\s*(\{|\[\s*[\[{\"])", text):
        return Table(text, "", keys=tuple(dict.fromkeys(key for _, entry in _objects(text) for key in entry)))
    start, before = _after_comments(text)
    lines = (line for line in lines_of(text[start:]) if line.strip())
    if (first := next(lines, None)) is None:
        raise ValueError("it is empty")
    if marked := re.fullmatch(r"sep=([,;\t])", first.strip("\r\n")):  # Excel's own first line
        return _even(Table(text, marked[1], text.index(first, start) + len(first), before))
    blank = Table(text, BLANK, start, before)
    if NAME_AND_BLANK.match(first) and all(map(NAME_AND_BLANK.match, lines)):
        return blank
    faults = []
    for separator in sorted((s for s in SEPARATORS if s in first), key=first.index):
        try:
            return _even(Table(text, separator, start, before))
        except ValueError as error:
            faults.append(error)
    try:
        return _even(blank)
    except ValueError as error:
        raise (faults or [error])[0] from None


def _even(table: Table) -> Table:
    """The table without blank columns at its end. Raises ValueError unless all rows have at least 2 fields and, but for
    blank ones, those of the first."""
    count, width = 0, 2
    for line, fields in table.rows():
        width = max(width, *(n for n, field in enumerate(fields, 1) if field))
        count = count or len(fields)
        if len(fields) < 2:
            quote = "; is a quote without its partner?" if LINE_END.search(fields[0]) else ""
            raise ValueError(f"line {line}: {fields[0][:60]!r} has no class{quote}")
        if len(fields) < count or any(fields[count:]):
            quotes = f"; put a field that holds a {SEPARATORS.get(table.separator)} in quotes"
            raise ValueError(f"line {line} has {len(fields)} fields, the first row {count}{quotes}")
    return table._replace(width=width)


def _after_comments(text: str) -> tuple[int, int]:
    """Where the first line without # begins, and the number of lines before it; the start if all lines have one."""
    start = lines = 0
    for end in LINE_END.finditer(text):
        if not text[start : end.start()].startswith("#"):
            return start, lines
        start, lines = end.end(), lines + 1
    return (0, 0) if text[start:].startswith("#") or not text[start:].strip() else (start, lines)


def _objects(text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and object of every line of JSON. Raises ValueError for one without an object or single value."""
    for number, line in enumerate(lines_of(text), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if not isinstance(entry, dict) or all(isinstance(value, list | dict) for value in entry.values()):
            said = "is not read; JSON lines with a file name and a class each are, and CSV"
            raise ValueError(f"line {number} is no object of JSON lines; other JSON, such as COCO's, {said}")
        yield number, entry
