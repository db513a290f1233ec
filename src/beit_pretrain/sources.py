"""Which files of a folder, a tar, a single file or the synthetic set may be images, and the bytes of each.

Nothing is decoded here: a candidate is a place to read from, and whether an image lies there shows when it is opened.
"""

from __future__ import annotations

import math
import os
import re
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple, NoReturn

from beit_pretrain import synthetic
from beit_pretrain.errors import UserError
from beit_pretrain.images import MAX_PIXELS

NOT_IMAGES = re.compile(
    r"\.(txt|jsonl?|[ct]sv|xml|ya?ml|toml|ini|md|rst|html?|pdf|log|db|py|sh|cls|lst|idx|np[yz]|mat|h5|hdf5|pkl|pth?)"
    r"|\.(safetensors|parquet|zip|7z|rar|gz|bz2|xz|zst|mp[34]|wav|avi|mov|mkv)"
)
COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")


class Candidate(NamedTuple):
    """A source file that may be an image."""

    key: str  # path within the source; the name of the file if that is the source
    class_name: str | None
    path: str  # file that holds the bytes; "" = image `offset` of the synthetic set
    offset: int = 0
    size: int = -1  # bytes; -1 = the whole file


def list_candidates(sources: Sequence[str | Path], images: int = 0) -> list[Candidate]:
    """Every file of the folders and tars that may be an image, in an order that depends on names alone.

    `["synthetic"]` gives the first `images` of the synthetic set. Raises UserError for a source without a candidate or
    one that cannot be read.
    """
    if list(sources) == ["synthetic"]:
        names = [synthetic.TEXTURES[i % len(synthetic.TEXTURES)] for i in range(images)]
        return [Candidate(f"synthetic/{i}", name, "", i) for i, name in enumerate(names)]
    listed: list[Candidate] = []
    for source in (Path(source).expanduser() for source in sources):
        prefix = f"{source.name}/" if len(sources) > 1 else ""
        found = _source_candidates(source, "give a folder of class folders, a tar, or synthetic")
        listed += [c._replace(key=prefix + c.key) for c in found]
    return listed


def list_images(src: str | Path) -> list[Candidate]:
    """What may be an image in `src`, an image file, a folder of any depth or a tar, by name. Raises UserError."""
    return _source_candidates(Path(src).expanduser(), "give an image, a folder of images, or a tar")


def read_candidate(candidate: Candidate, max_pixels: int = MAX_PIXELS) -> bytes:
    """The bytes of a candidate that is not of the synthetic set.

    Raises OSError, or ValueError if these are more than an image of `max_pixels` could have.
    """
    size = candidate.size if candidate.size >= 0 else os.path.getsize(candidate.path)
    if size > 16 * max_pixels + 2**20:  # a film or a disk image, say: not to be read into memory
        raise ValueError(f"{size} bytes are too many for an image of max_pixels={max_pixels}")
    return read_bytes(candidate.path, candidate.offset, size)


def read_bytes(path: str | Path, offset: int, size: int) -> bytes:
    """`size` bytes of a file from `offset` on."""
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(size)


def _source_candidates(source: Path, advice: str) -> list[Candidate]:
    """The candidates of one folder or file, by name. Raises UserError, with the advice, if there is none."""
    if not os.path.exists(source):
        raise UserError(f"src={source} does not exist; {advice}")
    found = _folder_candidates(source) if source.is_dir() else _file_candidates(source, "")
    if not found:
        raise UserError(f"src={source} holds no image; {advice}")
    return sorted(found, key=lambda c: c.key)


def _folder_candidates(root: Path) -> list[Candidate]:
    """The candidates of a folder tree. Of compressed tars beside them (ImageNet's devkit, say) a warning tells.

    Raises UserError if there is nothing but compressed tars.
    """
    found: list[Candidate] = []
    compressed: list[Path] = []
    for path, key in _files(root):
        if _compressed(path):
            compressed.append(path)
        else:
            found += _file_candidates(path, key)
    if compressed:
        first = min(compressed)
        if not found:
            _refuse_compressed(first)
        more = f" and {len(compressed) - 1} more" if len(compressed) > 1 else ""
        print(f"warning: left out {first}{more}: compressed tars; decompress what holds images", file=sys.stderr)
    return found


def _files(root: Path) -> Iterator[tuple[Path, str]]:
    """Yield path and key of every file in a folder tree that is not hidden.

    Linked folders come after real ones and none is read twice, so loops end.
    """
    seen: set[tuple[int, int]] = set()
    folders, links = [(str(root), "")], list[tuple[str, str]]()
    while folders or links:
        folder, prefix = folders.pop() if folders else links.pop(0)
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            # scandir knows files from folders without a call per file, which counts on network file systems.
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(f"cannot read the folder {folder}: {error.strerror}") from None
        for entry in (entry for entry in entries if not _ignored(entry.name)):
            linked = entry.is_symlink()
            if os.path.isdir(entry.path) if linked else entry.is_dir():
                (links if linked else folders).append((entry.path, f"{prefix}{entry.name}/"))
            elif entry.is_file(follow_symlinks=False) or (linked and not _special(entry.path)):
                yield Path(entry.path), prefix + entry.name


def _special(path: str) -> bool:
    """Whether a link leads to a pipe or a device. One that leads nowhere does not: it is to be listed as rejected."""
    return os.path.exists(path) and not os.path.isfile(path)


def _file_candidates(path: Path, key: str) -> list[Candidate]:
    """The candidates of one file; `key` is its path within the source folder, "" if the file is the source."""
    if _compressed(path):
        _refuse_compressed(path)
    if path.suffix.lower() == ".tar":
        return _tar_candidates(path, f"{key}/" if key else "")
    key = key or path.name
    return [] if NOT_IMAGES.fullmatch(path.suffix.lower()) else [Candidate(key, _class_of(key), str(path))]


def _compressed(path: Path) -> bool:
    return path.name.lower().endswith(COMPRESSED_TARS)


def _refuse_compressed(path: Path) -> NoReturn:
    raise UserError(f"{path} is compressed, which allows no random access; decompress it first, or move it away")


def _tar_candidates(path: Path, prefix: str) -> list[Candidate]:
    """The candidates in a tar and in the tars inside it (ImageNet's training tar is a tar of tars)."""
    found: dict[str, Candidate] = {}  # the last of several members of one name counts, as when unpacking

    def add(name: str, offset: int, size: int) -> None:
        key = PurePosixPath(name).as_posix()
        if not _ignored(key) and not NOT_IMAGES.fullmatch(PurePosixPath(key).suffix.lower()):
            found[key] = Candidate(prefix + key, _class_of(prefix + key), str(path), offset, size)

    for name, offset, size in scan_tar(path):
        if not name.lower().endswith(".tar"):
            add(name, offset, size)
        elif not _ignored(name):
            for inner, inner_offset, inner_size in scan_tar(path, offset, offset + size):
                add(f"{name}/{inner}", inner_offset, inner_size)
    return list(found.values())


def _ignored(key: str) -> bool:
    """Whether a file or one of its folders is hidden, or (`._x`, `__MACOSX`) a macOS archive's by-product."""
    return any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(key).parts)


def _class_of(key: str) -> str | None:
    """The name of the folder that holds the file, or of the tar in a folder (or tar) of tars."""
    return PurePosixPath(key).parent.name.removesuffix(".tar") or None


def scan_tar(path: Path, start: int = 0, stop: float = math.inf) -> Iterator[tuple[str, int, int]]:
    """Yield (name, offset, size) of the files in the uncompressed tar in the bytes `start` to `stop` of `path`.

    Raises UserError if it is no such tar, or a damaged one.
    """
    spans: dict[str, tuple[int, int]] = {}
    try:
        with open(path, "rb") as file:
            file.seek(start)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    if member.offset >= stop:  # an inner tar without an end mark
                        return
                    tar.members = []  # type: ignore[attr-defined]  # else each member keeps about 1 kB
                    if member.islnk() and member.linkname in spans:
                        spans[member.name] = spans[member.linkname]
                    elif member.isreg():
                        spans[member.name] = member.offset_data, member.size
                    else:
                        continue
                    yield member.name, *spans[member.name]
                # tarfile takes a damaged header for the end of the archive and would drop the rest in silence.
                file.seek(tar.offset)
                if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                    raise tarfile.ReadError(f"damaged at byte {tar.offset}")
    except (tarfile.TarError, OSError, ValueError) as error:
        raise UserError(f"{path} is not a readable uncompressed tar: {error}") from None
