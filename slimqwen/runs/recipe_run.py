"""`run`: a recipe's stages one after another, each skipped where its result is there already.

Progressive schedules are a loop over calibrate, plan, prune and distil in this file; the stages themselves know
nothing of one another and meet in the artefacts of the run directory.
"""

import contextlib
import shutil
from collections.abc import Mapping
from pathlib import Path

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
from slimqwen.core.progress import duration
from slimqwen.core.terminal import visible
from slimqwen.core.warning import warn
from slimqwen.evaluation.benchmark_results import Benchmarks
from slimqwen.evaluation.kept import check_kept_folder
from slimqwen.evaluation.result import Evaluation
from slimqwen.planning.plan import Plan
from slimqwen.recipe import LossTerm, PruningRecipe, Recipe, Target
from slimqwen.reporting.card import model_card
from slimqwen.reporting.parentage import Parentage, parentage_of
from slimqwen.reporting.report import report
from slimqwen.reporting.run_folder import read_learning_rates
from slimqwen.reporting.titles import MAIN_RUN, TITLES
from slimqwen.runs import stages as work
from slimqwen.runs.checks import Stage, announce, announce_text, check, check_heldout, stages_of
from slimqwen.runs.record import Steps
from slimqwen.runs.stages import Work
from slimqwen.serving.check import check_checkpoint
from slimqwen.training.distil import remove_state
from slimqwen.training.metrics import forget_stages_after
from slimqwen.training.trainer import Span

# What lies in the run directory, and in the folder of a stage or of a baseline.
OUTPUTS = ("tokens", "teacher_cache", "evaluation.json", "final", "report.html")
STAGE_OUTPUTS = (
    "statistics.safetensors",
    "depth.json",
    "plan.json",
    "plan.basis.safetensors",
    "pruned",
    "repaired",
    "healed",
    "initial",
    "moments",
    "distilled",
)


def run(recipe: Recipe, command: str = "slimqwen run") -> Path:
    """Everything a recipe asks for, from text and a teacher to `final/`, evaluation.json and report.html.

    Every problem that can be known is raised before anything is written. Finished steps are recognised by the content
    of their inputs and outputs and skipped; an interrupted distillation continues from its last saved state. Returns
    the run directory.
    """
    pipeline = Pipeline(recipe, command)
    with alone_in(recipe.run_dir):
        return _run(pipeline, recipe)


def _run(pipeline: "Pipeline", recipe: Recipe) -> Path:
    pipeline.steps.check(pipeline.outputs())
    check_kept_folder(recipe.run_dir / "evaluation.json")
    pipeline.steps.begin(recipe)
    with pipeline.steps.warned("recipe", fingerprint_value(recipe.model_dump(mode="json"))):
        announce(recipe, pipeline.source, pipeline.stages)
        pipeline.read_what_is_optional()
    pipeline.forget_other_schedules()
    tokens = pipeline.tokens()
    if recipe.distil.is_taught and recipe.distil.teacher == "cache":
        pipeline.teacher_cache(tokens)
    models = {"teacher": pipeline.teacher}
    ours, papers = recipe.pruning, recipe.pruning.as_published()
    unhealed = ours.model_copy(update={"healing": None})  # which is training, by a teacher
    models[MAIN_RUN] = (
        pipeline.initialised() if recipe.init == "random" else pipeline.progressive(MAIN_RUN, ours, recipe.distil.terms)
    )
    for baseline in recipe.baselines:
        match baseline:
            case "pruned":
                models[baseline] = pipeline.one_shot("one_shot", unhealed)
            case "paper_pruned":
                models[baseline] = pipeline.one_shot("paper/one_shot", papers)
            case "paper":
                models[baseline] = pipeline.progressive(baseline, papers, recipe.distil.terms)
            case "random_init":
                models[baseline] = pipeline.random_init(baseline, pipeline.run_dir / baseline)
            case "lm_only":
                models[baseline] = pipeline.progressive(baseline, unhealed, ["lm", "mtp_lm"])
    order = ("teacher", "paper_pruned", "pruned", "random_init", "lm_only", "paper", MAIN_RUN)
    evaluation = pipeline.evaluation({name: models[name] for name in order if name in models}, tokens)
    pipeline.final(models[MAIN_RUN], evaluation)
    report(pipeline.run_dir)
    return pipeline.run_dir


class Pipeline:
    """The steps of one recipe. Constructing it checks the recipe against the teacher and the text; writes nothing."""

    def __init__(self, recipe: Recipe, command: str) -> None:
        self.recipe = recipe
        self.command = command
        self.run_dir = recipe.run_dir
        self.teacher = checkpoint_folder(recipe.teacher)
        self.source = Checkpoint(self.teacher)
        check(recipe, self.source)
        self.stages = stages_of(recipe, self.source)
        self.steps = Steps(recipe.run_dir, command)
        self.parentage = Parentage()
        self.benchmarks: Benchmarks | None = None

    def read_what_is_optional(self) -> None:
        """What only the model card tells; read before the work, so that what cannot be read costs a warning and no more."""
        self.parentage = parentage_of(self.teacher)
        file = self.run_dir / "benchmarks.json"
        if file.is_file():
            try:
                self.benchmarks = Benchmarks.load(file)
            except UserError as error:
                warn(f"note: the model card and the report will tell no benchmarks: {error}")

    def outputs(self) -> list[Path]:
        """Every place in the run directory where an artefact of this recipe may come to lie."""
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

    def _forget(self, record: StepRecord) -> None:
        """Remove what a step made, and with a plan the basis that lies beside it."""
        made = self.run_dir / record.made
        if made.name == "plan.json" and self.steps.is_unchanged(record):
            with contextlib.suppress(UserError):  # an earlier version's, which is no plan today
                basis = Plan.load(made).basis
                if basis is not None:
                    remove_ours(made.with_name(basis.file))
        self.steps.forget(record)

    def made(self, name: str, out: Path, step: Work) -> Path:
        """`out`, made unless it is there; `name` is what people read."""
        return self.steps.step(name, out, step.made_from, lambda: step.make(out, name))

    def tokens(self) -> Path:
        tokens = self.made("tokens", self.run_dir / "tokens", work.tokenized(self.recipe))
        check_heldout(tokens, self.recipe)
        with self.steps.warned("text", fingerprint_value(self.recipe.model_dump(mode="json"))):
            announce_text(tokens, self.recipe, self.stages[-1].span.total_steps)
        return tokens

    def teacher_cache(self, tokens: Path) -> Path:
        total_steps = self.stages[-1].span.total_steps
        step = work.teacher_cached(self.recipe, self.teacher, tokens, total_steps)
        return self.made("teacher_cache", self.run_dir / "teacher_cache", step)

    def calibrated(self, folder: Path, checkpoint: Path, pruning: PruningRecipe) -> Path:
        name = f"{self.label(folder)}/statistics"
        step = work.calibrated(self.recipe, checkpoint, self.run_dir / "tokens", pruning)
        return self.made(name, folder / "statistics.safetensors", step)

    def teacher_statistics(self) -> Path:
        """Of the teacher, for the first cut of the run and of its baselines."""
        return self.calibrated(self.run_dir / "stage-1", self.teacher, self.recipe.pruning)

    def cut(self, checkpoint: Path, folder: Path, statistics: Path, target: Target, pruning: PruningRecipe) -> Path:
        """plan.json and pruned/ in `folder`, repaired/ and healed/ where the recipe asks for them. Returns the last of them."""
        name, tokens = self.label(folder), self.run_dir / "tokens"

        def made(file: str, step: Work) -> Path:
            return self.made(f"{name}/{Path(file).stem}", folder / file, step)

        return work.cut(self.recipe, checkpoint, statistics, tokens, target, pruning, made)[0]

    def distilled(
        self,
        folder: Path,
        student: Path,
        run: str,
        stage: Stage,
        terms: list[LossTerm],
        *,
        carry_from: Path | None = None,
        keep_state: bool = False,
    ) -> Path:
        """carry_from: the checkpoint that `student` was cut from, whose kept state gives the optimiser its moments."""
        settings = self.recipe.distil.model_copy(update={"terms": terms})
        out, moments = folder / "distilled", folder / "moments"

        def carried(step: Work) -> Path:
            assert carry_from is not None
            self.made(self.label(moments), moments, step)
            remove_state(carry_from)  # three times the model
            return moments

        step = work.distilled(
            self.recipe,
            settings,
            student,
            teacher=self.teacher,
            tokens=self.run_dir / "tokens",
            stage=stage,
            run=run,
            metrics=self.run_dir / "metrics.jsonl",
            teacher_cache=self.run_dir / "teacher_cache" if settings.teacher == "cache" else None,
            carried=None if carry_from is None else work.carried(carry_from, student.parent / "plan.json"),
            find=carried,
        )
        self.made(self.label(out), out, step)
        if carry_from is not None:
            remove_state(carry_from)
            remove_ours(moments)
        if not keep_state:
            remove_state(out)
        return out

    def label(self, path: Path) -> str:
        """What people read of a path of this run."""
        return path.relative_to(self.run_dir).as_posix()

    def progressive(self, run: str, pruning: PruningRecipe, terms: list[LossTerm]) -> Path:
        """The schedule: measure, plan, cut and train, stage after stage. Returns the last trained checkpoint.

        What a baseline has in common with the main run it shares: the teacher's statistics, and where its criteria are
        the same the first cut.
        """
        folder = self.run_dir if run == MAIN_RUN else self.run_dir / run
        checkpoint = self.teacher
        carries = self.recipe.distil.optimizer_state == "carry"
        for stage in self.stages:
            own = folder / f"stage-{stage.number}"
            if stage.number == 1:
                cut = self.run_dir / "stage-1" if pruning == self.recipe.pruning else own
                statistics = self.teacher_statistics()
            else:
                cut = own
                statistics = self.calibrated(cut, checkpoint, pruning)
            checkpoint = self.distilled(
                own,
                self.cut(checkpoint, cut, statistics, stage.target, pruning),
                run,
                stage,
                terms,
                carry_from=checkpoint if carries and stage.number > 1 else None,
                keep_state=carries and stage is not self.stages[-1],
            )
        return checkpoint

    def one_shot(self, name: str, pruning: PruningRecipe) -> Path:
        """The final shape in one cut of the teacher, without any training."""
        target = self.stages[-1].target
        return self.cut(self.teacher, self.run_dir / name, self.teacher_statistics(), target, pruning)

    def initialised(self) -> Path:
        """`init: random`: the main run from random weights."""
        return self.random_init(MAIN_RUN, self.run_dir / "stage-1")

    def random_init(self, run: str, folder: Path) -> Path:
        """The final shape from random weights, trained on all the tokens at once."""
        target, total = self.stages[-1].target, self.stages[-1].span.total_steps
        step = work.initialised(self.recipe, self.source, target)
        initial = self.made(self.label(folder / "initial"), folder / "initial", step)
        return self.distilled(folder, initial, run, Stage(1, target, Span(0, total, total)), self.recipe.distil.terms)

    def evaluation(self, models: Mapping[str, Path], tokens: Path) -> Evaluation:
        out = self.run_dir / "evaluation.json"
        self.made("evaluation", out, work.evaluated(self.recipe, models, tokens))
        return Evaluation.load(out)

    def final(self, trained: Path, evaluation: Evaluation) -> Path:
        """`final/`: the trained checkpoint with its model card, and the teacher's companions as they are now.

        No step before knows the companions: a chat template that is mended costs no training.
        """
        checkpoint = Checkpoint(trained)
        made_from = {
            "teacher": self.source.fingerprint(),
            "tokens": fingerprint(self.run_dir / "tokens"),
            "trained checkpoint": checkpoint.fingerprint(),
        }
        benchmarks = None if self.benchmarks is None else self.benchmarks.with_own(trained, MAIN_RUN)
        rates = {name: rate for name, rate in read_learning_rates(self.run_dir).items() if name.startswith("stage-")}
        card = model_card(self.recipe, self.parentage, evaluation, self.command, made_from, benchmarks, rates)
        out = self.run_dir / "final"

        def assemble() -> None:
            with atomic_folder(out) as folder:
                for file in checkpoint.model_files:
                    shutil.copyfile(file, folder / file.name)
                copy_companions(self.teacher, folder)
                write_text(folder / "README.md", card)
            for warning in check_checkpoint(out).warnings:
                warn(f"warning: {warning}")

        inputs = {
            "trained": checkpoint.fingerprint(),
            "companions": companions_fingerprint(self.teacher),
            "card": card,
        }
        return self.steps.step("final", out, inputs, assemble)


def summary(run_dir: Path, seconds: float) -> str:
    """Where everything is, for the end of a run."""
    folder = visible(str(run_dir))
    return (
        f"checkpoint  {folder}/final\n"
        f"report      {folder}/report.html\n"
        f"numbers     {folder}/evaluation.json\n"
        f"took        {duration(seconds)}"
    )
