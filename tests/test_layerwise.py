"""The layer-by-layer engine: one stream over a text, what a visitor receives, files of hidden states, resuming."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import rounding
import torch
from tiny import write_tiny_checkpoint
from torch import Tensor

import slimqwen.layerwise
from slimqwen.artifacts import make_folder
from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.core.errors import StageFailed
from slimqwen.core.progress import Progress
from slimqwen.families.family import Block
from slimqwen.layerwise import stream as stream_module
from slimqwen.layerwise.memory import allot
from slimqwen.layerwise.step import Step
from slimqwen.layerwise.stream import Rows, Stream, Visitor, create_file_backed
from slimqwen.layerwise.walk import walk_layers
from slimqwen.layerwise.weights import dense_tensors
from slimqwen.model.model import load
from slimqwen.parallel.job import Job
from slimqwen.recipe import Execution

ROWS, SEQUENCE_LENGTH, HIDDEN_SIZE = 7, 8, 32
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(write_tiny_checkpoint(tmp_path_factory.mktemp("layerwise") / "checkpoint"))


@pytest.fixture(scope="module")
def tokens(checkpoint: Checkpoint) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(checkpoint.config["vocab_size"], (ROWS, SEQUENCE_LENGTH + 1), generator=generator)


def stream_of(checkpoint: Checkpoint, tokens: Rows, **options: Any) -> Stream:
    allotment = allot(
        checkpoint,
        Execution(device="cpu", batch_size=2, memory_budget=10**9),
        rows=ROWS,
        sequence_length=SEQUENCE_LENGTH,
        dtype=torch.float32,
    )
    assert (allotment.rows_per_pass, allotment.rows_per_chunk) == (2, ROWS)
    return Stream(checkpoint, tokens, allotment, torch.float32, CPU, **options)


class Seen(Visitor):
    """Records the rows of each chunk and the hidden states around each layer."""

    def __init__(self) -> None:
        self.chunks: list[tuple[int, int]] = []
        self.received: list[tuple[int | None, Tensor, Tensor]] = []
        self.open = False

    @contextmanager
    def chunk(self, rows: slice) -> Iterator[None]:
        self.chunks.append((rows.start, rows.stop))
        self.open = True
        yield
        self.open = False

    def receive(self, step: Step, before: Tensor, after: Tensor) -> None:
        assert self.open
        self.received.append((step.number, before.clone(), after.clone()))


@torch.inference_mode()
def taken_through(stream: Stream, visitor: Visitor | None = None, in_place: bool = True) -> tuple[Tensor, Tensor, int]:
    """The backbone's and the MTP module's final hidden states, and how many tokens were counted."""
    counted: list[int] = []
    hidden = stream.embed(torch.empty(stream.shape))
    *decoder, mtp = stream.steps
    for step in decoder:
        out = hidden if in_place else torch.empty_like(hidden)
        with stream.weights_of(step):
            stream.advance(step, hidden, counted.append, out=out, visitor=visitor, with_norm=True)
        hidden = out
    drafted = torch.empty_like(hidden)
    with stream.weights_of(mtp):
        stream.advance(mtp, hidden, counted.append, out=drafted, visitor=visitor, with_norm=True)
    return hidden, drafted, sum(counted)


@pytest.mark.rounding
def test_layer_after_layer_is_the_models_forward_pass(checkpoint: Checkpoint, tokens: Tensor) -> None:
    stream = stream_of(checkpoint, tokens)
    main, mtp, counted = taken_through(stream)
    with torch.inference_mode():
        expected = load(checkpoint.folder)(tokens)
    assert expected.mtp is not None
    assert rounding.error(main, expected.main) < rounding.FORWARD
    assert rounding.error(mtp, expected.mtp) < rounding.FORWARD
    assert counted == tokens[:, 1:].numel() * len(stream.steps)


def test_in_place_and_into_another_tensor_are_the_same_bits(checkpoint: Checkpoint, tokens: Tensor) -> None:
    stream = stream_of(checkpoint, tokens)
    for one, another in zip(taken_through(stream)[:2], taken_through(stream, in_place=False)[:2], strict=True):
        assert torch.equal(one, another)


def test_a_visitor_receives_what_goes_in_and_out_and_changes_nothing(checkpoint: Checkpoint, tokens: Tensor) -> None:
    stream, seen = stream_of(checkpoint, tokens, sections=[3, 4]), Seen()
    main, _, _ = taken_through(stream, seen)
    assert torch.equal(main, taken_through(stream)[0])
    assert seen.chunks == [(0, 3), (3, 7)] * len(stream.steps)  # no chunk has rows of two sections
    numbers = [number for number, _, _ in seen.received]
    assert numbers == [number for number in [*range(len(stream.steps) - 1), None] for _ in range(2)]
    first = stream.embed(torch.empty(stream.shape))
    assert torch.equal(seen.received[0][1], first[:3]) and torch.equal(seen.received[1][1], first[3:])
    assert torch.equal(seen.received[0][2], seen.received[2][1])  # what leaves a layer goes into the next one


def test_a_text_that_is_read_when_it_is_needed(checkpoint: Checkpoint, tokens: Tensor) -> None:
    class Lazy:
        shape = tuple(tokens.shape)

        def __getitem__(self, rows: slice) -> Tensor:
            assert rows.stop <= 3 or rows.start >= 3, "rows of two sections"
            return tokens[rows]

    expected = taken_through(stream_of(checkpoint, tokens, sections=[3, 4]))
    for found, wanted in zip(
        taken_through(stream_of(checkpoint, Lazy(), sections=[3, 4]))[:2], expected[:2], strict=True
    ):
        assert torch.equal(found, wanted)


def test_another_text_and_fewer_layers_leave_the_stream_as_it_is(checkpoint: Checkpoint, tokens: Tensor) -> None:
    stream = stream_of(checkpoint, tokens)
    steps = list(stream.steps)
    assert stream.on(tokens[:2]).shape == (2, SEQUENCE_LENGTH, HIDDEN_SIZE)
    assert [step.number for step in stream.without([1]).steps] == [0, 2, 3]
    assert stream.shape == (ROWS, SEQUENCE_LENGTH, HIDDEN_SIZE) and stream.steps == steps


@pytest.mark.rounding
def test_the_norm_after_the_last_layer_needs_no_weights_of_the_layer(
    checkpoint: Checkpoint, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = stream_of(checkpoint, tokens)
    last = [step for step in stream.steps if step.number is not None][-1]
    before = torch.randn(stream.shape, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = load(checkpoint.folder).backbone.get_decoder().norm(before)
        put: list[str] = []
        usual = stream_module.weights_of

        def record(blocks: list[Block], *rest: Any) -> Any:
            put.extend(name for block in blocks for name in dense_tensors(block))
            return usual(blocks, *rest)

        monkeypatch.setattr(stream_module, "weights_of", record)
        stream.apply_norm(last, before)
    assert put == ["model.norm.weight"]
    assert rounding.error(before, expected) < rounding.FORWARD


# Files of hidden states


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_states_in_a_file_are_written_through_and_read_back(
    checkpoint: Checkpoint, tokens: Tensor, tmp_path: Path, dtype: torch.dtype
) -> None:
    stream = stream_of(checkpoint, tokens, hidden_dtype=dtype)
    written = stream.embed(stream.create(tmp_path / "hidden"))
    assert (tmp_path / f"hidden.0-{ROWS}").stat().st_size == ROWS * SEQUENCE_LENGTH * HIDDEN_SIZE * dtype.itemsize
    read = stream.open(tmp_path / "hidden")
    assert read.dtype == dtype and torch.equal(read, written)
    read.zero_()  # a private mapping: the file keeps what it has
    assert torch.equal(stream.open(tmp_path / "hidden"), written)


def test_a_new_file_of_hidden_states_holds_zeros_whatever_lay_there(tmp_path: Path) -> None:
    create_file_backed(tmp_path / "hidden", 2, 3).fill_(7.0)
    assert torch.equal(create_file_backed(tmp_path / "hidden", 2, 3), torch.zeros(2, 3))


def test_hidden_states_that_are_not_there_are_not_zeros(checkpoint: Checkpoint, tokens: Tensor, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="lacks 7 of 7 rows"):
        stream_of(checkpoint, tokens).open(tmp_path / "missing")


def test_a_disk_without_room_for_hidden_states_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StageFailed, match="the disk is full"), make_folder(tmp_path / "out"):
        walk_layers(
            tmp_path,
            1,
            lambda _number, _before, after, _progress: create_file_backed(after / "hidden", 4) and None,
            job=Job(),
            tokens=1,
            title="walk",
            hidden_states=["hidden"],
        )
    assert not (tmp_path / "000").exists()


def test_a_file_system_that_reserves_no_space_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    hidden = create_file_backed(tmp_path / "hidden", 2, 3)
    hidden[1] = 5
    assert (tmp_path / "hidden").stat().st_size == 24


# The walk


def test_a_walk_continues_with_the_layer_under_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    taken: list[tuple[int, str | None]] = []

    def take(number: int, before: Path | None, after: Path, progress: Progress) -> None:
        taken.append((number, None if before is None else (before / "hidden.0-1").read_text()))
        if len(taken) == 3:
            raise KeyboardInterrupt
        (after / "hidden.0-1").write_text(f"after {number}")
        (after / "sums").write_text(f"sums of {number}")
        progress.advance(10)

    def walk() -> list[Path]:
        return walk_layers(tmp_path, 4, take, job=Job(), tokens=10, title="walk", hidden_states=["hidden"])

    with pytest.raises(KeyboardInterrupt):
        walk()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000", "001"]
    folders = walk()
    assert [number for number, _ in taken] == [0, 1, 2, 2, 3]
    assert [before for _, before in taken] == [None, "after 0", "after 1", "after 1", "after 2"]
    assert [(path / "sums").read_text() for path in folders] == [f"sums of {number}" for number in range(4)]
    assert [path.name for path in folders if (path / "hidden.0-1").exists()] == ["003"]
    assert "walk: 40/40 token-layers" in capsys.readouterr().err
    assert walk() == folders and len(taken) == 5  # all is there: nothing is taken again


# One engine


def test_no_other_room_takes_a_text_through_layers_by_itself() -> None:
    """What puts a layer's weights in place is used by the room alone: others go through a Stream."""
    parts_of_the_engine = re.compile(r"\b(weights_of|without_weights|steps_of|embed_tokens)\b")
    for file in Path(slimqwen.layerwise.__path__[0]).parent.rglob("*.py"):
        if file.parent.name != "layerwise":
            imports = re.findall(r"from slimqwen\.layerwise[\w.]* import (\([^)]*\)|.*)", file.read_text())
            assert not parts_of_the_engine.search(" ".join(imports)), file
