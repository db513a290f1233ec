"""Writing tokens: kills, several machines and full disks end in the same bytes or in one line."""

from __future__ import annotations

import glob
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
from test_make_shards import contents
from test_token_cache import GRID, VIEWS, tokens_of

from beit_pretrain.data.reader import ShardReader
from beit_pretrain.data.write.make_shards import make_shards
from beit_pretrain.errors import UserError
from beit_pretrain.tokenizers import tokenize as tokenizing
from beit_pretrain.tokenizers.dvae import DVAETokenizer
from beit_pretrain.tokenizers.token_writer import work_folder
from beit_pretrain.tokenizers.tokenize import TokenizeOptions, make_tokens


class Killed(BaseException):
    """Simulates a kill at a chosen moment: nothing catches it."""


@pytest.fixture
def whole(shards, dvae_checkpoint, tmp_path) -> dict:
    return contents(tokens_of(shards / "train", tmp_path / "whole", dvae_checkpoint))


def run(shards, out: Path, dvae: Path, count: int = 2, **how) -> bool:
    return make_tokens(
        ShardReader(shards / "train"), out, DVAETokenizer(dvae), VIEWS, GRID, count, how=TokenizeOptions(**how)
    )


def stopped(shards, out: Path, dvae: Path, after: int) -> None:
    """A call that is killed after a number of shards."""
    save, count = tokenizing.save, 0

    def some(path, records):
        nonlocal count
        count += 1
        if count > after:
            raise Killed
        save(path, records)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizing, "save", some)
        with pytest.raises(Killed):
            run(shards, out, dvae)
    assert not out.exists()


@pytest.mark.parametrize("after", [0, 1, 4])
def test_resume_after_kill(after, shards, dvae_checkpoint, whole, tmp_path, monkeypatch):
    stopped(shards, tmp_path / "out", dvae_checkpoint, after)
    save, saved = tokenizing.save, []
    monkeypatch.setattr(tokenizing, "save", lambda path, records: (saved.append(path), save(path, records))[1])
    assert run(shards, tmp_path / "out", dvae_checkpoint, batch_size=5)
    assert len(saved) == 5 - after
    assert contents(tmp_path / "out") == whole
    assert not list(tmp_path.glob(".*"))


def test_incomplete_files_are_rewritten(shards, dvae_checkpoint, whole, tmp_path):
    stopped(shards, tmp_path / "out", dvae_checkpoint, 4)
    folder = tmp_path / ".out.making/out"
    os.truncate(folder / "shard-000000.tokens.npy", 700)
    (folder / "shard-000001.tokens.npy").write_bytes(b"")
    (folder / "shard-000003.tokens.npy.77.partial").write_bytes(b"half")
    assert run(shards, tmp_path / "out", dvae_checkpoint)
    assert contents(tmp_path / "out") == whole


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_parts_in_any_order(order, shards, dvae_checkpoint, whole, tmp_path, capsys):
    out = tmp_path / "out"
    for number in order[:-1]:
        assert not run(shards, out, dvae_checkpoint, part=(number, 3))
        assert "shards are left to other parts" in capsys.readouterr().out
        assert not out.exists()
    assert run(shards, out, dvae_checkpoint, part=(order[-1], 3))
    assert contents(out) == whole


def test_call_without_part_completes_missing_shards(shards, dvae_checkpoint, whole, tmp_path):
    out = tmp_path / "out"
    assert not run(shards, out, dvae_checkpoint, part=(1, 2))
    assert not run(shards, out, dvae_checkpoint, part=(3, 16))
    assert not run(shards, out, dvae_checkpoint, part=(9, 16))  # no shard at all
    assert run(shards, out, dvae_checkpoint)
    assert contents(out) == whole


def test_concurrent_parts(shards, dvae_checkpoint, whole, tmp_path):
    """Another process with overlapping shards finishes the set while this one computes."""
    out, save, others = tmp_path / "out", tokenizing.save, []

    def overtaken(path, records):
        if not others:
            others.append(None)
            assert run(shards, out, dvae_checkpoint, part=(0, 1))
        save(path, records)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizing, "save", overtaken)
        assert run(shards, out, dvae_checkpoint, part=(0, 2))
    assert contents(out) == whole
    assert not list(tmp_path.glob(".*"))


def test_same_part_twice_is_refused(shards, dvae_checkpoint, tmp_path):
    with work_folder(tmp_path / "out", (0, 1)), pytest.raises(UserError, match="another process is making this part"):
        run(shards, tmp_path / "out", dvae_checkpoint)


def test_orphaned_worker_holds_no_lock(shards, dvae_checkpoint, tmp_path):
    out = tmp_path / "out"
    with work_folder(out, (0, 1)):
        child = os.fork()
        if not child:
            time.sleep(60)
            os._exit(0)
    try:
        assert run(shards, out, dvae_checkpoint)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_other_settings_are_refused(shards, dvae_checkpoint, tmp_path):
    stopped(shards, tmp_path / "out", dvae_checkpoint, 1)
    before = contents(tmp_path / ".out.making")
    with pytest.raises(UserError, match="holds a half-done run with views=2, not 3; give the same settings"):
        run(shards, tmp_path / "out", dvae_checkpoint, count=3)
    with pytest.raises(UserError, match=r"half-done run with images\.samples=50, not 10"):
        make_tokens(ShardReader(shards / "val"), tmp_path / "out", DVAETokenizer(dvae_checkpoint), VIEWS, GRID, 2)
    after = contents(tmp_path / ".out.making")
    assert {name for name in after if "lock" not in name} == {name for name in before if "lock" not in name}


def test_damaged_plan(shards, dvae_checkpoint, tmp_path):
    stopped(shards, tmp_path / "out", dvae_checkpoint, 1)
    (tmp_path / ".out.making/plan.json").write_text("{")
    with pytest.raises(UserError, match=r"plan\.json is damaged"):
        run(shards, tmp_path / "out", dvae_checkpoint)


def test_kill_after_rename_before_cleanup(shards, dvae_checkpoint, whole, tmp_path, monkeypatch):
    remove = shutil.rmtree

    def killed(*args, **settings):
        raise Killed

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(Killed):
        run(shards, tmp_path / "out", dvae_checkpoint)
    assert (tmp_path / ".out.making").exists()
    monkeypatch.setattr(shutil, "rmtree", remove)
    assert run(shards, tmp_path / "out", dvae_checkpoint)
    assert contents(tmp_path / "out") == whole
    assert not list(tmp_path.glob(".*"))


def command(src: Path, dvae: Path, *words: str) -> list[str]:
    start = [sys.executable, "-m", "beit_pretrain", "tokenize", f"data={src}", "tokenizer=dvae"]
    settings = f"tokenizer.path={dvae} image_size=32 patch_size=8 num_workers=1 accelerator=cpu threads=1 views=2"
    return [*start, *settings.split(), *words]


@pytest.mark.long
def test_disk_full(shards, dvae_checkpoint, whole, tmp_path):
    source = Path(shutil.copytree(shards / "train", tmp_path / "src"))

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1600, 1600))  # less than the tokens of a shard, more than the plan

    words = command(source, dvae_checkpoint)
    done = subprocess.run(words, capture_output=True, text=True, preexec_fn=small_files)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: cannot write tokens to")
    assert "File too large; finished shards are kept; rerun the same command to resume" in last
    assert "Traceback" not in done.stderr
    assert not (source / "tokens").exists()
    assert not list((source / ".tokens.making/tokens").iterdir())
    subprocess.run(words, check=True, capture_output=True)
    assert contents(source / "tokens") == whole


def test_disk_full_on_tmpfs(full_disk, shards, dvae_checkpoint, whole):
    """A real ENOSPC; with room, the same command resumes."""
    disk = full_disk(16_384)
    with pytest.raises(
        UserError, match=rf"^cannot write tokens to {disk}/tokens: No space left on device; finished shards are kept"
    ):
        run(shards, disk / "tokens", dvae_checkpoint)
    assert not (disk / "tokens").exists()
    assert not list(disk.rglob("*.npy.*"))
    subprocess.run(["mount", "-o", "remount,size=1m", disk], check=True)
    assert run(shards, disk / "tokens", dvae_checkpoint)
    assert contents(disk / "tokens") == whole


@pytest.mark.soak
@pytest.mark.long
@pytest.mark.timeout(900)
def test_resume_after_twenty_random_kills(dvae_checkpoint, tmp_path):
    make_shards("synthetic", tmp_path / "data", images=2000, size=48, samples_per_shard=25, num_workers=1)
    source = tmp_path / "data/train"
    again = command(source, dvae_checkpoint)
    subprocess.run(again, check=True, capture_output=True)
    os.rename(source / "tokens", tmp_path / "whole")
    expected, rng, kills, files_at_kill = contents(tmp_path / "whole"), random.Random(0), 0, []

    def finished() -> int:
        return len(glob.glob(str(source / ".tokens.making/tokens/*.npy")))  # the folder may go away meanwhile

    while kills < 20:
        words = [*again, f"part={rng.randrange(2)}/2"] if rng.random() < 0.3 else again
        # Moments spread over all of the work, and not over the clock: most of a run of this size is imports.
        enough = finished() + rng.randint(0, 12)
        process = subprocess.Popen(words, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while process.poll() is None and finished() < enough:
            time.sleep(0.002)
        try:
            assert process.wait(rng.uniform(0, 0.1)) == 0
            if (source / "tokens").exists():
                assert contents(source / "tokens") == expected
                shutil.rmtree(source / "tokens")
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            files_at_kill.append(finished())
    subprocess.run(again, check=True, capture_output=True)
    assert contents(source / "tokens") == expected
    assert json.loads((source / "tokens/tokens.json").read_text())["images"]["samples"] == 2000
    assert not (source / ".tokens.making").exists()
    # Or the moments were no test: of 80 files.
    assert sum(count > 0 for count in files_at_kill) >= 15
    assert max(files_at_kill) > 60
