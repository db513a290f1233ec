"""A stream gives every sample of an epoch once, for any lanes; a stopped run resumes with no sample lost or doubled."""

from __future__ import annotations

import io
import json
import random
import signal
import tarfile
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from stream_watcher import due, installed, used
from tiny import TINY, gone, last_checkpoint, refusal, signal_group, start, steps_written, tree, wait_until

from beit_pretrain.data.dataset import BatchSchedule
from beit_pretrain.data.settings import DataSettings, RemoteOptions
from beit_pretrain.data.shard_index import index_shard
from beit_pretrain.data.stream import StreamDataset, StreamSource
from beit_pretrain.data.stream_order import END, Lane, LaneState, Part, Place, TarOrder
from beit_pretrain.data.stream_tars import read_tar
from beit_pretrain.tasks.pretrain import PretrainData
from beit_pretrain.transforms.masking import BlockwiseMask
from beit_pretrain.transforms.views import ClassificationTransform, TwoViewTransform

VIEWS = TwoViewTransform(image_size=16, token_image_size=16)
MASKING = BlockwiseMask((2, 2), max_patches=2, min_block=1)
SIZES = (5, 1, 8, 3, 13, 2, 6)  # images of seven tars
JPEG = b"\xff\xd8\xff" + b"x" * 600  # looks like one by its first bytes
OPTIONS = RemoteOptions()


def jpeg(number: int) -> bytes:
    file = io.BytesIO()
    colour = tuple(np.random.default_rng(number).integers(0, 256, 3).tolist())
    Image.new("RGB", (20, 20), colour).save(file, "JPEG")
    return file.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture(scope="module")
def tars(tmp_path_factory) -> Path:
    """Seven tars of different lengths; keys `TAR-ROW`, classes, captions, and one group without an image."""
    folder = tmp_path_factory.mktemp("tars")
    for tar, size in enumerate(SIZES):
        members = []
        for row in range(size):
            key = f"{tar}-{row}"
            members += [(f"{key}.jpg", jpeg(10 * tar + row)), (f"{key}.cls", b"%d" % tar), (f"{key}.json", b"{}")]
        write_tar(folder / f"{tar}.tar", [*members, ("lonely.cls", b"1")])
    return folder


def stream_data(train, **settings) -> PretrainData:
    settings = {"global_batch_size": 8, "num_workers": 0, "seed": 3, "shuffle_buffer": 6} | settings
    return PretrainData(train, views=VIEWS, masking=MASKING, order="stream", **settings)


def loader_of(data: PretrainData, steps: int, rank: int = 0, world: int = 1, done: int = 0):
    data.trainer = SimpleNamespace(
        accumulate_grad_batches=1, global_rank=rank, world_size=world, max_steps=steps, global_step=done
    )
    return data.train_dataloader()


class KeyOnly(StreamDataset):
    """Gives epochs and keys instead of images."""

    def _made(self, position, sample, mask, pending, following, bad):
        tar, row = map(int, sample.key.split("-"))
        about = [sample.epoch, tar, row, position]
        return {"sample": np.array(about), "position": np.asarray(position), "label": np.asarray(sample.label)}

    def _begun(self, sample):
        return dict


def lanes_of(source: StreamSource, world: int, workers: int, places=None, batch: int = 2, start: int = 0) -> list:
    """The endless batches of every lane, by rank and worker, without processes."""

    def lane(rank: int, worker: int):
        dataset = KeyOnly(source, BatchSchedule(batch * world, rank, world), None, seed=3, places=places or ())
        with pytest.MonkeyPatch.context() as patch:
            info = SimpleNamespace(id=worker, num_workers=workers)
            patch.setattr("beit_pretrain.data.stream.get_worker_info", lambda: info)
            dataset.start, dataset.total = start, 10**9
            batches = iter(dataset)
            first = next(batches)
        yield first
        yield from batches

    return [lane(rank, worker) for rank in range(world) for worker in range(workers)]


def source_of(tars: Path | list[list[Path]], **settings) -> StreamSource:
    sets = [sorted(tars.glob("*.tar"))] if isinstance(tars, Path) else tars
    chosen = DataSettings(train=["x"], order="stream", **({"shuffle_buffer": 6} | settings))
    return StreamSource([[str(tar) for tar in names] for names in sets], chosen, None, [])


EPOCH = Counter((tar, row) for tar, size in enumerate(SIZES) for row in range(size))


def of_epoch(samples: list[list[int]], epoch: int) -> Counter:
    return Counter((tar, row) for number, tar, row, _ in samples if number == epoch)


# --- the order ---------------------------------------------------------------------------------------------------


def test_entries_are_whole_epochs_in_other_orders():
    order = TarOrder(7, seed=1)
    epochs = [[order.at(7 * epoch + place) for place in range(7)] for epoch in range(3)]
    assert [{epoch for _, epoch in entries} for entries in epochs] == [{0}, {1}, {2}]
    assert all(sorted(tar for tar, _ in entries) == list(range(7)) for entries in epochs)
    assert len({tuple(tar for tar, _ in entries) for entries in epochs}) == 3
    assert "names no tar" in refusal(TarOrder, 0, 1)


@pytest.mark.parametrize(("world", "workers"), [(1, 1), (2, 1), (4, 3)])
def test_each_sample_of_an_epoch_once_over_all_lanes(tars, world, workers):
    """Also with fewer tars than lanes: no lane waits or ends."""
    lanes, samples = lanes_of(source_of(tars), world, workers), []
    for _ in range(150):
        for lane in lanes:
            samples += next(lane)["sample"].tolist()
    for epoch in range(3):
        assert of_epoch(samples, epoch) == EPOCH


def test_buffer_mixes_and_does_not_touch_the_global_generators(tars):
    state = random.getstate(), np.random.get_state()[1].copy()
    (lane,) = lanes_of(source_of(tars, shuffle_buffer=20), 1, 1)
    first = [sample[1:3] for _ in range(10) for sample in next(lane)["sample"].tolist()]
    assert len({tar for tar, _ in first}) > 2
    assert first != sorted(first)
    assert random.getstate() == state[0]
    assert (np.random.get_state()[1] == state[1]).all()


def test_positions_are_those_of_the_schedule(tars):
    dataset = KeyOnly(source_of(tars), BatchSchedule(8, 1, 2), None, total=2, seed=3)
    assert [batch["position"].tolist() for batch in dataset] == [[1, 3, 5, 7], [9, 11, 13, 15]]
    assert len(dataset) == 2


# --- resume ------------------------------------------------------------------------------------------------------


def test_part_after_a_stop():
    part = Part(4).after(10, [3, 7])
    assert part == Part(4, 10, (3, 7))
    assert part.after(5, [3]) == Part(4, 10, (3, 7))  # stopped again before row 7 was read
    assert part.after(12, []) == Part(4, 12)
    assert part.after(END, [11]) == Part(4, END, (11,))


def test_place_of_lanes_that_drifted_apart():
    far, near = Lane(Place(), 0, 2), Lane(Place(), 1, 2)
    for _ in range(3):
        far.open()  # entries 0, 2, 4
    near.open()  # entry 1
    near.add(0 + 1, 0)
    place = Place().advanced(2, {0: far.state(), 1: near.state()})
    assert place == Place(5, (Part(1, 1, (0,)), Part(3), Part(4)))  # 3 was jumped over
    assert Place.unpacked(place.packed()) == place
    assert Place(5, (Part(1), Part(3))).advanced(4, {}) == Place(5, (Part(1), Part(3)))
    assert place.advanced(1, {0: LaneState(1, 9)}) == Place(5, (Part(1, 9), Part(3), Part(4)))


def test_place_of_a_long_run_is_found_at_once():
    states = {lane: LaneState(10**6, 5) for lane in range(8)}
    begin = time.monotonic()
    place = Place().advanced(8, states)
    assert place == Place(8 * 10**6, tuple(Part(8 * 10**6 - 8 + lane, 5) for lane in range(8)))
    assert time.monotonic() - begin < 1


@pytest.mark.parametrize("seed", range(8))
def test_stopped_anywhere_and_resumed_with_other_lanes(tars, seed):
    """No sample is seen twice or missed, over five stops at random batches."""
    rng, source, samples, places, start = random.Random(seed), source_of(tars), [], [Place()], 0
    for stop in range(6):
        world, workers = rng.randint(1, 4), rng.randint(1, 3)
        lanes, states, count = lanes_of(source, world, workers, places, start=start), {}, world * workers
        steps = rng.randint(0, 12) if stop < 5 else 150
        for step in range(steps):
            for rank in range(world):
                batch = next(lanes[rank * workers + step % workers])
                samples += batch["sample"].tolist()
                states[batch["stream"]["lane"]] = LaneState(*batch["stream"]["sets"][0])
        for lane in lanes:  # what was made ahead, but not used
            for _ in range(rng.randint(0, 2)):
                next(lane)
        places = [Place.unpacked(places[0].advanced(count, states).packed())]
        start += steps
    for epoch in range(3):
        assert of_epoch(samples, epoch) == EPOCH


def test_other_sets_than_the_checkpoint_are_refused(tars):
    state = stream_data(tars).state_dict()
    other = stream_data([tars, tars], weights=[1, 1])
    assert "made with 1 streams, not 2: keep data.train" in refusal(other.load_state_dict, state)


def test_resumes_exactly_with_other_workers_through_a_checkpoint(tars, monkeypatch, capsys):
    """Real loader processes; batches that were made ahead of a stop, but not used, come again."""
    monkeypatch.setattr("beit_pretrain.data.datamodule.StreamDataset", KeyOnly)
    samples, state = [], None
    for done, stop, workers in ((0, 3, 2), (3, 7, 3), (7, 60, 0)):
        data = stream_data(tars, num_workers=workers)
        if state is not None:
            data.load_state_dict(state)
        for step, batch in enumerate(loader_of(data, steps=100, done=done), start=done):
            if step == stop:
                break
            assert batch["position"].tolist() == list(range(8 * step, 8 * step + 8))
            data.note_used(batch)
            samples += batch["sample"].tolist()
        buffer = io.BytesIO()
        torch.save(data.state_dict(), buffer)
        buffer.seek(0)
        state = torch.load(buffer, weights_only=True)
    for epoch in range(10):
        assert of_epoch(samples, epoch) == EPOCH
    assert 70 < sum(data.stream.without_image.values()) < 90  # one of each tar; 424 images are 11 epochs of seven tars
    data.teardown("fit")
    assert "have no image and were skipped" in capsys.readouterr().err


def test_checkpoint_without_a_place_is_refused(tars):
    assert "does not say where the stream stood" in refusal(loader_of, stream_data(tars), steps=4, done=2)
    assert stream_data(tars).state_dict().keys() == {"stream"}


def test_a_part_with_listed_rows_alone_is_not_read_to_its_end(tars, monkeypatch):
    source = source_of(tars)
    long = next(entry for entry in range(7) if SIZES[TarOrder(7, 3).at(entry)[0]] == 13)
    lane = Lane(Place(99, (Part(long, END, (1, 3)),)), 0, 1)
    samples, read = source.samples_of(0, lane, 3), []
    monkeypatch.setattr(
        "beit_pretrain.data.stream.read_tar", lambda *given: (read.append(found) or found for found in read_tar(*given))
    )
    assert [next(samples).row, next(samples).row] == [1, 3]
    next(samples)
    assert len(read) == 4 + 1


# --- samples -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "members",
    [
        "a.jpg a.cls b.jpg b.json b.txt",
        "a.input.jpg a.target.cls a.jpg a.json",
        "s.0001.jpg s.0001.cls s.0002.jpg s.0002.cls",
        "s.json s.1.jpg s.2.png",  # the plain member is not read, but says that numbers are none of the key
        "a.jpg a.jpg a.cls A.JPG",
        "a.mask.png a.jpg b_mask.png.json c.cls d.txt e.seg.png e.png",
        "dir/a.jpg dir/a.cls ._a.jpg thumbs.db x.npy a",
        "k.jpg k_mask.png images/m.jpg masks/m.png",
    ],
)
def test_same_samples_as_the_index(tmp_path, members):
    """Keys aside, image, class and label map of every sample are those that the index of the tar finds."""
    names = members.split()
    contents = [b"%d" % place if name.endswith("cls") else JPEG + bytes([place]) for place, name in enumerate(names)]
    path = write_tar(tmp_path / "t.tar", list(zip(names, contents, strict=True)))
    data, rows = path.read_bytes(), index_shard(path)
    images = [data[row["image_offset"] :][: row["image_size"]] for row in rows]
    maps = [data[row["segmentation_offset"] :][: row["segmentation_size"]] for row in rows]
    indexed = list(zip(images, rows["label"].tolist(), maps, strict=True))
    streamed = [s for s in read_tar(str(path), OPTIONS) if s is not None]
    assert [(s.places["image"], s.label, s.places.get("seg.png", b"")) for s in streamed] == indexed
    assert indexed


def test_image_key_chooses(tmp_path):
    path = write_tar(tmp_path / "t.tar", [("a.jpg", JPEG), ("a.raw.png", JPEG + b"2"), ("a.cls", b"7")])
    (sample,) = read_tar(str(path), OPTIONS, ["raw.png"])
    assert sample is not None
    assert (sample.places["image"], sample.label) == (JPEG + b"2", 7)


def test_many_numbered_members_are_not_held_at_once(tmp_path):
    """A tar of `s.0000.jpg, s.0001.jpg, ...` is one group for webdataset; it is read in parts."""
    path = write_tar(tmp_path / "t.tar", [(f"s.{n:04}.{e}", JPEG) for n in range(200) for e in ("jpg", "png")])
    keys = [sample.key for sample in read_tar(str(path), OPTIONS) if sample]
    assert keys == [f"s.{n:04}" for n in range(200)]


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda data: data[:1500], "unexpected end of data"),
        (lambda data: data[: 1024 + 200 + 512], "breaks off|unexpected end"),
        (lambda data: data[:1536] + b"9" * 512 + data[2048:], "damaged at byte 1,536"),
        (lambda data: data[: 3072 + 124] + b"7" + data[3072 + 125 :], "damaged at byte 3,072"),
        (lambda data: data[: 3072 + 300], "breaks off after 3,372 bytes"),
        (lambda data: data + data, "holds more files after its end"),
        (lambda data: b"", "empty file"),
        (lambda data: b"<html>" * 300, "invalid header|truncated header"),
    ],
)
def test_broken_tar_is_one_line(tmp_path, spoil, why):
    path = write_tar(tmp_path / "t.tar", [(f"{n}.jpg", JPEG) for n in range(4)])
    path.write_bytes(spoil(path.read_bytes()))
    said = refusal(list, read_tar(str(path), OPTIONS))
    assert str(path) in said
    assert any(part in said for part in why.split("|")), said


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_folders_links_and_no_end_mark(tmp_path, form):
    names = [f"folder/{'x' * n}{n}.jpg" for n in (3, 90, 160)] + ["ü.jpg"]
    if form == tarfile.USTAR_FORMAT:
        names.pop(2)
    with tarfile.open(tmp_path / "t.tar", "w", format=form) as tar:
        for kind, name in ((tarfile.DIRTYPE, "folder"), (tarfile.SYMTYPE, "link.jpg")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "folder/a.jpg"
            tar.addfile(member)
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(JPEG)
            tar.addfile(member, io.BytesIO(JPEG))
        end = tar.offset
    expected = [name[:-4] for name in names]
    assert [sample.key for sample in read_tar(str(tmp_path / "t.tar"), OPTIONS) if sample] == expected
    data = (tmp_path / "t.tar").read_bytes()
    (tmp_path / "t.tar").write_bytes(data[:end])
    assert [sample.key for sample in read_tar(str(tmp_path / "t.tar"), OPTIONS) if sample] == expected


def test_class_numbers(tars, tmp_path):
    path = write_tar(tmp_path / "t.tar", [("a.jpg", jpeg(0)), ("a.cls", b"5"), ("b.jpg", jpeg(1))])
    batch = next(iter(loader_of(stream_data(path, classes=6, global_batch_size=2, shuffle_buffer=1), 1)))
    assert batch["label"].tolist() == [5, -1]
    batch = next(iter(loader_of(stream_data(path, global_batch_size=2), 1)))
    assert batch["label"].tolist() == [-1, -1]
    assert "class number 5, beyond the 3" in refusal(next, iter(loader_of(stream_data(path, classes=3), 1)))
    data = stream_data(path, classes=6)
    data.needs_class = True
    assert "b of " in refusal(next, iter(loader_of(data, 1)))


def test_tars_without_images_end_the_run(tmp_path):
    path = write_tar(tmp_path / "t.tar", [("a.json", b"{}")])
    assert "hold no images" in refusal(next, iter(loader_of(stream_data(path), 1)))


def test_tars_over_http_and_one_that_is_missing(tars, serve, monkeypatch):
    """A tar that cannot be fetched ends the run with its name, also from a loader process."""
    monkeypatch.setattr("beit_pretrain.data.storage.PAUSE", 0.001)
    server = serve(tars)
    urls = [f"{server.url}/{tar}.tar?token=SECRET" for tar in range(7)]
    (lane,), samples = lanes_of(source_of([urls]), 1, 1), []
    while len(samples) < 2 * sum(SIZES):
        samples += next(lane)["sample"].tolist()
    assert of_epoch(samples, 0) == EPOCH
    data = stream_data([*urls[:3], f"{server.url}/none.tar?token=SECRET"], num_workers=1, retries=1)
    said = refusal(list, loader_of(data, 50))
    assert said == f"{server.url}/none.tar cannot be fetched: HTTP 404 Not Found"


# --- views -------------------------------------------------------------------------------------------------------


def test_views_and_masks_depend_on_seed_epoch_and_key_alone(tars):
    """The same image of the same epoch on other lanes has the same crop, jitter and mask; in another epoch another."""

    def made(world: int, buffer: int, seed: int = 3, total: int = 20) -> dict[tuple, list[bytes]]:
        found: dict[tuple, list[bytes]] = {}
        for rank in range(world):
            data = stream_data(tars, shuffle_buffer=buffer, seed=seed, global_batch_size=4 * world)
            dataset = data.train_dataset(BatchSchedule(4 * world, rank, world), total=total)
            begun = dataset._begun
            samples = []
            dataset._begun = lambda sample, begun=begun, samples=samples: samples.append(sample) or begun(sample)
            for batch in dataset:
                for i, sample in enumerate(samples):
                    keys = ("image", "token_image", "mask", "jitter_factors")
                    arrays = b"".join(batch[key][i].numpy().tobytes() for key in keys)
                    assert found.setdefault((sample.epoch, sample.key), arrays) == arrays
                samples.clear()
        return found

    one, two = made(1, 1), made(2, 30)
    common = one.keys() & two.keys()
    assert len(common) > 30
    assert all(one[key] == two[key] for key in common)
    assert one[0, "4-1"] != one[1, "4-1"]
    assert made(1, 1, seed=4, total=10)[0, "4-1"] != one[0, "4-1"]


def test_batch_has_the_keys_of_shards(tars, shards):
    batch = next(iter(loader_of(stream_data(tars), 1)))
    other = PretrainData(shards / "train", views=VIEWS, masking=MASKING, global_batch_size=8, num_workers=0)
    expected = next(iter(loader_of(other, 1)))
    assert batch.keys() - {"stream"} == expected.keys()
    assert all(batch[key].shape == expected[key].shape and batch[key].dtype == expected[key].dtype for key in expected)


def test_bad_images_are_replaced_and_reported(tmp_path):
    members = [(f"{n:02}.jpg", b"\xff\xd8\xff no" if n in (3, 4, 9) else jpeg(n)) for n in range(12)]
    path = write_tar(tmp_path / "t.tar", members)
    data = stream_data(path, shuffle_buffer=1, global_batch_size=3)
    batches = list(loader_of(data, 6))
    records = [record for batch in batches for record in batch.get("bad", [])]
    assert {record["key"] for record in records} == {"03", "04", "09"}
    assert [r["replaced_by"] for r in records[:3]] == ["06", "07", "11"]  # the next that no place of the batch has
    assert records[0].keys() == {"position", "shard", "key", "reason", "replaced_by"}
    assert records[0]["shard"] == str(path)
    json.dumps(records)


def test_only_bad_images_end_the_run(tmp_path):
    path = write_tar(tmp_path / "t.tar", [(f"{n}.jpg", b"\xff\xd8\xff no") for n in range(3)])
    assert "and the 15 images after it cannot be decoded" in refusal(next, iter(loader_of(stream_data(path), 1)))


# --- several sets ------------------------------------------------------------------------------------------------


def test_weights_draw_from_each_set(tars, tmp_path):
    one, two = sorted(tars.glob("[0-3].tar")), sorted(tars.glob("[4-6].tar"))
    source = source_of([one, two], weights=[0.75, 0.25], shuffle_buffer=8)
    lanes, samples = lanes_of(source, 2, 2), []
    for _ in range(200):
        for lane in lanes:
            samples += next(lane)["sample"].tolist()
    share = sum(tar < 4 for _, tar, _, _ in samples) / len(samples)
    assert abs(share - 0.75) < 0.04
    for tars_of_set in (range(4), range(4, 7)):
        for epoch in range(2):
            mine = of_epoch(samples, epoch)
            assert {k: n for k, n in mine.items() if k[0] in tars_of_set} == {
                k: n for k, n in EPOCH.items() if k[0] in tars_of_set
            }
    assert "2 data sets" in refusal(source_of, [one, two], weights=[1.0])


def test_sets_without_weights_are_one_sequence(tars):
    one, two = sorted(tars.glob("[0-3].tar")), sorted(tars.glob("[4-6].tar"))
    assert source_of([one, two]).entries == source_of(tars).entries


# --- what a stream cannot do -------------------------------------------------------------------------------------


def test_random_access_is_refused_in_one_line(tars):
    source = source_of(tars)
    for call in (
        source.read,
        source.key,
        source.labels,
        source.label_map,
        lambda: source.sizes,
        lambda: source.folders,
    ):
        assert "has no numbered images" in refusal(call)
    assert "labels_per_class" in refusal(stream_data, tars, labels_per_class=2)


def test_first_images_and_head(tars):
    data = stream_data(tars, num_workers=0)
    assert len(data.first_files("train", 9)) == 9
    head = data.eval_dataset("train", rank=1, world=2, images=8)
    batches = list(data.loader(head, range(len(head)), kept=True))
    assert [batch["position"].tolist() for batch in batches] == [[1, 3, 5, 7]]
    again = data.train_dataset(BatchSchedule(8)).sample(2)
    assert int(again["position"]) == 2


def test_identity_is_that_of_the_names(tars, tmp_path):
    moved = [tmp_path / path.name for path in sorted(tars.glob("*.tar"))]
    assert source_of([moved]).shards == source_of(tars).shards
    assert source_of([moved[:-1]]).shards != source_of(tars).shards


# --- whole runs --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def words(tars, dvae_checkpoint, tmp_path_factory) -> tuple[list[str], list[list[int]]]:
    """`fit` of a stream of tars whose classes tell the images apart; the classes of each tar."""
    folder, classes, number = tmp_path_factory.mktemp("counted"), [], 0
    for tar, size in enumerate(SIZES):
        classes.append(list(range(number, number + size)))
        number += size
        files = [(f"{n}.{e}", jpeg(n) if e == "jpg" else b"%d" % n) for n in classes[-1] for e in ("jpg", "cls")]
        write_tar(folder / f"{tar}.tar", files)
    stream = f"data.train={folder} data.order=stream data.shuffle_buffer=6 data.classes={number}"
    small = [word for word in TINY if not word.startswith(("data.val", "val_every", "optim.warmup", "batch_size"))]
    tokenizer = [f"tokenizer.path={dvae_checkpoint}", "batch_size=4", "save_every=2", "seed=5"]
    return ["fit", *[word for word in small if word != "fit"], *stream.split(), *tokenizer], classes


def test_unknown_number_of_images_is_said_only_where_it_is_used(words, refused, run_cli):
    fit, _ = words
    said = refused(*fit, "steps=null", "epochs=2", "optim.warmup_steps=1", "preflight=only")
    assert "epochs=2 needs data.samples=N" in said
    said = refused(*fit, "steps=2", "optim.warmup_epochs=1", "preflight=only")
    assert "optim.warmup_epochs=1 needs data.samples=N" in said
    code, out, err = run_cli(*fit, "steps=2", "optim.warmup_steps=1", "preflight=only")
    assert code == 0, err
    assert "a stream of training images" in out
    known = ("data.samples=38", "steps=null", "epochs=2", "optim.warmup_epochs=1")
    code, out, err = run_cli(*fit, *known, "preflight=only")
    assert code == 0, err
    assert "38 training images" in out
    assert "4 steps of 16" in out


@pytest.mark.parametrize(("order", "other"), [("stream", "position"), ("position", "stream")])
def test_another_order_than_the_checkpoints_is_said(words, refused, run_cli, order, other):
    """data.order=auto chooses by whether the tars' lengths are known, which may become known after a first start."""
    fit, _ = words
    fit = [*fit, "steps=2", "optim.warmup_steps=1", "name=run"]
    code, _, err = run_cli(*fit, f"data.order={order}")
    assert code == 0, err
    said = refused(*fit, f"data.order={other}")
    assert f"was trained with data.order={order}" in said
    assert f"add data.order={order} to resume it" in said


@pytest.mark.long
def test_killed_on_two_ranks_and_resumed_on_one(words, tmp_path):
    """No image is used twice or missed when a run is killed on 2 ranks x 2 workers and resumed on 1 x 3."""
    fit, classes = words
    fit, record, run = [*fit, "steps=16", "optim.warmup_steps=1", "name=run"], tmp_path / "seen", tmp_path / "runs/run"
    watched, lives = installed(tmp_path / "package", record), []
    for more in (["trainer.devices=2", "data.num_workers=2"], ["data.num_workers=3"]):
        lives.append(last_checkpoint(run)["global_step"] if lives else 0)
        with record.open("a") as file:
            file.write("--- start\n")
        process = start([*fit, *more], tmp_path, tmp_path / "log", **watched)
        if len(lives) == 1:
            assert wait_until(process, lambda: steps_written(run) >= 7), (tmp_path / "log").read_text()[-3000:]
            pids = tree(process)
            signal_group(process, signal.SIGKILL)
            assert all(wait_gone(pid) for pid in pids)
        else:
            assert process.wait(120) == 0, (tmp_path / "log").read_text()[-3000:]
    assert lives[1] >= 4
    seen = used(record, lives)
    assert seen == due(last_checkpoint(run)["PretrainData"]["stream"], classes, seed=5)
    assert seen.total() == 16 * 16


def wait_gone(pid: int, seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while not gone(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return gone(pid)


def test_head_of_a_stream_serves_online_knn(tars):
    """The bank of the kNN accuracy: the first images of the stream, dealt to the ranks."""
    views = ClassificationTransform(16, train=False)
    shares = []
    for rank in range(2):
        data = stream_data(tars, classes=7)
        dataset = data.eval_dataset("train", rank, 2, views=views, images=9)
        shares.append(torch.cat([batch["label"] for batch in data.loader(dataset, range(len(dataset)), kept=True)]))
    whole = data.eval_dataset("train", views=views, images=9)
    expected = torch.cat([batch["label"] for batch in data.loader(whole, range(len(whole)), kept=True)])
    assert expected.tolist()[::2] == shares[0].tolist()
    assert expected.tolist()[1::2] == shares[1].tolist()
