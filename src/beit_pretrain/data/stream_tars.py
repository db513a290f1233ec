"""The samples of a WebDataset tar in the order of its members, read once by webdataset's own pipeline.

webdataset reads the members and groups them by key; which member of a group is the image and which the class is chosen
as in the index of a tar (`shard_index.gather`). A stream sees no further than a group, so it differs from the index in
a few tars: hard links are not followed, label maps in files of their own are left out only after their photo has been
seen, and members that belong together must follow one another.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import Any, BinaryIO

from beit_pretrain.data import label_map_names, layout
from beit_pretrain.data.left_out import LeftOut
from beit_pretrain.data.settings import RemoteOptions
from beit_pretrain.data.shard_index import NUMBERS, SampleMembers, gather, wanted
from beit_pretrain.data.storage import without_secrets
from beit_pretrain.data.stream_file import BLOCK, open_stream
from beit_pretrain.data.tars import LARGEST_HEADER
from beit_pretrain.errors import UserError, first_line

MOST = 64  # members of one stem, numbered and without a plain one, that are grouped together
BLOCKSIZE = tarfile.BLOCKSIZE
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ")


def read_tar(url: str, options: RemoteOptions, image_key: Sequence[str] = ()) -> Iterator[SampleMembers | None]:
    """The samples with an image of the tar at a path or an address, in its order; None for a group without an image.

    The places of a sample's members are their bytes. Raises UserError, one line with the address, if the tar cannot be
    received or read to its end.
    """
    from webdataset.pipeline import DataPipeline
    from webdataset.tariterators import group_by_keys, tar_file_expander

    where = without_secrets(url)
    names = _Names()
    with closing(open_stream(url, options)) as opened:
        file = _TarFile(opened, where)
        pipeline = DataPipeline(
            lambda: iter([{"url": where, "stream": file}]),
            partial(tar_file_expander, select_files=names.select),
            partial(group_by_keys, keys=names.group, lcase=False),
        )
        try:
            for group in pipeline:
                yield from _samples(group, where, names, image_key)
            file.check_end()
        except UserError as error:
            raise file.error or error from None
        except Exception as error:  # webdataset and tarfile raise nearly anything on broken tars
            if file.error is not None:
                raise file.error from None
            if isinstance(error, MemoryError):
                raise UserError(f"not enough memory to read {where}; fewer workers need less memory") from None
            said = str(error.args[0]) if error.args else type(error).__name__
            why = said.partition(" @ ")[0].strip() or type(error).__name__  # webdataset adds the file object
            raise UserError(f"{where} cannot be read as a tar: {first_line(ValueError(why))}") from None


def _samples(
    group: dict[str, Any], where: str, names: _Names, image_key: Sequence[str]
) -> Iterator[SampleMembers | None]:
    """The samples of one group of webdataset: more than one where numbers belong to the keys."""
    members: list[tuple[str, bytes, int]] = [(n, d, len(d)) for n, d in group.items() if not n.startswith("__")]
    members += [(name, b"", 0) for name in names.unread(members[0][0])] if members else []
    samples = gather(where, members, lambda data, most: data[:most], image_key, LeftOut(), names.is_map)
    for sample in samples:
        yield sample if "image" in sample.places else None


class _Names:
    """What the names of a tar's members say, in their order: which to read, and which belong together."""

    def __init__(self) -> None:
        self.groups = 0
        self.key = ""
        self.extensions: set[str] = set()  # of the group of members of `key`
        self.number = ""
        self.plain: dict[str, str] = {}  # key -> a member without a number that is not read
        self.photos: set[str] = set()  # subjects, with their folders and without

    def select(self, name: str) -> bool:
        """Whether a member must be read; the others are skipped."""
        if wanted(name):
            return True
        key, extension = layout.split_key(name)
        if "." not in extension:
            self.plain[key] = name
        return False

    def group(self, name: str) -> tuple[str, str]:
        """The group of a member that is read, for webdataset, and its name in the group."""
        key, extension = layout.split_key(name)
        found = NUMBERS.match(extension)
        number = found[1] if found else ""
        only_numbers = key not in self.plain and all("." in extension for extension in self.extensions)
        ended = len(self.extensions) >= MOST and only_numbers and number != self.number
        if key != self.key or extension in self.extensions or ended:
            self.groups, self.key, self.extensions = self.groups + 1, key, set()
        self.extensions.add(extension)
        self.number = number
        return str(self.groups), name

    def unread(self, name: str) -> list[str]:
        """Members that were not read of the group of this one, where they matter: they are plain."""
        key = layout.split_key(name)[0]
        return [self.plain[key]] if key in self.plain else []

    def is_map(self, key: str, name: str) -> bool:
        """Whether an image is a label map of a photo that came before it, by its name or its folder's."""
        folder, slash, stem = key.rpartition("/")
        subject = label_map_names.subject(stem)
        if slash and layout.says_maps(folder.rpartition("/")[2]):
            return subject.name in self.photos
        if subject.kind != "photo":
            return folder + slash + subject.name in self.photos
        self.photos |= {folder + slash + subject.name} | ({subject.name} if slash else set())
        return False


class _TarFile:
    """A file for webdataset: keeps the error that reading raised, and checks how the tar ended.

    tarfile takes zeros, the end of the file and a damaged header alike for the end, so the headers are followed here.
    Checksums, which take longer than all else, are left to tarfile: where it stopped, at the end, they are looked at.
    """

    def __init__(self, file: BinaryIO, where: str):
        self.file, self.where = file, where
        self.error: UserError | None = None
        self.size = 0  # bytes read
        self.header: int | None = 0  # offset of the next header; None = not followed any more
        self.end: int | None = None  # offset of the end mark
        self.damaged: int | None = None  # offset of a damaged header
        self.last: list[tuple[int, bytes]] = []  # offsets and blocks of the headers of the last bytes that tarfile got
        self.more = False  # whether there are headers after the end mark

    def read(self, size: int = -1) -> bytes:
        try:
            data = self.file.read(size)
        except UserError as error:
            self.error = type(error)(str(error))  # webdataset adds to the arguments of what it sees
            raise
        except OSError as error:
            self.error = UserError(f"{self.where} cannot be read: {error.strerror or error}")
            raise self.error from None
        if not self.size and data.startswith(COMPRESSED):
            self.header = None
        if self.header is not None and self.header - self.size < len(data):
            self._follow(data)
        if self.end is not None:
            starts = range(max(0, self.end - self.size), len(data), BLOCKSIZE)
            self.more = self.more or any(data[i + 257 : i + 262] == b"ustar" for i in starts)
        self.size += len(data)
        return data

    def _follow(self, data: bytes) -> None:
        """Find the headers in the bytes that come now."""
        self.last = []
        while self.header is not None and (start := self.header - self.size) <= len(data) - BLOCKSIZE:
            here, block = self.header, data[start : start + BLOCKSIZE]
            self.header = None
            if not any(block):
                self.end = here
                return
            self.last.append((here, block))
            kind = block[156:157]
            if kind == b"S" or (kind in b"xg" and b" size=" in data[start + BLOCKSIZE :][:LARGEST_HEADER]):
                return  # what follows is not as long as this header says
            try:
                size = int(block[124:135], 8) if block[124] < 128 else int.from_bytes(block[125:136], "big")
            except ValueError:
                self.damaged = here
                return
            self.header = here + BLOCKSIZE * (1 + (0 if kind in b"123456" and kind else -(-size // BLOCKSIZE)))

    def check_end(self) -> None:
        """Read the rest. Raises UserError unless the tar, which tarfile takes for ended, ended as tars do."""
        for here, block in self.last:
            try:
                tarfile.TarInfo.frombuf(block, tarfile.ENCODING, "surrogateescape")
            except tarfile.HeaderError:
                self.damaged, self.header = here, None
                break
        while self.damaged is None and self.read(BLOCK):
            pass
        if self.damaged is not None:
            raise UserError(f"{self.where} is damaged at byte {self.damaged:,}")
        if self.header is not None and self.size != self.header:
            raise UserError(f"{self.where} breaks off after {self.size:,} bytes")
        if self.more:
            raise UserError(f"{self.where} holds more files after its end mark, which only data.order=position reads")
