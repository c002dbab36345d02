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
RATES = {"fast": Fraction(1), "slow": Fraction(1, 4)}
"""Of the recipe's learning rate. One that heals a model far from the teacher throws away much of a start that is near."""


def _narrowed(cut: Fraction, way: Changes, **training: float) -> Callable[[Recipe, Checkpoint], Changes]:
    def made(recipe: Recipe, teacher: Checkpoint) -> Changes:
        assert recipe.target is not None
        target = dict.fromkeys(recipe.target.model_dump())
        target["hidden_size"] = int(teacher.config["hidden_size"] * (1 - cut))
        distil = recipe.distil.model_dump()
        return {
            "target": target,
            "pruning.experts.refit": False,
            **way,
            **{f"distil.{key}": type(distil[key])(distil[key] * share) for key, share in training.items()},
        }

    return made


def _one_shot(cut: str) -> list[Variation]:
    return [
        Variation(f"{way}_{cut}", f"{title}, -{float(CUTS[cut]):.1%}", _narrowed(CUTS[cut], how), trains=False)
        for way, (title, how) in WAYS.items()
    ]


def _trained(way: str, budget: str, rate: str) -> Variation:
    title, how = WAYS[way]
    slowly = "" if rate == "fast" else f", {RATES[rate]} of the learning rate"
    return Variation(
        f"{way}_{budget}_{rate}",
        f"{title}, -25%, {BUDGETS[budget]} of the tokens{slowly}",
        _narrowed(CUTS["25"], how, tokens=float(BUDGETS[budget]), learning_rate=float(RATES[rate])),
    )


def _gone(runs: Runs, cut: str) -> float:
    """Share of the KL of the paper's cut that the three together take away, before training."""
    ours, papers = (measured(runs[f"{way}_{cut}"], one_shot=True)[KL] for way in ("repaired", "paper"))
    return 1.0 - ours / papers


def _ahead(metric: str, budget: str) -> Callable[[Runs], float]:
    """How far the three together are ahead after training, each way at the better of its learning rates."""

    def gain(runs: Runs) -> float:
        ours, papers = (
            min(measured(runs[f"{way}_{budget}_{rate}"], one_shot=False)[metric] for rate in RATES)
            for way in ("repaired", "paper")
        )
        return papers - ours

    return gain


ROTATION = Definition(
    "rotation",
    "What do compensation, rotation and repair save of a cut of the width, and what is left of it after training?",
    "none of the paper; ours",
    "paper_half_fast",
    [
        *(arm for cut in CUTS for arm in _one_shot(cut)),
        *(_trained(way, budget, rate) for budget in BUDGETS for way in ("paper", "repaired") for rate in RATES),
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
                f"The three together take more than 80 % off the KL of the paper's cut at -{float(share):.1%}, before training",
                "share of that KL gone, beyond 80 %",
                lambda runs, cut=cut: _gone(runs, cut) - 0.8,  # type: ignore[misc]
            )
            for cut, share in CUTS.items()
        ),
        *(
            Finding(
                f"stays_ahead_{metric}_{budget}",
                f"After training on {share} of the tokens the three together are still ahead of the paper's cut, each at the better "
                f"of two learning rates, by {words}",
                f"{words} saved, nats per token",
                _ahead(metric, budget),
            )
            for metric, words in ((KL, "KL to the teacher"), (LOSS, "held-out loss"))
            for budget, share in BUDGETS.items()
        ),
    ],
)
