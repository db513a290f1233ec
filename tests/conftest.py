"""What the tests share: tiny shards, photos and checkpoints, made once per session, and the command line in process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from beit_pretrain import __main__ as command_line
from beit_pretrain.backbone import MaskedImageModel
from beit_pretrain.dvae import DiscreteVAE
from beit_pretrain.shards import make_shards

DVAE = {"vocab_size": 32, "width": 8, "blocks": 1, "code_dim": 8, "in_chans": 3}
MIM = {"image_size": 32, "patch_size": 8, "vocab_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2}


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny tensors gain nothing from a second thread, and a test may have asked for one through `threads=`."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    """A folder with `train` and `val`: synthetic images of 48 pixels in 10 classes, shards of 12 samples."""
    out = tmp_path_factory.mktemp("shards") / "out"
    make_shards("synthetic", out, images=60, size=48, val=0.2, samples_per_shard=12, workers=1)
    return out


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """Three class folders of six JPEGs and PNGs each: several sizes and modes, a motif of its own for each class."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for label, name in enumerate(("boats", "cats", "dogs")):
        (root / name).mkdir()
        for i in range(6):
            image = _photo(rng, label, width=40 + 8 * i, height=72 - 8 * (i % 3))
            image = image.convert("L") if i == 4 else image.convert("RGBA") if i == 5 else image
            image.save(root / name / f"{name}_{i}.{'png' if i % 3 == 2 else 'jpg'}")
    return root


def _photo(rng: np.random.Generator, label: int, width: int, height: int) -> Image.Image:
    """A smooth background with boxes, disks or lines in front, by class."""
    coarse = Image.fromarray(rng.integers(60, 200, (3, 3, 3), dtype=np.uint8))
    image = coarse.resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    shape = (draw.rectangle, draw.ellipse, draw.line)[label]
    for _ in range(8):
        x, y, size = rng.integers(width), rng.integers(height), rng.integers(6, 20)
        shape((int(x), int(y), int(x + size), int(y + size)), fill=tuple(int(c) for c in rng.integers(0, 256, 3)))
    return image


def seeded(build: Callable, *args, **settings):
    """`build(...)` with weights that do not depend on which test asked first; the global generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build(*args, **settings)


def write_checkpoint(path: Path, kind: str, model: torch.nn.Module, **about) -> Path:
    """The part of a checkpoint of `fit` that `checkpoint.read_own` reads."""
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"beit_pretrain": {"kind": kind, "model": dict(model.config), **about}, "state_dict": state}, path)
    return path


@pytest.fixture(scope="session")
def dvae_checkpoint(tmp_path_factory) -> Path:
    """An untrained tokenizer of 32 tokens."""
    return write_checkpoint(tmp_path_factory.mktemp("dvae") / "last.ckpt", "tokenizer", seeded(DiscreteVAE, **DVAE))


@pytest.fixture(scope="session")
def mim_checkpoint(tmp_path_factory) -> Path:
    """An untrained backbone: 32 pixels, patches of 8, two blocks of width 32."""
    about = {"mean": [0.5] * 3, "std": [0.5] * 3, "tokenizer": "dvae/last.ckpt"}
    model = seeded(MaskedImageModel, **MIM)
    return write_checkpoint(tmp_path_factory.mktemp("mim") / "last.ckpt", "mim", model, **about)


@pytest.fixture(scope="session")
def openai_files(tmp_path_factory) -> Path:
    """`encoder.pkl` and `decoder.pkl` as OpenAI wrote them, pickled modules of the dall_e package, but small."""
    return _write_openai_files(tmp_path_factory.mktemp("openai"), vocab_size=512)


@pytest.fixture(scope="session")
def openai_files_full(tmp_path_factory) -> Path:
    """`encoder.pkl` at its real size: 53.8 million parameters, 8192 tokens."""
    from dall_e.encoder import Encoder

    folder = tmp_path_factory.mktemp("openai_full")
    torch.save(seeded(Encoder), folder / "encoder.pkl")
    return folder


def _write_openai_files(folder: Path, vocab_size: int) -> Path:
    from dall_e.decoder import Decoder
    from dall_e.encoder import Encoder

    settings = {"n_hid": 64, "n_blk_per_group": 1, "vocab_size": vocab_size, "requires_grad": False}
    torch.save(seeded(Encoder, **settings), folder / "encoder.pkl")
    torch.save(seeded(Decoder, n_init=16, **settings), folder / "decoder.pkl")
    return folder


@pytest.fixture
def run_cli(monkeypatch, capsys, tmp_path) -> Callable[..., tuple[int, str, str]]:
    """`run_cli(*words)`: the command line in this process, in an empty folder; (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> tuple[int, str, str]:
        torch.set_num_threads(1)
        monkeypatch.setattr("sys.argv", ["beit_pretrain", *map(str, words)])
        capsys.readouterr()  # what came before does not count
        code = command_line.main()
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
