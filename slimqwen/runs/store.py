"""The artefacts of many recipes in one folder, each named by the content it is made from: nothing is made twice.

Two variations of a recipe that begin alike (the same statistics, the same first stage) find each other's work, within
a study and between studies; an interrupted study continues where it was.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from slimqwen.artifacts import alone, fingerprint, fingerprint_value, write_json
from slimqwen.builtin import checkpoint_folder
from slimqwen.checkpoint.config import read_json
from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.core.errors import UserError
from slimqwen.evaluation.acceptance import heldout_prompts
from slimqwen.evaluation.evaluate import Examination
from slimqwen.evaluation.result import ModelEvaluation
from slimqwen.generation.acceptance import speculative_acceptance
from slimqwen.model.device import resolve_device, resolve_dtype
from slimqwen.model.model import load
from slimqwen.recipe import Recipe
from slimqwen.runs import stages as work
from slimqwen.runs.checks import stages_of
from slimqwen.runs.record import Steps
from slimqwen.runs.stages import Work
from slimqwen.training.distil import remove_state


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
    """A folder of artefacts, `KIND/HASH/NAME`; `HASH` is that of everything the artefact is made from."""

    def __init__(self, folder: Path, command: str) -> None:
        self.folder = folder
        self.steps = Steps(folder, command)
        self._tokens: dict[str, Path] = {}  # by what was asked for

    def begin(self, recipe: Recipe) -> None:
        """Note what the folder is for. Raises UserError where it holds numbers of another precision: they do not compare."""
        device = resolve_device(recipe.execution.device)
        numerics = {
            "format": "slimqwen.numerics/1",
            "device": device.type,
            "dtype": str(resolve_dtype(recipe.dtype, device)).removeprefix("torch."),
        }
        file = self.folder / "numerics.json"
        if file.is_file() and (found := read_json(file)) != numerics:
            raise UserError(
                f"{self.folder} holds work in {found['dtype']} on {found['device']}, and this is in {numerics['dtype']} on "
                f"{numerics['device']}: its numbers do not compare; choose another run_dir."
            )
        self.steps.begin(recipe)
        write_json(file, numerics)

    def made(self, name: str, step: Work) -> Path:
        """The artefact `name`, made unless it is there. Of several processes that want it one makes it, and the others wait."""
        kind = Path(name).stem
        place = f"{kind}/{fingerprint_value(step.made_from)[:16]}"
        out = self.folder / place / name
        with alone(out, wait=True):
            return self.steps.step(place, out, step.made_from, lambda: step.make(out, kind))

    def build(self, recipe: Recipe, *, trains: bool) -> Made:
        """All the stages of a recipe; `trains` False stops before the training of the first."""
        teacher = checkpoint_folder(recipe.teacher)
        source = Checkpoint(teacher)
        stages = stages_of(recipe, source)
        carries = recipe.distil.optimizer_state == "carry"
        tokens = self.tokens(recipe)
        teacher_cache = None
        if trains and recipe.distil.is_taught and recipe.distil.teacher == "cache":
            step = work.teacher_cached(recipe, teacher, tokens, stages[-1].span.total_steps)
            teacher_cache = self.made("teacher_cache", step)
        checkpoint, metrics, start = teacher, [], None
        for stage in stages:
            moments = None
            if recipe.init == "random":
                student = self.made("initial", work.initialised(recipe, source, stage.target))
            else:
                statistics = self.statistics(recipe, checkpoint, tokens)
                student, plan_file = work.cut(
                    recipe, checkpoint, statistics, tokens, stage.target, recipe.pruning, self.made
                )
                if carries and stage.number > 1:
                    moments = work.carried(checkpoint, plan_file)
            if len(stages) == 1:
                start = student
            if not trains:
                return Made(start, None, [])
            step = work.distilled(
                recipe,
                recipe.distil,
                student,
                teacher=teacher,
                tokens=tokens,
                stage=stage,
                teacher_cache=teacher_cache,
                carried=moments,
                find=lambda carried: self.made("moments", carried),
            )
            checkpoint = self.trained(step, keep_state=carries and stage is not stages[-1])
            metrics.append(checkpoint.parent / "metrics.jsonl")
        return Made(start, checkpoint, metrics)

    def tokens(self, recipe: Recipe) -> Path:
        """Of the text as it is when it is first asked for: to recognise it means to read of every file."""
        asked = fingerprint_value([recipe.teacher, recipe.data.model_dump(mode="json")])
        if asked not in self._tokens:
            self._tokens[asked] = self.made("tokens", work.tokenized(recipe))
        return self._tokens[asked]

    def statistics(self, recipe: Recipe, checkpoint: Path, tokens: Path) -> Path:
        return self.made("statistics.safetensors", work.calibrated(recipe, checkpoint, tokens, recipe.pruning))

    def trained(self, step: Work, *, keep_state: bool) -> Path:
        """The trained checkpoint; its metrics.jsonl lies beside it and, where it is kept, its training state."""
        trained = self.made("distilled", step)
        if not keep_state:
            remove_state(trained)
        return trained

    def evaluated(self, recipe: Recipe, checkpoints: Sequence[Path]) -> list[ModelEvaluation]:
        """Every checkpoint's numbers on the held-out text, each kept as soon as it is measured."""
        teacher, tokens = checkpoint_folder(recipe.teacher), self.tokens(recipe)

        @cache
        def examination() -> Examination:
            source = Checkpoint(teacher)
            return Examination(
                source,
                source,
                tokens=tokens,
                recipe=recipe.evaluation,
                sequence_length=recipe.data.sequence_length,
                documents=recipe.data.documents,
                execution=recipe.execution,
                dtype=recipe.dtype,
                keep=self.folder / "teacher",
            )

        def of(path: Path, number: int) -> ModelEvaluation:
            def make(out: Path, title: str) -> None:
                title = f"{title} {number}/{len(checkpoints)}"
                numbers = examination().of(path.name, Checkpoint(path), title).model_dump(mode="json")
                write_json(out, {"format": "slimqwen.measured/1", "numbers": numbers})

            made_from = work.evaluated(recipe, {"teacher": teacher, "model": path}, tokens).made_from
            measured = self.made("measured.json", Work(made_from, make))
            return ModelEvaluation.model_validate(read_json(measured)["numbers"])

        return [of(path, number) for number, path in enumerate(checkpoints, start=1)]

    def drafted(self, recipe: Recipe, checkpoints: Sequence[Path]) -> list[dict[str, float]]:
        """How far each checkpoint's MTP module gets in real speculative decoding of the held-out prompts."""
        return [self._drafted(recipe, checkpoint) for checkpoint in checkpoints]

    def _drafted(self, recipe: Recipe, checkpoint: Path) -> dict[str, float]:
        settings, tokens = recipe.evaluation, self.tokens(recipe)

        def make(out: Path, title: str) -> None:
            device = resolve_device(recipe.execution.device)
            shares = speculative_acceptance(
                load(checkpoint, resolve_dtype(recipe.dtype, device), device),
                heldout_prompts(tokens, settings.acceptance_prompts, settings.acceptance_prompt_tokens).to(device),
                draft=settings.acceptance_depth,
                new_tokens=settings.acceptance_new_tokens,
                title=title,
            )
            write_json(out, {"format": "slimqwen.drafts/1"} | shares)

        made_from = {
            "checkpoint": Checkpoint(checkpoint).fingerprint(),
            "tokens": fingerprint(tokens),
            "evaluation": settings.model_dump(mode="json", exclude={"tokens"}),
            "dtype": recipe.dtype,
        }
        shares = read_json(self.made("drafts.json", Work(made_from, make)))
        return {name: share for name, share in shares.items() if name != "format"}
