"""W&B: same run after a restart, every step once in its newest folder, and training survives its failure."""

from __future__ import annotations

import signal
import subprocess

import pytest

from beit_pretrain.config import compose
from beit_pretrain.engine.preemption import SIGNALS
from beit_pretrain.engine.wandb_logger import WeightsAndBiases, blocked_for_children, mode, same_id
from beit_pretrain.errors import UserError


class FakeRun:
    """Records what is logged, and fails at a given row."""

    def __init__(self, breaks_at: int | None = None):
        self.rows: list[dict] = []
        self.breaks_at = breaks_at

    def log(self, row: dict) -> None:
        if len(self.rows) == self.breaks_at:
            raise ConnectionResetError("Connection lost")
        self.rows.append(row)


def logger(tmp_path, how: str, run: FakeRun):
    words = ["+experiment=demo_tokenizer", "data.train=x", "logger=wandb", "logger.project=p", f"logger.mode={how}"]
    cfg = compose("fit", [*words, "name=x", f"run_dir={tmp_path}"])
    made = WeightsAndBiases(cfg, "abc")
    made._experiment = run
    return made


def test_offline_run_gets_previous_rows(tmp_path):
    run, rows = FakeRun(), {2: {"train/loss": 1.0}, 1: {"train/loss": 2.0, "val/loss": 3.0}}
    logger(tmp_path, "offline", run).begin(rows)
    assert run.rows == [{**rows[1], "trainer/global_step": 1}, {**rows[2], "trainer/global_step": 2}]
    online = FakeRun()
    logger(tmp_path, "online", online).begin(rows)
    assert online.rows == []


def test_run_survives_wandb_failure(tmp_path, capsys):
    made = logger(tmp_path, "offline", FakeRun(breaks_at=2))
    for step in range(5):
        made.log_metrics({"train/loss": 1.0}, step)
    made.finalize("finished")
    said = capsys.readouterr().err
    assert said.count("W&B has failed (Connection lost); metrics.csv has all metrics") == 1
    assert len(made._experiment.rows) == 2


def test_failed_start_is_reported(tmp_path, monkeypatch):
    made = logger(tmp_path, "offline", FakeRun())
    made._experiment = None

    def refuse(**_):
        raise OSError("no network")

    monkeypatch.setattr("wandb.init", refuse)
    with pytest.raises(
        UserError, match=r"W&B does not start \(no network\); logger\.wandb\.mode=offline needs no network"
    ):
        made.begin({})


def test_run_id_is_stable(tmp_path):
    first = same_id(tmp_path / "id", first=True)
    assert same_id(tmp_path / "id", first=True) == same_id(tmp_path / "id", first=False) == first
    assert same_id(tmp_path / "other", first=False) != first
    assert not (tmp_path / "other").exists()


def test_wandb_process_does_not_get_signals():
    show = ["sed", "-n", "s/^SigBlk:\t//p", "/proc/self/status"]
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with blocked_for_children():
        inside = int(subprocess.check_output(show), 16)
    assert all(inside >> (number - 1) & 1 for number in SIGNALS)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


@pytest.mark.parametrize(
    ("asked", "variables", "expected"),
    [
        ("online", {}, "online"),
        (None, {"WANDB_MODE": "disabled"}, "disabled"),
        (None, {"WANDB_API_KEY": "x"}, "online"),
        (None, {}, "offline"),
    ],
)
def test_mode(asked, variables, expected, monkeypatch, tmp_path):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert mode(asked) == expected
