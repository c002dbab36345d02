"""Table 2: which experts stay, and what becomes of the others."""

from collections.abc import Callable
from statistics import pstdev

from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.recipe import Recipe
from slimqwen.study.catalogue.definition import KL, MEAN, Definition, cut_along
from slimqwen.study.variation import Changes, Variation
from slimqwen.study.verdict import Finding, Runs, lower, measured


def _experts(compression: str, importance: str, similarity: str, score: float) -> Variation:
    name = f"{compression}_{importance}" + ("" if compression == "prune" else f"_{similarity}")
    how = {"prune": "prune", "merge": "merge", "partial": "partial merge"}[compression]
    title = f"{how}, {importance}" + ("" if compression == "prune" else f", {similarity}")
    changes = {
        "pruning.experts.compression": compression,
        "pruning.experts.importance": importance,
        "pruning.experts.similarity": similarity,
        "pruning.experts.refit": False,
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


def _gone(runs: Runs, one_shot: bool) -> float:
    """Share of the KL of the best of the nine ways that refitting takes away."""
    best = min(measured(runs[row.name], one_shot)[KL] for row in NINE_ROWS)
    return 1.0 - measured(runs[REFITTED.name], one_shot)[KL] / best


def _spread(runs: Runs, one_shot: bool) -> float:
    return pstdev(measured(runs[row.name], one_shot)[KL] for row in NINE_ROWS)


PRUNED = {
    "pruning.experts.compression": "prune",
    "pruning.experts.importance": "soft_logits",
    "pruning.experts.refit": False,
}
REFIT = {**PRUNED, "pruning.experts.refit": True}
REFITTED = Variation(
    "prune_soft_logits_refit",
    "prune, soft_logits, refitted (ours)",
    cut_along("num_experts", "num_experts_per_tok", **REFIT),
)


def _slowly(changes: Changes) -> Callable[[Recipe, Checkpoint], Changes]:
    """At a quarter of the learning rate: one that heals a bad start throws away much of a good one."""

    def made(recipe: Recipe, teacher: Checkpoint) -> Changes:
        rate = {"distil.learning_rate": recipe.distil.learning_rate / 4}
        return cut_along("num_experts", "num_experts_per_tok", **changes, **rate)(recipe, teacher)

    return made


SLOWLY = [
    Variation("prune_soft_logits_slow", "prune, soft_logits, 1/4 of the learning rate", _slowly(PRUNED)),
    Variation("prune_soft_logits_refit_slow", "refitted (ours), 1/4 of the learning rate", _slowly(REFIT)),
]

EXPERTS = Definition(
    "experts",
    "Which experts should stay, and should the others be merged?",
    "Table 2",
    "partial_reap_expert_output",
    [*NINE_ROWS, REFITTED, *SLOWLY],
    [
        Finding(
            "converges",
            "The nine ways differ less after training than before it",
            "fall of the standard deviation of the KL over the nine ways, nats per token",
            lambda runs: _spread(runs, one_shot=True) - _spread(runs, one_shot=False),
        ),
        Finding(
            "partial_beats_full",
            "Partial merging beats full merging (soft logits, router weights), after training",
            "KL to the teacher saved, nats per token",
            lower(KL, "partial_soft_logits_router_weights", "merge_soft_logits_router_weights"),
        ),
        Finding(
            "partial_beats_full_one_shot",
            "Partial merging beats full merging (soft logits, router weights), before training",
            "KL to the teacher saved, nats per token",
            lower(KL, "partial_soft_logits_router_weights", "merge_soft_logits_router_weights", one_shot=True),
        ),
        Finding(
            "partial_reap_output_beats_pruning",
            "Partial merging by REAP and expert output beats pruning by REAP, after training",
            "KL to the teacher saved, nats per token",
            lower(KL, "partial_reap_expert_output", "prune_reap"),
        ),
        Finding(
            "partial_reap_output_beats_pruning_one_shot",
            "Partial merging by REAP and expert output beats pruning by REAP, before training",
            "KL to the teacher saved, nats per token",
            lower(KL, "partial_reap_expert_output", "prune_reap", one_shot=True),
        ),
        *(
            Finding(
                f"refit_takes_40_percent_off_{when}",
                f"Refitting the experts leaves less than 60 % of the KL of the best of the nine ways, {words}",
                "share of that KL gone, beyond 40 %",
                lambda runs, one_shot=one_shot: _gone(runs, one_shot) - 0.4,  # type: ignore[misc]
            )
            for when, words, one_shot in (("one_shot", "before training", True), ("trained", "after training", False))
        ),
        Finding(
            "refit_stays_ahead_slowly",
            "At a quarter of the learning rate refitted experts are still ahead of pruned ones after training",
            "KL to the teacher saved, nats per token",
            lower(KL, "prune_soft_logits_refit_slow", "prune_soft_logits_slow"),
        ),
        Finding(
            "slower_is_better",
            "From refitted experts a quarter of the learning rate ends nearer to the teacher",
            "KL to the teacher saved, nats per token",
            lower(KL, "prune_soft_logits_refit_slow", "prune_soft_logits_refit"),
        ),
    ],
)
