"""Parquet and Arrow files as a source: which files, which columns, and the same batches as of shards."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pyarrow as pa
import pytest
import torch
from table_makers import IMAGE, NAMES, image_table, noted, photo, save_to_disk, write
from torch.utils.data import DataLoader

from beit_pretrain.data import reader, table_folder
from beit_pretrain.data.datamodule import ShardData
from beit_pretrain.data.dataset import BatchSchedule
from beit_pretrain.data.order import Sample
from beit_pretrain.data.reader import ShardReader
from beit_pretrain.data.settings import SourceSettings
from beit_pretrain.data.shard_folder import LocalFolder
from beit_pretrain.data.table_files import choose, local_tables
from beit_pretrain.data.table_folder import open_tables
from beit_pretrain.data.write.make_shards import make_shards
from beit_pretrain.errors import UserError
from beit_pretrain.transforms.views import ClassificationTransform


@pytest.fixture
def cached(tmp_path):
    """`cached(image_key=[...], ...)`: settings with a cache of the test's own."""
    return lambda **settings: SourceSettings(cache_dir=str(tmp_path / "cache"), **settings)


def opened(source, settings, split=None) -> ShardReader:
    folder = open_tables(str(source), settings, split)
    assert folder is not None
    return ShardReader([folder])


def as_tables(source, settings, split):
    return open_tables(source, settings, split) or LocalFolder(source)


def everything(reader: ShardReader) -> list[tuple[bytes, int]]:
    return [tuple(reader.read(Sample(s, row))) for s, size in enumerate(reader.sizes) for row in range(size)]


def rows_of(table: pa.Table) -> list[tuple[bytes, int]]:
    images, labels = table["image"].to_pylist(), table["label"].to_pylist()
    return [(image["bytes"], label) for image, label in zip(images, labels, strict=True)]


# --- reading -----------------------------------------------------------------------------------------------------


def test_rows_in_the_order_of_files_and_rows(tmp_path, cached):
    tables = [image_table(130, 0), image_table(70, 130)]
    for number, table in enumerate(tables):
        write(tmp_path / f"set/data/train-{number:05d}-of-00002.parquet", table)
    write(tmp_path / "set/data/test-00000-of-00001.parquet", image_table(5, 900))
    reader = opened(tmp_path / "set", cached())
    assert (reader.sizes, reader.classes, reader.without_class) == ([130, 70], NAMES, 0)
    assert everything(reader) == rows_of(tables[0]) + rows_of(tables[1])
    assert reader.key(Sample(1, 3)) == "00000003"
    assert reader.where(0).endswith("set/data/train-00000-of-00002.parquet")
    assert reader.remote  # so that it is unpacked ahead
    assert everything(opened(tmp_path / "set", cached(), "validation")) == rows_of(image_table(5, 900))
    with pytest.raises(UserError, match="has the parts test, train; split=extra is none of them"):
        open_tables(str(tmp_path / "set"), cached(), "extra")


@pytest.mark.parametrize("dictionary", [False, True])
def test_what_save_to_disk_leaves(tmp_path, cached, dictionary):
    table = image_table(30)
    folder = save_to_disk(tmp_path / "saved" / ("train" if dictionary else ""), table)
    if dictionary:
        save_to_disk(tmp_path / "saved/test", image_table(4, 50), files=1)
        (tmp_path / "saved/dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
        assert len(everything(opened(tmp_path / "saved", cached(), "val"))) == 4
    reader = opened(tmp_path / "saved", cached())
    assert (reader.sizes, reader.classes) == ([15, 15], NAMES)
    assert everything(reader) == rows_of(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [], "_indices_data_files": [{"filename": "i"}]}))
    with pytest.raises(UserError, match="flatten_indices"):
        open_tables(str(folder), cached())


def test_batches_are_those_of_shards_with_the_same_rows(tmp_path, cached, monkeypatch):
    photos = tmp_path / "photos"
    for number in range(60):
        path = photos / NAMES[number % 3] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photo(number))
    (shards,) = make_shards(photos, tmp_path / "out", samples_per_shard=17, num_workers=1)
    stored = ShardReader(shards)
    for number, size in enumerate(stored.sizes):
        samples = [stored.read(Sample(number, row)) for row in range(size)]
        images = pa.array([{"bytes": data, "path": None} for data, _ in samples], IMAGE)
        table = pa.table({"image": images, "label": pa.array([label for _, label in samples])})
        features = {"image": {"_type": "Image"}, "label": {"names": stored.classes, "_type": "ClassLabel"}}
        write(tmp_path / f"set/train-{number:05d}-of-00004.parquet", noted(table, features), row_group_size=5)

    monkeypatch.setattr(reader, "open_source", as_tables)
    views = ClassificationTransform(image_size=16)
    found = []
    for source in (shards, tmp_path / "set"):
        settings = {"num_workers": 0, "shuffle_block_size": 16, "shuffle_streams": 2}
        settings |= {"cache_dir": str(tmp_path / "cache")}
        data = ShardData(source, train_views=views, val_views=views, global_batch_size=12, seed=3, **settings)
        dataset = data.train_dataset(BatchSchedule(12))
        found.append((data, [dataset[number] for number in range(10)]))  # two epochs of 60 images
    (of_shards, expected), (of_tables, batches) = found
    assert of_shards.classes == of_tables.classes
    assert [sorted(batch) for batch in batches] == [["image", "label", "position"]] * 10
    for one, other in zip(expected, batches, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert len({int(p) for batch in batches for p in batch["position"]}) == 120


def test_loader_processes_unpack_ahead(tmp_path, monkeypatch):
    """Forked from a process that has used pyarrow; and twice the same batches, from an empty and from a full cache."""
    for number in range(3):
        write(tmp_path / f"set/{number}.parquet", image_table(40, 40 * number))
    monkeypatch.setattr(reader, "open_source", as_tables)
    views = ClassificationTransform(image_size=16)
    found = []
    for _ in range(2):
        settings = {"num_workers": 2, "cache_dir": str(tmp_path / "cache")}
        data = ShardData(tmp_path / "set", train_views=views, val_views=views, global_batch_size=12, **settings)
        loader = DataLoader(data.train_dataset(BatchSchedule(12)), batch_size=None, sampler=range(6), num_workers=2)
        found.append([batch["image"] for batch in loader])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


# --- columns -----------------------------------------------------------------------------------------------------


def test_tables_of_other_programs(tmp_path, cached):
    """Plain bytes with a usual name, or which begin as an image; numbers and texts as classes."""
    images = pa.array([photo(i) for i in range(6)])
    for name, table, classes, labels in (
        ("plain", {"img": images, "label": pa.array([0, 2, 1, 0, 4, 0])}, [*"01234"], [0, 2, 1, 0, 4, 0]),
        ("texts", {"x": images, "class": pa.array([*"babaab"])}, ["a", "b"], [1, 0, 1, 0, 0, 1]),
        ("ids", {"jpg": images, "label": pa.array([10**7] * 6)}, [], [-1] * 6),
        ("none", {"jpg": images, "caption": pa.array([*"abcdef"])}, [], [-1] * 6),
        ("null", {"jpg": images, "label": pa.array([1, None, -1, 0, 1, 1])}, ["0", "1"], [1, -1, -1, 0, 1, 1]),
        (
            "large",
            {"image": images.cast(pa.large_binary()), "labels": pa.array([1] * 6, pa.uint8())},
            ["0", "1"],
            [1] * 6,
        ),
    ):
        found = opened(write(tmp_path / f"{name}.parquet", pa.table(table)), cached())
        assert found.classes == classes, name
        assert [label for _, label in everything(found)] == labels, name
        assert found.without_class == sum(label < 0 for label in labels), name
        assert [data for data, _ in everything(found)] == images.to_pylist(), name


def test_settings_choose_columns_and_name_classes(tmp_path, cached):
    table = image_table(6, labels=[0, 1, 0, 1, 0, 1], names=["a", "b"])
    table = table.append_column("depth", table["image"]).append_column("kind", pa.array([*"xyxyyy"]))
    file = write(tmp_path / "a.parquet", noted(table, {"image": {"_type": "Image"}, "depth": {"_type": "Image"}}))
    with pytest.raises(UserError, match=r"a\.parquet has the image columns image, depth; choose one with image_key="):
        open_tables(str(file), cached())
    with pytest.raises(UserError, match="no column image_key=none; its columns are image, label, depth, kind"):
        open_tables(str(file), cached(image_key="none"))
    with pytest.raises(UserError, match="column kind holds string, not one image a row"):
        open_tables(str(file), cached(image_key="kind"))
    with pytest.raises(UserError, match="no column label_key=none"):
        open_tables(str(file), cached(image_key="depth", label_key="none"))
    with pytest.raises(UserError, match="classes=1 are 1 classes, but there is the class number"):
        open_tables(str(file), cached(image_key="depth", classes=1))
    assert opened(file, cached(image_key="depth", classes=4)).classes == ["0", "1", "2", "3"]
    chosen = opened(file, cached(image_key="depth", label_key="kind"))
    assert (chosen.classes, chosen.read(Sample(0, 1)).label) == (["x", "y"], 1)
    (tmp_path / "names.txt").write_text("y\nz\nx\n")
    named = opened(file, cached(image_key="depth", label_key="kind", classes=str(tmp_path / "names.txt")))
    assert (named.classes, named.read(Sample(0, 0)).label) == (["y", "z", "x"], 2)


def test_cifar_100_has_two_class_columns(tmp_path, cached):
    table = image_table(4, label="fine_label").append_column("coarse_label", pa.array([0] * 4))
    feature = {"_type": "ClassLabel", "names": NAMES}
    table = noted(table, {"image": {"_type": "Image"}, "fine_label": feature, "coarse_label": feature})
    assert opened(write(tmp_path / "a.parquet", table), cached()).read(Sample(0, 2)).label == 2


def test_a_row_without_an_image_stays_a_sample(tmp_path, cached):
    images = [{"bytes": photo(0), "path": None}, None, {"bytes": None, "path": None}, {"bytes": b"", "path": "x"}]
    for suffix in ("parquet", "arrow"):
        table = pa.table({"image": pa.array(images, IMAGE), "label": pa.array([0, 1, 2, 0])})
        file = tmp_path / f"a.{suffix}"
        if suffix == "parquet":
            write(file, table)
        else:
            with pa.ipc.new_file(file, table.schema) as stream:
                stream.write_table(table)
        found = everything(opened(file, cached()))
        assert [label for _, label in found] == [0, 1, 2, 0]
        assert found[0][0] == photo(0)
        assert {data for data, _ in found[1:]} == {b"null"}


# --- what cannot be read -----------------------------------------------------------------------------------------


def test_bad_tables_are_one_line(tmp_path, cached):
    good = image_table(5)
    paths = pa.array([{"bytes": None, "path": f"/x/{i}.jpg"} for i in range(5)], IMAGE)
    lists = pa.array([[{"bytes": photo(0), "path": None}]] * 5, pa.list_(IMAGE))
    for name, table, said in (
        ("text", pa.table({"caption": [*"abcde"]}), "has no column of images; its columns are caption"),
        ("lists", pa.table({"images": lists}), "holds lists of images in images"),
        ("rows", good.slice(0, 0), "holds no rows"),
        ("paths", good.set_column(0, "image", paths), "row 0 holds the path of an image and not its bytes"),
        ("labels", image_table(5, labels=[0, 1, 2, 3, 0]), "has the class number 3, and 3 classes"),
    ):
        file = write(tmp_path / f"{name}.parquet", table)
        with pytest.raises(UserError, match=rf"{name}\.parquet.* ?{said}") as caught:
            everything(opened(file, cached()))
        assert "\n" not in str(caught.value)


def test_damaged_and_changed_files_are_named(tmp_path, cached):
    file = write(tmp_path / "a.parquet", image_table(300), compression="none")
    data = file.read_bytes()
    file.write_bytes(data[:-100])
    with pytest.raises(UserError, match=r"a\.parquet cannot be read as parquet or Arrow"):
        open_tables(str(file), cached())
    file.write_bytes(data[:4] + bytes(2000) + data[2004:])  # the footer is whole
    found = opened(file, cached())
    with pytest.raises(UserError, match=r"a\.parquet cannot be read as parquet or Arrow"):
        everything(found)
    assert not [*(tmp_path / "cache").glob("*.partial")]
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"a\.parquet has changed since the run began"):
        everything(found)
    stream = tmp_path / "b.arrow"
    stream.write_bytes(b"\xff\xff\xff\xff no stream of Arrow")
    with pytest.raises(UserError, match=r"b\.arrow cannot be read"):
        open_tables(str(stream), cached())


def test_tables_that_differ_from_the_first(tmp_path, cached):
    write(tmp_path / "set/train-0.parquet", image_table(5))
    write(tmp_path / "set/train-1.parquet", image_table(0))
    assert opened(tmp_path / "set", cached()).sizes == [5]
    write(tmp_path / "set/train-1.parquet", image_table(5, names=["cat", "dog", "elk"]))
    with pytest.raises(UserError, match=r"train-1\.parquet has other classes than .*train-0\.parquet"):
        open_tables(str(tmp_path / "set"), cached())
    write(tmp_path / "set/train-1.parquet", pa.table({"photo": pa.array([photo(1)])}))
    with pytest.raises(UserError, match=r"train-1\.parquet has other columns than .*train-0\.parquet"):
        open_tables(str(tmp_path / "set"), cached())


def test_without_pyarrow_the_extra_is_named(tmp_path, cached, monkeypatch):
    file = write(tmp_path / "a.parquet", image_table(5))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.delattr(pa, "parquet")
    with pytest.raises(UserError, match=r"need pyarrow: pip install 'beit_pretrain\[parquet\]'"):
        open_tables(str(file), cached())


def test_pyarrow_is_imported_at_first_use():
    code = "import sys, beit_pretrain.data.table_folder, beit_pretrain.data.sources; print('pyarrow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


# --- which files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "split", "chosen"),
    [
        ("data/train-00000-of-00002.parquet data/train-00001-of-00002.parquet data/test-00000-of-00001.parquet",
         "train", "data/train-00000-of-00002.parquet data/train-00001-of-00002.parquet"),
        ("train.parquet validation.parquet", "val", "validation.parquet"),
        ("train/0000.parquet train/0001.parquet test/0000.parquet", "val", "test/0000.parquet"),
        ("default/train/0000.parquet default/test/0000.parquet", "test", "default/test/0000.parquet"),
        ("default/train/0.parquet other/train/0.parquet", "train", "default/train/0.parquet"),
        ("train-00000-of-00001-0123456789abcdef.parquet test-00000-of-00001-0123456789abcdef.parquet", "train",
         "train-00000-of-00001-0123456789abcdef.parquet"),
        ("part-0.parquet part-1.parquet", "train", "part-0.parquet part-1.parquet"),
        ("a.parquet b.parquet", None, "a.parquet b.parquet"),
        ("test-00000-of-00001.parquet", "train", "test-00000-of-00001.parquet"),
        ("train.parquet test.parquet", None, "test.parquet train.parquet"),
        ("train_extra.parquet train.parquet", "train", "train.parquet"),
        ("part-0.parquet test.parquet", "train", "part-0.parquet"),
        ("part-0.parquet test.parquet", "val", "test.parquet"),
        ("train/train-0.parquet val/val-0.parquet", "train", "train/train-0.parquet"),
        ("train/train-0.parquet val/val-0.parquet", "val", "val/val-0.parquet"),
    ],
)  # fmt: skip
def test_files_of_a_part(names, split, chosen):
    assert choose(names.split(), split, "SET") == chosen.split()


@pytest.mark.parametrize(
    ("names", "split", "said"),
    [
        ("a/train/0.parquet b/train/0.parquet", "train", "SET has the subsets a, b; add the folder of one"),
        ("train.parquet", "val", "SET has the parts train; split=val is none of them"),
        ("train.parquet test.parquet", "extra", "SET has the parts test, train; split=extra"),
    ],
)
def test_no_such_files(names, split, said):
    with pytest.raises(UserError, match=said):
        choose(names.split(), split, "SET")


def test_folders_of_images_and_tars_are_no_tables(tmp_path):
    (tmp_path / "tars").mkdir()
    for name in ("00000.tar", "00000.parquet", "00000_stats.json"):  # as img2dataset
        (tmp_path / "tars" / name).touch()
    (tmp_path / "files/00000").mkdir(parents=True)
    (tmp_path / "files/00000.parquet").touch()
    (tmp_path / "files/00000/000000001.jpg").touch()
    (tmp_path / "images/train/cat").mkdir(parents=True)
    (tmp_path / "images/train/metadata.parquet").touch()
    (tmp_path / "images/train/cat/1.jpg").touch()
    for name in ("tars", "files", "images", "images/train/cat/1.jpg", "tars/00000.tar"):
        assert local_tables(tmp_path / name, "train") is None, name
    other = write(tmp_path / "files/train.parquet", pa.table({"caption": ["a"]}))
    assert local_tables(tmp_path / "files", "train") is None
    write(other, image_table(1))  # the image beside it is one of a README
    assert local_tables(tmp_path / "files", "train") == [other]


# --- the cache ---------------------------------------------------------------------------------------------------


def test_tables_share_the_bounded_cache(tmp_path, cached, monkeypatch):
    for number in range(4):
        images = [{"bytes": photo(number) + bytes(9000), "path": None} for _ in range(20)]
        write(tmp_path / f"set/{number}.parquet", pa.table({"image": pa.array(images, IMAGE)}), use_dictionary=False)
    reader = opened(tmp_path / "set", cached(cache_gb=0.0006))  # 600 kB: two of the files with their estimates
    for shard in (0, 1, 2, 3):
        assert reader.read(Sample(shard, 3)).data == photo(shard) + bytes(9000)
        tars = [*(tmp_path / "cache").glob("*.tar")]
        assert len(tars) <= 2
        assert all(path.stat().st_size < 250_000 for path in tars)  # corrected to what was written
    monkeypatch.setattr(table_folder, "write_tar", lambda *of: pytest.fail("it is cached"))
    reader.fetch_ahead(3)
    assert everything(opened(tmp_path / "set/3.parquet", cached(cache_gb=0.0006)))[0][0] == photo(3) + bytes(9000)
    with pytest.raises(UserError, match=r"0\.parquet has .* bytes, more than data.cache_gb leaves room for"):
        everything(opened(tmp_path / "set", cached(cache_gb=0.0001)))


def test_index_of_a_shard_that_has_lost_it(tmp_path, cached):
    write(tmp_path / "set.parquet", image_table(5))
    (folder,) = opened(tmp_path / "set.parquet", cached()).folders
    expected = folder.index(0)
    for index in (tmp_path / "cache").glob("*.index.npy"):  # as if another process evicted the shard just now
        index.unlink()
    assert (folder.index(0) == expected).all()


def test_an_estimate_that_is_too_small_is_corrected(tmp_path, cached):
    """A column that repeats values takes fewer bytes in its file than its images do."""
    images = [{"bytes": photo(0) + bytes(50_000), "path": None}] * 40
    for number in range(2):
        write(tmp_path / f"set/{number}.parquet", pa.table({"image": pa.array(images, IMAGE)}))
    reader = opened(tmp_path / "set", cached(cache_gb=0.003))
    assert reader.shards[0].bytes < 300_000
    assert len(everything(reader)) == 80
    (tar,) = (tmp_path / "cache").glob("*.tar")  # the first had to go
    assert tar.stat().st_size > 2_000_000


def test_a_second_start_opens_no_file(tmp_path, cached, monkeypatch):
    for number in range(3):
        write(tmp_path / f"set/{number}.parquet", image_table(10 + number))
    write(tmp_path / "set/test.parquet", image_table(4))
    first = opened(tmp_path / "set", cached())
    opened(tmp_path / "set", cached(), "test")
    monkeypatch.setattr(table_folder, "TableFile", lambda *of: pytest.fail("its facts are noted"))
    again = opened(tmp_path / "set", cached())
    assert (again.shards, again.classes, again.without_class) == (first.shards, first.classes, first.without_class)
    monkeypatch.undo()
    write(tmp_path / "set/1.parquet", image_table(20))
    assert opened(tmp_path / "set", cached()).sizes == [10, 20, 12]


def test_the_same_data_at_another_place_and_another_version_at_the_same(tmp_path, cached):
    """`contents` compares a resumed run's data by it; the cache must never mix two versions of a file."""
    for folder in ("a", "b"):
        write(tmp_path / folder / "train.parquet", image_table(10))
    a, b = (opened(tmp_path / folder, cached()).shards for folder in "ab")
    assert [shard.sha256 for shard in a] == [shard.sha256 for shard in b]
    assert a[0].stored != b[0].stored
    os.utime(tmp_path / "a/train.parquet", (1, 1))
    (later,) = opened(tmp_path / "a", cached()).shards
    assert (later.sha256, later.stored == a[0].stored) == (a[0].sha256, False)
