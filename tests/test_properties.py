"""Properties that hold for all inputs: sample order, mixtures, the shard cache, tar scans, quoting of overrides.

The examples are the same at every run. `pytest tests/test_properties.py --hypothesis-profile=thorough` draws new ones.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import tarfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

import numpy as np
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_sources import tar_bytes

from beit_pretrain.config import compose_raw
from beit_pretrain.data.cache import Shard, ShardCache, check_content
from beit_pretrain.data.dataset import BatchSchedule
from beit_pretrain.data.mixture import Mixture, shares
from beit_pretrain.data.order import Order
from beit_pretrain.data.tars import REFUSED, inside, scan_tar
from beit_pretrain.errors import UserError
from beit_pretrain.overrides import quoted, readable

SEEDS = st.integers(0, 2**63 - 1)
SIZES = st.lists(st.integers(0, 12), min_size=1, max_size=10).filter(any)
ORDERS = st.builds(Order, SIZES, SEEDS, st.integers(1, 20) | st.just(4096), st.integers(1, 6) | st.just(64))


class TestOrder:
    @given(ORDERS, st.integers(0, 2**20))
    def test_an_epoch_has_every_sample_once(self, order, epoch):
        found = order.samples_at(range(epoch * order.samples, (epoch + 1) * order.samples))
        assert sorted(found.tolist()) == [[shard, i] for shard, size in enumerate(order.sizes) for i in range(size)]

    @given(ORDERS, st.integers(0, 50), st.integers(1, 4), st.integers(1, 5))
    def test_ranks_and_workers_share_the_positions_of_a_step(self, order, step, world, per_rank):
        """Disjoint, complete, and the samples are those of one process."""
        batch = world * per_rank
        dealt = [BatchSchedule(batch, rank, world).positions(step) for rank in range(world)]
        assert sorted(k for share in dealt for k in share) == list(range(step * batch, (step + 1) * batch))
        alone = order.samples_at(range(step * batch, (step + 1) * batch))
        for rank, share in enumerate(dealt):
            assert (order.samples_at(share) == alone[rank::world]).all()
            assert (order.samples_at(share[1::2]) == alone[rank::world][1::2]).all()  # every second: one of two workers

    @given(ORDERS, st.integers(0, 10**6), st.integers(0, 40), st.integers(0, 40))
    def test_a_run_can_be_resumed_anywhere(self, order, start, before, after):
        whole = order.samples_at(range(start, start + before + after))
        resumed = pickle.loads(pickle.dumps(order)).samples_at(range(start + before, start + before + after))
        assert (resumed == whole[before:]).all()

    @given(ORDERS, st.integers(0, 10**4), st.integers(1, 3), st.data())
    def test_the_shard_of_the_next_sample_is_announced_first(self, order, position, world, data):
        rank = data.draw(st.integers(0, world - 1))
        ahead = order.upcoming_shards(position, rank, world)
        assert len(set(ahead)) == len(ahead)
        assert order.sample_at(position + (rank - position) % world).shard in ahead
        assert set(ahead) <= set(np.flatnonzero(order.sizes).tolist())


WEIGHTS = st.lists(st.integers(1, 100), min_size=1, max_size=4)


@st.composite
def mixtures(draw) -> Mixture:
    weights = draw(WEIGHTS)
    return Mixture([draw(ORDERS) for _ in weights], weights, draw(SEEDS))


class TestMixture:
    @given(WEIGHTS, st.sampled_from([0.001, 0.25, 1.0, 3.0, 1e6]))
    def test_shares_are_the_weights(self, weights, scale):
        """However they are scaled, exactly."""
        counts = shares([scale * weight for weight in weights], len(weights))
        assert (counts * sum(weights) == counts.sum() * np.array(weights)).all()
        assert counts.sum() >= 256

    @settings(max_examples=settings().max_examples // 3)
    @given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=4))
    def test_other_shares_are_rounded_to_ten_thousandths(self, weights):
        assume(min(weights) / sum(weights) > 1e-3)
        counts = shares(weights, len(weights))
        assert np.abs(counts / counts.sum() - np.array(weights) / sum(weights)).max() <= 1e-4
        assert counts.min() > 0

    @given(mixtures(), st.integers(0, 2000))
    def test_a_prefix_holds_each_data_set_in_its_own_order(self, mixture, length):
        """No own position is missing or comes twice, and whole blocks have exact counts."""
        dataset, own = mixture.places(range(length))
        for number, count in enumerate(mixture.counts.tolist()):
            assert own[dataset == number].tolist() == list(range((dataset == number).sum()))
            assert (
                dataset[: length // mixture.block * mixture.block] == number
            ).sum() == length // mixture.block * count

    @given(mixtures(), st.integers(0, 10**9), st.integers(0, 300), st.integers(0, 300))
    def test_a_position_depends_on_nothing_but_itself(self, mixture, start, before, after):
        whole = mixture.samples_at(range(start, start + before + after))
        resumed = pickle.loads(pickle.dumps(mixture)).samples_at(range(start + before, start + before + after))
        assert (resumed == whole[before:]).all()
        assert (mixture.samples_at(range(start, start + before + after)[::-1]) == whole[::-1]).all()


def cached_shard(number: int) -> tuple[Shard, bytes]:
    """A small shard; odd ones are larger."""
    data = tar_bytes({f"{number}.jpg": bytes([number]) * (1 + 9000 * (number % 2))})
    return Shard(f"shard-{number:06d}.tar", 1, len(data), hashlib.sha256(data).hexdigest()), data


SHARDS = [cached_shard(number) for number in range(6)]
INDEX = 256 + 40  # bytes of an index of one row
ROOM = 2 * max(entry.bytes + INDEX for entry, _ in SHARDS)
NUMBERS = st.integers(0, len(SHARDS) - 1)


def get(cache: ShardCache, number: int, in_the_middle: Callable[[], None] = lambda: None) -> None:
    """Read a shard through the cache, and compare its content."""
    entry, data = SHARDS[number]

    def fetch(file: BinaryIO) -> None:
        file.write(data[:5000])
        file.flush()
        in_the_middle()
        file.write(data[5000:])
        check_content(file, entry)

    descriptor = cache.open(entry, fetch)
    assert os.pread(descriptor, entry.bytes + 1, 0) == data
    assert cache.index(entry, descriptor)["image_offset"].tolist() == [512]
    os.close(descriptor)


def kept(folder: Path) -> set[int]:
    """Which shards are in the folder; each is whole and has its index, and nothing else is there."""
    names = {path.name for path in folder.iterdir()} - {".lock"}
    found = {n for n, (entry, _) in enumerate(SHARDS) if f"{entry.sha256}.tar" in names}
    assert names == {f"{SHARDS[n][0].sha256}.{kind}" for n in found for kind in ("tar", "index.npy")}
    assert all((folder / f"{SHARDS[n][0].sha256}.tar").read_bytes() == SHARDS[n][1] for n in found)
    assert sum((folder / name).stat().st_size for name in names) <= ROOM
    return found


def fail(file: BinaryIO) -> None:
    raise UserError("gone")


class TestCache:
    @given(st.lists(st.tuples(st.sampled_from(["get", "prefetch", "fail", "cut"]), NUMBERS), max_size=25))
    def test_it_is_an_lru_cache_of_bounded_size(self, calls):
        """After every call the folder holds what a model of it holds: {shard: bytes}, the longest unused first."""
        with TemporaryDirectory() as folder:
            cache, model = ShardCache(folder, ROOM), {}
            for clock, (call, number) in enumerate(calls):
                entry, data = SHARDS[number]
                path = cache.folder / f"{entry.sha256}.tar"
                if call in ("cut", "fail") and path.exists() != (call == "cut"):
                    continue
                if call == "cut":
                    os.truncate(path, 100)
                    get(cache, number)  # fetched again, in the room that it had
                elif call == "fail":  # after eviction
                    with pytest.raises(UserError, match="gone"):
                        cache.open(entry, fail)
                elif call == "get":
                    get(cache, number)
                else:
                    cache.fetch_ahead(entry, lambda file, data=data: file.write(data))
                size = model.pop(number, entry.bytes + INDEX)
                while sum(model.values()) + size > ROOM:
                    model.pop(next(iter(model)))
                if path.exists():
                    model[number] = size
                    os.utime(path, (clock, clock))
                assert kept(cache.folder) == set(model)

    @settings(max_examples=settings().max_examples // 3)
    @given(st.lists(st.lists(NUMBERS, max_size=8), min_size=2, max_size=4))
    def test_threads_can_share_it(self, sequences):
        failures: list[BaseException] = []

        def read(numbers: list[int], folder: str) -> None:
            try:
                cache = ShardCache(folder, ROOM)
                for number in numbers:
                    get(cache, number)
            except BaseException as error:
                failures.append(error)

        with TemporaryDirectory() as folder:
            threads = [threading.Thread(target=read, args=(numbers, folder)) for numbers in sequences]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert not failures
            kept(Path(folder))

    @settings(max_examples=settings().max_examples // 3)
    @given(
        st.sampled_from(["write", "fsync", "save", "rename", "unlink"]),
        st.lists(NUMBERS, min_size=1, max_size=4),
        NUMBERS,
    )
    def test_a_process_that_dies_leaves_a_good_cache(self, moment, before, number):
        """In the middle of the fetch, at the flush, at the index, at the renaming, or when room is made."""
        with TemporaryDirectory() as folder:
            cache = ShardCache(folder, ROOM)
            for other in before:
                get(cache, other)
            if (pid := os.fork()) == 0:
                setattr({"save": np, "unlink": Path}.get(moment, os), moment, die)
                get(cache, number, in_the_middle=die if moment == "write" else lambda: None)
                os._exit(0)
            os.waitpid(pid, 0)
            for other in (number, *range(len(SHARDS))):
                get(cache, other)
            kept(cache.folder)


def die(*args, **settings) -> None:
    """What a call is replaced by: the process ends there, without a word."""
    os._exit(9)


PART = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=12)
NAMES = st.lists(PART, min_size=1, max_size=25).map("/".join)  # up to 300 characters, more bytes


KINDS = [*[tarfile.REGTYPE] * 4, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE]
FIELDS = [{}, {"comment": "x" * 900}, {"GNU.sparse.map": "0,1"}]  # of pax; the last one makes a sparse file
# Name, kind, content in words of 300 bytes, number of the member that a link leads to, pax fields.
MEMBER = st.tuples(NAMES, st.sampled_from(KINDS), st.binary(max_size=3), st.integers(0, 6), st.sampled_from(FIELDS))
MEMBERS = st.lists(MEMBER, min_size=1, max_size=6, unique_by=lambda member: member[0])
FORMATS = st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])


def archive(members: list[tuple], format: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for number, (name, kind, words, target, fields) in enumerate(members):
            info = tarfile.TarInfo(name)
            info.type, data = kind, b""
            if info.isreg():
                info.pax_headers, data = fields, words * 300
            elif not info.isdir():
                info.linkname = members[target][0] if target < number else "nowhere"
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def scan(data: bytes, before: bytes = b"", after: bytes = b"") -> dict[str, tuple[int, int]]:
    """{name: (offset, size)} by `scan_tar`, of a tar between other bytes."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "x.tar")
        path.write_bytes(before + data + after)
        return {name: place for name, *place in scan_tar(path, len(before), len(before + data))}


class TestTars:
    @given(MEMBERS, FORMATS, st.binary(max_size=600), st.binary(max_size=600))
    def test_files_are_those_of_tarfile(self, members, format, before, after):
        """By name and content, also of a tar within another file; what is refused is no plain file inside the tar."""
        data, files, contents, others = archive(members, format), set(), {}, set()
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            for member in tar:
                if member.isreg() and not member.issparse():
                    files.add(member.name)
                if (member.name in files or (member.islnk() and member.linkname in files)) and inside(member.name):
                    contents[member.name] = tar.extractfile(member).read()
                elif not member.isdir():
                    others.add(member.name)
        found, whole = scan(data, before, after), before + data
        assert {name: whole[offset : offset + size] for name, (offset, size) in found.items() if size >= 0} == contents
        assert {name for name, (_, size) in found.items() if size in REFUSED} == others

    @given(MEMBERS, FORMATS, st.floats(0, 1))
    def test_members_of_a_truncated_tar_are_right(self, members, format, share):
        data = archive(members, format)
        cut = round(share * len(data))
        try:
            found = scan(data[:cut])
        except UserError:
            return
        assert found.items() <= scan(data).items()
        assert all(offset + size <= cut for offset, size in found.values())

    @given(MEMBERS, FORMATS, st.integers(0, 6), st.integers(0, tarfile.BLOCKSIZE - 1), st.integers(1, 255))
    def test_a_damaged_header_is_noticed(self, members, format, number, byte, change):
        data = bytearray(archive(members, format))
        whole = scan(data)
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            headers = [member.offset_data - tarfile.BLOCKSIZE for member in tar]
        data[headers[number % len(headers)] + byte] ^= change
        with suppress(UserError):
            assert scan(data) == whole  # the last byte of a checksum's field does not count


TEXTS = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("\\'\"${}[]=, \n"))
PARSER = OverridesParser.create()


class TestOverrides:
    @given(TEXTS | st.integers() | st.floats(allow_nan=False) | st.booleans() | st.none())
    def test_a_quoted_value_is_read_back(self, value):
        found = PARSER.parse_override(f"key={quoted(value)}").value()
        assert (type(found), found) == (type(value), value)

    @given(TEXTS)
    def test_readable_words_stay_unchanged(self, value):
        word = readable(f"key={value}")
        assert readable(word) == word

    @given(st.text(st.sampled_from("aZ0/._-=,$@%+ '")).map(str.rstrip))
    def test_a_path_needs_no_quotes(self, path):
        """Spaces, commas, equals signs and quotes in it are its own."""
        found = PARSER.parse_override(readable(f"key=/{path}"))
        assert found.value() == f"/{path}"

    @settings(max_examples=10)
    @given(TEXTS.filter(lambda text: "${" not in text))
    def test_a_config_has_what_was_quoted(self, text):
        assert compose_raw("shards", [f"src={quoted(text)}"]).src == text
