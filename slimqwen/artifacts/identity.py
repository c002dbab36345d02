"""How artefacts are recognised again: by a hash of what is in them."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slimqwen.artifacts.record import Record

FULLY_HASHED_BYTES = 64 << 20  # larger files are sampled: hashing 160 GB would take longer than pruning it
READ_BYTES = 1 << 20
SAMPLE_BYTES, SAMPLE_EVERY_BYTES = 64 << 10, 4 << 20  # so that no matrix of more than 4 MB is left out


def fingerprint(path: Path, *, most_bytes: int | None = None) -> str:
    """Hash of a file, or of every file in a folder with its relative name; times do not count.

    Of a folder that slimqwen wrote, those are the files of its record: what somebody put beside them since is no part of it.
    Of another one they are all but the hidden ones.

    Files up to 64 MiB are read whole. Of larger ones the size and 64 KiB of every 4 MiB are read, the end included: a
    sixty-fourth, which notices another choice of experts and is cheap enough for 160 GB. A change that keeps the size
    and lies between the samples is not noticed.

    most_bytes: of one file, where less is to be read: a file up to this size is read whole, of a larger one samples of
        64 KiB at equal distances, both ends included.
    """
    assert path.exists(), f"{path} has no content to recognise"
    digest = hashlib.sha256()
    for name, file in [(path.name, path)] if path.is_file() else _files_of(path):
        if not file.is_file():
            digest.update(f"{name}\0missing\0".encode("utf-8", "surrogateescape"))
            continue
        size = file.stat().st_size
        digest.update(f"{name}\0{size}\0".encode("utf-8", "surrogateescape"))
        with file.open("rb") as stream:
            for start, length in _samples(size, most_bytes):
                stream.seek(start)
                while length and (block := stream.read(min(length, READ_BYTES))):
                    digest.update(block)
                    length -= len(block)
    return digest.hexdigest()


def _files_of(folder: Path) -> list[tuple[str, Path]]:
    """The files of a folder that count, by relative name."""
    record = Record.read(folder)
    if record is not None and record.files is not None:
        files = [folder / name for name in record.files]
    else:
        files = [file for file in folder.rglob("*") if file.is_file()]
    found = [(file.relative_to(folder), file) for file in sorted(files)]
    return [(name.as_posix(), file) for name, file in found if not any(part.startswith(".") for part in name.parts)]


def _samples(size: int, most_bytes: int | None) -> Iterator[tuple[int, int]]:
    """What is read of a file: (start, length)."""
    if size <= (FULLY_HASHED_BYTES if most_bytes is None else most_bytes):
        yield 0, size
        return
    every = SAMPLE_EVERY_BYTES if most_bytes is None else size * SAMPLE_BYTES // most_bytes
    for start in (*range(0, size - SAMPLE_BYTES, every), size - SAMPLE_BYTES):
        yield start, SAMPLE_BYTES


def fingerprint_value(value: Any) -> str:
    """Hash of a JSON-serialisable value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
