"""Beyond the paper: compensation, rotation and repair at several cuts of the width and training budgets."""

from collections.abc import Callable
from fractions import Fraction

from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.recipe import Recipe
from slimqwen.study.catalogue.definition import (
    KL,
    LOSS,
    PAPERS_WIDTH,
    Definition,
    at_both_rates,
    lower_at_the_better_rate,
)
from slimqwen.study.variation import Changes, Variation
from slimqwen.study.verdict import Finding, Runs, lower, measured

ROTATED = {"pruning.width": "rotation"}
WAYS: dict[str, tuple[str, Changes]] = {
    "paper": ("norm activation (the paper's)", {}),
    "compensated": ("+ compensation", {"pruning.compensate": True}),
    "rotated": ("rotation", ROTATED),
    "rotated_compensated": ("rotation + compensation", {**ROTATED, "pruning.compensate": True}),
    "repaired": (
        "rotation + compensation + repair",
        {**ROTATED, "pruning.compensate": True, "pruning.refit_readers": True},
    ),
}
CUTS = {"12": Fraction(1, 8), "25": Fraction(1, 4), "37": Fraction(3, 8)}
"""Shares of the channels that are cut. The model is trained after the cut of the middle one."""
BUDGETS = {"eighth": Fraction(1, 8), "quarter": Fraction(1, 4), "half": Fraction(1, 2)}
"""Shares of the recipe's tokens."""


def _narrowed(cut: Fraction, way: Changes, budget: Fraction = Fraction(1)) -> Callable[[Recipe, Checkpoint], Changes]:
    def narrow(recipe: Recipe, teacher: Checkpoint) -> Changes:
        assert recipe.target is not None
        target = dict.fromkeys(recipe.target.model_dump())
        target["hidden_size"] = int(teacher.config["hidden_size"] * (1 - cut))
        return {
            "target": target,
            "distil.tokens": int(recipe.distil.tokens * budget),
            **way,
        }

    return narrow


def _one_shot(cut: str) -> list[Variation]:
    return [
        Variation(f"{way}_{cut}", f"{title}, -{float(CUTS[cut]):.1%}", _narrowed(CUTS[cut], how), trains=False)
        for way, (title, how) in WAYS.items()
    ]


def _trained(way: str, budget: str) -> list[Variation]:
    title, how = WAYS[way]
    return at_both_rates(
        Variation(
            f"{way}_{budget}",
            f"{title}, -25%, {BUDGETS[budget]} of the tokens",
            _narrowed(CUTS["25"], how, BUDGETS[budget]),
        )
    )


def _share_removed(runs: Runs, cut: str) -> float:
    """Return the share of the KL of the paper's cut that the three together remove, before training."""
    ours, papers = (measured(runs[f"{way}_{cut}"], one_shot=True)[KL] for way in ("repaired", "paper"))
    return 1.0 - ours / papers


ROTATION = Definition(
    "rotation",
    "How much better is a cut of the width with compensation, rotation and repair, before and after training?",
    "no table of the paper; ours",
    "paper_half_fast",
    [
        *(arm for cut in CUTS for arm in _one_shot(cut)),
        *(arm for budget in BUDGETS for way in ("paper", "repaired") for arm in _trained(way, budget)),
    ],
    [
        *(
            Finding(
                f"{better}_beats_{worse}",
                f"{statement}, before training (-25 %)",
                "KL to the teacher saved, nats per token",
                lower(KL, f"{better}_25", f"{worse}_25", one_shot=True),
            )
            for better, worse, statement in (
                ("compensated", "paper", "Compensated gains beat the paper's cut"),
                ("rotated", "compensated", "Rotation alone beats compensated gains"),
                ("rotated_compensated", "rotated", "Compensated gains make rotation better"),
                ("repaired", "rotated_compensated", "Repaired readers make both better"),
            )
        ),
        *(
            Finding(
                f"takes_80_percent_off_{cut}",
                f"The three together remove more than 80 % of the KL of the paper's cut at -{float(share):.1%}, before training",
                "share of that KL removed, beyond 80 %",
                lambda runs, cut=cut: _share_removed(runs, cut) - 0.8,  # type: ignore[misc]
            )
            for cut, share in CUTS.items()
        ),
        *(
            Finding(
                f"stays_ahead_{metric}_{budget}",
                f"After training on {share} of the tokens the three together are still better than the paper's cut, each at the better "
                f"of two learning rates, by {words}",
                f"{words} saved, nats per token",
                lower_at_the_better_rate(metric, f"repaired_{budget}", f"paper_{budget}"),
            )
            for metric, words in ((KL, "KL to the teacher"), (LOSS, "held-out loss"))
            for budget, share in BUDGETS.items()
        ),
    ],
    given={**PAPERS_WIDTH, "pruning.refit_outputs": False},
)
