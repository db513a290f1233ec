"""Hostile archives: nothing outside them is read, and errors take one line."""

import io
import tarfile
from pathlib import Path

import pytest
from test_image_io import encoded

from beit_pretrain.data import tars
from beit_pretrain.data.tars import DEVICE, LINK, OUTSIDE, SPARSE, scan_tar
from beit_pretrain.errors import UserError


def member(
    name: str, kind: bytes = tarfile.REGTYPE, link: str = "", data: bytes = b""
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, len(data)
    return info, data


HOSTILE = {
    "../up.jpg": (member("../up.jpg", data=encoded(0)), OUTSIDE),
    "a/../../up.jpg": (member("a/../../up.jpg", data=encoded(0)), OUTSIDE),
    "/etc/abs.jpg": (member("/etc/abs.jpg", data=encoded(0)), OUTSIDE),
    "sym.jpg": (member("sym.jpg", tarfile.SYMTYPE, "/etc/passwd"), LINK),
    "hard.jpg": (member("hard.jpg", tarfile.LNKTYPE, "/etc/passwd"), LINK),
    "null.jpg": (member("null.jpg", tarfile.CHRTYPE), DEVICE),
    "disk.jpg": (member("disk.jpg", tarfile.BLKTYPE), DEVICE),
    "pipe.jpg": (member("pipe.jpg", tarfile.FIFOTYPE), DEVICE),
}


def hostile_tar(path: Path) -> Path:
    """A tar with one good image and everything that is refused."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for (info, data), _ in HOSTILE.values():
            tar.addfile(info, io.BytesIO(data))
        tar.addfile(*(lambda info, data: (info, io.BytesIO(data)))(*member("good.jpg", data=encoded(1))))
    return path


def test_members_that_are_refused(tmp_path):
    found = {name: size for name, _, size in scan_tar(hostile_tar(tmp_path / "x.tar"))}
    assert found == {name: size for name, (_, size) in HOSTILE.items()} | {"good.jpg": len(encoded(1))}


def test_sparse_members(tmp_path):
    info, _ = member("holes.jpg", tarfile.GNUTYPE_SPARSE)
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "x.tar").write_bytes(bytes(header) + bytes(1024))
    assert list(scan_tar(tmp_path / "x.tar")) == [("holes.jpg", 0, SPARSE)]


def tar_of(*names: str, end: bool = True) -> bytes:
    """A tar of files of a block each."""
    headers = (member(name, data=b"x" * 512) for name in names)
    return b"".join(info.tobuf(tarfile.GNU_FORMAT) + data for info, data in headers) + bytes(1024 * end)


BEHIND, NO_TAR, NO_END = "more files behind it", "that are no tar", "has no end mark"


@pytest.mark.parametrize(
    ("data", "names", "notes"),
    [
        (tar_of("a", "b"), "ab", []),
        (tar_of("a", "b") + bytes(9 * 512), "ab", []),  # filled up to a record
        (tar_of("a", "b", end=False), "ab", [NO_END]),
        (tar_of("a") + tar_of("b", "c"), "abc", [BEHIND]),  # cat a.tar b.tar
        (tar_of("a") + bytes(2**21) + tar_of("b") + bytes(512) + tar_of("c"), "abc", [BEHIND, BEHIND]),
        (tar_of("a") + b"no tar".ljust(512), "a", [NO_TAR]),
        # Holes of a download: a whole member; from within one to within another; to the end.
        (tar_of("a", end=False) + bytes(1024) + tar_of("c"), "ac", [BEHIND]),
        (tar_of("a", end=False)[:512] + bytes(1024) + b"x" * 512 + tar_of("c"), "ac", [NO_TAR]),
        (tar_of("a", end=False) + bytes(4096), "a", []),
    ],
)
def test_what_lies_behind_an_end_mark(data, names, notes, tmp_path):
    for before in (b"", b"before it".ljust(512)):
        (tmp_path / "x.tar").write_bytes(before + data)
        found: list[str] = []
        assert [name for name, *_ in scan_tar(tmp_path / "x.tar", len(before), notes=found)] == list(names)
        assert len(found) == len(notes)
        assert all(words in text for words, text in zip(notes, found, strict=True))


def test_a_hole_of_the_file_system(tmp_path):
    """A download of a terabyte whose space was reserved is not read through."""
    with open(tmp_path / "x.tar", "wb") as file:
        file.write(tar_of("a"))
        file.seek(2**40)
        file.write(tar_of("b"))
        file.truncate(2**41)
    assert [(name, offset) for name, offset, _ in scan_tar(tmp_path / "x.tar")] == [("a", 512), ("b", 2**40 + 512)]


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
@pytest.mark.parametrize("name", ["a.jpg", "v1.0/" + "long" * 20 + "/" + "x" * 90 + ".jpg", "ü" * 40 + ".1.jpg"])
def test_names_from_the_bytes_before_a_member(kind, name, tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w", format=kind) as tar:
        for each in ("before.jpg", name):
            info, data = member(each, data=encoded(0))
            tar.addfile(info, io.BytesIO(data))
    data = (tmp_path / "x.tar").read_bytes()
    (*_, (_, offset, _)) = scan_tar(tmp_path / "x.tar")
    assert tars.member_name(data[:offset]) == name
    assert tars.member_name(data[max(0, offset - tars.LONGEST_HEADERS) : offset]) == name


def huge_file() -> bytes:
    info, _ = member("big.jpg")
    info.size = 8 * 2**40
    return info.tobuf(tarfile.GNU_FORMAT) + bytes(2048)


def huge_name() -> bytes:
    info, _ = member("././@LongLink", tarfile.GNUTYPE_LONGNAME)
    info.size = 2**33
    return info.tobuf(tarfile.GNU_FORMAT) + bytes(2048)


def negative_size() -> bytes:
    info, _ = member("back.jpg")
    info.size = -512
    return info.tobuf(tarfile.GNU_FORMAT) + bytes(2048)


def endless_pax() -> bytes:
    record = b"11 path=aaa\n"
    info, _ = member("pax", tarfile.XHDTYPE, data=record)
    return (info.tobuf(tarfile.USTAR_FORMAT) + record.ljust(512, b"\0")) * 5000


def negative_pax_size() -> bytes:
    record = b"14 size=-1024\n"
    pax, _ = member("pax", tarfile.XHDTYPE, data=record)
    info, _ = member("back.jpg", data=b"x" * 512)
    return pax.tobuf(tarfile.USTAR_FORMAT) + record.ljust(512, b"\0") + info.tobuf(tarfile.USTAR_FORMAT) + bytes(2048)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("build", [huge_file, huge_name, negative_size, endless_pax, negative_pax_size])
def test_archives_that_are_refused(build, tmp_path):
    (tmp_path / "x.tar").write_bytes(build())
    with pytest.raises(UserError, match="not a readable uncompressed tar") as caught:
        list(scan_tar(tmp_path / "x.tar"))
    assert "\n" not in str(caught.value)


def test_inside():
    assert all(map(tars.inside, ("a.jpg", "a/b..jpg", "./a", "..a/b")))
    assert not any(map(tars.inside, ("..", "a/..", "/a", "../a", "a\0b")))
