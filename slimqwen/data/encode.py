"""Text to token ids, in several processes and in the order of the text."""

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

BATCHES_PER_WORKER = 2  # that wait or are encoded: enough that no worker waits for text, and all that is in memory
THREADS = "TOKENIZERS_PARALLELISM"  # the environment variable by which a tokenizer uses several threads, or does not


class Text(NamedTuple):
    """A document's text, and the prefix of the files that its ids belong into."""

    prefix: str
    text: str


class TextBatch(NamedTuple):
    """Documents that are encoded together, and how many bytes of the sources' files were read up to the last of them."""

    texts: list[Text]
    read_bytes: int


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def encode_in_order(
    batches: Iterator[TextBatch], tokenizer: Tokenizer, frame: Frame, workers: int
) -> Generator[tuple[TextBatch, list[Ids]]]:
    """Each batch with its documents' ids (`worker.encode`), the same whatever the number of `workers`.

    With one worker, or with so little text that others would start in vain, all happens in this process. At most two
    batches per worker are in memory. Raises StageFailed where a worker ends before its text does.
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
    """Processes that encode, each asked by one thread of this process at a time. Left, they are gone.

    Not multiprocessing's: those import the main module of the program, so a script without `if __name__ == "__main__"`
    would run again in each of them.
    """

    def __init__(self, number: int, tokenizer: Tokenizer, frame: Frame) -> None:
        greeting = [tokenizer.to_str(), frame.before, frame.after]
        self._workers = [_Worker(greeting) for _ in range(number)]
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
            worker.process.kill()  # which ends the waiting of the threads, too
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.close()


class _Worker:
    """One process of `slimqwen.data.worker`."""

    def __init__(self, greeting: Sequence[object]) -> None:
        self._greeting: Sequence[object] | None = greeting
        # -P: no module from the folder that we are in. A session of its own: Ctrl-C is for us, and we end it.
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
            if self._greeting is not None:
                write_line(self.process.stdin, self._greeting)
                self._greeting = None
            write_line(self.process.stdin, texts)
            return read_ids(self.process.stdout)
        except (BrokenPipeError, EOFError) as error:
            message = "a process that tokenizes was killed, by a lack of memory perhaps: use fewer workers."
            raise StageFailed(message) from error

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.wait()
        with suppress(BrokenPipeError):  # what was not sent any more
            self.process.stdin.close()
        self.process.stdout.close()


@contextmanager
def _one_thread() -> Iterator[None]:
    """While open, the tokenizer of this process uses no other core: that is what the number of workers says."""
    before = os.environ.get(THREADS)
    os.environ[THREADS] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[THREADS]
        else:
            os.environ[THREADS] = before
