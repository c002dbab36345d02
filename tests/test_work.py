"""Which steps a cut takes, and on which text."""

from pathlib import Path
from typing import Any

import pytest
from tiny import write_tiny_checkpoint, write_tiny_text, write_tiny_tokens

from slimqwen.calibration.statistics import Statistics
from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.core.errors import UserError
from slimqwen.data.tokenize import tokenize
from slimqwen.planning.plan import Plan
from slimqwen.recipe import Execution, PruningRecipe, Recipe, Source, Target
from slimqwen.runs.checks import check
from slimqwen.runs.recipe_run import STAGE_OUTPUTS
from slimqwen.runs.schedule import cut
from slimqwen.runs.stage import Stage
from slimqwen.runs.stages import Calibrating, calibration_sources
from slimqwen.runs.store import ScratchStore


def recipe(folder: Path, **sections: Any) -> Recipe:
    calibration = {"samples": 6, "depth_samples": 3, **sections.pop("calibration", {})}
    data = {"sequence_length": 16, **sections.pop("data", {})}
    return Recipe.model_validate(
        {
            "run_dir": folder / "run",
            "teacher": str(folder / "teacher"),
            "target": {},
            "calibration": calibration,
            "data": data,
            "distil": {"tokens": 64},
            "execution": {"batch_size": 3},
            **sections,
        }
    )


@pytest.fixture
def teacher(tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint and tokens of one text."""
    tokenizer, tokens = write_tiny_tokens(tmp_path / "texts")
    return write_tiny_checkpoint(tmp_path / "teacher", tokenizer=tokenizer), tokens


class Recording(ScratchStore):
    """A folder, and the names of what was made in it."""

    def __init__(self, folder: Path, execution: Execution) -> None:
        super().__init__(folder, execution)
        self.made: list[str] = []

    def get(self, stage: Stage) -> Path:
        self.made.append(stage.file)
        return super().get(stage)


def steps_of_a_cut(folder: Path, teacher: tuple[Path, Path], target: Target, **sections: Any) -> list[str]:
    """Return the names of what `cut` makes, in order."""
    checkpoint, tokens = teacher
    wanted, store = recipe(folder, **sections), Recording(folder, recipe(folder).execution)
    statistics = store.get(Calibrating(wanted, checkpoint, tokens))
    store.made.clear()
    last, plan_file = cut(wanted, checkpoint, statistics, store, tokens=tokens, target=target)
    assert set(store.made) <= set(STAGE_OUTPUTS)  # places that a run looks at before any work
    assert last == folder / store.made[-1] and Plan.load(plan_file).target.num_hidden_layers is not None
    return store.made


def test_a_cut_of_channels_alone_is_not_refitted(tmp_path: Path, teacher: tuple[Path, Path]) -> None:
    assert steps_of_a_cut(tmp_path, teacher, Target(hidden_size=24)) == ["plan.json", "pruned"]


def test_a_cut_of_experts_is_refitted(tmp_path: Path, teacher: tuple[Path, Path]) -> None:
    assert steps_of_a_cut(tmp_path, teacher, Target(hidden_size=24, num_experts=4)) == [
        "plan.json",
        "pruned",
        "refitted",
    ]


def test_a_cut_is_healed_where_the_recipe_asks_and_the_plan_is_the_same(
    tmp_path: Path, teacher: tuple[Path, Path]
) -> None:
    target = Target(hidden_size=24, num_experts=4)
    healing = {"samples": 6, "epochs": 1, "batch_size": 2}
    assert steps_of_a_cut(tmp_path, teacher, target, healing=healing) == [
        "plan.json",
        "pruned",
        "refitted",
        "healed",
    ]
    assert (
        Plan.load(tmp_path / "plan.json").pruning == PruningRecipe()
    )  # a plan is not made again because of what comes after it


def test_too_few_sequences_to_heal_on_are_told_before_any_work(tmp_path: Path, teacher: tuple[Path, Path]) -> None:
    with pytest.raises(UserError, match="raise samples to at least 2"):
        check(recipe(tmp_path, healing={"samples": 1}), Checkpoint(teacher[0]))


def test_layers_are_measured_where_the_recipe_asks_and_layers_go(tmp_path: Path, teacher: tuple[Path, Path]) -> None:
    pruning = {"depth": "measured", "refit_outputs": False}
    assert steps_of_a_cut(tmp_path, teacher, Target(num_hidden_layers=3), pruning=pruning) == [
        "depth.json",
        "plan.json",
        "pruned",
    ]


def test_no_layer_goes_and_none_is_measured(tmp_path: Path, teacher: tuple[Path, Path]) -> None:
    pruning = {"depth": "measured", "refit_outputs": False}
    assert steps_of_a_cut(tmp_path, teacher, Target(num_experts=4), pruning=pruning) == ["plan.json", "pruned"]


def test_a_mixture_is_calibrated_on_source_by_source(tmp_path: Path, teacher: tuple[Path, Path]) -> None:
    checkpoint, tokens = teacher
    sources = [
        Source(path=write_tiny_text(tmp_path / name, files=3), name=name, weight=weight)
        for name, weight in (("code", 3.0), ("prose", 1.0))
    ]
    mixed = tmp_path / "mixed"
    tokenize(sources, checkpoint, mixed, heldout_fraction=0.3)
    mixture = recipe(tmp_path, data={"sources": sources, "sequence_length": 16})
    assert calibration_sources(mixture, mixed) == {"code": mixed / "code", "prose": mixed / "prose"}
    out = tmp_path / "statistics.safetensors"
    Calibrating(mixture, checkpoint, mixed).make(out, mixture.execution, "calibrate")
    assert Statistics.load(out).sources == {"code": 48, "prose": 48}

    assert list(calibration_sources(mixture, tokens).values()) == [tokens]  # no mixture
    own = recipe(tmp_path, calibration={"sources": {"wiki": tokens}})
    assert calibration_sources(own, mixed) == {"wiki": tokens}
    weighted = recipe(
        tmp_path, data={"sources": sources, "sequence_length": 16}, pruning={"source_weights": {"code": 1, "prose": 2}}
    )
    check(weighted, Checkpoint(checkpoint))
