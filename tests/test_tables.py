"""Parquet and Arrow files as a source: which files, which columns, and the same batches as of shards."""

from __future__ import annotations

import json
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from table_makers import IMAGE, NAMES, image_table, noted, photo, save_to_disk, write
from test_sources import tar_bytes

from beit_pretrain.data import table_folder
from beit_pretrain.data.cache import ShardCache
from beit_pretrain.data.datamodule import ShardData
from beit_pretrain.data.order import Sample
from beit_pretrain.data.reader import ShardReader
from beit_pretrain.data.settings import SourceSettings
from beit_pretrain.data.table_files import choose, local_tables
from beit_pretrain.data.table_folder import open_tables
from beit_pretrain.data.write.make_shards import make_shards
from beit_pretrain.engine.distributed import contents
from beit_pretrain.errors import UserError


@pytest.fixture
def cached(tmp_path):
    """`cached(image_key=[...], ...)`: settings with a cache of the test's own."""
    return lambda **settings: SourceSettings(cache_dir=str(tmp_path / "cache"), **settings)


def opened(source, settings, split=None) -> ShardReader:
    folder = open_tables(str(source), settings, split)
    assert folder is not None
    return ShardReader([folder])


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


def test_batches_are_those_of_shards_with_the_same_rows(tmp_path, cached):
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

    def batches(source):
        settings = dict(num_workers=0, cache_dir=str(tmp_path / "cache"), shuffle_block_size=16, shuffle_streams=2)
        data = ShardData(source, views, views, seed=3, **settings)
        dataset = data.train_dataset(12) if hasattr(data, "train_dataset") else None
        return data, dataset

    readers = [stored, opened(tmp_path / "set", cached())]
    assert readers[0].sizes == readers[1].sizes
    assert readers[0].classes == readers[1].classes
    assert everything(readers[0]) == everything(readers[1])
