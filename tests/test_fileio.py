"""Atomic writes: whole or not at all; locks: one holder, which no child is."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
from pathlib import Path

import pytest

from beit_pretrain import fileio
from beit_pretrain.fileio import LockedError, atomic_path, atomic_write, exclusive_lock, is_held, link


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


class TestWriting:
    @pytest.mark.parametrize("durable", [True, False])
    @pytest.mark.parametrize("data", ["ä\n", b"\xff", ""])
    def test_writes_text_and_bytes(self, data, durable, tmp_path):
        atomic_write(tmp_path / "a", "before", durable=durable, unique=True)
        atomic_write(tmp_path / "a", data, durable=durable)
        assert (tmp_path / "a").read_bytes() == (data.encode() if isinstance(data, str) else data)
        assert names(tmp_path) == ["a"]

    def test_a_failed_write_leaves_what_was_there(self, tmp_path):
        (tmp_path / "a").write_text("before")
        with pytest.raises(TypeError), atomic_path(tmp_path / "a") as temporary, temporary.open("w") as file:
            print("half", file=file, flush=True) or file.write(b"text")
        assert (tmp_path / "a").read_text() == "before"
        assert names(tmp_path) == ["a"]

    def test_leftovers_of_a_killed_process_are_replaced(self, tmp_path):
        fileio.partial_path(tmp_path / "a").mkdir()
        (fileio.partial_path(tmp_path / "a") / "b").touch()
        atomic_write(tmp_path / "a", "after")
        assert names(tmp_path) == ["a"]

    def test_a_folder_is_merged_with_the_marked_file_last(self, tmp_path, monkeypatch):
        (tmp_path / "a").mkdir()
        (tmp_path / "a/mine").touch()
        moved, replace = [], os.replace
        monkeypatch.setattr(os, "replace", lambda a, b: moved.append(Path(b).name) or replace(a, b))
        with atomic_path(tmp_path / "a", last="config") as temporary:
            temporary.mkdir()
            for name in ("config", "weights", "zoo"):
                (temporary / name).touch()
        assert names(tmp_path / "a") == ["config", "mine", "weights", "zoo"]
        assert (sorted(moved), moved[-1]) == (["config", "weights", "zoo"], "config")
        assert names(tmp_path) == ["a"]

    @pytest.mark.parametrize("links", [True, False])
    def test_links(self, links, tmp_path, monkeypatch):
        if not links:
            monkeypatch.setattr(os, "link", lambda *paths: (_ for _ in ()).throw(OSError(errno.EPERM, "no links")))
        atomic_write(tmp_path / "a", "first")
        atomic_write(tmp_path / "b", "other")
        for _ in range(2):  # the second time both are one file
            link(tmp_path / "a", tmp_path / "b")
        assert (tmp_path / "b").read_bytes() == b"first"
        assert os.path.samefile(tmp_path / "a", tmp_path / "b") == links
        assert names(tmp_path) == ["a", "b"]


class TestLocks:
    def test_refuses_a_second_holder_with_the_words_of_the_first(self, tmp_path):
        with exclusive_lock(tmp_path / "lock") as file:
            file.write(b"process 7\n")
            assert is_held(tmp_path / "lock")
            with (
                pytest.raises(LockedError, match="held by process 7!"),
                exclusive_lock(tmp_path / "lock", "held by {holder}!"),
            ):
                pass
        assert not is_held(tmp_path / "lock")
        with exclusive_lock(tmp_path / "lock", remove=True):
            pass
        assert not names(tmp_path)

    def test_threads_take_turns_while_the_file_comes_and_goes(self, tmp_path, capsys):
        inside, most, turns = 0, 0, []

        def work(number: int) -> None:
            nonlocal inside, most
            for _ in range(20):
                with exclusive_lock(tmp_path / "lock", "waiting", wait=True, remove=True):
                    inside += 1
                    most = max(most, inside)
                    time.sleep(0.0005)
                    turns.append(number)
                    inside -= 1

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (most, len(turns)) == (1, 80)
        assert set(capsys.readouterr().out.split()) <= {"waiting"}
        assert not names(tmp_path)

    def test_a_file_that_was_renamed_is_not_removed(self, tmp_path):
        with exclusive_lock(tmp_path / "lock", remove=True):
            os.rename(tmp_path / "lock", tmp_path / "kept")
        assert names(tmp_path) == ["kept"]

    def test_a_child_neither_holds_nor_frees_it(self, tmp_path):
        with exclusive_lock(tmp_path / "lock"):
            child = os.fork()
            if child == 0:
                held = is_held(tmp_path / "lock")
                try:
                    with exclusive_lock(tmp_path / "lock"):
                        os._exit(3)
                except LockedError:
                    os._exit(int(held))
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            with pytest.raises(LockedError), exclusive_lock(tmp_path / "lock"):
                pass
            child = os.fork()
            if child == 0:
                time.sleep(60)
                os._exit(0)
        with exclusive_lock(tmp_path / "lock"):  # though the child lives on
            pass
        os.kill(child, 9)
        os.waitpid(child, 0)

    def test_a_file_system_without_locks(self, tmp_path, monkeypatch):
        def missing(*args):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "flock", missing)
        with exclusive_lock(tmp_path / "lock"):
            pass
        with pytest.raises(OSError, match="No locks"), exclusive_lock(tmp_path / "lock", strict=True):
            pass
