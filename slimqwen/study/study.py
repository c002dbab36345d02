"""The command `study`: every arm with every seed, then results.json and a page."""

import subprocess
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from slimqwen.artifacts import check_file_replaceable, write_json
from slimqwen.artifacts.json_lines import read_lines, value_of
from slimqwen.builtin import checkpoint_folder
from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.core.errors import UserError, did_you_mean
from slimqwen.core.progress import duration, say
from slimqwen.data.store import load_manifest
from slimqwen.evaluation.result import ModelEvaluation
from slimqwen.recipe import Recipe
from slimqwen.runs.checks import check, check_heldout, stages_of
from slimqwen.runs.places import check_apart, inputs_of
from slimqwen.runs.record import device_name, machine
from slimqwen.runs.schedule import Made, follow_schedule
from slimqwen.runs.stages import Tokenizing
from slimqwen.runs.store import ContentStore
from slimqwen.shapes.target import shape_of
from slimqwen.study.catalogue import STUDIES
from slimqwen.study.catalogue.definition import Definition
from slimqwen.study.measuring import drafted, examined
from slimqwen.study.page import write_page
from slimqwen.study.result import Arm, CurvePoint, Run, Study
from slimqwen.study.variation import Changes, Variation, changed
from slimqwen.study.verdict import judged

CURVE_POINTS = 40
DRAFTS = 4  # the most in a row whose acceptance a finding compares


class PlannedRun(NamedTuple):
    """An arm with a seed: its recipe, and what that changes of the study's."""

    arm: Variation
    changes: Changes
    recipe: Recipe


def study(name: str, recipe: Recipe, out: Path, *, seeds: int, command: str = "slimqwen study") -> Study:
    """Run the study `name` of variations of `recipe`, and write `out`/results.json and `out`/index.html.

    Artefacts are in the recipe's run_dir, which studies share: what another study or an interrupted one made is reused.
    Seeds are recipe.seed, recipe.seed + 1, ..: of the calibration text, the data order and random weights.

    Raises UserError, before anything is written, for an unknown study, a recipe without a target to vary, and an arm that
    could not be run.
    """
    for page in ("results.json", "index.html"):
        check_file_replaceable(out / page)
    definition, started, clock = definition_of(name), datetime.now(UTC), time.monotonic()
    recipe = changed(recipe, definition.evaluation(recipe))
    check_recipe(recipe, definition)
    check_apart("--out", out, inputs_of(recipe))
    teacher = Checkpoint(checkpoint_folder(recipe.teacher))
    planned = plan_runs(definition, recipe, teacher, seeds)
    store = ContentStore(recipe.run_dir, command, recipe.execution)
    store.begin(recipe)
    tokens = store.get(Tokenizing(recipe.data, teacher.folder))
    check_heldout(tokens, recipe)
    made = follow(name, planned, teacher, store, tokens)
    teacher_evaluation, *evaluations = examined(recipe, [teacher.folder, *_checkpoints(made)], tokens, store)
    sizes = dict(zip(_checkpoints(made), evaluations, strict=True))
    numbers = {path: _numbers(model) for path, model in sizes.items()}
    if definition.drafts:
        trained = [result.trained for result in made if result.trained is not None]
        for path, shares in zip(trained, drafted(recipe, trained, tokens, store), strict=True):
            numbers[path] |= shares
    runs = [_run(plan, result, sizes, numbers) for plan, result in zip(planned, made, strict=True)]
    all_seeds = list(dict.fromkeys(run.seed for run in runs))
    by_seed = [{run.arm: run for run in runs if run.seed == seed} for seed in all_seeds]
    manifest = load_manifest(tokens)
    result = Study(
        name=name,
        title=definition.title,
        scale=recipe.name,
        paper_source=definition.paper_source,
        command=command,
        started=started.isoformat(timespec="seconds"),
        seconds=round(time.monotonic() - clock, 1),
        machine=f"{machine()}, {device_name()}",
        commit=_commit(),
        versions={package: version(package) for package in ("slimqwen", "torch", "transformers")},
        recipe=recipe.model_dump(mode="json"),
        text={"training_tokens": manifest.train.tokens, "heldout_tokens": manifest.heldout.tokens},
        seeds=all_seeds,
        baseline=definition.baseline,
        arms=[Arm(name=arm.name, title=arm.title, paper=dict(arm.paper)) for arm in definition.arms],
        teacher=_numbers(teacher_evaluation),
        runs=runs,
        verdicts=[judged(finding, by_seed) for finding in definition.findings],
    )
    write_json(out / "results.json", result.model_dump(mode="json"))
    write_page(result, out / "index.html")
    return result


def follow(
    name: str, planned: Sequence[PlannedRun], teacher: Checkpoint, store: ContentStore, tokens: Path
) -> list[Made]:
    """Make every planned run by its schedule, and print which one and how long the others may take."""
    made: list[Made] = []
    clock = time.monotonic()
    for number, (arm, _, varied) in enumerate(planned, start=1):
        passed = time.monotonic() - clock
        left = f", {duration(passed / (number - 1) * (len(planned) - number + 1))} left" if number > 1 else ""
        say(f"study {name}: {arm.title}, seed {varied.seed} ({number} of {len(planned)}{left})")
        stages = stages_of(varied, teacher)
        made.append(follow_schedule(varied, stages, store, tokens=tokens, trains=arm.trains))
    return made


def definition_of(name: str) -> Definition:
    """Return the study called `name`. Raises UserError where there is none."""
    if name not in STUDIES:
        raise UserError(f"there is no study '{name}'{did_you_mean(name, STUDIES)}: choose one of {', '.join(STUDIES)}.")
    return STUDIES[name]


def check_recipe(recipe: Recipe, definition: Definition) -> None:
    """Raise UserError for a recipe that the study cannot vary."""
    if recipe.target is None or recipe.init != "pruned":
        raise UserError("a study varies a recipe with a `target` and `init: pruned`: give these and no `stages`.")
    if definition.drafts and recipe.evaluation.acceptance.depth < DRAFTS:
        raise UserError(
            f"the study '{definition.name}' compares {DRAFTS} drafts: set evaluation.acceptance.depth to {DRAFTS} or more."
        )


def plan_runs(definition: Definition, recipe: Recipe, teacher: Checkpoint, seeds: int) -> list[PlannedRun]:
    """Return every arm with every seed. Raises UserError for an arm that could not be run."""
    arms = []
    for arm in definition.arms:
        try:
            changes, varied = definition.recipe_of(arm, recipe, teacher)
            check_arm(varied, teacher)
        except UserError as error:
            raise UserError(f"the arm '{arm.name}': {error}") from error
        arms.append(PlannedRun(arm, changes, varied))
    return [
        PlannedRun(arm, changes, changed(varied, {"seed": recipe.seed + number}))
        for number in range(seeds)
        for arm, changes, varied in arms
    ]


def check_arm(recipe: Recipe, teacher: Checkpoint) -> None:
    """Raise UserError for an arm that would fail after hours, or that cuts nothing."""
    check(recipe, teacher)
    if stages_of(recipe, teacher)[-1].target == shape_of(teacher.family, teacher.config):
        raise UserError("it cuts nothing of the teacher: give the recipe's target the sizes that the study is about.")


def _checkpoints(made: Iterable[Made]) -> list[Path]:
    """Return the checkpoints to measure, each once."""
    paths = (path for result in made for path in (result.start, result.trained))
    return list(dict.fromkeys(path for path in paths if path is not None))


def _run(
    planned: PlannedRun, made: Made, sizes: dict[Path, ModelEvaluation], numbers: dict[Path, dict[str, float]]
) -> Run:
    """Build the result of an arm with a seed."""
    arm, changes, varied = planned
    final = made.last
    return Run(
        arm=arm.name,
        seed=varied.seed,
        changes=dict(changes),
        training_tokens=varied.distil.tokens if arm.trains else 0,
        total_parameters=sizes[final].total_parameters,
        active_parameters=sizes[final].active_parameters,
        one_shot=None if made.start is None else numbers[made.start],
        metrics=None if made.trained is None else numbers[made.trained],
        curve=_curve(made.metrics),
    )


def _numbers(model: ModelEvaluation) -> dict[str, float]:
    """Return the measured numbers of evaluation.json by name; acceptance by depth."""
    names = ("loss", "bits_per_byte", "kl_to_teacher", "top1_agreement", "mtp_loss", "mtp_kl_to_teacher")
    numbers = {name: getattr(model, name) for name in names if getattr(model, name) is not None}
    return numbers | {f"acc_{depth}": share for depth, share in enumerate(model.mtp_acceptance)}


def _curve(logs: list[Path]) -> list[CurvePoint]:
    """Return the training loss over all stages, in at most CURVE_POINTS means over consecutive steps."""
    values = (value_of(line) for log in logs for line in read_lines(log))
    steps = [step for step in values if step is not None and "lm" in step and "tokens" in step]
    size = max(1, -(-len(steps) // CURVE_POINTS))
    points = []
    for begin in range(0, len(steps), size):
        group = steps[begin : begin + size]
        kd = [step["kd"] for step in group if "kd" in step]
        points.append(
            CurvePoint(tokens=group[-1]["tokens"], lm=fmean(step["lm"] for step in group), kd=fmean(kd) if kd else None)
        )
    return points


def _commit() -> str:
    """Return the commit of the running code, with `-dirty` where it was changed since; empty outside a git checkout."""
    own = Path(__file__).parent.parent

    def git(*command: str) -> str:
        return subprocess.run(
            ["git", "-C", str(own), *command], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        if not git("ls-files", "."):  # installed within somebody else's repository
            return ""
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if git("status", "--porcelain", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""
