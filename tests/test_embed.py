"""embed: vectors equal the network's, in every format; a killed run ends in the same bytes; neighbours and pictures."""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file
from table_makers import image_table, write
from test_make_shards import contents
from tiny import SIZE, refusal, seeded, write_checkpoint

from beit_pretrain import load_pretrained
from beit_pretrain.evaluation.patch_pca import middle, pca_colours
from beit_pretrain.inference import embed as embedding
from beit_pretrain.inference import vector_formats, vector_writer
from beit_pretrain.inference.nearest import nearest
from beit_pretrain.inference.settings import EmbedSettings
from beit_pretrain.inference.vector_formats import FORMATS, Npy, StoredVectors
from beit_pretrain.models.backbone import Classifier
from beit_pretrain.transforms.image_io import open_image
from beit_pretrain.transforms.jitter import HALF, normalise
from beit_pretrain.transforms.views import centre_view, to_array
from beit_pretrain.visualization import grids

SUFFIXES = tuple(FORMATS)
BATCH = 4


@pytest.fixture(scope="module")
def mixed(photos, tmp_path_factory) -> Path:
    """The photos with two files that cannot be read."""
    folder = tmp_path_factory.mktemp("mixed") / "src"
    shutil.copytree(photos, folder)
    (folder / "boats/a.jpg").write_text("no image")
    (folder / "cats/z.png").write_text("no image")
    return folder


def names(folder: Path) -> list[str]:
    return sorted(f"{path.parent.name}/{path.name}" for path in folder.rglob("*_*.*"))


def expected(checkpoint: Path, folder: Path, what: str, layer: int, size: int | None = None) -> np.ndarray:
    """What `load_pretrained` returns for the same views, in the same batches."""
    model = load_pretrained(checkpoint, head="features", image_size=size)
    side, files = size or 32, sorted(path for path in folder.rglob("*.*"))
    rows = []
    for first in range(0, len(files), BATCH):
        views = []
        for path in files[first : first + BATCH]:
            if (data := path.read_bytes()) != b"no image":
                with open_image(data) as image:
                    views.append(torch.from_numpy(to_array(centre_view(image, side))))
        with torch.no_grad():
            found = model(normalise(torch.stack(views).float() / 255, HALF, HALF))
        patches = found.patches[layer - 1]
        rows.append({"cls": found.cls[layer - 1], "mean": patches.mean(1), "patches": patches}[what].numpy())
    return np.concatenate(rows)


def words(checkpoint: Path, src: Path | str, out: str, *more: str) -> list[str]:
    batch = [] if any(word.startswith("batch_size=") for word in more) else [f"batch_size={BATCH}"]
    return ["embed", f"init_from={checkpoint}", f"src={src}", f"out={out}", "num_workers=0", *batch, *more]


def make(checkpoint: Path, src: Path | str, out: Path, **more) -> None:
    """The verb without the command line."""
    given = {"init_from": str(checkpoint), "src": str(src), "out": str(out), "num_workers": 0, "batch_size": BATCH}
    embedding.embed(EmbedSettings(**{**given, **more}))


def read_as_documented(path: Path) -> tuple[list[str], np.ndarray]:
    """As a user reads it, by the libraries of the formats."""
    beside = path.with_name(path.name + ".names.jsonl")
    if path.suffix == ".npy":
        return [json.loads(line)["file"] for line in beside.open()], np.load(path)
    if path.suffix == ".safetensors":
        return [json.loads(line)["file"] for line in beside.open()], load_file(path)["vectors"]
    if path.suffix == ".parquet":
        table = pq.read_table(path)
        shape = json.loads(table.schema.metadata[b"shape"])
        numbers = table["vector"].combine_chunks().flatten().to_numpy()
        return table["file"].to_pylist(), numbers.reshape(-1, *shape)
    with path.open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["file", *(f"v{n}" for n in range(len(header) - 1))]
    return [row[0] for row in rows], np.array([row[1:] for row in rows], np.float32)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("what", ["cls", "mean", "patches"])
def test_vectors_equal_the_features_of_load_pretrained(what, suffix, mim_checkpoint, mixed, tmp_path, capsys):
    if (what, suffix) == ("patches", ".csv"):
        return
    layer = {"cls": "last", "mean": 1, "patches": -1}[what]
    make(mim_checkpoint, mixed, tmp_path / f"v{suffix}", what=what, layer=layer)
    stdout = capsys.readouterr().out
    found, vectors = read_as_documented(tmp_path / f"v{suffix}")
    number = 1 if what == "mean" else 2
    assert found == names(mixed)
    assert np.array_equal(vectors, expected(mim_checkpoint, mixed, what, number))
    assert f"{' x '.join(map(str, vectors.shape))} float32" in stdout
    assert f"of layer {number} of 2" in stdout
    assert "2 could not be read" in stdout
    assert "boats/a.jpg: not an image" in stdout
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_float16_unit_vectors_of_another_size(suffix, mim_checkpoint, photos, tmp_path):
    more = {"what": "mean", "normalise": True, "dtype": "float16", "image_size": 48}
    make(mim_checkpoint, photos, tmp_path / f"v{suffix}", **more)
    rows = torch.from_numpy(expected(mim_checkpoint, photos, "mean", 2, 48))
    rows = torch.nn.functional.normalize(rows, dim=1).half().numpy()
    _, vectors = read_as_documented(tmp_path / f"v{suffix}")
    assert vectors.dtype == (np.float32 if suffix == ".csv" else np.float16)
    assert np.array_equal(vectors.astype(np.float16), rows)


def test_classifiers_segmenters_and_labels(segmenter_checkpoint, photos, tmp_path):
    about = {"mean": list(HALF), "std": list(HALF), "classes": ["a", "b", "c"], "crop_ratio": 1.0}
    classifier = write_checkpoint(tmp_path / "c.ckpt", "classifier", seeded(Classifier, 3, **SIZE), **about)
    for checkpoint in (classifier, segmenter_checkpoint):
        make(checkpoint, photos, tmp_path / f"{checkpoint.stem}.parquet")
        table = pq.read_table(tmp_path / f"{checkpoint.stem}.parquet")
        assert table.column_names == ["file", "vector", "label"]
        assert table["label"].to_pylist() == [name.partition("/")[0] for name in names(photos)]
        assert str(table.schema.field("vector").type) == "fixed_size_list<element: float>[32]"
    with Image.open(photos / names(photos)[0]) as image:  # the classifier's own crop
        view = torch.from_numpy(to_array(centre_view(image, 32, 1.0)))[None].float() / 255
    with torch.no_grad():
        first = load_pretrained(classifier)(normalise(view, HALF, HALF)).cls[-1][0].numpy()
    row = pq.read_table(tmp_path / "c.parquet")["vector"][0].as_py()
    assert np.allclose(row, first, atol=1e-5)


def test_shards_and_tables_are_sources_too(mim_checkpoint, shards, tmp_path):
    make(mim_checkpoint, shards / "val", tmp_path / "s.npy")
    said = [json.loads(line) for line in (tmp_path / "s.npy.names.jsonl").open()]
    assert len(said) == 10
    assert all(one["file"].startswith("shard-000000/") and one["label"] for one in said)
    write(tmp_path / "t.parquet", image_table(5))
    make(mim_checkpoint, tmp_path / "t.parquet", tmp_path / "t.npy")
    said = [json.loads(line) for line in (tmp_path / "t.npy.names.jsonl").open()]
    assert [one["label"] for one in said] == ["cat", "dog", "emu", "cat", "dog"]
    Image.new("RGB", (9, 9)).save(tmp_path / "alone.png")
    make(mim_checkpoint, tmp_path / "alone.png", tmp_path / "alone.npy")
    assert json.loads((tmp_path / "alone.npy.names.jsonl").read_text()) == {"file": "alone.png"}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_odd_names_survive(suffix, mim_checkpoint, tmp_path):
    odd = ["a\nb.png", 'k,"q.png', "ü.png", os.fsdecode(b"caf\xe9.png")]
    (tmp_path / "src").mkdir()
    for name in odd:
        Image.new("RGB", (9, 9)).save(tmp_path / "src" / name)
    make(mim_checkpoint, tmp_path / "src", tmp_path / f"v{suffix}", query=str(tmp_path / "src"))
    found, _ = read_as_documented(tmp_path / f"v{suffix}")
    told = [name.encode(errors="backslashreplace").decode() for name in odd]  # not text: as in predict
    assert sorted(found) == sorted(odd if suffix in (".npy", ".safetensors") else told)
    assert "caf\\udce9.png" in (tmp_path / f"v{suffix}.nearest.png.csv").read_text()


def test_a_full_disk_is_one_line_and_the_rest_follows(mim_checkpoint, photos, full_disk):
    """37 kB of vectors and six small files, of 4 kB each, on a disk of 80 kB."""
    folder = full_disk(80 << 10)
    (folder / "other").write_bytes(b"x" * (36 << 10))
    out = folder / "v.npy"
    said = refusal(make, mim_checkpoint, photos, out, what="patches", batch_size=2)
    assert f"embedding into {out} failed: No space left on device" in said
    (folder / "other").unlink()
    make(mim_checkpoint, photos, out, what="patches", batch_size=2)
    assert np.load(out).shape == (18, 16, 32)


class Killed(BaseException):
    """Simulates a kill at a chosen moment: nothing catches it."""


def killed(batches: int, torn: bool, *given, **more) -> None:
    """`make`, killed after some batches have been saved; `torn`: more was written than is noted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vector_writer, "SAVE_EVERY", 0.0)
        rows_of, done = embedding.rows_of, []

        def some(*args):
            if len(done) == batches:
                raise Killed
            done.append(None)
            if torn and len(done) == batches:
                patch.setattr(vector_writer, "SAVE_EVERY", 1e9)
            return rows_of(*args)

        patch.setattr(embedding, "rows_of", some)
        with pytest.raises(Killed):
            make(*given, **more)


def files_of(out: Path) -> dict[str, bytes]:
    """The vectors, their names and the unreadable images."""
    found = {path.name.removeprefix(out.name): path.read_bytes() for path in out.parent.glob(f"{out.name}*")}
    assert found.pop(".about.json")
    return found


@pytest.fixture(scope="module")
def whole(mim_checkpoint, mixed, tmp_path_factory) -> dict[str, dict[str, bytes]]:
    """The files of undisturbed runs, by format."""
    folder = tmp_path_factory.mktemp("whole")
    for suffix in SUFFIXES:
        make(mim_checkpoint, mixed, folder / f"v{suffix}")
    return {suffix: files_of(folder / f"v{suffix}") for suffix in SUFFIXES}


@pytest.mark.parametrize("torn", [False, True])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_resume_after_kills(suffix, torn, mim_checkpoint, mixed, whole, tmp_path, monkeypatch, capsys):
    given = mim_checkpoint, mixed, tmp_path / f"v{suffix}"
    for batches in (1, 0, 2):
        killed(batches, torn and batches == 2, *given)
        assert not given[-1].exists()
    computed, rows_of = [], embedding.rows_of
    monkeypatch.setattr(embedding, "rows_of", lambda *args: (computed.append(None), rows_of(*args))[1])
    make(*given)
    assert f"resuming at image {BATCH * (2 if torn else 3)} of 20" in capsys.readouterr().out
    assert len(computed) == (3 if torn else 2)
    assert files_of(given[-1]) == whole[suffix]
    assert len(whole[suffix]) == (3 if suffix in (".npy", ".safetensors") else 2)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("where", ["publish", "link", "atomic_write"])
def test_resume_after_a_kill_while_finishing(where, mim_checkpoint, mixed, whole, tmp_path):
    given = mim_checkpoint, mixed, tmp_path / "v.npy"
    function = getattr(vector_writer.fileio, where)

    def kill(*args, **settings):
        if where == "atomic_write" and args[0].name != "v.npy.about.json":
            return function(*args, **settings)
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vector_writer.fileio, where, kill)
        with pytest.raises(Killed):
            make(*given)
    assert not given[-1].exists()
    make(*given)
    assert files_of(given[-1]) == whole[".npy"]


@pytest.mark.parametrize("lost", ["rows", "names.jsonl", "progress.json", "plan.json"])
def test_a_damaged_part_is_computed_again(lost, mim_checkpoint, mixed, whole, tmp_path):
    given = mim_checkpoint, mixed, tmp_path / "v.npy"
    killed(2, False, *given)
    (tmp_path / ".v.npy.making" / lost).write_bytes(b"half")
    make(*given)
    assert files_of(given[-1]) == whole[".npy"]


def test_only_the_same_command_resumes_or_is_finished(mim_checkpoint, photos, tmp_path, capsys):
    shutil.copytree(photos, tmp_path / "src")
    given = mim_checkpoint, tmp_path / "src", tmp_path / "v.npy"
    killed(1, False, *given)
    said = refusal(make, *given, what="mean")
    assert "unfinished vectors with what=cls, not mean" in said
    assert "resume=never" in said
    make(*given, resume="never", what="mean")
    capsys.readouterr()
    make(*given, what="mean")
    assert "v.npy is finished" in capsys.readouterr().out
    assert "v.npy holds vectors with layer=2, not 1; choose another out=" in refusal(make, *given, what="mean", layer=1)
    Image.new("RGB", (9, 9)).save(tmp_path / "src/new.png")
    assert "v.npy holds vectors with images=18, not 19" in refusal(make, *given, what="mean")
    (tmp_path / "src/new.png").unlink()
    (tmp_path / "v.npy.about.json").unlink()
    assert "not known to be of this command" in refusal(make, *given, what="mean")
    before = contents(tmp_path)
    killed(1, False, *given, resume="never")
    assert {name: before[name] for name in ("v.npy", "v.npy.names.jsonl")}.items() <= contents(tmp_path).items()


def test_work_begun_over_another_file_is_resumed(mim_checkpoint, photos, tmp_path, capsys):
    """resume=never replaces a file; once stopped, the same command without it goes on, and no other work is lost."""
    given = mim_checkpoint, photos, tmp_path / "v.npy"
    make(*given)
    killed(2, False, *given, what="mean", resume="never")
    capsys.readouterr()
    make(*given)
    assert "v.npy is finished" in capsys.readouterr().out
    make(*given, what="mean")
    assert "resuming at image" in capsys.readouterr().out
    make(mim_checkpoint, photos, tmp_path / "w.npy", what="mean")
    assert files_of(tmp_path / "v.npy") == files_of(tmp_path / "w.npy")


@pytest.mark.parametrize("damage", [{"layer": "x"}, {"image_size": "32"}, {"init_from": 5}, {"src": None}])
def test_damaged_note_of_finished_vectors(damage, mim_checkpoint, photos, refused, tmp_path):
    make(mim_checkpoint, photos, tmp_path / "v.npy")
    note = tmp_path / "v.npy.about.json"
    note.write_text(json.dumps(json.loads(note.read_text()) | damage))
    photo = next(photos.rglob("*.jpg"))
    assert "were made, is damaged" in refused("embed", f"vectors={tmp_path / 'v.npy'}", f"query={photo}")


def test_another_process_at_work_is_not_disturbed(mim_checkpoint, photos, tmp_path):
    out = tmp_path / "v.npy"
    with vector_writer.growing(out, Npy("float32", (32,)), {"x": 1}, "auto") as vectors:
        assert vectors is not None
        assert "another process is computing" in refusal(make, mim_checkpoint, photos, out, resume="never")
        assert (tmp_path / ".v.npy.making/plan.json").is_file()


def forked(seconds: float | None, progress: Path, *given) -> int:
    """`make` in a process of its own, slowly; killed some time after it has saved more. Returns its exit status."""
    before = progress.read_bytes() if progress.exists() else b""
    rows_of = embedding.rows_of
    if (child := os.fork()) == 0:
        try:
            vector_writer.SAVE_EVERY = 0.0
            embedding.rows_of = lambda *args: (time.sleep(0.03), rows_of(*args))[1]
            make(*given)
            os._exit(0)
        finally:
            os._exit(1)
    if seconds is not None:
        while os.waitpid(child, os.WNOHANG)[0] == 0 and not (progress.exists() and progress.read_bytes() != before):
            time.sleep(0.005)
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_killed_processes(suffix, mim_checkpoint, mixed, whole, tmp_path):
    progress, rng = tmp_path / f".v{suffix}.making/progress.json", random.Random(suffix)
    given = progress, mim_checkpoint, mixed, tmp_path / f"v{suffix}"
    for _ in range(2):
        assert forked(rng.random() / 20, *given) == signal.SIGKILL
        assert not (tmp_path / f"v{suffix}").exists()
    assert forked(None, *given) == 0
    assert files_of(tmp_path / f"v{suffix}") == whole[suffix]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("layer=3", "layer=3: the network has layers 1 to 2 (from the end -1 to -2)"),
        ("layer=0", "layer=0: the network has layers 1 to 2"),
        ("layer=-3", "layer=-3: the network"),
        ("layer=first", "layer must be a whole number, from the end if negative, or last"),
        ("layers=[1,7] picture=p.png", "layers=7: the network has layers 1 to 2"),
        ("out=v.txt", "out=v.txt must end with .npy, .safetensors, .parquet, .csv"),
        ("out=v.csv what=patches", "16 x 32 numbers an image, too many for a line of CSV"),
        ("image_size=36", "image_size=36 is not divisible by patch_size=8"),
        ("src=nowhere", "nowhere does not exist"),
        ("src={text}", "none of the 1 files"),
        ("src=null", "src is missing"),
        ("init_from=null", "init_from is missing"),
        ("init_from={dvae}", "holds a tokenizer (dVAE), not a backbone"),
        ("query=nowhere.jpg", "nowhere.jpg does not exist"),
        ("query={text}", "text.jpg: not an image"),
        ("query={photo} what=patches", "one vector an image"),
        ("query={photo} sheet=p.txt", "sheet=p.txt must end with .png"),
        ("picture=p.bmp", "picture=p.bmp must end with .png"),
        ("query={photo} sheet=v.png out=v.png.csv", "the table of sheet=v.png.csv is the same file as out=v.png.csv"),
        ("query={photo} sheet=p.png picture=../{name}/p.png", "{name}/p.png is the same file as sheet=p.png"),
        ("query={text} sheet={text}", "text.jpg is the same file as query="),
        ("src={own} picture={own}/cats/new.png", "new.png would become one of the images of"),
        ("query={own} sheet={own}/a.jpg", "sheet= must lie outside of it"),
        ("src={own} query={photo} out={own}/v.npy", "v.npy.nearest.png would become one of the images of"),
        ("src={text} picture={text}", "text.jpg is the same file as src="),
        ("sheet=s.png", "sheet= needs query="),
        ("neighbours=3", "neighbours= needs query="),
        ("layers=[1]", "layers= needs picture="),
        ("images=3", "images= needs picture="),
        ("vectors=v.npy", "vectors= is searched"),
        ("vectors=v.npy query={photo} out=null", "vectors=v.npy: there is no such file"),
        ("vectors={photo} query={photo} out=null", ".about.json, which says how vectors="),
        ("what=all", "what must be one of cls, mean, patches"),
        ("out={folder}", "folder.npy is a folder"),
    ],
)  # fmt: skip
def test_errors(more, said, mim_checkpoint, dvae_checkpoint, photos, refused, tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "folder.npy").mkdir()
    photo = next(photos.rglob("*.jpg"))
    shutil.copytree(photos, tmp_path / "own")
    shutil.copy(photo, tmp_path / "own/a.jpg")
    before = contents(tmp_path)
    places = {
        "own": tmp_path / "own",
        "name": tmp_path.name,
        "text": tmp_path / "text.jpg",
        "dvae": dvae_checkpoint,
        "photo": photo,
        "folder": tmp_path / "folder.npy",
    }
    assert said.format(**places) in refused(*words(mim_checkpoint, photos, "v.npy"), *more.format(**places).split())
    assert contents(tmp_path) == before  # nothing half-written
    assert not list(tmp_path.glob(".*"))


def test_parquet_without_pyarrow(mim_checkpoint, photos, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    said = refused(*words(mim_checkpoint, photos, "v.parquet"))
    assert "pip install 'beit_pretrain[parquet]'" in said


def test_vectors_that_are_not_numbers(mim_checkpoint, photos, refused, monkeypatch):
    find = embedding.Embedder.vectors
    monkeypatch.setattr(embedding.Embedder, "vectors", lambda *args: find(*args) * 1e9)
    assert "beyond the range of float16" in refused(*words(mim_checkpoint, photos, "v.npy", "dtype=float16"))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_nearest_images_of_finished_vectors(suffix, mim_checkpoint, mixed, run_cli, tmp_path, monkeypatch):
    make(mim_checkpoint, mixed, tmp_path / f"v{suffix}", what="mean", layer=1)
    query = [mixed / name for name in names(mixed)[3:9:5]]
    monkeypatch.setattr(vector_formats, "GROUP", 32 * 4 * 7)  # read in pieces
    given = ["embed", f"vectors=v{suffix}", f"query=[{query[0]},{query[1]}]", "neighbours=5", "num_workers=0"]
    code, stdout, stderr = run_cli(*given)
    assert code == 0, stderr
    with (tmp_path / f"v{suffix}.nearest.png.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    vectors = read_as_documented(tmp_path / f"v{suffix}")[1]
    vectors = vectors - vectors.mean(0)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    for path in query:
        own = [row for row in table if row["query"].endswith(path.name)]
        cosine = vectors @ vectors[names(mixed).index(f"{path.parent.name}/{path.name}")]
        assert [row["file"] for row in own] == [names(mixed)[n] for n in np.argsort(-cosine)[:5]]
        assert [float(row["similarity"]) for row in own] == pytest.approx(sorted(cosine)[:-6:-1], abs=1e-4)
        assert [row["rank"] for row in own] == list("12345")
        assert float(own[0]["similarity"]) == pytest.approx(1, abs=1e-4)
    sheet = np.asarray(Image.open(tmp_path / f"v{suffix}.nearest.png").convert("RGB")).astype(int)
    step, down = 128 + grids.GAP, 128 + 2 * grids.CAPTION + grids.GAP
    assert sheet.shape == (2 * down + 4, 6 * step + 4, 3)
    cells = [sheet[4 + y * down :][:128, 4 + x * step :][:, :128] for y in range(2) for x in (0, 1)]
    assert np.array_equal(cells[0], cells[1])  # the query's nearest is itself
    assert np.array_equal(cells[2], cells[3])
    assert not np.array_equal(cells[0], cells[2])


def test_query_in_the_command_that_computes(mim_checkpoint, photos, run_cli, refused, tmp_path):
    photo = next(photos.rglob("*.jpg"))
    given = words(mim_checkpoint, photos, "v.npy", f"query={photo}", "neighbours=99", "sheet=n/s.png")
    for _ in range(2):  # then the vectors are finished
        assert run_cli(*given)[0] == 0
        assert len((tmp_path / "n/s.png.csv").read_text().splitlines()) == 1 + 18
        (tmp_path / "n/s.png.csv").unlink()
    other = write_checkpoint(tmp_path / "o.ckpt", "classifier", seeded(Classifier, 3, **SIZE))
    said = refused("embed", "vectors=v.npy", f"query={photo}", f"init_from={other}")
    assert "are not of init_from" in said
    (tmp_path / "v.npy").write_bytes((tmp_path / "v.npy").read_bytes()[:200])
    assert "v.npy cannot be read as vectors" in refused("embed", "vectors=v.npy", f"query={photo}")


def test_stored_vectors_have_their_own_settings_and_source(mim_checkpoint, photos, run_cli, refused, tmp_path):
    make(mim_checkpoint, photos, tmp_path / "v.npy", what="mean", layer=1)
    photo = next(photos.rglob("*.jpg"))
    given = ["embed", "vectors=v.npy", f"query={photo}", "num_workers=0", "neighbours=18"]
    assert "v.npy were made with layer=1, not -1; leave layer= out" in refused(*given, "layer=-1")
    for word in ("what=patches", "normalise=true", "image_size=48"):
        assert f"v.npy were made with {word.partition('=')[0]}=" in refused(*given, word)
    (tmp_path / "other").mkdir()
    shutil.copy(photo, tmp_path / "other/x.jpg")
    assert "has none of the 18 neighbours" in refused(*given, "src=other")
    assert not list(tmp_path.glob("*.nearest*"))
    (tmp_path / "other" / photo.parent.name).mkdir()
    shutil.copy(photo, tmp_path / "other" / photo.parent.name)
    code, _, stderr = run_cli(*given, "src=other", "layer=-2")
    assert code == 0, stderr
    assert "warning: 17 of the 18 neighbours cannot be read from src=" in stderr


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_damaged_files_are_not_finished(suffix, mim_checkpoint, photos, tmp_path):
    given = mim_checkpoint, photos, tmp_path / f"v{suffix}"
    make(*given)
    with given[-1].open("ab") as file:
        file.write(b"more")
    assert "not those written; resume=never computes" in refusal(make, *given)
    make(*given, resume="never")
    if suffix in (".npy", ".safetensors"):
        (tmp_path / f"v{suffix}.names.jsonl").unlink()
        assert f"v{suffix}.names.jsonl is missing; resume=never" in refusal(make, *given)


def test_nearest_subtracts_the_mean():
    stored = torch.tensor([[10.0, 1], [10, -1], [13, 0], [7, 0]])
    vectors = StoredVectors(list("abcd"), lambda: iter([stored[:1].numpy(), stored[1:].numpy()]))
    ((first, second),) = nearest(vectors, torch.tensor([[12.0, 1.0]]), 2)
    assert (first.name, second.name) == ("c", "a")
    assert first.similarity == pytest.approx(2 / 5**0.5)


def test_picture_of_patch_features(mim_checkpoint, mixed, run_cli, tmp_path):
    more = ["picture=p/f.png", "images=4", "layers=[-1,1]", "out=null"]
    code, stdout, stderr = run_cli(*words(mim_checkpoint, mixed, "x.npy", *more))
    assert code == 0, stderr
    assert "patch features of 3 images, layers 2, 1; 1 could not be read:\nboats/a.jpg: not an image" in stdout
    assert not list(tmp_path.glob("*.npy"))
    image = Image.open(tmp_path / "p/f.png")
    assert image.width == 3 * (224 + grids.GAP) + grids.GAP
    assert image.height > 3 * (224 + grids.GAP)


def test_principal_components_are_those_of_all_patches():
    """Three directions of falling variance, one in the middle: found in this order, the middle is bright."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(2, 64, 8, generator=rng) * torch.tensor([9, 5, 3, 0.1, 0.1, 0.1, 0.1, 0.1])
    x[..., 0] -= 50 * middle((8, 8)).flatten()
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=rng))[0]
    colours = pca_colours(x @ rotation + 3, (8, 8))
    assert colours.shape == (2, 3, 8, 8)
    assert 0 <= colours.min() < colours.max() <= 1
    inner = middle((8, 8))
    assert colours[:, 0, inner].min() > colours[:, 0, ~inner].max()
    for component, truth in ((1, x[..., 1]), (2, x[..., 2])):
        pairs = torch.stack([colours[:, component].flatten(), truth.flatten()])
        assert torch.corrcoef(pairs)[0, 1].abs() > 0.9
    flat = pca_colours(torch.ones(1, 4, 2), (2, 2))  # no variance, fewer than three components
    assert flat.shape[2:] == (2, 2)
    assert flat.isfinite().all()


def test_headers_have_one_length():
    for form in (FORMATS[".npy"], FORMATS[".safetensors"]):
        for shape in ((1,), (768,), (196, 1024)):
            made = form("float16", shape)
            assert len(made.head) % 64 == 0
            if isinstance(made, Npy):
                sizes = {len(made._header(10**power)) for power in range(15)}
                assert sizes == {len(made.head)}


def test_captions_keep_the_end_of_a_name():
    fits = lambda text: len(text) <= 10  # noqa: E731
    assert grids.shortened("n01440764/a.jpg", fits) == "...4/a.jpg"
    assert grids.shortened("a\nb", fits) == "a?b"
