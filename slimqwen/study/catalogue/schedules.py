"""Tables 5 and 9: one cut or several stages."""

from collections.abc import Callable
from typing import Any

from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.planning.progressive import stage_targets
from slimqwen.recipe import Recipe, Target
from slimqwen.shapes.target import completed, shape_of
from slimqwen.study.catalogue.definition import LOSS, MEAN, Definition
from slimqwen.study.variation import Changes, Variation
from slimqwen.study.verdict import Finding, lower


def _three_stages(first: str) -> Callable[[Recipe, Checkpoint], Changes]:
    """Return changes to three stages of 5, 5 and 90 % of the tokens: half of the first cut, the rest of it, all other cuts."""

    def in_three(recipe: Recipe, teacher: Checkpoint) -> Changes:
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

    return in_three


DEPTH_FIRST: Changes = {"schedule": "depth_first"}
LONGER_FIRST_STAGE: Changes = {"first_stage_token_fraction": 0.3}
CARRIED: Changes = {"distil.optimizer.at_cut": "carry"}


def _two_stages(schedule: str, score: float, **changes: Any) -> Variation:
    title = schedule.replace("_", " ")
    return Variation(schedule, title, {"schedule": schedule, **changes}, paper={MEAN: score})


SCHEDULES = Definition(
    "schedules",
    "Should a model be cut at once or in stages, and along which axis first?",
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
            {**DEPTH_FIRST, **LONGER_FIRST_STAGE},
        ),
        Variation("depth_first_carried", "depth first, optimiser state carried along", {**DEPTH_FIRST, **CARRIED}),
        Variation(
            "depth_first_30_carried",
            "depth first, 30 % of the tokens in the first stage, optimiser state carried along",
            {**DEPTH_FIRST, **LONGER_FIRST_STAGE, **CARRIED},
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
            f"carrying_helps_{name}",
            f"Depth first, carrying the optimiser's state over the cut beats starting it anew, {share} of the tokens before it",
            "held-out loss saved, nats per token",
            lower(LOSS, f"{name}_carried", name),
        )
        for name, share in (("depth_first", "a tenth"), ("depth_first_30", "30 %"))
    ],
)
