"""Locks: an artefact is made by one process at a time."""

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
    """Return the hidden sibling of an artefact, `.NAME.KIND`."""
    return path.with_name(f".{path.name}.{kind}")


@contextlib.contextmanager
def alone(out: Path, *, wait: bool = False) -> Iterator[None]:
    """Lock the artefact `out` for this process; where another process holds it, wait, or raise UserError that names it.

    The lock is a file beside the artefact, removed on release; the system releases it when a process dies. It is
    reentrant. Among the processes of torchrun, rank 0 holds it for all. Parent folders created for `out` are removed
    again if they stay empty. Raises UserError where nothing can be written beside `out`.
    """
    out = out.resolve()
    with _parent_created(out), _lock_held(hidden(out, "lock"), out, wait):
        yield


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Lock a folder in which many artefacts are made, like `alone`; the lock file is inside it."""
    folder = folder.resolve()
    lock = folder / ".lock"
    with _parent_created(lock), _lock_held(lock, folder, wait=False):
        yield


def _holds_locks() -> bool:
    """Return whether this process holds locks, and removes what they leave: of those of torchrun the first, for all."""
    return os.environ.get("RANK", "0").strip() in ("", "0")


@contextlib.contextmanager
def _parent_created(path: Path) -> Iterator[None]:
    missing = [folder for folder in path.parents if not os.path.lexists(folder)] if _holds_locks() else []
    with _os_errors_explained(path.parent, "created"):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # not empty, or never made
            for folder in missing:
                folder.rmdir()


@contextlib.contextmanager
def _os_errors_explained(what: Path, done: str) -> Iterator[None]:
    """Turn an OSError into a UserError that names `what`; a full disk has its own message."""
    try:
        with full_disk_explained(what):
            yield
    except OSError as error:
        raise UserError(f"{what} cannot be {done} ({error.strerror}): choose another place.") from error


@contextlib.contextmanager
def _lock_held(lock: Path, what: Path, wait: bool) -> Iterator[None]:
    me = (lock, threading.get_ident())
    if me in _held or not _holds_locks():
        yield
        return
    with _os_errors_explained(what, "written"):
        descriptor = _acquire(lock, what, wait)
    _held.add(me)
    try:
        yield
    finally:
        _held.remove(me)
        with contextlib.suppress(OSError):
            if _is_ours(descriptor):
                lock.unlink()  # while held: a waiting process detects that the file is gone (`_is_at`) and retries
        os.close(descriptor)


def _acquire(lock: Path, what: Path, wait: bool) -> int:
    """Lock the lock file and return its descriptor."""
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
        except FileNotFoundError:  # another process removed the folder on exit
            if lock.parent.exists():
                raise
            lock.parent.mkdir(parents=True, exist_ok=True)


def _lock(descriptor: int, what: Path, wait: bool) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not wait:
            raise UserError(
                f"{what} is being made by another process{_holder(descriptor)}: wait until it ends, or stop it."
            ) from None
        say(f"{what.name}: another process is making it, waiting")
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        say(f"{what}: this file system has no locks ({error.strerror}), so make sure that no other process writes it")


def _holder(descriptor: int) -> str:
    """Return ` (process 1234 on HOST since 2026-01-31 12:00:00)`; empty until the holder has written it."""
    text = os.pread(descriptor, 500, 0).decode(errors="replace")
    return f" ({shown(text.removeprefix(SIGNATURE).strip())[1:-1]})" if text.startswith(SIGNATURE) else ""


def _is_at(lock: Path, descriptor: int) -> bool:
    """Return whether the open file is still the one at `lock`: its previous holder may have removed it."""
    try:
        return os.path.samestat(os.stat(lock, follow_symlinks=False), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _is_ours(descriptor: int) -> bool:
    """Return whether it is a lock of slimqwen, not a user's file of the same name."""
    return os.pread(descriptor, len(SIGNATURE), 0) in (b"", SIGNATURE.encode())
