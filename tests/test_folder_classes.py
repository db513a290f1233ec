"""Which folder's name is the class, and what is said where that is doubtful."""

import unicodedata

import pytest

from beit_pretrain.data.listing.folder_classes import classes_of


@pytest.mark.parametrize(
    ("folders", "innermost", "outermost", "path"),
    [
        (["cats/", "dogs/"], "cats dogs", "cats dogs", "cats dogs"),
        (["n01/images/", "n02/images/"], "n01 n02", "n01 n02", "n01 n02"),
        (["cats/JPEG/", "dogs/"], "cats dogs", "cats dogs", "cats dogs"),
        (["images/"], [None], [None], [None]),
        (["train2017/"], [None], [None], [None]),
        (["", "cats/"], [None, "cats"], [None, "cats"], [None, "cats"]),
        (["a/ant.tar/", "a/bee.tar/"], "ant bee", "ant bee", "a/ant a/bee"),
        (["pets/cat/", "pets/dog/", "cars/van/"], "cat dog van", "pets pets cars", "pets/cat pets/dog cars/van"),
        (["test/", "control/"], "test control", "test control", "test control"),
        (["alpha/", "photo/"], "alpha photo", "alpha photo", "alpha photo"),
        (["mask/", "no_mask/"], "mask no_mask", "mask no_mask", "mask no_mask"),
    ],
)  # fmt: skip
def test_classes_of_folders(folders, innermost, outermost, path):
    for which, expected in (("innermost", innermost), ("outermost", outermost), ("path", path)):
        found, notes = classes_of(folders, which)
        assert found == (expected.split() if isinstance(expected, str) else expected)
        assert notes == []


@pytest.mark.parametrize(
    ("folders", "classes", "words"),
    [
        (["cat/2020/", "dog/2020/", "dog/2021/"], "2020 2020 2021", "labels.folder=outermost would make 2 classes"),
        (["pets/cat/", "toys/cat/", "toys/car/"], "cat cat car", "labels.folder=path 3"),
        (["dogs/", "dogs/poodle/"], "dogs poodle", "dogs holds images and class folders"),
        (["bottle/good/", "cable/good/"], "bottle cable", "in a folder 'good'; the class is the folder above"),
        (["Cat/", "cat/"], "Cat cat", "read alike"),
        (["images/", "cats/"], "images cats", "'images' among the classes: a name of folders of photos"),
        (["A/", "B/", "label/"], "A B label", "'label' among the classes: a name of folders of photos"),
        (["train.tar/", "val.tar/"], "train val", "'train', 'val' among the classes: names of parts"),
        (["val/", "test/"], "val test", "'test', 'val' among the classes"),
        (["cat/train/", "bird/test/", "emu/"], "train test emu", "'test', 'train' among the classes: names of parts"),
    ],
)
def test_doubts_are_said(folders, classes, words):
    found, (note,) = classes_of(folders)
    assert found == classes.split()
    assert words in note


def test_names_in_either_unicode_form_are_one_class():
    forms = [unicodedata.normalize(form, "Käfer/") for form in ("NFC", "NFD")]
    assert classes_of(forms) == ([unicodedata.normalize("NFC", "Käfer")] * 2, [])
    assert classes_of(["caf\udce9/"])[0] == ["caf\udce9"]
