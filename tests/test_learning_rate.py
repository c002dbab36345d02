"""`learning_rate: auto`: what the forks say decides, the training is the one at the chosen rate, and nothing is done twice."""

import json
import math
import os
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks
from rounding import FORWARD, TRAINED, assert_trained_alike
from safetensors.torch import load_file
from settings import sections
from test_carry import write_plan
from test_pipeline import tiny_recipe
from tiny import write_tiny_checkpoint, write_tiny_tokens
from torch import Tensor
from typer.testing import CliRunner

from slimqwen.builtin import checkpoint_folder
from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.cli import app
from slimqwen.core.errors import Preempted, StageFailed, UserError
from slimqwen.data.tokenize import tokenize
from slimqwen.recipe import AUTO_REFERENCE, DistilRecipe, Execution, Recipe, Source, TeacherRecipe, TextSettings
from slimqwen.reporting.run_folder import read_learning_rates
from slimqwen.runs.recipe_run import run
from slimqwen.study.catalogue.definition import at_both_rates
from slimqwen.study.variation import Variation
from slimqwen.teacher_cache.write import write_teacher_cache
from slimqwen.training import learning_rate, schedules
from slimqwen.training.cached_teacher import CachedTeacher
from slimqwen.training.course import compute_course
from slimqwen.training.distil import distil, state_folder_of
from slimqwen.training.inputs import TrainingInputs
from slimqwen.training.learning_rate import (
    FEWEST_STEPS,
    FILE,
    MOST_FORKS,
    SHARE,
    RateChoice,
    best_exponent,
    fork_steps,
)
from slimqwen.training.moments import carry
from slimqwen.training.rate_search import lowest_point, next_exponent
from slimqwen.training.trainer import Span, Trainer

LENGTH, BATCH_SIZE, STEPS = 16, 2, 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`student`, a `teacher` of another width, and `tokens`; read-only."""
    folder = tmp_path_factory.mktemp("learning_rate")
    tokenizer, _ = write_tiny_tokens(folder)
    two_layers = {"num_hidden_layers": 2, "full_attention_interval": 2}
    write_tiny_checkpoint(folder / "student", tokenizer=tokenizer, **two_layers)
    write_tiny_checkpoint(folder / "teacher", seed=1, tokenizer=tokenizer, hidden_size=40, num_experts=4, **two_layers)
    return folder


def recipe(**changes: Any) -> dict[str, Any]:
    """Return the arguments `recipe` and `execution`."""
    usual = {
        "tokens": STEPS * BATCH_SIZE * LENGTH,
        "batch_size": BATCH_SIZE,
        "learning_rate": "auto",
        "warmup": "2 steps",
        "save_every": "5 steps",
    }
    return sections(DistilRecipe, usual | changes)


def train(folder: Path, out: Path, changes: dict[str, Any] | None = None, **arguments: Any) -> Path:
    """`distil` on the files of `folder`, by one process or, called in each, by several."""
    read = {name: arguments.pop(name) for name in ("teacher_cache", "moments") if name in arguments}
    teacher = arguments.pop("teacher", folder / "teacher")
    inputs = TrainingInputs(folder / "student", folder / "tokens", teacher=teacher, **read)
    return distil(inputs, out, **recipe(**changes or {}), **{"text": TextSettings(sequence_length=LENGTH)} | arguments)


@pytest.fixture(scope="module")
def trained(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an undisturbed training leaves."""
    return train(folder, tmp_path_factory.mktemp("trained") / "out")


def weights(checkpoint: Path) -> bytes:
    return (checkpoint / "model.safetensors").read_bytes()


def tensors(checkpoint: Path) -> dict[str, Tensor]:
    return load_file(checkpoint / "model.safetensors")


def count_steps(monkeypatch: pytest.MonkeyPatch, fail_at: int | None = None) -> list[float]:
    """The learning rate's peak of every optimiser step from now on; the step `fail_at` is never made."""
    made: list[float] = []
    step = Trainer.step

    def counted(self: Trainer, number: int) -> dict[str, float]:
        if len(made) == fail_at:
            raise KeyError("killed")
        made.append(self.recipe.peak_learning_rate)
        return step(self, number)

    monkeypatch.setattr(Trainer, "step", counted)
    return made


# --- the walk over rates ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lowest", [-3.3, -1.0, -0.2, 0.0, 0.4, 1.7, 2.6])
def test_the_walk_ends_around_the_lowest_point(lowest: float) -> None:
    values: dict[int, float] = {}
    while (exponent := next_exponent(values, MOST_FORKS)) is not None:
        assert exponent not in values
        values[exponent] = 0.3 + (exponent - lowest) ** 2
    assert len(values) <= MOST_FORKS
    assert lowest_point(values) == pytest.approx(lowest)  # a parabola is found exactly


def test_the_walk_does_not_go_on_for_ever() -> None:
    values: dict[int, float] = {}
    while (exponent := next_exponent(values, MOST_FORKS)) is not None:
        values[exponent] = -float(exponent)
    assert len(values) == MOST_FORKS and lowest_point(values) == max(values)


def test_where_forks_break_the_walk_goes_down() -> None:
    values: dict[int, float] = {}
    while (exponent := next_exponent(values, MOST_FORKS)) is not None:
        values[exponent] = math.inf if exponent > -2 else abs(exponent + 3.0)
    assert lowest_point(values) == -3.0
    with pytest.raises(StageFailed, match=r"diverges at each of 0\.0002, 0\.0004"):
        best_exponent({0: math.inf, -1: math.inf})


@pytest.mark.parametrize(("length", "count"), [(1, 1), (6, 3), (100, FEWEST_STEPS), (100_000, 500)])
def test_a_fork_is_spread_over_the_stage(length: int, count: int) -> None:
    steps = fork_steps(Span(7, 7 + length, 7 + length))
    assert len(steps) == len(set(steps)) == count and steps[0] >= 7 and steps[-1] < 7 + length
    gaps = {later - earlier for earlier, later in pairwise(steps)}
    assert not gaps or max(gaps) - min(gaps) <= 1
    if length == 100_000:
        assert MOST_FORKS * count == SHARE * length


# --- the training -----------------------------------------------------------------------------------------------------


def test_the_training_is_the_one_at_the_chosen_rate(folder: Path, trained: Path, tmp_path: Path) -> None:
    choice = RateChoice.load(trained / FILE)
    assert choice.measured == "kd" and choice.text == "held-out" and choice.steps == FEWEST_STEPS
    assert choice.tokens == FEWEST_STEPS * BATCH_SIZE * LENGTH and choice.training_tokens == STEPS * BATCH_SIZE * LENGTH
    by_rate = {fork.rate: fork.value for fork in choice.forks}
    assert len(by_rate) >= 3 and len(set(by_rate.values())) == len(by_rate)
    assert min(by_rate.values()) < choice.before

    end = 3e-5 * choice.rate / AUTO_REFERENCE
    out = train(folder, tmp_path / "out", {"learning_rate": choice.rate, "final_learning_rate": end})
    assert weights(out) == weights(trained)  # no fork has left a trace
    assert not (out / FILE).exists()
    lines = [
        [json.loads(line)["learning_rate"] for line in (of.parent / "metrics.jsonl").read_text().splitlines()]
        for of in (out, trained)
    ]
    assert lines[0] == lines[1] and len(lines[0]) == STEPS
    assert lines[0][1] == choice.rate and lines[0][-1] == pytest.approx(end)


def test_a_killed_choice_goes_on_where_it_was(
    folder: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice = RateChoice.load(trained / FILE)
    with monkeypatch.context() as patch, pytest.raises(KeyError, match="killed"):
        count_steps(patch, fail_at=2 * FEWEST_STEPS + 3)  # in the third fork
        train(folder, tmp_path / "out")
    left = RateChoice.load(state_folder_of(tmp_path / "out") / FILE)
    assert left.forks == choice.forks[:2] and left.chosen is None

    made = count_steps(monkeypatch)
    out = train(folder, tmp_path / "out")
    assert RateChoice.load(out / FILE) == choice and weights(out) == weights(trained)
    forks = [fork.rate for fork in choice.forks[2:]]
    assert made == [rate for rate in forks for _ in range(FEWEST_STEPS)] + [choice.rate] * STEPS


def test_a_resumed_training_asks_no_fork(
    folder: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice = RateChoice.load(trained / FILE)
    forks = len(choice.forks) * FEWEST_STEPS
    with monkeypatch.context() as patch, pytest.raises(KeyError, match="killed"):
        count_steps(patch, fail_at=forks + 12)
        train(folder, tmp_path / "out")
    made = count_steps(monkeypatch)
    out = train(folder, tmp_path / "out")
    assert made == [choice.rate] * (STEPS - 10)  # from the state after ten steps
    assert weights(out) == weights(trained)


@pytest.mark.parametrize("micro_batch_size", [None, 1])  # after the step, and within it
def test_sigterm_keeps_the_forks_that_have_ended(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, micro_batch_size: int | None
) -> None:
    made: list[int] = []
    step = Trainer.step

    def signalled(self: Trainer, number: int) -> dict[str, float]:
        made.append(number)
        if len(made) == FEWEST_STEPS + 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, number)

    monkeypatch.setattr(Trainer, "step", signalled)
    with pytest.raises(Preempted, match="finished forks are kept"):
        train(folder, tmp_path / "out", {"micro_batch_size": micro_batch_size})
    assert len(made) == FEWEST_STEPS + 1
    assert len(RateChoice.load(state_folder_of(tmp_path / "out") / FILE).forks) == 1


def test_a_fork_that_breaks_is_no_candidate(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Trainer.step

    def breaking(self: Trainer, number: int) -> dict[str, float]:
        if self.recipe.peak_learning_rate > 3e-4:
            self.leave_out(number, "loss nan")
        return step(self, number)

    monkeypatch.setattr(Trainer, "step", breaking)
    choice = RateChoice.load(train(folder, tmp_path / "out", {"bad_steps": "skip"}) / FILE)
    assert [fork.value for fork in choice.forks if fork.rate > 3e-4] == [None]
    assert choice.best == 2e-4


def test_without_a_teacher_the_loss_decides(folder: Path, tmp_path: Path) -> None:
    choice = RateChoice.load(train(folder, tmp_path / "out", {"terms": ["lm", "mtp_lm"]}, teacher=None) / FILE)
    assert choice.measured == "lm" and choice.before > 5.0  # as random weights predict
    mtp = RateChoice.load(train(folder, tmp_path / "mtp", {"terms": ["mtp_kd"]}) / FILE)
    assert mtp.measured == "mtp_kd"


def test_without_held_out_text_rows_that_no_fork_trains_on_decide(folder: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("x = 1\n")
    tokens = tmp_path / "tokens"
    tokenize(
        [Source(path=folder / "text")],
        folder / "tokenizer",
        tokens,
        heldout_sources=[Source(path=short)],
        execution=Execution(workers=1),
    )
    distil(
        TrainingInputs(folder / "student", tokens, teacher=folder / "teacher"),
        tmp_path / "out",
        **recipe(),
        text=TextSettings(sequence_length=LENGTH),
    )
    assert RateChoice.load(tmp_path / "out" / FILE).text == "training"


def test_a_cached_teacher_decides_on_rows_that_no_fork_trains_on(folder: Path, tmp_path: Path, trained: Path) -> None:
    """Nothing is stored about the held-out text."""
    settings = TeacherRecipe(top_k=128, exact=True)
    cache = write_teacher_cache(
        folder / "teacher",
        tmp_path / "cache",
        tokens=folder / "tokens",
        recipe=settings,
        text=TextSettings(sequence_length=LENGTH),
    )
    read: list[set[int]] = []
    signal_of = CachedTeacher.signal

    def noted(self: Any, batch: Any) -> Any:
        read.append({place.row for place in batch.places})
        return signal_of(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CachedTeacher, "signal", noted)
        out = train(folder, tmp_path / "out", {"teacher": "cache"}, teacher=None, teacher_cache=cache)
    choice = RateChoice.load(out / FILE)
    assert choice.text == "training" and choice.measured == "kd"
    batches = STEPS - FEWEST_STEPS  # that are measured: here all that a fork leaves
    measured, fork = set.union(*read[:batches]), read[batches : STEPS + batches]
    assert len(measured) == batches * BATCH_SIZE and set.union(*fork[FEWEST_STEPS:]) == measured
    assert not set.union(*fork[:FEWEST_STEPS]) & measured
    assert choice.before == pytest.approx(RateChoice.load(trained / FILE).before, rel=0.2)  # of other text


def test_forks_begin_with_the_moments_that_the_training_begins_with(folder: Path, tmp_path: Path) -> None:
    """Carried moments change what a fork does, and the training after it is still the one at the chosen rate."""
    changes = {"optimizer": {"at_cut": "carry"}, "terms": ["lm", "mtp_lm"]}
    first = train(folder, tmp_path / "first", changes | {"learning_rate": 1e-3}, teacher=None, keep_state=True)
    plan = write_plan(tmp_path / "plan.json", first)  # which keeps everything
    moments = carry(state_folder_of(first), first, tmp_path / "moments", plan=plan)
    auto = train(folder, tmp_path / "auto", changes, teacher=None, moments=moments)
    choice = RateChoice.load(auto / FILE)
    without = RateChoice.load(train(folder, tmp_path / "without", changes, teacher=None) / FILE)
    assert choice.before == without.before and choice.forks[0].value != without.forks[0].value
    end = 3e-5 * choice.rate / AUTO_REFERENCE
    fixed = changes | {"learning_rate": choice.rate, "final_learning_rate": end}
    assert weights(train(folder, tmp_path / "fixed", fixed, teacher=None, moments=moments)) == weights(auto)


def train_shortly(folder: Path, out: Path, changes: dict[str, Any]) -> None:
    """Four steps, and two forks of two; called in each rank."""
    learning_rate.MOST_FORKS = 2
    train(folder, out, {"tokens": 4 * BATCH_SIZE * LENGTH, "save_every": "4 steps"} | changes)


def test_ranks_choose_together(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks find what one finds, but for rounding, and what forks did to their shards is undone."""
    monkeypatch.setattr(learning_rate, "MOST_FORKS", 2)
    train_shortly(folder, tmp_path / "alone", {})
    run_ranks(2, train_shortly, folder, tmp_path / "pair", {})
    found, expected = RateChoice.load(tmp_path / "pair" / FILE), RateChoice.load(tmp_path / "alone" / FILE)
    assert found.before == pytest.approx(expected.before, rel=FORWARD)
    assert [fork.rate for fork in found.forks] == [fork.rate for fork in expected.forks] and len(found.forks) == 2
    for fork, other in zip(found.forks, expected.forks, strict=True):
        assert fork.value == pytest.approx(other.value, rel=TRAINED)
    assert found.rate == expected.rate  # of two forks the better one, without a parabola
    assert_trained_alike(tensors(tmp_path / "pair"), tensors(tmp_path / "alone"), found.rate)

    fixed = {"learning_rate": found.rate, "final_learning_rate": 3e-5 * found.rate / AUTO_REFERENCE}
    run_ranks(2, train_shortly, folder, tmp_path / "fixed", fixed)
    assert weights(tmp_path / "pair") == weights(tmp_path / "fixed")


# --- in a run, and on the command line --------------------------------------------------------------------------------


def test_each_stage_of_a_run_has_its_own_rate(tmp_path: Path) -> None:
    """Baselines too; the report and the model card tell, and nothing is chosen twice."""
    settings = {"tokens": 16 * 2 * 10, "batch_size": 2, "warmup": "2 steps", "learning_rate": "auto"}
    wanted = tiny_recipe(tmp_path, tmp_path / "run", distil=settings, baselines=["lm_only"])
    run(wanted)
    choices = read_learning_rates(wanted.run_dir)
    assert list(choices) == ["stage-1", "stage-2", "lm_only/stage-1", "lm_only/stage-2"]
    assert [choice.measured for choice in choices.values()] == ["kd", "kd", "lm", "lm"]
    assert [choice.training_steps for choice in choices.values()] == [3, 7, 3, 7]
    assert len({choice.before for choice in choices.values()}) == 4  # each from its own start

    lines = [json.loads(line) for line in (wanted.run_dir / "metrics.jsonl").read_text().splitlines()]
    for run_name, folder in (("slimqwen", "stage-"), ("lm_only", "lm_only/stage-")):
        for line in (line for line in lines if line["run"] == run_name):
            rate = choices[f"{folder}{line['stage']}"].rate
            expected = schedules.learning_rate(
                line["step"], compute_course(wanted.distil, 16), rate, 3e-5 * rate / AUTO_REFERENCE
            )
            assert line["learning_rate"] == pytest.approx(expected)  # one curve over the run, at the stage's own height

    card = (wanted.run_dir / "final" / "README.md").read_text()
    page = (wanted.run_dir / "report.html").read_text()
    for stage in ("stage-1", "stage-2"):
        said = f"learning rate {choices[stage].rate:g} chosen by the KL to the teacher"
        assert f"{stage}: {said}" in card and f"<strong>{stage}</strong>: {said}" in page
    assert f"<strong>lm_only/stage-1</strong>: learning rate {choices['lm_only/stage-1'].rate:g} chosen" in page
    assert "lm_only" not in card.split("Made from")[0].split("```")[-1]

    before = [path.stat().st_mtime_ns for path in sorted(wanted.run_dir.glob("**/distilled/*"))]
    run(wanted)
    assert before == [path.stat().st_mtime_ns for path in sorted(wanted.run_dir.glob("**/distilled/*"))]
    run(tiny_recipe(tmp_path, tmp_path / "run", distil=settings | {"learning_rate": 1e-3}, baselines=[]))
    assert list(read_learning_rates(wanted.run_dir)) == ["lm_only/stage-1", "lm_only/stage-2"]


def test_distil_learning_rate_auto(folder: Path, trained: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "distil.yaml", tmp_path / "out"
    fields = recipe(learning_rate=1e-3)["recipe"].model_dump(mode="json", exclude_defaults=True)
    file.write_text(json.dumps(fields))
    paths = [str(folder / "student"), "--tokens", str(folder / "tokens"), "--teacher", str(folder / "teacher")]
    command = ["distil", *paths, "--recipe", str(file), "--sequence-length", str(LENGTH), "--out", str(out)]
    told = CliRunner().invoke(app, [*command, "--learning-rate", "fast"])
    assert '--learning-rate must be a number or auto, is "fast"' in str(told.exception)
    assert CliRunner().invoke(app, [*command, "--learning-rate", "auto"]).exit_code == 0
    assert RateChoice.load(out / FILE) == RateChoice.load(trained / FILE) and weights(out) == weights(trained)


def test_an_end_rate_above_the_reference_is_refused() -> None:
    with pytest.raises(ValueError, match=r"is more than the peak, with learning_rate: auto 0\.0004"):
        recipe(final_learning_rate=5e-4)
    assert recipe(final_learning_rate=0.0)["recipe"].at_learning_rate(3e-3).final_learning_rate == 0.0


def test_arms_at_shares_of_a_rate_need_a_number() -> None:
    arm = at_both_rates(Variation("arm", "an arm", {}))[0]
    automatic = Recipe.model_validate({"run_dir": "x", "target": {}, "distil": recipe()["recipe"]})
    with pytest.raises(UserError, match=r"shares of distil.learning_rate: give that as a number"):
        arm.changes_to(automatic, Checkpoint(checkpoint_folder("builtin")))
