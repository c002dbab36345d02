"""Beyond the paper: what compensation, rotation and repair save of a cut of the width, by its depth and the tokens after it."""

from collections.abc import Callable
from fractions import Fraction

from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.recipe import Recipe
from slimqwen.study.catalogue.definition import KL, LOSS, Definition
from slimqwen.study.variation import Changes, Variation
from slimqwen.study.verdict import Finding, Runs, lower, measured

ROTATED = {"pruning.width": "rotation"}
WAYS: dict[str, tuple[str, Changes]] = {
    "paper": ("norm activation (the paper's)", {"pruning.width": "norm_activation", "pruning.compensate": False}),
    "compensated": ("+ compensation", {"pruning.width": "norm_activation", "pruning.compensate": True}),
    "rotated": ("rotation", {**ROTATED, "pruning.compensate": False, "pruning.repair": False}),
    "rotated_compensated": (
        "rotation + compensation",
        {**ROTATED, "pruning.compensate": True, "pruning.repair": False},
    ),
    "repaired": ("rotation + compensation + repair", {**ROTATED, "pruning.compensate": True, "pruning.repair": True}),
}
CUTS = {"12": Fraction(1, 8), "25": Fraction(1, 4), "37": Fraction(3, 8)}
"""Shares of the channels that go. After the middle one the model is trained."""
BUDGETS = {"eighth": Fraction(1, 8), "quarter": Fraction(1, 4), "half": Fraction(1, 2)}
"""Shares of the recipe's tokens."""


def _narrowed(cut: Fraction, budget: Fraction, way: Changes) -> Callable[[Recipe, Checkpoint], Changes]:
    def made(recipe: Recipe, teacher: Checkpoint) -> Changes:
        assert recipe.target is not None
        target = dict.fromkeys(recipe.target.model_dump())
        target["hidden_size"] = int(teacher.config["hidden_size"] * (1 - cut))
        return {"target": target, "distil.tokens": int(recipe.distil.tokens * budget), **way}

    return made


def _one_shot(cut: str) -> list[Variation]:
    return [
        Variation(
            f"{way}_{cut}", f"{title}, -{float(CUTS[cut]):.1%}", _narrowed(CUTS[cut], Fraction(1), how), trains=False
        )
        for way, (title, how) in WAYS.items()
    ]


def _trained(budget: str) -> list[Variation]:
    return [
        Variation(
            f"{way}_{budget}",
            f"{title}, -25%, {BUDGETS[budget]} of the tokens",
            _narrowed(CUTS["25"], BUDGETS[budget], how),
        )
        for way, (title, how) in WAYS.items()
    ]


def _gone(runs: Runs, cut: str) -> float:
    """Share of the KL of the paper's cut that the three together take away, before training."""
    ours, papers = (measured(runs[f"{way}_{cut}"], one_shot=True)[KL] for way in ("repaired", "paper"))
    return 1.0 - ours / papers


ROTATION = Definition(
    "rotation",
    "What do compensation, rotation and repair save of a cut of the width, and what is left of it after training?",
    "none of the paper; ours",
    "paper_half",
    [*_one_shot("12"), *_one_shot("37"), *(arm for budget in BUDGETS for arm in _trained(budget))],
    [
        *(
            Finding(
                f"{better}_beats_{worse}",
                f"{statement}, before training (-25 %)",
                "KL to the teacher saved, nats per token",
                lower(KL, f"{better}_half", f"{worse}_half", one_shot=True),
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
                f"The three together take more than 80 % off the KL of the paper's cut at -{float(share):.1%}, before training",
                "share of that KL gone, beyond 80 %",
                lambda runs, arm=arm: _gone(runs, arm) - 0.8,  # type: ignore[misc]
            )
            for cut, share, arm in ((cut, share, "half" if cut == "25" else cut) for cut, share in CUTS.items())
        ),
        *(
            Finding(
                f"stays_ahead_{metric}_{budget}",
                f"After training on {share} of the tokens the three together are still ahead of the paper's cut, by {words}",
                f"{words} saved, nats per token",
                lower(metric, f"repaired_{budget}", f"paper_{budget}"),
            )
            for metric, words in ((KL, "KL to the teacher"), (LOSS, "held-out loss"))
            for budget, share in BUDGETS.items()
        ),
    ],
)
