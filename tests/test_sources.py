"""Files listed from folders, tars and tars of tars, and errors for the others."""

import io
import os
import tarfile
from pathlib import Path

import pytest
from test_image_io import encoded

from beit_pretrain.data.left_out import LeftOut
from beit_pretrain.data.sources import Candidate, Choice, candidate_of, list_images, read_candidate, rows, units
from beit_pretrain.data.write.folder_classes import classes_of
from beit_pretrain.errors import UserError
from beit_pretrain.transforms.image_io import open_image

CLASSES = ("ant", "bee", "cat")


def class_files(labels_per_class: int = 6) -> dict[str, bytes]:
    return {f"{c}/{c}_{i}.jpg": encoded(100 * k + i) for k, c in enumerate(CLASSES) for i in range(labels_per_class)}


def write_folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def tar_bytes(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def list_candidates(
    sources: list[Path], split: str | None = "train", image_key: tuple[str, ...] = (), left_out: LeftOut | None = None
) -> list[Candidate]:
    """The candidates of all units of the sources with their classes, by key; prints the warnings."""
    left_out, choice = left_out or LeftOut(), Choice(split, image_key)
    listed = [unit for source in sources for unit in units(source, choice=choice, left_out=left_out)]
    found = [candidate_of(unit, row) for unit in listed for row in rows(unit, choice, left_out)]
    folders = sorted({c.class_name for c in found if c.class_name is not None})
    names, notes = classes_of(folders)
    for note in notes:
        left_out.note("classes", note)
    left_out.warn()
    of = dict(zip(folders, names, strict=True))
    return sorted((c._replace(class_name=of.get(c.class_name)) for c in found), key=lambda c: c.key)


def damaged_tar() -> bytes:
    data = bytearray(tar_bytes(class_files(2)))
    second = 512 + -(-len(next(iter(class_files(2).values()))) // 512) * 512
    data[second + 150] ^= 1  # the checksum of the second header: tarfile alone would stop here without a word
    return bytes(data)


def test_links_and_loops(tmp_path):
    src = write_folder(tmp_path / "src", {"ant/a.jpg": encoded(0), "bee/b.jpg": encoded(1)})
    os.symlink(src, src / "ant" / "loop")
    os.symlink(src / "bee", src / "again")  # sorts before bee, but the real folder names the class
    write_folder(tmp_path / "elsewhere", {"c.jpg": encoded(2)})
    os.symlink(tmp_path / "elsewhere", src / "cat")
    os.mkfifo(src / "ant" / "pipe.jpg")
    os.symlink(src / "ant" / "pipe.jpg", src / "ant" / "to_pipe.jpg")
    os.symlink(src / "self", src / "self")
    *images, broken = list_candidates([src])
    assert [c.key for c in images] == ["ant/a.jpg", "bee/b.jpg", "cat/c.jpg"]
    assert [c.class_name for c in images] == ["ant", "bee", "cat"]
    assert [read_candidate(c) for c in images] == [encoded(0), encoded(1), encoded(2)]
    assert broken.key == "self"
    with pytest.raises(OSError, match="symbolic link"):
        read_candidate(broken)


def test_inner_tar_without_end_mark(tmp_path):
    inner = tar_bytes({"a.jpg": encoded(0)})
    inner = inner[: 512 + -(-len(encoded(0)) // 512) * 512]
    (tmp_path / "x.tar").write_bytes(tar_bytes({"ant.tar": inner, "bee/b.jpg": encoded(1)}))
    found = list_candidates([tmp_path / "x.tar"])
    assert {c.key: c.class_name for c in found} == {"ant.tar/a.jpg": "ant", "bee/b.jpg": "bee"}
    assert [read_candidate(c) for c in found] == [encoded(0), encoded(1)]


def test_hard_links_and_repeated_members_of_a_tar(tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(tar_bytes({"ant/a.jpg": b"an earlier version", "../up.jpg": encoded(1)}))
    with tarfile.open(path, "a") as tar:
        for name, link in (("ant/a.jpg", None), ("bee/b.jpg", "ant/a.jpg")):
            info = tarfile.TarInfo(name)
            info.type = tarfile.LNKTYPE if link else tarfile.REGTYPE
            info.linkname, info.size = link or "", 0 if link else len(encoded(0))
            tar.addfile(info, io.BytesIO(encoded(0)))
    up, *others = list_candidates([path])
    assert {c.key: read_candidate(c) for c in others} == {"ant/a.jpg": encoded(0), "bee/b.jpg": encoded(0)}
    assert (up.key, up.class_name) == ("../up.jpg", None)
    with pytest.raises(ValueError, match="leads outside"):
        read_candidate(up)


@pytest.mark.parametrize(("others", "words"), [([], "devkit.tar.gz:"), (["z.tgz", "sub/y.TAR.XZ"], "and 2 more:")])
def test_compressed_tars_beside_images_are_left_out_with_a_warning(others, words, tmp_path, capsys):
    src = write_folder(tmp_path, {"all.tar": tar_bytes(class_files(1)), "devkit.tar.gz": b"x"})
    write_folder(tmp_path, dict.fromkeys(others, b"x"))
    assert [c.key for c in list_candidates([src])] == [f"all.tar/{name}" for name in class_files(1)]
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("warning: left out devkit.tar.gz")
    assert words in err
    assert err.count("\n") == 1


def test_compressed_tars_alone_are_refused(tmp_path, capsys):
    write_folder(tmp_path / "src", {"b.tgz": b"x", "a.tar.gz": b"x", "notes.txt": b"x"})
    write_folder(tmp_path / "other", {"a.jpg": encoded(0)})
    for sources in ([tmp_path / "src"], [tmp_path / "other", tmp_path / "src"], [tmp_path / "src" / "a.tar.gz"]):
        with pytest.raises(UserError, match=r"a\.tar\.gz is compressed.*decompress"):
            list_candidates(sources)
    assert capsys.readouterr().err == ""


def test_list_images(tmp_path):
    files = class_files(2)
    folder = write_folder(tmp_path / "folder", files | {"notes.txt": b"x", "ant/.hidden.jpg": b"x"})
    (tmp_path / "images.tar").write_bytes(tar_bytes(files))
    for src in (folder, str(folder), tmp_path / "images.tar"):
        found = list_images(src)
        assert {c.key: read_candidate(c) for c in found} == files
        assert [c.key for c in found] == sorted(files)
    (single,) = list_images(folder / "ant" / "ant_0.jpg")
    assert single.key == "ant_0.jpg"
    with open_image(read_candidate(single)) as image:
        assert image.size == (24, 18)


def test_list_images_without_any(tmp_path):
    write_folder(tmp_path, {"only/notes.txt": b"x", "a.tgz": b"x", "bad.tar": damaged_tar()})
    (tmp_path / "empty").mkdir()
    for name, words in (
        ("missing", "does not exist; give an image, a folder of images, or a tar"),
        ("synthetic", "does not exist"),
        ("empty", "holds no image"),
        ("only", "holds no image"),
        ("only/notes.txt", "holds no image"),
        ("a.tgz", "decompress"),
        ("bad.tar", "damaged at byte"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            list_images(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_refuses_files_too_large_for_an_image(tmp_path):
    (tmp_path / "film").write_bytes(bytes(2**20 + 17))
    (film,) = list_images(tmp_path / "film")
    assert len(read_candidate(film, max_pixels=2)) == 2**20 + 17
    with pytest.raises(ValueError, match="too many for an image of max_pixels=1"):
        read_candidate(film, max_pixels=1)
