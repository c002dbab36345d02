"""`measure-depth`: the KL without layers is that of the model pruned so, and the search finds what can go."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import rounding
import torch
from safetensors.torch import load_file, save_file
from tiny import write_tiny_checkpoint, write_tiny_tokens
from tiny_families import FAMILIES_NATIVE
from torch import Tensor
from typer.testing import CliRunner

from slimqwen.calibration.calibrate import calibrate
from slimqwen.calibration.statistics import Part
from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.cli import app
from slimqwen.core.errors import UserError
from slimqwen.data.store import training_stream
from slimqwen.depth import drops
from slimqwen.depth.drops import LayerDrops, count_passes, keep_coordinates, seen_folds, unseen_rows
from slimqwen.depth.measure import DepthEffort, layers_at_once, measure_depth
from slimqwen.depth.search import REFITTED, Search
from slimqwen.families.canonical import full_attention_interval
from slimqwen.layerwise.memory import allot
from slimqwen.layerwise.side_by_side import STUDENT, TEACHER, SideBySide
from slimqwen.layerwise.stream import Stream
from slimqwen.model.model import load
from slimqwen.parallel.job import Job
from slimqwen.planning.measured_depth import Dropped, MeasuredDepth, MeasuredDrop
from slimqwen.planning.plan import plan
from slimqwen.pruning.cut import Cut
from slimqwen.recipe import CalibrationRecipe, Execution, PruningRecipe, Target, TextSettings
from slimqwen.refit.layers import Refit

SEQUENCE_LENGTH, SAMPLES = 16, 6
MEASURED = PruningRecipe(depth="measured", width="norm_activation")
IDLE = 1  # the layer that does next to nothing


class Measurable(NamedTuple):
    checkpoint: Path
    statistics: Path
    tokens: Path


def measurable(folder: Path, model_type: str = "mixtral", layers: int = 5) -> Measurable:
    """A tiny model whose layer IDLE adds a hundredth of what its weights would."""
    tokenizer, tokens = write_tiny_tokens(folder / "texts")
    native = FAMILIES_NATIVE[model_type]
    checkpoint = write_tiny_checkpoint(
        folder / "model", native=native, tokenizer=tokenizer, num_hidden_layers=layers, **kinds(native, layers)
    )
    source = Checkpoint(checkpoint)
    tensors = load_file(checkpoint / "model.safetensors")
    for name, spec in source.specs.items():
        if spec.block.layer == IDLE and len(spec.dims) > 1 and spec.dims[-2] == source.family.hidden:
            tensors[name] = 0.01 * tensors[name]
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    statistics = folder / "statistics.safetensors"
    recipe = CalibrationRecipe(samples=SAMPLES)
    calibrate(
        checkpoint,
        statistics,
        tokens=tokens,
        recipe=recipe,
        text=TextSettings(sequence_length=SEQUENCE_LENGTH, dtype="float32"),
    )
    return Measurable(checkpoint, statistics, tokens)


def kinds(native: dict[str, Any], layers: int) -> dict[str, Any]:
    """Layer types for another number of layers, where a family spells them out."""
    return {"layer_types": (native["layer_types"] * layers)[:layers]} if "layer_types" in native else {}


def measured(model: Measurable, out: Path, keep: int, **changed: Any) -> MeasuredDepth:
    effort = {name: changed.pop(name) for name in DepthEffort.model_fields if name in changed}
    settings: dict[str, Any] = {"tokens": model.tokens, "execution": Execution(batch_size=4)} | changed
    return measure_depth(
        model.checkpoint,
        out,
        statistics=model.statistics,
        num_hidden_layers=keep,
        text=TextSettings(sequence_length=SEQUENCE_LENGTH),
        effort=DepthEffort(**{"samples": SAMPLES} | effort),
        **settings,
    )


@torch.no_grad()
def referee(model: Measurable, dropped: Dropped, folder: Path) -> float:
    """The KL of the model really cut so, loaded as any checkpoint is."""
    source = Checkpoint(model.checkpoint)
    layers = [layer for layer in range(source.config["num_hidden_layers"]) if layer not in dropped]
    folder.mkdir()
    Cut(source, layers, {}, {}).write(folder, "test")
    rows = training_stream(model.tokens, SEQUENCE_LENGTH, 0).batch(0, SAMPLES).tokens

    def log_probabilities(checkpoint: Path) -> Tensor:
        whole = load(checkpoint)
        return (whole(rows, with_mtp=False).main @ whole.head.T).log_softmax(dim=-1)

    wanted, found = log_probabilities(model.checkpoint), log_probabilities(folder)
    return float((wanted.exp() * (wanted - found)).sum(dim=-1).mean())


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_next"])
def test_the_kl_without_layers_is_that_of_the_pruned_model(tmp_path: Path, model_type: str) -> None:
    model = measurable(tmp_path, model_type)
    result = measured(model, tmp_path / "depth.json", keep=3, shortlist=4)
    assert {len(drop.dropped) for drop in result.measured} == {1, 2}
    for number, drop in enumerate(result.measured):
        assert drop.kl == pytest.approx(referee(model, drop.dropped, tmp_path / str(number)), rel=1e-3, abs=1e-5)
    assert result.best(1) == (IDLE,) and IDLE in result.best(2)
    assert MeasuredDepth.load(tmp_path / "depth.json") == result
    assert list(tmp_path.glob("depth.json.*")) == [] and list(tmp_path.glob(".depth*")) == []


def test_slices_of_the_text_make_no_difference(tmp_path: Path) -> None:
    model = measurable(tmp_path)
    one = measured(model, tmp_path / "one.json", keep=3)
    other = measured(model, tmp_path / "other.json", keep=3, execution=Execution(batch_size=1, memory_budget=1))
    assert [drop.dropped for drop in one.measured] == [drop.dropped for drop in other.measured]
    for a, b in zip(one.measured, other.measured, strict=True):
        assert a.kl == pytest.approx(b.kl, rel=1e-3)


def test_passes_by_hand() -> None:
    assert count_passes([(), (1,), (1, 3)], layers=4) == 4 + 2
    assert count_passes([(), (0,)], layers=3) == 3 + 2


# The search


class Table:
    """KLs by the layers left out, in place of a model: the sets that it measures are recorded."""

    def __init__(self, kl: dict[Dropped, float]) -> None:
        self._kl, self.measured_sets = kl, list[list[Dropped]]()

    def measure(self, sets: list[Dropped], name: str) -> list[MeasuredDrop]:
        self.measured_sets.append(sets)
        return [MeasuredDrop(dropped=drop, kl=self._kl.get(drop, 9.0)) for drop in sets]


def test_one_more_layer_in_each_round_and_runs_in_the_last() -> None:
    """Influence shortlists 1, 3 and 0 of 0 to 4; without 3 the KL is smaller; the run 0, 1 wins in the end."""
    influence = [0.3, 0.1, 0.5, 0.2, 0.9]
    table = Table({(1,): 0.5, (3,): 0.4, (0,): 0.6, (1, 3): 0.9, (0, 3): 1.1, (0, 1): 0.8})
    found = Search(influence, 2, 3, []).run(table)
    assert table.measured_sets == [[(1,), (3,), (0,)], [(1, 3), (0, 3), (2, 3), (0, 1)]]
    result = MeasuredDepth(checkpoint="", data="", tokens=1, measured=found)
    assert result.best(2) == (0, 1) and result.best(1) == (3,)


def test_a_round_grows_what_the_round_before_chose() -> None:
    """A run that beats it at the end is a candidate, and never a beginning."""
    table = Table({(0,): 0.1, (0, 2): 0.2, (0, 2, 3): 0.3})
    found = Search([0.1, 0.9, 0.2, 0.3, 0.8], 3, 2, []).run(table)
    assert table.measured_sets[:2] == [[(0,), (2,)], [(0, 2), (0, 3)]]
    assert min(found, key=lambda drop: (-len(drop.dropped), drop.kl)).dropped == (0, 2, 3)


def test_neighbours_that_cannot_go_together_go_one_by_one() -> None:
    """Of linear, full, linear either pair of neighbours has the attention."""
    table = Table({(0,): 0.1, (0, 2): 0.2})
    found = Search([0.1, 0.2, 0.3], 2, 8, [1], at_once=2).run(table)
    assert [drop.dropped for drop in found] == [(0,), (2,), (0, 2)]


def test_one_full_attention_layer_stays() -> None:
    search = Search([0.1, 0.2, 0.3], 2, 3, [0, 1])
    assert search.grow((0,)) == [(0, 2)]
    assert search.contiguous_runs() == [(1, 2)]


# As a stage


def test_interrupted_and_continued_is_uninterrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = measurable(tmp_path)
    whole = measured(model, tmp_path / "whole.json", keep=3)
    usual = LayerDrops._measure_round
    rounds: list[str] = []

    def counted(self: Any, sets: list[Dropped], name: str, last: int) -> Any:
        if len(rounds) == last:
            raise KeyboardInterrupt
        rounds.append(name)
        return usual(self, sets, name)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LayerDrops, "_measure_round", lambda self, sets, name: counted(self, sets, name, 1))
        measured(model, tmp_path / "out.json", keep=3)
    assert not (tmp_path / "out.json").exists()
    monkeypatch.setattr(LayerDrops, "_measure_round", lambda self, sets, name: counted(self, sets, name, 9))
    assert measured(model, tmp_path / "out.json", keep=3) == whole
    assert rounds == ["round 1 of 2", "round 2 of 2"]


def test_a_plan_drops_what_was_measured(tmp_path: Path) -> None:
    model = measurable(tmp_path)
    result = measured(model, tmp_path / "depth.json", keep=3)

    def planned(target: Target, depth: Path | MeasuredDepth | None) -> list[int]:
        out = tmp_path / "plan.json"
        settings: dict[str, Any] = {"statistics": model.statistics, "pruning": MEASURED}
        return plan(model.checkpoint, out, target=target, depth=depth, **settings).kept_layers

    for keep in (3, 4):
        kept = planned(Target(num_hidden_layers=keep), tmp_path / "depth.json")
        assert set(range(5)) - set(kept) == set(result.best(5 - keep))
    assert planned(Target(), None) == list(range(5))  # no layer goes: nothing is needed
    with pytest.raises(UserError, match=r"run `slimqwen measure-depth` with this target first"):
        planned(Target(num_hidden_layers=4), None)
    with pytest.raises(UserError, match="the target drops 3 layers, and what was measured drops 1, 2"):
        planned(Target(num_hidden_layers=2), result)
    with pytest.raises(UserError, match="dropping layers was not measured on"):
        planned(Target(num_hidden_layers=3), result.model_copy(update={"checkpoint": "another"}))
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(UserError, match=r"is not a measurement of slimqwen\.depth/1"):
        planned(Target(num_hidden_layers=3), tmp_path / "broken.json")
    with pytest.raises(UserError, match="cannot be read"):
        planned(Target(num_hidden_layers=3), tmp_path / "none.json")


def test_what_cannot_be_measured_is_one_sentence(tmp_path: Path) -> None:
    model = measurable(tmp_path)
    other = write_tiny_checkpoint(tmp_path / "other", seed=3)
    with pytest.raises(UserError, match="the statistics were not measured on"):
        measured(model._replace(checkpoint=other), tmp_path / "depth.json", keep=3)
    for keep in (5, 0):
        with pytest.raises(UserError, match=f"has 5 layers, so 1 to 4 can stay, not {keep}"):
            measured(model, tmp_path / "depth.json", keep=keep)


def test_the_commands(tmp_path: Path) -> None:
    model = measurable(tmp_path)
    (tmp_path / "target.yaml").write_text("num_hidden_layers: 4\n")
    (tmp_path / "pruning.yaml").write_text("depth: measured\nwidth: norm_activation\n")
    common = ["--target", tmp_path / "target.yaml", "--statistics", model.statistics]
    options = [*common, "--tokens", model.tokens, "--out", tmp_path / "depth.json", "--samples", SAMPLES]
    options += ["--sequence-length", SEQUENCE_LENGTH]
    result = CliRunner().invoke(app, ["measure-depth", str(model.checkpoint), *map(str, options)])
    assert result.exit_code == 0, result.output
    options = [*common, "--depth", tmp_path / "depth.json", "--pruning", tmp_path / "pruning.yaml"]
    options += ["--out", tmp_path / "plan.json"]
    result = CliRunner().invoke(app, ["plan", str(model.checkpoint), *map(str, options)])
    assert result.exit_code == 0, result.output
    (tmp_path / "target.yaml").write_text("num_experts: 2\n")
    options = [*common, "--tokens", model.tokens]
    result = CliRunner().invoke(app, ["measure-depth", str(model.checkpoint), *map(str, options)])
    assert isinstance(result.exception, UserError) and "names no num_hidden_layers" in str(result.exception)


# After the refit


class Unchanged:
    """A change of every layer that is none."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def passes(self, _course: Any) -> int:
        return 1

    def __call__(
        self, course: Any, hidden: Tensor, target: Any, folder: Path, before: Path | None, progress: Any
    ) -> None:
        with self._stream.weights_of(course.student):
            self._stream.advance(course.student, hidden, progress.advance)


@pytest.mark.parametrize("dropped", [(1, 2), (3, 4)])
def test_a_stream_without_layers_is_the_pruned_model(tmp_path: Path, dropped: Dropped) -> None:
    """Without the last layers too: what follows them follows the last that is left."""
    model = measurable(tmp_path, "qwen3_next")
    walk = walk_of(model, tmp_path / "work")
    whole, left = walk._stream.without(()), walk._stream.without(dropped)
    kept = [step.number for step in left.steps if step.number is not None]
    layers = tmp_path / "layers"
    layers.mkdir()
    *_, last = SideBySide(left, whole, kept, keep_coordinates, Job()).run(Unchanged(left), layers, "walk")
    (kl,) = walk._compute_divergences(whole.open(last.with_name(TEACHER)), [left.open(last.with_name(STUDENT))])
    assert kl == pytest.approx(referee(model, dropped, tmp_path / "pruned"), rel=1e-3, abs=1e-5)


def walk_of(model: Measurable, folder: Path, rows: Tensor | None = None) -> LayerDrops:
    folder.mkdir()
    source = Checkpoint(model.checkpoint)
    rows = training_stream(model.tokens, SEQUENCE_LENGTH, 0).batch(0, SAMPLES).tokens if rows is None else rows
    settings: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu")}
    allotment = allot(
        source,
        Execution(device="cpu", batch_size=2, memory_budget=10_000_000),
        rows=SAMPLES,
        sequence_length=SEQUENCE_LENGTH,
        dtype=torch.float32,
    )
    parts = [Part("text", row % 2) for row in range(SAMPLES)]
    return LayerDrops(Stream(source, rows, allotment, **settings), parts, folder, "walk", Job())


def test_the_refit_sees_even_rows_alone(tmp_path: Path) -> None:
    """Other text in the odd rows changes what is measured on them, and no refitted matrix."""
    model = measurable(tmp_path)
    rows = training_stream(model.tokens, SEQUENCE_LENGTH, 0).batch(0, SAMPLES).tokens
    other = rows.clone()
    other[1::2] = rows[1::2].flip(1)
    found = []
    for name, text in (("one", rows), ("other", other)):
        walk = walk_of(model, tmp_path / name, text)
        left = walk._stream.without((IDLE, 3))
        refit = Refit(left, Job(), seen_folds(walk._parts), torch.tensor([row % 2 == 1 for row in range(SAMPLES)]))
        layers = tmp_path / f"{name}-layers"
        layers.mkdir()
        files = SideBySide(left, walk._stream.without(()), [0, 2, 4], keep_coordinates, Job()).run(
            refit, layers, "walk"
        )
        found.append([load_file(file) for file in files])
    source = Checkpoint(model.checkpoint)
    changed = 0
    for one, another in zip(*found, strict=True):
        for name, tensor in one.items():
            assert rounding.error(another[name], tensor) < rounding.GRADIENT
            changed += not torch.equal(tensor, source.read(name))
    assert changed > 0


def test_what_the_refit_makes_up_for_best_is_chosen(tmp_path: Path) -> None:
    model = measurable(tmp_path)
    result = measured(model, tmp_path / "depth.json", keep=3)
    refitted = [drop for drop in result.measured if drop.refitted_kl is not None]
    plain = {drop.dropped: drop.kl for drop in result.measured if drop.refitted_kl is None}
    assert 1 <= len(refitted) <= REFITTED + 1 and all(len(drop.dropped) == 2 for drop in refitted)
    assert all(plain[drop.dropped] == drop.kl for drop in refitted)
    assert result.best(2, refitted=True) == min(refitted, key=lambda drop: drop.refitted_kl or 0.0).dropped
    assert measured(model, tmp_path / "without.json", keep=3, refit=False).measured == [
        drop for drop in result.measured if drop.refitted_kl is None
    ]


def test_no_row_is_both_refitted_on_and_measured() -> None:
    """Of a text with fewer sequences than samples some come twice."""
    rows = torch.tensor([[1, 2], [3, 4], [5, 6], [1, 2], [3, 4], [7, 8]])
    parts = [Part("a", half) for half in (0, 0, 0, 1, 1, 1)]
    assert unseen_rows(rows, parts).tolist() == [False] * 5 + [True]


def test_sources_of_one_sequence_each_are_measured_without_a_refit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second of a source would be the one to measure on."""
    model = measurable(tmp_path)
    sources = {"one": model.tokens, "two": model.tokens}
    result = measured(model, tmp_path / "depth.json", keep=4, tokens=sources, samples=2)
    assert result.measured and all(drop.refitted_kl is None for drop in result.measured)
    assert "no sequence is left that a refit would not have seen" in " ".join(capsys.readouterr().err.split())


def test_the_best_by_hand() -> None:
    drops = [MeasuredDrop(dropped=(1,), kl=0.2), MeasuredDrop(dropped=(2,), kl=0.3), MeasuredDrop(dropped=(3,), kl=0.1)]
    after = [drops[0].model_copy(update={"refitted_kl": 0.05}), drops[2].model_copy(update={"refitted_kl": 0.07})]
    result = MeasuredDepth(checkpoint="", data="", tokens=1, measured=drops + after)
    assert result.best(1) == (3,) and result.best(1, refitted=True) == (1,)
    assert MeasuredDepth(checkpoint="", data="", tokens=1, measured=drops).best(1, refitted=True) == (3,)


def test_folds_of_what_the_refit_sees() -> None:
    one = [Part("a", half) for half in (0, 0, 0, 1, 1)]
    assert [fold.tolist() for fold in seen_folds(one)] == [
        [True, False, True, False, False],
        [False, True, False, False, False],
    ]
    two = [Part("a", 0), Part("a", 1), Part("b", 0)]
    assert [fold.tolist() for fold in seen_folds(two)] == [[True, False, False], [False, False, True]]
    assert seen_folds([Part("a", 0), Part("a", 1)]) == []


# Whole periods


def test_whole_periods_go_where_the_target_is_some_of_them_fewer() -> None:
    alternating = {"layer_types": ["linear_attention"] * 3 + ["full_attention"]}
    config = {"layer_types": alternating["layer_types"] * 4}
    assert [layers_at_once(config, count) for count in (1, 3, 4, 6, 8)] == [1, 1, 4, 1, 4]
    assert layers_at_once({"layer_types": ["full_attention"] * 8}, 4) == 1
    assert layers_at_once({"layer_types": ["full_attention", "linear_attention", *config["layer_types"]]}, 4) == 1
    assert layers_at_once({}, 4) == 1

    influence = [0.5, 0.4, 0.1, 0.2, 0.1, 0.3, 0.9, 0.9, 0.8, 0.2, 0.2, 0.3, 0.2, 0.9, 0.9, 0.9]
    table = Table({(2, 3, 4, 5): 0.1, (2, 3, 4, 5, 9, 10, 11, 12): 0.3})
    found = Search(influence, 8, 2, [3, 7, 11, 15], at_once=4).run(table)
    assert table.measured_sets[0] == [(2, 3, 4, 5), (1, 2, 3, 4)]
    assert len(table.measured_sets) == 2
    for drop in found:
        left = [kind for layer, kind in enumerate(config["layer_types"]) if layer not in drop.dropped]
        assert full_attention_interval({"layer_types": left}) == 4
    assert min(found, key=lambda drop: (-len(drop.dropped), drop.kl)).dropped == (2, 3, 4, 5, 9, 10, 11, 12)


def test_killed_while_a_refit_is_cleared_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is half removed must not be taken for finished: its hidden states would be zeros."""
    model = measurable(tmp_path)
    whole = measured(model, tmp_path / "whole.json", keep=3)

    def killed(folder: Path) -> None:
        for stream in folder.rglob(f"{STUDENT}.*"):
            stream.unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(drops.shutil, "rmtree", killed)
        measured(model, tmp_path / "out.json", keep=3)
    assert measured(model, tmp_path / "out.json", keep=3) == whole
