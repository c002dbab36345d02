"""Resumable training state: parameters, Adam moments and the step, in safetensors, whatever the number of ranks.

Nothing else is needed to go on bit for bit: the data cursor and every schedule are functions of the step, and the
models have no dropout. Each rank writes its own shards (torch.distributed.checkpoint, whose usual format has a pickle;
this one has not), and any number of ranks reads them again.
"""

import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from slimqwen.artifacts import atomic_folder
from slimqwen.distillation.parallel import Ranks

FILE_BYTES = 2 << 30  # of a rank's shards in one file, which is in memory once more while it is written


def save_state(
    folder: Path, step: int, parameters: dict[str, Tensor], optimizer: torch.optim.Optimizer, ranks: Ranks, keep: int
) -> None:
    """Write `folder/step-N` atomically, then remove all but the `keep` newest: there is always a complete one."""
    tensors = _tensors(parameters, optimizer)
    with _shared_folder(folder / f"step-{step:09d}", ranks) as partial:
        writer = dcp.HuggingFaceStorageWriter(str(partial), _file_numbers(tensors, ranks), save_distributed=True)
        with _one_process_is_fine():
            dcp.save(tensors, storage_writer=writer, no_dist=ranks.mesh is None)
    if ranks.is_first:
        for older in _states(folder)[:-keep]:
            shutil.rmtree(older)


def load_state(
    folder: Path, parameters: dict[str, Tensor], optimizer: torch.optim.Optimizer, ranks: Ranks
) -> int | None:
    """Put the newest state into parameters and optimiser; the number of steps done, or None if there is none."""
    newest = ranks.told(_states(folder)[-1].name if ranks.is_first and _states(folder) else None)
    if newest is None:
        return None
    tensors = _tensors(parameters, optimizer)
    reader = dcp.HuggingFaceStorageReader(str(folder / newest))
    with _one_process_is_fine():
        dcp.load(tensors, storage_reader=reader, no_dist=ranks.mesh is None)
    return int(newest.removeprefix("step-"))


def _states(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"))


@torch.no_grad()
def _tensors(parameters: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Everything by name: the tensors in use, to be read or overwritten in place."""
    tensors = {f"parameter.{name}": parameter.detach() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        moments = optimizer.state[parameter]
        if not moments:  # before the first step, as AdamW makes them itself
            moments["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            moments |= {moment: torch.zeros_like(parameter) for moment in ("exp_avg", "exp_avg_sq")}
        tensors |= {f"{moment}.{name}": tensor for moment, tensor in moments.items()}
    return tensors


def _file_numbers(tensors: dict[str, Tensor], ranks: Ranks) -> dict[str, int]:
    """Which of a rank's files, from 1, holds its share of each tensor."""
    shares = [tensor.numel() * tensor.itemsize // ranks.size for tensor in tensors.values()]
    ends = accumulate(shares)
    return {name: 1 + end // FILE_BYTES for name, end in zip(tensors, ends, strict=True)}


@contextmanager
def _one_process_is_fine() -> Iterator[None]:
    """No warning that there are no ranks, which torch.distributed.checkpoint gives even where it was told so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


@contextmanager
def _shared_folder(path: Path, ranks: Ranks) -> Iterator[Path]:
    """`atomic_folder`, opened by the first rank and written to by all."""
    if ranks.is_first:
        with atomic_folder(path) as partial:
            ranks.told(str(partial))
            yield partial
            ranks.wait()
    else:
        yield Path(str(ranks.told()))
        ranks.wait()
    ranks.wait()  # it has its name
