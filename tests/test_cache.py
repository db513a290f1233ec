"""The cache: its limit holds at every moment, nothing is fetched twice, nothing incomplete has a final name."""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from test_sources import tar_bytes

from beit_pretrain.data import cache
from beit_pretrain.data.cache import Shard, ShardCache, check_content
from beit_pretrain.data.order import Sample
from beit_pretrain.data.reader import ShardReader
from beit_pretrain.data.settings import RemoteOptions
from beit_pretrain.errors import UserError

SIZE = 10240  # of a tar with a small file
INDEX = 256 + 40  # of its index


def shard(number: int) -> tuple[Shard, bytes]:
    data = tar_bytes({f"{number:09d}.jpg": b"%d" % number})
    assert len(data) == SIZE
    return Shard(f"shard-{number:06d}.tar", 1, len(data), hashlib.sha256(data).hexdigest()), data


def get(store: ShardCache, number: int) -> bytes:
    """The content of a shard, by way of the cache."""
    entry, data = shard(number)
    descriptor = store.open(entry, lambda file: file.write(data) and check_content(file, entry))
    try:
        return os.pread(descriptor, SIZE, 0)
    finally:
        os.close(descriptor)


def here(folder: Path, kind: str = ".tar") -> set[int]:
    names = {path.name for path in folder.iterdir()}
    return {number for number in range(50) if shard(number)[0].sha256 + kind in names}


def occupied(folder: Path) -> int:
    total = 0
    for entry in filter(lambda entry: entry.name != ".lock", os.scandir(folder)):
        with suppress(FileNotFoundError):  # a failed fetch goes away when it likes
            total += entry.stat().st_size
    return total


def test_looks_at_every_file_only_when_the_cache_may_be_full(tmp_path, monkeypatch):
    looks, contents = [], ShardCache._contents
    monkeypatch.setattr(ShardCache, "_contents", lambda self, mine: (looks.append(mine), contents(self, mine))[1])
    one, other = [ShardCache(tmp_path, 10 * (SIZE + INDEX)) for _ in range(2)]
    for number in range(0, 8, 2):
        get(one, number)
        get(other, number + 1)
    assert len(looks) == 2  # the first time of each
    (tmp_path / ".lock").write_bytes(b"cut")
    for number in range(8, 40):
        get(one, number)
        assert occupied(tmp_path) <= one.limit
    assert len(here(tmp_path)) >= 9


def test_stored_shards_are_read_back(tmp_path):
    store = ShardCache(tmp_path / "new/cache", 10**6)
    entry, data = shard(3)
    assert get(store, 3) == data
    assert here(store.folder) == here(store.folder, ".index.npy") == {3}
    assert not here(store.folder, ".partial")
    descriptor = store.open(entry, lambda file: pytest.fail("it is here"))
    assert store.index(entry, descriptor).tolist() == [(512, 1, -1, 0, 0)]
    (store.folder / f"{entry.sha256}.index.npy").unlink()  # it had to make room just now
    assert store.index(entry, descriptor).tolist() == [(512, 1, -1, 0, 0)]
    os.close(descriptor)


def test_the_longest_unused_makes_room(tmp_path):
    store = ShardCache(tmp_path, 3 * (SIZE + INDEX))
    for number in range(3):
        get(store, number)
        os.utime(tmp_path / f"{shard(number)[0].sha256}.tar", (0, 100 + number))
    store._touched.clear()
    get(store, 0)  # is the last used one now
    get(store, 3)
    assert here(tmp_path) == here(tmp_path, ".index.npy") == {0, 2, 3}
    assert occupied(tmp_path) <= store.limit


def test_the_files_of_others_are_neither_touched_nor_counted(tmp_path):
    """A folder of one's own as `data.cache_dir`: archives, indices, and what looks like the cache's at a glance."""
    digest = shard(0)[0].sha256
    names = ["ILSVRC2012_img_train.tar", "my.index.npy", "half.partial", f"{digest}.txt", f"x{digest}.tar"]
    names += [f"{digest.upper()}.tar", f"{digest[:-1]}.partial", f"{digest}.tar.partial"]
    for name in names:
        (tmp_path / name).write_bytes(bytes(10 * SIZE))
        os.utime(tmp_path / name, (0, 0))
    (tmp_path / f"{digest}.d").mkdir()
    store = ShardCache(tmp_path, SIZE + INDEX)  # less than what they occupy: nobody may wait for them to go
    for number in range(3):
        assert get(store, number) == shard(number)[1]
    assert here(tmp_path) == here(tmp_path, ".index.npy") == {2}
    assert all((tmp_path / name).read_bytes() == bytes(10 * SIZE) for name in names)
    assert len(os.listdir(tmp_path)) == len(names) + 1 + 1 + 2  # the folder, the lock, a shard with its index


def test_a_full_disk_is_named(full_disk, shards, serve, tmp_path):
    """A disk that holds less than data.cache_gb says."""
    disk, server = full_disk(20_000), serve(shards / "train")
    reader = ShardReader(server.url, RemoteOptions(str(disk / "cache"), retries=3))
    with pytest.raises(UserError, match=rf"^data\.cache_dir={disk}/cache with shard-000000\.tar: No space left"):
        reader.read(Sample(0, 0))
    assert server.requests["shard-000000.tar"] == 1  # another try would not mend it
    assert os.listdir(disk / "cache") == [".lock"]


def test_an_open_file_outlives_its_place(tmp_path):
    store = ShardCache(tmp_path, SIZE + INDEX)
    entry, data = shard(0)
    get(store, 0)
    descriptor = store.open(entry, lambda file: pytest.fail("it is here"))
    get(store, 1)
    assert here(tmp_path) == {1}
    assert os.pread(descriptor, SIZE, 0) == data
    assert len(store.index(entry, descriptor)) == 1
    os.close(descriptor)


def test_a_shard_larger_than_the_cache(tmp_path):
    store = ShardCache(tmp_path, SIZE + INDEX - 1)
    with pytest.raises(UserError, match=r"shard-000000\.tar has 10,240 bytes, more than data\.cache_gb"):
        get(store, 0)
    assert occupied(tmp_path) == 0


def test_a_failed_fetch_leaves_nothing(tmp_path):
    store = ShardCache(tmp_path, 10**6)

    def fail(file):
        file.write(b"half")
        raise UserError("server gone")

    with pytest.raises(UserError, match="server gone"):
        store.open(shard(0)[0], fail)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    with pytest.raises(UserError, match=r"cache_dir.* with shard-000000\.tar: No space left"):
        store.open(shard(0)[0], lambda file: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_file_that_is_no_tar_is_refused(tmp_path):
    """Its manifest may be in order and the shard still be rubbish."""
    data = b"x" * SIZE
    entry = Shard("a.tar", 1, SIZE, hashlib.sha256(data).hexdigest())
    with pytest.raises(UserError, match="not a readable uncompressed tar"):
        ShardCache(tmp_path, 10**6).open(entry, lambda file: file.write(data))
    assert not list(tmp_path.glob("*.tar"))


def test_contents_are_checked():
    entry, data = shard(0)
    check_content(io.BytesIO(data + b"left from an earlier try"), entry)
    for wrong in (data[:-1], data[:99] + b"x" + data[100:]):
        with pytest.raises(OSError, match="SHA-256"):
            check_content(io.BytesIO(wrong), entry)


def test_a_shard_that_was_cut_is_fetched_again(tmp_path):
    store = ShardCache(tmp_path, 10**6)
    get(store, 0)
    os.truncate(tmp_path / f"{shard(0)[0].sha256}.tar", 100)
    assert get(store, 0) == shard(0)[1]


def test_an_unwritable_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data\.cache_dir=.*file/cache cannot be written"):
        ShardCache(tmp_path / "file/cache", 10**6)


class TestAhead:
    def ahead(self, store: ShardCache, number: int) -> None:
        entry, data = shard(number)
        store.fetch_ahead(entry, lambda file: file.write(data))

    def test_fetches_and_renews(self, tmp_path):
        store = ShardCache(tmp_path, 10**6)
        self.ahead(store, 0)
        path = tmp_path / f"{shard(0)[0].sha256}.tar"
        os.utime(path, (0, 0))
        store._touched.clear()
        self.ahead(store, 0)
        assert path.stat().st_mtime > 1

    def test_takes_no_room_from_what_is_in_use(self, tmp_path):
        store = ShardCache(tmp_path, SIZE + INDEX)
        get(store, 0)
        self.ahead(store, 1)
        assert here(tmp_path) == {0}
        os.utime(tmp_path / f"{shard(0)[0].sha256}.tar", (0, time.time() - cache.RECENT - 1))
        self.ahead(store, 1)
        assert here(tmp_path) == {1}

    def test_leaves_a_shard_to_whoever_fetches_it(self, tmp_path):
        store, (entry, data) = ShardCache(tmp_path, 10**6), shard(0)
        started, go = threading.Event(), threading.Event()

        def slowly(file):
            started.set()
            go.wait(5)
            file.write(data)

        thread = threading.Thread(target=lambda: os.close(store.open(entry, slowly)))
        thread.start()
        started.wait(5)
        store.fetch_ahead(entry, lambda file: pytest.fail("somebody does already"))
        go.set()
        thread.join()
        assert here(tmp_path) == {0}


def crowd(folder: Path, limit: int, seed: int, log: Path) -> None:
    """One of many processes that read shards at random, noting what they fetch and how full the folder is."""
    store, rng = ShardCache(folder, limit), np.random.default_rng(seed)
    for number in rng.integers(0, 12, 40).tolist():
        entry, data = shard(number)

        def fetch(file, entry=entry, data=data):
            with log.open("a") as lines:
                lines.write(f"{entry.name}\n")
            file.write(data[:5000])
            time.sleep(0.002)
            file.write(data[5000:])
            check_content(file, entry)

        descriptor = store.open(entry, fetch)
        if os.pread(descriptor, SIZE, 0) != data:
            os._exit(3)
        os.close(descriptor)


@pytest.mark.parametrize("places", [2, 12])
def test_many_processes_share_it(tmp_path, places):
    limit, log, most = places * (SIZE + INDEX), tmp_path / "log", 0
    store = ShardCache(tmp_path / "cache", limit)
    context = multiprocessing.get_context("fork")
    crew = [context.Process(target=crowd, args=(tmp_path / "cache", limit, seed, log)) for seed in range(4)]
    for process in crew:
        process.start()
    while any(process.is_alive() for process in crew):
        with store._locked():  # a moment at which nothing is renamed or makes room
            most = max(most, occupied(store.folder))
    assert [process.exitcode for process in crew] == [0] * 4
    fetched = log.read_text().splitlines()
    if places == 12:
        assert len(fetched) == len(set(fetched)) == 12  # room for all: nobody fetches what another has
    assert limit / 2 < most <= limit
    assert occupied(tmp_path / "cache") <= limit


def test_a_killed_fetch_is_cleared_away(tmp_path):
    def hang(file):
        file.write(b"half")
        file.flush()
        time.sleep(60)

    store = ShardCache(tmp_path, 2 * (SIZE + INDEX))
    process = multiprocessing.get_context("fork").Process(target=lambda: store.open(shard(0)[0], hang))
    process.start()
    while occupied(tmp_path) < SIZE:
        time.sleep(0.01)
    get(store, 1)
    assert here(tmp_path, ".partial") == {0}  # its room is reserved
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    get(store, 2)
    assert here(tmp_path, ".partial") == set()
    assert here(tmp_path) == {1, 2}
    assert get(store, 0) == shard(0)[1]


def test_freed_room_goes_to_a_waiting_reader(tmp_path):
    store, (entry, data) = ShardCache(tmp_path, SIZE + INDEX), shard(0)
    started = threading.Event()

    def slowly(file):
        started.set()
        time.sleep(0.3)
        file.write(data)

    thread = threading.Thread(target=lambda: os.close(store.open(entry, slowly)))
    thread.start()
    started.wait(5)
    assert get(store, 1) == shard(1)[1]
    thread.join()
    assert here(tmp_path) == {1}
