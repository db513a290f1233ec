"""Ground truths: ImageNet's devkit, Kaggle's list, plain lists, and invalid files."""

import gzip
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat
from test_image_io import encoded
from test_make_shards import make, read_back, rejected
from test_sources import tar_bytes, write_folder

from beit_pretrain.data import layout
from beit_pretrain.data.listing.label_matching import LabelList
from beit_pretrain.data.listing.labels import Labeller, read_labels, segmentation_names
from beit_pretrain.data.listing.settings import LabelSettings
from beit_pretrain.data.manifest import read_manifest
from beit_pretrain.errors import UserError

WNIDS = ["n02", "n01", "n03"]  # of ILSVRC2012_ID 1, 2, 3: not in sorted order


def devkit_files(truth: str) -> dict[str, bytes]:
    kinds = [("ILSVRC2012_ID", object), ("WNID", object), ("words", object)]
    synsets = np.array([(i, wnid, "some, words") for i, wnid in enumerate(WNIDS, 1)], kinds).reshape(-1, 1)
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets})
    root = "ILSVRC2012_devkit_t12/data/"
    return {root + "ILSVRC2012_validation_ground_truth.txt": truth.encode(), root + "meta.mat": meta.getvalue()}


def devkit(root: Path, truth: str = "3\n1\n2\n1\n") -> Path:
    with tarfile.open(root / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
        for name, data in devkit_files(truth).items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return root / "ILSVRC2012_devkit_t12.tar.gz"


EXPECTED = {f"ILSVRC2012_val_{i:08d}": c for i, c in enumerate(["n03", "n02", "n01", "n02"], 1)}


def test_validation_tar_with_the_devkit(tmp_path):
    names = [f"ILSVRC2012_val_{i:08d}.JPEG" for i in range(1, 5)]
    (tmp_path / "ILSVRC2012_img_val.tar").write_bytes(tar_bytes({n: encoded(i) for i, n in enumerate(names)}))
    folder = make(tmp_path / "ILSVRC2012_img_val.tar", tmp_path / "out", split="val", labels=devkit(tmp_path))
    assert read_manifest(folder)["classes"] == ["n01", "n02", "n03"]
    assert {s["about"]["source"].removesuffix(".JPEG"): s["class"] for s in read_back(folder)} == EXPECTED


def test_devkit_as_a_folder(tmp_path):
    root = write_folder(tmp_path, devkit_files("3\n1\n2\n1\n")) / "ILSVRC2012_devkit_t12"
    assert read_labels(root).classes() == read_labels(root / "data").classes() == EXPECTED


AB = {"a.jpg": "cat", "b.jpg": "dog"}
HOT = "image,MEL,NV,BCC\nI_0,1.0,0.0,0.0\nI_1,0.0,1.0,0.0\n"
BOXES = "filename,width,height,class,xmin,ymin\na.jpg,9,9,cat,1,1\na.jpg,9,9,cat,2,2\nb.jpg,9,9,dog,1,1"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # Kaggle's ImageNet, and lists of the validation set.
        ("ImageId,PredictionString\nval_1,n03 1 2 3 4 n03 5 6\nval_2,n02 1 2 3 4\n", {"val_1": "n03", "val_2": "n02"}),
        ("val/1.JPEG n03\r\n\nval/2.JPEG n02", {"val/1.JPEG": "n03", "val/2.JPEG": "n02"}),
        ("\ufeffa.jpg,cat\nb.jpg,dog\n", AB),
        ("a.jpg,polar bear\n", {"a.jpg": "polar bear"}),
        # Separators; what systems and Excel put around.
        ("\ufefffilename;label\r\na.jpg;cat\r\nb.jpg;dog\r\n;\r\n", AB),
        ("sep=;\na.jpg;cat\nb.jpg;dog\n", AB),
        ("a.jpg\tcat\t\nb.jpg\tdog\t\n\n", AB),
        ("  a.jpg   cat  \n\nb.jpg dog\t\n", AB),
        ("file name;width;Label\na.jpg;0,5;cat\nb.jpg;1,5;dog\n", AB),
        ("a.jpg,cat\rb.jpg,dog\r", AB),
        ("# name class\n#\na.jpg cat\nb.jpg dog\n", AB),
        ("#1.jpg,cat\n#2.jpg,dog\n", {"#1.jpg": "cat", "#2.jpg": "dog"}),
        # Quotes, blanks and rare line ends in fields.
        ('file_name,caption,label\na.jpg,"one, two\nthree ""four""",cat\nb.jpg,"x;y",dog\n', AB),
        ('file,label\na.jpg,"cat, big"\n', {"a.jpg": "cat, big"}),
        ('file, label\na.jpg, "cat, big"\nb.jpg, "dog"\n', {"a.jpg": "cat, big", "b.jpg": "dog"}),
        ('"my a.jpg" cat\nb.jpg "polar bear"\n', {"my a.jpg": "cat", "b.jpg": "polar bear"}),
        ("my a.jpg,cat\nb.jpg,dog\n", {"my a.jpg": "cat", "b.jpg": "dog"}),
        ("a.jpg tench, Tinca\nb.jpg crane, bird\n", {"a.jpg": "tench, Tinca", "b.jpg": "crane, bird"}),
        ("a.jpg cat\nb.jpg polar bear, white\n", {"a.jpg": "cat", "b.jpg": "polar bear, white"}),
        ("a\x85b.jpg,cat\n", {"a\x85b.jpg": "cat"}),
        # Which columns.
        ("image,A,B\na,True,False\nb,False,True\n", {"a": "A", "b": "B"}),
        (HOT, {"I_0": "MEL", "I_1": "NV"}),
        (BOXES, AB),
        ("image_id,width,label\na,48,cat\nb,40,dog\n", {"a": "cat", "b": "dog"}),
        ("lesion_id,image_id,dx,dx_type,age\nH_1,I_1,bkl,histo,80\n", {"I_1": "bkl"}),
        ("Image Index,Finding Labels,Follow-up #\n1.png,Hernia|Mass,0\n", {"1.png": "Hernia|Mass"}),
        ("Width,Height,ClassId,Path\n9,9,20,Train/20/0.png\n", {"Train/20/0.png": "20"}),
        ("id_code,diagnosis\n0a,2\n", {"0a": "2"}),
        ("Image,Id\n0.jpg,w_1\n", {"0.jpg": "w_1"}),
        ("label,filename\ncat,a.jpg\ndog,b.jpg\n", AB),
        ("id,label\n1,1\n2,01\n3,1.0\n", {"1": "1", "2": "01", "3": "1.0"}),
        ("id,is_red,label\n1,0,1\n2,1,1\n", {"1": "1", "2": "1"}),
        ("foo,class,class_id\n", None),
        ("image,label,is_valid\na,1,0\nb,1,1\n", {"a": "1", "b": "1"}),
        ("a.jpg\tn01\t0\t32\t44\t62\nb.jpg\tn02\t1\t2\t3\t4\n", {"a.jpg": "n01", "b.jpg": "n02"}),
        ("a.jpg 7 0 32 44 62\nb.jpg 8 1 2 3 4\n", {"a.jpg": "7", "b.jpg": "8"}),
        ("a.jpg\tcat\t0.93\nb.jpg\tdog\t1\n", AB),
        ("a.jpg Boeing 707\nb.jpg Airbus 320\n", {"a.jpg": "Boeing 707", "b.jpg": "Airbus 320"}),
        ("a first class\nb second class\n", {"a": "first class", "b": "second class"}),
        ("a.jpg , cat\nb.jpg ,dog\n", AB),
        (",image,label\n0,a.jpg,cat\n1,b.jpg,dog\n", AB),
        # JSON lines, paths of other systems.
        ('{"file_name": "a.jpg", "label": "cat", "box": [1]}\n\n{"label": "dog", "file_name": "b.jpg"}\n', AB),
        ('{"file_name": "a.jpg", "label": 3}\n', {"a.jpg": "3"}),
        ('{"file": "a.jpg", "n": 1, "label": "cat"}\n{"file": "b.jpg", "label": "dog", "text": "x"}\n', AB),
        ("[1].jpg,cat\n", {"[1].jpg": "cat"}),
        ("C:\\data\\a.jpg,cat\n./b/../c//b.jpg,dog\n", {"C:/data/a.jpg": "cat", "c/b.jpg": "dog"}),
        ("Ka\u0308fer.jpg,Ka\u0308fer\nb.jpg,K\u00e4fer\n", {"K\u00e4fer.jpg": "K\u00e4fer", "b.jpg": "K\u00e4fer"}),
    ],
)
def test_lists(text, expected, tmp_path):
    file = tmp_path / "list"
    for encoding in ("utf-8", "utf-16"):
        file.write_bytes(text.encode(encoding))
        if expected is None:
            with pytest.raises(UserError, match=r"no row below it|which column"):
                read_labels(file)
        else:
            assert read_labels(file).classes() == expected


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (("image", "dx"), {"a": "mel"}),
        (("IMAGE", None), "which column holds the classes, class or dx"),
        ((None, "dx_type"), {"a": "histo"}),
        (("2", "4"), {"H1": "mel"}),
        ((1, 3), {"a": "n"}),
        ((None, "dxx"), "no column labels.class_column=dxx; its columns are 1 'image', 2 'lesion'"),
        ((None, "7"), "no column labels.class_column=7"),
        (("dx", "dx"), "the same column"),
    ],
)
def test_columns_of_the_settings(columns, expected, tmp_path):
    (tmp_path / "l.csv").write_text("image,lesion,class,dx,dx_type\na,H1,n,mel,histo\n")
    settings = LabelSettings(path=tmp_path / "l.csv", file_column=columns[0], class_column=columns[1])
    if isinstance(expected, dict):
        assert Labeller(settings).listed.classes() == expected
    else:
        with pytest.raises(UserError, match=expected):
            Labeller(settings)


def test_columns_without_a_header(tmp_path):
    (tmp_path / "l.txt").write_text("A_1 1 1 2\nB_1 2 2 1\n")
    assert read_labels(tmp_path / "l.txt", None, "3").classes() == {"A_1": "1", "B_1": "2"}
    (tmp_path / "l.csv").write_text("cat,a.jpg\ndog,b.jpg\n")
    assert read_labels(tmp_path / "l.csv", "2").classes() == AB


def test_refuses_files_without_ground_truth(tmp_path):
    files = {
        "empty.txt": (b"", "it is empty"),
        "half.txt": (b"a.jpg cat\nb.jpg\n", "'b.jpg' has no class"),
        "twice.txt": (b"a.jpg cat\n./a.jpg dog\n", r"twice.txt, line 2: 'a.jpg' has two classes, 'cat' and 'dog'"),
        "bytes.txt": (b"\xff\xfe\x00", r"is not UTF-16 text \(byte 2\); save it as UTF-8"),
        "latin.txt": (
            "a.jpg,K\u00e4fer\n".encode("latin-1"),
            r"is not UTF-8 text \(byte 7\); save it as UTF-8, such as: iconv",
        ),
        "nomark.txt": ("a.jpg,cat\n".encode("utf-16-le"), "holds zero bytes, as UTF-16 without a byte order mark"),
        "l.csv.gz": (gzip.compress(b"a.jpg,cat\n"), "is a gzip file; unpack it"),
        "l.xlsx": (b"PK\3\4...", "is a zip or Excel file; unpack it, or save it as CSV"),
        "imagelabels.mat": (b"MATLAB 5.0 MAT-file\0\0", "is a MATLAB file; unpack it, or save it as CSV"),
        "header.csv": (b"filename,label\n\n", "it has a header and no row below it"),
        "cell.csv": (b"filename,label\na.jpg,cat\nb.jpg,\n", "line 3: 'b.jpg' has no class"),
        "json.csv": (b'{"file_name": "a.jpg", "label": null}\n', "line 2?1?: 'a.jpg' has no class"),
        "late.jsonl": (
            b'{"file": "a.jpg", "text": "x"}\n{"file": "b.jpg", "label": "dog"}\n',
            "line 1: 'a.jpg' has no class",
        ),
        "dataset.json": (b'{"labels": [["a.jpg", 5], ["b.jpg", 3]]}', "line 1 is no object of JSON lines; other JSON"),
        "target.csv": (
            b"image,rock,sand,target\na,1,0,0\nb,0,0,1\n",
            "is 'target' the column of the classes, or one of",
        ),
        "name.csv": (b"filename,label\n,cat\n", "line 2 has no file name"),
        "names.txt": (b"a.jpg\nb.jpg\n", "line 1: 'a.jpg' has no class"),
        "comma.csv": (b"a.jpg,cat\nb.jpg,big, red\n", "line 2 has 3 fields, the first row 2; put .* comma in quotes"),
        "quote.csv": (b'a.jpg,cat\n"b.jpg,dog\nc.jpg,cat\n', "line 2.*quote"),
        "both.csv": (
            b"image,label,class\na,1,cat\n",
            "which column holds the classes, label or class.*class_column=.*2 'label'",
        ),
        "none.csv": (b"image,url,author\na,x,y\n", "which column holds the classes.*3 'author'"),
        "ids.csv": (b"foo,bar,label\na,x,y\n", "which column holds the file names.*labels.file_column="),
        "bare.csv": (b"a.jpg,1,1,9,9,cat\n", "labels.class_column=, by number; its columns begin with 1 'a.jpg'"),
        "hot.csv": (b"image,A,B\na,1,0\nb,1,1\n", "line 3: 'b' has the classes A, B; .*multi-label"),
        "cold.csv": (b"image,A,B\na,1,0\nb,0,0\n", "line 3: 'b' has a 1 in no column"),
        "many.txt": (b"a.jpg 3\nb.jpg 4 17\n", "line 2: 'b.jpg' has the numbers 4 17, not one class"),
        "pets.txt": (b"A_1 1 1 2\nB_1 2 2 1\n", "which column holds the classes.*2 '1'"),
        "boxes.csv": (
            b"filename,class,x\na.jpg,cat,1\na.jpg,dog,2\n",
            "line 3: 'a.jpg' has two classes, 'cat' and 'dog'",
        ),
        "cub.txt": (b"1 001.Albatross/a.jpg\n2 002.Auk/b.jpg\n", "column 2 holds file names, no classes"),
        "masks.csv": (b"image,mask\na.jpg,a.png\n", "column 2 holds file names, no classes.*labels.file_column=1 "),
        "flags.txt": (b"a.jpg 1 0 0 1 -1\nb.jpg 0 0 1 1 1\n", "which column holds the classes"),
        "again.csv": (b"image,label,label\na,x,y\n", "which column .* label or label.*labels.class_column="),
        "cards.txt": (b"a.jpg|cat\n", r"'a.jpg\|cat' has no class"),
        "coco.json": (b'{\n"images": [], "annotations": []}\n', "line 1 is no object of JSON lines.*COCO"),
        "array.json": (b'[{"file_name": "a.jpg", "label": 1}]\n', "line 1 is no object of JSON lines"),
        "list.jsonl": (b'{"file_name": "a.jpg", "label": [1, 2]}\n', r"'a.jpg' has \[1, 2\], not one class"),
        "wide.jsonl": (b'{"images": [], "annotations": []}\n', "line 1 is no object of JSON lines.*COCO"),
        "kit.tar.gz": (b"x", "neither"),
        "kit.tar": (tar_bytes({"data/meta.mat": b"x"}), "lacks the file ILSVRC2012_validation_ground_truth.txt"),
        "bad.tar": (tar_bytes({"meta.mat": b"x", "ILSVRC2012_validation_ground_truth.txt": b"1"}), "neither"),
    }
    for name, (data, words) in files.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=words) as caught:
            read_labels(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="cannot be read"):
        read_labels(tmp_path / "missing")


def test_an_image_without_a_label(tmp_path):
    src = write_folder(tmp_path / "src", {"a.jpg": encoded(0), "b.jpg": encoded(1)})
    (tmp_path / "list.txt").write_text("a.jpg cat\n")
    with pytest.raises(UserError, match=r"list.txt has no class for 'b.jpg'; add .* labels.unlisted=skip"):
        make(src, tmp_path / "out", labels=tmp_path / "list.txt")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("listed", "images", "expected"),
    [
        # The same names in several folders.
        ({"a/1.jpg": "cat", "b/1.jpg": "dog"}, ["a/1.jpg", "b/1.jpg", "x/a/1.jpg"], ["cat", "dog", "cat"]),
        ({"a/1.jpg": "cat"}, ["b/1.jpg", "aa/1.jpg", "1.jpg"], [None, None, "cat"]),
        ({"./a\\1.jpg": "cat", "/old/top/b/1.jpg": "dog"}, ["a/1.jpg", "b/1.jpg"], ["cat", "dog"]),
        ({"D:\\old\\a\\1.jpg": "cat", "../b/1.jpg": "dog"}, ["a/1.jpg", "x/b/1.jpg"], ["cat", "dog"]),
        ({"1.jpg": "cat", "b/1.jpg": "dog"}, ["a/1.jpg", "b/1.jpg"], ["cat", "dog"]),
        ({"1.jpg": "cat", "x/b/1.jpg": "dog"}, ["a/1.jpg", "b/1.jpg"], ["cat", "dog"]),
        ({"x/1.jpg": "cat", "y/1.jpg": "dog"}, ["1.jpg"], UserError),
        ({"x/1.jpg": "cat", "y/1.jpg": "cat"}, ["1.jpg"], ["cat"]),
        ({"n1/1.jpg": "cat", "n2/1.jpg": "dog"}, ["n1.tar/1.jpg", "set/n2.tar/1.jpg"], ["cat", "dog"]),
        # A folder above the source tells them apart: the source lies in /data/src.
        ({"src/1.jpg": "cat", "test/1.jpg": "dog"}, ["1.jpg"], ["cat"]),
        ({"/k/src/1.jpg": "cat", "/k/test/1.jpg": "dog"}, ["1.jpg"], ["cat"]),
        ({"src/2.jpg": "cat", "test/1.jpg": "dog"}, ["2.jpg", "1.jpg"], ["cat", None]),
        ({"src/a/2.jpg": "cat", "test/a/1.jpg": "dog"}, ["a/2.jpg", "a/1.jpg"], ["cat", None]),
        ({"old/2.jpg": "cat", "other/1.jpg": "dog"}, ["2.jpg", "1.jpg"], ["cat", "dog"]),
        # Extensions, ids, ids with dots.
        ({"1.jpg": "cat"}, ["1.jpg", "1.png", "1.jpg.png", "1"], ["cat", None, None, None]),
        ({"1": "cat"}, ["1.jpg", "x/1.PNG", "1", "1.2.jpg"], ["cat", "cat", "cat", None]),
        ({"scan.0001": "a", "x.y.3": "b", "22.05": "c"}, ["scan.0001.jpg", "x.y.3.png", "22.05"], ["a", "b", "c"]),
        ({"1": "cat", "1.jpg": "dog"}, ["1.png", "1.jpg"], UserError),
        ({"a/1": "cat", "b/1": "dog"}, ["a/1.jpg", "x/b/1.png", "c/1.jpg"], ["cat", "dog", None]),
        ({"A.JPG": "cat"}, ["a.jpg"], [None]),
        ({"K\u00e4fer.jpg": "cat"}, ["Ka\u0308fer.jpg"], ["cat"]),
    ],
)
def test_which_name_an_image_has(listed, images, expected):
    names = LabelList("labels=l.csv")
    for name, class_name in listed.items():
        names.add(name, class_name)
    if expected is UserError:
        with pytest.raises(UserError, match=r"gives '1.jpg' two classes: .*'cat'.*'dog'|.*'dog'.*'cat'"):
            [names.class_of(image, f"/data/src/{image}") for image in images]
    else:
        assert [names.class_of(image, f"/data/src/{image}") for image in images] == expected


JUNK = {
    "LICENSE": b"MIT",
    "README": b"Python 3 of BMW",
    "NOTES": b"BMW and Python",
    "checksums.md5": b"0 a",
    "a.jpg:Zone.Identifier": b"[Zone]",
    "part.crdownload": b"",
    "z.jpg": b"x",
}


def classes_of(folder: Path) -> dict[str, str | None]:
    return {sample["about"]["source"]: sample["class"] for sample in read_back(folder)}


def test_files_that_are_no_images_need_no_label(tmp_path, capsys):
    src = write_folder(tmp_path / "src", {"a.jpg": encoded(0), "b.jpg": encoded(1), **JUNK})
    (src / "dead.jpg").symlink_to("nowhere")
    (tmp_path / "l.csv").write_text("a.jpg,cat\nb.jpg,dog\nlost.jpg,dog\ngone.jpg,cat\n")
    folder = make(src, tmp_path / "out", labels=tmp_path / "l.csv")
    assert classes_of(folder) == AB
    by_name = {"a.jpg:Zone.Identifier", "checksums.md5", "part.crdownload"}
    assert set(rejected(folder)) == {*JUNK, "dead.jpg"} - by_name
    assert read_manifest(folder)["left_out"] == {layout.BY_PRODUCT: 1, layout.NO_IMAGE: 2}
    assert "names 2 images that src lacks, such as 'lost.jpg'" in capsys.readouterr().err
    settings = read_manifest(folder)["settings"]["labels"]
    assert (settings["path"], settings["unlisted"], len(settings["sha256"])) == ("l.csv", "error", 16)


@pytest.mark.parametrize("packed", [False, True])
def test_unlisted_images_can_be_left_out(packed, tmp_path):
    files = {"a.jpg": encoded(0), "b.jpg": encoded(1), "c.png": encoded(2, kind="PNG"), "d.txt_": b"x"}
    src = write_folder(tmp_path / "src", {"set.tar": tar_bytes(files)} if packed else files)
    src = src / "set.tar" if packed else src
    (tmp_path / "l.csv").write_text("a.jpg,cat\n")
    with pytest.raises(UserError, match=r"has no class for 'b.jpg' and 1 more images"):
        make(src, tmp_path / "out", labels=tmp_path / "l.csv")
    folder = make(src, tmp_path / "out", labels={"path": tmp_path / "l.csv", "unlisted": "skip"})
    assert classes_of(folder) == {"a.jpg": "cat"}
    reasons = rejected(folder)
    assert reasons["b.jpg"] == reasons["c.png"] == "labels= does not name it"
    assert set(reasons) == {"b.jpg", "c.png", "d.txt_"}


def test_a_list_of_other_names_shows_one_of_each(tmp_path):
    src = write_folder(tmp_path / "src", {"b.jpg": encoded(0), "c.jpg": encoded(1)})
    (tmp_path / "l.csv").write_text("A.JPG,cat\nB.JPG,dog\n")
    for unlisted in ("error", "skip"):
        with pytest.raises(UserError, match=r"names none of the 2 files of src: it lists 'B.JPG', src holds 'b.jpg'"):
            make(src, tmp_path / "out", labels={"path": tmp_path / "l.csv", "unlisted": unlisted})


def test_one_name_for_several_images_is_a_warning(tmp_path, capsys):
    src = write_folder(tmp_path / "src", {"x/1.jpg": encoded(0), "y/1.jpg": encoded(1)})
    (tmp_path / "l.csv").write_text("1.jpg,cat\n")
    assert set(classes_of(make(src, tmp_path / "out", labels=tmp_path / "l.csv")).values()) == {"cat"}
    assert "'1.jpg' names several images, 'y/1.jpg' too: they get the same class" in capsys.readouterr().err


@pytest.mark.parametrize("setting", [{"class_column": "dx"}, {"file_column": 1}, {"unlisted": "skip"}])
def test_settings_of_a_list_need_the_list(setting, tmp_path):
    src = write_folder(tmp_path / "src", {"a.jpg": encoded(0)})
    with pytest.raises(UserError, match=rf"labels.{next(iter(setting))} is for a list of labels; give it"):
        make(src, tmp_path / "out", labels=setting)


def test_folders_are_no_classes_beside_a_list(tmp_path):
    src = write_folder(tmp_path / "src", {"a.jpg": encoded(0)})
    (tmp_path / "l.csv").write_text("a.jpg,cat\n")
    with pytest.raises(UserError, match=r"labels.folder=path takes folders for classes; leave it out"):
        make(src, tmp_path / "out", labels={"path": tmp_path / "l.csv", "folder": "path"})


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        (["Cat", "cat", "dog"], "classes that read alike are kept apart: 'Cat', 'cat'"),
        (["cat", "dog", "dog|cat"], "1 classes join the names of others, such as 'dog|cat', and count as their own"),
        (["clear", "haze", "clear haze"], "such as 'clear haze'"),
        (["white wine", "wine", "a|b"], ""),
    ],
)
def test_doubtful_names_of_classes_are_a_warning(classes, said, tmp_path, capsys):
    src = write_folder(tmp_path / "src", {f"{i}.jpg": encoded(0) for i in range(len(classes))})
    (tmp_path / "l.csv").write_text("file,label\n" + "".join(f"{i}.jpg,{name}\n" for i, name in enumerate(classes)))
    make(src, tmp_path / "out", labels=tmp_path / "l.csv")
    warned = [line for line in capsys.readouterr().err.splitlines() if "warning:" in line]
    assert len(warned) == bool(said)
    assert all(said in line for line in warned)


def test_a_class_for_every_image_is_a_warning(tmp_path, capsys):
    src = write_folder(tmp_path / "src", {f"{i}.jpg": encoded(0) for i in range(20)})
    (tmp_path / "l.csv").write_text("file_name,text\n" + "".join(f"{i}.jpg,photo {i}\n" for i in range(20)))
    make(src, tmp_path / "out", labels=tmp_path / "l.csv")
    assert "all 20 images have a class of their own; labels.class_column=" in capsys.readouterr().err


def test_the_settings_of_labels_belong_to_a_half_done_run(tmp_path, monkeypatch):
    src = write_folder(tmp_path / "src", {"a.jpg": encoded(0), "b.jpg": encoded(1)})
    (tmp_path / "l.csv").write_text("id,kind,label\na,1,cat\nb,2,dog\n")

    def killed(*_):
        raise RuntimeError

    labels = {"path": tmp_path / "l.csv", "class_column": "kind"}
    monkeypatch.setattr("beit_pretrain.data.write.make_shards._write_split", killed)
    with pytest.raises(RuntimeError):
        make(src, tmp_path / "out", labels=labels)
    with pytest.raises(UserError, match=r"half-done run with labels\.class_column=kind, not null"):
        make(src, tmp_path / "out", labels=tmp_path / "l.csv")
    monkeypatch.undo()
    assert classes_of(make(src, tmp_path / "out", labels=labels)) == {"a.jpg": "1", "b.jpg": "2"}


def test_settings_of_labels_on_the_command_line(tmp_path, run_cli):
    src = write_folder(tmp_path / "src", {"a.jpg": encoded(0)})
    (tmp_path / "l,1.csv").write_text("image,n,dx\na,1,cat\n")
    out = [f"src={src}", "num_workers=1"]
    for number, words in enumerate(
        (
            [f"labels={tmp_path}/l,1.csv", "labels.file_column=image", "labels.class_column=dx"],
            ["labels.class_column=3", f"labels='{tmp_path}/l,1.csv'"],
            [f"labels.path={tmp_path}/l,1.csv", "labels.unlisted=skip"],
            [f"labels={{path: '{tmp_path}/l,1.csv', class_column: dx}}"],
        )
    ):
        code, _, stderr = run_cli("shards", "make", *out, f"out={tmp_path}/{number}", *words)
        assert code == 0, stderr
        assert classes_of(tmp_path / f"{number}/train") == {"a.jpg": "cat"}


def test_segmentation_names(tmp_path):
    (tmp_path / "objectInfo150.txt").write_text(
        "Idx\tRatio\tTrain\tVal\tName\n1\t0.1\t2\t3\twall\n2\t0\t0\t0\tsky, air\n"
    )
    assert segmentation_names(tmp_path) == segmentation_names(tmp_path / "inside") == ["wall", "sky, air"]
    assert segmentation_names(tmp_path / "else" / "where") == []
