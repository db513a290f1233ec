"""Files that a crash may interrupt or that several processes use: atomic writes, hard links, locks."""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import IO

from beit_pretrain.errors import UserError

PARTIAL = ".partial"  # end of the name of a file that is being written

_locks: dict[FileIO, int] = {}  # files of locks -> the thread of this process that holds it; 0 = one waits for it


class LockedError(UserError):
    """Another process (or thread) holds the lock."""


def expand_home(path: str | Path) -> Path:
    """A path with the home folder in place of a leading `~` or `~user`.

    Raises UserError if there is no such user, or if it is no path.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise UserError(f"a path is needed, got {path!r:.60}")
    return Path(expanded(os.fspath(path)))


def expanded(text: str) -> str:
    """The same for a text, which may also be a remote location: those never begin with `~`."""
    if not text.startswith("~"):
        return text
    found = os.path.expanduser(text)
    if found.startswith("~"):
        user = text.partition("/")[0]
        raise UserError(f"{text}: there is no user {user[1:]!r}; a file or folder called {user} is written ./{text}")
    return found


def partial_path(path: Path, unique: bool = False) -> Path:
    """The temporary name beside `path`. `unique`: one for each process, where several may write the same file."""
    return path.with_name(f".{path.name}{f'.{os.getpid()}' if unique else ''}{PARTIAL}")


@contextmanager
def atomic_path(
    path: Path, *, durable: bool = False, unique: bool = False, suffix: str = "", last: str = ""
) -> Iterator[Path]:
    """Lend a temporary path beside `path`: what the block writes there gets the name `path` if the block succeeds.

    The files of a folder written there go into the folder `path` one by one, the one named `last` in the end; other
    files of that folder stay. If the block fails, nothing is left of what it wrote.

    Args:
        durable: flush the file and its name to the disk: `path` never holds half a file, even after a power cut.
            A folder's files are not flushed.
        unique: the temporary name is this process's own.
        suffix: of the temporary name, for libraries that go by it.
    """
    temporary = partial_path(path, unique)
    temporary = temporary.with_name(temporary.name + suffix)
    discard(temporary)  # left by a process that was killed
    try:
        yield temporary
        publish(temporary, path, durable, last)
    finally:
        with suppress(OSError):  # an error of the block is what counts
            discard(temporary)


def atomic_write(path: Path, data: str | bytes, *, durable: bool = False, unique: bool = False) -> None:
    """Write a file as a whole, text in UTF-8; arguments as of `atomic_path`."""
    with atomic_path(path, durable=durable, unique=unique) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def publish(temporary: Path, path: Path, durable: bool = True, last: str = "") -> None:
    """Give a file or folder its final name, as at the end of `atomic_path`."""
    if temporary.is_dir():
        path.mkdir(exist_ok=True)
        for file in sorted(temporary.iterdir(), key=lambda file: file.name == last):
            os.replace(file, path / file.name)
        temporary.rmdir()
        return
    if durable:
        with temporary.open("rb+") as written:
            flush(written)
    os.replace(temporary, path)
    if durable:
        flush_folder(path.parent)


def link(path: Path, other: Path) -> None:
    """Give a file a second name, also one that is taken; copy it where the file system has no hard links."""
    with atomic_path(other) as temporary:
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copy2(path, temporary)


def flush(file: IO) -> None:
    """Make sure that what was written to a file is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Make sure that the names in a folder are on the disk, where its file system supports that."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def discard(path: Path) -> None:
    """Remove a file or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def exclusive_lock(
    path: Path, message: str = "", *, wait: bool = False, remove: bool = False, strict: bool = False
) -> Iterator[FileIO]:
    """Hold the file `path`, created if need be, as a lock between processes and between threads.

    The lock ends with its process, however that ends; child processes do not hold it.

    Args:
        message: of the LockedError that is raised if the lock is held; what its holder wrote into the file takes the
            place of {holder}.
        wait: wait for the holder instead, and print the message, if there is one.
        remove: remove the file at the end, unless it was renamed meanwhile.
        strict: raise OSError on a file system without locks, which otherwise gives none.
    """
    while True:
        # Unbuffered: a child of a fork closes it, and must not write what its parent's buffer holds.
        with open(path, "r+b", buffering=0, opener=_create) as file:
            _locks[file] = 0
            try:
                _acquire(file, message, wait, strict)
                if not _is_at(file, path):  # its holder has removed or renamed it
                    continue
                _locks[file] = threading.get_ident()
                yield file
                return
            finally:
                if _locks.pop(file, 0):  # not in a child
                    if remove and _is_at(file, path):  # while it is held: whoever waits finds the file gone
                        path.unlink(missing_ok=True)
                    with suppress(OSError):
                        fcntl.flock(file, fcntl.LOCK_UN)  # a child that has just begun may not have closed it yet


def _acquire(file: FileIO, message: str, wait: bool, strict: bool) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        if not wait:
            holder = file.read(200).decode(errors="replace").strip()
            raise LockedError(message.replace("{holder}", holder)) from None
        if message:
            print(message, flush=True)
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
        if strict:
            raise


def is_held(path: Path) -> bool:
    """Whether this thread holds the lock on `path`."""
    return any(holder == threading.get_ident() and _is_at(file, path) for file, holder in list(_locks.items()))


def _create(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT, 0o644)


def _is_at(file: FileIO, path: Path) -> bool:
    """Whether a path names an open file."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _release_in_child() -> None:
    """Close the parent's locks after a fork: a loader worker would hold them for seconds after its parent's death."""
    for file in _locks:
        file.close()
    _locks.clear()


os.register_at_fork(after_in_child=_release_in_child)


def size(count: int) -> str:
    """Bytes as text, in MB or GB."""
    return f"{count / 1e6:.3g} MB" if count < 1e8 else f"{count / 1e9:.2f} GB"
