"""What a person should know although the work goes on: said on stderr, and kept where a run keeps what it made.

Every warning passes through `warn`. A run keeps them in warnings.jsonl, from where the report has them.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from slimqwen.artifacts import rewrite_text
from slimqwen.progress import say

_keep: ContextVar[Callable[[str], None]] = ContextVar("_keep", default=lambda text: None)


def warn(text: str) -> None:
    """Say a line on stderr; within `kept_in` it is written down too."""
    say(text)
    _keep.get()(text)


@contextmanager
def kept_in(path: Path, *, step: str, key: str) -> Iterator[None]:
    """Append what is warned of within this block to `path`, a line of JSON each; the same words once.

    step: what is done. key: what it is made from. A step that continues after an interruption keeps what it was warned
    of before; one that is made from something else forgets it.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    current = [line for line in lines if not _is_outdated(line, step, key)]
    if current != lines:
        rewrite_text(path, "".join(line + "\n" for line in current))

    def keep(text: str) -> None:
        line = json.dumps({"step": step, "key": key, "text": text}, ensure_ascii=False)
        if line not in current:
            current.append(line)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as stream:
                stream.write(line + "\n")

    token = _keep.set(keep)
    try:
        yield
    finally:
        _keep.reset(token)


def _is_outdated(line: str, step: str, key: str) -> bool:
    """Whether it is of `step` made from something else, or was cut short by kill -9."""
    try:
        entry = json.loads(line)
        return bool(entry["step"] == step and entry["key"] != key)
    except (ValueError, TypeError, KeyError):
        return True
