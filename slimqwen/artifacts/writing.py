"""How artefacts are written: under a hidden name, flushed to the disk, then renamed."""

import contextlib
import functools
import inspect
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from pydantic import BaseModel

from slimqwen.artifacts.disk import full_disk_explained
from slimqwen.artifacts.lock import alone, hidden
from slimqwen.artifacts.ownership import (
    check_file_replaceable,
    check_replaceable,
    claim_folder,
    discard,
    is_within_work,
    recover,
    working_in,
)
from slimqwen.artifacts.record import Record, listed
from slimqwen.core.progress import say

P = ParamSpec("P")
R = TypeVar("R")


@contextlib.contextmanager
def make_folder(out: Path, *inputs: Path, kind: str | None = None) -> Iterator[None]:
    """Hold the folder artefact `out` for this process, from before the work until it is there. kind: as in `check_replaceable`.

    Raises UserError, before anything is written, where `out` cannot be written, would destroy an input or what is not ours,
    and where another process is making it.
    """
    check_replaceable(out, *inputs, kind=kind)
    with _made_here(out, wait=False):
        yield


@contextlib.contextmanager
def make_file(out: Path, *inputs: Path, wait: bool = False, kind: str | None = None) -> Iterator[None]:
    """Hold the file artefact `out` for this process, as `make_folder` does.

    wait: where another process makes it. kind: as in `check_file_replaceable`.
    """
    check_file_replaceable(out, *inputs, kind=kind)
    with _made_here(out, wait=wait):
        yield


@contextlib.contextmanager
def _made_here(out: Path, wait: bool) -> Iterator[None]:
    out = out.resolve()
    if is_within_work(out):  # which is held
        yield
        return
    with alone(out, wait=wait):
        if os.environ.get("RANK", "0") == "0":
            recover(out)
        yield


def makes_folder(*reads: str, kind: str | None = None) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a stage that writes the folder `out`: it runs within `make_folder`; `reads` are its parameters that are inputs."""
    return _stage(functools.partial(make_folder, kind=kind), reads)


def makes_file(*reads: str, kind: str | None = None) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a stage that writes the file `out`: it runs within `make_file`; `reads` are its parameters that are inputs."""
    return _stage(functools.partial(make_file, kind=kind), reads)


def _stage(
    make: Callable[..., AbstractContextManager[None]], reads: tuple[str, ...]
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    def decorate(stage: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(stage)
        assert {"out", *reads} <= signature.parameters.keys()

        @functools.wraps(stage)
        def made_alone(*args: P.args, **kwargs: P.kwargs) -> R:
            given = signature.bind(*args, **kwargs).arguments
            inputs = [path for name in reads for path in _paths(given.get(name))]
            with make(given["out"], *inputs):
                return stage(*args, **kwargs)

        return made_alone

    return decorate


def _paths(value: object) -> list[Path]:
    """Every path that an argument names, itself or in what it holds: a recipe's section, a list of sources."""
    match value:
        case Path():
            return [value]
        case Mapping():
            return [path for item in value.values() for path in _paths(item)]
        case list() | tuple():
            return [path for item in value for path in _paths(item)]
        case BaseModel():
            return [path for _, item in value for path in _paths(item)]
    return []


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path; on success what was written there takes `path`'s place in one rename.

    Only what slimqwen wrote is replaced (`check_file_replaceable`).
    """
    check_file_replaceable(path)
    with _atomic_file(path) as partial:
        yield partial


@contextlib.contextmanager
def _atomic_file(path: Path) -> Iterator[Path]:
    path = path.resolve()
    folder = hidden(path, "partial")  # a folder, which is known as ours whatever becomes of the file in it
    with _made_here(path, wait=True), full_disk_explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        claim_folder(folder, None)
        try:
            partial = folder / path.name
            yield partial
            os.chmod(partial, 0o666 & ~_umask())  # safetensors writes 0600
            _flush(partial)
            os.replace(partial, path)
            _flush(path.parent)
        finally:
            discard(folder)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder; on success it replaces `path`, contents and all.

    Only an empty folder or what slimqwen wrote is replaced (`check_replaceable`).
    """
    path = path.resolve()
    partial = hidden(path, "partial")
    with make_folder(path), full_disk_explained(path):
        claim_folder(partial, None)
        try:
            with working_in(partial):
                yield partial
            _put_in_place(partial, path)
        finally:
            if partial.exists():
                discard(partial)


@contextlib.contextmanager
def resumable_folder(path: Path, key: str) -> Iterator[Path]:
    """`atomic_folder` for long work: what an interrupted process finished is still there when the same work begins again.

    `key` says what is made (`fingerprint_value`): the remains of other work are removed. What is not finished must have
    a hidden name; where nothing else is there, nothing stays behind. Ctrl-C, an error and SIGKILL are all alike.
    """
    path = path.resolve()
    with make_folder(path), full_disk_explained(path), _kept_unfinished(hidden(path, "partial"), key) as partial:
        yield partial
        _put_in_place(partial, path, key)


@contextlib.contextmanager
def scratch_folder(path: Path, key: str) -> Iterator[Path]:
    """`resumable_folder` for what is of no use when the work is done: it goes then, and never has the name `path`."""
    path = path.resolve()
    with make_folder(path), full_disk_explained(path), _kept_unfinished(hidden(path, "partial"), key) as partial:
        yield partial
        discard(partial)


@contextlib.contextmanager
def _kept_unfinished(partial: Path, key: str) -> Iterator[Path]:
    claim_folder(partial, key)
    try:
        with working_in(partial):
            yield partial
    finally:
        if partial.exists() and all(name.startswith(".") for name in os.listdir(partial)):
            discard(partial)
        elif partial.exists():
            say(f"what is finished stays in {partial}: the same command continues from there")


def _put_in_place(partial: Path, path: Path, key: str | None = None) -> None:
    """Note what was written, flush it, and let it take the place of `path`, which keeps its name until then."""
    Record(key, listed(partial)).write(partial)
    for parent, _, files in os.walk(partial):
        for name in files:
            _flush(Path(parent) / name)
        _flush(Path(parent))
    replaced = hidden(path, "replaced")
    if path.exists():
        os.rename(path, replaced)
    os.rename(partial, path)
    _flush(path.parent)
    if replaced.exists():
        discard(replaced)


def _flush(path: Path) -> None:
    """Bring a file or a folder's names to the disk. What a link leads to is not ours."""
    if path.is_symlink():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    """Of this process, as Linux tells it: to ask the system call is to change it."""
    with open("/proc/self/status") as stream:
        return next((int(line.split()[1], 8) for line in stream if line.startswith("Umask:")), 0o022)


def write_text(path: Path, text: str) -> None:
    """Raises UserError where `path` is there and not ours."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def rewrite_text(path: Path, text: str) -> None:
    """`write_text` for who has read the file and keeps what is not ours in it."""
    rewrite_bytes(path, text.encode())


def rewrite_bytes(path: Path, content: bytes) -> None:
    """`rewrite_text` where the content need not be text."""
    with _atomic_file(path) as partial:
        partial.write_bytes(content)


def write_json(path: Path, value: Any) -> None:
    """Raises UserError where `path` is there and not ours: a mapping that may be replaced begins with its `format`."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
