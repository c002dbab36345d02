"""Fingerprints: hashes of content by which artefacts are recognised again."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slimqwen.artifacts.record import Record

FULLY_HASHED_BYTES = 64 << 20  # larger files are sampled: hashing 160 GB would take longer than pruning it
READ_BYTES = 1 << 20
SAMPLE_BYTES, SAMPLE_EVERY_BYTES = 64 << 10, 4 << 20  # so that every matrix of more than 4 MB is sampled


def fingerprint(path: Path, *, most_bytes: int | None = None) -> str:
    """Hash a file, or every file in a folder with its relative name. Modification times are ignored.

    Of a folder that slimqwen wrote, only the files of its record count, so files added since change nothing. Of any other
    folder all files count, except hidden ones.

    Files up to 64 MiB are read whole. Of larger ones the size and 64 KiB of every 4 MiB are hashed, the end included: a
    sixty-fourth, which detects a different choice of experts and is fast enough for 160 GB. A change that keeps the size
    and lies between the samples goes undetected.

    most_bytes: a lower limit on what is read of one file: up to this size it is read whole, beyond it in samples of
        64 KiB at equal distances, both ends included.
    """
    assert path.exists(), f"{path} does not exist"
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
    """List the files of a folder that count, with their relative names."""
    record = Record.read(folder)
    if record is not None and record.files is not None:
        files = [folder / name for name in record.files]
    else:
        files = [file for file in folder.rglob("*") if file.is_file()]
    found = [(file.relative_to(folder), file) for file in sorted(files)]
    return [(name.as_posix(), file) for name, file in found if not any(part.startswith(".") for part in name.parts)]


def _samples(size: int, most_bytes: int | None) -> Iterator[tuple[int, int]]:
    """Yield the ranges of a file that are read: (start, length)."""
    if size <= (FULLY_HASHED_BYTES if most_bytes is None else most_bytes):
        yield 0, size
        return
    every = SAMPLE_EVERY_BYTES if most_bytes is None else size * SAMPLE_BYTES // most_bytes
    for start in (*range(0, size - SAMPLE_BYTES, every), size - SAMPLE_BYTES):
        yield start, SAMPLE_BYTES


def fingerprint_value(value: Any) -> str:
    """Hash a JSON-serialisable value, regardless of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
