"""CIFAR-100's archive: read without running what is in it."""

import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_make_shards import read_back

from beit_pretrain.data import cifar
from beit_pretrain.data.manifest import read_manifest, verify_shards
from beit_pretrain.data.write.make_shards import make_shards
from beit_pretrain.errors import UserError

NAMES = [b"apple", b"bear", b"cloud"]


def batch(count: int, seed: int) -> dict:
    pixels = np.random.default_rng(seed).integers(0, 256, (count, cifar.PIXELS), dtype=np.uint8)
    files = [f"{NAMES[i % 3].decode()}_s_{i:06d}.png".encode() for i in range(count)]
    return {b"data": pixels, b"fine_labels": [i % 3 for i in range(count)], b"filenames": files}


def as_python2(content: dict) -> bytes:
    """Protocol 2 as CIFAR's authors wrote it: numpy's old module names."""
    return pickle.dumps(content, 2).replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def archive(path: Path, **files: bytes) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(f"cifar-100-python/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def official(tmp_path) -> Path:
    parts = {"train": as_python2(batch(20, 0)), "test": as_python2(batch(7, 1))}
    meta = as_python2({b"fine_label_names": NAMES, b"coarse_label_names": []})
    return archive(tmp_path / "cifar-100-python.tar.gz", **parts, meta=meta)


@pytest.mark.parametrize("unpacked", [False, True])
def test_round_trip(official, unpacked, tmp_path):
    source = official
    if unpacked:
        with tarfile.open(official) as tar:
            tar.extractall(tmp_path, filter="data")
        source = tmp_path / "cifar-100-python"
    for split, count, seed in (("train", 20, 0), ("val", 7, 1)):
        (folder,) = make_shards(source, tmp_path / "out", split=split, num_workers=1, samples_per_shard=8)
        assert read_manifest(folder)["classes"] == [name.decode() for name in NAMES]
        assert verify_shards(folder, progress=False) == []
        content = batch(count, seed)
        samples = read_back(folder)
        assert len(samples) == count
        for sample in samples:
            name = json.loads(sample["json"])["source"].rsplit("/")[-1]
            row = content[b"filenames"].index(name.encode())
            pixels = np.asarray(Image.open(io.BytesIO(sample["png"])))
            assert np.array_equal(pixels, content[b"data"][row].reshape(3, 32, 32).transpose(1, 2, 0))
            assert int(sample["cls"]) == content[b"fine_labels"][row]


def test_resumes_a_half_done_archive(official, tmp_path, monkeypatch):
    from beit_pretrain.data.write import make_shards as shards

    with monkeypatch.context() as patch:
        patch.setattr(shards, "write_manifest", None)
        with pytest.raises(TypeError):
            make_shards(official, tmp_path / "out", num_workers=1)
    assert len(read_back(make_shards(official, tmp_path / "out", num_workers=1)[0])) == 20


class Evil:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def memo_bomb() -> bytes:
    return b"\x80\x02}r\xff\xff\xff\x7f."  # LONG_BINPUT 2^31 - 1: the C unpickler would reserve 16 GB


def bad(kind: str, mark: Path) -> bytes:
    content = batch(4, 0)
    if kind == "evil":
        return pickle.dumps({b"data": Evil(mark)}, 2)
    if kind == "memo":
        return memo_bomb()
    if kind == "cut":
        return as_python2(content)[:-3000]
    if kind == "text":
        return b"no pickle"
    changes = {
        "objects": {b"data": np.array([[object] * cifar.PIXELS] * 4)},
        "shape": {b"data": content[b"data"][:, :-1]},
        "few": {b"fine_labels": [0]},
        "label": {b"fine_labels": [0, 1, 2, 3]},
        "names": {b"filenames": [b"../a", b"b", b"c", b"d"]},
        "no array": {b"data": [1]},
    }
    return as_python2(content | changes[kind])


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "kind", ["evil", "memo", "cut", "text", "objects", "shape", "few", "label", "names", "no array"]
)
def test_bad_archives(kind, tmp_path):
    meta = as_python2({b"fine_label_names": NAMES})
    source = archive(tmp_path / "cifar-100-python.tar.gz", train=bad(kind, tmp_path / "mark"), test=b"", meta=meta)
    with pytest.raises(UserError, match="not CIFAR-100's python version") as caught:
        make_shards(source, tmp_path / "out", num_workers=1)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "mark").exists()
    assert not (tmp_path / "out").exists()


def test_no_archive_at_all(tmp_path):
    (tmp_path / "cifar-100-python.tar.gz").write_bytes(b"x" * 99)
    with pytest.raises(UserError, match="not CIFAR-100"):
        make_shards(tmp_path / "cifar-100-python.tar.gz", tmp_path / "out", num_workers=1)
    archive(tmp_path / "cifar-100-python.tgz", train=b"x")
    with pytest.raises(UserError, match="lacks the file meta"):
        make_shards(tmp_path / "cifar-100-python.tgz", tmp_path / "out", num_workers=1)
    with pytest.raises(UserError, match="split=other is none of them"):
        make_shards(tmp_path / "cifar-100-python.tgz", tmp_path / "out", split="other", num_workers=1)
