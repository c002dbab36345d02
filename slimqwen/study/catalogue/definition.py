"""What a study is made of, and what several of them share."""

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
"""Of the recipe's learning rate. One that heals a model far from the teacher throws away much of a start that is near."""


@dataclass(frozen=True)
class Definition:
    """A study: `baseline` is the arm that the page's differences are taken against.

    given: what every arm has that does not say otherwise, whatever the recipe says, so that arms are what they are called.
    evaluation: what the study measures otherwise than the recipe says.
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
        """What the arm changes of `recipe`, and the recipe that comes of it: one cut, unless the arm has a schedule."""
        changes = {"schedule": "one_shot", **self.given, **arm.changes_to(recipe, teacher)}
        return changes, changed(recipe, changes)


def cut_along(*sizes: str, **changes: Any) -> Callable[[Recipe, Checkpoint], Changes]:
    """The recipe's cut along some sizes alone, with half of its tokens: a study has many such runs."""

    def made(recipe: Recipe, teacher: Checkpoint) -> Changes:
        assert recipe.target is not None
        wanted = recipe.target.model_dump()
        target = {name: wanted[name] if name in sizes else None for name in wanted}
        return {"target": target, "distil.tokens": recipe.distil.tokens // 2, **changes}

    return made


def terms(*names: str) -> Changes:
    return {"distil.terms": list(names)}


ALL_TERMS = terms("lm", "kd", "mtp_lm", "mtp_kd")
PAPERS_WIDTH: Changes = {"pruning.width": "norm_activation", "pruning.compensate": False, "pruning.repair": False}


def at_both_rates(arm: Variation) -> list[Variation]:
    """`arm` as NAME_fast and NAME_slow: where starts differ, no single learning rate is fair to all of them."""

    def made(share: Fraction) -> Callable[[Recipe, Checkpoint], Changes]:
        def changes(recipe: Recipe, teacher: Checkpoint) -> Changes:
            rate = recipe.distil.learning_rate
            if rate == "auto":
                raise UserError("it is trained at shares of distil.learning_rate: give that as a number.")
            return {**arm.changes_to(recipe, teacher), "distil.learning_rate": rate * float(share)}

        return changes

    slowly = {"fast": "", "slow": f", {RATES['slow']} of the learning rate"}
    return [
        replace(arm, name=f"{arm.name}_{rate}", title=f"{arm.title}{slowly[rate]}", changes=made(share))
        for rate, share in RATES.items()
    ]


def at_the_better_rate(runs: Runs, arm: str, metric: str) -> float:
    """What `arm` ends with, of a metric that is better where it is lower."""
    return min(measured(runs[f"{arm}_{rate}"], one_shot=False)[metric] for rate in RATES)


def lower_at_the_better_rate(metric: str, better: str, worse: str) -> Callable[[Runs], float]:
    """The gain of a finding that says: after training, `metric` is lower in `better` than in `worse`, each at its better rate."""
    return lambda runs: at_the_better_rate(runs, worse, metric) - at_the_better_rate(runs, better, metric)
