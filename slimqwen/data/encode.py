"""Encoding of text to token ids, in several processes, with the order of the text preserved."""

import os
import subprocess
import sys
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import chain, islice
from queue import SimpleQueue
from typing import NamedTuple

from tokenizers import Tokenizer

from slimqwen.core.errors import StageFailed
from slimqwen.data.worker import Frame, Ids, encode, read_ids, write_line

BATCHES_PER_WORKER = 2  # queued or in work, which bounds the memory: enough that no worker is idle
THREADS = "TOKENIZERS_PARALLELISM"  # the environment variable that lets a tokenizer use several threads


class Text(NamedTuple):
    """A document's text, and the prefix of the files that its ids are written to."""

    prefix: str
    text: str


class TextBatch(NamedTuple):
    """Documents that are encoded together, and the bytes of the sources' files read up to the last of them."""

    texts: list[Text]
    read_bytes: int


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def encode_in_order(
    batches: Iterator[TextBatch], tokenizer: Tokenizer, frame: Frame, workers: int
) -> Generator[tuple[TextBatch, list[Ids]]]:
    """Yield each batch with its documents' ids (`worker.encode`), independent of the number of `workers`.

    With one worker, or with too little text for several, everything runs in this process. At most two
    batches per worker are in memory. Raises StageFailed where a worker exits early.
    """
    head = list(islice(batches, BATCHES_PER_WORKER * workers)) if workers > 1 else []
    if len(head) < BATCHES_PER_WORKER * workers:
        for batch in chain(head, batches):
            with _one_thread():
                ids = encode(tokenizer, frame, [text for _, text in batch.texts])
            yield batch, ids
        return
    with _Workers(workers, tokenizer, frame) as pool:
        waiting: deque[tuple[TextBatch, Future[list[Ids]]]] = deque()
        for batch in chain(head, batches):
            waiting.append((batch, pool.submit([text for _, text in batch.texts])))
            if len(waiting) >= BATCHES_PER_WORKER * workers:
                done, future = waiting.popleft()
                yield done, future.result()
        for done, future in waiting:
            yield done, future.result()


class _Workers:
    """A pool of processes that encode, each used by one thread of this process at a time, and killed on exit.

    Not a multiprocessing pool: that imports the program's main module, so a script without `if __name__ == "__main__"`
    would run again in each process.
    """

    def __init__(self, number: int, tokenizer: Tokenizer, frame: Frame) -> None:
        first_line = [tokenizer.to_str(), frame.before, frame.after]
        self._workers = [_Worker(first_line) for _ in range(number)]
        self._threads = ThreadPoolExecutor(number)
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)

    def submit(self, texts: Sequence[str]) -> Future[list[Ids]]:
        return self._threads.submit(self._encode, texts)

    def _encode(self, texts: Sequence[str]) -> list[Ids]:
        worker = self._idle.get()
        try:
            return worker.encode(texts)
        finally:
            self._idle.put(worker)

    def __enter__(self) -> "_Workers":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.process.kill()  # which also unblocks the threads
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.close()


class _Worker:
    """One process of `slimqwen.data.worker`."""

    def __init__(self, first_line: Sequence[object]) -> None:
        self._first_line: Sequence[object] | None = first_line
        # -P: no imports from the current folder. A session of its own, so that Ctrl-C reaches only this process.
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "slimqwen.data.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {THREADS: "false", "PYTHONPATH": os.pathsep.join(sys.path)},
            start_new_session=True,
        )

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            if self._first_line is not None:
                write_line(self.process.stdin, self._first_line)
                self._first_line = None
            write_line(self.process.stdin, texts)
            return read_ids(self.process.stdout)
        except (BrokenPipeError, EOFError) as error:
            message = "a tokenizing process was killed, perhaps because memory ran out: use fewer workers."
            raise StageFailed(message) from error

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.wait()
        with suppress(BrokenPipeError):  # from data still in the buffer
            self.process.stdin.close()
        self.process.stdout.close()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Restrict this process's tokenizer to one thread within the block, so that `workers` is the number of cores used."""
    before = os.environ.get(THREADS)
    os.environ[THREADS] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[THREADS]
        else:
            os.environ[THREADS] = before
