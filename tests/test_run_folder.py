"""The folder of a run: its lock, which files are cleared, damaged checkpoints."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from tiny import tiny_words

from beit_pretrain.engine import fit as runs
from beit_pretrain.engine.run_folder import LOCK, clear, exclusive_lock, finished_step, mark_finished, set_aside
from beit_pretrain.errors import UserError


def in_another_process(folder: Path) -> int:
    """0 if another process can lock the folder, 1 if it is refused."""
    child = os.fork()
    if child == 0:
        try:
            with exclusive_lock(folder, first=True):
                os._exit(0)
        except UserError as error:
            os._exit(1 if f"process {os.getppid()} on" in str(error) else 2)
        finally:
            os._exit(3)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_only_one_process_holds_lock(tmp_path):
    folder = tmp_path / "run"
    with exclusive_lock(folder, first=True):
        assert in_another_process(folder) == 1
        with exclusive_lock(folder, first=False):  # the other processes of the same run
            pass
        assert in_another_process(folder) == 1
    assert in_another_process(folder) == 0


def test_child_process_does_not_hold_lock(tmp_path):
    """A loader worker that outlives a killed run must not block the next run."""
    ready, done = os.pipe(), os.pipe()
    run = os.fork()
    if run == 0:
        with exclusive_lock(tmp_path, first=True):
            if os.fork() == 0:
                os.write(ready[1], b"x")
                os.read(done[0], 1)  # lives on
            os.read(done[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    assert in_another_process(tmp_path) == 2  # held, and not by this process
    os.kill(run, 9)
    os.waitpid(run, 0)
    assert in_another_process(tmp_path) == 0
    os.write(done[1], b"xx")


@pytest.fixture
def words(shards, dvae_checkpoint, tmp_path):
    return ["fit", *tiny_words(shards, dvae_checkpoint), "data.num_workers=0", "num_visualizations=0", "steps=1"]


def test_lock_is_taken_before_folder_is_read(words, run_cli, tmp_path, monkeypatch):
    """A run that is just ending may still write the checkpoint from which the next one resumes."""
    words, run = [*words, f"run_dir={tmp_path / 'run'}"], tmp_path / "run"
    assert run_cli(*words)[0] == 0
    refused, choose = [], runs.find_resume

    def watching(cfg, folder):
        refused.append(in_another_process(run))
        return choose(cfg, folder)

    monkeypatch.setattr(runs, "find_resume", watching)
    assert run_cli(*words)[0] == 0
    assert run_cli(*words, "preflight=only")[0] == 0  # writes nothing and takes no lock
    assert refused == [1, 0]
    assert in_another_process(run) == 0


def test_folder_created_by_another_run_meanwhile(words, run_cli, tmp_path, monkeypatch):
    """Another run trains between the check of the missing folder and the lock: its checkpoints are kept."""
    words, other, run = [*words, f"run_dir={tmp_path / 'run'}"], tmp_path / "other", tmp_path / "run"
    assert run_cli(*words, f"run_dir={other}")[0] == 0
    check = runs.preflight

    def late(*args):
        shutil.copytree(other, run)
        return check(*args)

    with monkeypatch.context() as patch:
        patch.setattr(runs, "preflight", late)
        code, _, stderr = run_cli(*words)
    assert code == 2
    assert "another process has trained in" in stderr
    assert (run / "checkpoints/last.ckpt").read_bytes() == (other / "checkpoints/last.ckpt").read_bytes()
    code, stdout, _ = run_cli(*words)
    assert (code, "already finished" in stdout) == (0, True)


def test_clear_removes_only_files_of_the_run(tmp_path):
    ours = ["checkpoints/last.ckpt", "checkpoints/previous.ckpt", "checkpoints/best.ckpt", "checkpoints/.last.partial"]
    ours += ["checkpoints/step-00000010.ckpt", "checkpoints/last.ckpt.damaged", "metrics.csv", "skipped.jsonl"]
    ours += ["replaced.jsonl", "finished.json", "pictures/step-000010.png"]
    kept = ["checkpoints/mine.pth", "pictures/holiday.png", "notes.txt", ".wandb_id", LOCK]
    for name in (*ours, *kept):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    clear(tmp_path, another=False)
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == sorted(kept)
    clear(tmp_path, another=True)
    assert not (tmp_path / ".wandb_id").exists()


def test_damaged_checkpoints_are_set_aside(tmp_path):
    names = ("last.ckpt", "previous.ckpt", ".last.ckpt.partial")
    for name in names:
        (tmp_path / name).write_text(name)
    set_aside(tmp_path / "last.ckpt")
    assert {path.name for path in tmp_path.iterdir()} == {"last.ckpt", "previous.ckpt"}
    set_aside(tmp_path / "previous.ckpt")
    assert {path.name for path in tmp_path.iterdir()} == {"last.ckpt.damaged", "previous.ckpt"}


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"step": "many"}', "\0"])
def test_finished_marker(content, tmp_path):
    assert finished_step(tmp_path) is None
    mark_finished(tmp_path, 12)
    assert finished_step(tmp_path) == 12
    (tmp_path / "finished.json").write_text(content)
    assert finished_step(tmp_path) is None
