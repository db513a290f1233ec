"""Existing WebDataset shards get an index and a manifest, and are not touched."""

import io
import os
import tarfile
from pathlib import Path

import pytest
from test_image_io import encoded
from test_sources import tar_bytes, write_folder

from beit_pretrain.data import layout
from beit_pretrain.data.layout import FURTHER
from beit_pretrain.data.left_out import LEFT_OUT, LeftOut
from beit_pretrain.data.listing.labels import read_class_names
from beit_pretrain.data.manifest import read_manifest, verify_shards
from beit_pretrain.data.order import Sample
from beit_pretrain.data.reader import ShardReader
from beit_pretrain.data.shard_index import EMPTY, INNER_TAR, NO_IMAGE_IN_SAMPLE
from beit_pretrain.data.tars import LINK, OUTSIDE, REFUSED
from beit_pretrain.data.write.index_existing import INNER, LOOSE, NO_SAMPLE, index_shards
from beit_pretrain.data.write.settings import EncodeSettings
from beit_pretrain.errors import UserError


@pytest.fixture
def foreign(tmp_path) -> Path:
    """Two tars of another hand: text labels, a caption, one sample without a label."""
    first = {"a.jpg": encoded(0), "a.cls": b"2", "b.png": encoded(1, kind="PNG"), "b.cls": b"0", "b.txt": b"a bee"}
    return write_folder(tmp_path / "src", {"x-0.tar": tar_bytes(first), "x-1.tar": tar_bytes({"c.jpg": encoded(2)})})


@pytest.mark.parametrize("elsewhere", [False, True])
def test_index(foreign, elsewhere, tmp_path):
    before = {path.name: path.read_bytes() for path in foreign.iterdir()}
    folder = index_shards(foreign, tmp_path / "out" if elsewhere else None, num_workers=1)
    assert {name: (foreign / name).read_bytes() for name in before} == before
    assert len(os.listdir(foreign)) == (2 if elsewhere else 7)
    (caption,) = LeftOut.read(folder / LEFT_OUT).examples()
    assert caption == ("x-0.tar/b.txt", layout.NO_IMAGE)
    manifest = read_manifest(folder)
    assert (manifest["samples"], manifest["classes"], manifest["class_counts"]) == (3, ["0", "1", "2"], [1, 0, 1])
    assert verify_shards(folder, progress=False) == []
    reader = ShardReader(folder)
    assert reader.read(Sample(0, 0))[:2] == (encoded(0), 2)
    assert reader.read(Sample(1, 0))[:2] == (encoded(2), -1)
    with pytest.raises(UserError, match=r"has a manifest\.json already"):
        index_shards(foreign, tmp_path / "out" if elsewhere else None, num_workers=1)


def index_of(files: list[tuple[str, bytes]], folder: Path) -> list[tuple[bytes, int]]:
    """Image and label of the samples of a tar with these members, in their order, names more than once too."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    write_folder(folder, {"a.tar": buffer.getvalue()})
    made = index_shards(folder, num_workers=1)
    assert verify_shards(made, progress=False) == []
    reader = ShardReader(made)
    return [reader.read(Sample(0, row))[:2] for row in range(reader.samples)]


@pytest.mark.parametrize(
    ("files", "expected", "left_out"),
    [
        # WebDataset's dotted extensions: the last part says what a member is.
        ([("k.input.jpg", b"in"), ("k.target.cls", b"3"), ("k.depth.png", b"of")], [(b"in", 3)], {FURTHER: 1}),
        ([("k.thumb.jpg", b"th"), ("k.top.cls", b"1"), ("k.jpg", b"im"), ("k.cls", b"2")], [(b"im", 2)], {FURTHER: 1}),
        ([("k.jpg", b"im"), ("k.cls", b"2"), ("k.thumb.jpg", b"th"), ("k.top.cls", b"1")], [(b"im", 2)], {FURTHER: 1}),
        # A key that comes again is another sample, with members of its own.
        (
            [("a.jpg", b"1"), ("a.cls", b"5"), ("b.jpg", b"2"), ("a.jpg", b"3"), ("a.cls", b"6")],
            [(b"1", 5), (b"2", -1), (b"3", 6)],
            {},
        ),
        ([("a.jpg", b"1"), ("b.jpg", b"2"), ("a.cls", b"5")], [(b"1", 5), (b"2", -1)], {}),
        ([("a.jpg", b""), ("b.jpg", b"2"), ("c.png", b"")], [(b"2", -1)], {EMPTY: 2}),
    ],
)
def test_samples_of_foreign_tars(files, expected, left_out, tmp_path, capsys):
    assert index_of(files, tmp_path / "src") == expected
    counts = read_manifest(tmp_path / "src")["left_out"]
    assert counts == left_out
    assert capsys.readouterr().err.count("warning: left out") == len(left_out)


APPLE = b"\0\5\26\7\0\2\0\0Mac OS X"


@pytest.mark.parametrize(
    ("files", "image_key", "images", "left_out"),
    [
        # By-products of macOS beside every member.
        ({"._a.jpg": APPLE, "a.jpg": b"a", "._a.cls": APPLE, "a.cls": b"1"}, (), [b"a"], {layout.BY_PRODUCT: 2}),
        ({"__MACOSX/a.jpg": APPLE, "@eaDir/a.jpg/T.jpg": b"t", "a.jpg": b"a"}, (), [b"a"], {layout.BY_PRODUCT: 2}),
        # Label maps and depth maps beside the photo.
        ({"a.jpg": b"a", "a.png": b"m"}, (), [b"a"], {FURTHER: 1}),
        ({"a.png": b"m", "a.jpg": b"a"}, (), [b"a"], {FURTHER: 1}),
        ({"a.depth.png": b"m", "a.image.jpg": b"a"}, (), [b"a"], {FURTHER: 1}),
        ({"a.webp": b"a", "a.label.tif": b"m", "a.thumb.jpg": b"t"}, (), [b"a"], {FURTHER: 2}),
        ({"a.jpg": b"a", "a.png": b"m"}, ("png",), [b"m"], {FURTHER: 1}),
        ({"a.rgb.png": b"a", "b.jpg": b"b"}, ("rgb.png",), [b"a"], {FURTHER: 1, NO_IMAGE_IN_SAMPLE: 1}),
        # Extensions: known ones, and images without any that is known.
        (dict.fromkeys([f"{i}.{e}" for i, e in enumerate(("jfif", "jpe", "pnm", "j2k", "JPEG", "TIF", "apng"))], b"a"),
         (), [b"a"] * 7, {}),
        ({"a.img": encoded(0), "b": encoded(1, kind="PNG"), "c.bin": b"no image"}, (),
         [encoded(0), encoded(1, kind="PNG")], {layout.NO_IMAGE: 1}),
        # Folders of label maps, and tars in the tar.
        ({"images/a.jpg": b"a", "masks/a.png": b"m", "masks/x/b.png": b"m"}, (), [b"a"], {layout.MAP: 2}),
        ({"a.jpg": b"a", "a_mask.png": b"m", "s.01.jpg": b"s", "s.01_depth.png": b"d"}, (), [b"a", b"s"],
         {layout.MAP: 2}),
        ({"a.jpg": b"a", "more.tar": b"t", "b.zip": b"z"}, (), [b"a"], {INNER_TAR: 1, layout.ARCHIVE: 1}),
        # Names that lead outside, and samples that lack an image.
        ({"a.jpg": b"a", "/data/b.jpg": b"b", "../c.jpg": b"c"}, (), [b"a"], {REFUSED[OUTSIDE]: 2}),
        ({"a.jpg": b"a", "b.cls": b"1", "c.txt": b"x"}, (), [b"a"], {NO_IMAGE_IN_SAMPLE: 1, layout.NO_IMAGE: 1}),
        # Dots in names: numbers belong to the key, unless something has the bare key.
        ({"s.01.jpg": b"a", "s.01.cls": b"0", "s.02.jpg": b"b", "s.02.cls": b"1"}, (), [b"a", b"b"], {}),
        ({"v1.0/a.jpg": b"a", "x.2.5.jpg": b"b", "x.2.6.jpg": b"c"}, (), [b"a", b"b", b"c"], {}),
        ({"s.01.jpg": b"a", "s.02.jpg": b"b", "s.cls": b"0"}, (), [b"a"], {FURTHER: 1}),
    ],
)  # fmt: skip
def test_the_image_of_a_sample(files, image_key, images, left_out, tmp_path, capsys):
    write_folder(tmp_path / "src", {"x.tar": tar_bytes(files)})
    folder = index_shards(tmp_path / "src", num_workers=1, image_key=image_key)
    reader = ShardReader(folder)
    assert [reader.read(Sample(0, row)).data for row in range(reader.samples)] == images
    assert read_manifest(folder)["left_out"] == left_out
    unexpected = left_out.keys() - {layout.BY_PRODUCT, layout.NO_IMAGE}
    assert capsys.readouterr().err.count("warning: left out") == len(unexpected)
    assert verify_shards(folder, progress=False) == []


@pytest.mark.parametrize(
    ("given", "read"), [("jpg", ["jpg"]), (".RGB.png;jpg", ["rgb.png", "jpg"]), (["PNG"], ["png"]), (None, None)]
)
def test_image_key(given, read):
    assert EncodeSettings(image_key=given).image_key == read


@pytest.mark.parametrize("given", [5, "", [""], [3], {"a": 1}])
def test_refuses_an_image_key_that_is_none(given):
    with pytest.raises(UserError, match="image_key must be an extension, or a list of extensions, got"):
        EncodeSettings.validated({"image_key": given})


def test_links_are_counted(tmp_path):
    (tmp_path / "src").mkdir()
    with tarfile.open(tmp_path / "src/x.tar", "w") as tar:
        for name, link in (("a.jpg", ""), ("b.jpg", "a.jpg")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = (tarfile.SYMTYPE, link, 0) if link else (tarfile.REGTYPE, "", 1)
            tar.addfile(info, io.BytesIO(b"a"))
    folder = index_shards(tmp_path / "src", num_workers=1)
    assert read_manifest(folder)["left_out"] == {REFUSED[LINK]: 1}


def test_what_lies_beside_the_tars(tmp_path, capsys):
    """Tars without an image are no reason to stop; other files that may hold images are named."""
    files = {"0.tar": tar_bytes({"a.jpg": b"a"}), "1.tar": tar_bytes({}), "2.tar.gz": b"x", "loose.jpg": b"x"}
    files |= {"more/3.tar": tar_bytes({"b.jpg": b"b"}), "0_stats.json": b"{}"}
    write_folder(tmp_path / "src", files | {"z.zip": b"x", "0.parquet": b"x", "._0.tar": b"x"})
    folder = index_shards(tmp_path / "src", num_workers=1)
    assert read_manifest(folder)["left_out"] == {
        layout.NO_IMAGE: 2, layout.BY_PRODUCT: 1, layout.COMPRESSED: 1, LOOSE: 1, INNER: 1, NO_SAMPLE: 1,
        layout.ARCHIVE: 1,
    }  # fmt: skip
    said = capsys.readouterr().err
    for name in ("1.tar", "2.tar.gz", "loose.jpg", "more/", "z.zip"):
        assert f"warning: left out {name}: " in said
    assert verify_shards(folder, progress=False) == []


def test_tars_of_several_parts_are_said(tmp_path, capsys):
    tar = tar_bytes({"a.jpg": b"a"})
    write_folder(tmp_path / "src", {f"in1k-{part}-00.tar": tar for part in ("train", "validation")})
    index_shards(tmp_path / "src", num_workers=1)
    assert "in1k-train-00: tars of several parts (train, val) become one set" in capsys.readouterr().err


def test_members_behind_an_end_mark(tmp_path, capsys):
    both = tar_bytes({"a.jpg": b"a", "a.cls": b"0"}) + tar_bytes({"b.jpg": b"b", "b.cls": b"1"})
    folder = index_shards(write_folder(tmp_path / "src", {"x.tar": both}), num_workers=1)
    reader = ShardReader(folder)
    assert [reader.read(Sample(0, row)) for row in range(2)] == [(b"a", 0), (b"b", 1)]
    assert "warning: x.tar: has an end mark with more files behind it" in capsys.readouterr().err
    assert verify_shards(folder, progress=False) == []


def test_refuses_tars_whose_images_are_all_left_out(tmp_path):
    write_folder(tmp_path / "src", {"x.tar": tar_bytes({"/data/a.jpg": b"a"})})
    with pytest.raises(UserError, match=r"holds no image; x\.tar//data/a\.jpg: its name leads outside the archive"):
        index_shards(tmp_path / "src", num_workers=1)
    write_folder(tmp_path / "large", {"x.TAR": tar_bytes({"a.jpg": b"a"})})
    with pytest.raises(UserError, match=r"must be renamed.*ends with \.tar"):
        index_shards(tmp_path / "large", num_workers=1)


def test_a_full_disk_is_reported_and_left_empty(full_disk, foreign):
    disk = full_disk(8192)  # two pages: a link and an index
    with pytest.raises(UserError, match=rf"^cannot write to {disk}/out: No space left on device$"):
        index_shards(foreign, disk / "out", num_workers=1)
    assert os.listdir(disk) == []


def test_class_names(foreign, tmp_path):
    (tmp_path / "names").write_text("ant\nbee\ncat\ndog\n")
    assert read_manifest(index_shards(foreign, tmp_path / "out", tmp_path / "names", 1))["classes"][2:] == [
        "cat",
        "dog",
    ]
    (tmp_path / "names").write_text("ant\n")
    with pytest.raises(UserError, match="names 1 classes, but the shards have the number 2"):
        index_shards(foreign, tmp_path / "other", tmp_path / "names", 1)


@pytest.mark.parametrize(
    "text",
    [
        b"\xef\xbb\xbfant\r\nbee\r\ncat\r\n",
        b"ant\nbee\ncat\n\n \n",
        b"ant  \n\tbee\ncat\t",
        "ant\nbee\ncat\n".encode("utf-16"),
        b"ant\rbee\rcat\r",
    ],
)
def test_class_names_of_other_systems(text, tmp_path):
    (tmp_path / "names").write_bytes(text)
    assert read_class_names(tmp_path / "names") == ["ant", "bee", "cat"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"ant\n\nbee\n", "line 2 is blank"),
        (b"\nant\n", "line 1 is blank"),
        (b"crane\nbee\ncrane \n", "'crane' is the name of two classes, in lines 1 and 3"),
        (b"K\xe4fer\n", r"is not UTF-8 text \(byte 1\)"),
        (b"", "line 1 is blank"),
    ],
)
def test_refuses_class_names(text, words, tmp_path):
    (tmp_path / "names").write_bytes(text)
    with pytest.raises(UserError, match=words):
        read_class_names(tmp_path / "names")


def test_names_keep_the_whole_line(tmp_path):
    (tmp_path / "names").write_text("0 tench, Tinca\nn02 great white shark\n")
    assert read_class_names(tmp_path / "names") == ["0 tench, Tinca", "n02 great white shark"]


def test_refuses_bad_shards(foreign, tmp_path):
    write_folder(tmp_path, {"none/a.txt": b"x", "text/a.tar": tar_bytes({"a.txt": b"x"}), "bad/a.tar": b"x" * 600})
    many = {"huge": b"4000000000", "vast": b"1" + b"0" * 30, "most": b"1000000", "endless": b"9" * 5000}
    write_folder(tmp_path, {f"{name}/a.tar": tar_bytes({"a.jpg": b"x", "a.cls": text}) for name, text in many.items()})
    write_folder(tmp_path, {f"second/{n}.tar": tar_bytes({"a.jpg": b"x", "a.cls": n.encode()}) for n in ("1", "x")})
    write_folder(tmp_path, {"gz/b.tar.gz": b"x", "gz/a.tgz": b"x", "nested/part/a.tar": b"x", "nested/a.txt": b"x"})
    names = ("img:0.tar", "-0.tar", "(1)-0.tar", "a\\b.tar", "a\nb.tar", "#.tar")
    write_folder(tmp_path, {f"name{i}/{name}": tar_bytes({"a.jpg": b"x"}) for i, name in enumerate(names)})
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe/a.tar")
    write_folder(tmp_path, {"word/a.tar": tar_bytes({"a.jpg": b"x", "a.cls": b"dog"})})
    write_folder(tmp_path, {"minus/a.tar": tar_bytes({"a.jpg": b"x", "a.cls": b"-7"}), "taken/x-0.tar": b"mine"})
    for name, words in (
        ("none", "holds no tars"),
        ("missing", "holds no tars"),
        ("text", "holds no image"),
        ("bad", "not a readable uncompressed tar"),
        ("word", "class number"),
        ("minus", "class number -7"),
        ("huge", "class number 4000000000, not one of -1 to 999,999"),
        ("vast", "class number 10000000000000000000, not one of"),
        ("most", "class number 1000000, not one of"),
        ("endless", "class number 99999999999999999999, not one of"),
        ("second", "x.tar: a.cls holds b'x' where a class number is needed"),
        ("gz", r"holds no tars; a\.tgz is compressed, which allows no random access; decompress it first"),
        ("nested", "holds no tars; its folder part does: give src=.*nested/part"),
        ("pipe", "holds no tars"),
        *((f"name{i}", "must be renamed: the name of a shard begins with a letter") for i in range(len(names))),
    ):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(UserError, match=words) as caught:
            index_shards(tmp_path / name, num_workers=1)
        assert "\n" not in str(caught.value)
        with pytest.raises(UserError, match=words):
            index_shards(tmp_path / name, tmp_path / "deep/out", num_workers=1)
        assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(UserError, match="exists already"):
        index_shards(foreign, tmp_path / "taken", num_workers=1)
    assert (tmp_path / "taken/x-0.tar").read_bytes() == b"mine"
    (tmp_path / "links").mkdir()
    (tmp_path / "links/x-0.tar").symlink_to(foreign / "x-0.tar")
    with pytest.raises(UserError, match="exists already"):  # the tar itself, under another name
        index_shards(tmp_path / "links", foreign, num_workers=1)
    assert not (foreign / "x-0.tar").is_symlink()
