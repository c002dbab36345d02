"""Numbers of the models of a study, each measured once and kept."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from slimqwen.artifacts import write_json
from slimqwen.builtin import checkpoint_folder
from slimqwen.checkpoint.config import read_json
from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.evaluation.acceptance import heldout_prompts
from slimqwen.evaluation.evaluate import Examination
from slimqwen.evaluation.result import ModelEvaluation
from slimqwen.generation.acceptance import speculative_acceptance
from slimqwen.model.device import resolve_device, resolve_dtype
from slimqwen.model.model import load
from slimqwen.recipe import Execution, Recipe
from slimqwen.runs.stage import Stage
from slimqwen.runs.store import ContentStore
from slimqwen.runs.training_stages import Evaluating


@dataclass(frozen=True)
class Examining(Evaluating):
    """The numbers of one model, compared with the teacher's, by an examination that several models share.

    models: `teacher` and `model`. place: which it is of how many, shown with the progress.
    """

    examination: Callable[[], Examination]
    place: str

    file = "measured.json"

    def make(self, out: Path, execution: Execution, title: str) -> None:
        model = self.models["model"]
        numbers = self.examination().of(model.name, Checkpoint(model), f"{title} {self.place}").model_dump(mode="json")
        write_json(out, {"format": "slimqwen.measured/1", "numbers": numbers})


@dataclass(frozen=True)
class Drafting(Stage):
    """How far a checkpoint's MTP module gets in speculative decoding of the held-out prompts."""

    recipe: Recipe
    checkpoint: Path
    tokens: Path

    file = "drafts.json"
    revision = 1

    @property
    def inputs(self) -> Mapping[str, Any]:
        return {"checkpoint": self.checkpoint, "tokens": self.tokens}

    @property
    def method(self) -> Mapping[str, Any]:
        evaluation = self.recipe.evaluation
        return {
            "prompts": evaluation.acceptance.prompts,
            "prompt_tokens": evaluation.acceptance.prompt_tokens,
            "draft": evaluation.acceptance.depth,
            "new_tokens": evaluation.acceptance.new_tokens,
            "dtype": self.recipe.dtype,
        }

    def make(self, out: Path, execution: Execution, title: str) -> None:
        device, method = resolve_device(execution.device), self.method
        shares = speculative_acceptance(
            load(self.checkpoint, resolve_dtype(self.recipe.dtype, device), device),
            heldout_prompts(self.tokens, method["prompts"], method["prompt_tokens"]).to(device),
            draft=method["draft"],
            new_tokens=method["new_tokens"],
            title=title,
        )
        write_json(out, {"format": "slimqwen.drafts/1"} | shares)


def examined(recipe: Recipe, checkpoints: Sequence[Path], tokens: Path, store: ContentStore) -> list[ModelEvaluation]:
    """Return every checkpoint's numbers on the held-out text, each kept as soon as it is measured."""
    teacher = checkpoint_folder(recipe.teacher)

    @cache
    def examination() -> Examination:
        source = Checkpoint(teacher)
        return Examination(
            source,
            source,
            tokens=tokens,
            recipe=recipe.evaluation,
            text=recipe.text,
            execution=store.execution,
            keep=store.folder / "teacher",
        )

    numbers = []
    for number, path in enumerate(checkpoints, start=1):
        models, place = {"teacher": teacher, "model": path}, f"{number}/{len(checkpoints)}"
        measured = store.get(Examining(recipe, models, tokens, examination, place))
        numbers.append(ModelEvaluation.model_validate(read_json(measured)["numbers"]))
    return numbers


def drafted(recipe: Recipe, checkpoints: Sequence[Path], tokens: Path, store: ContentStore) -> list[dict[str, float]]:
    """Return the shares of accepted drafts of each checkpoint, by name."""
    files = [store.get(Drafting(recipe, checkpoint, tokens)) for checkpoint in checkpoints]
    return [{name: share for name, share in read_json(file).items() if name != "format"} for file in files]
