"""One artefact is made by one process."""

import contextlib
import fcntl
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from slimqwen.artifacts.disk import full_disk_explained
from slimqwen.core.errors import UserError, shown
from slimqwen.core.progress import say

SIGNATURE = "slimqwen: held by "
_held: set[tuple[Path, int]] = set()  # lock files and the threads that hold them


def hidden(path: Path, kind: str) -> Path:
    """The hidden sibling of an artefact, `.NAME.KIND`."""
    return path.with_name(f".{path.name}.{kind}")


@contextlib.contextmanager
def alone(out: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the artefact `out` for this process; where another one holds it, wait, or raise UserError that says which.

    The lock is a file beside the artefact, which goes again; a process that dies lets go of it. It may be taken again
    by who has it. Of the processes that torchrun started the first takes it for all. Folders that have to be made for
    `out` go too where nothing comes to lie in them. Raises UserError where nothing can be written beside `out`.
    """
    out = out.resolve()
    with _parent_of(out), _holding(hidden(out, "lock"), out, wait):
        yield


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold a folder that many artefacts are made in, as `alone` does; the lock lies in it."""
    folder = folder.resolve()
    lock = folder / ".lock"
    with _parent_of(lock), _holding(lock, folder, wait=False):
        yield


@contextlib.contextmanager
def _parent_of(path: Path) -> Iterator[None]:
    missing = [folder for folder in path.parents if not os.path.lexists(folder)]
    with _told(path.parent, "made"):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # not empty, or never made
            for folder in missing:
                folder.rmdir()


@contextlib.contextmanager
def _told(what: Path, done: str) -> Iterator[None]:
    """What the system says against it, as a sentence; a full disk as what it is."""
    try:
        with full_disk_explained(what):
            yield
    except OSError as error:
        raise UserError(f"{what} cannot be {done} ({error.strerror}): choose another place.") from error


@contextlib.contextmanager
def _holding(lock: Path, what: Path, wait: bool) -> Iterator[None]:
    me = (lock, threading.get_ident())
    if me in _held or os.environ.get("RANK", "0") != "0":
        yield
        return
    with _told(what, "written"):
        descriptor = _take(lock, what, wait)
    _held.add(me)
    try:
        yield
    finally:
        _held.remove(me)
        with contextlib.suppress(OSError):
            if _is_ours(descriptor):
                lock.unlink()  # while it is held: who waits for it finds that it is another file, and begins anew
        os.close(descriptor)


def _take(lock: Path, what: Path, wait: bool) -> int:
    """The descriptor of the lock file, held."""
    while True:
        descriptor = _open(lock)
        try:
            _lock(descriptor, what, wait)
            if _is_at(lock, descriptor):
                if _is_ours(descriptor):
                    since = time.strftime("%Y-%m-%d %H:%M:%S")
                    text = f"{SIGNATURE}process {os.getpid()} on {socket.gethostname()} since {since}\n"
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, text.encode(), 0)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _open(lock: Path) -> int:
    while True:
        try:
            return os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:  # a process that ended has removed the folder meanwhile
            if lock.parent.exists():
                raise
            lock.parent.mkdir(parents=True, exist_ok=True)


def _lock(descriptor: int, what: Path, wait: bool) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not wait:
            raise UserError(
                f"{what} is being made by another process{_holder(descriptor)}: wait for its end, or stop it."
            ) from None
        say(f"{what.name}: another process is making it, waiting")
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        say(f"{what}: this file system has no locks ({error.strerror}), see to it that no other process makes it too")


def _holder(descriptor: int) -> str:
    """` (process 1234 on HOST since 2026-01-31 12:00:00)`; nothing in the moment in which the lock is taken."""
    text = os.pread(descriptor, 500, 0).decode(errors="replace")
    return f" ({shown(text.removeprefix(SIGNATURE).strip())[1:-1]})" if text.startswith(SIGNATURE) else ""


def _is_at(lock: Path, descriptor: int) -> bool:
    """Whether the file is still there, and not removed by the process that held it before."""
    try:
        return os.path.samestat(os.stat(lock, follow_symlinks=False), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _is_ours(descriptor: int) -> bool:
    """Whether it is a lock of slimqwen and not a file of the user's that is called so."""
    return os.pread(descriptor, len(SIGNATURE), 0) in (b"", SIGNATURE.encode())
