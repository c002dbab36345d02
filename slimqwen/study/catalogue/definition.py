"""The definition of a study, and changes and gains that several studies share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.core.errors import UserError
from slimqwen.recipe import Recipe
from slimqwen.study.variation import Changes, Variation, changed
from slimqwen.study.verdict import Finding, Runs, measured

KL, LOSS = "kl_to_teacher", "loss"
MEAN = "mean of eight benchmarks"
RATES = {"fast": Fraction(1), "slow": Fraction(1, 4)}
"""Shares of the recipe's learning rate. A rate that suits a start far from the teacher destroys much of one near to it."""


@dataclass(frozen=True)
class Definition:
    """Study: its arms, and the findings that they are to confirm or contradict.

    baseline: the arm that the page compares the others with.
    given: changes to the recipe for every arm that does not override them, so that arms are what their titles say.
    evaluation: changes to the recipe's evaluation.
    drafts: also decode speculatively, with the trained models' own MTP modules.
    """

    name: str
    title: str
    paper_source: str
    baseline: str
    arms: Sequence[Variation]
    findings: Sequence[Finding]
    given: Changes = field(default_factory=dict)
    evaluation: Callable[[Recipe], Changes] = lambda recipe: {}
    drafts: bool = False

    def recipe_of(self, arm: Variation, recipe: Recipe, teacher: Checkpoint) -> tuple[Changes, Recipe]:
        """Return the arm's changes to `recipe`, and the changed recipe: with one cut, unless the arm has a schedule."""
        changes = {"schedule": "one_shot", **self.given, **arm.changes_to(recipe, teacher)}
        return changes, changed(recipe, changes)


def cut_along(*sizes: str, **changes: Any) -> Callable[[Recipe, Checkpoint], Changes]:
    """Return changes that cut only some sizes of the recipe's target, with half of its tokens: a study has many such runs."""

    def cut(recipe: Recipe, teacher: Checkpoint) -> Changes:
        assert recipe.target is not None
        wanted = recipe.target.model_dump()
        target = {name: wanted[name] if name in sizes else None for name in wanted}
        return {"target": target, "distil.tokens": recipe.distil.tokens // 2, **changes}

    return cut


def terms(*names: str) -> Changes:
    """Return changes to these terms of the loss."""
    return {"distil.terms": list(names)}


ALL_TERMS = terms("lm", "kd", "mtp_lm", "mtp_kd")
PAPERS_WIDTH: Changes = {
    "pruning.width": "norm_activation",
    "pruning.compensate": False,
    "pruning.refit_readers": False,
}


def at_both_rates(arm: Variation) -> list[Variation]:
    """Return `arm` as NAME_fast and NAME_slow: where starts differ, no single learning rate is fair to all of them."""

    def at_share(share: Fraction) -> Callable[[Recipe, Checkpoint], Changes]:
        def changes(recipe: Recipe, teacher: Checkpoint) -> Changes:
            rate = recipe.distil.learning_rate
            if rate == "auto":
                raise UserError("it is trained at shares of distil.learning_rate: give that as a number.")
            return {**arm.changes_to(recipe, teacher), "distil.learning_rate": rate * float(share)}

        return changes

    slowly = {"fast": "", "slow": f", {RATES['slow']} of the learning rate"}
    return [
        replace(arm, name=f"{arm.name}_{rate}", title=f"{arm.title}{slowly[rate]}", changes=at_share(share))
        for rate, share in RATES.items()
    ]


def at_the_better_rate(runs: Runs, arm: str, metric: str) -> float:
    """Return the final metric of `arm` at the better of its two rates; lower is better."""
    return min(measured(runs[f"{arm}_{rate}"], one_shot=False)[metric] for rate in RATES)


def lower_at_the_better_rate(metric: str, better: str, worse: str) -> Callable[[Runs], float]:
    """Return the gain of the finding that, after training, `metric` is lower in `better` than in `worse`, each at its better rate."""
    return lambda runs: at_the_better_rate(runs, worse, metric) - at_the_better_rate(runs, better, metric)
