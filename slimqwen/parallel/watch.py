"""The watch over a job: a thread of each rank, by which the loss or the failure of one ends all within a bounded time.

In a rank that waits or computes nothing shows that another is lost: gloo and NCCL find out in a collective only, and NCCL aborts the
process then. So each rank has a connection to the first, which the system closes when a process ends, however it ends; and counts
beats in the launcher's store, which stop where a process hangs or a machine is gone. The first rank watches all, the others the
first. Whoever finds a rank lost enters that as the end of the job, prints it, and all end.
"""

import contextlib
import json
import os
import secrets
import selectors
import socket
import threading
import time
from dataclasses import dataclass
from datetime import timedelta

from slimqwen.core.errors import EXIT_FAILED, EXIT_INTERRUPTED
from slimqwen.core.terminal import visible
from slimqwen.parallel import ending

# How often a rank counts a beat, and how many in a row are missing of one that is lost: two minutes. A thread beats only while
# no other thread holds Python's lock. What holds it longest here is loading libraries from a slow disk and compiling a kernel,
# some tens of seconds; a beat that is missed once costs nothing, a job that is ended by mistake hours.
BEAT_SECONDS = 5.0
MISSED_BEATS = 24
# How long a rank may go on after another was interrupted (SIGTERM, Ctrl-C), which all ranks are together.
INTERRUPTED_SECONDS = 60.0
RANK_DIGITS = 8  # of the number that a rank sends after the token
LEFT, INTERRUPTED, FAILED = "left", "interrupted", "failed"  # in the place of a number of beats


@dataclass
class Beats:
    """What this rank has seen of another's beats."""

    value: str = ""
    missed: int = 0
    seen_at: str = ""  # by the clock


class Watch:
    """The thread that watches over the other ranks of a job, from `start` to `end`.

    Made before the ranks meet, started after: so each has a first beat when the others begin to look. `number` tells this job from
    others of the same processes.
    """

    def __init__(self, rank: int, size: int, number: int) -> None:
        self._rank = rank
        self._number = number
        self._store = ending.open_store(timedelta(seconds=BEAT_SECONDS * MISSED_BEATS))  # no collective waits for it
        self._beats = {other: Beats() for other in (range(1, size) if rank == 0 else [0])}
        self._count = 0
        self._last_seen = ""  # of the last rank whose connection closed, in words
        self._selector = selectors.DefaultSelector()
        self._token = b""  # by which the first rank knows that a connection is one of the job's
        self._waker, wakened = socket.socketpair()
        self._selector.register(wakened, selectors.EVENT_READ, "wakened")
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        if rank == 0:
            self._listen()
        self._beat()

    def start(self) -> None:
        """Connect to the first rank, and watch. All ranks have met."""
        if self._rank != 0:
            self._connect()
        self._thread.start()

    def end(self, how: str = LEFT) -> None:
        """End the watch, and enter how this rank left the job. After a failure its connection stays to the end of the process."""
        self._is_over.set()
        self._waker.close()
        if self._thread.is_alive():
            self._thread.join(ending.END_SECONDS)
        with contextlib.suppress(RuntimeError):  # the store may be gone with the first rank
            self._store.set(self._key(self._rank), how)
        if how != FAILED:
            for key in list(self._selector.get_map().values()):
                key.fileobj.close()  # type: ignore[union-attr]
            self._selector.close()

    def _run(self) -> None:
        try:
            due = time.monotonic()
            while not self._is_over.is_set():
                if time.monotonic() >= due:
                    self._beat()
                    self._look_at_beats()
                    due = time.monotonic() + BEAT_SECONDS
                self._look_at_connections(max(due - time.monotonic(), 0.0))
                if not self._is_over.is_set():
                    self._follow(ending.entered(self._store))
        except (
            RuntimeError
        ):  # the store cannot be reached, or the first rank, which may hold it, left just before this one
            if not self._is_over.wait(ending.END_SECONDS):
                self._lose(
                    0, self._last_seen or "it cannot be reached, or the launcher's store cannot", has_store=False
                )

    def _beat(self) -> None:
        self._count += 1
        self._store.set(self._key(self._rank), str(self._count))

    def _look_at_beats(self) -> None:
        """Count the beats that are missing since the last look. A pause of this process itself counts as one."""
        values = self._store.multi_get([self._key(rank) for rank in self._beats])
        for (rank, beats), value in zip(self._beats.items(), map(bytes.decode, values), strict=True):
            if value != beats.value:
                beats.value, beats.missed, beats.seen_at = value, 0, time.strftime("%H:%M:%S")
                continue
            beats.missed += 1
            seconds = beats.missed * BEAT_SECONDS
            if value == INTERRUPTED and seconds >= INTERRUPTED_SECONDS:
                self._lose(rank, f"it was interrupted at {beats.seen_at}, and this one was not", EXIT_INTERRUPTED)
            elif value not in (LEFT, INTERRUPTED) and beats.missed >= MISSED_BEATS:
                self._lose(rank, f"it hangs or cannot be reached: its last beat was counted at {beats.seen_at}")

    def _look_at_connections(self, seconds: float) -> None:
        """Wait so long for a connection that is made or closed, and look whose it is."""
        for key, _ in self._selector.select(seconds):
            if key.data == "wakened":
                return
            connection = key.fileobj
            assert isinstance(connection, socket.socket)
            if key.data == "listening":
                with contextlib.suppress(OSError):  # closed again, or no more open files: beats remain
                    accepted, _ = connection.accept()
                    accepted.setblocking(False)
                    self._selector.register(accepted, selectors.EVENT_READ, None)
                continue
            try:
                sent = connection.recv(4096)
            except OSError:
                sent = b""
            if key.data is None and secrets.compare_digest(sent[:-RANK_DIGITS], self._token):
                self._selector.modify(connection, selectors.EVENT_READ, int(sent[-RANK_DIGITS:]))
            elif key.data is None or not sent:  # not of this job, or closed
                self._selector.unregister(connection)
                connection.close()
                if key.data is not None:
                    self._look_at_closed(key.data)

    def _look_at_closed(self, rank: int) -> None:
        """Find out why a rank's connection is closed: it left the job, or its process ended."""
        self._last_seen = f"its process ended at {time.strftime('%H:%M:%S')}"
        how = self._store.get(self._key(rank)).decode()
        if how in (LEFT, INTERRUPTED) or (how == FAILED and self._is_over.wait(ending.END_SECONDS)):  # as this one did
            return
        self._follow(ending.entered(self._store))
        self._lose(rank, self._last_seen)

    def _lose(self, rank: int, why: str, code: int = EXIT_FAILED, *, has_store: bool = True) -> None:
        """End the job, because a rank is lost; the first that finds out prints it, without a store each."""
        if self._is_over.is_set() or not ending.begin_to_end():
            return  # the main thread ends this process
        with contextlib.suppress(RuntimeError):
            by, entered = ending.enter(self._store, code) if has_store else (self._rank, code)
            if by != self._rank:
                os._exit(entered)
        sentence = (
            f"rank {self._rank}: error: rank {self._rank} has lost rank {rank}: {why}. The last saved state is intact: see what rank "
            f"{rank} printed, and give the same command to continue."
        )
        os.write(2, f"{visible(sentence)}\n".encode())  # no lock, which a thread that hangs may hold
        with contextlib.suppress(RuntimeError):
            if has_store:
                ending.await_readers(self._store)
        os._exit(code)

    def _follow(self, entry: tuple[int, int] | None) -> None:
        """End this process where another has entered the end of the job, unless its main thread does within seconds."""
        if entry is None or entry[0] == self._rank or self._is_over.wait(ending.END_SECONDS):
            return
        if ending.begin_to_end():
            os._exit(entry[1])

    def _key(self, rank: int) -> str:
        return f"slimqwen/watch-{self._number}/beats-{rank}"

    def _listen(self) -> None:
        """Accept connections of the other ranks, and enter where."""
        is_dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if is_dual else socket.AF_INET
        listening = socket.create_server(("", 0), family=family, backlog=len(self._beats) + 1, dualstack_ipv6=is_dual)
        self._selector.register(listening, selectors.EVENT_READ, "listening")
        self._token = secrets.token_hex(16).encode()
        place = [os.environ.get("MASTER_ADDR", ""), socket.getfqdn(), listening.getsockname()[1], self._token.decode()]
        self._store.set(f"slimqwen/watch-{self._number}/place", json.dumps(place))

    def _connect(self) -> None:
        """Connect to the first rank; where that cannot be reached so, its beats remain."""
        *hosts, port, token = json.loads(self._store.get(f"slimqwen/watch-{self._number}/place"))
        for host in hosts:
            with contextlib.suppress(OSError):
                connection = socket.create_connection((host, port), timeout=ending.END_SECONDS)
                connection.sendall(f"{token}{self._rank:0{RANK_DIGITS}d}".encode())
                self._selector.register(connection, selectors.EVENT_READ, 0)
                return
