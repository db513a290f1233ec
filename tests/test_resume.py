"""From where a run goes on: with whose settings, with which metrics, also where its folder was tampered with."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import last_checkpoint, rows_of, tiny_words


@pytest.fixture
def words(shards, dvae_checkpoint, tmp_path):
    more = ["data.workers=0", "pictures=0", "steps=4", "save_every=2", f"run_dir={tmp_path / 'run'}"]
    return ["fit", *tiny_words(shards, dvae_checkpoint), *more]


def test_a_finished_run_is_made_longer_by_hand(words, run_cli, tmp_path):
    """Whoever changes config.yaml means it. The loop of the last checkpoint had come to its end."""
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
