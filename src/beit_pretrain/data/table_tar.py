"""The plain tar of WebDataset that the rows of a table are unpacked into."""

from __future__ import annotations

import tarfile
from collections.abc import Iterable
from typing import Any, BinaryIO

ROW_BYTES = 2048  # of a tar, beside the image: two headers, the class, padding
END_BYTES = 20480  # of a tar
EXTENSIONS = {b"\x89PNG": "png", b"GIF8": "gif", b"RIFF": "webp", b"BM": "bmp", b"II*\0": "tif", b"MM\0*": "tif"}


def write_tar(samples: Iterable[tuple[Any, int]], out: BinaryIO) -> None:
    """Write (bytes of an image, class number or -1) as a plain tar of WebDataset: 00000000.jpg, 00000000.cls, ..."""
    for number, (image, label) in enumerate(samples):
        _add(out, f"{number:08d}.{extension_of(image)}", memoryview(image))
        if label >= 0:
            _add(out, f"{number:08d}.cls", memoryview(str(label).encode()))
    out.write(bytes(2 * tarfile.BLOCKSIZE))


def _add(out: BinaryIO, name: str, data: memoryview) -> None:
    member = tarfile.TarInfo(name)  # owner, mode and time are constants
    member.size = data.nbytes
    out.write(member.tobuf(tarfile.GNU_FORMAT))
    out.write(data)
    out.write(bytes(-data.nbytes % tarfile.BLOCKSIZE))


def extension_of(image: Any) -> str:
    """The extension for the name of an image by its first bytes."""
    head = bytes(memoryview(image)[:4])
    return next((name for start, name in EXTENSIONS.items() if head.startswith(start)), "jpg")
