"""The studies: which variations of one recipe each compares, and what the paper says of them (method.md's tables)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import pstdev
from typing import Any

from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.families.count import count
from slimqwen.planning.progressive import stage_targets
from slimqwen.planning.shapes import completed, shape_of, target_config
from slimqwen.recipe import Recipe, Target
from slimqwen.study.result import Run
from slimqwen.study.variation import Changes, Variation
from slimqwen.study.verdict import Finding, Runs, higher, lower, measured

ALL_TERMS = ["lm", "kd", "mtp_lm", "mtp_kd"]
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


INIT = Definition(
    "init",
    "Is a pruned model a better start than a random one, and is distillation better than language modelling?",
    "Table 1 and Figure 2",
    "pruned_kd",
    [
        Variation("random_lm", "random + LM", {"init": "random", "distil.terms": ["lm", "mtp_lm"]}),
        Variation("random_kd", "random + KD", {"init": "random"}, paper={MEAN: 61.66}),
        Variation("pruned_lm", "pruned + LM", {"distil.terms": ["lm", "mtp_lm"]}, paper={MEAN: 69.96}),
        Variation("pruned_kd", "pruned + KD", {}, paper={MEAN: 73.45}),
    ],
    [
        Finding(
            "pruned_beats_random",
            "A pruned start beats a random one, both with distillation",
            "held-out loss saved, nats per token",
            lower(LOSS, "pruned_kd", "random_kd"),
        ),
        Finding(
            "kd_beats_lm",
            "From a pruned start, distillation beats language modelling alone",
            "held-out loss saved, nats per token",
            lower(LOSS, "pruned_kd", "pruned_lm"),
        ),
        Finding(
            "pruned_lm_beats_random_kd",
            "A pruned start without a teacher beats a random one with a teacher",
            "held-out loss saved, nats per token",
            lower(LOSS, "pruned_lm", "random_kd"),
        ),
        Finding(
            "fewer_tokens",
            "The pruned start needs less than half of the tokens to be where the random one ends",
            "share of the tokens below one half",
            lambda runs: 0.5 - tokens_to_reach(runs["pruned_kd"], final_training_loss(runs["random_kd"])),
        ),
    ],
)


def tokens_to_reach(run: Run, loss: float) -> float:
    """Share of the run's tokens after which its training loss (means over a few steps) is first at most `loss`; 1 if never."""
    return next((point.tokens / run.curve[-1].tokens for point in run.curve if point.lm <= loss), 1.0)


def final_training_loss(run: Run) -> float:
    return run.curve[-1].lm


def _experts(compression: str, importance: str, similarity: str, score: float) -> Variation:
    name = f"{compression}_{importance}" + ("" if compression == "prune" else f"_{similarity}")
    how = {"prune": "prune", "merge": "merge", "partial": "partial merge"}[compression]
    title = f"{how}, {importance}" + ("" if compression == "prune" else f", {similarity}")
    changes = {
        "pruning.experts.compression": compression,
        "pruning.experts.importance": importance,
        "pruning.experts.similarity": similarity,
    }
    return Variation(name, title, _only("num_experts", "num_experts_per_tok", **changes), paper={MEAN: score})


def _only(*sizes: str, **changes: Any) -> Callable[[Recipe, Checkpoint], Changes]:
    """The recipe's cut along some sizes alone, with half of its tokens: nine such runs are many."""

    def made(recipe: Recipe, teacher: Checkpoint) -> Changes:
        assert recipe.target is not None
        wanted = recipe.target.model_dump()
        target = {name: wanted[name] if name in sizes else None for name in wanted}
        return {"target": target, "distil.tokens": recipe.distil.tokens // 2, **changes}

    return made


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


REFITTED = Variation(
    "prune_soft_logits_refit",
    "prune, soft_logits, refitted (ours)",
    _only(
        "num_experts",
        "num_experts_per_tok",
        **{
            "pruning.experts.compression": "prune",
            "pruning.experts.importance": "soft_logits",
            "pruning.experts.refit": True,
        },
    ),
)

EXPERTS = Definition(
    "experts",
    "Which experts should stay, and should the others be merged?",
    "Table 2",
    "partial_reap_expert_output",
    [*NINE_ROWS, REFITTED],
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
    ],
)


def _terms(*terms: str) -> Changes:
    return {"distil.terms": list(terms)}


def _fixed(kd_weight: float) -> Changes:
    return {"distil.kd_weight": {"start": kd_weight, "end": kd_weight}}


LOSSES = Definition(
    "losses",
    "Which terms should the loss have, and should lambda move?",
    "Table 3",
    "all",
    [
        Variation("kd", "KD", _terms("kd"), paper={MEAN: 73.05}),
        Variation("kd_lm", "KD + LM", _terms("lm", "kd"), paper={MEAN: 72.92}),
        Variation("kd_mtp_kd", "KD + MTP-KD", _terms("kd", "mtp_kd"), paper={MEAN: 73.31}),
        Variation("kd_lm_mtp_lm", "KD + LM + MTP-LM", _terms("lm", "kd", "mtp_lm"), paper={MEAN: 73.19}),
        Variation("all", "all four, lambda 1 to 0.75", {}, paper={MEAN: 73.45}),
        Variation("all_lambda_875", "all four, lambda 0.875", _fixed(0.875)),
        Variation("all_lambda_500", "all four, lambda 0.5", _fixed(0.5)),
    ],
    [
        Finding(
            "all_beats_kd",
            "All four terms beat KD alone",
            "held-out loss saved, nats per token",
            lower(LOSS, "all", "kd"),
        ),
        Finding(
            "mtp_kd_helps_the_main_head",
            "Distilling the MTP head too makes the main head better than KD alone",
            "held-out loss saved, nats per token",
            lower(LOSS, "kd_mtp_kd", "kd"),
        ),
        Finding(
            "lm_helps_on_text",
            "Adding LM to KD lowers the held-out loss (the paper: MMLU rises, the mean of eight does not)",
            "held-out loss saved, nats per token",
            lower(LOSS, "kd_lm", "kd"),
        ),
        Finding(
            "schedule_beats_fixed",
            "A lambda that falls from 1 to 0.75 beats one fixed at its mean",
            "held-out loss saved, nats per token",
            lower(LOSS, "all", "all_lambda_875"),
        ),
    ],
)

_ACCEPTANCE = ("acc_0", "acc_1", "acc_2", "acc_3", "acc_4")

MTP = Definition(
    "mtp",
    "Does the MTP module draft better if it is distilled, and from which of the teacher's heads?",
    "Table 4",
    "mtp_kd",
    [
        Variation(
            "mtp_lm",
            "MTP-LM",
            _terms("lm", "kd", "mtp_lm"),
            paper=dict(zip(_ACCEPTANCE, (95.90, 57.62, 23.64, 8.02, 2.37), strict=True)),
        ),
        Variation(
            "mtp_kd",
            "MTP-KD, target: the teacher's main head",
            _terms("lm", "kd", "mtp_kd"),
            paper=dict(zip(_ACCEPTANCE, (95.50, 75.18, 45.67, 22.43, 10.37), strict=True)),
        ),
        Variation(
            "mtp_kd_from_mtp",
            "MTP-KD, target: the teacher's MTP head",
            {**_terms("lm", "kd", "mtp_kd"), "distil.mtp_target": "mtp"},
        ),
    ],
    [
        *(
            Finding(
                f"kd_drafts_better_{depth}",
                f"Distilled, the module's first {depth + 1} drafts are accepted more often than trained on text",
                "share of positions gained",
                higher(f"acc_{depth}", "mtp_kd", "mtp_lm"),
            )
            for depth in (1, 2, 3)
        ),
        Finding(
            "kd_saves_passes",
            "Distilled, the module makes real speculative decoding need fewer passes of the backbone",
            "tokens gained per pass",
            higher("tokens_per_verification", "mtp_kd", "mtp_lm"),
        ),
        Finding(
            "main_head_is_the_better_target",
            "The teacher's main head is a better target than its MTP head",
            "share of positions gained at three drafts",
            higher("acc_2", "mtp_kd", "mtp_kd_from_mtp"),
        ),
    ],
    drafts=True,
)


def _three_stages(first: str) -> Callable[[Recipe, Checkpoint], Changes]:
    """5, 5 and 90 % of the tokens: half of the first cut, the rest of it, then everything else."""

    def made(recipe: Recipe, teacher: Checkpoint) -> Changes:
        assert recipe.target is not None
        source = shape_of(teacher.family, teacher.config)
        final = completed(teacher.family, recipe.target, teacher.config)
        depth = source.model_copy(update={"num_hidden_layers": final.num_hidden_layers})
        width = final.model_copy(update={"num_hidden_layers": source.num_hidden_layers})
        whole_first = depth if first == "depth_first" else width
        half = stage_targets("depth_first" if first == "depth_first" else "width_first", source, whole_first)[0]
        targets: list[Target] = [half, whole_first, final]
        stages = [
            {"target": target.model_dump(), "token_fraction": share}
            for target, share in zip(targets, (0.05, 0.05, 0.9), strict=True)
        ]
        return {"target": None, "stages": stages}

    return made


def _two_stages(schedule: str, score: float, **changes: Any) -> Variation:
    title = schedule.replace("_", " ")
    return Variation(schedule, title, {"schedule": schedule, **changes}, paper={MEAN: score})


SCHEDULES = Definition(
    "schedules",
    "Should a model be cut at once or in stages, and what first?",
    "Tables 5 and 9",
    "one_shot",
    [
        Variation("one_shot", "one shot", {}, paper={MEAN: 74.95}),
        _two_stages("joint", 75.07),
        _two_stages("width_first", 75.30),
        _two_stages("depth_first", 75.02),
        Variation("three_depth_first", "three stages, depth first", _three_stages("depth_first"), paper={MEAN: 75.28}),
        Variation("three_width_first", "three stages, width first", _three_stages("width_first"), paper={MEAN: 74.76}),
        Variation(
            "depth_first_30",
            "depth first, 30 % of the tokens in the first stage",
            {"schedule": "depth_first", "first_stage_token_fraction": 0.3},
        ),
        Variation(
            "depth_first_carried",
            "depth first, optimiser state carried along",
            {"schedule": "depth_first", "distil.optimizer_state": "carry"},
        ),
    ],
    [
        Finding(
            f"{name}_beats_one_shot",
            f"{title} beats one shot",
            "held-out loss saved, nats per token",
            lower(LOSS, name, "one_shot"),
        )
        for name, title in (
            ("joint", "Joint progressive pruning"),
            ("width_first", "Width first"),
            ("depth_first", "Depth first"),
            ("three_depth_first", "Depth first in three stages"),
        )
    ]
    + [
        Finding(
            "carrying_helps",
            "Carrying the optimiser state over a stage beats starting it anew",
            "held-out loss saved, nats per token",
            lower(LOSS, "depth_first_carried", "depth_first"),
        )
    ],
)


def _depth(criterion: str, title: str, mmlu_one_shot: float | None = None, mmlu: float | None = None) -> Variation:
    paper = {"MMLU, one-shot": mmlu_one_shot, "MMLU": mmlu}
    return Variation(
        criterion,
        title,
        _only("num_hidden_layers", **{"pruning.depth": criterion}),
        paper={column: value for column, value in paper.items() if value is not None},
    )


DEPTH = Definition(
    "depth",
    "Which layers should go?",
    "Table 8",
    "last",
    [
        _depth("last", "last layers", mmlu_one_shot=73.86, mmlu=73.02),
        _depth("similarity", "similarity", mmlu_one_shot=41.95, mmlu=69.57),
        _depth("block_influence", "block influence"),
    ],
    [
        Finding(
            f"last_beats_{other}_{when}",
            f"Dropping the last layers beats {other.replace('_', ' ')}, {words}",
            "KL to the teacher saved, nats per token",
            lower(KL, "last", other, one_shot=when == "one_shot"),
        )
        for other in ("similarity", "block_influence")
        for when, words in (("one_shot", "before training"), ("trained", "after training"))
    ],
)


def _equal_loss(size: str) -> Callable[[Recipe, Checkpoint], Changes]:
    """A cut along one size alone that leaves as many parameters as the recipe's cut of the hidden size, or nearly."""

    def made(recipe: Recipe, teacher: Checkpoint) -> Changes:
        family, config = teacher.family, teacher.config
        assert recipe.target is not None

        def left(**target: int | None) -> int:
            shape = completed(family, Target(**target), config)
            return count(family, target_config(family, config, shape)).total_parameters

        wanted = left(hidden_size=recipe.target.hidden_size)
        smallest = config["num_experts_per_tok"] if size == "num_experts" else 1
        best = min(range(smallest, config[size] + 1), key=lambda value: abs(left(**{size: value}) - wanted))
        target = {name: best if name == size else None for name in recipe.target.model_dump()}
        return {"target": target, "distil.tokens": recipe.distil.tokens // 2}

    return made


def _left(runs: Runs, arm: str, one_shot: bool) -> float:
    """An arm's KL as a share of that of the paper's cut."""
    return measured(runs[arm], one_shot)[KL] / measured(runs["norm_activation"], one_shot)[KL]


WIDTH = Definition(
    "width",
    "Which channels of the residual stream should stay, and how much does each axis hurt?",
    "no table of the paper; section 3 of its method",
    "norm_activation",
    [
        Variation("norm_activation", "norm activation (the paper's)", _only("hidden_size")),
        Variation(
            "weight_magnitude",
            "weight magnitude",
            _only("hidden_size", **{"pruning.width": "weight_magnitude"}),
        ),
        Variation("random", "random channels", _only("hidden_size", **{"pruning.width": "random"})),
        Variation(
            "compensated",
            "norm activation, compensated (ours)",
            _only("hidden_size", **{"pruning.compensate": True}),
        ),
        Variation("rotation", "rotation (ours)", _only("hidden_size", **{"pruning.width": "rotation"})),
        Variation(
            "rotation_repaired",
            "rotation, compensated, repaired (ours)",
            _only("hidden_size", **{"pruning.width": "rotation", "pruning.compensate": True, "pruning.repair": True}),
        ),
        Variation("layers_alone", "layers instead, as many parameters", _equal_loss("num_hidden_layers")),
        Variation("experts_alone", "experts instead, as many parameters", _equal_loss("num_experts")),
    ],
    [
        Finding(
            "activation_beats_random",
            "Norm activation beats random channels, before training",
            "KL to the teacher saved, nats per token",
            lower(KL, "norm_activation", "random", one_shot=True),
        ),
        Finding(
            "activation_beats_magnitude",
            "Norm activation beats weight magnitude, before training",
            "KL to the teacher saved, nats per token",
            lower(KL, "norm_activation", "weight_magnitude", one_shot=True),
        ),
        Finding(
            "rotation_takes_80_percent_off",
            "Rotation, compensation and repair take more than 80 % off the KL of the paper's cut, before training",
            "share of that KL gone, beyond 80 %",
            lambda runs: 0.2 - _left(runs, "rotation_repaired", one_shot=True),
        ),
        Finding(
            "rotation_stays_ahead",
            "After the same short training, rotation, compensation and repair are still ahead of the paper's cut",
            "KL to the teacher saved, nats per token",
            lower(KL, "rotation_repaired", "norm_activation"),
        ),
        Finding(
            "width_hurts_more_than_depth",
            "Before training, cutting the width hurts more than cutting layers",
            "KL to the teacher saved, nats per token",
            lower(KL, "layers_alone", "norm_activation", one_shot=True),
        ),
        Finding(
            "width_hurts_more_than_experts",
            "Before training, cutting the width hurts more than cutting experts",
            "KL to the teacher saved, nats per token",
            lower(KL, "experts_alone", "norm_activation", one_shot=True),
        ),
        Finding(
            "width_hurts_more_than_experts_trained",
            "After training, cutting the width hurts more than cutting experts",
            "KL to the teacher saved, nats per token",
            lower(KL, "experts_alone", "norm_activation"),
        ),
    ],
)

STUDIES = {study.name: study for study in (INIT, EXPERTS, LOSSES, MTP, SCHEDULES, DEPTH, WIDTH)}
