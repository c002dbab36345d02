"""What a person should know although the work goes on: said on stderr, and kept where a run keeps what it made.

Every warning passes through `warn`. A run keeps them in warnings.jsonl, from where the report has them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from slimqwen.artifacts import alone
from slimqwen.jsonl import append, is_cut_short, keep_lines, read_lines, value_of
from slimqwen.progress import say

KEYS = ("step", "key", "text")  # of a line
_keep: ContextVar[Callable[[str], None]] = ContextVar("_keep", default=lambda text: None)


def warn(text: str) -> None:
    """Say a line on stderr; within `kept_in` it is written down too."""
    say(text)
    _keep.get()(text)


def warn_once(text: str) -> None:
    """`warn` of what comes up again and again: said once by a process, and kept wherever it comes up."""
    if text in _said:
        _keep.get()(text)
    else:
        _said.add(text)
        warn(text)


_said: set[str] = set()


@contextmanager
def kept_in(path: Path, *, step: str, key: str) -> Iterator[None]:
    """Append what is warned of within this block to `path`, a line of JSON each; the same words once.

    step: what is done. key: what it is made from. A step that continues after an interruption keeps what it was warned
    of before; one that is made from something else forgets it. Lines of others stay.
    """
    keep_lines(path, lambda line: not (_is_outdated(line, step, key) or is_cut_short(line, KEYS[0])))
    current = [value_of(line) for line in read_lines(path)]

    def keep(text: str) -> None:
        entry = dict(zip(KEYS, (step, key, text), strict=True))
        if entry not in current:
            current.append(entry)
            with alone(path, wait=True):  # processes of a study share the file
                append(path, entry)

    token = _keep.set(keep)
    try:
        yield
    finally:
        _keep.reset(token)


def _is_outdated(line: bytes, step: str, key: str) -> bool:
    """Whether it is one of our lines, of `step` made from something else."""
    entry = value_of(line)
    if entry is None or not all(isinstance(entry.get(name), str) for name in KEYS):
        return False
    return bool(entry["step"] == step and entry["key"] != key)
