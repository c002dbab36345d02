"""Without a table in the paper: which channels to keep, and how much cutting each axis costs."""

from collections.abc import Callable

from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.families.count import count
from slimqwen.recipe import Recipe, Target
from slimqwen.shapes.target import completed, target_config
from slimqwen.study.catalogue.definition import KL, PAPERS_WIDTH, Definition, cut_along
from slimqwen.study.variation import Changes, Variation
from slimqwen.study.verdict import Finding, Runs, lower, measured


def _equal_loss(size: str) -> Callable[[Recipe, Checkpoint], Changes]:
    """Return changes that cut one size alone, to about as many parameters as the recipe's cut of the hidden size leaves."""

    def cut(recipe: Recipe, teacher: Checkpoint) -> Changes:
        family, config = teacher.family, teacher.config
        assert recipe.target is not None

        def parameters(**target: int | None) -> int:
            shape = completed(family, Target(**target), config)
            return count(family, target_config(family, config, shape)).total_parameters

        wanted = parameters(hidden_size=recipe.target.hidden_size)
        smallest = config["num_experts_per_tok"] if size == "num_experts" else 1
        best = min(range(smallest, config[size] + 1), key=lambda value: abs(parameters(**{size: value}) - wanted))
        target = {name: best if name == size else None for name in recipe.target.model_dump()}
        return {"target": target, "distil.tokens": recipe.distil.tokens // 2}

    return cut


def _share_left(runs: Runs, arm: str, one_shot: bool) -> float:
    """Return an arm's KL as a share of that of the paper's cut."""
    return measured(runs[arm], one_shot)[KL] / measured(runs["norm_activation"], one_shot)[KL]


WIDTH = Definition(
    "width",
    "Which channels of the residual stream should be kept, and how much does cutting each axis cost?",
    "no table of the paper; section 3 of its method",
    "norm_activation",
    [
        Variation("norm_activation", "norm activation (the paper's)", cut_along("hidden_size")),
        Variation(
            "weight_magnitude",
            "weight magnitude",
            cut_along("hidden_size", **{"pruning.width": "weight_magnitude"}),
        ),
        Variation("random", "random channels", cut_along("hidden_size", **{"pruning.width": "random"})),
        Variation(
            "compensated",
            "norm activation, compensated (ours)",
            cut_along("hidden_size", **{"pruning.compensate": True}),
        ),
        Variation("rotation", "rotation (ours)", cut_along("hidden_size", **{"pruning.width": "rotation"})),
        Variation(
            "rotation_repaired",
            "rotation, compensated, repaired (ours)",
            cut_along(
                "hidden_size",
                **{"pruning.width": "rotation", "pruning.compensate": True, "pruning.refit_readers": True},
            ),
        ),
        Variation("layers_alone", "layers instead, equally many parameters", _equal_loss("num_hidden_layers")),
        Variation("experts_alone", "experts instead, equally many parameters", _equal_loss("num_experts")),
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
            "Rotation, compensation and repair remove more than 80 % of the KL of the paper's cut, before training",
            "share of that KL removed, beyond 80 %",
            lambda runs: 0.2 - _share_left(runs, "rotation_repaired", one_shot=True),
        ),
        Finding(
            "rotation_stays_ahead",
            "After the same short training, rotation, compensation and repair are still better than the paper's cut",
            "KL to the teacher saved, nats per token",
            lower(KL, "rotation_repaired", "norm_activation"),
        ),
        Finding(
            "width_hurts_more_than_depth",
            "Before training, cutting the width costs more than cutting layers",
            "KL to the teacher saved, nats per token",
            lower(KL, "layers_alone", "norm_activation", one_shot=True),
        ),
        Finding(
            "width_hurts_more_than_experts",
            "Before training, cutting the width costs more than cutting experts",
            "KL to the teacher saved, nats per token",
            lower(KL, "experts_alone", "norm_activation", one_shot=True),
        ),
        Finding(
            "width_hurts_more_than_experts_trained",
            "After training, cutting the width costs more than cutting experts",
            "KL to the teacher saved, nats per token",
            lower(KL, "experts_alone", "norm_activation"),
        ),
    ],
    given={**PAPERS_WIDTH, "pruning.refit_outputs": False},
)
