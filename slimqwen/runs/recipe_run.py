"""`run`: a recipe's stages one after another, each skipped where its result is there already.

The main run and its baselines follow their schedules by the same loop (`schedule.py`); the stages themselves know nothing of
one another and meet in the artefacts of the run directory.
"""

import contextlib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimqwen.artifacts import (
    alone_in,
    atomic_folder,
    fingerprint,
    fingerprint_value,
    remove_ours,
    tidy,
    write_text,
)
from slimqwen.artifacts.step_record import StepRecord
from slimqwen.builtin import checkpoint_folder
from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.checkpoint.writer import companions_fingerprint, copy_companions
from slimqwen.core.errors import UserError
from slimqwen.core.progress import duration, quiet, say
from slimqwen.core.terminal import visible
from slimqwen.core.warning import warn
from slimqwen.evaluation.benchmark_results import Benchmarks
from slimqwen.evaluation.kept import check_kept_folder
from slimqwen.evaluation.result import Evaluation
from slimqwen.model.device import resolve_device
from slimqwen.parallel.job import Job, join_job
from slimqwen.planning.plan import Plan
from slimqwen.recipe import Execution, Recipe
from slimqwen.reporting.card import model_card
from slimqwen.reporting.parentage import Parentage, parentage_of
from slimqwen.reporting.report import report
from slimqwen.reporting.run_folder import read_learning_rates
from slimqwen.reporting.titles import MAIN_RUN, TITLES
from slimqwen.runs.checks import (
    ScheduleStage,
    announce,
    announce_text,
    check,
    check_heldout,
    check_shared,
    in_one_stage,
    stages_of,
)
from slimqwen.runs.placing import announce_memory
from slimqwen.runs.record import Steps
from slimqwen.runs.schedule import follow_schedule
from slimqwen.runs.stage import Stage
from slimqwen.runs.stages import (
    Calibrating,
    DepthMeasuring,
    Healing,
    Planning,
    Pruning,
    Refitting,
    TeacherCaching,
    Tokenizing,
)
from slimqwen.runs.store import RunStore
from slimqwen.runs.training_stages import Carrying, Distilling, Evaluating, Initialising
from slimqwen.serving.check import check_checkpoint
from slimqwen.training.distil import remove_state
from slimqwen.training.metrics import forget_stages_after

# What lies in the run directory, and in the folder of a stage of the schedule or of a baseline.
OUTPUTS = (Tokenizing.file, TeacherCaching.file, Evaluating.file, "final", "report.html")
STAGES = (Calibrating, DepthMeasuring, Planning, Pruning, Refitting, Healing, Initialising, Carrying, Distilling)
STAGE_OUTPUTS = (*(stage.file for stage in STAGES), "plan.basis.safetensors")
RENAMED = {"repaired": Refitting.file}  # name in a run that version 0.1 began -> name since 0.2


def run(recipe: Recipe, command: str = "slimqwen run") -> Path:
    """Make all that a recipe describes, from text and a teacher to `final/`, evaluation.json and report.html.

    Every problem that can be known is raised before anything is written. Finished steps are recognised by the content
    of their inputs and outputs and skipped; an interrupted distillation continues from its last saved state. Returns
    the run directory.

    All processes that torchrun started must call it and see the same files: they follow the same schedule, and each stage
    is made by all of them or by the first (`Stage.is_shared`). A run continues with any number of them.
    """
    with join_job(resolve_device(recipe.execution.device)) as job, quiet(not job.is_first):
        pipeline = Pipeline(recipe, command, job)
        check_shared(recipe, pipeline.source, pipeline.stages, job.size)
        with alone_in(recipe.run_dir):
            return _run(pipeline, recipe)


def _run(pipeline: "Pipeline", recipe: Recipe) -> Path:
    pipeline.by_first(pipeline.begin)
    tokens = pipeline.tokens()
    models = pipeline.models(tokens)
    evaluated = pipeline.store.get(Evaluating(recipe, models, tokens))

    def finish() -> None:
        pipeline.final(models[MAIN_RUN], tokens, Evaluation.load(evaluated))
        report(pipeline.run_dir)

    pipeline.by_first(finish)
    return pipeline.run_dir


class Pipeline:
    """The steps of one recipe. Constructing it checks the recipe against the teacher and the text; writes nothing.

    job: the ranks that follow them together; None: this process alone.
    """

    def __init__(self, recipe: Recipe, command: str, job: Job | None = None) -> None:
        self.recipe = recipe
        self.command = command
        self.run_dir = recipe.run_dir
        self.teacher = checkpoint_folder(recipe.teacher)
        self.source = Checkpoint(self.teacher)
        check(recipe, self.source)
        self.stages = stages_of(recipe, self.source)
        self.steps = Steps(recipe.run_dir, command)
        self.job = job or Job()
        self.store = RunStore.of(self.steps, recipe.execution, self.job)
        self.parentage = Parentage()
        self.benchmarks: Benchmarks | None = None

    def by_first(self, action: Callable[[], None]) -> None:
        """Do `action` on the first rank, while the others wait."""

        def act() -> str:
            action()
            return ""

        self.job.lead(act)

    def begin(self) -> None:
        """Check the run directory, note there what it is for, and print what was derived from the recipe."""
        self.steps.check(self.outputs())
        check_kept_folder(self.run_dir / "evaluation.json")
        self.steps.begin(self.recipe)
        with self.steps.warned("recipe", fingerprint_value(self.recipe.model_dump(mode="json"))):
            announce(self.recipe, self.source, self.stages)
            announce_memory(self.recipe, self.source, self.job.size)
            self.read_what_is_optional()
        self.forget_other_schedules()
        self.announce_old_names()

    def read_what_is_optional(self) -> None:
        """Read what only the model card shows, before the work: what cannot be read costs a warning and no more."""
        self.parentage = parentage_of(self.teacher)
        file = self.run_dir / "benchmarks.json"
        if file.is_file():
            try:
                self.benchmarks = Benchmarks.load(file)
            except UserError as error:
                warn(f"note: the model card and the report will have no benchmarks: {error}")

    def outputs(self) -> list[Path]:
        """Return every place in the run directory where an artefact of this recipe may come to lie."""
        stages = [f"stage-{stage.number}" for stage in self.stages]
        folders = ["one_shot", "paper/one_shot", "random_init", *stages]
        folders += [f"{baseline}/{stage}" for baseline in ("paper", "lm_only") for stage in stages]
        of_folders = [f"{folder}/{name}" for folder in folders for name in STAGE_OUTPUTS]
        return [self.run_dir / name for name in (*OUTPUTS, *of_folders)]

    def forget_other_schedules(self) -> None:
        """Remove what an earlier recipe made in this run directory for stages, or from plans, that this one has not.

        That is what a record of this run says was made here, and is still as it was made: nothing else is touched.
        """
        numbers = {f"stage-{stage.number}" for stage in self.stages}
        plan = self.run_dir / "stage-1" / "plan.json"
        left = set()
        for record in self.steps.records():
            made = self.run_dir / record.made
            is_outdated = made.parent.name.startswith("stage-") and made.parent.name not in numbers
            if is_outdated or (made == plan and self.recipe.init == "random"):
                left.add(made.parent)
                self._forget(record)
        for folder in sorted(left):
            for name in STAGE_OUTPUTS:
                tidy(folder / name)
            remove_state(folder / "distilled")
            with contextlib.suppress(OSError):  # what others put there stays
                folder.rmdir()
                folder.parent.rmdir()
        forget_stages_after(self.run_dir / "metrics.jsonl", len(self.stages), TITLES)

    def announce_old_names(self) -> None:
        """Name what lies under a name of version 0.1: it stays, is not read, and is made again under today's name."""
        for record in self.steps.records():
            made = self.run_dir / record.made
            if made.name in RENAMED and made.exists():
                say(
                    f"note: {made} is called {RENAMED[made.name]} since 0.2 and is made again as that; nothing reads the old one, "
                    "and it may be removed"
                )

    def _forget(self, record: StepRecord) -> None:
        """Remove what a step made, and with a plan the basis that lies beside it."""
        made = self.run_dir / record.made
        if made.name == "plan.json" and self.steps.is_unchanged(record):
            with contextlib.suppress(UserError):  # an earlier version's, which is no plan today
                basis = Plan.load(made).basis
                if basis is not None:
                    remove_ours(made.with_name(basis.file))
        self.steps.forget(record)

    def tokens(self) -> Path:
        """Return the token ids of the text. Raises UserError where there is too little of it, and warns where it is reread."""
        tokens = self.store.get(Tokenizing(self.recipe.data, self.teacher))
        check_heldout(tokens, self.recipe)

        def announce_once() -> None:
            with self.steps.warned("text", fingerprint_value(self.recipe.model_dump(mode="json"))):
                announce_text(tokens, self.recipe, self.stages[-1].span.total_steps)

        self.by_first(announce_once)
        return tokens

    def models(self, tokens: Path) -> dict[str, Path]:
        """Make the main run and its baselines, and return the teacher and all of them, in the order of the tables.

        A baseline is a variation of the recipe by the same schedule. What it has in common with the main run is made
        once: the teacher's statistics, and where the criteria are the same the first cut.
        """
        recipe, statistics = self.recipe, None
        if recipe.init == "pruned" or {"pruned", "paper_pruned", "paper", "lm_only"} & set(recipe.baselines):
            statistics = self.store.within("stage-1").get(Calibrating(recipe, self.teacher, tokens))

        def made(variant: Recipe, stages: list[ScheduleStage], folder: str = "", **options: Any) -> Path:
            store = self.store.within(folder)
            return follow_schedule(variant, stages, store, tokens=tokens, statistics=statistics, **options).last

        random = recipe.model_copy(update={"init": "random"})
        unhealed = recipe.model_copy(update={"healing": None})  # which is training
        published = unhealed.model_copy(update={"pruning": recipe.pruning.as_published()})
        untaught = unhealed.model_copy(update={"distil": recipe.distil.model_copy(update={"terms": ["lm", "mtp_lm"]})})
        at_once, itself = in_one_stage(self.stages, "one_shot"), in_one_stage(self.stages, "")
        models = {"teacher": self.teacher, MAIN_RUN: made(recipe, self.stages)}
        for baseline in recipe.baselines:
            match baseline:
                case "pruned":
                    models[baseline] = made(unhealed, at_once, trains=False)
                case "paper_pruned":
                    models[baseline] = made(published, at_once, "paper", trains=False)
                case "paper":
                    models[baseline] = made(published, self.stages, baseline, run=baseline)
                case "random_init":
                    models[baseline] = made(random, itself, baseline, run=baseline)
                case "lm_only":
                    models[baseline] = made(untaught, self.stages, baseline, run=baseline)
        order = ("teacher", "paper_pruned", "pruned", "random_init", "lm_only", "paper", MAIN_RUN)
        return {name: models[name] for name in order if name in models}

    def final(self, trained: Path, tokens: Path, evaluation: Evaluation) -> Path:
        """Make `final/`: the trained checkpoint with its model card, and the teacher's companions as they are now."""
        made_from = {
            "teacher": self.source.fingerprint(),
            "tokens": fingerprint(tokens),
            "trained checkpoint": Checkpoint(trained).fingerprint(),
        }
        benchmarks = None if self.benchmarks is None else self.benchmarks.with_own(trained, MAIN_RUN)
        rates = {name: rate for name, rate in read_learning_rates(self.run_dir).items() if name.startswith("stage-")}

        def card(recipe: Recipe, command: str) -> str:
            return model_card(recipe, self.parentage, evaluation, command, made_from, benchmarks, rates)

        as_executed = card(self.recipe, self.command)
        of_any_execution = card(self.recipe.model_copy(update={"execution": Execution()}), "")
        return self.store.get(Finishing(trained, self.teacher, as_executed, of_any_execution))


@dataclass(frozen=True)
class Finishing(Stage):
    """The result of a run: the trained checkpoint, the model card, the companions of the teacher in `teacher`.

    No stage before this one depends on the companions: a corrected chat template costs no training.

    card: the model card, which holds the command and the whole recipe.
    content: the card without the command and the recipe's execution. Where only these differ, the weights are not copied again.
    """

    trained: Path
    teacher: Path
    card: str
    content: str

    file = "final"
    revision = 1

    @property
    def inputs(self) -> Mapping[str, Any]:
        return {"trained": self.trained, "companions": companions_fingerprint(self.teacher)}

    @property
    def method(self) -> Mapping[str, Any]:
        return {"card": self.content}

    def make(self, out: Path, execution: Execution, title: str) -> None:
        with atomic_folder(out) as folder:
            for file in Checkpoint(self.trained).model_files:
                shutil.copyfile(file, folder / file.name)
            copy_companions(self.teacher, folder)
            write_text(folder / "README.md", self.card)
        for warning in check_checkpoint(out).warnings:
            warn(f"warning: {warning}")


def summary(run_dir: Path, seconds: float) -> str:
    """Return where everything is, for the end of a run."""
    folder = visible(str(run_dir))
    return (
        f"checkpoint  {folder}/final\n"
        f"report      {folder}/report.html\n"
        f"numbers     {folder}/evaluation.json\n"
        f"took        {duration(seconds)}"
    )
