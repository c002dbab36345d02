"""What a plan says it chose: layers, share of the stream, experts and outliers, and a warning of what stands out and goes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from settings import paper
from tiny import write_tiny_checkpoint, write_tiny_tokens
from tiny_families import FAMILIES_NATIVE
from typer.testing import CliRunner

from slimqwen.calibration.calibrate import calibrate
from slimqwen.calibration.statistics import Statistics
from slimqwen.cli import app
from slimqwen.core.errors import UserError
from slimqwen.planning.chosen import choice_text, plan_warnings
from slimqwen.planning.plan import Plan, plan
from slimqwen.recipe import (
    CalibrationRecipe,
    DepthCriterion,
    ExpertImportance,
    ExpertSimilarity,
    PruningRecipe,
    Target,
    TextSettings,
    WidthCriterion,
)

SUPER, ITS_BLOCK = 3, "model.layers.1"


class Measured(NamedTuple):
    checkpoint: Path
    statistics: Statistics


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """Layer 3 does far more than the others, and expert 3 of layer 1 writes much, to very few tokens."""
    folder = tmp_path_factory.mktemp("measured")
    tokenizer, tokens = write_tiny_tokens(folder / "texts")
    checkpoint = write_tiny_checkpoint(
        folder / "model", tokenizer=tokenizer, native=FAMILIES_NATIVE["mixtral"], num_hidden_layers=4
    )
    recipe = CalibrationRecipe(samples=12)
    statistics = calibrate(
        checkpoint,
        folder / "statistics.safetensors",
        tokens=tokens,
        recipe=recipe,
        text=TextSettings(sequence_length=32),
        second_moments=True,
    )
    sums = dict(statistics.sums)
    for part, tokens_of in statistics.tokens.items():
        experts = f"{part.prefix}experts/{ITS_BLOCK}/"
        gates, norms = sums[experts + "gate_sums"].clone(), sums[experts + "gated_norm_sums"].clone()
        gates[SUPER] = 0.01
        norms[SUPER] = 0.01 * 50 * float((norms / gates).median())
        influence = torch.tensor([0.1, 0.1, 0.2, 0.9], dtype=torch.float64)
        sums |= {
            experts + "gate_sums": gates,
            experts + "gated_norm_sums": norms,
            f"{part.prefix}layers/cosine_sums": (1 - influence) * tokens_of["main"],
        }
    statistics.sums = sums
    statistics.save(folder / "edited.safetensors")
    return Measured(checkpoint, Statistics.load(folder / "edited.safetensors"))


@pytest.fixture
def planned(measured: Measured, tmp_path: Path) -> Callable[..., Plan]:
    def make(experts: dict[str, Any] | None = None, target: dict[str, int] | None = None, **pruning: Any) -> Plan:
        return plan(
            measured.checkpoint,
            tmp_path / "plan.json",
            statistics=measured.statistics,
            target=Target(**(target or {"num_experts": 4})),
            pruning=PruningRecipe.model_validate({**pruning, "experts": experts or {}}),
        )

    return make


def kept(made: Plan) -> list[int]:
    return [group.base for group in made.expert_groups[ITS_BLOCK]]


def test_a_super_expert_stays_whatever_its_gates_say(planned: Callable[..., Plan]) -> None:
    made = planned({"importance": "soft_logits"})
    assert made.outliers == {ITS_BLOCK: [SUPER]}
    assert SUPER in kept(made) and list(plan_warnings(made)) == []
    assert f"outliers   {ITS_BLOCK}: expert {SUPER}, outputs far larger" in choice_text(made)
    assert SUPER in kept(planned({"importance": "frequency", "compression": "merge"}))
    alone = next(
        group for group in planned({"compression": "merge"}).expert_groups[ITS_BLOCK] if SUPER in group.members
    )
    assert alone.members == [SUPER]


def test_where_it_is_not_kept_a_warning_names_it(
    planned: Callable[..., Plan], capsys: pytest.CaptureFixture[str]
) -> None:
    made = planned({"importance": "soft_logits", "keep_outliers": False})
    assert SUPER not in kept(made)
    (warning,) = plan_warnings(made)
    assert f"drops or merges expert {SUPER} of {ITS_BLOCK}" in warning
    assert warning in capsys.readouterr().err
    assert f"{ITS_BLOCK}: dropped" in choice_text(made)


def test_a_dropped_layer_that_stands_out_is_a_warning(planned: Callable[..., Plan]) -> None:
    """Influences 0.1, 0.1, 0.2 and 0.9: the last is 6 times the median, 0.15."""
    made = planned(target={"num_hidden_layers": 3}, depth="last")
    (warning,) = plan_warnings(made)
    assert "drops layer 3, whose block influence 0.900 is 6.0 times the median" in warning
    line = "layers     4 -> 3 by position ('last'); dropped, with their block influence: 3 (0.900) (median 0.150)"
    assert line in choice_text(made)
    better = planned(target={"num_hidden_layers": 3}, depth="block_influence")
    assert list(plan_warnings(better)) == []
    assert "dropped, with their block influence: 1 (0.100)" in choice_text(better)


def test_the_width_is_said_with_what_it_keeps(planned: Callable[..., Plan]) -> None:
    text = choice_text(planned(target={"hidden_size": 24}))
    made = planned(target={"hidden_size": 24})
    assert f"width      32 -> 24 directions with {sum(made.scores.hidden[:24]):.1%} of the second moments" in text
    assert "readers refitted, ridge" in text and "on one source of text ('training')" in text
    assert "experts" not in text
    channels = choice_text(planned(target={"hidden_size": 24}, width="norm_activation"))
    assert channels.splitlines()[0] == "width      32 -> 24 channels by mean |norm output| ('norm_activation')"
    assert choice_text(planned(target={"num_experts": 6})).splitlines() == [
        f"outliers   {ITS_BLOCK}: expert {SUPER}, outputs far larger than the others'"
    ]


@pytest.mark.parametrize("criterion", [c for c in DepthCriterion if c != DepthCriterion.MEASURED])
def test_every_depth_criterion_that_needs_no_measurement_plans(
    planned: Callable[..., Plan], criterion: DepthCriterion
) -> None:
    made = planned(target={"num_hidden_layers": 3}, depth=criterion)
    assert len(made.kept_layers) == 3 and f"by {criterion.in_words}" in choice_text(made)


@pytest.mark.parametrize("criterion", WidthCriterion)
def test_every_width_criterion_plans(planned: Callable[..., Plan], criterion: WidthCriterion) -> None:
    made = planned(target={"hidden_size": 24}, width=criterion)
    assert len(made.kept["hidden"]) == 24
    assert (f"by {criterion.in_words}" in choice_text(made)) == (criterion != WidthCriterion.ROTATION)


@pytest.mark.parametrize("importance", ExpertImportance)
@pytest.mark.parametrize("similarity", ExpertSimilarity)
def test_every_expert_criterion_plans(
    planned: Callable[..., Plan], importance: ExpertImportance, similarity: ExpertSimilarity
) -> None:
    made = planned({"importance": importance, "similarity": similarity, "compression": "merge"})
    assert f"by {importance.in_words}, others merged ('merge')" in choice_text(made)
    assert sorted(member for group in made.expert_groups[ITS_BLOCK] for member in group.members) == list(range(6))


def test_the_papers_method_protects_nobody(planned: Callable[..., Plan]) -> None:
    made = planned(**paper().model_dump())
    assert not made.pruning.experts.keep_outliers and made.pruning == PruningRecipe().as_published()


def test_the_command_prints_it(measured: Measured, tmp_path: Path) -> None:
    (tmp_path / "target.yaml").write_text("num_hidden_layers: 3\nnum_experts: 4\nhidden_size: 24\n")
    measured.statistics.save(tmp_path / "s.safetensors")
    (tmp_path / "pruning.yaml").write_text("depth: last\n")
    options = ["--target", tmp_path / "target.yaml", "--statistics", tmp_path / "s.safetensors"]
    options += ["--out", tmp_path / "plan.json", "--pruning", tmp_path / "pruning.yaml"]
    result = CliRunner().invoke(app, ["plan", str(measured.checkpoint), *map(str, options)])
    assert result.exit_code == 0, result.output
    assert choice_text(Plan.load(tmp_path / "plan.json")) in result.stdout
    as_json = CliRunner().invoke(app, ["plan", str(measured.checkpoint), *map(str, options), "--json"])
    assert as_json.stdout.startswith("{")


def test_the_command_chooses_by_the_papers_criteria(measured: Measured, tmp_path: Path) -> None:
    """By --paper; a file of criteria beside it is refused."""
    (tmp_path / "target.yaml").write_text("num_hidden_layers: 3\nnum_experts: 4\n")
    (tmp_path / "pruning.yaml").write_text("depth: last\n")
    measured.statistics.save(tmp_path / "s.safetensors")
    common = ["plan", measured.checkpoint, "--target", tmp_path / "target.yaml"]
    common += ["--statistics", tmp_path / "s.safetensors", "--out", tmp_path / "plan.json"]
    result = CliRunner().invoke(app, list(map(str, [*common, "--paper"])))
    assert result.exit_code == 0, result.output
    assert Plan.load(tmp_path / "plan.json").pruning == PruningRecipe().as_published()
    refused = CliRunner().invoke(app, list(map(str, [*common, "--paper", "--pruning", tmp_path / "pruning.yaml"])))
    assert isinstance(refused.exception, UserError) and "without --pruning" in str(refused.exception)
