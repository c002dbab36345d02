"""How the shapes of a search are chosen, cut and measured."""

from dataclasses import dataclass, field
from pathlib import Path

from slimqwen.recipe import (
    CalibrationRecipe,
    DataRecipe,
    DistilRecipe,
    EvaluationRecipe,
    Execution,
    PruningRecipe,
    Recipe,
    Target,
)


@dataclass(frozen=True)
class SearchSettings:
    """How the shapes of a search are chosen, cut and measured.

    pruning: the criteria of every cut. samples: sequences to calibrate on, and to refit on. measured_tokens: held-out tokens of the
    KL. align: as in `fit`. sizes_per_axis: how many sizes of each axis are cut alone, at most. shapes: how many shapes are cut.
    """

    pruning: PruningRecipe = field(default_factory=PruningRecipe)
    samples: int = 256
    measured_tokens: int = 8192
    sequence_length: int = 256
    seed: int = 0
    dtype: str = "auto"
    align: int = 128
    sizes_per_axis: int = 3
    shapes: int = 4

    def recipe(self, teacher: str, work: Path, execution: Execution) -> Recipe:
        """Return the recipe whose stages make a cut: its target is what is searched, and its training is never begun."""
        return Recipe(
            teacher=teacher,
            run_dir=work,
            target=Target(),
            pruning=self.pruning,
            data=DataRecipe(sequence_length=self.sequence_length),
            calibration=CalibrationRecipe(samples=self.samples),
            evaluation=EvaluationRecipe(tokens=self.measured_tokens),
            distil=DistilRecipe(tokens=1),
            seed=self.seed,
            dtype=self.dtype,
            execution=execution,
        )
