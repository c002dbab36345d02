"""A rank that is killed, hangs or fails ends all ranks of the job within seconds, whatever they do; one of them prints why."""

import ctypes
import os
import signal
import sys
import threading
import time

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks, run_ranks

from slimqwen.cli.border import guarded
from slimqwen.core.errors import UserError
from slimqwen.core.torchrun import rank
from slimqwen.parallel import ending, watch
from slimqwen.parallel.job import Job, join_job, lost_contact

CPU = torch.device("cpu")
FOR_LONG = 60.0  # seconds, which no test takes


def wait_for_the_first(job: Job) -> None:
    """The first rank works alone, in one call that holds no lock of Python's; the others wait."""

    def sleep() -> str:
        time.sleep(FOR_LONG)
        return ""

    job.lead(sleep)


def work(_: Job) -> None:
    """All ranks work, each for itself."""
    time.sleep(FOR_LONG)


def wait_in_a_collective(_: Job) -> None:
    """All ranks but the one that ends wait for it."""
    dist.barrier()


def finish(_: Job) -> None:
    """Wait for the others at the end of the job."""


STATES = {function.__name__: function for function in (wait_for_the_first, work, wait_in_a_collective, finish)}


def end_in(state: str, ended: int, how: str) -> None:
    """A job in this state, of which one rank is killed, hangs (and is killed much later), is busy, or fails."""
    watch.BEAT_SECONDS, watch.MISSED_BEATS, ending.END_SECONDS = 0.1, 40, 1.0

    def begin() -> None:
        with join_job(CPU) as job:
            if rank() != ended:
                STATES[state](job)
                return
            time.sleep(0.3)
            if how == "fails":
                raise UserError("the recipe is wrong.")
            ctypes.PyDLL(None).sleep({"is killed": 0, "is busy": 1, "hangs": 6}[how])  # with Python's lock
            if how != "is busy":
                os.kill(os.getpid(), signal.SIGKILL)

    sys.argv = ["slimqwen"]
    guarded(begin)


@pytest.mark.parametrize(
    ("state", "ended"), [("wait_for_the_first", 1), ("wait_for_the_first", 0), ("work", 2), ("wait_in_a_collective", 1)]
)
def test_a_killed_rank_ends_all_with_one_sentence(state: str, ended: int) -> None:
    codes, said = Ranks(3, end_in, state, ended, "is killed").end(20.0)
    assert codes == [-9 if number == ended else 1 for number in range(3)], said
    sentences = [line for line in said.splitlines() if "has lost" in line]
    assert "Traceback" not in said and said.count("error:") == len(sentences), said
    assert len(sentences) == 1 or (ended == 0 and len(sentences) == 2), said  # with the first rank its store is gone
    assert all("the same command to continue" in line for line in sentences), said


def test_a_rank_that_hangs_ends_all() -> None:
    codes, said = Ranks(2, end_in, "wait_for_the_first", 1, "hangs").end(20.0)
    assert codes == [1, -9], said
    assert said.count("error:") == 1 and "rank 0 has lost rank 1: it hangs or cannot be reached" in said, said


def test_an_error_ends_all_with_its_exit_code() -> None:
    codes, said = Ranks(2, end_in, "work", 1, "fails").end(20.0)
    assert codes == [2, 2], said
    assert said.count("error:") == 1 and "rank 1: error: the recipe is wrong." in said, said


def join_twice() -> None:
    """Two jobs of the same processes, one after the other."""
    for number in range(2):
        with join_job(CPU) as job:
            assert job.gather([number, rank()]) == [[number, 0], [number, 1]]


def test_processes_join_one_job_after_another() -> None:
    run_ranks(2, join_twice)


def test_a_rank_that_is_busy_for_a_while_ends_nothing() -> None:
    """It holds Python's lock, and counts no beat, for less than the time after which it is lost."""
    codes, said = Ranks(2, end_in, "finish", 1, "is busy").end(20.0)
    assert (codes, said) == ([0, 0], "")


@pytest.mark.parametrize(
    "error",
    [
        dist.DistBackendError(
            "NCCL error in: ProcessGroupNCCL.cpp:3690, remote process exited or there was a network error, NCCL version 2.27.5\n"
            "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely."
        ),
        dist.DistBackendError("NCCL communicator was aborted on rank 3."),
        dist.DistBackendError(
            "[Rank 3] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE, NumelIn=1, NumelOut=1, "
            "Timeout(ms)=600000) ran for 600011 milliseconds before timing out."
        ),
        dist.DistNetworkError(
            "failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown?"
        ),
        RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer [10.0.0.1]:1234"),
    ],
)
def test_what_gloo_and_nccl_raise_for_a_rank_that_is_gone_is_known(error: Exception) -> None:
    assert lost_contact(error) is not None


def test_other_errors_are_not_taken_for_a_lost_rank() -> None:
    for error in (
        dist.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:77, unhandled cuda error, NCCL version 2.27.5"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        UserError("the connection timed out."),
    ):
        assert lost_contact(error) is None


def test_a_first_rank_that_gives_up_waits_for_no_rank_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    never = threading.Event()
    monkeypatch.setattr(ending, "END_SECONDS", 0.05)
    job = Job(0, 2)
    monkeypatch.setattr(job, "_tell", lambda _word: never.wait(30))  # as a broadcast that nobody receives
    began = time.monotonic()
    job.give_up()
    assert time.monotonic() - began < 10
