"""Resumable training state: parameters, Adam moments and the step, in safetensors, whatever the number of ranks.

To go on bit for bit nothing else is needed but the guard's record, a few numbers: the data cursor and every schedule are
functions of the step, and the models have no dropout. Each rank writes its own shards (torch.distributed.checkpoint, in
its safetensors format, as its usual one contains a pickle), and any number of ranks can read them.
"""

import re
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack
from itertools import accumulate
from pathlib import Path
from types import TracebackType

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from slimqwen.artifacts import atomic_folder, discard, full_disk_explained, rewrite_text, write_text
from slimqwen.core.versions import release
from slimqwen.parallel.job import TIMEOUT
from slimqwen.parallel.ranks import Ranks
from slimqwen.training.copies import check_copies
from slimqwen.training.guard import GuardRecord

FILE_BYTES = 2 << 30  # of a rank's shards per file; a file is in memory a second time while it is written
GUARD_FILE = "guard.json"
REUSABLE_STAGER = (
    2,
    13,
)  # of PyTorch: in 2.11 and 2.12 a DefaultStager fails on its second state (pytorch issue 183413)
STATE_NAME = re.compile(r"step-\d{9,}")


class States:
    """Saved states of one training, `folder/step-N`: the newest `keep` of them, each complete or absent.

    asynchronous: training goes on while a state is written. It waits only for a copy into this process's memory (pinned
        where there is a GPU), which is as large as the process's share of the state (`copy_bytes`) and is reused for the
        next one (from PyTorch 2.13 on). One state is written at a time: saving waits for the one before.

    A context manager: leaving it waits for the state that is being written.
    """

    def __init__(
        self,
        folder: Path,
        parameters: dict[str, Tensor],
        optimizer: torch.optim.Optimizer,
        ranks: Ranks,
        *,
        keep: int,
        asynchronous: bool,
    ) -> None:
        self.folder = folder
        self.parameters = parameters
        self.optimizer = optimizer
        self.ranks = ranks
        self.keep = keep
        # A process group of its own, so that the messages of a save do not mix with those of the training.
        self._group = None if ranks.mesh is None else dist.new_group(backend="gloo", timeout=TIMEOUT)
        self._stager = _build_stager(parameters) if asynchronous else None
        self._reuses_stager = release("torch") >= REUSABLE_STAGER
        self._writing: Future[object] | None = None
        self._open = ExitStack()  # the folder being written, on the first rank; on all, what tells of a full disk
        self._quiet = warnings.catch_warnings()

    def __enter__(self) -> "States":
        # torch.distributed.checkpoint warns about missing ranks even with `no_dist`, and from any thread.
        self._quiet.__enter__()
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._wait_for_writing()
        except Exception:
            if error is None:  # otherwise `error`, which came first, is raised
                raise
        finally:
            if self._stager is not None:
                self._stager.close()
            self._quiet.__exit__(kind, error, traceback)

    @property
    def copy_bytes(self) -> int:
        """Bytes of the copy that is written while training goes on."""
        if self._stager is None:
            return 0
        tensors = _named_tensors(self.parameters, self.optimizer).values()
        return sum(tensor.numel() * tensor.itemsize for tensor in tensors) // self.ranks.size

    def save(self, step: int, guard: GuardRecord) -> None:
        """Write the state after `step` steps, or begin to where saving is asynchronous. All ranks must call it.

        Raises StageFailed where copies of the model are not equal (`check_copies`).
        """
        self.finish()
        tensors = _named_tensors(self.parameters, self.optimizer)
        check_copies(tensors, self.ranks, step)
        opened: str | None = None
        if self.ranks.is_first:
            partial = self._open.enter_context(atomic_folder(self.folder / _name(step)))
            write_text(partial / GUARD_FILE, guard.model_dump_json())
            opened = str(partial)
        else:
            self._open.enter_context(full_disk_explained(self.folder / _name(step)))
        opened = self.ranks.broadcast(opened)
        assert opened is not None
        writer = dcp.HuggingFaceStorageWriter(opened, _file_numbers(tensors, self.ranks), save_distributed=True)
        alone, group = self.ranks.mesh is None, self._group
        if self._stager is not None:
            if not self._reuses_stager:
                self._stager = _build_stager(self.parameters)
            writing = dcp.async_save(
                tensors, async_stager=self._stager, storage_writer=writer, process_group=group, no_dist=alone
            )
            assert isinstance(writing, Future)  # of the threaded checkpointer, which is the default
            self._writing = writing
        else:
            self._complete(lambda: dcp.save(tensors, storage_writer=writer, process_group=group, no_dist=alone))
            self.ranks.wait()

    def poll(self) -> None:
        """Complete a state whose writing has ended meanwhile. Raises the error of one that failed."""
        if self._writing is not None and self._writing.done():
            self._wait_for_writing()

    def finish(self) -> None:
        """Wait, on all ranks, until the state that is being written is complete."""
        self._wait_for_writing()
        self.ranks.wait()

    def _wait_for_writing(self) -> None:
        """Wait until the state that is being written is complete."""
        writing, self._writing = self._writing, None
        if writing is not None:
            self._complete(writing.result)

    def _complete(self, write: Callable[[], object]) -> None:
        """Run `write`, then rename what it wrote: when the first rank's `write` returns, all ranks' shares are written."""
        with self._open:
            try:
                write()
            except dcp.CheckpointException as error:
                raise next(iter(error.failures.values()))[0] from error
        if self.ranks.is_first:
            for older in self._saved()[: -self.keep]:
                discard(older)

    def load(self) -> tuple[int, GuardRecord] | None:
        """Load the newest state into parameters and optimiser; return its step and the guard's record, or None without one."""
        self.finish()
        step = self.newest()
        if step is None:
            return None
        newest = _name(step)
        reader = dcp.HuggingFaceStorageReader(str(self.folder / newest))
        tensors = _named_tensors(self.parameters, self.optimizer)
        dcp.load(tensors, storage_reader=reader, process_group=self._group, no_dist=self.ranks.mesh is None)
        record = self.ranks.broadcast((self.folder / newest / GUARD_FILE).read_text() if self.ranks.is_first else None)
        assert record is not None
        return step, GuardRecord.model_validate_json(record)

    def newest(self) -> int | None:
        """Return the steps of the newest complete state, as the first rank sees it; None without one. All ranks must call it."""
        saved = self._saved() if self.ranks.is_first else []
        newest = self.ranks.broadcast(saved[-1].name if saved else None)
        return None if newest is None else int(newest.removeprefix("step-"))

    def replace_guard(self, step: int, guard: GuardRecord) -> None:
        """Replace the guard's record in a state that is already saved."""
        if self.ranks.is_first:
            rewrite_text(self.folder / _name(step) / GUARD_FILE, guard.model_dump_json())

    def _saved(self) -> list[Path]:
        return saved_states(self.folder)


def saved_states(folder: Path) -> list[Path]:
    """Return the complete states in the state folder of a training, oldest first."""
    return sorted(path for path in folder.glob("step-*") if STATE_NAME.fullmatch(path.name))


def _name(step: int) -> str:
    return f"step-{step:09d}"


def _build_stager(parameters: dict[str, Tensor]) -> DefaultStager:
    """Build PyTorch's stager, which copies a state into the host's memory; after that the parameters may change."""
    on_gpu = next(iter(parameters.values())).device.type == "cuda"
    return DefaultStager(
        StagingOptions(
            use_pinned_memory=on_gpu, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=on_gpu
        )
    )


@torch.no_grad()
def _named_tensors(parameters: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return all tensors of the state by name: those in use, to be read or overwritten in place."""
    tensors = {f"parameter.{name}": parameter.detach() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        for kind, value in optimizer.state[parameter].items():
            tensors |= _unwrap(f"{kind}.{name}", value)
    return tensors


def _unwrap(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Return a tensor, or the plain tensors inside a wrapper subclass: an 8-bit moment consists of codes and scales.

    Such a moment is for one device: of an offloaded one the shard is all of it.
    """
    own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    if not is_traceable_wrapper_subclass(own):
        return {name: tensor}
    inner, _ = own.__tensor_flatten__()
    return {f"{name}.{part}": getattr(own, part) for part in inner}


def _file_numbers(tensors: dict[str, Tensor], ranks: Ranks) -> dict[str, int]:
    """Return which of a rank's files, counted from 1, holds its share of each tensor."""
    shares = [tensor.numel() * tensor.itemsize // ranks.size for tensor in tensors.values()]
    ends = accumulate(shares)
    return {name: 1 + end // FILE_BYTES for name, end in zip(tensors, ends, strict=True)}
