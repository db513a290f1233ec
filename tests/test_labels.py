"""Ground truths: ImageNet's devkit, Kaggle's list, plain lists, and invalid files."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat
from test_image_io import encoded
from test_make_shards import make, read_back
from test_sources import tar_bytes, write_folder

from beit_pretrain.data.manifest import read_manifest
from beit_pretrain.data.write.labels import read_labels, segmentation_names
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
    assert read_labels(root) == read_labels(root / "data") == EXPECTED


def test_lists(tmp_path):
    for text in (
        "ImageId,PredictionString\nILSVRC2012_val_00000001,n03 1 2 3 4 n03 5 6\nILSVRC2012_val_00000002,n02 1 2 3 4\n",
        "val/ILSVRC2012_val_00000001.JPEG n03\r\n\nval/ILSVRC2012_val_00000002.JPEG n02",
        "\ufeffILSVRC2012_val_00000001.JPEG,n03\nILSVRC2012_val_00000002.JPEG,n02\n",
    ):
        (tmp_path / "list").write_text(text, "utf-8")
        assert read_labels(tmp_path / "list") == dict(list(EXPECTED.items())[:2])
    (tmp_path / "list").write_text("a.jpg,polar bear\n")
    assert read_labels(tmp_path / "list") == {"a": "polar bear"}


def test_refuses_files_without_ground_truth(tmp_path):
    files = {
        "empty.txt": (b"", "it is empty"),
        "half.txt": (b"a.jpg cat\nb.jpg\n", "'b.jpg' has no class"),
        "twice.txt": (b"a.jpg cat\nx/a.jpeg dog\n", "'a' has two classes"),
        "bytes.txt": (b"\xff\xfe\x00", "neither"),
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
    with pytest.raises(UserError, match=r"list.txt has no class for 'b.jpg'"):
        make(src, tmp_path / "out", labels=tmp_path / "list.txt")
    assert not (tmp_path / "out").exists()


def test_segmentation_names(tmp_path):
    (tmp_path / "objectInfo150.txt").write_text(
        "Idx\tRatio\tTrain\tVal\tName\n1\t0.1\t2\t3\twall\n2\t0\t0\t0\tsky, air\n"
    )
    assert segmentation_names(tmp_path) == segmentation_names(tmp_path / "inside") == ["wall", "sky, air"]
    assert segmentation_names(tmp_path / "else" / "where") == []
