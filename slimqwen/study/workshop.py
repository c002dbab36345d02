"""The artefacts of many recipes in one folder, each named by the content it is made from: nothing is made twice.

Two variations of a recipe that begin alike (the same statistics, the same first stage) find each other's work, within
a study and between studies; an interrupted study continues where it was.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimqwen.artifacts import atomic_folder, fingerprint, fingerprint_value, write_json, write_text
from slimqwen.builtin import checkpoint_folder
from slimqwen.calibration.calibrate import calibrate
from slimqwen.checkpoint.config import read_json
from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.data.identity import text_identity
from slimqwen.data.tokenize import tokenize
from slimqwen.distillation.distil import SETTINGS_WITHOUT_EFFECT, distil
from slimqwen.distillation.pretrain import write_initial
from slimqwen.evaluation.acceptance import heldout_prompts
from slimqwen.evaluation.evaluate import evaluate
from slimqwen.evaluation.result import Evaluation, ModelEvaluation
from slimqwen.generation.acceptance import speculative_acceptance
from slimqwen.modeling.device import resolve_device, resolve_dtype
from slimqwen.modeling.model import load
from slimqwen.planning.plan import plan
from slimqwen.planning.shapes import target_config
from slimqwen.preflight import Stage, stages_of
from slimqwen.pruning.prune import prune
from slimqwen.recipe import Recipe, Target
from slimqwen.repair.repair import repair
from slimqwen.steps import Steps

STATISTICS, PLAN, CHECKPOINT, METRICS = "statistics.safetensors", "plan.json", "checkpoint", "metrics.jsonl"
DRAFTS = "drafts.json"


@dataclass(frozen=True)
class Made:
    """What a recipe led to.

    start: the final shape before any training; None where it was reached in several stages.
    trained: after the last stage. metrics: one metrics.jsonl per stage.
    """

    start: Path | None
    trained: Path | None
    metrics: list[Path]


class Workshop:
    """A folder of artefacts, `KIND/HASH/`; `HASH` is that of everything the artefact is made from."""

    def __init__(self, folder: Path, command: str) -> None:
        self.folder = folder
        self.steps = Steps(folder, command)

    def made(self, kind: str, inputs: Mapping[str, Any], make: Callable[[Path], object]) -> Path:
        """The folder `kind`/HASH, filled by `make` unless it is there."""
        name = f"{kind}/{fingerprint_value(inputs)[:16]}"
        out = self.folder / name

        def fill() -> None:
            with atomic_folder(out) as folder:
                make(folder)

        return self.steps.step(name, out, inputs, fill)

    def build(self, recipe: Recipe, *, trains: bool) -> Made:
        """All the stages of a recipe; `trains` False stops before the training of the first."""
        teacher = checkpoint_folder(recipe.teacher)
        source = Checkpoint(teacher)
        stages = stages_of(recipe, source)
        tokens = self.tokens(recipe)
        checkpoint, metrics, start = teacher, [], None
        for stage in stages:
            if recipe.init == "random":
                checkpoint = self.initial(recipe, source, stage.target)
            else:
                statistics = self.statistics(recipe, checkpoint, tokens)
                checkpoint = self.pruned(recipe, checkpoint, statistics, tokens, stage.target)
            if len(stages) == 1:
                start = checkpoint
            if not trains:
                return Made(start, None, [])
            trained = self.distilled(recipe, checkpoint, teacher, tokens, stage)
            checkpoint = trained / CHECKPOINT
            metrics.append(trained / METRICS)
        return Made(start, checkpoint, metrics)

    def tokens(self, recipe: Recipe) -> Path:
        data, teacher = recipe.data, checkpoint_folder(recipe.teacher)

        def make(folder: Path) -> None:
            tokenize(
                data.sources,
                teacher,
                folder / "text",
                heldout_sources=data.heldout_sources,
                heldout_fraction=data.heldout_fraction,
                workers=data.workers,
            )

        return self.made("tokens", text_identity(data, teacher), make) / "text"

    def statistics(self, recipe: Recipe, checkpoint: Path, tokens: Path) -> Path:
        settings, second_moments = recipe.calibration, recipe.pruning.width == "rotation"
        inputs = {
            "checkpoint": fingerprint(checkpoint),
            "tokens": [fingerprint(folder) for folder in settings.sources.values() or [tokens]],
            "calibration": settings.model_dump(mode="json", exclude={"batch_size", "streaming", "memory_budget_bytes"}),
            "sequence_length": recipe.data.sequence_length,
            "seed": recipe.seed,
            "dtype": recipe.dtype,
            "second_moments": second_moments,
        }

        def make(folder: Path) -> None:
            calibrate(
                checkpoint,
                folder / STATISTICS,
                tokens=tokens,
                recipe=settings,
                sequence_length=recipe.data.sequence_length,
                seed=recipe.seed,
                device=recipe.device,
                dtype=recipe.dtype,
                second_moments=second_moments,
            )

        return self.made("statistics", inputs, make) / STATISTICS

    def pruned(self, recipe: Recipe, checkpoint: Path, statistics: Path, tokens: Path, target: Target) -> Path:
        """Cut by a plan, and repaired where the recipe says so."""
        inputs: dict[str, Any] = {
            "checkpoint": fingerprint(checkpoint),
            "statistics": fingerprint(statistics),
            "target": target.model_dump(),
            "pruning": recipe.pruning.model_dump(),
        }
        if recipe.pruning.experts.refit:
            inputs |= {"tokens": fingerprint(tokens), "samples": recipe.calibration.samples, "seed": recipe.seed}

        def make(folder: Path) -> None:
            plan(checkpoint, folder / PLAN, statistics=statistics, target=target, pruning=recipe.pruning)
            if not recipe.pruning.experts.refit:
                prune(checkpoint, folder / CHECKPOINT, plan=folder / PLAN)
                return
            prune(checkpoint, folder / "cut", plan=folder / PLAN)
            repair(
                folder / "cut",
                folder / CHECKPOINT,
                teacher=checkpoint,
                plan=folder / PLAN,
                tokens=tokens,
                samples=recipe.calibration.samples,
                batch_size=recipe.calibration.batch_size,
                sequence_length=recipe.data.sequence_length,
                seed=recipe.seed,
                device=recipe.device,
                dtype=recipe.dtype,
            )

        return self.made("pruned", inputs, make) / CHECKPOINT

    def initial(self, recipe: Recipe, source: Checkpoint, target: Target) -> Path:
        """The target's shape from random weights."""
        config = target_config(source.family, source.config, target)
        inputs = {"config": config, "seed": recipe.seed, "like": fingerprint(source.folder)}
        return (
            self.made(
                "initial",
                inputs,
                lambda folder: write_initial(config, recipe.seed, folder / CHECKPOINT, companions=source.folder),
            )
            / CHECKPOINT
        )

    def distilled(self, recipe: Recipe, student: Path, teacher: Path, tokens: Path, stage: Stage) -> Path:
        """The folder of a trained checkpoint and its metrics. While it trains, its state lies beside it."""
        span = stage.span
        inputs = {
            "student": fingerprint(student),
            "teacher": fingerprint(teacher),
            "tokens": fingerprint(tokens),
            "distil": recipe.distil.model_dump(mode="json", exclude=SETTINGS_WITHOUT_EFFECT),
            "sequence_length": recipe.data.sequence_length,
            "documents": recipe.data.documents,
            "span": [span.first_step, span.end_step, span.total_steps],
            "seed": recipe.seed,
            "dtype": recipe.dtype,
        }
        work = self.folder / "training" / fingerprint_value(inputs)[:16]

        def make(folder: Path) -> None:
            trained = distil(
                student,
                work / CHECKPOINT,
                tokens=tokens,
                recipe=recipe.distil,
                sequence_length=recipe.data.sequence_length,
                documents=recipe.data.documents,
                teacher=teacher,
                span=span,
                seed=recipe.seed,
                device=recipe.device,
                dtype=recipe.dtype,
                metrics=work / METRICS,
                stage=stage.number,
                keep_state=True,
            )
            write_text(folder / METRICS, (work / METRICS).read_text(encoding="utf-8"))
            trained.rename(folder / CHECKPOINT)

        made = self.made("distilled", inputs, make)
        shutil.rmtree(work, ignore_errors=True)
        return made

    def evaluated(self, recipe: Recipe, checkpoints: Sequence[Path]) -> list[ModelEvaluation]:
        """Every checkpoint's numbers on the held-out text. The teacher is measured once for all that have none yet."""
        teacher, tokens = checkpoint_folder(recipe.teacher), self.tokens(recipe)
        settings = {
            "teacher": fingerprint(teacher),
            "tokens": fingerprint(tokens),
            "evaluation": recipe.evaluation.model_dump(mode="json", exclude={"batch_size"}),
            "sequence_length": recipe.data.sequence_length,
            "documents": recipe.data.documents,
            "dtype": recipe.dtype,
        }
        results = {
            path: self.folder
            / "evaluation"
            / f"{fingerprint_value({**settings, 'model': fingerprint(path)})[:16]}.json"
            for path in dict.fromkeys(checkpoints)
        }
        missing = {str(number): path for number, path in enumerate(results) if not results[path].exists()}
        if missing:
            together = evaluate(
                {"teacher": teacher, **missing},
                self.folder / "evaluation" / "latest.json",
                tokens=tokens,
                recipe=recipe.evaluation,
                sequence_length=recipe.data.sequence_length,
                documents=recipe.data.documents,
                device=recipe.device,
                dtype=recipe.dtype,
            )
            for name, path in missing.items():
                write_text(
                    results[path],
                    together.model_copy(update={"models": {name: together.models[name]}}).model_dump_json(),
                )
        return [next(iter(Evaluation.load(results[path]).models.values())) for path in checkpoints]

    def drafted(self, recipe: Recipe, checkpoints: Sequence[Path]) -> list[dict[str, float]]:
        """How far each checkpoint's MTP module gets in real speculative decoding of the held-out prompts."""
        return [self._drafted(recipe, checkpoint) for checkpoint in checkpoints]

    def _drafted(self, recipe: Recipe, checkpoint: Path) -> dict[str, float]:
        settings, tokens = recipe.evaluation, self.tokens(recipe)
        inputs = {
            "checkpoint": fingerprint(checkpoint),
            "tokens": fingerprint(tokens),
            "evaluation": settings.model_dump(mode="json", exclude={"batch_size", "tokens"}),
            "dtype": recipe.dtype,
        }

        def make(folder: Path) -> None:
            device = resolve_device(recipe.device)
            shares = speculative_acceptance(
                load(checkpoint, resolve_dtype(recipe.dtype, device), device),
                heldout_prompts(tokens, settings.acceptance_prompts, settings.acceptance_prompt_tokens).to(device),
                draft=settings.acceptance_depth,
                new_tokens=settings.acceptance_new_tokens,
                title="drafts",
            )
            write_json(folder / DRAFTS, shares)

        shares: dict[str, float] = read_json(self.made("drafts", inputs, make) / DRAFTS)
        return shares
