"""`make golden`: make everything, say what differs from golden.json, and rewrite it."""

import tempfile
from pathlib import Path

import conftest  # noqa: F401  # one thread, no network

from golden.capture import capture
from golden.compare import GOLDEN, differences, read, write

with tempfile.TemporaryDirectory() as folder:
    found = capture(Path(folder))
changes = differences(read() if GOLDEN.is_file() else {}, found)
write(found)
if changes:
    print(*changes, sep="\n")
print(
    f"{GOLDEN.name}: {len(found)} artefacts, {GOLDEN.stat().st_size:,} bytes, {len(changes)} differences from the one before"
)
