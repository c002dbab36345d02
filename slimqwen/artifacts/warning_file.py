"""warnings.jsonl: the warnings of a run's steps, from where the report has them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slimqwen.artifacts.json_lines import append, is_cut_short, keep_lines, read_lines, value_of
from slimqwen.artifacts.lock import alone
from slimqwen.core.warning import passed_to

KEYS = ("step", "key", "text")  # of a line


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

    with passed_to(keep):
        yield


def _is_outdated(line: bytes, step: str, key: str) -> bool:
    """Whether it is one of our lines, of `step` made from something else."""
    entry = value_of(line)
    if entry is None or not all(isinstance(entry.get(name), str) for name in KEYS):
        return False
    return bool(entry["step"] == step and entry["key"] != key)
