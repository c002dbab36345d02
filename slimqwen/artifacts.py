"""How artefacts come into being: under a temporary name, then renamed; and how they are recognised again.

An interrupted stage therefore leaves nothing that looks finished, and a finished artefact has a
`fingerprint` by which a later stage (or a later run) knows that its input is unchanged.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slimqwen.errors import StageFailed, UserError
from slimqwen.progress import say

FULLY_HASHED_BYTES = 64 << 20  # larger files are sampled: hashing 160 GB would take longer than pruning it
READ_BYTES = 1 << 20
SAMPLE_BYTES, SAMPLE_EVERY_BYTES = 64 << 10, 4 << 20  # so that no matrix of more than 4 MB is left out
MARKER = ".slimqwen"  # in every folder that atomic_folder wrote
KEY_FILE = ".key"  # in the unfinished folder of `resumable_folder`: what is being made there
FULL_DISK_WORDS = ("No space left on device", "File too large", "Disk quota exceeded")  # inside safetensors' own error


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path`; on success it takes `path`'s place in one rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with full_disk_explained(path):
            yield partial
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary sibling of `path`; on success it replaces `path`, contents and all.

    Only an empty folder or one that was written here before is replaced (`check_replaceable`).
    """
    path = path.resolve()
    check_replaceable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        with full_disk_explained(path):
            yield partial
            _put_in_place(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def resumable_folder(path: Path, key: str) -> Iterator[Path]:
    """`atomic_folder` for long work: what an interrupted process finished is still there when the same work begins again.

    `key` says what is made (`fingerprint_value`): the remains of other work are removed. What is not finished must have
    a hidden name; where nothing else is there, nothing stays behind. Ctrl-C, an error and SIGKILL are all alike.
    """
    path = path.resolve()
    check_replaceable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    if partial.exists() and not _is_made_by(partial, key):
        say(f"{partial} was left behind by other work (another plan, source or option) and is removed")
        shutil.rmtree(partial)
    partial.mkdir(exist_ok=True)
    (partial / KEY_FILE).write_text(key, encoding="utf-8")
    try:
        with full_disk_explained(path):
            yield partial
            (partial / KEY_FILE).unlink()
            _put_in_place(partial, path)
    finally:
        if partial.exists() and all(file.name.startswith(".") for file in partial.iterdir()):
            shutil.rmtree(partial)
        elif partial.exists():
            say(f"what is finished stays in {partial}: the same command continues from there")


def _is_made_by(partial: Path, key: str) -> bool:
    key_file = partial / KEY_FILE
    return key_file.is_file() and key_file.read_text(encoding="utf-8") == key


def _put_in_place(partial: Path, path: Path) -> None:
    (partial / MARKER).touch()
    if path.exists():
        shutil.rmtree(path)
    os.replace(partial, path)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`; where another process holds it, wait. A process that dies lets go of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"{path.name}: another process is making it, waiting")
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def check_replaceable(out: Path, *inputs: Path) -> None:
    """Raise UserError where writing the folder `out` would destroy something: an input, or what we did not write.

    Folders written by `atomic_folder` carry a hidden marker by which they are known.
    """
    out = out.resolve()
    for path in inputs:
        if out == path.resolve() or out in path.resolve().parents:
            raise UserError(f"writing {out} would destroy {path}, which is read here: choose another folder.")
    if out.is_dir() and any(out.iterdir()) and not (out / MARKER).exists():
        raise UserError(f"{out} exists and was not written by slimqwen: choose another folder, or remove it first.")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file, and a folder is to be written there: choose another name.")


@contextlib.contextmanager
def full_disk_explained(path: Path) -> Iterator[None]:
    """Turn "no space left on device", from Python or from a library's own words, into one sentence."""
    try:
        yield
    except Exception as error:
        out_of_space = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if not out_of_space and not any(words in str(error) for words in FULL_DISK_WORDS):
            raise
        message = (
            f"{path} could not be written: the disk is full, or a quota or file-size limit is reached. "
            "Free some space and run the same command again."
        )
        raise StageFailed(message) from error


def write_text(path: Path, text: str) -> None:
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def fingerprint(path: Path) -> str:
    """Hash of a file, or of every file in a folder with its relative name.

    Files up to 64 MiB are read whole. Of larger ones the size and 64 KiB of every 4 MiB are read, the end included: a
    sixty-fourth, which notices another choice of experts and is cheap enough for 160 GB.
    Hidden files (a stage's own bookkeeping) do not count.
    """
    assert path.exists(), f"{path} has no content to recognise"
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    for file in files:
        name = file.name if path.is_file() else file.relative_to(path).as_posix()
        if any(part.startswith(".") for part in Path(name).parts):
            continue
        size = file.stat().st_size
        digest.update(f"{name}\0{size}\0".encode())
        with file.open("rb") as stream:
            if size <= FULLY_HASHED_BYTES:
                while block := stream.read(READ_BYTES):
                    digest.update(block)
            else:
                for start in (*range(0, size - SAMPLE_BYTES, SAMPLE_EVERY_BYTES), size - SAMPLE_BYTES):
                    stream.seek(start)
                    digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()


def fingerprint_value(value: Any) -> str:
    """Hash of a JSON-serialisable value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
