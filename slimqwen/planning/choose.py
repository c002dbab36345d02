"""From sums to what is kept: scores, then layers, channels and experts."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from slimqwen.calibration.statistics import Fold, Sums
from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.families.axes import axes_of
from slimqwen.families.family import Block
from slimqwen.planning import importance
from slimqwen.planning.depth import kept_layers
from slimqwen.planning.experts import ExpertGroup, group_experts
from slimqwen.planning.measured_depth import MeasuredDepth
from slimqwen.planning.rotation import Basis, choose_basis
from slimqwen.planning.units import Units, kept_units
from slimqwen.planning.width import kept_channels
from slimqwen.recipe import (
    ExpertCompression,
    ExpertImportance,
    ExpertRecipe,
    ExpertSimilarity,
    PruningRecipe,
    Target,
    WidthCriterion,
)
from slimqwen.shapes.target import size_of, target_sizes

# Mean output norm of a super expert over its layer's median: 24 measured in a pretrained model, where the largest of the built-in
# teacher's 288 experts has 2.7.
FAR_ABOVE_EXPERTS = 5.0


class Scores(BaseModel):
    """The importance that the choice was made by, for the report and for any other reader."""

    model_config = ConfigDict(extra="forbid")

    layer_similarity: list[float]
    layer_block_influence: list[float]
    hidden: list[float]
    """Per channel, or per direction of a rotation: its share of the second moments, the largest first."""
    experts: dict[str, list[float]]


@dataclass(frozen=True)
class Choice:
    """What is kept of a checkpoint, and why; fields as in `Plan`."""

    kept_layers: list[int]
    kept: dict[str, Units]
    expert_groups: dict[str, list[ExpertGroup]]
    scores: Scores
    basis: Basis | None = None
    outliers: dict[str, list[int]] = field(default_factory=dict)


def choose(
    source: Checkpoint,
    sums: Sums,
    target: Target,
    pruning: PruningRecipe,
    *,
    folds: Sequence[Fold] = (),
    measured_depth: MeasuredDepth | None = None,
) -> Choice:
    """Choose what is kept to reach a completed target, by `sums`; `folds` of the same text decide how strongly readers are refitted.

    measured_depth: for `depth: measured`.

    Reads one block's sums at a time.
    """
    scores = importance_scores(source, sums, pruning)
    layers = kept_layers(
        pruning.depth,
        source.config["num_hidden_layers"],
        size_of(target.num_hidden_layers),
        similarity=torch.tensor(scores.layer_similarity, dtype=torch.float64),
        block_influence=torch.tensor(scores.layer_block_influence, dtype=torch.float64),
        measured=measured_depth,
        refitted=pruning.refit_outputs,
        must_keep_one_of=source.family.attention_layers(source.config),
    )
    keep, basis = size_of(target.hidden_size), None
    if pruning.width == WidthCriterion.ROTATION and keep < source.config["hidden_size"]:
        basis, shares = choose_basis(
            source,
            sums,
            layers,
            keep,
            compensate=pruning.compensate,
            refit_readers=pruning.refit_readers,
            folds=folds,
        )
        scores = scores.model_copy(update={"hidden": shares.tolist()})
    channels = kept_channels(torch.tensor(scores.hidden, dtype=torch.float64), keep)
    blocks = [b for b in source.family.moe_blocks(source.config) if b.layer is None or b.layer in layers]
    outliers = {block.name: expert_outliers(sums, block) for block in blocks}
    groups = {
        block.name: expert_groups(
            source, sums, block, pruning.experts, size_of(target.num_experts), outliers[block.name]
        )
        for block in blocks
    }
    standing_out = {name: found for name, found in outliers.items() if found}
    sizes = target_sizes(source.family, source.config, target)
    units = kept_units(source.family, source.config, sums, layers, sizes)
    return Choice(layers, {source.family.hidden.name: channels, **units}, groups, scores, basis, standing_out)


def importance_scores(source: Checkpoint, sums: Sums, pruning: PruningRecipe) -> Scores:
    """Return every score: of the layers by each statistic, of channels and experts by the recipe's criteria."""
    measurements = channel_measurements(source, sums)
    return Scores(
        layer_similarity=importance.similarity(sums["layers/hidden_sums"]).tolist(),
        layer_block_influence=importance.block_influence(sums["layers/cosine_sums"], sums.tokens["main"]).tolist(),
        hidden=importance.WIDTH.compute(pruning.width, lambda name: measurements[name]()).tolist(),
        experts={
            block.name: expert_importance(sums, block, pruning.experts.importance).tolist()
            for block in source.family.moe_blocks(source.config)
        },
    )


def channel_measurements(source: Checkpoint, sums: Sums) -> dict[str, Callable[[], Any]]:
    """Return what width criteria take, by the names of their parameters; each is read where it is called.

    abs_sums, counts: a norm's sums over tokens of |output|, [hidden], and its tokens, for each norm of the backbone. The MTP module, a
        drafting head with five norms of its own, follows the backbone's choice (ours: the paper says "the RMSNorms").
    square_sums: of each matrix of the residual stream the sums of its squared weights, [hidden], over the other side.
    hidden_sums: [layers + 1, hidden], sums over tokens of the hidden state before and after each layer.
    """
    norms = [
        f"norm/{tensor}/abs_sums" for block, tensor in source.family.residual_norms(source.config) if not block.is_mtp
    ]
    return {
        "abs_sums": lambda: [sums[name] for name in norms],
        "counts": lambda: [sums.tokens["main"]] * len(norms),
        "square_sums": lambda: _square_sums(source),
        "hidden_sums": lambda: sums["layers/hidden_sums"],
    }


def _square_sums(source: Checkpoint) -> list[torch.Tensor]:
    """Sum the squared weights of every matrix with one side in the residual stream, per channel. Reads one tensor at a time."""
    hidden = source.family.hidden
    square_sums = []
    for name, spec in source.specs.items():
        along = [dim for dim, term in enumerate(spec.dims) if hidden in axes_of(term)]
        if len(spec.dims) == 2 and len(along) == 1 and spec.shape[along[0]] == source.config["hidden_size"]:
            square_sums.append(source.read(name).double().pow(2).sum(dim=1 - along[0]))
    return square_sums


def expert_importance(sums: Sums, block: Block, criterion: ExpertImportance) -> torch.Tensor:
    """Return one score per expert of a block, [experts]."""
    scores: torch.Tensor = importance.EXPERT_IMPORTANCE.compute(criterion, _expert_sums(sums, block))
    return scores


def expert_similarity(source: Checkpoint, sums: Sums, block: Block, criterion: ExpertSimilarity) -> torch.Tensor:
    """Return the cosine between the experts of a block, [experts, experts]. Of weights at most the router's rows are read."""
    of_block = _expert_sums(sums, block)

    def value_of(parameter: str) -> Any:
        if parameter == "router_rows":
            return source.read(block.prefix + source.family.router).double()
        return of_block(parameter)

    cosines: torch.Tensor = importance.EXPERT_SIMILARITY.compute(criterion, value_of)
    return cosines


def _expert_sums(sums: Sums, block: Block) -> Callable[[str], Any]:
    """Return the look-up of a block's sums by name, and of its number of tokens."""
    tokens = sums.tokens["mtp" if block.is_mtp else "main"]
    return lambda name: tokens if name == "tokens" else sums[f"experts/{block.name}/{name}"]


def expert_outliers(sums: Sums, block: Block) -> list[int]:
    """Return the experts of a block whose outputs are far larger than its other experts' (`FAR_ABOVE_EXPERTS` times their median), ascending.

    Known as super experts: they write the massive activations of first tokens, which attention needs as its sink. Few tokens
    go to them, so that criteria that look at gates alone drop them (of a routed SmolLM2-135M, with 72 % of the damage).
    """
    experts = f"experts/{block.name}/"
    sizes = importance.mean_output_norm(sums[experts + "gated_norm_sums"], sums[experts + "gate_sums"])
    return importance.outliers(sizes, FAR_ABOVE_EXPERTS)


def expert_groups(
    source: Checkpoint, sums: Sums, block: Block, recipe: ExpertRecipe, keep: int, outliers: Collection[int] = ()
) -> list[ExpertGroup]:
    """Return which experts of a block stay, and which are averaged into them; outliers stay as they are where the recipe keeps them."""
    scores = expert_importance(sums, block, recipe.importance)
    merges = recipe.compression != ExpertCompression.PRUNE
    similarity = expert_similarity(source, sums, block, recipe.similarity) if merges else None
    protected = outliers if recipe.keep_outliers else ()
    return group_experts(recipe.compression, scores, similarity, keep, protected)
