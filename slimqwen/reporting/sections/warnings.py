"""What was warned of while the run was made, and what its curves warn of."""

from dataclasses import dataclass

import numpy as np

from slimqwen.reporting.run_folder import Run
from slimqwen.reporting.titles import title_of

WORTH_SAYING = 0.05  # nats per token that a held-out loss is above its lowest


@dataclass(frozen=True)
class Warned:
    """where: the steps of the run that said it."""

    where: str
    text: str


def warnings(run: Run) -> list[Warned]:
    """In the order in which they were first said: slow kernels, notes on the recipe, steps of training that were left
    out or gone back from, what narrows how the result is served; then held-out losses that rose again."""
    steps: dict[str, list[str]] = {}
    for warning in run.warnings:
        steps.setdefault(warning.text, []).append(warning.step)
    found = [Warned(", ".join(dict.fromkeys(where)), text) for text, where in steps.items()]
    for name, curve in run.steps.items():
        heldout = curve.values.get("heldout_lm", np.empty(0))
        measured = heldout[np.isfinite(heldout)]
        if len(measured) > 1 and measured[-1] > measured.min() + WORTH_SAYING:
            text = f"the held-out loss ended at {measured[-1]:.3f}, above its lowest, {measured.min():.3f}."
            found.append(Warned(title_of(name), text))
    return found
