"""The stages up to the cut checkpoint. Each reads its method from the recipe in one place, which is hashed and used alike."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from slimqwen.builtin import checkpoint_folder
from slimqwen.calibration.calibrate import calibrate
from slimqwen.calibration.text import TRAINING_TEXT
from slimqwen.data.identity import text_identity
from slimqwen.data.store import load_manifest
from slimqwen.data.tokenize import tokenize
from slimqwen.depth.measure import DepthEffort, measure_depth
from slimqwen.healing.heal import heal
from slimqwen.planning.plan import plan
from slimqwen.pruning.prune import prune
from slimqwen.recipe import DataRecipe, Execution, Recipe, Target, WidthCriterion
from slimqwen.refit.refit import refit
from slimqwen.runs.stage import Stage
from slimqwen.teacher_cache.write import write_teacher_cache
from slimqwen.training.course import compute_course


@dataclass(frozen=True)
class Tokenizing(Stage):
    """Token ids of the text, split into training and held-out."""

    data: DataRecipe
    tokenizer: Path

    file = "tokens"
    revision = 1

    @property
    def inputs(self) -> Mapping[str, Any]:
        return text_identity(self.data, self.tokenizer)

    @property
    def method(self) -> Mapping[str, Any]:
        return {**source_settings(self.data), "separator": self.data.separator}

    def make(self, out: Path, execution: Execution, title: str) -> None:
        tokenize(tokenizer=self.tokenizer, out=out, execution=execution, title=title, **self.method)


@dataclass(frozen=True)
class TeacherCaching(Stage):
    """The teacher's distributions on the text of `total_steps` steps, for every training of a run."""

    recipe: Recipe
    tokens: Path
    total_steps: int

    file = "teacher_cache"
    revision = 1
    is_shared = True

    @property
    def inputs(self) -> Mapping[str, Any]:
        return {"teacher": checkpoint_folder(self.recipe.teacher), "tokens": self.tokens}

    @property
    def method(self) -> Mapping[str, Any]:
        return {
            "recipe": self.recipe.distil.teacher,
            "text": self.recipe.text,
            "with_mtp": self.recipe.distil.is_taught_by_mtp,
            "sequences": compute_course(self.recipe.distil, self.recipe.text.sequence_length).first_row(
                self.total_steps
            ),
        }

    def make(self, out: Path, execution: Execution, title: str) -> None:
        teacher = checkpoint_folder(self.recipe.teacher)
        write_teacher_cache(teacher, out, tokens=self.tokens, execution=execution, title=title, **self.method)


@dataclass(frozen=True)
class Calibrating(Stage):
    """The statistics of a checkpoint, with the second moments that `width: rotation` needs."""

    recipe: Recipe
    checkpoint: Path
    tokens: Path

    file = "statistics.safetensors"
    revision = 1
    is_shared = True

    @property
    def inputs(self) -> Mapping[str, Any]:
        return {"checkpoint": self.checkpoint, "tokens": calibration_sources(self.recipe, self.tokens)}

    @property
    def method(self) -> Mapping[str, Any]:
        return {
            "text": self.recipe.text.packed,
            "samples": self.recipe.calibration.samples,
            "second_moments": self._has_second_moments,
        }

    @property
    def _has_second_moments(self) -> bool:
        return self.recipe.pruning.width == WidthCriterion.ROTATION

    def make(self, out: Path, execution: Execution, title: str) -> None:
        sources = calibration_sources(self.recipe, self.tokens)
        calibrate(
            self.checkpoint,
            out,
            recipe=self.recipe.calibration.model_copy(update={"sources": sources}),
            text=self.recipe.text.packed,
            second_moments=self._has_second_moments,
            execution=execution,
            title=title,
        )


@dataclass(frozen=True)
class DepthMeasuring(Stage):
    """What leaving layers out does to a checkpoint, on the text that was calibrated on."""

    recipe: Recipe
    checkpoint: Path
    statistics: Path
    tokens: Path
    target: Target

    file = "depth.json"
    revision = 1
    is_shared = True

    @property
    def inputs(self) -> Mapping[str, Any]:
        tokens = calibration_sources(self.recipe, self.tokens)
        return {"checkpoint": self.checkpoint, "statistics": self.statistics, "tokens": tokens}

    @property
    def method(self) -> Mapping[str, Any]:
        recipe, sources = self.recipe, calibration_sources(self.recipe, self.tokens)
        samples = max(recipe.calibration.depth_samples, len(sources))
        return {
            "text": recipe.text.packed,
            "num_hidden_layers": self.target.num_hidden_layers,
            "effort": DepthEffort(samples=samples, refit=recipe.pruning.refit_outputs),
        }

    def make(self, out: Path, execution: Execution, title: str) -> None:
        measure_depth(
            self.checkpoint,
            out,
            statistics=self.statistics,
            tokens=calibration_sources(self.recipe, self.tokens),
            execution=execution,
            title=title,
            **self.method,
        )


@dataclass(frozen=True)
class Planning(Stage):
    """Which units stay; depth: what leaving layers out does, for `pruning.depth: measured`."""

    recipe: Recipe
    checkpoint: Path
    statistics: Path
    target: Target
    depth: Path | None

    file = "plan.json"
    revision = 2  # its criteria have the keys of today's recipe

    @property
    def inputs(self) -> Mapping[str, Any]:
        return {"checkpoint": self.checkpoint, "statistics": self.statistics, "depth": self.depth}

    @property
    def method(self) -> Mapping[str, Any]:
        return {"target": self.target, "pruning": self.recipe.pruning}

    def make(self, out: Path, execution: Execution, title: str) -> None:
        plan(
            self.checkpoint,
            out,
            statistics=self.statistics,
            target=self.target,
            pruning=self.recipe.pruning,
            depth=self.depth,
        )


@dataclass(frozen=True)
class Pruning(Stage):
    """The checkpoint that a plan leaves."""

    checkpoint: Path
    plan: Path

    file = "pruned"
    revision = 1
    is_shared = True

    @property
    def inputs(self) -> Mapping[str, Any]:
        return {"checkpoint": self.checkpoint, "plan": self.plan}

    @property
    def method(self) -> Mapping[str, Any]:
        return {}

    def make(self, out: Path, execution: Execution, title: str) -> None:
        prune(self.checkpoint, out, plan=self.plan, title=title)


@dataclass(frozen=True)
class _Fitting(Stage):
    """A cut checkpoint brought nearer to the one it was cut from, layer by layer, on the text that was calibrated on."""

    recipe: Recipe
    cut: Path
    checkpoint: Path
    plan: Path
    tokens: Path

    fit: ClassVar[Callable[..., object]]

    @property
    def inputs(self) -> Mapping[str, Any]:
        tokens = calibration_sources(self.recipe, self.tokens)
        return {"cut": self.cut, "checkpoint": self.checkpoint, "plan": self.plan, "tokens": tokens}

    def make(self, out: Path, execution: Execution, title: str) -> None:
        type(self).fit(
            self.cut,
            out,
            teacher=self.checkpoint,
            plan=self.plan,
            tokens=calibration_sources(self.recipe, self.tokens),
            execution=execution,
            title=title,
            **self.method,
        )


class Refitting(_Fitting):
    """`cut`, which `plan` made of `checkpoint`, its output matrices refitted."""

    file = "refitted"
    revision = 1
    is_shared = True
    fit = staticmethod(refit)

    @property
    def method(self) -> Mapping[str, Any]:
        return {"text": self.recipe.text.packed, "samples": self.recipe.calibration.samples}


class Healing(_Fitting):
    """`cut`, which `plan` made of `checkpoint`, its layers trained alone."""

    file = "healed"
    revision = 1
    is_shared = True
    fit = staticmethod(heal)

    @property
    def method(self) -> Mapping[str, Any]:
        assert self.recipe.healing is not None
        return {"text": self.recipe.text.packed, "recipe": self.recipe.healing}


def source_settings(data: DataRecipe) -> dict[str, Any]:
    """Return what decides which text is read, and which of it is held out."""
    return {
        "sources": data.sources,
        "heldout_sources": data.heldout_sources,
        "heldout_fraction": data.heldout_fraction,
    }


def calibration_sources(recipe: Recipe, tokens: Path) -> dict[str, Path]:
    """Return the folders of tokens to calibrate on, by name.

    They are the recipe's own sources, or those of the training text; where it is no mixture, the training text.
    """
    mixed = {name: tokens / name for name in load_manifest(tokens).mixture}
    return recipe.calibration.sources or mixed or {TRAINING_TEXT: tokens}
