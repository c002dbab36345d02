"""How artefacts are recognised again: by a hash of what is in them."""

import hashlib
import json
from pathlib import Path
from typing import Any

FULLY_HASHED_BYTES = 64 << 20  # larger files are sampled: hashing 160 GB would take longer than pruning it
READ_BYTES = 1 << 20
SAMPLE_BYTES, SAMPLE_EVERY_BYTES = 64 << 10, 4 << 20  # so that no matrix of more than 4 MB is left out


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
