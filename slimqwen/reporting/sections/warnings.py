"""The section on warnings: those raised during the run, and those derived from its curves."""

from dataclasses import dataclass

import numpy as np

from slimqwen.reporting.run_folder import Run
from slimqwen.reporting.titles import title_of

NOTABLE_RISE = 0.05  # of a held-out loss above its lowest, nats per token


@dataclass(frozen=True)
class Warned:
    """A warning. where: the steps of the run that raised it."""

    where: str
    text: str


def collect_warnings(run: Run) -> list[Warned]:
    """List the warnings in the order of their first occurrence, then held-out losses that rose again.

    They are of slow kernels, notes on the recipe, training steps that were left out or repeated, limits on serving.
    """
    steps: dict[str, list[str]] = {}
    for warning in run.warnings:
        steps.setdefault(warning.text, []).append(warning.step)
    found = [Warned(", ".join(dict.fromkeys(where)), text) for text, where in steps.items()]
    for name, curve in run.steps.items():
        heldout = curve.values.get("heldout_lm", np.empty(0))
        measured = heldout[np.isfinite(heldout)]
        if len(measured) > 1 and measured[-1] > measured.min() + NOTABLE_RISE:
            text = f"the held-out loss ended at {measured[-1]:.3f}, above its lowest, {measured.min():.3f}."
            found.append(Warned(title_of(name), text))
    return found
