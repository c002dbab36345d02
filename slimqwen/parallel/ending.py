"""The end of a job: one process enters its failure in the launcher's store and says why, and all end with its exit code."""

import json
import os
import sys
import threading
import time
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist

from slimqwen.core import torchrun

# A rank whose own connection broke waits this long for the rank that failed to enter why; and the first rank, where the
# store of the entries ends with it, for the others to have read them.
END_SECONDS = 5.0
END, READ = "slimqwen/end", "slimqwen/end-read"  # keys of the job's store

_store: dist.Store | None = None  # of the last job
_entry: tuple[int, int] | None = None  # the rank that ended the job and its exit code, once this process has read them
_lock = threading.Lock()
_ends: int | None = None  # the thread of this process that ends it: the main one, or the watch (`parallel/watch.py`)


def open_store(timeout: timedelta) -> dist.Store:
    """Open the store of the launcher, by which the processes find each other."""
    store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    found: dist.Store = store
    return found


def keep_store(store: dist.Store) -> None:
    """Enter the end of this process in this store."""
    global _store
    _store = store


def end_code(code: int, *, is_told: bool) -> int | None:
    """Enter this process's failure as the job's; return the exit code of one that another process entered before, else None.

    So one process says why the job ends, and the others end with the same exit code.

    is_told: another process failed, and this one has nothing to say of its own.
    """
    if not begin_to_end():  # the watch does
        time.sleep(2 * END_SECONDS)
        return code
    try:
        store = _store or open_store(timedelta(seconds=2 * END_SECONDS))
        if is_told and _entry is None:
            store.wait([END], timedelta(seconds=END_SECONDS))
        rank, found = _entry or enter(store, code)
        if rank != torchrun.rank():
            return found
        await_readers(store)
    except (RuntimeError, ValueError):  # the store ended with the process that held it
        return code if is_told else None
    return None


def begin_to_end() -> bool:
    """Return whether the calling thread is the one that ends this process, the first that called this."""
    global _ends
    with _lock:
        if _ends is None:
            _ends = threading.get_ident()
        return _ends == threading.get_ident()


def enter(store: dist.Store, code: int) -> tuple[int, int]:
    """Enter a failure of this process as the end of the job; return the rank and the exit code that stand there now."""
    return _read(store, store.compare_set(END, "", json.dumps([torchrun.rank(), code])))


def entered(store: dist.Store) -> tuple[int, int] | None:
    """Return the rank that ended the job, and its exit code; None while no rank has."""
    return _read(store, store.get(END)) if _entry is None and store.check([END]) else _entry


def await_entry() -> None:
    """Wait until a rank has entered why the job ends, for a rank that learnt of it by a broken connection."""
    until = time.monotonic() + END_SECONDS
    try:
        while _store is not None and entered(_store) is None and time.monotonic() < until:
            time.sleep(0.05)
    except RuntimeError:  # the store ended with the process that held it
        return


def _read(store: dist.Store, text: bytes) -> tuple[int, int]:
    global _entry
    rank, code = json.loads(text)
    with _lock:
        if _entry is None and rank != torchrun.rank():
            store.add(READ, 1)
        _entry = int(rank), int(code)
        return _entry


def await_readers(store: dist.Store) -> None:
    """Keep the store, where this process holds it, until the others have read the entry, or are at work and will not."""
    if torchrun.rank() != 0 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return
    until = time.monotonic() + END_SECONDS
    while store.add(READ, 0) < torchrun.world_size() - 1 and time.monotonic() < until:
        time.sleep(0.05)


def leave(code: int) -> NoReturn:
    """End this process; at once where it has a process group, whose destructor may wait for a rank that is gone."""
    if not dist.is_initialized():
        sys.exit(code)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)
