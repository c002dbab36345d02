"""The error messages for a full disk, before and during the work."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from slimqwen.core.bytesize import bytes_in_words
from slimqwen.core.errors import StageFailed

FULL_DISK_WORDS = ("No space left on device", "File too large", "Disk quota exceeded")  # as safetensors reports them


def check_space(place: Path, needed_bytes: int, free_bytes: int, *remedies: str) -> None:
    """Raise StageFailed where a disk has less space than the work needs. remedies: beside making room."""
    if needed_bytes > free_bytes:
        *most, last = ("make room", "write to another disk", *remedies)
        raise StageFailed(
            f"{bytes_in_words(needed_bytes)} are to be written to {place}, and {bytes_in_words(free_bytes)} are free: "
            f"{', '.join(most)}, or {last}."
        )


@contextlib.contextmanager
def full_disk_explained(path: Path) -> Iterator[None]:
    """Turn "no space left on device", as an OSError or inside a library's own message, into StageFailed."""
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
