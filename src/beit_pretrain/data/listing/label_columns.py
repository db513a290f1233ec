"""Which columns of a list of labels hold the file names and the classes.

* The first row is a header if it has a usual name of a file column (`FILE_COLUMNS`), or of more than two columns one of
  a class column, and no image's name; or a column that the settings name. Names are compared without case, blanks, _
  and -.
* The file column: `labels.file_column`; of a header, the first of `FILE_COLUMNS` that it has; else the first.
* The class column: `labels.class_column`; of two columns the other one; else the only one of `CLASS_COLUMNS`, or else
  of `CLASS_IDS`. If all columns but the file's hold 0 and 1 with one 1 in each row (one-hot), the class is the name of
  the column with the 1. Without a header, where tabs or blanks separate, 4 numbers after the second column are a box;
  where tabs do, and the second column holds no numbers, any numbers after it are ignored.

Any other list is an error that names the line or the columns to choose from. A class stays the text that it is in the
list: 1, 01 and 1.0 are three classes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice

from beit_pretrain.data.listing.label_text import BLANK, BLANKS, IMAGE_NAME, Table, table_of

FILE_COLUMNS = (
    "filename file filepath path imagepath imgpath imagefile imagefilename imagename imgname fname image img "
    "imageindex photo picture imageid imgid fileid idcode id name".split()
)
WEAK = FILE_COLUMNS.index("imageid")  # from here on: in `Image,Id` the class is the Id
CLASS_COLUMNS = frozenset(
    "class classname classlabel label labels labelname category categoryname target dx diagnosis species breed wnid "
    "findinglabels".split()
)
CLASS_IDS = frozenset("classid classidx classindex labelid labelidx labelindex categoryid".split())
KAGGLE = ["imageid", "predictionstring"]  # of ImageNet's localisation task: boxes follow the class
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)
BOX = 4  # numbers


def read_rows(text: str, file_column: str | None, class_column: str | None) -> Iterator[tuple[int, str, str]]:
    """Yield (line number, file name, class) of every row. `*_column`: a name of the header, or a number from 1.

    Raises ValueError for a list that cannot be read without guessing, and for a row without a file name or a class.
    """
    table, first, header = _table(text, file_column, class_column)
    file, kind = _columns(table, first, header, file_column, class_column)
    kaggle = header and [plain(name) for name in first] == KAGGLE
    row = None
    for row in islice(table.rows(), int(header), None):
        line, fields = row
        name, class_name = fields[file], _hot(first, fields, file, line) if kind is None else fields[kind]
        if not name:
            raise ValueError(f"line {line} has no file name")
        if not class_name:
            raise ValueError(f"line {line}: {name[:60]!r} has no class")
        if not table.separator and class_name[0] in "[{":
            raise ValueError(f"line {line}: {name[:60]!r} has {class_name[:60]}, not one class")
        yield line, name, class_name.split()[0] if kaggle else class_name
    if row is None:
        raise ValueError("it has a header and no row below it")


def _table(text: str, file_column: str | None, class_column: str | None) -> tuple[Table, list[str], bool]:
    """The table, its first row, and whether that is a header."""
    table = table_of(text)
    wide = table.spread()
    for each in (wide, table) if wide else (table,):
        first = next(each.rows(), (0, []))[1]
        header = _is_header(each, first, file_column, class_column)
        # A class may have several words; whether blanks separate columns must be clear.
        if each.separator != BLANKS or header or class_column or _is_boxes(each) or _are_numbers(each, 1):
            return each, first, header
    raise AssertionError("a table of blanks is one of two columns at least")


def _is_header(table: Table, first: list[str], *named: str | None) -> bool:
    names = [plain(field) for field in first]
    if not table.separator or any(name and not name.isdigit() and _index(name, first) is not None for name in named):
        return True
    if any(IMAGE_NAME.fullmatch(field) for field in first):
        return False
    if len(names) == 2:
        return names[0] in FILE_COLUMNS or (names[1] in FILE_COLUMNS and names[0] in CLASS_COLUMNS | CLASS_IDS)
    if table.separator == BLANKS:
        return names[0] in FILE_COLUMNS
    return any(name in FILE_COLUMNS or name in CLASS_COLUMNS for name in names)


def _columns(
    table: Table, first: list[str], header: bool, file_column: str | None, class_column: str | None
) -> tuple[int, int | None]:
    """The number of the file column and of the class column, None for one-hot columns. Raises ValueError."""
    shown = ", ".join(f"{number} {name[:40]!r}" for number, name in enumerate(first[:30], 1))
    shown = f"its columns {'are' if header else 'begin with'} {shown}{', ...' if len(first) > 30 else ''}"

    def chosen(setting: str, key: str) -> int:
        if header and (found := _index(setting, first)) is not None:
            return found
        if setting.isdigit() and 0 < int(setting) <= len(first):
            return int(setting) - 1
        raise ValueError(f"it has no column {key}={setting}; {shown}")

    kind = chosen(class_column, "labels.class_column") if class_column else None
    others = [number for number in range(len(first)) if number != kind]
    if file_column:
        file: int | None = chosen(file_column, "labels.file_column")
    elif not header:
        file = 0
    else:
        file = _usual_file_column([plain(name) for name in first], others)
        if file is None and len(others) == 1:
            file = others[0]
    if file is None:
        raise ValueError(f"which column holds the file names? Give labels.file_column=; {shown}")
    if kind == file:
        raise ValueError(f"labels.file_column and labels.class_column are the same column; {shown}")
    if kind is not None:
        return file, kind
    kind = _class_column(table, first, header, file, shown)
    values = next(islice(table.rows(), int(header), None), (0, []))[1]
    if kind is not None and values and IMAGE_NAME.fullmatch(values[kind]):
        order = f"labels.file_column={(file if IMAGE_NAME.fullmatch(values[file]) else kind) + 1} labels.class_column="
        raise ValueError(f"its column {kind + 1} holds file names, no classes ({values[kind][:60]!r}); give {order}")
    return file, kind


def _usual_file_column(names: list[str], others: list[int]) -> int | None:
    """The column of the best usual name; of two equally good ones in a list of two columns the first."""
    found = [(FILE_COLUMNS.index(names[number]), number) for number in others if names[number] in FILE_COLUMNS]
    if len(names) == 2:
        found = [(int(rank >= WEAK), number) for rank, number in found]
    return min(found)[1] if found else None


def _class_column(table: Table, first: list[str], header: bool, file: int, shown: str) -> int | None:
    if len(first) == 2:
        _refuse_several_numbers(table, 1 - file)
        return 1 - file
    if not header:
        scores = table.separator == "\t" and _are_numbers(table, 2) and not _are_numbers(table, 1)
        if file == 0 and (_is_boxes(table) or scores):
            return 1
        raise ValueError(f"which column holds the classes? Give labels.class_column=, by number; {shown}")
    for usual in (CLASS_COLUMNS, CLASS_IDS):
        if found := [n for n, name in enumerate(first) if n != file and plain(name) in usual]:
            if len(found) == 1:
                _refuse_one_hot(table, first, file, found[0], shown)
                return found[0]
            several = " or ".join(first[number] for number in found)
            raise ValueError(f"which column holds the classes, {several}? Give labels.class_column=; {shown}")
    if _are_flags(table, file):
        return None
    raise ValueError(f"which column holds the classes? Give labels.class_column=; {shown}")


def _are_flags(table: Table, file: int) -> bool:
    """Whether all columns but the file's hold 0 and 1 below the header."""
    rows = islice(table.rows(), 1, None)
    return all(_flag(field) is not None for _, fields in rows for n, field in enumerate(fields) if n != file)


def _refuse_one_hot(table: Table, columns: list[str], file: int, kind: int, shown: str) -> None:
    """Raise ValueError if the class column may as well be one of one-hot columns: one 1 in each row."""
    if _are_flags(table, file) and all(
        sum(bool(_flag(field)) for n, field in enumerate(fields) if n != file) == 1
        for _, fields in islice(table.rows(), 1, None)
    ):
        either = f"is {columns[kind]!r} the column of the classes, or one of several classes (one-hot)"
        raise ValueError(f"{either}? Give labels.class_column=, or another name to that column; {shown}")


def _hot(columns: list[str], fields: list[str], file: int, line: int) -> str:
    """The name of the column with the 1. Raises ValueError if there are several, or none."""
    ones = [columns[n] for n in range(len(columns)) if n != file and _flag(fields[n])]
    if len(ones) != 1:
        found = f"the classes {', '.join(ones[:5])}" if ones else "a 1 in no column"
        raise ValueError(f"line {line}: {fields[file]!r} has {found}; an image has one class (multi-label is not read)")
    return ones[0]


@lru_cache(1024)
def _flag(text: str) -> bool | None:
    """A number 0 or 1, or false or true, as a flag; None for anything else."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    return bool(float(text)) if NUMBER.fullmatch(text) and float(text) in (0, 1) else None


def _refuse_several_numbers(table: Table, kind: int) -> None:
    """Raise ValueError if blanks separate several numbers in place of a class: several classes, or columns."""
    if table.separator == BLANK and all(NUMBER.fullmatch(w) for _, f in table.rows() for w in f[kind].split()):
        for line, fields in table.rows():
            if " " in fields[kind]:
                found = f"{fields[0]!r} has the numbers {fields[kind][:60]}, not one class"
                raise ValueError(f"line {line}: {found}; if they are columns, give labels.class_column=")


def _are_numbers(table: Table, start: int) -> bool:
    """Whether all columns from number `start` (from 0) on hold numbers in all rows."""
    return all(NUMBER.fullmatch(field) for _, fields in table.rows() for field in fields[start:])


def _is_boxes(table: Table) -> bool:
    """Whether a box follows the class in every row, where tabs or blanks separate; rows of flags are no boxes."""
    if table.separator not in ("\t", BLANKS):
        return False
    flags = True
    for _, fields in table.rows():
        if len(fields) != 2 + BOX or not all(map(NUMBER.fullmatch, fields[2:])):
            return False
        flags = flags and {*fields[1:]} <= {"0", "1", "-1"}
    return not flags


def _index(name: str, columns: list[str]) -> int | None:
    """The column of a name, as it stands or without case, blanks, _ and -; None if there is none, or several."""
    if columns.count(name) == 1:
        return columns.index(name)
    alike = [number for number, column in enumerate(columns) if plain(column) == plain(name)]
    return alike[0] if len(alike) == 1 else None


def plain(name: str) -> str:
    """A column's name without case, blanks, _ and -."""
    return re.sub(r"[\s_-]+", "", name).casefold()
