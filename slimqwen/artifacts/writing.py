"""Atomic writing of artefacts: under a hidden name, flushed to the disk, then renamed."""

import contextlib
import dataclasses
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
from slimqwen.artifacts.record import Record, describe_files
from slimqwen.core.progress import say

P = ParamSpec("P")
R = TypeVar("R")


@contextlib.contextmanager
def make_folder(out: Path, *inputs: Path, kind: str | None = None) -> Iterator[None]:
    """Lock the folder artefact `out` for this process while it is made. kind: as in `check_replaceable`.

    Raises UserError, before anything is written, where `out` cannot be written, would destroy an input or files that are not
    ours, or is being made by another process.
    """
    check_replaceable(out, *inputs, kind=kind)
    with _locked(out, wait=False):
        yield


@contextlib.contextmanager
def make_file(out: Path, *inputs: Path, wait: bool = False, kind: str | None = None) -> Iterator[None]:
    """Lock the file artefact `out` for this process while it is made, like `make_folder`.

    wait: for another process that is making it. kind: as in `check_file_replaceable`.
    """
    check_file_replaceable(out, *inputs, kind=kind)
    with _locked(out, wait=wait):
        yield


@contextlib.contextmanager
def _locked(out: Path, wait: bool) -> Iterator[None]:
    out = out.resolve()
    if is_within_work(out):  # whose lock is held
        yield
        return
    with alone(out, wait=wait):
        if os.environ.get("RANK", "0") == "0":
            recover(out)
        yield


def makes_folder(*reads: str, kind: str | None = None) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a stage that writes the folder `out` to run within `make_folder`; `reads` names its input parameters."""
    return _decorator(functools.partial(make_folder, kind=kind), reads)


def makes_file(*reads: str, kind: str | None = None) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a stage that writes the file `out` to run within `make_file`; `reads` names its input parameters."""
    return _decorator(functools.partial(make_file, kind=kind), reads)


def _decorator(
    make: Callable[..., AbstractContextManager[None]], reads: tuple[str, ...]
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    def decorate(stage: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(stage)
        assert {"out", *reads} <= signature.parameters.keys()

        @functools.wraps(stage)
        def locked_stage(*args: P.args, **kwargs: P.kwargs) -> R:
            arguments = signature.bind(*args, **kwargs).arguments
            inputs = [path for name in reads for path in _paths(arguments.get(name))]
            with make(arguments["out"], *inputs):
                return stage(*args, **kwargs)

        return locked_stage

    return decorate


def _paths(value: object) -> list[Path]:
    """Collect every path in an argument, also inside a recipe's section, a list of sources or a dataclass of inputs."""
    match value:
        case Path():
            return [value]
        case Mapping():
            return [path for item in value.values() for path in _paths(item)]
        case list() | tuple():
            return [path for item in value for path in _paths(item)]
        case BaseModel():
            return [path for _, item in value for path in _paths(item)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [path for field in dataclasses.fields(value) for path in _paths(getattr(value, field.name))]
    return []


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path; on success the file written there replaces `path` in one rename.

    Only what slimqwen wrote is replaced (`check_file_replaceable`).
    """
    check_file_replaceable(path)
    with _atomic_file(path) as partial:
        yield partial


@contextlib.contextmanager
def _atomic_file(path: Path) -> Iterator[Path]:
    path = path.resolve()
    folder = hidden(path, "partial")  # a folder, whose record shows that it is ours even when its file is incomplete
    with _locked(path, wait=True), full_disk_explained(path):
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
    """Yield an empty temporary folder; on success it replaces `path` and everything in it.

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
    """Like `atomic_folder`, for long work: files that an interrupted process finished are kept when the work is resumed.

    `key` identifies the work (`fingerprint_value`): the remains of other work are removed. An unfinished file must have
    a hidden name; if there are no finished ones, the folder is removed. Ctrl-C, an error and SIGKILL have the same effect.
    """
    path = path.resolve()
    with make_folder(path), full_disk_explained(path), _kept_unfinished(hidden(path, "partial"), key) as partial:
        yield partial
        _put_in_place(partial, path, key)


@contextlib.contextmanager
def joined_folder(path: Path) -> Iterator[Path]:
    """Yield the folder of finished files that another process of the same job has open for `path` (`resumable_folder`)."""
    partial = hidden(path.resolve(), "partial")
    with full_disk_explained(path), working_in(partial):
        yield partial


@contextlib.contextmanager
def scratch_folder(path: Path, key: str) -> Iterator[Path]:
    """Like `resumable_folder`, for intermediate files: removed when the work is done, and never renamed to `path`."""
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
    """Record what was written, flush it, and rename it to `path`, which keeps its old content until then."""
    Record(key, describe_files(partial)).write(partial)
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
    """Flush a file, or a folder's directory entries, to the disk. Links are skipped: their targets are not ours."""
    if path.is_symlink():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    """Return the umask of this process from /proc: the system call can only read it by changing it."""
    with open("/proc/self/status") as stream:
        return next((int(line.split()[1], 8) for line in stream if line.startswith("Umask:")), 0o022)


def write_text(path: Path, text: str) -> None:
    """Write a text file. Raises UserError where `path` exists and is not ours."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def rewrite_text(path: Path, text: str) -> None:
    """Write a text file even where it is not marked as ours: the caller preserves the content that is not."""
    rewrite_bytes(path, text.encode())


def rewrite_bytes(path: Path, content: bytes) -> None:
    """Like `rewrite_text`, for content that need not be text."""
    with _atomic_file(path) as partial:
        partial.write_bytes(content)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file. Raises UserError where `path` exists and is not ours.

    A mapping that may be replaced later begins with its `format`.
    """
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
