"""Sources with a layout of their own, the listing on disk, worker processes."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_image_io import encoded
from test_make_shards import contents, make, read_back, rejected
from test_sources import class_files, tar_bytes, write_folder

from beit_pretrain import processes
from beit_pretrain.data.layout import BESIDE_MAPS, OTHER_PART
from beit_pretrain.data.left_out import LEFT_OUT, LeftOut
from beit_pretrain.data.listing import file_index as listing
from beit_pretrain.data.listing.file_index import Listing, build_listing
from beit_pretrain.data.listing.settings import LabelSettings
from beit_pretrain.data.manifest import read_manifest, verify_shards
from beit_pretrain.data.sources import TRAIN
from beit_pretrain.errors import UserError


def mask(size: tuple[int, int], seed: int = 0, mode: str = "L") -> bytes:
    values = np.random.default_rng(seed).integers(0, 151, size[::-1], np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


def ade(root: Path, parts: tuple[str, str] = ("training/", "validation/")) -> Path:
    """ADE20K's layout; one image of the first part each has no label map, one of another size, one in colours."""
    files = {"objectInfo150.txt": b"Idx\tRatio\tTrain\tVal\tName\n1\t0\t0\t0\twall\n"}
    for number, part in enumerate(dict.fromkeys(parts)):
        for i in range(4):
            files[f"images/{part}ADE_{number}_{i}.jpg"] = encoded(10 * number + i, (40, 30))
            files[f"annotations/{part}ADE_{number}_{i}.png"] = mask((40, 30), 10 * number + i)
    for name in ("none", "small", "colour"):
        files[f"images/{parts[0]}{name}.jpg"] = encoded(99, (40, 30))
    files[f"annotations/{parts[0]}small.png"] = mask((20, 15))
    files[f"annotations/{parts[0]}colour.png"] = mask((40, 30), mode="RGB")
    return write_folder(root / "ADEChallengeData2016", files)


def test_ade20k(tmp_path):
    src = write_folder(ade(tmp_path), {"predictions/none.png": mask((40, 30))})
    folder = make(src, tmp_path / "out")
    assert LeftOut.read(folder / LEFT_OUT).examples() == [
        ("images/validation/", OTHER_PART),
        ("predictions/", BESIDE_MAPS),
    ]
    manifest = read_manifest(folder)
    assert (manifest["samples"], manifest["segmentation"], manifest["segmentation_classes"]) == (4, True, ["wall"])
    assert manifest["classes"] == []
    for sample in read_back(folder):
        name = Path(sample["about"]["source"]).stem
        assert sample["jpg"] == (src / "images/training" / f"{name}.jpg").read_bytes()
        assert sample["seg.png"] == (src / "annotations/training" / f"{name}.png").read_bytes()
    why = {Path(key).stem: reason for key, reason in rejected(folder).items()}
    assert why.keys() == {"none", "small", "colour"}
    assert why["none"].endswith("its label map none.png: No such file or directory")
    assert "20 x 15 pixels, the image 40 x 30" in why["small"]
    assert "mode RGB" in why["colour"]
    assert verify_shards(folder, progress=False) == []
    val = make(src, tmp_path / "out", split="val")
    assert {Path(s["about"]["source"]).parent.name for s in read_back(val)} == {"validation"}


def test_ade20k_flat_and_resized(tmp_path):
    src = ade(tmp_path, ("", ""))
    for sample in read_back(make(src, tmp_path / "out", resize=15)):
        name = Path(sample["about"]["source"]).stem
        original = np.asarray(Image.open(src / "annotations" / f"{name}.png"))
        small = np.asarray(Image.open(io.BytesIO(sample["seg.png"])))
        assert small.shape == Image.open(io.BytesIO(sample["jpg"])).size[::-1] == (15, 20)
        assert set(np.unique(small)) <= set(np.unique(original))  # no mixtures of classes


def test_parts_of_a_source(tmp_path):
    parts = {"train": "ant", "val": "bee"}
    src = write_folder(tmp_path / "src", {f"{p}/{c}/{i}.jpg": encoded(i) for p, c in parts.items() for i in range(3)})
    assert {s["about"]["source"][:9] for s in read_back(make(src, tmp_path / "out"))} == {"train/ant"}
    with pytest.raises(UserError, match="class 'bee' of val is not among"):
        make(src, tmp_path / "out", split="val")
    assert {s["about"]["source"][:7] for s in read_back(make(src, tmp_path / "new", split="val"))} == {"val/bee"}
    with pytest.raises(UserError, match="has the parts train, val; split=mine is none"):
        make(src, tmp_path / "new", split="mine")
    loose = write_folder(tmp_path / "loose", {"train/a.jpg": encoded(0), "test/b.jpg": encoded(1)})
    (only,) = read_back(make(loose, tmp_path / "two"))
    assert (only["about"]["source"], read_manifest(tmp_path / "two/train")["classes"]) == ("train/a.jpg", [])


def test_refuses_a_shard_folder_as_source(tmp_path):
    folder = make(write_folder(tmp_path / "src", class_files(1)), tmp_path / "out")
    with pytest.raises(UserError, match="is a shard folder already"):
        make(folder, tmp_path / "again")


def test_processes_list_many_tars_alike(tmp_path, monkeypatch):
    tars = {f"n{t:02d}.tar": tar_bytes({f"{i}.jpg": b"x" * t for i in range(t % 4)}) for t in range(24)}
    src = write_folder(tmp_path / "src", tars | {"b/é\udcff.jpg".encode(errors="replace").decode(): b"loose"})
    monkeypatch.setattr(listing, "FEW", 3)
    for num_workers in (1, 2):
        (tmp_path / str(num_workers)).mkdir()
        build_listing(tmp_path / str(num_workers), [str(src)], TRAIN, 0, LabelSettings(), num_workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    found = Listing(tmp_path / "2")
    keys = [found.candidate(row).key for row in range(len(found))]
    assert len(keys) == len(set(keys)) == sum(t % 4 for t in range(24)) + 1
    for row, key in enumerate(keys):
        candidate = found.candidate(row)
        if ".tar" in key:
            assert (candidate.class_name, candidate.size) == (key[:3], int(key[1:3]))
            assert Path(candidate.path).name == key[:7]


def test_names_that_are_not_utf8(tmp_path):
    src = tmp_path / "src"
    (src / "ant").mkdir(parents=True)
    Path(src, "ant", "\udcff.jpg").write_bytes(encoded(0))
    Path(src, "ant", "\udcfe.jpg").write_bytes(b"no image")
    folder = make(src, tmp_path / "out")
    assert [s["about"]["source"] for s in read_back(folder)] == ["ant/\udcff.jpg"]
    assert list(rejected(folder)) == ["ant/\udcfe.jpg"]


def test_a_dead_worker_is_reported(monkeypatch):
    import os

    with pytest.raises(UserError, match="a worker process died"), processes.in_order(2) as run:
        list(run(os._exit, [3, 3]))


def test_in_order_holds_few_results():
    taken: list[int] = []

    def jobs():
        for number in range(100):
            taken.append(number)
            yield number

    with processes.in_order(2, inline=2) as run:
        results = run(json.dumps, jobs())
        assert [next(results) for _ in range(4)] == ["0", "1", "2", "3"]
        assert len(taken) <= 2 + 8 + 2
        assert list(results) == [str(n) for n in range(4, 100)]
