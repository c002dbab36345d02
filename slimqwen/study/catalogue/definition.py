"""What a study is made of, and what several of them share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.recipe import Recipe
from slimqwen.study.variation import Changes, Variation
from slimqwen.study.verdict import Finding

KL, LOSS = "kl_to_teacher", "loss"
MEAN = "mean of eight benchmarks"


@dataclass(frozen=True)
class Definition:
    """A study: `baseline` is the arm that the page's differences are taken against.

    drafts: also decode speculatively, with the trained models' own MTP modules.
    """

    name: str
    title: str
    paper_source: str
    baseline: str
    arms: Sequence[Variation]
    findings: Sequence[Finding]
    drafts: bool = False


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
