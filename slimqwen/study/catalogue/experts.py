"""Table 2: which experts to keep, and whether to merge the others into them."""

from collections.abc import Callable
from statistics import fmean, pstdev

from slimqwen.study.catalogue.definition import (
    KL,
    MEAN,
    Definition,
    at_both_rates,
    at_the_better_rate,
    cut_along,
    lower_at_the_better_rate,
)
from slimqwen.study.variation import Variation
from slimqwen.study.verdict import Finding, Runs, lower, measured

BETTER = "each at the better of two learning rates"
KL_SAVED = "KL to the teacher saved, nats per token"


def _experts(compression: str, importance: str, similarity: str, score: float) -> Variation:
    name = f"{compression}_{importance}" + ("" if compression == "prune" else f"_{similarity}")
    how = {"prune": "prune", "merge": "merge", "partial": "partial merge"}[compression]
    title = f"{how}, {importance}" + ("" if compression == "prune" else f", {similarity}")
    changes = {
        "pruning.experts.compression": compression,
        "pruning.experts.importance": importance,
        "pruning.experts.similarity": similarity,
        "pruning.refit_outputs": False,
    }
    return Variation(name, title, cut_along("num_experts", "num_experts_per_tok", **changes), paper={MEAN: score})


NINE_ROWS = [
    _experts("prune", "soft_logits", "expert_output", 63.75),
    _experts("prune", "reap", "expert_output", 63.66),
    _experts("merge", "soft_logits", "router_weights", 63.00),
    _experts("partial", "soft_logits", "router_weights", 63.36),
    _experts("partial", "frequency", "router_logits", 63.03),
    _experts("partial", "soft_logits", "router_logits", 63.23),
    _experts("partial", "soft_logits", "expert_output", 62.84),
    _experts("partial", "reap", "router_logits", 63.39),
    _experts("partial", "reap", "expert_output", 64.10),
]


REFITTED = Variation(
    "prune_soft_logits_refit",
    "prune, soft_logits, refitted (ours)",
    cut_along(
        "num_experts",
        "num_experts_per_tok",
        **{
            "pruning.experts.compression": "prune",
            "pruning.experts.importance": "soft_logits",
            "pruning.refit_outputs": True,
        },
    ),
)


def _share_removed(papers: float, ours: float) -> float:
    """Return the share of a KL that refitting removes, beyond 40 %."""
    return 1.0 - ours / papers - 0.4


def _cut(runs: Runs, arm: Variation) -> float:
    """Return the KL before training."""
    return measured(runs[f"{arm.name}_fast"], one_shot=True)[KL]


def _trained(runs: Runs, arm: Variation) -> float:
    """Return the KL after training, at the better rate."""
    return at_the_better_rate(runs, arm.name, KL)


def _best(kl: Callable[[Runs, Variation], float], runs: Runs) -> float:
    """Return the lowest KL of the nine methods."""
    return min(kl(runs, row) for row in NINE_ROWS)


def _spread(kl: Callable[[Runs, Variation], float], runs: Runs) -> float:
    """Return the standard deviation of the nine methods' KL as a share of its mean, since training lowers all of them."""
    values = [kl(runs, row) for row in NINE_ROWS]
    return pstdev(values) / fmean(values)


EXPERTS = Definition(
    "experts",
    "Which experts should be kept, and should the others be merged into them?",
    "Table 2",
    "partial_reap_expert_output_fast",
    [arm for way in (*NINE_ROWS, REFITTED) for arm in at_both_rates(way)],
    [
        Finding(
            "converges",
            f"The nine methods differ less after training than before it ({BETTER})",
            "fall of the standard deviation of the KL over the nine methods, as a share of its mean",
            lambda runs: _spread(_cut, runs) - _spread(_trained, runs),
        ),
        *(
            finding
            for name, statement, better, worse in (
                (
                    "partial_beats_full",
                    "Partial merging beats full merging (soft logits, router weights)",
                    "partial_soft_logits_router_weights",
                    "merge_soft_logits_router_weights",
                ),
                (
                    "partial_reap_output_beats_pruning",
                    "Partial merging by REAP and expert output beats pruning by REAP",
                    "partial_reap_expert_output",
                    "prune_reap",
                ),
            )
            for finding in (
                Finding(
                    name,
                    f"{statement}, after training ({BETTER})",
                    KL_SAVED,
                    lower_at_the_better_rate(KL, better, worse),
                ),
                Finding(
                    f"{name}_one_shot",
                    f"{statement}, before training",
                    KL_SAVED,
                    lower(KL, f"{better}_fast", f"{worse}_fast", one_shot=True),
                ),
            )
        ),
        Finding(
            "refit_takes_40_percent_off_one_shot",
            "Refitting the experts leaves less than 60 % of the KL of the best of the nine methods, before training",
            "share of that KL removed, beyond 40 %",
            lambda runs: _share_removed(_best(_cut, runs), _cut(runs, REFITTED)),
        ),
        Finding(
            "refit_takes_40_percent_off_trained",
            f"Refitting the experts leaves less than 60 % of the KL of the best of the nine methods, after training ({BETTER})",
            "share of that KL removed, beyond 40 %",
            lambda runs: _share_removed(_best(_trained, runs), _trained(runs, REFITTED)),
        ),
        Finding(
            "refit_stays_ahead",
            f"Refitted experts are still better than the best of the nine methods after training ({BETTER})",
            KL_SAVED,
            lambda runs: _best(_trained, runs) - _trained(runs, REFITTED),
        ),
        Finding(
            "slower_is_better",
            "With refitted experts, a quarter of the learning rate ends closer to the teacher",
            KL_SAVED,
            lower(KL, "prune_soft_logits_refit_slow", "prune_soft_logits_refit_fast"),
        ),
    ],
)
