"""Sets that state their lengths: timm's info files and img2dataset's statistics, local, over http and on the Hub."""

from __future__ import annotations

import json

import pytest
from loopback import Answer, serving
from test_image_io import encoded
from test_sources import tar_bytes, write_folder

from beit_pretrain.data import storage
from beit_pretrain.data.settings import RemoteOptions
from beit_pretrain.data.split_info import stated_lengths, tars_of_folder, tars_of_location
from beit_pretrain.data.write.index_existing import index_shards
from beit_pretrain.errors import UserError

NAMES = {
    "train": [f"imagenet1k-train-{number:04d}.tar" for number in range(3)],
    "validation": [f"imagenet1k-validation-{number:02d}.tar" for number in range(2)],
}
LENGTHS = {"train": [1252, 1252, 1251], "validation": [782, 781]}
# As timm's imagenet-1k-wds has it.
INFO = {
    "splits": {
        split: {
            "name": split,
            "num_samples": sum(LENGTHS[split]),
            "filenames": NAMES[split],
            "shard_lengths": LENGTHS[split],
            "num_shards": len(NAMES[split]),
        }
        for split in NAMES
    }
}
ACCESS = RemoteOptions(retries=0, timeout=2)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(storage, "LONGEST_PAUSE", 0.01)


@pytest.fixture
def timm(tmp_path):
    files = {name: b"" for names in NAMES.values() for name in names}
    return write_folder(tmp_path / "wds", files | {"_info.json": json.dumps(INFO).encode()})


def stats(count: int, successes: int) -> bytes:
    """As img2dataset writes them."""
    lost = count - successes
    found = {"count": count, "successes": successes, "failed_to_download": lost, "failed_to_resize": 0}
    return json.dumps(found | {"duration": 9.1, "status_dict": {"success": successes}}, indent=4).encode()


@pytest.fixture
def img2dataset(tmp_path):
    sample = {"000000000.jpg": encoded(0), "000000000.txt": b"a caption", "000000000.json": b'{"key": "000000000"}'}
    tar = tar_bytes(sample)
    files = {"00000.tar": tar, "00000_stats.json": stats(10, 1), "00000.parquet": b"PAR1"}
    files |= {"00001.tar": tar, "00001_stats.json": stats(10, 3), "00001.parquet": b"PAR1"}
    return write_folder(tmp_path / "laion", files)


@pytest.mark.parametrize(
    ("split", "part"), [("train", "train"), ("val", "validation"), ("validation", "validation"), ("test", "validation")]
)
@pytest.mark.parametrize("name", ["_info.json", "info.json"])
@pytest.mark.parametrize("way", ["local", "file", "http"])
def test_timm(timm, serve, split, part, name, way):
    (timm / "_info.json").rename(timm / name)
    place = {"local": str(timm), "file": timm.as_uri(), "http": f"{serve(timm).url}"}[way]
    found = tars_of_folder(timm, split) if way == "local" else tars_of_location(place, split, ACCESS)
    start = str(timm) if way == "file" else place
    assert found == ([f"{start}/{tar}" for tar in NAMES[part]], LENGTHS[part], "", sum(LENGTHS[part]))


def test_as_timm_reads_it(timm):
    from timm.data.readers.reader_wds import _load_info, _parse_split_info

    for split in NAMES:
        theirs, ours = _parse_split_info(split, _load_info(str(timm))), tars_of_folder(timm, split)
        assert ours.urls == [str(timm / name) for name in theirs.filenames]
        assert (ours.lengths, ours.samples) == ([*theirs.shard_lengths], theirs.num_samples)


def test_parts_by_names(tmp_path, timm):
    (timm / "_info.json").unlink()
    assert tars_of_folder(timm, "train") == ([str(timm / name) for name in NAMES["train"]], None, "", None)
    assert tars_of_folder(timm, "val").urls == [str(timm / name) for name in NAMES["validation"]]
    parts = write_folder(tmp_path / "parts", {"train/0.tar": b"", "train/1.tar": b"", "val/0.tar": b"", "x.txt": b""})
    assert tars_of_folder(parts, "train").urls == [str(parts / "train/0.tar"), str(parts / "train/1.tar")]
    assert tars_of_folder(parts, "test").urls == [str(parts / "val/0.tar")]
    assert tars_of_folder(parts / "val", "train").urls == [str(parts / "val/0.tar")]
    both = write_folder(tmp_path / "both", {"train/set-train-0.tar": b"", "val/set-val-0.tar": b""})
    assert tars_of_folder(both, "train").urls == [str(both / "train/set-train-0.tar")]
    assert tars_of_folder(both, "val").urls == [str(both / "val/set-val-0.tar")]
    unlike = write_folder(tmp_path / "unlike", {"train/0.tar": b"", "valid_no_label/1.tar": b""})
    assert tars_of_folder(unlike, "train").urls == [str(unlike / "train/0.tar")]
    assert tars_of_folder(unlike, "val").urls == [str(unlike / "valid_no_label/1.tar")]
    with pytest.raises(UserError, match=r"parts has the parts train, val; split=dogs is none"):
        tars_of_folder(parts, "dogs")
    assert tars_of_folder(write_folder(tmp_path / "none", {"a.jpg": b""}), "train") is None


def test_lengths_of_named_tars(timm, serve):
    url = serve(timm).url
    urls = [f"{url}/{name}?sign=secret" for name in reversed(NAMES["validation"])]
    assert stated_lengths(urls, ACCESS)[0] == LENGTHS["validation"][::-1]
    assert stated_lengths([*urls, f"{url}/other.tar"], ACCESS) is None
    assert stated_lengths([f"pipe:cat {timm}/{NAMES['train'][0]}"], ACCESS) is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"shard_lengths": [1, 2]}, "3 filenames, but 2 shard_lengths"),
        ({"num_samples": 7}, r"add up to 3,755, but its num_samples is 7"),
        ({"shard_lengths": [1, 2, -3]}, "no counts"),
        ({"shard_lengths": [1, 2, "3"]}, "no counts"),
        ({"filenames": ["a.tar", "b.tar", "../c.tar"]}, r"'../c.tar' is not one in its folder"),
        ({"filenames": ["a.tar", "b.tar", "http://h/c.tar"]}, "is not one in its folder"),
        ({"filenames": ["a.tar", "b.tar", "/etc/c.tar"]}, "is not one in its folder"),
        ({"filenames": ["a.tar", "b.tar", 3]}, "is not one in its folder"),
        ({"filenames": ["a.tar", "b.tar", "a.tar"]}, "names a file twice"),
    ],
)
def test_damaged_info_files(timm, change, said):
    info = {"splits": INFO["splits"] | {"train": INFO["splits"]["train"] | change}}
    (timm / "_info.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match=rf"wds/_info.json is damaged: .*{said}") as caught:
        tars_of_folder(timm, "train")
    assert "\n" not in str(caught.value)
    (timm / "_info.json").write_text('{"splits": {')
    with pytest.raises(UserError, match=r"_info.json is damaged"):
        tars_of_folder(timm, "train")


def test_other_files_of_that_name_and_missing_lengths(timm):
    (timm / "_info.json").write_text('{"description": "photos", "splits": {"train": {"num_examples": 3}}}')
    assert tars_of_folder(timm, "train").lengths is None
    (timm / "_info.json").write_text("<html>not found</html>")
    assert tars_of_folder(timm, "train").lengths is None
    split = {"name": "train", "num_samples": 30, "filenames": NAMES["train"]}
    (timm / "_info.json").write_text(json.dumps({"splits": {"train": split}}))
    assert tars_of_folder(timm, "train")[1:] == (None, "", 30)
    with pytest.raises(UserError, match=r"wds has the parts train; split=val is none of them"):
        tars_of_folder(timm, "val")


def test_img2dataset(img2dataset, serve):
    line = "img2dataset could not download or resize 16 of 20 images"
    tars = [str(img2dataset / "00000.tar"), str(img2dataset / "00001.tar")]
    assert tars_of_folder(img2dataset, "train") == (tars, [1, 3], line, None)
    url = serve(img2dataset).url
    urls = [f"{url}/0000{number}.tar" for number in (0, 1)]
    assert stated_lengths(urls, ACCESS) == ([1, 3], line, "its statistics of img2dataset say")
    (img2dataset / "00001_stats.json").unlink()  # it did not finish
    assert stated_lengths(urls, ACCESS) is None
    assert tars_of_folder(img2dataset, "train").lengths is None


def test_captions_and_tables_of_img2dataset_call_for_no_warning(img2dataset, tmp_path, capsys):
    index_shards(img2dataset, tmp_path / "index", num_workers=1)
    assert "warning" not in capsys.readouterr().err


def test_a_location_without_tars(tmp_path, serve):
    assert tars_of_location(serve(tmp_path).url, "train", ACCESS) is None
    assert tars_of_location("pipe:cat {name}", "train", ACCESS) is None


def test_a_failing_server_is_not_a_set_without_info(timm):
    with serving() as server:
        server.next = [Answer(status=503)]
        with pytest.raises(UserError, match=r"_info.json cannot be fetched \(1 try\): HTTP 503"):
            tars_of_location(f"{server.url}/wds?sign=secret", "train", ACCESS)
        server.files["/_info.json"] = json.dumps(INFO).encode()
        server.length, server.next = False, [Answer(cut=200)]  # half an answer, without a length
        assert tars_of_location(server.url, "train", RemoteOptions(retries=1, timeout=2)).lengths == LENGTHS["train"]
