"""metrics.csv: appended rows, new columns, and truncation to the checkpoint when a run resumes."""

import csv
import math

import pytest
import torch

from beit_pretrain.engine.metrics import CsvMetrics
from beit_pretrain.tables import curve, read_rows


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "metrics.csv"


def table(path) -> list[list[str]]:
    return list(csv.reader(path.read_text().splitlines()))


def test_rows_are_appended(path):
    logger = CsvMetrics(path)
    assert not path.exists()
    logger.log_metrics({"train/loss": 2.5, "lr": 0.1}, step=1)
    inode = path.stat().st_ino
    logger.log_metrics({"train/loss": torch.tensor(1.5), "lr": 0.2}, step=2)
    assert table(path) == [["step", "train/loss", "lr"], ["1", "2.5", "0.1"], ["2", "1.5", "0.2"]]
    assert path.stat().st_ino == inode  # appended, not rewritten


def test_one_row_per_step(path):
    logger = CsvMetrics(path)
    logger.log_metrics({"train/loss": 2.5}, step=1)
    logger.log_metrics({"val/loss": 3.5}, step=1)
    logger.log_metrics({"train/loss": 2.25}, step=1)
    assert table(path) == [["step", "train/loss", "val/loss"], ["1", "2.25", "3.5"]]


def test_new_columns_leave_earlier_rows_empty(path):
    logger = CsvMetrics(path)
    logger.log_metrics({"a": 1}, step=1)
    logger.log_metrics({"b": 2}, step=2)
    logger.log_metrics({"a": 3}, step=3)
    assert table(path) == [["step", "a", "b"], ["1", "1.0", ""], ["2", "", "2.0"], ["3", "3.0", ""]]
    assert read_rows(path) == (["step", "a", "b"], {1: {"a": 1.0}, 2: {"b": 2.0}, 3: {"a": 3.0}})


def test_new_logger_appends(path):
    CsvMetrics(path).log_metrics({"a": 1}, step=1)
    again = CsvMetrics(path)
    again.log_metrics({"a": 2}, step=2)
    again.log_metrics({"b": 3}, step=3)
    assert curve(path, "a") == ([1, 2], [1.0, 2.0])
    assert curve(path, "b") == ([3], [3.0])


def test_truncate_after_step(path):
    """A run that died after its last checkpoint repeats steps: none may appear twice."""
    logger = CsvMetrics(path)
    for step in range(1, 6):
        logger.log_metrics({"a": step}, step=step)
    again = CsvMetrics(path)
    again.truncate_after(3)
    assert curve(path, "a") == ([1, 2, 3], [1.0, 2.0, 3.0])
    again.log_metrics({"a": 40}, step=4)
    assert curve(path, "a") == ([1, 2, 3, 4], [1.0, 2.0, 3.0, 40.0])
    assert [row[0] for row in table(path)] == ["step", "1", "2", "3", "4"]
    assert list(path.parent.iterdir()) == [path]  # nothing temporary is left


def test_truncate_to_beginning(path):
    logger = CsvMetrics(path)
    logger.log_metrics({"a": 1}, step=1)
    logger.truncate_after(0)
    assert table(path) == [["step", "a"]]
    assert curve(path, "a") == ([], [])


def test_numbers_are_exact(path):
    numbers = [1 / 3, 1e-30, 1e30, math.pi, -0.1]
    logger = CsvMetrics(path)
    for step, number in enumerate(numbers):
        logger.log_metrics({"a": number, "b": math.nan}, step=step)
    assert curve(path, "a") == (list(range(5)), numbers)
    assert all(math.isnan(value) for value in curve(path, "b")[1])


def test_lightning_logger_interface(path):
    logger = CsvMetrics(path)
    assert (logger.name, logger.version) == ("csv", "")
    assert logger.experiment is logger
    logger.log_hyperparams({"lr": 1})
    assert not path.exists()


def test_unknown_metric(path):
    CsvMetrics(path).log_metrics({"a": 1}, step=1)
    assert curve(path, "other") == ([], [])


def test_torn_last_line_is_dropped(tmp_path):
    path = tmp_path / "metrics.csv"
    for torn in ("1", "12,3.0e", "12,3.0"):
        path.write_text("step,train/loss\n10,4.0\n11,3.5\n" + torn)
        CsvMetrics(path).log_metrics({"train/loss": 3.0}, step=12)
        assert path.read_text() == "step,train/loss\n10,4.0\n11,3.5\n12,3.0\n"
