"""Work that goes layer by layer on several ranks (gloo): what one rank makes of it, a kill, and another number of ranks."""

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks, run_ranks
from rounding import FORWARD, GRADIENT, TRAINED, assert_trained_alike, error
from safetensors.torch import load_file
from tiny import write_tiny_checkpoint, write_tiny_tokens
from tiny_cuts import Cut, without_some_experts

from slimqwen.calibration import walk
from slimqwen.calibration.calibrate import calibrate
from slimqwen.calibration.statistics import Statistics
from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.core import torchrun
from slimqwen.depth.drops import LayerDrops
from slimqwen.depth.measure import DepthEffort, measure_depth
from slimqwen.healing.heal import heal
from slimqwen.healing.layers import Healing
from slimqwen.layerwise.ranks import share_of
from slimqwen.layerwise.stream import Stream
from slimqwen.planning.measured_depth import MeasuredDepth
from slimqwen.recipe import CalibrationRecipe, Execution, HealingRecipe, TextSettings
from slimqwen.refit.layers import Refit
from slimqwen.refit.refit import refit

pytestmark = pytest.mark.rounding

TEXT = TextSettings(sequence_length=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint and tokens."""
    folder = tmp_path_factory.mktemp("layers_on_ranks")
    tokenizer, _ = write_tiny_tokens(folder)
    write_tiny_checkpoint(folder / "checkpoint", tokenizer=tokenizer)
    return folder


def test_shares_are_neighbours_and_every_row_once() -> None:
    assert [share_of(5, rank, 4) for rank in range(4)] == [slice(0, 2), slice(2, 3), slice(3, 4), slice(4, 5)]
    for rows in range(9):
        for size in range(1, 7):
            shares = [range(rows)[share_of(rows, rank, size)] for rank in range(size)]
            assert [row for share in shares for row in share] == list(range(rows))
            lengths = [len(share) for share in shares]
            assert max(lengths) - min(lengths) <= 1 and lengths[0] == max(lengths)


# --- statistics -------------------------------------------------------------------------------------------------------


def measure(folder: Path, out: Path, killed_in: int | None = None) -> None:
    """`calibrate` layer by layer on five sequences of each of two sources; rank 1 ends without a word in a layer."""
    usual, read = walk.add_layer_sums, Checkpoint.read
    reads: Counter[str] = Counter()

    def add_or_end(statistics: Statistics, number: int, *rest: Any) -> None:
        if number == killed_in and torchrun.rank() == 1:
            os._exit(9)
        usual(statistics, number, *rest)

    def read_and_count(self: Checkpoint, name: str) -> torch.Tensor:
        reads[name] += 1
        return read(self, name)

    walk.add_layer_sums, Checkpoint.read = add_or_end, read_and_count  # type: ignore[method-assign]
    try:
        calibrate(
            folder / "checkpoint",
            out,
            recipe=CalibrationRecipe(samples=10, sources=dict.fromkeys(("code", "prose"), folder / "tokens")),
            text=TEXT,
            execution=Execution(streaming=True, batch_size=2),
            second_moments=True,
        )
    finally:
        walk.add_layer_sums, Checkpoint.read = usual, read  # type: ignore[method-assign]
    out.with_name(f"{out.name}.reads-{torchrun.rank()}").write_text(json.dumps(reads))


def assert_the_same_statistics(found: Path, expected: Path) -> None:
    mine, other = (Statistics.load(path) for path in (found, expected))
    assert (mine.tokens, mine.data, mine.sums.keys()) == (other.tokens, other.data, other.sums.keys())
    for name, sums in other.sums.items():
        assert error(mine.sums[name], sums) < FORWARD, name


def test_statistics_of_two_ranks_killed_and_continued_by_four_are_those_of_one(folder: Path, tmp_path: Path) -> None:
    """What was finished is not measured again; every rank reads a layer's weights once."""
    measure(folder, tmp_path / "one")
    codes, said = Ranks(2, measure, folder, tmp_path / "many", 2).end()
    assert codes == [1, 9], said
    left = tmp_path / ".many.layers.partial"
    assert sorted(path.name for path in left.iterdir() if path.name[0] != ".") == ["000", "001"]
    assert sorted(path.name for path in left.glob("*/hidden_states*")) == ["hidden_states.0-5", "hidden_states.5-10"]
    run_ranks(4, measure, folder, tmp_path / "many")
    assert_the_same_statistics(tmp_path / "many", tmp_path / "one")
    assert not left.exists()
    norm = "model.layers.{}.input_layernorm.weight"
    for rank in range(4):
        reads = json.loads((tmp_path / f"many.reads-{rank}").read_text())
        dense = {name: count for name, count in reads.items() if ".experts." not in name}
        assert set(dense.values()) == {1}, rank
        assert [norm.format(number) in dense for number in range(4)] == [False, False, True, True]


def test_hidden_states_are_read_from_the_files_of_another_number_of_ranks(folder: Path, tmp_path: Path) -> None:
    rows, hidden = 7, 32

    def stream_of(rank: int, size: int) -> Stream:
        share = share_of(rows, rank, size)
        stream = object.__new__(Stream)
        stream.checkpoint, stream._hidden_dtype = Checkpoint(folder / "checkpoint"), torch.float32
        stream._set_text(torch.zeros(share.stop - share.start, 5, dtype=torch.int64), None, share.start)
        return stream

    everything = torch.randn(rows, 4, hidden)
    for rank in range(3):
        stream_of(rank, 3).create(tmp_path / "hidden").copy_(everything[share_of(rows, rank, 3)])
    for size in (1, 2, 3, 4, 8):
        for rank in range(size):
            found = stream_of(rank, size).open(tmp_path / "hidden")
            assert torch.equal(found, everything[share_of(rows, rank, size)])
    stream_of(1, 3).remove(tmp_path / "hidden")
    with pytest.raises(FileNotFoundError, match="lacks 2 of 7 rows"):
        stream_of(0, 1).open(tmp_path / "hidden")


# --- layers changed ---------------------------------------------------------------------------------------------------


def ended_at(kind: type, method: str, number: int) -> None:
    """End rank 1 without a word at the `number`-th call of a method, from 1; never at 0."""
    usual, calls = getattr(kind, method), 0

    def call_or_end(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number and torchrun.rank() == 1:
            os._exit(9)
        return usual(*arguments)

    if number:
        setattr(kind, method, call_or_end)


def refit_until(cut: Cut, tokens: Path, out: Path, number: int = 0) -> None:
    ended_at(Refit, "__call__", number)
    execution = Execution(batch_size=2)
    refit(
        cut.student, out, teacher=cut.teacher, plan=cut.plan, tokens=tokens, text=TEXT, samples=9, execution=execution
    )


def heal_until(cut: Cut, tokens: Path, out: Path, number: int = 0) -> None:
    """Of a batch of two sequences a rank often has none."""
    ended_at(Healing, "__call__", number)
    recipe = HealingRecipe(samples=9, epochs=1, batch_size=2, learning_rate=1e-3)
    heal(cut.student, out, teacher=cut.teacher, plan=cut.plan, tokens=tokens, text=TEXT, recipe=recipe)


def made_by_many(make: Callable[..., None], folder: Path, tmp_path: Path) -> tuple[dict[str, Any], ...]:
    """What two ranks, killed in the third layer, and then four make of a cut; what one makes; the cut itself."""
    cut = without_some_experts(folder / "checkpoint", tmp_path)
    tokens = folder / "tokens"
    make(cut, tokens, tmp_path / "one")
    codes, said = Ranks(2, make, cut, tokens, tmp_path / "many", 3).end()
    assert codes == [1, 9], said
    finished = sorted((tmp_path / ".many.layers.partial").glob("[0-9]*"))
    assert [path.name for path in finished] == ["000", "001"]
    run_ranks(4, make, cut, tokens, tmp_path / "many")
    assert not finished[0].parent.exists()
    found = [load_file(path / "model.safetensors") for path in (tmp_path / "many", tmp_path / "one", cut.student)]
    assert any(not torch.equal(found[1][name], tensor) for name, tensor in found[2].items())
    return tuple(found)


def test_a_refit_by_two_ranks_killed_and_continued_by_four_is_that_of_one(folder: Path, tmp_path: Path) -> None:
    found, expected, _ = made_by_many(refit_until, folder, tmp_path)
    for name, tensor in expected.items():
        assert error(found[name], tensor) < GRADIENT, name


def test_layers_healed_by_two_ranks_killed_and_continued_by_four_are_those_of_one(folder: Path, tmp_path: Path) -> None:
    found, expected, _ = made_by_many(heal_until, folder, tmp_path)
    assert_trained_alike(found, expected)


# --- depth ------------------------------------------------------------------------------------------------------------


def measure_depth_until(folder: Path, statistics: Path, out: Path, number: int = 0) -> None:
    """Two of four layers: two rounds and some refits."""
    ended_at(LayerDrops, "_measure_round", number)
    measure_depth(
        folder / "checkpoint",
        out,
        statistics=statistics,
        tokens=folder / "tokens",
        num_hidden_layers=2,
        text=TEXT,
        effort=DepthEffort(samples=6, shortlist=2),
        execution=Execution(batch_size=2),
    )


def test_depth_measured_by_two_ranks_killed_and_continued_by_four_is_that_of_one(folder: Path, tmp_path: Path) -> None:
    statistics = tmp_path / "statistics"
    calibrate(
        folder / "checkpoint", statistics, tokens=folder / "tokens", recipe=CalibrationRecipe(samples=4), text=TEXT
    )
    measure_depth_until(folder, statistics, tmp_path / "one.json")
    codes, said = Ranks(2, measure_depth_until, folder, statistics, tmp_path / "many.json", 2).end()
    assert codes == [1, 9], said
    assert [path.name for path in tmp_path.glob(".many.json.rounds.partial/round*")] == ["round-000.json"]
    run_ranks(4, measure_depth_until, folder, statistics, tmp_path / "many.json")
    found, expected = (
        MeasuredDepth.model_validate_json((tmp_path / f"{name}.json").read_text()) for name in ("many", "one")
    )
    assert (found.data, found.tokens) == (expected.data, expected.tokens)
    assert [drop.dropped for drop in found.measured] == [drop.dropped for drop in expected.measured]
    assert any(drop.refitted_kl is not None for drop in found.measured)
    for mine, other in zip(found.measured, expected.measured, strict=True):
        assert mine.kl == pytest.approx(other.kl, rel=TRAINED)
        assert (mine.refitted_kl or 0) == pytest.approx(other.refitted_kl or 0, rel=TRAINED)
