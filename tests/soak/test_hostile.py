"""Hostile files given to the shipped commands: refused in one line; nothing is executed or written elsewhere."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from test_image_io import encoded
from test_tars import hostile_tar, huge_file
from tiny import errors, start

pytestmark = [pytest.mark.soak, pytest.mark.long, pytest.mark.timeout(1800)]


class Hostile:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


def everything(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file under a folder."""
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def command(tmp_path) -> Callable[..., str]:
    """`command(words)`: run in `work`; returns the error. Fails if anything outside changes or is executed."""
    work = tmp_path / "work"
    work.mkdir()

    def run(words: list[str], code: int = 2) -> str:
        before = everything(tmp_path / "given")
        log = work / "log"
        assert start(words, work, log).wait(200) == code, (words, log.read_text()[-3000:])
        assert "Traceback" not in log.read_text(), log.read_text()[-3000:]
        assert everything(tmp_path / "given") == before
        assert {path.name for path in tmp_path.iterdir()} == {"given", "work"}
        assert not list(tmp_path.rglob("executed"))
        if not code:
            return ""
        (said,) = errors(log)
        return said

    return run


def test_hostile_checkpoints_and_tokenizers(made, command, tmp_path, measured):
    """Hostile checkpoint and tokenizer files: refused in one line, nothing executed, nothing written."""
    given = tmp_path / "given"
    given.mkdir()
    files = {
        "zip.ckpt": lambda path: torch.save({"state_dict": Hostile(given / "executed")}, path),
        "pickle.pth": lambda path: path.write_bytes(pickle.dumps(Hostile(given / "executed"), 2)),
        "tar.ckpt": lambda path: hostile_tar(path),
        "web.ckpt": lambda path: path.write_text("<html>please log in</html>"),
        "huge.safetensors": lambda path: path.write_bytes((2**60).to_bytes(8, "little") + b"{" + bytes(64)),
        "deep.ckpt": lambda path: path.write_bytes(b"\x80\x02" + b"(" * 100_000 + b"."),
    }
    for name, write in files.items():
        write(given / name)
    (given / "openai").mkdir()
    torch.save(Hostile(given / "executed"), given / "openai/encoder.pkl")
    fit = [*(word for word in made.words if not word.startswith("tokenizer.path=")), "steps=2", "name=x"]
    refused = 0
    for name in files:
        where = f"{given / name}"
        for words in (
            [*fit, f"tokenizer.path={where}"],
            ["export", f"init_from={where}", "to=timm", "out=x.safetensors"],
        ):
            assert where in command(words)
            refused += 1
    assert "encoder.pkl" in command([*fit, "tokenizer=openai", f"tokenizer.path={given / 'openai'}"])
    # In the place of a run's own checkpoint.
    assert command([*made.words, "steps=8", "name=run"], 0) == ""
    checkpoints = tmp_path / "work/runs/run/checkpoints"
    content = torch.load(checkpoints / "previous.ckpt", weights_only=True)  # one step is left to do
    (checkpoints.parent / "finished.json").unlink()
    for name, change in {
        "zip.ckpt": None,
        "other shapes": {"state_dict": {k: torch.zeros(3) for k in content["state_dict"]}},
        "no optimiser": {"optimizer_states": []},
        "odd loops": {"loops": {"fit_loop": {"state_dict": 3}}},
        "a step that is none": {"global_step": "8"},
    }.items():
        for path in checkpoints.iterdir():
            path.unlink()
        if change is None:
            shutil.copy(given / name, checkpoints / "last.ckpt")
        else:
            torch.save({**content, **change}, checkpoints / "last.ckpt")
        assert "runs/run/checkpoints" in command([*made.words, "steps=8", "name=run"]), name
        refused += 1
    measured(f"{refused + 1} commands with hostile or odd files: exit code 2, one line, nothing executed or written")


def test_path_traversal_in_tars(command, tmp_path, measured):
    """Tar members named ../, absolute, links, devices, oversized: refused; nothing is written outside the target."""
    given = tmp_path / "given"
    given.mkdir()
    hostile_tar(given / "tricks.tar")
    assert command(["shards", "make", f"src={given / 'tricks.tar'}", "out=made", "num_workers=1"], 0) == ""
    made = tmp_path / "work/made/train"
    manifest = json.loads((made / "manifest.json").read_text())
    assert (manifest["samples"], manifest["rejected"]) == (1, 8)
    reasons = {json.loads(line)["reason"] for line in (made / "rejected.jsonl").read_text().splitlines()}
    (given / "oversized.tar").write_bytes(huge_file())
    said = command(["shards", "make", f"src={given / 'oversized.tar'}", "out=big", "num_workers=1"])
    assert not (tmp_path / "work/big").exists()
    with tarfile.open(given / "foreign.tar", "w") as tar:  # to be indexed in place, in a separate folder
        for name in ("../up.jpg", "/abs.jpg", "a/good.jpg"):
            info = tarfile.TarInfo(name)
            data = encoded(1)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    (tmp_path / "work/adopted").mkdir()
    (given / "foreign.tar").rename(tmp_path / "work/adopted/foreign.tar")
    command(["shards", "index", "src=adopted"], 0)
    assert json.loads((tmp_path / "work/adopted/manifest.json").read_text())["samples"] == 1
    measured(f"8 members refused ({'; '.join(sorted(reasons))}), the good one taken")
    measured(f"oversized: {said.removeprefix('error: ').replace(str(given), 'GIVEN')[:110]}")


def test_path_traversal_in_manifest(made, command, tmp_path, measured):
    """A manifest or an index that points elsewhere: refused in one line, nothing written."""
    given = tmp_path / "given"
    fit = [word for word in made.words if not word.startswith(("data.train=", "data.tokens="))]
    said = []

    def refused(change, words: list[str], file: str = "manifest.json") -> None:
        shutil.rmtree(given, ignore_errors=True)
        shutil.copytree(made.folder / "data/train", given / "train")
        change(given / "train" / file)
        said.append(command([*words, "steps=2", "name=x"]))
        assert not (tmp_path / "work/runs").exists()

    def rewritten(where: str, value) -> Callable[[Path], None]:
        def change(path: Path) -> None:
            about = json.loads(path.read_text())
            about["shards"][0][where] = value
            path.write_text(json.dumps(about))

        return change

    def index(path: Path) -> None:
        rows = np.load(path)
        rows["image_offset"] = 2**40
        np.save(path, rows)

    def huge_index(path: Path) -> None:
        with path.open("wb") as file:
            header = {"descr": np.load(made.folder / "data/train" / path.name).dtype.descr, "fortran_order": False}
            np.lib.format.write_array_header_1_0(file, {**header, "shape": (2**44,)})

    data = f"data.train={given / 'train'}"
    for name in ("../../secret.tar", "/etc/passwd.tar", "http://host/x.tar", "pipe:touch executed.tar"):
        refused(rewritten("name", name), [*fit, data])
    refused(rewritten("sha256", "../../.."), [*fit, data])
    refused(index, [*fit, data, "data.shuffle_streams=1"], "shard-000000.index.npy")
    refused(huge_index, [*fit, data, "data.shuffle_streams=1"], "shard-000000.index.npy")
    tokens = [word for word in fit if not word.startswith("tokenizer")]
    tokens = [*tokens, data, "tokenizer=none", "data.val=null", f"data.tokens={given / 'train/tokens'}"]
    refused(rewritten("name", "../../secret.npy"), tokens, "tokens/tokens.json")
    measured(f"{len(said)} commands: exit code 2, one line each, such as: {said[0].partition('(')[2][:90]}")
