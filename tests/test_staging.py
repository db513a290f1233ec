"""Killed runs resume or say why not; nothing half-written ever has a final name."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from test_image_io import encoded
from test_make_shards import contents, make, read_back, rejected
from test_sources import class_files, tar_bytes, write_folder
from test_tars import HOSTILE, hostile_tar

from beit_pretrain.data.manifest import read_manifest
from beit_pretrain.data.write import make_shards as shards
from beit_pretrain.data.write import sample_encoder as members
from beit_pretrain.data.write import shard_writer as packing
from beit_pretrain.data.write.staging import work_folder
from beit_pretrain.errors import UserError


class Killed(BaseException):
    """Stands for a kill at a chosen moment: nothing catches it."""


@pytest.fixture
def source(tmp_path) -> Path:
    files = class_files() | {"ant/text.jpg": b"no image"}
    tars = {f"{c}.tar": tar_bytes({k: v for k, v in files.items() if k.startswith(c)}) for c in ("bee", "cat")}
    return write_folder(tmp_path / "src", tars | {k: v for k, v in files.items() if k.startswith("ant")})


def stopped(source: Path, out: Path, after: int, **options) -> None:
    """A run that ends after so many shards."""
    write, count = packing.write_shard, 0

    def some(job):
        nonlocal count
        count += 1
        if count > after:
            raise Killed
        return write(job)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "write_shard", some)
        with pytest.raises(Killed):
            make(source, out, **options)
    assert os.listdir(out) == [".making"]


@pytest.mark.parametrize("after", [0, 1, 3])
def test_resumes_a_killed_run(after, source, tmp_path, monkeypatch):
    make(source, tmp_path / "whole", val=0.2)
    stopped(source, tmp_path / "out", after, val=0.2)
    write, written = packing.write_shard, []
    monkeypatch.setattr(shards, "write_shard", lambda job: (written.append(job), write(job))[1])
    make(source, tmp_path / "out", val=0.2)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    total = sum(len(read_manifest(tmp_path / "out" / name)["shards"]) for name in ("train", "val"))
    assert len(written) == total - after


def test_rewrites_incomplete_shards(source, tmp_path):
    make(source, tmp_path / "whole")
    stopped(source, tmp_path / "out", 3)
    work = tmp_path / "out/.making"
    os.truncate(work / "train/shard-000000.tar", 700)
    (work / "reports-train/000001.json").write_text("{")
    (work / "train/shard-000002.index.npy").unlink()
    (work / "train/shard-000003.tar.123.partial").write_bytes(b"half")
    make(source, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"resize": 16}, "resize=null, not 16"),
        ({"seed": 3}, "seed=0, not 3"),
        ({"window": [0, 9]}, r"window=null, not \[0.0,9.0\]"),
        ({"samples_per_shard": 4}, "samples_per_shard=5, not 4"),
        ({"split": "other"}, "split=train, not other"),
        ({"val": 0.5}, "val=0.0, not 0.5"),
    ],
)
def test_other_settings_are_refused(options, said, source, tmp_path):
    stopped(source, tmp_path / "out", 1)
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match=f"half-done run with {said}; give the same settings") as caught:
        make(source, tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
    assert contents(tmp_path / "out") == before


def grown(src: Path) -> str:
    (src / "bee.tar").write_bytes((src / "bee.tar").read_bytes() + bytes(512))
    return "bee.tar has changed"


def touched(src: Path) -> str:
    os.utime(src / "ant/ant_0.jpg", (1, 1))
    return "ant has changed"


def removed(src: Path) -> str:
    (src / "cat.tar").unlink()
    return "cat.tar is missing"


def added(src: Path) -> str:
    (src / "dog.tar").write_bytes(tar_bytes({"a.jpg": encoded(0)}))
    return "have changed, by .*dog.tar"


@pytest.mark.parametrize("change", [grown, touched, removed, added])
def test_a_changed_source_is_refused(change, source, tmp_path):
    stopped(source, tmp_path / "out", 1)
    said = change(source)
    with pytest.raises(UserError, match=f"{said}.* since the half-done run"):
        make(source, tmp_path / "out")


def gone(files: list[Path], src: Path) -> str:
    src.rename(src.with_name("away"))
    return "cannot be read: No such file or directory"


def shorter(files: list[Path], src: Path) -> str:
    for file in files:
        os.truncate(file, 100)
    return "cannot be read: it has become shorter since it was listed"


def failing(files: list[Path], src: Path) -> str:
    for file in files:
        file.unlink()
        file.mkdir()
    return "cannot be read: Is a directory"


@pytest.mark.parametrize("trouble", [gone, shorter, failing])
def test_files_that_became_unreadable_are_not_rejected(trouble, source, tmp_path):
    """A share that is unmounted in the middle: the rest of its images would be missing forever."""
    whole = contents(make(source, tmp_path / "whole").parent)
    files = [path for path in source.rglob("*") if path.is_file()]
    kept = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}
    write, done = packing.write_shard, []

    def write_then_trouble(job):
        if len(done) == 1:
            done.append(trouble(files, source))
        done.append(write(job))
        return 5

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "write_shard", write_then_trouble)
        with pytest.raises(UserError, match="; what is finished is kept; rerun the same command to resume") as caught:
            make(source, tmp_path / "out")
    assert done[1] in str(caught.value)
    assert str(source) in str(caught.value)
    assert os.listdir(tmp_path / "out") == [".making"]
    assert len(list((tmp_path / "out/.making/reports-train").iterdir())) == 1
    shutil.rmtree(source, ignore_errors=True)
    for path, (data, time_ns) in kept.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        os.utime(path, ns=(time_ns, time_ns))
    assert contents(make(source, tmp_path / "out").parent) == whole


def test_a_source_that_changes_during_the_run_is_not_published(source, tmp_path):
    """Even if the change comes after its last file was read."""
    write = shards.write_manifest

    def change(*words, **settings):
        write(*words, **settings)
        os.utime(source / "bee.tar", (1, 1))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "write_manifest", change)
        with pytest.raises(UserError, match=r"bee\.tar has changed since"):
            make(source, tmp_path / "out")
    assert os.listdir(tmp_path / "out") == [".making"]


def test_label_maps_that_disappear_during_the_run(tmp_path):
    files = {f"images/{i}.png": encoded(i, (8, 8), "PNG") for i in range(4)}
    maps = {f"annotations/{i}.png": encoded(i, (8, 8), "PNG", "L") for i in range(4)}
    src = write_folder(tmp_path / "ade", files | maps)
    write = packing.write_shard

    def remove(job):
        (src / "annotations").rename(src / "elsewhere")
        (src / "annotations").mkdir()
        return write(job)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "write_shard", remove)
        with pytest.raises(UserError, match=r"none of the 4 files|has changed since"):
            make(src, tmp_path / "out")
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    (src / "annotations").rmdir()
    (src / "elsewhere").rename(src / "annotations")

    def remove_some(job):
        for i in range(3):
            (src / f"annotations/{i}.png").unlink()
        return write(job)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "write_shard", remove_some)
        with pytest.raises(UserError, match="images has changed since"):
            make(src, tmp_path / "out")


@pytest.mark.parametrize("error", [MemoryError(), OSError(12, "Cannot allocate memory")], ids=["python", "system"])
def test_images_are_not_rejected_when_memory_is_short(error, source, tmp_path, monkeypatch):
    decode = members.to_rgb

    def short(image):
        if image.size == (24, 18):
            raise error
        return decode(image)

    with monkeypatch.context() as patch:
        patch.setattr(members, "to_rgb", short)
        with pytest.raises(UserError, match=r"not enough memory to decode .*\.jpg of .*; fewer workers") as caught:
            make(source, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path / "out") == [".making"]
    assert read_manifest(make(source, tmp_path / "out"))["rejected"] == 1


def test_a_large_image_in_too_little_memory(tmp_path):
    """As `ulimit -v` has it: the image is fine, and another machine would take it."""
    Image.new("L", (13_000, 13_000)).save(tmp_path / "large.png")
    words = [sys.executable, "-c", SHORT, str(tmp_path / "large.png"), str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert "UserError: not enough memory to decode large.png of" in done.stderr
    assert not (tmp_path / "out/train").exists()


SHORT = """
import resource, sys
from beit_pretrain.data.write.make_shards import make_shards
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**27, used + 2**27))
make_shards(sys.argv[1], sys.argv[2], num_workers=1)
"""


def test_a_finished_make_is_left_as_it_is(source, tmp_path, monkeypatch):
    make(source, tmp_path / "out")
    before = contents(tmp_path)
    monkeypatch.setattr(shards, "write_shard", None)
    make(source, tmp_path / "out")
    assert contents(tmp_path) == before
    for options, said in (({"resize": 9}, "resize=null, not 9"), ({"seed": 1}, "seed=0, not 1")):
        with pytest.raises(UserError, match=f"holds shards with {said}"):
            make(source, tmp_path / "out", **options)
    added(source)
    with pytest.raises(UserError, match="holds shards of other files"):
        make(source, tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["train"]


def test_refuses_a_second_run_at_the_same_time(source, tmp_path):
    with work_folder(tmp_path / "out"), pytest.raises(UserError, match="another process is making shards"):
        make(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    make(source, tmp_path / "out")


def test_hostile_members_are_listed_and_nothing_is_written_elsewhere(tmp_path):
    folder = tmp_path / "a/b/c"
    folder.mkdir(parents=True)
    made = make(hostile_tar(folder / "x.tar"), folder / "out")
    assert rejected(made).keys() == HOSTILE.keys()
    assert all(rejected(made).values())
    assert [s["about"]["source"] for s in read_back(made)] == ["good.jpg"]
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert all(name.startswith(("a/b/c/out/", "a/b/c/x.tar")) for name in written)


@pytest.mark.parametrize("name", ["../../x.tar", "/etc/x.tar", "a/x.tar", "..", "x.tar\\..\\y.tar", 7, "x.npy"])
def test_refuses_a_manifest_that_points_elsewhere(name, source, tmp_path):
    folder = make(source, tmp_path / "out")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][0]["name"] = name
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="is not a plain file name"):
        read_manifest(folder)


def command(src: Path, out: Path, *words: str) -> list[str]:
    start = [sys.executable, "-m", "beit_pretrain", "shards", "make", f"src={src}", f"out={out}"]
    return [*start, "samples_per_shard=2", "num_workers=2", *words]


def test_resumes_after_a_full_disk(full_disk, tmp_path):
    """ENOSPC rather than a limit of the process; with room, the same command resumes."""
    src = write_folder(tmp_path / "big", {f"a/{i}.png": encoded(i, (200, 200), "PNG") for i in range(6)})
    disk = full_disk(600_000)
    with pytest.raises(
        UserError, match=rf"^cannot write shards to {disk}/out: No space left on device; what is"
    ) as caught:
        make(src, disk / "out", samples_per_shard=2)
    assert "\n" not in str(caught.value)
    assert os.listdir(disk / "out") == [".making"]
    assert not list((disk / "out/.making/train").glob("*.partial"))
    assert len(list((disk / "out/.making/reports-train").iterdir())) == 2
    subprocess.run(["mount", "-o", "remount,size=4m", disk], check=True)
    made = make(src, disk / "out", samples_per_shard=2)
    assert contents(made.parent) == contents(make(src, tmp_path / "whole", samples_per_shard=2).parent)


def test_a_full_disk_is_one_line(source, tmp_path):
    big = write_folder(tmp_path / "big", {f"a/{i}.png": encoded(i, (200, 200), "PNG") for i in range(4)})

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))

    done = subprocess.run(command(big, tmp_path / "out"), capture_output=True, text=True, preexec_fn=small_files)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: cannot write shards to")
    assert "File too large; what is finished is kept" in last
    assert "Traceback" not in done.stderr
    assert os.listdir(tmp_path / "out") == [".making"]
    assert not list((tmp_path / "out").rglob("*.tar*"))
    make(big, tmp_path / "whole", samples_per_shard=2)
    make(big, tmp_path / "out", samples_per_shard=2)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.long
@pytest.mark.timeout(600)
def test_twenty_kills_at_random_moments(tmp_path):
    files = {f"{c}/{i}.jpg": encoded(100 * c + i, (300, 300)) for c in range(8) for i in range(20)}
    src = write_folder(tmp_path / "src", files | {"0/text.jpg": b"no image"})
    started = time.perf_counter()
    again = command(src, tmp_path / "out", "val=0.2", "samples_per_shard=4")
    subprocess.run(again, check=True, capture_output=True)
    duration = time.perf_counter() - started
    os.rename(tmp_path / "out", tmp_path / "whole")
    expected, rng, kills, unfinished = contents(tmp_path / "whole"), random.Random(0), 0, 0
    while kills < 20:
        run = subprocess.Popen(again, stderr=subprocess.DEVNULL)
        try:
            assert run.wait(rng.uniform(0.4, 0.9) * duration) == 0
            assert contents(tmp_path / "out") == expected
            shutil.rmtree(tmp_path / "out")
        except subprocess.TimeoutExpired:
            run.send_signal(signal.SIGKILL)
            run.wait()
            kills += 1
            unfinished += (tmp_path / "out/.making").exists()
    subprocess.run(again, check=True, capture_output=True)
    assert contents(tmp_path / "out") == expected
    assert unfinished >= 5  # or the moments were no test
