"""Names of files and folders: what is a by-product, a part, a label map, and which image of a sample is its image."""

import pytest

from beit_pretrain.data import label_map_names, layout
from beit_pretrain.data.label_map_names import Subject, maps_among, subject, twins
from beit_pretrain.data.layout import is_by_product, of_split, parts_of, why_no_image
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
        *((f"x{e}", layout.NO_IMAGE) for e in (".txt", ".json", ".CSV", ".mp4", ".md5", ".cache", ".AAE", ".xmp")),
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
        (["trainval", "test"], ["trainval"], ["test"]),
        (["train_val_images", "test_images"], ["train_val_images"], ["test_images"]),
        (["ISIC_Training_Input", "ISIC_Test_Input"], ["ISIC_Training_Input"], ["ISIC_Test_Input"]),
        (["train", "valid_no_label"], ["train"], ["valid_no_label"]),
        (["train_set", "validation"], ["train_set"], ["validation"]),
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
        (["1_sat.jpg", "1_mask.png"], ["1_mask.png"]),
        (["0_colors.png", "0_depth.png"], ["0_depth.png"]),
    ],
)
def test_label_maps_among_photos(names, maps):
    assert maps_among(names).found == maps


def test_label_maps_without_a_photo_are_doubtful():
    assert maps_among(["a1.jpg", "b_mask.png", "c_mask.jpg"]) == ([], ["b_mask.png"])
    assert maps_among(["b_mask.png", "c_mask.png"]) == ([], [])  # a folder of maps alone was meant


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
    assert (
        label_map_names.map_folders("", listed, lambda place: (place, files.get(place, []))).found == [folder] * is_map
    )
    others = {name: [f"{name}{n}.jpg" for n in range(2)] for name in [*listed, "more"]}
    found = label_map_names.map_folders(
        "", [*others], lambda place: (place, others.get(place, []))
    )  # of other subjects
    assert found.found == []


@pytest.mark.parametrize(
    ("files", "beside", "found", "doubtful"),
    [
        # Masks with names of their own: plain names are enough, but not where other folders hold images.
        ({"images": ["ab.png"], "masks": ["0c.png", "1d.png"]}, {}, ["masks"], []),
        ({"photos": ["ab.png"], "masks": ["0c.png"], "textiles": ["e.png"]}, {}, [], ["masks"]),
        ({"images": ["1.png"], "masks": ["1.png"], "edges": ["1.png"]}, {}, ["masks"], []),
        ({"images": ["1.jpg"], "annotations": []}, {}, [], []),  # no images, nothing to leave out
        # Words that are classes too: kinds of documents, of hands.
        ({"photo": ["1.jpg"], "label": ["1.jpg"], "letter": ["1.jpg"]}, {}, [], ["label"]),
        ({"images": ["1.jpg"], "thumb": ["1.jpg"], "fist": ["1.jpg"]}, {}, [], ["thumb"]),
        ({"image": ["1.jpg"], "label": ["1.jpg"]}, {}, ["label"], []),
        # Mapillary, ISIC, DRIVE.
        ({"labels": ["1.png"], "instances": ["1.png"]}, {"../images": ["1.jpg"]}, ["labels", "instances"], []),
        ({"ISIC_Training_Data": ["I1.jpg"], "ISIC_Training_GroundTruth": ["I1_segmentation.png"]}, {},
         ["ISIC_Training_GroundTruth"], []),
        ({"images": ["21_training.tif"], "1st_manual": ["21_manual1.gif"]}, {}, ["1st_manual"], []),
        ({"thumbnails": ["1.jpg"], "banners": ["2.jpg"]}, {}, [], []),
    ],
)  # fmt: skip
def test_folders_of_label_maps_by_what_lies_beside_them(files, beside, found, doubtful):
    everything = files | beside
    maps = label_map_names.map_folders("", [*files], lambda place: (place, everything.get(place, [])), [*beside])
    assert maps == (found, doubtful)


def test_many_folders_are_compared_with_few():
    names = [f"item {word} {n}" for n in range(3000) for word in ("mask", "photo")]
    asked: list[str] = []

    def images_in(place: str) -> tuple[str, list[str]]:
        asked.append(place)
        return place, [f"{place} x.jpg"]

    assert label_map_names.map_folders("", names, images_in).found == []
    assert len(asked) < 10_000


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
    ranks = {extension: label_map_names.image_rank(extension, image_key) for extension in extensions}
    assert min((rank, extension) for extension, rank in ranks.items() if rank is not None)[1] == best


def test_twins():
    assert twins(["1.png", "1.jpg", "2.jpg", "3.txt", "3.jpg"]) == {"1.jpg": ["1.png"]}
    assert twins(["1.png", "1.jpg"], ("png",)) == {"1.png": ["1.jpg"]}
