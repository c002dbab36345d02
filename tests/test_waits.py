"""A step that waits for its device once, at its end; and batches that are read while the step before is computed."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from settings import sections
from tiny import tiny_stream, write_tiny_checkpoint
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.data.isolated import DocumentStream
from slimqwen.data.stream import Batch, RowStream
from slimqwen.losses.balance import load_balancing_loss
from slimqwen.losses.loss import count_targets
from slimqwen.model.model import load
from slimqwen.parallel.expert_parallel import exchanged_forward
from slimqwen.parallel.ranks import ALONE
from slimqwen.recipe import DistilRecipe
from slimqwen.training.batches import Batches, StepRows
from slimqwen.training.teacher import LiveTeacher
from slimqwen.training.trainer import Span, Student, Trainer

WAITING = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "unique_consecutive",
    "_unique2",
    "bincount",
    "equal",
    "is_nonzero",
}
READ = {"tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__"}


class Waits(TorchDispatchMode):
    """Kernels whose result the host needs before it goes on, on a GPU."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1]
        )
        by_sizes = (
            name == "repeat_interleave" and kwargs.get("output_size") is None if kwargs else name == "repeat_interleave"
        )
        if name in WAITING or by_mask or by_sizes:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


class Reads(TorchFunctionMode):
    """Reads of a tensor's values into Python, which on a CPU are no kernels."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") in READ:
            self.found.append(function.__name__)
        return function(*args, **(kwargs or {}))


@contextmanager
def waits() -> Iterator[list[str]]:
    found: list[str] = []
    with Waits(found), Reads(found):
        yield found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("waits")
    two_layers = {"num_hidden_layers": 2, "full_attention_interval": 2}
    write_tiny_checkpoint(folder / "student", **two_layers)
    write_tiny_checkpoint(folder / "teacher", seed=1, hidden_size=40, **two_layers)
    return folder


def trainer(folder: Path, stream: RowStream, **changes: Any) -> Trainer:
    checkpoint = Checkpoint(folder / "student")
    usual = {"tokens": 1000, "batch_size": 4, "warmup": "0 steps", "loss_chunk_tokens": 24}
    student = Student(load(folder / "student").train(), checkpoint.family, checkpoint.config)
    teacher = LiveTeacher(load(folder / "teacher"), teaches_mtp=True)
    return Trainer(student, teacher, stream, span=Span(0, 3, 3), **sections(DistilRecipe, usual | changes))


def documents(folder: Path) -> DocumentStream:
    g = torch.Generator().manual_seed(0)
    texts = [torch.randint(64, (length,), generator=g).tolist() for length in (12, 3, 17, 2, 40, 9, 21, 5)]
    return DocumentStream(tiny_stream(folder, texts, 20, vocab_size=64).tokens, sequence_length=20, seed=0)


@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize("counts", ["exact", {"rows": 2}])
def test_a_step_waits_once(folder: Path, tmp_path: Path, isolated: bool, counts: Any) -> None:
    """Of two micro-batches, with all four terms, the teacher's MTP head, recomputation and padding."""
    g = torch.Generator().manual_seed(0)
    text = torch.randint(64, (400,), generator=g).tolist()
    stream = documents(tmp_path) if isolated else tiny_stream(tmp_path, [text], sequence_length=20, vocab_size=64)
    changes = {
        "micro_batch_size": 2,
        "recompute_activations": True,
        "load_balancing_counts": counts,
        "mtp_target": "mtp",
    }
    one = trainer(folder, stream, **changes)
    for step in range(2):
        with waits() as found:
            values = one.step(step)
        assert found == ["tolist"] and values["lm"] > 0 and values["grad_norm"] > 0


def test_shared_experts_wait_once_in_a_forward_pass_and_never_in_a_backward_pass() -> None:
    """For the sizes that ranks exchange; here one rank, which sends its pairs to itself."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        experts: Any = torch.nn.Module()
        experts.num_experts = 3
        hidden = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
        chosen, gates = torch.tensor([[0, 2], [1, 0], [2, 1], [2, 0]]), torch.full((4, 2), 0.5)
        with waits() as found:
            outputs = exchanged_forward(
                experts, lambda rows, own, _: rows * (own + 1.0), dist.group.WORLD, hidden, chosen, gates
            )
            outputs.sum().backward()
    finally:
        dist.destroy_process_group()
    assert found == ["tolist"]
    torch.testing.assert_close(outputs, hidden * (chosen + 1.0).mean(1, keepdim=True))


def test_the_load_balancing_loss_has_as_many_kernels_for_many_blocks() -> None:
    """For one block and for 40, forward and backward; but for views, which start none."""

    def kernels(blocks: int) -> int:
        class Kernels(TorchDispatchMode):
            started = 0

            def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                Kernels.started += not function.is_view
                return function(*args, **(kwargs or {}))

        logits = [torch.randn(8, 4).requires_grad_() for _ in range(blocks)]
        with Kernels():
            load_balancing_loss(logits, None, [torch.ones(2, 4)] * blocks, 8).backward()
        return Kernels.started

    assert 10 < kernels(40) == kernels(1) < 30


def test_the_modes_see_what_waits() -> None:
    x = torch.tensor([1.0, 0.0])
    for wait in (
        x[0].item,
        x.tolist,
        x.nonzero,
        lambda: x[x > 0],
        lambda: bool(x[0] == 1.0),
        lambda: float(x[0]),
        x.cpu,
    ):
        with waits() as found:
            wait()
        assert found, wait
    with waits() as found:
        x[torch.tensor([1])] + x.sum()
    assert found == []


def test_targets_are_counted_without_reading_rows(tmp_path: Path) -> None:
    """Over more than an epoch, of documents apart, against the batch itself; and those of each micro-batch."""
    stream = documents(tmp_path)
    batch = stream.batch(3, 14)
    assert batch.mask is not None and stream.rows_per_epoch < 14
    assert stream.count_targets(3, 14) == count_targets(batch.tokens, batch.mask)
    for part in batch.split(4):
        assert part.targets == count_targets(part.tokens, part.mask)[0]


def test_batches_are_read_ahead_by_a_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = documents(tmp_path)
    read: list[tuple[int, bool]] = []
    original = DocumentStream.batch

    def batch(self: DocumentStream, first_row: int, rows: int, step: int = 1) -> Batch:
        read.append((first_row, threading.current_thread() is threading.main_thread()))
        if first_row == 40:
            raise OSError("the text is gone")
        return original(self, first_row, rows, step)

    monkeypatch.setattr(DocumentStream, "batch", batch)
    batches = Batches(stream, ALONE, torch.device("cpu"))
    first, second, third, gone = (StepRows(row, 2) for row in (0, 2, 30, 40))
    for step, following in ((first, second), (second, StepRows(4, 2)), (third, gone)):  # after the second a rollback
        taken = batches.take(step, following)
        expected = original(stream, step.first_row, 2)
        assert torch.equal(taken.batch.tokens, expected.tokens)
        assert taken.targets == count_targets(expected.tokens, expected.mask)
    with pytest.raises(OSError, match="the text is gone"):
        batches.take(gone, None)
    assert sorted(read) == [(0, True), (2, False), (4, False), (30, True), (40, False)]
