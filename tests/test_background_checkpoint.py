"""Checkpoints written by a background thread: snapshots are consistent and errors are raised."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from beit_pretrain.engine import background_checkpoint as background
from beit_pretrain.engine.background_checkpoint import BackgroundCheckpointIO, Snapshot
from beit_pretrain.errors import UserError
from beit_pretrain.models.checkpoints.files import read


class Gate:
    """Blocks `torch.save` until it is opened."""

    def __init__(self, monkeypatch):
        self.reached, self.opened, save = threading.Event(), threading.Event(), torch.save

        def held(content, file):
            self.reached.set()
            assert self.opened.wait(20)
            save(content, file)

        monkeypatch.setattr(torch, "save", held)


@pytest.fixture
def gate(monkeypatch):
    gate = Gate(monkeypatch)
    yield gate
    gate.opened.set()  # no thread is left waiting


def run_state() -> dict:
    """The state of a network and its optimizer after a step, with every container type of a checkpoint."""
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    more = {"loops": {"done": [1, 2]}, "pair": (torch.ones(2), 3), "sums": {"loss": torch.ones(2, dtype=torch.float64)}}
    return {"state_dict": model.state_dict(), "optimizer_states": [optimizer.state_dict()], **more}


def test_snapshot_is_isolated_from_later_changes(gate, tmp_path):
    content, io = run_state(), BackgroundCheckpointIO()
    expected = {"weight": content["state_dict"]["weight"].clone()}
    moments = content["optimizer_states"][0]["state"][0]["exp_avg"].clone()
    io.save_checkpoint(content, tmp_path / "last.ckpt")
    assert gate.reached.wait(20)
    for tensor in (*content["state_dict"].values(), *content["optimizer_states"][0]["state"][0].values()):
        tensor.fill_(7)
    content["pair"][0].fill_(7)
    content["sums"]["loss"].fill_(7)
    content["loops"]["done"].append(3)
    content["optimizer_states"][0]["param_groups"][0]["lr"] = 7
    del content["state_dict"]["bias"]
    assert not (tmp_path / "last.ckpt").exists()
    gate.opened.set()
    io.wait()
    found = read(tmp_path / "last.ckpt")
    assert torch.equal(found["state_dict"]["weight"], expected["weight"])
    assert set(found["state_dict"]) == {"weight", "bias"}
    assert torch.equal(found["optimizer_states"][0]["state"][0]["exp_avg"], moments)
    assert found["optimizer_states"][0]["param_groups"][0]["lr"] == 1e-3
    assert found["loops"] == {"done": [1, 2]}
    assert found["pair"][0].tolist() == [1, 1]
    assert found["sums"]["loss"].tolist() == [1, 1]


class TestSnapshot:
    def test_reuses_buffers(self):
        snapshot, state = Snapshot(), torch.nn.Linear(3, 2).state_dict()
        first, _ = snapshot.take({"state_dict": state})
        place = first["state_dict"]["weight"].data_ptr()
        state["weight"].fill_(3)
        second, event = snapshot.take({"state_dict": state})
        assert event is None  # nothing was on a GPU
        assert second["state_dict"]["weight"].data_ptr() == place != state["weight"].data_ptr()
        assert second["state_dict"]["weight"].eq(3).all()
        third, _ = snapshot.take({"state_dict": {"weight": torch.zeros(5)}})
        assert third["state_dict"]["weight"].tolist() == [0] * 5

    def test_keeps_state_dict_metadata(self):
        state = torch.nn.BatchNorm1d(2).state_dict()
        copied = Snapshot().take({"state_dict": state})[0]["state_dict"]
        assert type(copied) is OrderedDict
        assert copied._metadata == state._metadata

    def test_keeps_the_memory_format(self):
        image = torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last)
        copied = Snapshot().take({"image": image})[0]["image"]
        assert copied.stride() == image.stride()
        assert torch.equal(copied, image)


class TestOrdering:
    def test_save_waits_for_previous_save(self, gate, tmp_path):
        io, written = BackgroundCheckpointIO(), []
        io.on_written = lambda path, content: written.append(content["step"])
        io.save_checkpoint({"step": 1}, tmp_path / "last.ckpt")
        threading.Timer(0.2, gate.opened.set).start()
        io.save_checkpoint({"step": 2}, tmp_path / "last.ckpt")
        assert written[0] == 1
        io.wait()
        assert written == [1, 2]
        assert read(tmp_path / "previous.ckpt") == {"step": 1}

    def test_remove_and_load_wait_for_pending_write(self, gate, tmp_path):
        io, best = BackgroundCheckpointIO(), tmp_path / "best.ckpt"
        for call in (io.load_checkpoint, io.remove_checkpoint):
            gate.opened.clear()
            io.save_checkpoint({"step": 1}, best)
            threading.Timer(0.2, gate.opened.set).start()
            call(best)
        assert not best.exists()

    def test_writes_synchronously_after_teardown(self, tmp_path):
        io = BackgroundCheckpointIO()
        io.teardown()
        io.save_checkpoint({"step": 1}, tmp_path / "last.ckpt")
        assert read(tmp_path / "last.ckpt") == {"step": 1}


class TestErrors:
    @pytest.fixture
    def failed(self, tmp_path) -> BackgroundCheckpointIO:
        """An instance whose last write failed, as on a full disk; the error has not been raised yet."""
        io = BackgroundCheckpointIO()
        (tmp_path / "file").write_text("")
        io.save_checkpoint({"step": 1}, tmp_path / "file" / "last.ckpt")
        io._thread.join()
        return io

    @pytest.mark.parametrize("call", ["check", "wait", "save_checkpoint"])
    def test_write_error_is_raised_once_in_main_thread(self, call, failed, tmp_path):
        words = ({"step": 2}, tmp_path / "last.ckpt") if call == "save_checkpoint" else ()
        with pytest.raises(UserError, match="cannot be written: File exists"):
            getattr(failed, call)(*words)
        failed.wait()
        failed.save_checkpoint({"step": 3}, tmp_path / "last.ckpt")
        failed.wait()
        assert read(tmp_path / "last.ckpt") == {"step": 3}

    def test_on_written_error_is_raised(self, tmp_path):
        def full(path, content):
            raise OSError(28, "No space left on device")

        io = BackgroundCheckpointIO()
        io.on_written = full
        io.save_checkpoint({"step": 1}, tmp_path / "last.ckpt")
        with pytest.raises(OSError, match="No space left"):
            io.wait()

    def test_check_does_not_wait_for_pending_write(self, gate, tmp_path):
        io = BackgroundCheckpointIO()
        io.save_checkpoint({"step": 1}, tmp_path / "last.ckpt")
        io.check()
        assert not gate.opened.is_set()


def endless(content, file) -> None:
    """Replaces `torch.save`: takes ten minutes."""
    for _ in range(6000):
        file.write(b"x" * 1000)
        time.sleep(0.1)


class TestProcessExit:
    def test_cancel_aborts_pending_write(self, tmp_path, monkeypatch):
        io = BackgroundCheckpointIO()
        io.save_checkpoint({"step": 1}, tmp_path / "last.ckpt")
        io.wait()
        monkeypatch.setattr(torch, "save", endless)
        io.save_checkpoint({"step": 2}, tmp_path / "last.ckpt")
        began = time.monotonic()
        io.cancel()
        assert not io._thread.is_alive()
        assert time.monotonic() - began < 5
        assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
        assert read(tmp_path / "last.ckpt") == {"step": 1}

    def test_forked_worker_does_not_keep_partial_file_open(self, gate, tmp_path):
        io = BackgroundCheckpointIO()
        io.save_checkpoint({"step": 1}, tmp_path / "last.ckpt")
        assert gate.reached.wait(20)
        partial = tmp_path / ".last.ckpt.partial"
        assert partial in open_files()
        with multiprocessing.get_context("fork").Pool(1) as pool:
            assert partial not in pool.apply(open_files)
        gate.opened.set()
        io.wait()
        assert read(tmp_path / "last.ckpt") == {"step": 1}
        assert not background._open


def open_files() -> list[Path]:
    """Files that this process has open."""
    return [Path(os.readlink(link)) for link in Path("/proc/self/fd").iterdir() if link.is_symlink() and link.exists()]
