"""Resuming: settings, metrics, and folders that were tampered with."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from tiny import last_checkpoint, rows_of, tiny_words

from beit_pretrain.config import compose
from beit_pretrain.engine import resume
from beit_pretrain.engine.run_folder import differences, mark_finished, read_config
from beit_pretrain.engine.sweep import SweepRun, is_finished
from beit_pretrain.errors import UserError
from beit_pretrain.settings import to_dict
from beit_pretrain.tables import read_rows


@pytest.fixture
def words(shards, dvae_checkpoint, tmp_path):
    more = ["data.num_workers=0", "num_visualizations=0", "steps=4", "save_every=2", f"run_dir={tmp_path / 'run'}"]
    return ["fit", *tiny_words(shards, dvae_checkpoint), *more]


def test_finished_run_can_be_extended(words, run_cli, tmp_path):
    """By editing config.yaml; the loop of the last checkpoint had finished."""
    run = tmp_path / "run"
    assert run_cli(*words)[0] == 0
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("\nsteps: 4\n", "\nsteps: 6\n"))
    (run / "finished.json").unlink()
    code, stdout, stderr = run_cli(*words, "steps=6")
    assert code == 0, stderr
    assert "after step 4" in stdout
    assert set(rows_of(run)) == {1, 2, 3, 4, 5, 6}
    assert last_checkpoint(run)["global_step"] == 6


def test_home_folder_of_an_earlier_version_is_no_other_setting(monkeypatch):
    """config.yaml of versions that kept a leading ~."""
    monkeypatch.setenv("HOME", "/home/someone")
    old = {"tokenizer": {"path": "~/dvae"}, "data": {"tokens": ["~/a", "b"]}, "init_from": "~/c"}
    new = {
        "tokenizer": {"path": "/home/someone/dvae"},
        "data": {"tokens": ["/home/someone/a", "b"]},
        "init_from": "~/d",
    }
    assert differences(old, new) == ["init_from: ~/c -> ~/d"]


DAMAGED = {"unfinished": b"a: [1, ", "binary": bytes(range(256)), "list": b"[1, 2]", "number": b"5", "empty": b""}


class TestDamagedConfig:
    @pytest.mark.parametrize("kind", DAMAGED)
    def test_error_names_file(self, kind, tmp_path):
        (tmp_path / "config.yaml").write_bytes(DAMAGED[kind])
        with pytest.raises(UserError, match=r"config\.yaml cannot be read as the settings of a run: "):
            read_config(tmp_path / "config.yaml")

    def test_error_is_one_line(self, run_cli, tmp_path):
        (tmp_path / "run").mkdir()
        (tmp_path / "run/config.yaml").write_bytes(DAMAGED["unfinished"])
        code, _, stderr = run_cli("validate", f"run={tmp_path / 'run'}")
        assert (code, stderr.count("\n")) == (2, 1), stderr
        assert "run/config.yaml cannot be read" in stderr

    def test_sweep_treats_run_as_unfinished(self, words, tmp_path):
        member = SweepRun("run", tmp_path / "run", {}, words[1:])
        member.folder.mkdir()
        mark_finished(member.folder, 4)
        assert not is_finished(member)
        (member.folder / "config.yaml").write_text(yaml.safe_dump(to_dict(compose("fit", member.words))))
        assert is_finished(member)
        for content in DAMAGED.values():
            (member.folder / "config.yaml").write_bytes(content)
            assert not is_finished(member)


class TestOtherSettings:
    """Changed settings are refused before anything in the folder changes, whichever files are left."""

    def refused(self, run_cli, words: list[str], run: Path) -> None:
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
        code, _, stderr = run_cli(*words, "seed=5", "optim.lr=.1")
        assert code == 2
        assert "holds a run with other settings (optim.lr: 0.003 -> 0.1; seed: 0 -> 5)" in stderr
        assert before == {path: path.read_bytes() for path in before}

    def test_before_the_first_checkpoint(self, words, run_cli, crash, tmp_path, monkeypatch):
        words, run = [*words, "save_every=100", "val_every=100"], tmp_path / "run"
        crash(3, *words)
        (run / ".wandb_id").write_text("abc")
        self.refused(run_cli, words, run)
        with monkeypatch.context() as patch:  # the first process names one that differs, once they have met
            patch.setattr(resume, "is_first_process", lambda: False)
            assert (
                resume.find_resume(compose("fit", [*words[1:], "seed=5"]), run / "checkpoints") == resume.ResumeState()
            )
        (run / "config.yaml").write_bytes(DAMAGED["unfinished"])
        code, _, stderr = run_cli(*words)
        assert code == 2
        assert "config.yaml cannot be read" in stderr
        (run / "config.yaml").unlink()
        code, stdout, stderr = run_cli(*words)  # the same ones start over
        assert code == 0, stderr
        assert "resuming" not in stdout
        assert set(rows_of(run)) == {1, 2, 3, 4}
        assert (run / ".wandb_id").read_text() == "abc"

    def test_checkpoint_without_config(self, words, run_cli, tmp_path):
        run = tmp_path / "run"
        assert run_cli(*words)[0] == 0
        config = (run / "config.yaml").read_text()
        for content in (None, *DAMAGED.values()):
            (run / "config.yaml").unlink() if content is None else (run / "config.yaml").write_bytes(content)
            self.refused(run_cli, words, run)
        code, stdout, stderr = run_cli(*words)
        assert (code, "already finished" in stdout) == (0, True)
        assert "last.ckpt has them" in stderr
        assert (run / "config.yaml").read_text() == config

    def test_checkpoint_without_settings(self, words, run_cli, tmp_path):
        last = tmp_path / "run/checkpoints/last.ckpt"
        assert run_cli(*words)[0] == 0
        content = last_checkpoint(tmp_path / "run")
        del content["settings"]
        torch.save(content, last)
        (tmp_path / "run/config.yaml").unlink()
        code, _, stderr = run_cli(*words)
        assert code == 0
        assert "settings" in stderr


def test_warns_about_lost_metrics(words, run_cli, tmp_path):
    """Once; later checkpoints count the remaining rows."""
    words, run = [*words, "steps=6", "log_every=2", "val_every=3"], tmp_path / "run"
    assert run_cli(*words)[0] == 0
    assert read_rows(run / "metrics.csv")[1].keys() == {2, 3, 4, 6}
    (run / "checkpoints/last.ckpt").unlink()  # of step 6; on from step 4
    (run / "finished.json").unlink()
    shutil.copytree(run, tmp_path / "kept")
    lines = (run / "metrics.csv").read_text().splitlines(keepends=True)
    for left, lost in (("".join(lines), 0), ("", 3), ("".join(lines[:1] + lines[3:]), 2)):
        shutil.rmtree(run)
        shutil.copytree(tmp_path / "kept", run)
        (run / "metrics.csv").write_text(left)
        if not left:
            (run / "metrics.csv").unlink()
        code, stdout, stderr = run_cli(*words)
        assert code == 0, stderr
        assert "after step 4" in stdout
        assert (f"metrics.csv lacks {lost} of the 3 rows that were written up to step 4" in stderr) == (lost > 0)
    (run / "finished.json").unlink()
    assert "lacks" not in run_cli(*words)[2]
