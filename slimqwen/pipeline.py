"""`run`: a recipe's stages one after another, each skipped where its result is there already.

Progressive schedules are a loop over calibrate, plan, prune and distil in this file; the stages themselves know
nothing of one another and meet in the artefacts of the run directory.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slimqwen.artifacts import atomic_folder, fingerprint, fingerprint_value, write_text
from slimqwen.builtin import checkpoint_folder
from slimqwen.calibration.calibrate import calibrate
from slimqwen.checkpoint.check import check_checkpoint
from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.data.identity import text_identity
from slimqwen.data.store import load_manifest
from slimqwen.data.tokenize import tokenize
from slimqwen.distillation.carry import carry
from slimqwen.distillation.course import course_of
from slimqwen.distillation.distil import SETTINGS_WITHOUT_EFFECT, distil, remove_state, state_folder_of
from slimqwen.distillation.metrics import forget_stages_after
from slimqwen.distillation.pretrain import write_initial
from slimqwen.distillation.trainer import Span
from slimqwen.errors import UserError
from slimqwen.evaluation.benchmark_results import Benchmarks
from slimqwen.evaluation.evaluate import evaluate
from slimqwen.evaluation.result import Evaluation
from slimqwen.planning.plan import plan
from slimqwen.planning.shapes import target_config
from slimqwen.preflight import announce, check, stages_of
from slimqwen.progress import duration, say
from slimqwen.pruning.prune import prune
from slimqwen.recipe import LossTerm, PruningRecipe, Recipe, Target
from slimqwen.repair.repair import repair
from slimqwen.reporting.card import model_card
from slimqwen.reporting.report import report
from slimqwen.reporting.titles import MAIN_RUN
from slimqwen.steps import Steps
from slimqwen.teacher_cache.write import write_teacher_cache
from slimqwen.warning import warn


def run(recipe: Recipe, command: str = "slimqwen run") -> Path:
    """Everything a recipe asks for, from text and a teacher to `final/`, evaluation.json and report.html.

    Every problem that can be known is raised before anything is written. Finished steps are recognised by the content
    of their inputs and outputs and skipped; an interrupted distillation continues from its last saved state. Returns
    the run directory.
    """
    pipeline = Pipeline(recipe, command)
    pipeline.steps.begin(recipe)
    with pipeline.steps.warned("recipe", fingerprint_value(recipe.model_dump(mode="json"))):
        announce(recipe, pipeline.source, pipeline.stages)
    pipeline.forget_other_schedules()
    tokens = pipeline.tokens()
    if recipe.distil.is_taught and recipe.distil.teacher == "cache":
        pipeline.teacher_cache(tokens)
    models = {"teacher": pipeline.teacher}
    ours, papers = recipe.pruning, recipe.pruning.as_published()
    models[MAIN_RUN] = (
        pipeline.initialised() if recipe.init == "random" else pipeline.progressive(MAIN_RUN, ours, recipe.distil.terms)
    )
    for baseline in recipe.baselines:
        match baseline:
            case "pruned":
                models[baseline] = pipeline.one_shot("one_shot", ours)
            case "paper_pruned":
                models[baseline] = pipeline.one_shot("paper/one_shot", papers)
            case "paper":
                models[baseline] = pipeline.progressive(baseline, papers, recipe.distil.terms)
            case "random_init":
                models[baseline] = pipeline.random_init(baseline, pipeline.run_dir / baseline)
            case "lm_only":
                models[baseline] = pipeline.progressive(baseline, ours, ["lm", "mtp_lm"])
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

    def forget_other_schedules(self) -> None:
        """Remove the folders of stages that an earlier recipe had in this run directory and this one has not."""
        for record in (self.run_dir / ".steps").glob("stage-*.distilled.json"):
            name = record.name.removesuffix(".distilled.json")
            if name not in {f"stage-{stage.number}" for stage in self.stages}:
                say(f"{self.run_dir / name}: left by another schedule, removed")
                shutil.rmtree(self.run_dir / name, ignore_errors=True)
                record.unlink()
        forget_stages_after(self.run_dir / "metrics.jsonl", len(self.stages))

    def tokens(self) -> Path:
        data = self.recipe.data
        out = self.run_dir / "tokens"
        tokens = self.steps.step(
            "tokens",
            out,
            text_identity(data, self.teacher),
            lambda: tokenize(
                data.sources,
                self.teacher,
                out,
                heldout_sources=data.heldout_sources,
                heldout_fraction=data.heldout_fraction,
                workers=data.workers,
            ),
        )
        needed = max(data.sequence_length, self.recipe.evaluation.acceptance_prompt_tokens) + 1
        heldout = load_manifest(tokens).heldout.tokens
        if heldout < needed:
            raise UserError(
                f"the held-out text has {heldout:,} tokens, and evaluation needs {needed:,} at least: "
                "add text, raise data.heldout_fraction or give data.heldout_sources."
            )
        return tokens

    def teacher_cache(self, tokens: Path) -> Path:
        """What the teacher says about the text that the run trains on, for every stage and baseline."""
        recipe = self.recipe
        out = self.run_dir / "teacher_cache"
        settings: dict[str, Any] = {
            "sequence_length": recipe.data.sequence_length,
            "documents": recipe.data.documents,
            "with_mtp": recipe.distil.is_taught_by_mtp,
            "sequences": course_of(recipe.distil, recipe.data.sequence_length).first_row(
                self.stages[-1].span.total_steps
            ),
            "seed": recipe.seed,
            "dtype": recipe.dtype,
        }
        inputs = {
            "teacher": fingerprint(self.teacher),
            "tokens": fingerprint(tokens),
            "teacher_cache": recipe.teacher_cache.model_dump(include={"top_k", "exact"}),
            **settings,
        }
        return self.steps.step(
            "teacher_cache",
            out,
            inputs,
            lambda: write_teacher_cache(
                self.teacher,
                out,
                tokens=tokens,
                recipe=recipe.teacher_cache,
                device=recipe.device,
                title="teacher_cache",
                **settings,
            ),
        )

    def calibrated(self, name: str, checkpoint: Path, out: Path, pruning: PruningRecipe) -> Path:
        recipe = self.recipe
        tokens = self.run_dir / "tokens"
        second_moments = pruning.width == "rotation"
        inputs = {
            "checkpoint": fingerprint(checkpoint),
            "tokens": [fingerprint(folder) for folder in recipe.calibration.sources.values() or [tokens]],
            "calibration": recipe.calibration.model_dump(
                mode="json", exclude={"batch_size", "streaming", "memory_budget_bytes"}
            ),
            "sequence_length": recipe.data.sequence_length,
            "seed": recipe.seed,
            "second_moments": second_moments,
            "dtype": recipe.dtype,
        }
        return self.steps.step(
            name,
            out,
            inputs,
            lambda: calibrate(
                checkpoint,
                out,
                tokens=tokens,
                recipe=recipe.calibration,
                sequence_length=recipe.data.sequence_length,
                seed=recipe.seed,
                device=recipe.device,
                dtype=recipe.dtype,
                second_moments=second_moments,
                title=name,
            ),
        )

    def teacher_statistics(self) -> Path:
        """Of the teacher, for the first cut of the run and of its baselines."""
        out = self.run_dir / "stage-1" / "statistics.safetensors"
        return self.calibrated("stage-1/statistics", self.teacher, out, self.recipe.pruning)

    def cut(
        self, name: str, checkpoint: Path, folder: Path, statistics: Path, target: Target, pruning: PruningRecipe
    ) -> Path:
        """plan.json and pruned/ in `folder`, and repaired/ where the experts are refitted. Returns the last of them."""
        recipe = self.recipe
        inputs: dict[str, Any] = {"checkpoint": fingerprint(checkpoint), "statistics": fingerprint(statistics)}
        inputs |= {"target": target.model_dump(), "pruning": pruning.model_dump()}
        plan_file = folder / "plan.json"
        self.steps.step(
            f"{name}/plan",
            plan_file,
            inputs,
            lambda: plan(checkpoint, plan_file, statistics=statistics, target=target, pruning=pruning),
        )
        pruned = folder / "pruned"
        made_from = {"checkpoint": fingerprint(checkpoint), "plan": fingerprint(plan_file)}
        self.steps.step(
            f"{name}/pruned",
            pruned,
            made_from,
            lambda: prune(checkpoint, pruned, plan=plan_file, title=f"{name}/pruned"),
        )
        if not pruning.experts.refit:
            return pruned
        repaired, tokens = folder / "repaired", self.run_dir / "tokens"
        settings = {
            "tokens": fingerprint(tokens),
            "samples": recipe.calibration.samples,
            "sequence_length": recipe.data.sequence_length,
            "seed": recipe.seed,
            "dtype": recipe.dtype,
        }
        return self.steps.step(
            f"{name}/repaired",
            repaired,
            made_from | settings,
            lambda: repair(
                pruned,
                repaired,
                teacher=checkpoint,
                plan=plan_file,
                tokens=tokens,
                samples=recipe.calibration.samples,
                batch_size=recipe.calibration.batch_size,
                sequence_length=recipe.data.sequence_length,
                memory_budget_bytes=recipe.calibration.memory_budget_bytes,
                seed=recipe.seed,
                device=recipe.device,
                dtype=recipe.dtype,
                title=f"{name}/repaired",
            ),
        )

    def distilled(
        self,
        name: str,
        student: Path,
        out: Path,
        run: str,
        number: int,
        span: Span,
        terms: list[LossTerm],
        *,
        carry_from: Path | None = None,
        keep_state: bool = False,
    ) -> Path:
        """carry_from: the checkpoint that `student` was cut from, whose kept state gives the optimiser its moments."""
        recipe = self.recipe
        settings = recipe.distil.model_copy(update={"terms": terms})
        inputs = {
            "student": fingerprint(student),
            "teacher": fingerprint(self.teacher),
            "tokens": fingerprint(self.run_dir / "tokens"),
            "distil": settings.model_dump(mode="json", exclude=SETTINGS_WITHOUT_EFFECT),
            "sequence_length": recipe.data.sequence_length,
            "documents": recipe.data.documents,
            "span": [span.first_step, span.end_step, span.total_steps],
            "seed": recipe.seed,
            "dtype": recipe.dtype,
        }
        cache = self.run_dir / "teacher_cache" if settings.teacher == "cache" else None
        if cache is not None:
            inputs["teacher_cache"] = recipe.teacher_cache.model_dump(include={"top_k", "exact"})
        if carry_from is not None:
            inputs["carry_from"] = fingerprint(carry_from)
        moments = out.parent / "moments"

        def train() -> None:
            if carry_from is not None:
                self.carried(carry_from, student.parent / "plan.json", moments)
            distil(
                student,
                out,
                tokens=self.run_dir / "tokens",
                recipe=settings,
                sequence_length=recipe.data.sequence_length,
                documents=recipe.data.documents,
                teacher=self.teacher,
                teacher_cache=cache,
                span=span,
                seed=recipe.seed,
                device=recipe.device,
                dtype=recipe.dtype,
                metrics=self.run_dir / "metrics.jsonl",
                run=run,
                stage=number,
                title=name,
                keep_state=True,
                moments=None if carry_from is None else moments,
            )

        trained = self.steps.step(name, out, inputs, train)
        if carry_from is not None:
            remove_state(carry_from)
            shutil.rmtree(moments, ignore_errors=True)
        if not keep_state:
            remove_state(out)
        return trained

    def carried(self, trained: Path, plan_file: Path, out: Path) -> None:
        """The moments that `trained`'s training ended with, cut by the plan. Its training state is then no longer needed."""
        label = out.relative_to(self.run_dir).as_posix()
        inputs = {"trained": fingerprint(trained), "plan": fingerprint(plan_file)}
        self.steps.step(
            label, out, inputs, lambda: carry(state_folder_of(trained), trained, out, plan=plan_file, title=label)
        )
        remove_state(trained)

    def progressive(self, run: str, pruning: PruningRecipe, terms: list[LossTerm]) -> Path:
        """The schedule: measure, plan, cut and train, stage after stage. Returns the last trained checkpoint.

        What a baseline has in common with the main run it shares: the teacher's statistics, and where its criteria are
        the same the first cut.
        """
        folder = self.run_dir if run == MAIN_RUN else self.run_dir / run
        checkpoint = self.teacher
        carries = self.recipe.distil.optimizer_state == "carry"
        for stage in self.stages:
            name = f"stage-{stage.number}"
            if stage.number == 1:
                cut = (self.run_dir if pruning == self.recipe.pruning else folder) / name
                statistics = self.teacher_statistics()
            else:
                cut = folder / name
                label = cut.relative_to(self.run_dir).as_posix()
                statistics = self.calibrated(f"{label}/statistics", checkpoint, cut / "statistics.safetensors", pruning)
            pruned = self.cut(
                cut.relative_to(self.run_dir).as_posix(), checkpoint, cut, statistics, stage.target, pruning
            )
            out = folder / name / "distilled"
            label = out.relative_to(self.run_dir).as_posix()
            checkpoint = self.distilled(
                label,
                pruned,
                out,
                run,
                stage.number,
                stage.span,
                terms,
                carry_from=checkpoint if carries and stage.number > 1 else None,
                keep_state=carries and stage is not self.stages[-1],
            )
        return checkpoint

    def one_shot(self, name: str, pruning: PruningRecipe) -> Path:
        """The final shape in one cut of the teacher, without any training."""
        target = self.stages[-1].target
        return self.cut(name, self.teacher, self.run_dir / name, self.teacher_statistics(), target, pruning)

    def initialised(self) -> Path:
        """`init: random`: the main run from random weights."""
        return self.random_init(MAIN_RUN, self.run_dir / "stage-1")

    def random_init(self, run: str, folder: Path) -> Path:
        """The final shape from random weights, trained on all the tokens at once."""
        config = target_config(self.source.family, self.source.config, self.stages[-1].target)
        label = folder.relative_to(self.run_dir).as_posix()
        initial = self.steps.step(
            f"{label}/initial",
            folder / "initial",
            {"config": config, "seed": self.recipe.seed, "like": fingerprint(self.teacher)},
            lambda: write_initial(config, self.recipe.seed, folder / "initial", companions=self.teacher),
        )
        total = self.stages[-1].span.total_steps
        span = Span(0, total, total)
        return self.distilled(
            f"{label}/distilled", initial, folder / "distilled", run, 1, span, self.recipe.distil.terms
        )

    def evaluation(self, models: Mapping[str, Path], tokens: Path) -> Evaluation:
        recipe = self.recipe
        out = self.run_dir / "evaluation.json"
        inputs = {
            "models": {name: fingerprint(folder) for name, folder in models.items()},
            "tokens": fingerprint(tokens),
            "evaluation": recipe.evaluation.model_dump(mode="json", exclude={"batch_size"}),
            "sequence_length": recipe.data.sequence_length,
            "documents": recipe.data.documents,
            "dtype": recipe.dtype,
        }
        self.steps.step(
            "evaluation",
            out,
            inputs,
            lambda: evaluate(
                models,
                out,
                tokens=tokens,
                recipe=recipe.evaluation,
                sequence_length=recipe.data.sequence_length,
                documents=recipe.data.documents,
                device=recipe.device,
                dtype=recipe.dtype,
            ),
        )
        return Evaluation.load(out)

    def final(self, trained: Path, evaluation: Evaluation) -> Path:
        """`final/`: the trained checkpoint with its model card."""
        made_from = {
            "teacher": fingerprint(self.teacher),
            "tokens": fingerprint(self.run_dir / "tokens"),
            "trained checkpoint": fingerprint(trained),
        }
        file = self.run_dir / "benchmarks.json"
        benchmarks = Benchmarks.load(file).with_own(trained, MAIN_RUN) if file.is_file() else None
        card = model_card(self.recipe, self.teacher, evaluation, self.command, made_from, benchmarks)
        out = self.run_dir / "final"

        def assemble() -> None:
            with atomic_folder(out) as folder:
                shutil.copytree(trained, folder, dirs_exist_ok=True)
                write_text(folder / "README.md", card)
            for warning in check_checkpoint(out).warnings:
                warn(f"warning: {warning}")

        return self.steps.step("final", out, {"trained": fingerprint(trained), "card": card}, assemble)


def summary(run_dir: Path, seconds: float) -> str:
    """Where everything is, for the end of a run."""
    return (
        f"checkpoint  {run_dir / 'final'}\n"
        f"report      {run_dir / 'report.html'}\n"
        f"numbers     {run_dir / 'evaluation.json'}\n"
        f"took        {duration(seconds)}"
    )
