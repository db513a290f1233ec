"""Tables in `shards make` and in `predict`, and lists of classes that lie with the images."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
from table_makers import IMAGE, NAMES, image_table, noted, photo, save_to_disk, write
from test_make_shards import read_back
from test_tables import rows_of
from tiny import labels

from beit_pretrain.data.listing.metadata_file import with_metadata
from beit_pretrain.data.listing.settings import LabelSettings
from beit_pretrain.data.manifest import read_manifest, verify_shards
from beit_pretrain.data.reader import ShardReader
from beit_pretrain.data.sources import list_images, read_candidate
from beit_pretrain.data.write.make_shards import make_shards
from beit_pretrain.errors import UserError
from beit_pretrain.inference.image_stream import source_of


def made(source, out, **settings) -> list[tuple[bytes, str | None]]:
    """(image, class) of every sample that a make writes, sorted."""
    (folder,) = make_shards(source, out, num_workers=1, **settings)
    assert verify_shards(folder, progress=False) == []
    classes = read_manifest(folder)["classes"]
    samples = [(s.get("jpg", s.get("png")), s.get("cls")) for s in read_back(folder)]
    return sorted((image, None if number is None else classes[int(number)]) for image, number in samples)


@pytest.mark.parametrize("kind", ["file", "folder", "saved"])
def test_shards_of_tables(tmp_path, kind):
    tables = [image_table(12), image_table(9, 12)]
    if kind == "file":
        source, tables = write(tmp_path / "one.parquet", tables[0]), tables[:1]
    elif kind == "folder":
        source = tmp_path / "set"
        for number, table in enumerate(tables):
            write(source / f"data/train-{number}.parquet", table)
        write(source / "data/test-0.parquet", image_table(5, 90))
    else:
        source = save_to_disk(tmp_path / "saved", pa.concat_tables(tables))
    expected = sorted((data, NAMES[label]) for table in tables for data, label in rows_of(table))
    assert made(source, tmp_path / "out") == expected
    origin = {json.loads(sample["json"])["source"] for sample in read_back(tmp_path / "out/train")}
    start = {"file": "", "folder": r"data/train-\d\.parquet/", "saved": r"data-\d{5}-of-00002\.arrow/"}[kind]
    assert len(origin) == len(expected)
    assert all(re.fullmatch(start + r"\d{8}", name) for name in origin)
    if kind == "folder":
        assert len(made(source, tmp_path / "out", split="test")) == 5


def test_classes_with_slashes_and_rows_that_are_no_images(tmp_path):
    images = [{"bytes": photo(0), "path": None}, None, {"bytes": b"no image", "path": None}]
    images += [{"bytes": photo(i), "path": None} for i in (3, 4)]
    table = pa.table({"image": pa.array(images, IMAGE), "label": pa.array([0, 1, 1, None, 1])})
    feature = {"_type": "ClassLabel", "names": ["n/a", "cat"]}
    write(tmp_path / "a.parquet", noted(table, {"image": {"_type": "Image"}, "label": feature}))
    found = made(tmp_path / "a.parquet", tmp_path / "out")
    assert Counter(name for _, name in found) == {"n∕a": 1, None: 1, "cat": 1}
    rejected = [json.loads(line)["key"] for line in (tmp_path / "out/train/rejected.jsonl").read_text().splitlines()]
    assert sorted(rejected) == ["00000001", "00000002"]


def test_image_key_and_labels_of_make(tmp_path):
    table = image_table(6, names=None).append_column("second", image_table(6, 50)["image"])
    write(tmp_path / "a.parquet", table)
    with pytest.raises(UserError, match=r"src=hf://datasets/a/b: shards make reads files of this machine"):
        make_shards("hf://datasets/a/b?token=x", tmp_path / "out")
    with pytest.raises(UserError, match="image_key="):
        make_shards(tmp_path / "a.parquet", tmp_path / "out", num_workers=1)
    found = made(tmp_path / "a.parquet", tmp_path / "new", image_key=["second"])
    assert found == sorted((data, str(i % 3)) for i, (data, _) in enumerate(rows_of(image_table(6, 50))))


def test_predict_lists_rows(tmp_path):
    tables = [image_table(130), image_table(4, 130)]
    for name, table in zip(("train", "test"), tables, strict=True):
        write(tmp_path / f"set/{name}.parquet", table)
    found = list_images(tmp_path / "set")
    assert [c.key for c in found[:5]] == [f"test.parquet/{i:08d}" for i in range(4)] + ["train.parquet/00000000"]
    assert [read_candidate(c) for c in found] == [data for table in tables[::-1] for data, _ in rows_of(table)]
    named = source_of(str(tmp_path / "set/test.parquet"))
    assert [name for name, _ in named] == [f"{i:08d}" for i in range(4)]
    assert [read() for _, read in named] == [data for data, _ in rows_of(tables[1])]
    both = source_of([str(tmp_path / f"set/{name}.parquet") for name in ("test", "train")])
    assert [both[number][0] for number in (3, 4)] == ["test.parquet/00000003", "train.parquet/00000000"]
    write(tmp_path / "set/test.parquet", image_table(2, 7))  # another file of the same name
    assert [read_candidate(c) for c in list_images(tmp_path / "set/test.parquet")] == [photo(7), photo(8)]
    write(tmp_path / "text.parquet", pa.table({"a": ["b"]}))
    with pytest.raises(UserError, match=r"text\.parquet has no column of images"):
        list_images(tmp_path / "text.parquet")


# --- lists of classes beside the images --------------------------------------------------------------------------


def image_folder(folder: Path, count: int = 6) -> Path:
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"{number}.jpg").write_bytes(photo(number))
    return folder


def metadata(folder: Path, suffix: str, **columns) -> None:
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if suffix == "csv":
        lines = [",".join(map(str, row)) for row in [columns, *(row.values() for row in rows)]]
        (folder / "metadata.csv").write_text("\n".join(lines))
    elif suffix == "jsonl":
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    else:
        features = {"label": {"_type": "ClassLabel", "names": NAMES}} if "label" in columns else {}
        write(folder / "metadata.parquet", noted(pa.table(columns), features))


@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_metadata_gives_the_classes(tmp_path, capsys, suffix, parts):
    folder = image_folder(tmp_path / "set/train")
    image_folder(tmp_path / "set/test", 2)
    label = [i % 3 if suffix == "parquet" else NAMES[i % 3] for i in range(6)]
    columns = {"file_name": [f"{i}.jpg" for i in range(6)], "text": [f"photo {i}" for i in range(6)], "label": label}
    metadata(folder, suffix, **columns)
    found = made(tmp_path / "set" if parts else folder, tmp_path / "out")
    assert found == sorted((photo(i), NAMES[i % 3]) for i in range(6))
    assert f"classes are those of {folder / f'metadata.{suffix}'}" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_captions_and_other_tables_give_no_classes(tmp_path, capsys, suffix):
    folder = image_folder(tmp_path / "set")
    metadata(folder, suffix, file_name=[f"{i}.jpg" for i in range(6)], text=[f"photo {i}" for i in range(6)])
    assert {name for _, name in made(folder, tmp_path / "out")} == {None}
    assert "classes are those" not in capsys.readouterr().out
    chosen = with_metadata([str(folder)], "train", LabelSettings(class_column="text"))
    assert chosen.path == str(folder / f"metadata.{suffix}")
    named = with_metadata([str(folder)], "train", LabelSettings(path="other.csv", class_column="text"))
    assert named.path == "other.csv"


def test_images_that_the_metadata_lacks(tmp_path):
    folder = image_folder(tmp_path / "set")
    metadata(folder, "csv", file_name=["1.jpg", "2.jpg"], label=["a", "b"])
    with pytest.raises(UserError, match=r"metadata\.csv has no class for '0.jpg' and 3 more images"):
        make_shards(folder, tmp_path / "out", num_workers=1)
    (shards,) = make_shards(folder, tmp_path / "out", num_workers=1, labels={"unlisted": "skip"})
    assert sorted(labels(ShardReader(shards)).tolist()) == [0, 1]
    (folder / "metadata.csv").unlink()
    (folder / "metadata.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(UserError, match=r"metadata\.parquet cannot be read"):
        make_shards(folder, tmp_path / "new", num_workers=1)
