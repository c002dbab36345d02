"""Studies: verdicts by hand, every arm of every study a valid recipe, and one whole study on a tiny random model."""

from pathlib import Path
from typing import Any

import pytest
from settings import paper
from test_pipeline import tiny_recipe

from slimqwen.artifacts import fingerprint
from slimqwen.builtin import checkpoint_folder
from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.core.errors import UserError
from slimqwen.evaluation.evaluate import Examination
from slimqwen.evaluation.result import ModelEvaluation
from slimqwen.families.count import count
from slimqwen.recipe import OptimizerRecipe, PruningRecipe, Recipe, Target, TeacherRecipe
from slimqwen.runs.checks import stages_of
from slimqwen.runs.recipe_run import run
from slimqwen.runs.schedule import Made, follow_schedule
from slimqwen.runs.stages import Tokenizing
from slimqwen.runs.store import ContentStore
from slimqwen.shapes.target import target_config
from slimqwen.study.catalogue import STUDIES
from slimqwen.study.catalogue.definition import at_both_rates, at_the_better_rate, lower_at_the_better_rate
from slimqwen.study.catalogue.init import tokens_to_reach
from slimqwen.study.result import CurvePoint, Run, Study
from slimqwen.study.scales import load_scale
from slimqwen.study.study import study
from slimqwen.study.variation import Variation, changed
from slimqwen.study.verdict import Finding, interval, judged, lower


def a_run(arm: str, seed: int, loss: float, **changes: Any) -> Run:
    fields: dict[str, Any] = {
        "arm": arm,
        "seed": seed,
        "changes": {},
        "training_tokens": 10,
        "total_parameters": 1,
        "active_parameters": 1,
        "one_shot": None,
        "metrics": {"loss": loss},
        "curve": [],
    }
    return Run(**(fields | changes))


def verdict_of(*gaps: float) -> Any:
    finding = Finding("a_beats_b", "A beats B", "loss saved", lower("loss", "a", "b"))
    by_seed = [{"a": a_run("a", seed, 1.0), "b": a_run("b", seed, 1.0 + gap)} for seed, gap in enumerate(gaps)]
    return judged(finding, by_seed)


def test_interval_is_students() -> None:
    low, high = interval([1.0, 2.0, 3.0]) or (0, 0)
    assert (low, high) == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5))  # t(0.975, 2) = 4.302653
    assert interval([1.0]) is None


def test_a_finding_is_judged_by_where_its_interval_lies() -> None:
    assert verdict_of(0.5, 0.6, 0.7).judgement == "confirmed"
    assert verdict_of(-0.5, -0.6, -0.7).judgement == "contradicted"
    assert verdict_of(-0.5, 0.6, 0.1).judgement == "not distinguishable"
    assert verdict_of(0.5).judgement == "not judged"  # one seed has no interval
    assert "+0.003 (95 % interval +0.00052 to +0.0055, 3" in verdict_of(0.002, 0.003, 0.004).sentence
    assert "the same with each of 2 seeds" in verdict_of(0.5, 0.5).sentence
    assert verdict_of(0.5, 0.6, 0.7).sentence == (
        "A beats B: confirmed. Loss saved: +0.600 (95 % interval +0.352 to +0.848, 3 seeds)."
    )


def test_tokens_to_reach_a_loss() -> None:
    curve = [CurvePoint(tokens=tokens, lm=lm) for tokens, lm in ((10, 5.0), (20, 4.0), (40, 3.0))]
    run = a_run("a", 0, 3.0, curve=curve)
    assert [tokens_to_reach(run, loss) for loss in (6.0, 4.5, 3.0, 2.0)] == [0.25, 0.5, 1.0, 1.0]


def test_each_way_is_judged_at_the_better_of_its_rates() -> None:
    losses = {"a_fast": 3.0, "a_slow": 2.0, "b_fast": 2.5, "b_slow": 4.0}
    runs = {arm: a_run(arm, 0, loss) for arm, loss in losses.items()}
    assert at_the_better_rate(runs, "a", "loss") == 2.0
    assert lower_at_the_better_rate("loss", "a", "b")(runs) == 0.5
    recipe = load_scale("cpu")
    fast, slow = at_both_rates(Variation("a", "A", {}))
    teacher = Checkpoint(checkpoint_folder(recipe.teacher))
    rates = [changed(recipe, arm.changes_to(recipe, teacher)).distil.learning_rate for arm in (fast, slow)]
    assert rates == [recipe.distil.learning_rate, recipe.distil.learning_rate / 4]
    assert (fast.title, slow.title) == ("A", "A, 1/4 of the learning rate")


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.parametrize("method", ["paper", "slimqwen"])
def test_every_arm_is_a_recipe_that_can_be_cut(name: str, method: str) -> None:
    """Also of a recipe whose method and schedule are not the scale's: an arm is what it is called, whatever is varied."""
    scale, definition = load_scale("cpu"), STUDIES[name]
    recipe = scale.model_copy(
        update={
            "pruning": (paper() if method == "paper" else PruningRecipe()).model_copy(
                update={"depth": scale.pruning.depth}
            ),
            "schedule": "one_shot" if method == "paper" else "depth_first",
        }
    )
    teacher = Checkpoint(checkpoint_folder(recipe.teacher))
    assert definition.baseline in {arm.name for arm in definition.arms}
    seen = []
    for arm in definition.arms:
        changes, varied = definition.recipe_of(arm, recipe, teacher)
        assert varied not in seen, f"{arm.name} is another arm again"
        assert varied.evaluation == recipe.evaluation and varied.data == recipe.data, "arms are measured alike"
        assert definition.recipe_of(arm, scale, teacher)[0] == changes
        seen.append(varied)
        stages = stages_of(varied, teacher)
        assert stages[-1].span.end_step == varied.distil.tokens // (varied.distil.batch_size * 256)
        if "stages" not in changes:
            assert (len(stages) == 1) == (varied.schedule == "one_shot")


def test_axes_are_compared_at_equal_parameters() -> None:
    recipe = load_scale("cpu")
    teacher = Checkpoint(checkpoint_folder(recipe.teacher))
    left = {}
    for arm in STUDIES["width"].arms:
        target = stages_of(STUDIES["width"].recipe_of(arm, recipe, teacher)[1], teacher)[-1].target
        left[arm.name] = count(teacher.family, target_config(teacher.family, teacher.config, target)).total_parameters
    one_expert = count(teacher.family, teacher.config).total_parameters / 32
    assert abs(left["experts_alone"] - left["norm_activation"]) < one_expert
    assert abs(left["layers_alone"] - left["norm_activation"]) < 0.1 * left["norm_activation"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("study")
    return tiny_recipe(folder, folder / "runs", schedule="one_shot", baselines=[])


def test_drafts_are_measured_by_real_decoding(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"acceptance\.depth"):
        study("mtp", recipe, tmp_path, seeds=1)
    deeper = changed(recipe, {"evaluation.acceptance.depth": 4, "run_dir": str(tmp_path / "runs")})
    result = study("mtp", deeper, tmp_path / "mtp", seeds=1)
    for arm in result.runs:
        assert arm.metrics is not None and arm.one_shot is not None
        assert 1.0 <= arm.metrics["tokens_per_verification"] <= 5.0 and "draft_0" in arm.metrics
        assert "draft_0" not in arm.one_shot


@pytest.mark.parametrize(("at_cut", "teacher"), [("reset", "live"), ("carry", "live"), ("carry", "cache")])
def test_a_study_trains_what_a_run_trains(recipe: Recipe, tmp_path: Path, at_cut: str, teacher: str) -> None:
    """Two stages, bit for bit: with moments carried over the second cut and without, by either kind of teacher."""
    published = recipe.model_copy(
        update={
            "run_dir": tmp_path / "run",
            "schedule": "depth_first",
            "pruning": paper(),
            "distil": recipe.distil.model_copy(
                update={"optimizer": OptimizerRecipe(at_cut=at_cut), "teacher": TeacherRecipe(kind=teacher)}
            ),
        }
    )

    def made_again() -> Made:
        source = Checkpoint(checkpoint_folder(published.teacher))
        store = ContentStore(tmp_path / "study", "slimqwen study", published.execution)
        tokens = store.get(Tokenizing(published.data, source.folder))
        return follow_schedule(published, stages_of(published, source), store, tokens=tokens)

    made = made_again()
    assert made.trained is not None
    assert fingerprint(made.trained) == fingerprint(run(published) / "stage-2" / "distilled")
    states = [state for state in (tmp_path / "study").rglob(".distilled.state") if any(state.glob("step-*"))]
    assert len(states) == (at_cut == "carry")  # of the first stage: another cut of it may need them
    assert made_again() == made


def test_moments_are_not_carried_over_a_rotation(recipe: Recipe, tmp_path: Path) -> None:
    rotated = recipe.model_copy(update={"run_dir": tmp_path / "runs"})
    with pytest.raises(UserError, match="the arm 'depth_first_carried': moments cannot follow a rotation"):
        study("schedules", rotated, tmp_path, seeds=1)
    assert not list(tmp_path.iterdir())


def test_a_study_from_end_to_end(recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = study("init", recipe, tmp_path / "init", seeds=2)
    assert Study.load(tmp_path / "init" / "results.json") == result
    assert [(run.arm, run.seed) for run in result.runs] == [
        (arm, seed)
        for seed in (0, 1)
        for arm in ("random_lm", "random_kd", "random_kd_longer", "pruned_lm", "pruned_kd")
    ]
    by_arm = {run.arm: run for run in result.runs if run.seed == 0}
    # Cut alike, trained differently; the same text in the same order for every arm.
    assert by_arm["pruned_lm"].one_shot == by_arm["pruned_kd"].one_shot != by_arm["random_kd"].one_shot
    assert by_arm["pruned_lm"].metrics != by_arm["pruned_kd"].metrics
    assert [point.tokens for point in by_arm["random_lm"].curve] == [
        point.tokens for point in by_arm["pruned_kd"].curve
    ]
    assert result.teacher["kl_to_teacher"] == 0.0
    page = (tmp_path / "init" / "index.html").read_text()
    assert all(verdict.quantity[1:] in page for verdict in result.verdicts)
    assert '<th scope="row">pruned + LM; pruned + KD</th>' in page  # the same before training
    assert page.count("<svg") == 2 and "<script" not in page and len(page) < 100_000

    # A second time, and for a study with an arm in common, nothing is made again.
    capsys.readouterr()
    again = study("init", recipe, tmp_path / "again", seeds=2)
    assert [run.model_dump() for run in again.runs] == [run.model_dump() for run in result.runs]
    study("losses", recipe, tmp_path / "losses", seeds=1)
    shared = [line for line in capsys.readouterr().err.splitlines() if line.startswith("distilled/")]
    assert sum("done already" in line for line in shared) == 10 + 1


def test_a_study_goes_on_after_an_interruption_of_its_measurements(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = changed(recipe, {"run_dir": str(tmp_path / "runs")})
    original, measured = Examination.of, []

    def of(examination: Examination, name: str, checkpoint: Checkpoint, title: str) -> ModelEvaluation:
        if len(measured) == 3:
            measured.append("interrupted")
            raise KeyboardInterrupt
        measured.append(name)
        return original(examination, name, checkpoint, title)

    monkeypatch.setattr(Examination, "of", of)
    with pytest.raises(KeyboardInterrupt):
        study("init", here, tmp_path / "out", seeds=1)
    assert not (tmp_path / "out").exists()
    capsys.readouterr()
    study("init", here, tmp_path / "out", seeds=1)
    assert len(measured) == 1 + 8  # the teacher, two starts and what five arms trained them to; nothing twice
    assert "the teacher first" not in capsys.readouterr().err  # what it said is kept too
    other = changed(here, {"dtype": "bfloat16"})
    with pytest.raises(UserError, match="holds work in float32 on cpu, and this is in bfloat16"):
        study("init", other, tmp_path / "other", seeds=1)


def test_a_study_is_written_apart_from_what_it_reads(recipe: Recipe, tmp_path: Path) -> None:
    text = recipe.data.sources[0].path
    assert text is not None
    for place in (text / "page", text.parent, Path(recipe.teacher) / "page"):
        with pytest.raises(UserError, match=r"--out .* (lies in|holds) the"):
            study("init", changed(recipe, {"run_dir": str(tmp_path)}), place, seeds=1)
        with pytest.raises(UserError, match=r"run_dir .* (lies in|holds) the"):
            study("init", changed(recipe, {"run_dir": str(place)}), tmp_path, seeds=1)


def test_what_cannot_be_studied_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'depth'"):
        study("dept", recipe, tmp_path, seeds=1)
    uncut = recipe.model_copy(update={"target": Target(hidden_size=24)})
    with pytest.raises(UserError, match="the arm 'last': it cuts nothing"):
        study("depth", uncut, tmp_path, seeds=1)
    with pytest.raises(UserError, match=r"the recipe cannot be varied by .*refit_readers"):
        changed(recipe, {"pruning.width": "random"})
    with pytest.raises(UserError, match="`target` and `init: pruned`"):
        study("init", recipe.model_copy(update={"init": "random"}), tmp_path, seeds=1)
    with pytest.raises(UserError, match="--scale cpi \\(did you mean 'cpu'"):
        load_scale("cpi")
