"""Names of files and folders: what is a by-product, a part, a label map, and which image of a sample is its image."""

import pytest

from beit_pretrain.data import layout
from beit_pretrain.data.layout import (
    Subject,
    is_by_product,
    maps_among,
    of_split,
    parts_of,
    subject,
    twins,
    why_no_image,
)
from beit_pretrain.errors import UserError


@pytest.mark.parametrize(
    "name",
    [
        *(
            "._IMG_1.jpg",
            ".DS_Store",
            ".Trashes",
            ".ipynb_checkpoints",
            ".thumbnails",
            "__MACOSX",
            "@eaDir",
            "#recycle",
        ),
        *("$RECYCLE.BIN", "RECYCLER", "System Volume Information", "lost+found", "@tmp", "#snapshot"),
        *("Thumbs.db", "ehthumbs_vista.db", "SYNOPHOTO_THUMB_M.jpg", "cat.jpg:Zone.Identifier", "MVI_1.THM", "a.jpg~"),
    ],
)
def test_by_products(name):
    assert is_by_product(name)


@pytest.mark.parametrize("name", ["cat.jpg", "thumbs_up", "eaDir", "recycle", "..", "macosx", "IMG_1.jpg"])
def test_no_by_products(name):
    assert not is_by_product(name)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        *((f"x{e}", layout.ARCHIVE) for e in (".zip", ".7z", ".rar", ".parquet", ".arrow", ".h5", ".TFRecord", ".npz")),
        ("train.tfrecord-00001-of-00008", layout.ARCHIVE),
        *((f"x{e}", layout.COMPRESSED) for e in (".tar.gz", ".tgz", ".TAR.XZ", ".tar.zst")),
        *((f"x{e}", layout.NO_IMAGE) for e in (".txt", ".json", ".CSV", ".mp4", ".md5")),
        ("0001.cls", layout.CLASS_NUMBER),
        *((name, None) for name in ("x.jpg", "x", "x.tar", "x.heic", "LICENSE", "x.dng")),
    ],
)
def test_files_that_are_no_images_by_their_names(name, why):
    assert why_no_image(name) == why


@pytest.mark.parametrize(
    ("folders", "train", "val"),
    [
        (["train", "val", "test"], ["train"], ["val"]),
        (["Training", "Testing"], ["Training"], ["Testing"]),
        (["TRAIN", "Validation"], ["TRAIN"], ["Validation"]),
        (["seg_train", "seg_test", "seg_pred"], ["seg_train"], ["seg_test"]),
        (["training_set", "test_set"], ["training_set"], ["test_set"]),
        (["train2017", "val2017", "test2017", "annotations"], ["train2017"], ["val2017"]),
        (["TrainImages", "DevImages"], ["TrainImages"], ["DevImages"]),
        (["train", "train_masks", "test"], ["train"], ["test"]),
        (["images_train", "images_val", "labels_train", "labels_val"], ["images_train"], ["images_val"]),
        (["trainA", "trainB", "testA", "testB"], ["trainA", "trainB"], ["testA", "testB"]),
        (["ISIC_Training_Input", "ISIC_Test_Input"], ["ISIC_Training_Input"], ["ISIC_Test_Input"]),
    ],
)  # fmt: skip
def test_parts(folders, train, val):
    parts = parts_of(folders)
    assert of_split(parts, "train") == train
    assert of_split(parts, "val") == val


@pytest.mark.parametrize(
    "folders", [["train", "bus"], ["cats", "dogs"], ["toy_train", "test_tube"], ["val", "test"], ["train"]]
)
def test_no_parts(folders):
    assert parts_of(folders) == {}


def test_a_split_that_is_none_of_the_parts():
    with pytest.raises(UserError, match="has the parts Test, Train; split=mine is none of them"):
        of_split(parts_of(["Train", "Test"]), "mine")


@pytest.mark.parametrize(
    ("stem", "expected"),
    [
        ("0001", ("0001", "photo")),
        ("0001.mask", ("0001", "map")),
        ("ISIC_01_segmentation", ("ISIC_01", "map")),
        ("benign (1)_mask_1", ("benign (1)", "map")),
        ("a_000019_gtFine_labelIds", ("a_000019", "map")),
        ("a_000019_leftImg8bit", ("a_000019", "photo")),
        ("0001-depth", ("0001", "map")),
        ("0001_rgb", ("0001", "photo")),
        ("0001.thumb", ("0001", "thumbnail")),
        ("img_01_mask", ("img_01", "map")),
        ("scan.0001", ("scan.0001", "photo")),
        ("gas_mask_x", ("gas_mask_x", "photo")),
    ],
)
def test_subjects(stem, expected):
    assert subject(stem) == Subject(*expected)


@pytest.mark.parametrize(
    ("names", "maps"),
    [
        (["1.jpg", "1_mask.png", "2.jpg"], ["1_mask.png"]),
        (["1_rgb.png", "1_depth.png", "1_normals.png"], ["1_depth.png", "1_normals.png"]),
        (["a.jpg", "a.thumb.jpg", "b.thumb.jpg"], ["a.thumb.jpg"]),  # b has no photo
        (["cat_mask.jpg", "dog_mask.jpg"], []),  # photos of masks
    ],
)
def test_label_maps_among_photos(names, maps):
    assert maps_among(names).found == maps


@pytest.mark.parametrize(
    ("folder", "siblings", "is_map"),
    [
        ("masks", ["images"], True),
        ("SegmentationClass", ["JPEGImages"], True),
        ("train_masks", ["train"], True),
        ("trainannot", ["train"], True),
        ("ground_truth", ["test", "train"], True),
        ("depth", ["rgb"], True),
        ("1st_manual", ["images"], True),
        ("gtFine", ["leftImg8bit"], True),
        ("thumbs", [], True),  # of the photos above
        ("mask", ["no_mask"], False),  # two classes
        ("labels", ["cats"], False),
        ("cats", ["images"], False),
    ],
)
def test_folders_of_label_maps(folder, siblings, is_map):
    files = {
        folder: ["1.png", "2.png"],
        **{s: ["1.jpg", "2.jpg"] for s in siblings},
        "": ["1.jpg"] * (folder == "thumbs"),
    }
    listed = [folder, *siblings]
    assert layout.map_folders("", listed, lambda place: (place, files.get(place, []))).found == [folder] * is_map
    others = {name: [f"{name}{n}.jpg" for n in range(2)] for name in [*listed, "more"]}
    found = layout.map_folders("", [*others], lambda place: (place, others.get(place, [])))  # of other subjects
    assert found.found == []


@pytest.mark.parametrize(
    ("extensions", "image_key", "best"),
    [
        (["png", "jpg"], (), "jpg"),
        (["mask.png", "jpg"], (), "jpg"),
        (["depth.png", "image.jpg"], (), "image.jpg"),
        (["thumb.jpg", "png"], (), "png"),
        (["input.jpg", "jpg"], (), "jpg"),
        (["png", "jpg"], ("png",), "png"),
        (["jpg", "rgb.png"], ("rgb.png", "jpg"), "rgb.png"),
    ],
)
def test_the_image_of_a_sample(extensions, image_key, best):
    ranks = {extension: layout.image_rank(extension, image_key) for extension in extensions}
    assert min((rank, extension) for extension, rank in ranks.items() if rank is not None)[1] == best


def test_twins():
    assert twins(["1.png", "1.jpg", "2.jpg", "3.txt", "3.jpg"]) == {"1.jpg": ["1.png"]}
    assert twins(["1.png", "1.jpg"], ("png",)) == {"1.png": ["1.jpg"]}
