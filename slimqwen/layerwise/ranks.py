"""What layer-by-layer work needs of the ranks that share it out: the rows of each, and the folder that all of them write into."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from slimqwen.artifacts import joined_folder, scratch_folder


class AnyJob(Protocol):
    """A job (`slimqwen.parallel.job.Job`, of the same floor as this room)."""

    @property
    def is_first(self) -> bool:
        """Whether this rank makes what is not shared out."""

    def lead(self, action: Callable[[], str]) -> str:
        """Do `action` on the first rank, and return what it returns on every rank."""

    def wait(self) -> None:
        """Block until all ranks have called this."""


def share_of(rows: int, rank: int, size: int) -> slice:
    """Return the rows of one of `size` ranks: neighbours; none has two more than another, and the first ranks have most.

    Example: 5 rows on 4 ranks: 0 and 1, 2, 3, 4.
    """
    return slice(-(-rows * rank // size), -(-rows * (rank + 1) // size))


@contextmanager
def shared_scratch_folder(path: Path, key: str, job: AnyJob) -> Iterator[Path]:
    """Like `scratch_folder`, for all ranks of a job, which see the same files: the first makes and removes the folder."""
    with scratch_folder(path, key) if job.is_first else joined_folder(path) as folder:
        job.wait()
        yield folder
        job.wait()
