"""Reading of the artefacts of a run directory, some of which an unfinished run lacks."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from slimqwen.artifacts.json_file import first_problem
from slimqwen.artifacts.json_lines import read_lines
from slimqwen.artifacts.step_record import records_in
from slimqwen.core.errors import UserError
from slimqwen.core.warning import warn
from slimqwen.evaluation.benchmark_results import Benchmarks
from slimqwen.evaluation.result import Evaluation, ModelEvaluation
from slimqwen.planning.plan import Plan
from slimqwen.recipe import Recipe
from slimqwen.recipe.file import load_recipe
from slimqwen.reporting.charts.curves import Column, Steps
from slimqwen.reporting.titles import MAIN_RUN
from slimqwen.shapes.footprint import training_flops
from slimqwen.training.learning_rate import FILE as LEARNING_RATE_FILE
from slimqwen.training.learning_rate import RateChoice


class Line(BaseModel):
    """A record in an artefact; unknown fields, of later versions, are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class StepMetrics(Line):
    """A line of metrics.jsonl."""

    run: str
    stage: int
    step: int
    tokens: int
    lm: float | None = None
    kd: float | None = None
    mtp_lm: float | None = None
    mtp_kd: float | None = None
    load_balancing: float | None = None
    heldout_lm: float | None = None  # this and the next only at steps where they were measured
    heldout_kd: float | None = None
    heldout_mtp_lm: float | None = None
    heldout_mtp_kd: float | None = None
    acc_0: float | None = None
    acc_1: float | None = None
    kd_weight: float | None = Field(None, alias="lambda")
    mtp_weight: float | None = Field(None, alias="beta")
    learning_rate: float | None = None
    seconds: float | None = None
    tokens_per_second: float | None = None
    memory_bytes: float | None = None
    mfu: float | None = None


class LoggedWarning(Line):
    """A line of warnings.jsonl."""

    step: str
    text: str


class StepTime(Line):
    """A line of stages.jsonl."""

    step: str
    seconds: float
    peak_memory_bytes: int | None = None
    skipped: bool = False


class Provenance(Line):
    """The content of provenance.json."""

    command: str
    version: str = ""
    started: str = ""
    machine: str = ""
    threads: int = 0  # of the process; 0 where it was not recorded
    device: str = ""  # of the computation, e.g. a GPU's name
    processes: int = 1
    torch: str = ""
    transformers: str = ""


# The metrics of a step: name in metrics.jsonl -> attribute of StepMetrics.
MEASURED = {
    info.alias or name: name for name, info in StepMetrics.model_fields.items() if info.annotation == float | None
}

Artefact = TypeVar("Artefact", bound=Line)


@dataclass(frozen=True)
class Run:
    """All artefacts of a run directory that the page shows."""

    recipe: Recipe
    recipe_text: str
    plans: list[Plan] = field(default_factory=list)
    evaluation: Evaluation | None = None
    benchmarks: Benchmarks | None = None  # the run's main model is called MAIN_RUN, if the current one was measured
    steps: dict[str, Steps] = field(default_factory=dict)
    learning_rates: dict[str, RateChoice] = field(default_factory=dict)  # as returned by `read_learning_rates`
    warnings: list[LoggedWarning] = field(default_factory=list)
    times: list[StepTime] = field(default_factory=list)
    provenance: Provenance | None = None

    @classmethod
    def read(cls, run_dir: Path) -> "Run":
        """Read a run directory. Raises UserError where it is none, or an artefact is invalid."""
        recipe_file = run_dir / "recipe.resolved.yaml"
        if not run_dir.is_dir():
            problem = f"{run_dir} is a file" if run_dir.exists() else f"there is no folder {run_dir}"
            raise UserError(f"{problem}: give the run directory of a `slimqwen run`.")
        if not recipe_file.is_file():
            raise UserError(
                f"{run_dir} is not a run directory, it has no recipe.resolved.yaml: give a recipe's run_dir."
            )
        recipe = load_recipe(recipe_file, quiet=True)  # it may be an earlier version's
        plans = _read_plans(run_dir) if recipe.init == "pruned" else []
        metrics = _read_lines(run_dir / "metrics.jsonl", StepMetrics)
        return cls(
            recipe=recipe,
            recipe_text=recipe_file.read_text(encoding="utf-8"),
            plans=plans,
            evaluation=_read_evaluation(run_dir),
            benchmarks=_read_benchmarks(run_dir),
            steps=_group_by_run(metrics, recipe, plans),
            learning_rates=read_learning_rates(run_dir),
            warnings=_read_lines(run_dir / "warnings.jsonl", LoggedWarning),
            times=_last_times(_read_lines(run_dir / "stages.jsonl", StepTime)),
            provenance=_read(run_dir / "provenance.json", Provenance),
        )

    @property
    def teacher(self) -> ModelEvaluation | None:
        """The evaluation of the teacher."""
        return self.evaluation.models.get("teacher") if self.evaluation else None

    @property
    def has_mtp(self) -> bool:
        """Whether one of the models has an MTP module."""
        models = self.evaluation.models.values() if self.evaluation else ()
        return any(plan.before.mtp_parameters for plan in self.plans) or any(model.mtp_parameters for model in models)

    def kl(self, name: str) -> float | None:
        """Return a model's KL to the teacher; None where it was not measured."""
        model = self.evaluation.models.get(name) if self.evaluation else None
        return model.kl_to_teacher if model else None

    @property
    def result(self) -> ModelEvaluation | None:
        """The evaluation of the run's main model."""
        return self.evaluation.models.get(MAIN_RUN) if self.evaluation else None


def read_learning_rates(run_dir: Path) -> dict[str, RateChoice]:
    """Read the choices of `learning_rate: auto` for each training of a run, by its folder: `stage-1`, `paper/stage-1`.

    Raises UserError for a file that is not what slimqwen writes.
    """
    folders = [folder for name in ("stage-*", "*/stage-*", "random_init") for folder in sorted(run_dir.glob(name))]
    files = {folder: folder / "distilled" / LEARNING_RATE_FILE for folder in folders}
    return {
        folder.relative_to(run_dir).as_posix(): RateChoice.load(file)
        for folder, file in files.items()
        if file.is_file()
    }


def _read_evaluation(run_dir: Path) -> Evaluation | None:
    path = run_dir / "evaluation.json"
    return Evaluation.load(path) if path.is_file() else None


def _read_benchmarks(run_dir: Path) -> Benchmarks | None:
    """Read benchmarks.json, with a warning instead of an error where it is invalid, since it is optional."""
    path, final = run_dir / "benchmarks.json", run_dir / "final"
    if not path.is_file():
        return None
    try:
        found = Benchmarks.load(path)
    except UserError as error:
        warn(f"note: the report leaves benchmarks out: {error}")
        return None
    return found.with_own(final, MAIN_RUN) if final.is_dir() else found


def _read_plans(run_dir: Path) -> list[Plan]:
    """Read the plans of the stages in order. Where the run has records, a plan without one is not the run's."""
    plans: list[Plan] = []
    made = {record.made for record in records_in(run_dir)}
    while (run_dir / (name := f"stage-{len(plans) + 1}/plan.json")).is_file() and (not made or name in made):
        plans.append(Plan.load(run_dir / name))
    return plans


def _read(path: Path, model: type[Artefact]) -> Artefact | None:
    """Read a JSON artefact; None where it does not exist (yet)."""
    if not path.is_file():
        return None
    try:
        return model.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise UserError(
            f"{path} is not what slimqwen writes ({first_problem(error)}): remove it and run the recipe again to remake it."
        ) from error


def _read_lines(path: Path, model: type[Artefact]) -> list[Artefact]:
    """Read the lines of an artefact. Invalid lines are left out with a warning, so that damage does not prevent the report."""
    lines, invalid = [], []
    for number, line in enumerate(read_lines(path), start=1):
        try:
            lines.append(model.model_validate_json(line))
        except ValidationError:
            if line.endswith(b"\n"):  # otherwise incomplete, by kill -9 or because it is being written
                invalid.append(number)
    if invalid:
        warn(
            f"note: {path}: {len(invalid)} of {len(lines) + len(invalid)} lines are not what slimqwen writes "
            f"(line {invalid[0]} is the first) and are left out of the report."
        )
    return lines


def _group_by_run(lines: list[StepMetrics], recipe: Recipe, plans: list[Plan]) -> dict[str, Steps]:
    runs: dict[str, list[StepMetrics]] = {}
    for line in lines:
        runs.setdefault(line.run, []).append(line)
    return {run: _steps(run, entries, recipe, plans) for run, entries in runs.items()}


def _steps(run: str, entries: list[StepMetrics], recipe: Recipe, plans: list[Plan]) -> Steps:
    def column(name: str) -> Column:
        return np.array([getattr(entry, name) for entry in entries], dtype=np.float64)  # None becomes NaN

    tokens = column("tokens")
    flops = np.array([flops_per_token(recipe, plans, run, entry.stage) for entry in entries], dtype=np.float64)
    return Steps(
        stage=column("stage"),
        along={
            "tokens": tokens,
            "flops": np.cumsum(np.diff(tokens, prepend=0.0) * flops),
            "hours": np.cumsum(column("seconds")) / 3600,
        },
        values={field: column(name) for field, name in MEASURED.items()},
    )


def flops_per_token(recipe: Recipe, plans: list[Plan], run: str, stage: int) -> int | None:
    """Estimate a training token's FLOPs (`training_flops`); None where no plan says how large the models are.

    A forward pass is 2 per active parameter (Kaplan et al., 2001.08361, section 2.1), which is what a plan has; attention's products
    with one another are left out.
    """
    if not plans:
        return None
    student = plans[-1 if run == "random_init" else min(stage, len(plans)) - 1].after
    has_teacher = (
        run != "lm_only" and {"kd", "mtp_kd"} & set(recipe.distil.terms) and recipe.distil.teacher.kind == "live"
    )
    teacher = plans[0].before.active_without_input_embedding if has_teacher else 0
    return training_flops(2 * student.active_without_input_embedding, 2 * teacher)


def _last_times(lines: list[StepTime]) -> list[StepTime]:
    """Return the last execution of each step, in the order of their first execution."""
    last: dict[str, StepTime] = {}
    for line in lines:
        if not line.skipped:
            last[line.step] = line
    return list(last.values())
