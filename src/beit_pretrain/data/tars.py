"""Lists the members of an uncompressed tar without unpacking it: name, offset and size.

Archives are untrusted. A member that must not be read (its name leads outside, or it is a link, a device or a sparse
file) gets a negative size that gives the reason (`REFUSED`). A tar whose offsets run backwards, or with huge headers,
is refused as a whole.
"""

from __future__ import annotations

import io
import math
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from beit_pretrain.errors import UserError

# Negative sizes, and the reason why such members are not read.
OUTSIDE, LINK, DEVICE, SPARSE = -2, -3, -4, -5
REFUSED = {
    OUTSIDE: "its name leads outside the archive",
    LINK: "a link whose target is not in the archive before it is followed",
    DEVICE: "a device or a pipe, not a file",
    SPARSE: "a sparse file, which cannot be read in place",
}
LARGEST_HEADER = 2**20  # bytes of a long name or of pax fields


def scan_tar(path: Path, start: int = 0, stop: float = math.inf) -> Iterator[tuple[str, int, int]]:
    """Yield (name, offset, size) of the files of the uncompressed tar in the bytes `start` to `stop` of `path`.

    Hard links come last, with the offset and size of their target. A negative size is a key of `REFUSED`.
    Raises UserError if these bytes are not an uncompressed tar, or it is damaged.
    """
    links: list[tuple[str, str]] = []
    for member in _members(path, start, stop):
        if member.islnk():
            links.append((member.name, member.linkname))
        elif not member.isdir():
            yield member.name, *_place(member)
    if links:  # rare, so a second pass is cheaper than remembering all names
        wanted = {target for _, target in links}
        places = {m.name: _place(m) for m in _members(path, start, stop) if m.name in wanted and not m.islnk()}
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


def _members(path: Path, start: int, stop: float) -> Iterator[tarfile.TarInfo]:
    try:
        with _Headers(open(path, "rb", buffering=0)) as file:
            file.seek(start)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                before = -1
                for member in tar:
                    if member.offset >= stop:  # an inner tar without an end marker
                        return
                    if member.size < 0 or member.offset <= before or tar.offset <= member.offset:
                        raise tarfile.ReadError(f"runs backwards at byte {member.offset}")
                    before = member.offset
                    tar.members = []  # type: ignore[attr-defined]  # else each member keeps about 1 kB
                    yield member
                # tarfile takes a damaged header for the end of the archive and silently drops the rest.
                file.seek(tar.offset)
                if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                    raise tarfile.ReadError(f"damaged at byte {tar.offset}")
    except MemoryError:
        raise
    except Exception as error:  # tarfile raises nearly anything on hostile headers, RecursionError among others
        raise UserError(f"{path} is not a readable uncompressed tar: {error}") from None


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
