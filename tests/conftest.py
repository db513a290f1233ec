"""Shared fixtures: tiny shards, photos and checkpoints, made once per session, and the command line in process."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import matplotlib.font_manager  # writes its list of fonts, which a test with a full disk could not
import numpy as np
import pytest
import tiny
import torch
from hypothesis import HealthCheck, settings
from PIL import Image, ImageDraw
from tiny import DVAE, MIM, SIZE, Crash, seeded, write_checkpoint

from beit_pretrain import cli as command_line
from beit_pretrain.data.write.make_shards import make_shards
from beit_pretrain.engine import fit
from beit_pretrain.models.backbone import MaskedImageModel
from beit_pretrain.models.upernet import Segmenter
from beit_pretrain.tokenizers.dvae import DiscreteVAE

# JAX compiles in half the time; numbers differ by rounding alone.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

# The same examples at every run; `--hypothesis-profile=thorough` draws new ones.
COMMON = {"deadline": None, "database": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("ci", derandomize=True, max_examples=40, **COMMON)
settings.register_profile("thorough", max_examples=2000, **COMMON)
settings.load_profile("ci")


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory) -> None:
    """Lists of images go into a folder of the tests, also in child processes; matplotlib's list of fonts stays."""
    os.environ["MPLCONFIGDIR"] = matplotlib.get_cachedir()
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def one_thread():
    """Reset the number of threads, which a test may have changed by `threads=`; tiny tensors gain nothing from more."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    """End all processes that `tiny.start` started."""
    yield
    tiny.end_all()


@pytest.fixture
def measured(request) -> Callable[[str], None]:
    """`measured("...")`: record a measurement of a soak test for the final table."""
    return lambda found: request.node.user_properties.append(("measured", found))


def pytest_runtest_makereport(item, call) -> None:
    """The first line of a soak test's docstring is what it guarantees."""
    if call.when == "setup" and item.get_closest_marker("soak"):
        promise = (item.function.__doc__ or item.name.replace("_", " ")).strip().splitlines()[0]
        item.user_properties.append(
            ("promise", promise + (f" [{item.callspec.id}]" if hasattr(item, "callspec") else ""))
        )


def pytest_terminal_summary(terminalreporter) -> None:
    """Print the table of `make soak`: guarantee, duration and measurements of each test."""
    rows = []
    for outcome in ("passed", "failed", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            facts: dict[str, list[str]] = {}
            for key, value in getattr(report, "user_properties", []):
                facts.setdefault(key, []).append(value)
            if "promise" in facts and (report.when == "call" or outcome != "passed"):
                rows.append((outcome, facts["promise"][0], f"{report.duration:.0f} s", facts.get("measured", [])))
    if rows:
        terminalreporter.section("soak")
    for outcome, promise, seconds, found in rows:
        terminalreporter.line(f"{outcome:8} {seconds:>6}  {promise}")
        for line in found:
            terminalreporter.line(f"{'':17}{line}")


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    """A folder with `train` and `val`: synthetic images of 48 pixels in 10 classes, shards of 12 samples."""
    out = tmp_path_factory.mktemp("shards") / "out"
    make_shards("synthetic", out, images=60, size=48, val=0.2, samples_per_shard=12, num_workers=1)
    return out


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """Three class folders of six JPEGs and PNGs each, in several sizes and modes; each class has its own motif."""
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
def segmenter_checkpoint(tmp_path_factory) -> Path:
    """An untrained segmentation model of three classes that predicts more than one of them."""
    model = seeded(Segmenter, 3, {"channels": 16, "aux_channels": 8}, **SIZE)
    with torch.no_grad():
        model.decode_head.classifier.weight.mul_(100)
    about = {"mean": [0.5] * 3, "std": [0.5] * 3, "classes": ["boats", "cats", "dogs"]}
    return write_checkpoint(tmp_path_factory.mktemp("segmenter") / "last.ckpt", "segmenter", model, **about)


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


@pytest.fixture
def crash(run_cli) -> Callable[..., None]:
    """`crash(step, *words)`: run a `fit` that crashes after an optimizer step."""

    def run(step: int, *words: str) -> None:
        make = fit.make_trainer
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fit, "make_trainer", lambda cfg, steps, calls: make(cfg, steps, [*calls, Crash(step)]))
            with pytest.raises(RuntimeError, match="power cut"):
                run_cli(*words)

    return run


@pytest.fixture
def refused(run_cli) -> Callable[..., str]:
    """`refused(*words)`: the error of a command that ends with exit code 2: one line, after warnings and progress."""

    def run(*words: str) -> str:
        code, _, stderr = run_cli(*words)
        *before, error = stderr.splitlines()
        assert code == 2, stderr
        assert error.startswith("error: "), stderr
        assert all(line.startswith("warning: ") or line.strip()[-3:] in ("", "/s]") for line in before), stderr
        return error

    return run


class ShardServer:
    """Serves the files of a folder over http on the loopback, with the failures of real servers.

    `trouble(name, number)`: what goes wrong with the number-th request (from 0) for a file, or None: "drop" (nothing
    comes), "half" (half of what was asked for), "stall" (half, then silence), "drip" (a byte now and then), "flip" (a
    wrong byte), "long" (more than there is), "header" (a byte of the header now and then), "unsaid" (half, and no
    length), "loop" (a redirection to itself), or an HTTP status.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.trouble: Callable[[str, int], str | int | None] = lambda name, number: None
        self.ranges, self.delay = True, 0.0
        self.requests: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._ended = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                server.answer(self)

            def log_message(self, *args) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *args: None  # readers that hang up are part of the tests
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._ended.set()
        self._server.shutdown()
        self._server.server_close()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        name = request.path.partition("?")[0].lstrip("/")
        with self._lock:
            number = self.requests[name]
            self.requests[name] += 1
        trouble, path = self.trouble(name, number), self.folder / name
        time.sleep(self.delay)
        request.close_connection = True
        if trouble == "drop":
            return
        if trouble == "header":
            for byte in b"HTTP/1.1 200 OK\r\nX-Long: " + b"x" * 5000:
                if self._ended.wait(0.05):
                    return
                request.wfile.write(bytes([byte]))
        if trouble == "loop":
            request.send_response(302)
            request.send_header("Location", f"{self.url}{request.path}")
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        if isinstance(trouble, int) or not path.is_file():
            request.send_response(trouble if isinstance(trouble, int) else 404)
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        data, start = path.read_bytes(), 0
        if self.ranges and (wanted := re.match(r"bytes=(\d+)-", request.headers.get("Range", ""))):
            start = int(wanted[1])
            request.send_response(206)
            request.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        else:
            request.send_response(200)
        data = data[start:]
        if trouble == "flip":
            data = data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]
        if trouble == "long":
            data += b"more"
        if trouble != "unsaid":
            request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        if trouble in ("half", "stall", "unsaid"):
            data = data[: len(data) // 2]
        if trouble == "drip":
            while data and not self._ended.wait(0.02):
                request.wfile.write(data[:1])
                data = data[1:]
        request.wfile.write(data)
        if trouble == "stall":
            request.wfile.flush()
            self._ended.wait(60)


@pytest.fixture
def serve() -> Iterator[Callable[[Path], ShardServer]]:
    """`serve(folder)`: a server that ends with the test."""
    servers: list[ShardServer] = []

    def start(folder: Path) -> ShardServer:
        servers.append(ShardServer(folder))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def full_disk(tmp_path) -> Iterator[Callable[[int], Path]]:
    """`full_disk(size)`: a folder on a disk of `size` bytes. Skips the test unless root runs it."""
    folders: list[Path] = []

    def mount(size: int) -> Path:
        folder = tmp_path / f"disk{len(folders)}"
        folder.mkdir()
        words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if os.geteuid() or not shutil.which("mount") or subprocess.run(words, capture_output=True).returncode:
            pytest.skip("a disk of its own can be mounted by root alone")
        folders.append(folder)
        return folder

    yield mount
    for folder in folders:
        subprocess.run(["umount", "-l", str(folder)], check=True)
