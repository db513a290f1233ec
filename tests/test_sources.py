"""Files listed from folders, tars and tars of tars, and errors for the others."""

import io
import os
import tarfile
from pathlib import Path

import pytest
from test_image_io import encoded

from beit_pretrain.data import layout
from beit_pretrain.data.left_out import LEFT_OUT, LeftOut
from beit_pretrain.data.listing.file_index import build_listing
from beit_pretrain.data.listing.folder_classes import classes_of
from beit_pretrain.data.listing.settings import LabelSettings
from beit_pretrain.data.sources import TRAIN, Candidate, Choice, candidate_of, list_images, read_candidate, rows, units
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
        ("missing", "does not exist; give an image, a folder of images, a tar, or a parquet file"),
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


JUNK = (
    "cat/._1.jpg",
    "cat/@eaDir/1.jpg/SYNOPHOTO_THUMB_M.jpg",
    "$RECYCLE.BIN/$R1.jpg",
    "#recycle/1.jpg",
    ".Trashes/1.jpg",
)
WINDOWS = ("System Volume Information/1.jpg", "cat/Thumbs.db", "cat/.ipynb_checkpoints/1.jpg")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("files", "found", "left_out", "warnings"),
    [
        # By-products are no images and no classes.
        (("cat/1.jpg", *JUNK), {"cat/1.jpg": "cat"}, len(JUNK), 0),
        (("cat/1.jpg", *WINDOWS), {"cat/1.jpg": "cat"}, len(WINDOWS), 0),
        # Label maps beside photos.
        (("images/1.jpg", "masks/1.png"), {"images/1.jpg": None}, 1, 1),
        (("JPEGImages/1.jpg", "SegmentationClass/1.png"), {"JPEGImages/1.jpg": None}, 1, 1),
        (("images/a/1.jpg", "segmentations/a/1.png"), {"images/a/1.jpg": "a"}, 1, 1),
        (("train/1.jpg", "train_masks/1_mask.gif"), {"train/1.jpg": None}, 1, 1),
        (("rgb/b/1.jpg", "depth/b/1.png", "cats/2.jpg"), {"rgb/b/1.jpg": "b", "cats/2.jpg": "cats"}, 1, 1),
        (("city/1_leftImg8bit.png", "city/1_gtFine_color.png"), {"city/1_leftImg8bit.png": "city"}, 1, 1),
        (("mask/1.jpg", "no_mask/1.jpg"), {"mask/1.jpg": "mask", "no_mask/1.jpg": "no_mask"}, 0, 0),
        (("a/images/1.png", "a/masks/2.png"), {"a/images/1.png": "a"}, 1, 1),
        (("images/1.jpg", "v1.2/labels/1.png", "v1.2/panoptic/1.png"), {"images/1.jpg": None}, 2, 1),
        (("cat/1.jpg", "cat/thumbnails/1.jpg"), {"cat/1.jpg": "cat"}, 1, 1),
        (("thumbnails/1.jpg", "banners/2.jpg"), {"thumbnails/1.jpg": "thumbnails", "banners/2.jpg": "banners"}, 0, 1),
        (("1.jpg", "cat_mask.png"), {"1.jpg": None, "cat_mask.png": None}, 0, 1),
        # Archives and data files.
        (("cat/1.jpg", "dog.zip", "train.parquet", "a/b.tfrecord"), {"cat/1.jpg": "cat"}, 3, 1),
        # Parts at any depth, and what lies beside them.
        (("set/Train/cat/1.jpg", "set/Test/cat/2.jpg"), {"set/Train/cat/1.jpg": "cat"}, 1, 0),
        (("train/1.jpg", "val/2.jpg", "more/3.jpg", "labels/1.txt"), {"train/1.jpg": None}, 2, 1),
        (("train/1.jpg", "test/2.jpg", "a.zip", "b.jpg", "c.txt", "LICENSE"), {"train/1.jpg": None}, 5, 2),
        (("train/1.jpg", "train2/1.jpg", "val/1.jpg"), {"train/1.jpg": None}, 2, 1),
        # Which folder is the class.
        (("n1/images/1.jpg", "n2/images/2.jpg"), {"n1/images/1.jpg": "n1", "n2/images/2.jpg": "n2"}, 0, 0),
        (("cat/2020/1.jpg", "dog/2020/2.jpg"), {"cat/2020/1.jpg": "cat", "dog/2020/2.jpg": "dog"}, 0, 1),
    ],
)  # fmt: skip
def test_what_is_read_of_a_folder_and_of_a_tar(packed, files, found, left_out, warnings, tmp_path, capsys):
    content = {
        name: encoded(number, kind="PNG" if name.endswith("png") else "JPEG") for number, name in enumerate(files)
    }
    src = write_folder(tmp_path / "src", {"x.tar": tar_bytes(content)} if packed else content)
    listed = LeftOut()
    candidates = list_candidates([src / "x.tar" if packed else src], left_out=listed)
    assert {c.key: c.class_name for c in candidates} == found
    assert [read_candidate(c) for c in candidates] == [content[key] for key in sorted(found)]
    assert sum(listed.counts().values()) == left_out
    assert capsys.readouterr().err.count("warning: ") == warnings


def test_images_that_differ_by_their_extension_alone(tmp_path, capsys):
    """One image in a tar; in a folder a grey or palette PNG is a label map, and others are read with a warning."""
    grey, colour = encoded(0, kind="PNG", mode="L"), encoded(1, kind="PNG")
    files = {"1.jpg": encoded(2), "1.png": grey, "2.jpg": encoded(3), "2.png": colour, "3.png": grey}
    src = write_folder(tmp_path / "src", files)
    (tmp_path / "x.tar").write_bytes(tar_bytes(files))
    for source, expected, words in (
        (src, "1.jpg 2.jpg 2.png 3.png", "2.png: has the name of another image but for its extension; both are read"),
        (tmp_path / "x.tar", "1.jpg 2.jpg 3.png", "left out 1.png and 1 more: a further image"),
    ):
        assert [c.key for c in list_candidates([source])] == expected.split()
        assert words in capsys.readouterr().err
        by_key = list_candidates([source], image_key=("png", "jpg"))
        assert [c.key for c in by_key] == ["1.png", "2.png", "3.png"]
        assert "left out 1.jpg and 1 more: a further image" in capsys.readouterr().err


@pytest.mark.parametrize("names", [("train", "val"), ("set-train-0000", "set-validation-00")])
def test_tars_that_are_parts(names, tmp_path):
    tars = {f"{name}.tar": tar_bytes({"cat/1.jpg": encoded(0), "2.jpg": encoded(1)}) for name in names}
    src, left_out = write_folder(tmp_path / "src", tars | {"a.zip": b"x"}), LeftOut()
    found = {c.key: c.class_name for c in list_candidates([src], left_out=left_out)}
    assert found == {f"{names[0]}.tar/cat/1.jpg": "cat", f"{names[0]}.tar/2.jpg": None}
    assert left_out.counts() == {layout.ARCHIVE: 1, layout.OTHER_PART: 1}
    assert len(list_images(src)) == 4  # predict reads all parts


def test_a_part_that_is_a_folder_beside_one_that_is_a_tar(tmp_path):
    tar = tar_bytes({"cat/1.jpg": encoded(0)})
    src = write_folder(tmp_path / "src", {"train/cat/1.jpg": encoded(0), "train.tar": tar, "val.tar": tar})
    left_out = LeftOut()
    assert [c.key for c in list_candidates([src], left_out=left_out)] == ["train/cat/1.jpg"]
    assert left_out.counts() == {layout.BESIDE: 1, layout.OTHER_PART: 1}


def test_other_parts_beside_label_maps_are_counted(tmp_path):
    parts = ("train2014", "train2017", "val2017")
    files = {f"{kind}/{part}/1.png": encoded(0, kind="PNG") for part in parts for kind in ("images", "annotations")}
    src, left_out = write_folder(tmp_path / "src", files), LeftOut()
    assert [c.key for c in list_candidates([src], left_out=left_out)] == ["images/train2014/1.png"]
    assert left_out.examples() == [
        ("images/train2017/", layout.BESIDE), ("images/val2017/", layout.OTHER_PART)
    ]  # fmt: skip


def test_members_that_come_again_are_counted(tmp_path, capsys):
    (tmp_path / "x.tar").write_bytes(tar_bytes({"1.jpg": encoded(0)}) + tar_bytes({"1.jpg": encoded(1), "1.txt": b""}))
    (found,) = list_candidates([tmp_path / "x.tar"])
    assert read_candidate(found) == encoded(1)
    assert "left out 1.jpg: comes again later in its tar" in capsys.readouterr().err


def test_a_tar_with_a_text_is_no_shard(tmp_path):
    tar = tar_bytes({"1.jpg": encoded(0), "2.jpg": encoded(1), "LICENSE.txt": b"x", "url.txt": b"x"})
    src = write_folder(tmp_path / "src", {"ant.tar": tar})
    assert {c.class_name for c in list_candidates([src])} == {"ant"}


def test_the_list_is_the_same_for_any_number_of_workers(tmp_path):
    names = ("1.jpg", "1_mask.png", "x.zip", ".hidden/1.jpg")
    files = {f"c{n:02}/{name}": encoded(n) for n in range(40) for name in names}
    src = write_folder(tmp_path / "src", files)
    lists = []
    for workers in (1, 2):
        out = tmp_path / f"out{workers}"
        out.mkdir()
        build_listing(out, [str(src)], TRAIN, 0, LabelSettings(), workers)
        lists.append((out / LEFT_OUT).read_text())
    assert lists[0] == lists[1]
    assert lists[0].count("\n") == 120


def test_classes_of_tars(tmp_path):
    """A tar's name is the class of images without a folder, but not where it is a shard of WebDataset."""
    shard = {"1.jpg": encoded(0), "1.json": b"{}", "1.txt": b"x", "2.jpg": encoded(1), "2.json": b"{}"}
    src = write_folder(tmp_path, {"ant.tar": tar_bytes({"1.jpg": encoded(2)}), "00000.tar": tar_bytes(shard)})
    found = {c.key: c.class_name for c in list_candidates([src])}
    assert found == {"00000.tar/1.jpg": None, "00000.tar/2.jpg": None, "ant.tar/1.jpg": "ant"}


def test_members_behind_an_end_mark_of_a_tar(tmp_path, capsys):
    files = class_files(1)
    parts = [tar_bytes({name: data}) for name, data in files.items()]
    (tmp_path / "all.tar").write_bytes(b"".join(parts))
    assert {c.key: read_candidate(c) for c in list_candidates([tmp_path / "all.tar"])} == files
    assert "warning: all.tar and 1 more: has an end mark with more files behind it" in capsys.readouterr().err


def test_a_source_whose_images_are_all_left_out(tmp_path):
    for name, words in (("a.zip", "a.zip: an archive"), ("data.h5", "data.h5: an archive")):
        src = write_folder(tmp_path / name / "src", {name: b"x"})
        with pytest.raises(UserError, match=f"holds no image; {words}"):
            list_images(src)
        with pytest.raises(UserError, match=f"{name} holds no image; an archive"):
            list_images(src / name)


def test_image_key_leaves_label_maps_out(tmp_path):
    files = {name: encoded(0) for name in ("a.jpg", "a.png", "a_mask.png", "b_rgb.png", "b_depth.png")}
    src = write_folder(tmp_path / "src", files)
    assert [c.key for c in list_candidates([src], image_key=("jpg",))] == ["a.jpg", "b_rgb.png"]
    (tmp_path / "x.tar").write_bytes(tar_bytes(files))
    assert [c.key for c in list_candidates([tmp_path / "x.tar"], image_key=("jpg",))] == ["a.jpg", "b_rgb.png"]
