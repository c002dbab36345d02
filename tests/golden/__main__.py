"""`make golden`: make everything, say what differs from golden.json, and rewrite it."""

import tempfile
from pathlib import Path

import conftest  # noqa: F401  # one thread, no network

from golden.capture import capture
from golden.compare import GOLDEN, differences, read, write
from golden.revisions import to_raise

with tempfile.TemporaryDirectory() as folder:
    found = capture(Path(folder))
before = read() if GOLDEN.is_file() else {}
changes = differences(before, found)
if changes and (sentence := to_raise(before, found)):
    print(*changes, sep="\n")
    raise SystemExit(f"{sentence} {GOLDEN.name} is left as it was.")
write(found)
if changes:
    print(*changes, sep="\n")
print(
    f"{GOLDEN.name}: {len(found)} artefacts, {GOLDEN.stat().st_size:,} bytes, {len(changes)} differences from the one before"
)
