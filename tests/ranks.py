"""A test's function run by other processes, one or several at once as torchrun would start them; never longer than told."""

import multiprocessing
import os
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slimqwen.core.errors import UserError
from slimqwen.parallel import ending

# The server imports once and forks each rank from itself; the test process, with its threads, is never forked.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["conftest", "slimqwen.cli.app", "slimqwen.runs.recipe_run", "transformers.models.qwen3_next"]
)


class Ranks:
    """`function(*arguments)` in `size` processes. The function must be importable: one of a module, not of a test."""

    def __init__(self, size: int, function: Callable[..., None], *arguments: Any) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.log = Path(tempfile.mkstemp(prefix="ranks-")[1])
        self.processes = []
        for rank in range(size):
            environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            process = CONTEXT.Process(target=_run, args=(environment, self.log, function, arguments), daemon=True)
            process.start()
            self.processes.append(process)

    def end(self, timeout_seconds: float = 90.0) -> tuple[list[int | None], str]:
        """Exit codes of all ranks and what they said. What has not ended by then is killed, which is an error."""
        end = time.monotonic() + timeout_seconds
        for process in self.processes:
            process.join(max(end - time.monotonic(), 0.0))
        late = [rank for rank, process in enumerate(self.processes) if process.exitcode is None]
        for process in self.processes:
            process.kill()
        said = self.log.read_text(encoding="utf-8", errors="replace")
        self.log.unlink()
        assert not late, f"ranks {late} had not ended after {timeout_seconds} s:\n{said}"
        return [process.exitcode for process in self.processes], said


def run_ranks(size: int, function: Callable[..., None], *arguments: Any, timeout_seconds: float = 90.0) -> None:
    """`function(*arguments)` in `size` processes, all of which must succeed."""
    codes, said = Ranks(size, function, *arguments).end(timeout_seconds)
    assert codes == [0] * size, said


def _run(environment: dict[str, Any], log: Path, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ |= {name: str(value) for name, value in environment.items()}
    os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), sys.stderr.fileno())
    try:
        function(*arguments)
    except UserError as error:
        if ending.begin_to_end():  # as in `cli.border`; else the watch prints why, and ends this process
            print(error, file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except Exception:
        traceback.print_exc()
        sys.exit(3)
