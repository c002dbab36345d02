"""Reading of files that a user names, restricted to regular files."""

import errno
import stat
from pathlib import Path


def read_regular(path: Path) -> bytes:
    """Read a regular file. Raises OSError for all else: reading a pipe may block, and /dev/zero never ends."""
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "Is a directory", str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    return path.read_bytes()
