"""Images read where they lie: the order of shards made of them, a cached list, files that change under it."""

import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_cifar import official
from test_image_io import encoded
from test_sources import class_files, tar_bytes, write_folder

from beit_pretrain.data import listed_folder
from beit_pretrain.data.datamodule import ClassificationData, SegmentationData
from beit_pretrain.data.dataset import BatchSchedule
from beit_pretrain.data.listed_folder import ListedFolder
from beit_pretrain.data.reader import ShardReader
from beit_pretrain.data.settings import SourceSettings
from beit_pretrain.data.write.make_shards import make_shards
from beit_pretrain.errors import UserError
from beit_pretrain.transforms.segmentation import SegmentationEvalTransform
from beit_pretrain.transforms.views import ClassificationTransform

__all__ = ["official"]  # a fixture
VIEWS = {"train_views": ClassificationTransform(16), "val_views": ClassificationTransform(16, train=False)}


def two_epochs(source, **settings) -> list[dict]:
    """The batches of 6 images of two epochs of a source."""
    data = ClassificationData(source, **VIEWS, global_batch_size=6, num_workers=0, **settings)
    dataset = data.train_dataset(BatchSchedule(6))
    return [dataset[number] for number in range(2 * data.samples // 6)]


def assert_same(first: list[dict], second: list[dict]) -> None:
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture
def photos(tmp_path) -> Path:
    return write_folder(tmp_path / "photos", class_files())


def listed(source, split: str = "train") -> ListedFolder:
    (folder,) = ShardReader(source, split=split).folders
    assert isinstance(folder, ListedFolder)
    return folder


@pytest.mark.parametrize("kind", ["folder", "tar", "tar of tars", "flat"])
def test_same_batches_as_shards(tmp_path, kind):
    files = class_files() if kind != "flat" else {f"{i}.jpg": encoded(i) for i in range(18)}
    if kind in ("folder", "flat"):
        source = write_folder(tmp_path / "photos", files)
    else:
        source = tmp_path / "photos.tar"
        inner = {f"{c}.tar": tar_bytes({n: d for n, d in files.items() if n.startswith(c)}) for c in ("ant", "bee")}
        source.write_bytes(tar_bytes(files if kind == "tar" else inner))
    (shards,) = make_shards(source, tmp_path / "shards", num_workers=1)
    assert_same(two_epochs(source), two_epochs(shards))
    assert listed(source).about["classes"] == ShardReader(shards).classes


def test_cifar_in_place(official, tmp_path):
    (shards,) = make_shards(official, tmp_path / "shards", num_workers=1)
    assert_same(two_epochs(official), two_epochs(shards))
    assert "test/" in listed(official, "val").key(0, 0, 0)


def test_list_is_made_once(photos, monkeypatch):
    first = two_epochs(photos)
    monkeypatch.setattr(listed_folder, "build_listing", lambda *of: pytest.fail("listed again"))
    assert_same(two_epochs(photos), first)


@pytest.mark.parametrize("change", ["added", "removed", "new folder", "in a new folder", "tar"])
def test_changes_are_listed(photos, change):
    if change == "tar":
        (photos / "more.tar").write_bytes(tar_bytes({"a.jpg": encoded(1)}))
    before = listed(photos)
    if change == "removed":
        next(photos.glob("bee/*")).unlink()
    elif change == "tar":
        (photos / "more.tar").write_bytes(tar_bytes({"a.jpg": encoded(1), "b.jpg": encoded(2)}))
    else:
        name = {"added": "bee/new.jpg", "new folder": "dog/new.jpg", "in a new folder": "bee/inner/new.jpg"}[change]
        write_folder(photos, {name: encoded(500)})
    after = listed(photos)
    assert after.about["samples"] == before.about["samples"] + (-1 if change == "removed" else 1)
    assert after.shards[0].sha256 != before.shards[0].sha256  # a resumed run notices


def test_same_images_elsewhere(photos, tmp_path):
    """A resumed run compares keys, sizes and classes: the folder may have moved."""
    moved = shutil.copytree(photos, tmp_path / "moved")
    assert [shard.sha256 for shard in listed(photos).shards] == [shard.sha256 for shard in listed(moved).shards]


@pytest.mark.parametrize("fault", ["grown", "gone", "broken"])
def test_file_that_changed_is_replaced(photos, fault):
    data = ClassificationData(photos, **VIEWS, global_batch_size=18, num_workers=0)
    victim = photos / "bee" / "bee_0.jpg"
    before = os.stat(victim.parent).st_mtime_ns
    if fault == "gone":
        victim.unlink()
    else:
        victim.write_bytes(victim.read_bytes() + b"more" if fault == "grown" else bytes(victim.stat().st_size))
    os.utime(victim.parent, ns=(before, before))
    (bad,) = data.train_dataset(BatchSchedule(18))[0]["bad"]
    assert (bad["shard"], bad["key"]) == (str(photos), "bee/bee_0.jpg")
    assert {"grown": "changed since", "gone": "No such file", "broken": "not an image"}[fault] in bad["reason"]
    if fault == "grown":  # its folder's date does not tell
        assert (
            not ClassificationData(photos, **VIEWS, global_batch_size=18, num_workers=0)
            .train_dataset(BatchSchedule(18))[0]
            .get("bad")
        )


def test_tar_that_changed_ends_the_run(tmp_path):
    source = tmp_path / "photos.tar"
    source.write_bytes(tar_bytes(class_files()))
    dataset = ClassificationData(source, **VIEWS, global_batch_size=6, num_workers=0).train_dataset(BatchSchedule(6))
    source.write_bytes(tar_bytes({"first.jpg": encoded(9), **class_files()}))
    with pytest.raises(UserError, match=r"photos\.tar: it has changed since it was listed; rerun"):
        dataset[0]


def test_parts_and_classes_of_held_out_images(tmp_path):
    """`val` is read of the same folder, and its labels are those of `train`, of which it has not all classes."""
    files = {f"train/{name}": data for name, data in class_files().items()}
    files |= {"val/cat/1.jpg": encoded(900), "val/bee/2.jpg": encoded(901)}
    root = write_folder(tmp_path / "set", files)
    data = ClassificationData(root, root, **VIEWS, global_batch_size=6, num_workers=0)
    assert (data.samples, data.classes) == (18, ["ant", "bee", "cat"])
    assert sorted(data.eval_dataset()[0]["label"].tolist()) == [1, 2]
    with pytest.raises(UserError, match="has the parts train, val; split=fold1 is none of them"):
        ClassificationData(root, **VIEWS, global_batch_size=6, split="fold1")
    write_folder(root, {"val/dog/3.jpg": encoded(902)})
    with pytest.raises(UserError, match="has other classes than"):
        ClassificationData(root, root, **VIEWS, global_batch_size=6)


def test_held_out_images_may_have_classes_that_training_images_lack(tmp_path):
    flat = write_folder(tmp_path / "flat", {"1.jpg": encoded(1), "2.jpg": encoded(2)})
    classes = write_folder(tmp_path / "classes", class_files())
    data = ClassificationData(flat, classes, **VIEWS, global_batch_size=2, num_workers=0)
    assert data.classes == []
    assert len(data.eval_dataset()[0]["label"]) == 18


def test_label_maps_in_place(tmp_path):
    root = write_folder(tmp_path / "ade", {f"images/training/{i}.jpg": encoded(i) for i in range(3)})
    (root / "annotations/training").mkdir(parents=True)
    for i in range(3):
        Image.fromarray(np.full((18, 24), i + 1, np.uint8)).save(root / f"annotations/training/{i}.png")
    views = SegmentationEvalTransform(size=18, classes=3)
    data = SegmentationData(root, train_views=views, val_views=views, global_batch_size=1, num_workers=0)
    dataset = data.train_dataset(BatchSchedule(1))
    for position in range(3):
        number = int(Path(dataset.reader.key(dataset.order.sample_at(position))).stem)
        assert np.all(dataset.sample(position)["target"] == number)


def test_processes_that_start_together_list_once(photos, monkeypatch):
    calls, make = [], listed_folder.build_listing
    monkeypatch.setattr(listed_folder, "build_listing", lambda *of: (calls.append(1), make(*of)))
    threads = [threading.Thread(target=listed, args=(photos,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1


def test_errors(tmp_path, photos):
    for source, said in ((tmp_path / "none", "does not exist"), (tmp_path, "holds no image")):
        with pytest.raises(UserError, match=said):
            ShardReader(write_folder(tmp_path / "empty", {"a.txt": b""}) if source == tmp_path else source)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.cache_dir=.*file cannot hold the list of .*photos: "):
        ShardReader(photos, SourceSettings(cache_dir=str(tmp_path / "file")))
