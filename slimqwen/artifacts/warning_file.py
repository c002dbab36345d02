"""The file warnings.jsonl: the warnings of a run's steps, which the report shows."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slimqwen.artifacts.json_lines import append, is_cut_short, keep_lines, read_lines, value_of
from slimqwen.artifacts.lock import alone
from slimqwen.core.warning import handle_warnings

KEYS = ("step", "key", "text")  # of a line


@contextmanager
def kept_in(path: Path, *, step: str, key: str) -> Iterator[None]:
    """Append the warnings raised within this block to `path`, one line of JSON each; repetitions are dropped.

    step: its name. key: identifies its inputs. A step that continues after an interruption keeps its earlier warnings;
    one with other inputs drops them. Lines of other steps, and lines that are not ours, stay.
    """
    keep_lines(path, lambda line: not (_is_outdated(line, step, key) or is_cut_short(line, KEYS[0])))
    current = [value_of(line) for line in read_lines(path)]

    def append_new(text: str) -> None:
        entry = dict(zip(KEYS, (step, key, text), strict=True))
        if entry not in current:
            current.append(entry)
            with alone(path, wait=True):  # processes of a study share the file
                append(path, entry)

    with handle_warnings(append_new):
        yield


def _is_outdated(line: bytes, step: str, key: str) -> bool:
    """Return whether it is a line of ours about `step` with other inputs."""
    entry = value_of(line)
    if entry is None or not all(isinstance(entry.get(name), str) for name in KEYS):
        return False
    return bool(entry["step"] == step and entry["key"] != key)
