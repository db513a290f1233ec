"""Lists the members of an uncompressed tar without unpacking it: name, offset and size.

Archives are untrusted. A member that must not be read (its name leads outside, or it is a link, a device or a sparse
file) gets a negative size that gives the reason (`REFUSED`). A tar whose offsets run backwards, or with huge headers,
is refused as a whole.
"""

from __future__ import annotations

import errno
import io
import math
import os
import tarfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

import numpy as np

from beit_pretrain.errors import UserError

# Negative sizes, and the reason why such members are not read.
OUTSIDE, LINK, DEVICE, SPARSE = -2, -3, -4, -5
REFUSED = {
    OUTSIDE: "its name leads outside the archive",
    LINK: "a link whose target is not in the archive before it is followed",
    DEVICE: "a device or a pipe, not a file",
    SPARSE: "a sparse file, which cannot be read in place",
}
LONGEST_HEADERS = 2**14  # bytes of all headers of a member whose name is wanted
LARGEST_HEADER = 2**20  # bytes of a long name or of pax fields


def scan_tar(
    path: Path, start: int = 0, stop: float = math.inf, notes: list[str] | None = None
) -> Iterator[tuple[str, int, int]]:
    """Yield (name, offset, size) of the files of the uncompressed tar in the bytes `start` to `stop` of `path`.

    Hard links come last, with the offset and size of their target. A negative size is a key of `REFUSED`. Members after
    an end mark are read too (`cat a.tar b.tar`, a download with a hole); `notes` gets a line for anything of this kind.
    Raises UserError if these bytes are not an uncompressed tar, or it is damaged.
    """
    links: list[tuple[str, str]] = []
    for member in _members(path, start, stop, [] if notes is None else notes):
        if member.islnk():
            links.append((member.name, member.linkname))
        elif not member.isdir():
            yield member.name, *_place(member)
    if links:  # rare, so a second pass is cheaper than remembering all names
        wanted = {target for _, target in links}
        again = _members(path, start, stop, [])
        places = {m.name: _place(m) for m in again if m.name in wanted and not m.islnk()}
        for name, target in links:
            yield name, *(places.get(target, (0, LINK)) if inside(name) else (0, OUTSIDE))


def inside(name: str) -> bool:
    """Whether a member's name stays within the archive's folder."""
    return not name.startswith("/") and "\0" not in name and (".." not in name or ".." not in name.split("/"))


def _place(member: tarfile.TarInfo) -> tuple[int, int]:
    if not inside(member.name):
        return 0, OUTSIDE
    if member.issym():
        return 0, LINK
    if not member.isreg():
        return 0, DEVICE
    return (0, SPARSE) if member.issparse() else (member.offset_data, member.size)


class _Headers(io.BufferedReader):
    """A file for tarfile, which reads only headers; raises ReadError for one larger than `LARGEST_HEADER` bytes."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= LARGEST_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes at byte {self.tell()}")
        return super().read(size)


def _members(path: Path, start: int, stop: float, notes: list[str]) -> Iterator[tarfile.TarInfo]:
    try:
        with _Headers(open(path, "rb", buffering=0)) as file:
            before, at = -1, start
            while True:
                file.seek(at)
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    for member in tar:
                        if member.offset >= stop:  # an inner tar without an end marker
                            break
                        if member.size < 0 or member.offset <= before or tar.offset <= member.offset:
                            raise tarfile.ReadError(f"runs backwards at byte {member.offset}")
                        before = member.offset
                        tar.members = []  # type: ignore[attr-defined]  # else each member keeps about 1 kB
                        yield member
                    end = int(min(tar.offset, stop))
                if (again := _after_end(file, end, stop, notes)) is None:
                    return
                at = again
    except MemoryError:
        raise
    except Exception as error:  # tarfile raises nearly anything on hostile headers, RecursionError among others
        raise UserError(f"{path} is not a readable uncompressed tar: {error}") from None


def _after_end(file: _Headers, end: int, stop: float, notes: list[str]) -> int | None:
    """Where members go on after the place `end` at which tarfile stopped; None: nowhere. Adds what it found to `notes`.

    tarfile takes zeros, the end of the file and a damaged header alike for the end of the archive.
    Raises ReadError for a damaged header.
    """
    last = int(min(file.seek(0, io.SEEK_END), stop))
    if end >= last:
        notes.append("has no end mark, and may have been cut short; its files are read")
        return None
    if (found := _first_block(file, end, last, _has_content)) is None:
        return None  # zeros, as it should be
    if found == end:
        raise tarfile.ReadError(f"damaged at byte {end}")
    if _is_header(file, found):
        notes.append("has an end mark with more files behind it, which are read too; in a download it may be a hole")
        return found
    header = _first_block(file, found, last, _has_magic)
    while header is not None and not _is_header(file, header):
        header = _first_block(file, header + tarfile.BLOCKSIZE, last, _has_magic)
    lost = (last if header is None else header) - found
    notes.append(f"has {lost:,} bytes behind an end mark that are no tar, such as the rest of a damaged file; left out")
    return header


def _has_content(blocks: np.ndarray) -> np.ndarray:
    return np.asarray(blocks.any(axis=1))


def _has_magic(blocks: np.ndarray) -> np.ndarray:
    return np.all(blocks[:, 257:262] == np.frombuffer(b"ustar", np.uint8), axis=1)


def _first_block(file: _Headers, start: int, stop: int, wanted: Callable[[np.ndarray], np.ndarray]) -> int | None:
    """The first block from `start` on that is wanted, by a function of blocks (N, 512) uint8."""
    at = start
    while at < stop:
        try:  # jumps over holes of the file system
            at += (os.lseek(file.fileno(), at, os.SEEK_DATA) - at) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
        except (OSError, AttributeError) as error:
            if getattr(error, "errno", None) == errno.ENXIO:  # only a hole is left
                return None
        file.seek(at)
        data = file.read(int(min(LARGEST_HEADER, stop - at)))
        if not data:
            return None
        padded = data + bytes(-len(data) % tarfile.BLOCKSIZE)
        found = np.flatnonzero(wanted(np.frombuffer(padded, np.uint8).reshape(-1, tarfile.BLOCKSIZE)))
        if found.size:
            return at + int(found[0]) * tarfile.BLOCKSIZE
        at += len(padded)
    return None


def _is_header(file: _Headers, offset: int) -> bool:
    file.seek(offset)
    try:
        tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), tarfile.ENCODING, "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def member_name(before: bytes) -> str:
    """The name of a member whose data follow the bytes `before`, of which the last `LONGEST_HEADERS` are enough.

    A long name (formats of GNU and pax) is in headers of its own before the last one.
    """
    block = tarfile.BLOCKSIZE
    for start in range(len(before) % block, len(before), block):
        if start < len(before) - block and before[start + 156 : start + 157] not in (b"L", b"K", b"x"):
            continue
        with suppress(Exception):  # bytes that look like a header may be anything
            file = io.BytesIO(before[start:] + bytes(block))
            with tarfile.open(fileobj=file, mode="r:", errors="surrogateescape") as tar:
                member = tar.next()
                if member is not None and member.offset_data == len(before) - start:
                    return member.name
    return ""


def read_named(source: Path, names: set[str], largest: int, total: float = math.inf) -> dict[str, bytes]:
    """Content of the files `names`, from a folder (or its folder `data`) or anywhere in a tar, compressed or not.

    Raises ValueError if one is missing or, in a tar, larger than `largest` bytes, or if all members exceed `total`.
    """
    found: dict[str, bytes] = {}
    if source.is_dir():
        files = [folder / name for folder in (source / "data", source) for name in names]
        found = {file.name: file.read_bytes() for file in files if file.is_file()}
    else:
        with tarfile.open(source) as tar:
            for member in tar:
                total -= member.size
                name = PurePosixPath(member.name).name
                if total < 0 or (name in names and member.size > largest):
                    raise ValueError(f"its file {name} is too large")
                if name in names and member.isreg() and (file := tar.extractfile(member)):
                    found[name] = file.read()
    if missing := names - found.keys():
        raise ValueError(f"it lacks the file {min(missing)}")
    return found
