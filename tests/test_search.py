"""Searching a shape by KL: the curves by hand, a model with worthless experts, resuming, and agreement with `evaluate`."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from ranks import run_ranks
from rounding import FORWARD
from safetensors.torch import load_file, save_file
from test_cli import assert_one_sentence, slimqwen
from tiny import tiny_config, write_tiny_checkpoint, write_tiny_tokens

from slimqwen.calibration.calibrate import calibrate
from slimqwen.core.errors import UserError
from slimqwen.data.store import load_manifest
from slimqwen.evaluation.evaluate import evaluate
from slimqwen.families.qwen3_next import QWEN3_NEXT
from slimqwen.planning.plan import plan
from slimqwen.pruning.prune import prune
from slimqwen.recipe import (
    CalibrationRecipe,
    EvaluationRecipe,
    Execution,
    ExpertRecipe,
    PruningRecipe,
    Target,
    TextSettings,
)
from slimqwen.recipe.file import load_recipe
from slimqwen.search import gauge
from slimqwen.search.gauge import Gauge
from slimqwen.search.result import SearchResult, tables
from slimqwen.search.search import search
from slimqwen.search.sensitivity import Axes, Curve, agreeing_pairs, predicted, spread
from slimqwen.search.settings import SearchSettings
from slimqwen.shapes.fit import SEARCHED, feasible

SEQUENCE_LENGTH = 16
MEASURED_TOKENS = 128
BUDGETS = "total=82K"
PRUNING = PruningRecipe(
    width="norm_activation", compensate=False, experts=ExpertRecipe(importance="frequency"), refit_outputs=False
)


class World(NamedTuple):
    teacher: Path
    tokens: Path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A teacher of 16 experts, the last 8 of which say nothing and are hardly ever asked."""
    folder = tmp_path_factory.mktemp("search")
    tokenizer, tokens = write_tiny_tokens(folder)
    layers = ["linear_attention", "full_attention"]
    sizes = {"num_hidden_layers": 2, "num_experts": 16, "moe_intermediate_size": 32}
    teacher = write_tiny_checkpoint(folder / "teacher", tokenizer=tokenizer, layer_types=layers, **sizes)
    tensors = load_file(teacher / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("mlp.gate.weight"):
            tensor[8:] = 0
        elif any(f".experts.{expert}.down_proj" in name for expert in range(8, 16)):
            tensor.zero_()
    save_file(tensors, teacher / "model.safetensors", metadata={"format": "pt"})
    return World(teacher, tokens)


def settings(pruning: PruningRecipe = PRUNING, shapes: int = 2) -> SearchSettings:
    return SearchSettings(
        pruning=pruning,
        samples=16,
        measured_tokens=MEASURED_TOKENS,
        sequence_length=SEQUENCE_LENGTH,
        align=4,
        sizes_per_axis=2,
        shapes=shapes,
    )


def run_search(world: World, work: Path, budgets: str = BUDGETS, shapes: int = 2) -> SearchResult:
    return search(str(world.teacher), budgets, work, tokens=world.tokens, settings=settings(shapes=shapes))


@pytest.fixture(scope="module")
def found(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SearchResult]:
    work = tmp_path_factory.mktemp("found")
    return work, run_search(world, work)


def test_a_curve_is_quadratic_between_what_was_measured() -> None:
    curve = Curve.through(16, {8: 1.0, 4: 4.0})
    assert curve == Curve([4, 8, 16], [4.0, 1.0, 0.0])
    assert curve.at(np.array([4, 6, 8, 12, 16])).tolist() == pytest.approx([4.0, 2.25, 1.0, 0.25, 0.0])
    assert Curve([4, 8], [-0.01, 0.0]).at(np.array([4, 6, 8])).tolist() == [0.0, 0.0, 0.0]


def test_a_prediction_is_the_sum_over_axes() -> None:
    shapes = np.array([[4, 32, 16, 16, 2], [2, 24, 16, 16, 2]])
    curves = {"num_hidden_layers": Curve([2, 4], [1.0, 0.0]), "hidden_size": Curve([16, 32], [0.5, 0.0])}
    assert predicted(shapes, curves, base=0.125).tolist() == pytest.approx([0.125, 0.125 + 1.0 + 0.125])


def test_the_measured_sizes_reach_from_the_smallest_to_the_largest() -> None:
    assert spread([1, 2, 3, 4, 5, 6, 7], 3) == [1, 4, 7]
    assert spread([1, 2], 3) == [1, 2]
    assert spread([1, 2, 3], 1) == [1]


def test_agreeing_pairs() -> None:
    assert agreeing_pairs([1.0, 2.0, 3.0], [10.0, 30.0, 20.0]) == (2, 3)
    assert agreeing_pairs([1.0], [1.0]) == (0, 0)


def test_only_whole_blocks_are_searched_where_there_are_any() -> None:
    kinds = (["linear_attention"] * 3 + ["full_attention"]) * 2
    config = QWEN3_NEXT.normalise(
        tiny_config(num_hidden_layers=8, layer_types=kinds, mlp_layer_types=["sparse"] * 8, num_experts=24)
    )
    found = feasible(QWEN3_NEXT, config, "total=0.1M", align=8)
    whole = found.of_whole_blocks()
    assert set(found.shapes[:, 0]) > set(whole.shapes[:, 0]) == {4, 8}
    assert whole.candidates([0, 2], 2) == found.candidates([0, 2], 2), "the first of the list, in its order"
    pinned = feasible(QWEN3_NEXT, config, "total=0.1M,num_hidden_layers=7", align=8)
    assert len(pinned.of_whole_blocks().shapes) == len(pinned.shapes) > 0


def test_each_axis_is_cut_alone() -> None:
    config = QWEN3_NEXT.normalise(tiny_config(num_experts=24, num_experts_per_tok=10))
    found = feasible(QWEN3_NEXT, config, "total=0.1M,num_key_value_heads=1", align=8).of_whole_blocks()
    axes = Axes(found)
    assert axes.base == Target(num_key_value_heads=1), "what all shapes share is no axis of the search"
    assert axes.alone("hidden_size", 16) == Target(num_key_value_heads=1, hidden_size=16)
    assert axes.alone("num_experts", 8) == Target(num_key_value_heads=1, num_experts=8, num_experts_per_tok=8)
    cuts = axes.cuts(2)
    for column, field in enumerate(SEARCHED):
        occurring = set(found.shapes[:, column].tolist()) - {config[field]}
        sizes = [size for name, size, _ in cuts if name == field]
        assert sizes == sorted({min(occurring), max(occurring)}) if occurring else not sizes
    counts = {(field, size): counts for field, size, counts in cuts}
    assert counts["num_experts", 8].total_parameters < axes.base_counts.total_parameters


def test_worthless_experts_are_what_goes(found: tuple[Path, SearchResult]) -> None:
    _, result = found
    kl = {(cut.field, cut.size): cut.kl for cut in result.sensitivities}
    by_arithmetic = next(shape for shape in result.shapes if shape.arithmetic_place == 1)
    best = result.shapes[0]
    assert kl["num_experts", 8] < 0.2 * min(kl["hidden_size", 20], kl["moe_intermediate_size", 16])
    assert best.candidate.target.num_experts == 8 and best.candidate.target.hidden_size == 32
    assert by_arithmetic.candidate.target.num_experts == 16, "an example in which arithmetic goes wrong"
    assert by_arithmetic.measured_kl is not None and best.measured_kl is not None
    assert best.measured_kl < 0.5 * by_arithmetic.measured_kl


def test_shapes_are_ranked_by_what_was_measured_then_by_prediction(found: tuple[Path, SearchResult]) -> None:
    work, result = found
    measured = [shape.measured_kl for shape in result.shapes if shape.measured_kl is not None]
    rest = [shape.predicted_kl for shape in result.shapes if shape.measured_kl is None]
    assert len(measured) == 3 and measured == sorted(measured)
    assert [shape.measured_kl for shape in result.shapes[:3]] == measured, "what was measured comes first"
    assert len(rest) >= 2 and rest == sorted(rest)
    assert SearchResult.model_validate_json((work / "search.json").read_text()) == result
    text = tables(result)
    assert f"{measured[0]:.4f}" in text and "moe_intermediate_size" in text and "of the 3 pairs" in text


def test_the_measured_kl_is_that_of_evaluate(world: World, found: tuple[Path, SearchResult], tmp_path: Path) -> None:
    _, result = found
    best = result.shapes[0]
    calibrate(
        world.teacher,
        tmp_path / "statistics.safetensors",
        tokens=world.tokens,
        recipe=CalibrationRecipe(samples=16),
        text=TextSettings(sequence_length=SEQUENCE_LENGTH),
    )
    plan(
        world.teacher,
        tmp_path / "plan.json",
        statistics=tmp_path / "statistics.safetensors",
        target=best.candidate.target,
        pruning=PRUNING,
    )
    prune(world.teacher, tmp_path / "pruned", plan=tmp_path / "plan.json")
    evaluation = evaluate(
        {"teacher": world.teacher, "pruned": tmp_path / "pruned"},
        tmp_path / "evaluation.json",
        tokens=world.tokens,
        recipe=EvaluationRecipe(tokens=MEASURED_TOKENS, acceptance={"prompts": 1, "new_tokens": 8}),
        text=TextSettings(sequence_length=SEQUENCE_LENGTH),
    )
    assert best.measured_kl == pytest.approx(evaluation.models["pruned"].kl_to_teacher, rel=FORWARD)
    assert evaluation.models["pruned"].total_parameters == best.candidate.counts.total_parameters


def test_nothing_is_measured_twice(
    world: World, found: tuple[Path, SearchResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, uninterrupted = found
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "thesis.txt").write_text("the user's")
    cut: list[Target] = []
    original = gauge.cut

    def cut_unless_interrupted(*arguments: Any, target: Target, **options: Any) -> tuple[Path, Path]:
        if len(cut) == 3 and target not in cut:
            cut.append(target)
            raise KeyboardInterrupt
        cut.append(target)
        return original(*arguments, target=target, **options)

    monkeypatch.setattr(gauge, "cut", cut_unless_interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_search(world, tmp_path)
    assert not (tmp_path / "search.json").exists()
    assert run_search(world, tmp_path) == uninterrupted
    assert [target for target in set(cut) if cut.count(target) == 2] == [cut[3]], (
        "only the interrupted cut is made again"
    )
    made = len(cut)
    assert run_search(world, tmp_path) == uninterrupted and len(cut) == made
    assert run_search(world, tmp_path, shapes=3).sensitivities == uninterrupted.sensitivities
    assert len(cut) <= made + 1, "another search shares what it can"
    assert not list(tmp_path.rglob("model*.safetensors")), "checkpoints do not pile up"
    assert (tmp_path / "cut" / "thesis.txt").read_text() == "the user's"


@pytest.mark.rounding
def test_two_ranks_find_what_one_finds(world: World, found: tuple[Path, SearchResult], tmp_path: Path) -> None:
    """With the statistics and the first cuts of one rank's search, which ended on the way."""
    work, alone = found
    for name in ("statistics", "kl"):
        shutil.copytree(work / name, tmp_path / name)
    shutil.copytree(work / ".steps", tmp_path / ".steps")
    kept = sorted((tmp_path / "kl").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    for folder in kept[-2:]:
        shutil.rmtree(folder)
    run_ranks(2, run_search, world, tmp_path)
    result = SearchResult.model_validate_json((tmp_path / "search.json").read_text())
    assert [shape.candidate for shape in result.shapes] == [shape.candidate for shape in alone.shapes]
    for mine, other in zip(result.shapes, alone.shapes, strict=True):
        assert (mine.measured_kl is None) == (other.measured_kl is None)
        assert (mine.measured_kl or 0.0) == pytest.approx(other.measured_kl or 0.0, rel=FORWARD)
        assert mine.predicted_kl == pytest.approx(other.predicted_kl, rel=FORWARD)
    assert not list(tmp_path.rglob("model*.safetensors"))


def test_a_search_removes_nothing_that_it_did_not_write(world: World, tmp_path: Path) -> None:
    (tmp_path / ".cut").mkdir()
    (tmp_path / ".cut" / "thesis.txt").write_text("the user's")
    with pytest.raises(UserError, match=r"\.cut is in the way and was not written by slimqwen"):
        run_search(world, tmp_path)
    assert (tmp_path / ".cut" / "thesis.txt").read_text() == "the user's"


@pytest.mark.parametrize("place", ["teacher", "tokens", "tokens/search", "."])
def test_a_search_works_apart_from_what_it_reads(world: World, place: str) -> None:
    with pytest.raises(UserError, match=r"--work .* (lies in|holds) the (teacher|tokens) .*, which is read here"):
        run_search(world, world.teacher.parent / place)


def test_a_refitted_model_is_what_is_measured(world: World, tmp_path: Path) -> None:
    refit = PRUNING.model_copy(update={"refit_outputs": True})
    target = Target(num_experts=8, moe_intermediate_size=8)
    plain, refitted = (
        Gauge(settings(pruning).recipe(str(world.teacher), tmp_path, Execution()), world.tokens, None, "test").kl(
            target
        )
        for pruning in (PRUNING, refit)
    )
    assert refitted > 0 and abs(refitted / plain - 1) > 1e-3


def test_pinned_sizes_count_for_every_shape(world: World, tmp_path: Path) -> None:
    result = run_search(
        world, tmp_path, "total=82K,num_key_value_heads=1,num_experts_per_tok=2,moe_intermediate_size=32", shapes=1
    )
    assert result.base == Target(num_key_value_heads=1) and result.base_kl > 0
    assert {cut.field for cut in result.sensitivities} == {"hidden_size", "num_experts"}
    assert all(shape.predicted_kl >= result.base_kl for shape in result.shapes)
    assert all(shape.candidate.target.num_key_value_heads == 1 for shape in result.shapes)
    assert "(pinned sizes)" in tables(result)


def test_the_command(world: World, tmp_path: Path) -> None:
    (tmp_path / "pruning.yaml").write_text("{experts: {refit: false}}")
    budgets = f"{BUDGETS},hidden_size=32,num_experts_per_tok=2"
    command = ("plan", "search", world.teacher, budgets, "--align", 4, "--tokens", world.tokens)
    command += ("--pruning", "pruning.yaml")
    small = ("--shapes", 1, "--samples", 8, "--sequence-length", SEQUENCE_LENGTH, "--measured-tokens", 64)
    result = slimqwen(*command, *small, "--out", "target.yaml", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    saved = json.loads((tmp_path / "search" / "search.json").read_text())
    assert load_recipe(tmp_path / "target.yaml", model=Target).model_dump() == saved["shapes"][0]["candidate"]["target"]
    assert "num_experts" in result.stdout and "measured KL" in result.stdout
    assert "left" in result.stderr and f"search {len(saved['sensitivities'])}/" in result.stderr
    statistics = next((tmp_path / "search" / "statistics").glob("*/statistics.safetensors"))
    again = slimqwen(*command, *small, "--statistics", statistics, "--json", cwd=tmp_path)
    assert json.loads(again.stdout) == saved


def test_what_cannot_be_measured_is_one_sentence(world: World, tmp_path: Path) -> None:
    search = ("plan", "search", world.teacher, BUDGETS, "--align", 4)
    config = ("plan", "search", world.teacher / "config.json", *search[3:])
    assert_one_sentence(slimqwen(*config, "--tokens", world.tokens), 2, "config without weights", "slimqwen plan fit")
    assert_one_sentence(
        slimqwen(*search, "--tokens", tmp_path / "none", "--work", tmp_path / "w"), 2, "folder of tokens"
    )
    heldout = load_manifest(world.tokens).heldout.tokens
    longer = ("--sequence-length", heldout, "--work", tmp_path / "w")
    assert_one_sentence(slimqwen(*search, "--tokens", world.tokens, *longer), 2, f"{heldout:,} held-out tokens")
    too_small = ("plan", "search", world.teacher, "total=1K", "--tokens", world.tokens, "--work", tmp_path / "w")
    assert_one_sentence(slimqwen(*too_small), 2, "can't be reached")
    assert not (tmp_path / "w").exists(), "nothing was begun"
