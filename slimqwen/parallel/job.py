"""The job: all processes that torchrun started, from the first meeting to the end that one of them brings for all."""

import json
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from slimqwen.core import torchrun
from slimqwen.core.errors import EndedElsewhere, Interrupted, StageFailed
from slimqwen.parallel import ending
from slimqwen.parallel.watch import FAILED, INTERRUPTED, Watch

# A rank waits this long for the others of a collective before it gives up. The longest wait without an error is for rank 0
# to bring a finished checkpoint to the disk. That a process died or hangs is found by the watch (`parallel/watch.py`).
TIMEOUT = timedelta(minutes=10)
# The other ranks wait this long for a stage that the first makes alone. It is no measure of anything: that the first rank
# died is found as above.
LONGEST_STAGE = timedelta(days=60)
# How gloo and NCCL, whose errors have no types of their own for it, tell that another process is gone.
LOST_CONTACT = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Broken pipe",
    "timed out",
    "remote process exit",  # "exited or there was a network error", "exiting prematurely"
    "NCCL communicator was aborted",
    "collective operation timeout",  # of NCCL's watchdog, where it does not abort the process
    "Connection was likely closed",  # of the store by which the processes find each other
)
JOIN, DONE, GIVEN_UP = "join", "done", "given up"  # words of the first rank to those that wait


class Job:
    """The processes of one job. Alone (`size` 1) nothing is sent, and everything is done by this process.

    All ranks must call the same methods in the same order.
    """

    def __init__(self, rank: int = 0, size: int = 1, control: dist.ProcessGroup | None = None) -> None:
        self.rank = rank
        self.size = size
        self._control = control
        self._meshes: dict[tuple[str, tuple[int, ...]], DeviceMesh] = {}
        self._leads = False  # on the first rank: the others wait for its word
        self._is_joint = False  # on the first rank: all ranks work, and none waits for its word

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that prints, keeps records and makes what is not shared out."""
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        """Whether what this process does now is done by no other rank."""
        return self.size == 1 or self._leads

    def lead(self, action: Callable[[], str], shared: Callable[[], object] | None = None) -> str:
        """Do `action` on the first rank, and return what it returns on every rank. The others wait.

        shared: what the others do when the first rank does it too, by `together` within `action`.

        Raises EndedElsewhere on the others where the first rank fails.
        """
        if self.is_alone:
            return action()
        if self.is_first:
            was_joint, self._is_joint, self._leads = self._is_joint, False, True
            try:
                result = action()
            finally:
                self._leads = False
            self._tell(DONE, result)
            self._is_joint = was_joint
            return result
        while True:
            word, result = self._hear()
            if word == DONE:
                return result
            if word == GIVEN_UP:
                raise EndedElsewhere("the first rank of the job failed: see its error.")
            assert shared is not None, "the first rank began work that this rank has no part in"
            shared()

    def together(self, work: Callable[[], object]) -> None:
        """Do `work` on all ranks at once: called by the first, within the action that it leads."""
        if not self._leads:
            work()
            return
        self._tell(JOIN)
        self._leads, self._is_joint = False, True
        work()
        self._leads, self._is_joint = True, False

    def give_up(self) -> None:
        """End the others' wait after an error of the first rank, if they wait.

        Ranks that are at work instead, of a command that all carry out together, never receive it: the attempt ends with the process.
        """

        def tell() -> None:
            with suppress(RuntimeError):  # they may be gone
                self._tell(GIVEN_UP)

        if self.size > 1 and self.is_first and not self._is_joint:
            attempt = threading.Thread(target=tell, daemon=True)
            attempt.start()
            attempt.join(ending.END_SECONDS)

    @property
    def share(self) -> tuple[int, int]:
        """Return the number of this process among those that share out the work now, and how many these are: (0, 1) alone."""
        return (0, 1) if self.is_alone else (self.rank, self.size)

    def wait(self) -> None:
        """Block until all ranks that share out the work have called this, however long they work."""
        if not self.is_alone:
            dist.all_reduce(torch.zeros(1), group=self._control)

    def add_up(self, sums: dict[str, torch.Tensor]) -> None:
        """Add to the first rank's float64 sums, in the host's memory, those of the others; each rank may lack some of them.

        One after another, in place: a rank needs the memory of one sum more.
        """
        if self.is_alone:
            return
        everywhere: list[Any] = [None] * self.size
        shapes = {name: list(tensor.shape) for name, tensor in sums.items()}
        dist.all_gather_object(everywhere, shapes, group=self._control)
        for name, shape in sorted({name: shape for found in everywhere for name, shape in found.items()}.items()):
            tensor = sums.get(name)
            if tensor is None:
                tensor = torch.zeros(shape, dtype=torch.float64)
            dist.reduce(tensor, dst=0, group=self._control)
            if self.is_first:
                sums[name] = tensor
            else:
                sums.pop(name, None)

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add up, in place and on every rank that shares out the work, a tensor of the same shape; the same bits everywhere.

        On the host it may wait for as long as the others work. On a GPU the wait is limited as in any training (TIMEOUT).
        """
        if not self.is_alone:
            dist.all_reduce(tensor, group=self._control if tensor.device.type == "cpu" else None)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """Return the value, JSON, of every rank that shares out the work, in their order: `[value]` alone."""
        if self.is_alone:
            return [value]
        everywhere: list[Any] = [None] * self.size
        dist.all_gather_object(everywhere, json.dumps(value), group=self._control)
        return [json.loads(found) for found in everywhere]

    def mesh(self, device_type: str, shape: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
        """Return the mesh of all ranks in this shape; the same object, and the same groups, for every stage of the job."""
        key = (device_type, shape)
        if key not in self._meshes:
            self._meshes[key] = init_device_mesh(device_type, shape, mesh_dim_names=names)
        return self._meshes[key]

    def _tell(self, word: str, value: str = "") -> None:
        dist.broadcast_object_list([word, value], src=0, group=self._control, device=torch.device("cpu"))

    def _hear(self) -> tuple[str, str]:
        heard = ["", ""]
        dist.broadcast_object_list(heard, src=0, group=self._control, device=torch.device("cpu"))
        return heard[0], heard[1]


_job: Job | None = None  # that this process is in
_joined = 0  # jobs that this process has joined


@contextmanager
def join_job(device: torch.device) -> Iterator[Job]:
    """Join the processes that torchrun (or whatever sets RANK, WORLD_SIZE, MASTER_ADDR) started; one process otherwise.

    Within another call it is the same job. device: this process's own (`resolve_device`).

    Raises StageFailed where another rank is gone.
    """
    global _job, _joined
    if _job is not None:
        yield _job
        return
    size, rank = torchrun.world_size(), torchrun.rank()
    if size == 1:
        yield Job()
        return
    _joined += 1
    watch = None
    try:
        store = _open_store()
        watch = Watch(rank, size, _joined)
        _job = Job(rank, size, _meet(device, rank, size, store))
        watch.start()
        yield _job
        _job.wait()  # none leaves, and ends the store with it, while another works
        watch.end()
    except BaseException as error:
        if _job is not None:
            _job.give_up()
        lost = lost_contact(error)
        if lost is not None:
            ending.await_entry()
        if watch is not None:  # all ranks are interrupted together
            watch.end(INTERRUPTED if isinstance(error, Interrupted | KeyboardInterrupt) else FAILED)
        if lost is None:
            raise
        raise StageFailed(
            f"rank {rank} has lost another rank, which ended or cannot be reached ({lost}). The last saved state is "
            "intact: see what the other rank said, and give the same command to continue."
        ) from error
    finally:
        _job = None
    # After an error the process group is left to the end of the process: to destroy it may take a rank that is gone.
    dist.destroy_process_group()


def lost_contact(error: BaseException) -> str | None:
    """Return the words by which an error tells that another process is gone; None for an error of another kind."""
    if not isinstance(error, RuntimeError):
        return None
    return next((words for words in LOST_CONTACT if words.lower() in str(error).lower()), None)


def _open_store() -> dist.Store:
    """Open the launcher's store, and allow this process as many open files as the system does.

    With n ranks each has some 2 n connections to the others (two groups of gloo); the usual limit is 1,024.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    store = ending.open_store(TIMEOUT)
    ending.keep_store(store)
    return store


def _meet(device: torch.device, rank: int, size: int, store: dist.Store) -> dist.ProcessGroup | None:
    """Make the process group of all ranks; return a second one, in which the others wait for the first rank."""
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    own = device if device.type == "cuda" else None
    store = dist.PrefixStore(f"slimqwen/job-{_joined}", store)  # the groups of a job before have left their addresses
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT, device_id=own)
    return dist.new_group(backend="gloo", timeout=LONGEST_STAGE)
