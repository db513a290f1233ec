"""The command line: fast help; user errors are one line with exit code 2."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import time
from io import BytesIO, TextIOWrapper
from pathlib import Path

import pytest
import torch
from tiny import fit_words

from beit_pretrain.cli import VERBS, main
from beit_pretrain.config import HINTS, experiments

ROOT = Path(__file__).parents[1]


def test_help_is_fast_and_lists_verbs_and_experiments():
    command = [sys.executable, "-m", "beit_pretrain", "--help"]
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1
    for word in [*VERBS, *experiments(), "base_22k"]:
        assert word in result.stdout


def test_help_of_no_verb_imports_torch():
    """It takes seconds to import, which nobody should wait for to read a line."""
    script = f"""
import contextlib, sys
from beit_pretrain.cli import main
for verb in {list(VERBS)}:
    sys.argv[1:] = [verb, "--help"]
    with contextlib.suppress(SystemExit):
        main()
    assert "torch" not in sys.modules, verb
"""
    subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_function_and_settings(verb, run_cli):
    code, stdout, _ = run_cli(verb, "--help")
    assert code == 0
    assert VERBS[verb].about in stdout
    module, function = VERBS[verb].function.split(":")
    assert callable(getattr(importlib.import_module(f"beit_pretrain.{module}"), function))


def test_cfg_prints_the_composed_config(run_cli):
    code, stdout, _ = run_cli("fit", "+experiment=base_22k", "optim.lr=7", "--cfg")
    assert code == 0
    assert "lr: 7" in stdout
    assert "train: ???" in stdout


def test_no_verb_prints_help(run_cli):
    assert run_cli()[1].startswith("usage:")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["fitt"], "did you mean fit?"),
        (["fit"], "+experiment=NAME, one of base_1k"),
        (["fit", "+experiment=base_22"], "did you mean base_22k?"),
        (["fit", "+experiment=base_22k", "optim.lrr=1"], "unknown key 'optim.lrr'"),
        (["fit", "+experiment=base_22k", "logger=paper"], "logger=paper: choose one of csv, tensorboard, wandb"),
        (["fit", "+experiment=base_22k", "seed=[1"], "seed=[1"),
        (["fit", "+experiment=base_22k", "verbose"], "key=value"),
        (["fit", "+experiment=base_22k"], HINTS["data.train"]),
        (["fit", "+experiment=base_22k", "data.train=x"], "encoder.pkl"),
        (["fit", "+experiment=finetune_base_1k", "data.train=x"], "init_from is missing"),
        (["fit", "-m", "+experiment=base_22k", "data.train=x"], "nothing to sweep"),
        (["validate", "-m", "run=a,b"], "sweeps (-m) are for fit"),
        (["shards", "make", "src=nowhere"], "out is missing"),
        (["shards", "make", "out=x"], "src is missing"),
        (["shards", "mend", "src=x"], "make, index, verify and show"),
        (
            ["fit", "+experiment=base_22k", "data.train=x-0.tar", "data.train=x-1.tar"],
            "'data.train=x-{0000..0099}.tar'",
        ),
        (["shards", "verify", "src=x-0.tar", "src=x-1.tar"], "put quotes around them"),
        (["validate"], "run is missing"),
        (["predict", "src=x"], "init_from is missing"),
        (["visualize", "run=nowhere"], "not the folder of a run"),
    ],
)
def test_wrong_arguments(words, said, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert said in refused(*words)
    assert not list(tmp_path.iterdir())  # nothing half-written


@pytest.fixture
def pretrain_words(shards, dvae_checkpoint, tmp_path):
    """A tiny pre-training run."""
    return fit_words("pretrain", shards, f"tokenizer.path={dvae_checkpoint}", f"run_dir={tmp_path / 'run'}", "steps=2")


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("data.train=nowhere", "nowhere does not exist"),
        ("data.val=nowhere", "nowhere does not exist"),
        ("data.train={empty}", "empty holds no image"),
        ("image_size=36", "not divisible by patch_size"),
        ("data.token_image_size=64", "one token per patch needs data.token_image_size=32"),
        ("tokenizer.path=nowhere.ckpt", "does not exist"),
        ("tokenizer.path={mim}", "a tokenizer (dVAE) is needed"),
        ("tokenizer.path={text}", "cannot be read as a checkpoint"),
        ("init_from={dvae}", "holds a tokenizer (dVAE), not a backbone"),
        ("model.size=huge", "tiny, small, base, large"),
        ("mask.max_patches=400", "max_patches"),
        ("steps=null", "steps=N or epochs=N"),
        ("model.num_heads=3", "not divisible by model.num_heads=3"),
        ("tokenizer=null", "tokenizer=none needs data.tokens=FOLDER"),
        ("run_dir={text}", "text.ckpt"),
        ("global_batch_size=5 batch_size=2", "not a multiple"),
        ("data.num_workers=-1", "num_workers"),
        ("optim.lr=fast", "lr"),
        ("trainer.accelerator=abacus", "abacus"),
        ("resume=sometimes", "auto, never"),
        ("task=knit", "finetune, mae, pretrain"),
        ("logger.kind=paper", "csv, tensorboard, wandb"),
        ("threads=-1", "threads"),
    ],
)
def test_bad_settings(word, said, pretrain_words, refused, tmp_path, mim_checkpoint, dvae_checkpoint):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.ckpt").write_text("not a checkpoint")
    places = {
        "empty": tmp_path / "empty",
        "mim": mim_checkpoint,
        "dvae": dvae_checkpoint,
        "text": tmp_path / "text.ckpt",
    }
    words = pretrain_words + [w.format(**places) for w in word.split()]
    assert said in refused(*words)
    assert not (tmp_path / "run").exists()  # nothing half-written


def test_init_from_of_wrong_size(shards, mim_checkpoint, refused, tmp_path):
    words = ["fit", "+experiment=demo_finetune", f"data.train={shards / 'train'}", f"run_dir={tmp_path / 'run'}"]
    said = refused(*words, f"init_from={mim_checkpoint}", "data.num_workers=0")
    assert "2 blocks of width 32" in said
    assert "but model.embed_dim asks for embed_dim=128" in said
    assert not (tmp_path / "run").exists()


def test_folder_without_images(refused, tmp_path):
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    assert "holds no image" in refused("shards", "make", f"src={tmp_path / 'photos'}", f"out={tmp_path / 'out'}")
    (tmp_path / "photos" / "cat" / "a.jpg").write_text("no image")
    words = ["shards", "make", f"src={tmp_path / 'photos'}", f"out={tmp_path / 'out'}", "num_workers=1"]
    refused(*words)
    assert not (tmp_path / "out").exists()


def test_predict_refuses_other_checkpoints(refused, tmp_path, mim_checkpoint, photos):
    said = refused("predict", f"init_from={mim_checkpoint}", f"src={photos}", f"out={tmp_path / 'p.csv'}")
    assert "holds a mim; a classifier or a segmentation model is needed" in said
    torch.save({"foo": torch.zeros(2)}, tmp_path / "foreign.pt")
    said = refused("predict", f"init_from={tmp_path / 'foreign.pt'}", f"src={photos}", f"out={tmp_path / 'p.csv'}")
    assert "is no BEiT: it seems to be something else, with tensors such as foo" in said
    assert not (tmp_path / "p.csv").exists()


def test_error_in_loader_worker_is_one_line(shards, refused, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in (shards / "train").iterdir():
        data = path.read_bytes()
        if path.suffix == ".tar":  # every image loses its head, the sizes stay: a shard that rotted on the disk
            data = data.replace(b"\xff\xd8\xff", b"\x00\x00\x00")
        (broken / path.name).write_bytes(data)
    words = [
        "fit",
        "+experiment=demo_tokenizer",
        f"data.train={broken}",
        "data.num_workers=1",
        "steps=1",
        "global_batch_size=2",
    ]
    said = refused(*words, f"run_dir={tmp_path / 'run'}", "threads=1")
    assert "cannot be decoded" in said
    assert ".tar" in said


def test_finetune_refuses_images_without_labels(photos, run_cli, refused, tmp_path):
    mixed = tmp_path / "mixed"
    shutil.copytree(photos, mixed)
    shutil.copy(next(photos.rglob("*.jpg")), mixed / "loose.jpg")
    assert run_cli("shards", "make", f"src={mixed}", f"out={tmp_path / 'out'}", "num_workers=1")[0] == 0
    words = ["fit", "+experiment=demo_finetune", "from_scratch=true", f"data.train={tmp_path / 'out/train'}"]
    assert "1 images without a class" in refused(*words, f"run_dir={tmp_path / 'run'}")


@pytest.mark.parametrize("name", ["plain", "two words", "a=b", "a,b", "it's", "für $5", "(x)", "[1]", "100%", "a:b"])
def test_paths_with_special_characters(name, photos, run_cli, tmp_path):
    shutil.copytree(photos, tmp_path / name)
    code, _, stderr = run_cli(
        "shards", "make", f"src={tmp_path / name}", f"out={tmp_path / 'out' / name}", "num_workers=1"
    )
    assert code == 0, stderr
    assert (tmp_path / "out" / name / "train/manifest.json").is_file()


STREAMS = [("utf-8", "strict"), ("ascii", "strict"), ("ascii", "surrogateescape")]


@pytest.mark.parametrize(("encoding", "errors"), STREAMS)
def test_names_that_cannot_be_encoded_are_escaped(encoding, errors, photos, tmp_path, monkeypatch):
    """Python's streams are strict in every UTF-8 locale but C.UTF-8."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / os.fsdecode(b"ph\xc3\xb6tos/caf\xe9")
    shutil.copytree(photos / "cats", folder)
    (folder / os.fsdecode(b"br\xfcn.jpg")).write_text("no image")

    def printed(*words) -> tuple[int, str]:
        streams = [TextIOWrapper(BytesIO(), encoding, errors) for _ in range(2)]
        monkeypatch.setattr("sys.stdout", streams[0])
        monkeypatch.setattr("sys.stderr", streams[1])
        monkeypatch.setattr("sys.argv", ["beit_pretrain", *map(str, words)])
        code = main()
        for stream in streams:
            stream.flush()
        return code, "".join(stream.buffer.getvalue().decode(encoding) for stream in streams)

    code, said = printed("shards", "make", f"src={folder.parent}", "out=out", "num_workers=1")
    assert code == 0
    assert "caf\\udce9 (6)" in said
    code, said = printed("shards", "show", "src=out/train")
    assert code == 0
    assert "caf\\udce9 (6)" in said
    code, said = printed("shards", "make", "out=o2", f"src={folder}/none")
    assert code == 2
    assert "caf\\udce9/none does not exist" in said
    code, said = printed("predict", f"init_from={folder}/none.ckpt", "src=x")
    assert code == 2
    assert "caf\\udce9/none.ckpt does not exist" in said
    code, said = printed("nothing" + os.fsdecode(b"\xe9"))
    assert (code, said.startswith("error: unknown verb")) == (2, True)
