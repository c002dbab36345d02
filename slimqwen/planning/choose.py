"""From sums to what is kept: scores, then layers, channels and experts."""

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

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
from slimqwen.recipe import ExpertImportance, ExpertRecipe, ExpertSimilarity, PruningRecipe, Target
from slimqwen.shapes.target import size_of, target_sizes

# Mean output norm of a super expert over its layer's median: 24 measured in a pretrained model, where the largest of the built-in
# teacher's 288 experts has 2.7.
FAR_ABOVE_EXPERTS = 5.0


class Scores(BaseModel):
    """The importance that the choice was made by, for the report and for anyone who wants to look."""

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
    """What `sums` say should be kept to reach a completed target; `folds` of the same text say how strongly to repair.

    measured_depth: for `depth: measured`.

    Reads one block's sums at a time.
    """
    scores = importance_scores(source, sums, pruning.experts)
    layers = kept_layers(
        pruning.depth,
        source.config["num_hidden_layers"],
        size_of(target.num_hidden_layers),
        similarity=torch.tensor(scores.layer_similarity, dtype=torch.float64),
        block_influence=torch.tensor(scores.layer_block_influence, dtype=torch.float64),
        measured=measured_depth,
        refitted=pruning.experts.refit,
        must_keep_one_of=source.family.attention_layers(source.config),
    )
    keep, basis = size_of(target.hidden_size), None
    if pruning.width in ("weight_magnitude", "random"):
        scores = scores.model_copy(update={"hidden": compared_width(source, sums, pruning.width).tolist()})
    if pruning.width == "rotation" and keep < source.config["hidden_size"]:
        basis, shares = choose_basis(
            source, sums, layers, keep, compensate=pruning.compensate, repair=pruning.repair, folds=folds
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


def importance_scores(source: Checkpoint, sums: Sums, recipe: ExpertRecipe) -> Scores:
    """Every score, from the sums.

    The width score averages over the backbone's norms; the MTP module, a drafting head with five norms of its own,
    follows the backbone's choice (ours: the paper says "the RMSNorms").
    """
    tokens = sums.tokens["main"]
    norms = [
        sums[f"norm/{tensor}/abs_sums"]
        for block, tensor in source.family.residual_norms(source.config)
        if not block.is_mtp
    ]
    return Scores(
        layer_similarity=importance.similarity(sums["layers/hidden_sums"]).tolist(),
        layer_block_influence=importance.block_influence(sums["layers/cosine_sums"], tokens).tolist(),
        hidden=importance.norm_activation(norms, [tokens] * len(norms)).tolist(),
        experts={
            block.name: expert_importance(sums, block, recipe.importance).tolist()
            for block in source.family.moe_blocks(source.config)
        },
    )


def compared_width(source: Checkpoint, sums: Sums, criterion: Literal["weight_magnitude", "random"]) -> torch.Tensor:
    """Scores of the channels, [hidden], by criteria that are there to be compared with. Reads one tensor at a time."""
    family = source.family
    if criterion == "random":  # drawn anew for other calibration text
        seed = int.from_bytes(hashlib.sha256(sums["layers/hidden_sums"].numpy().tobytes()).digest()[:7])
        hidden = source.config["hidden_size"]
        return torch.rand(hidden, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    matrices = []
    for name, spec in source.specs.items():
        along = [dim for dim, term in enumerate(spec.dims) if family.hidden in axes_of(term)]
        if len(spec.dims) == 2 and len(along) == 1 and spec.shape[along[0]] == source.config["hidden_size"]:
            matrices.append(source.read(name).double().pow(2).sum(dim=1 - along[0]))
    return importance.weight_magnitude(matrices)


def expert_importance(sums: Sums, block: Block, criterion: ExpertImportance) -> torch.Tensor:
    """One score per expert of a block, [experts]."""
    experts = f"experts/{block.name}/"
    tokens = sums.tokens["mtp" if block.is_mtp else "main"]
    match criterion:
        case "frequency":
            return importance.frequency(sums[experts + "assignments"], tokens)
        case "soft_logits":
            return importance.soft_logits(sums[experts + "gate_sums"], tokens)
        case "output_norm":
            return importance.output_norm(sums[experts + "gated_norm_sums"], tokens)
        case "reap":
            return importance.reap(sums[experts + "gated_norm_sums"], sums[experts + "assignments"])


def expert_similarity(source: Checkpoint, sums: Sums, block: Block, criterion: ExpertSimilarity) -> torch.Tensor:
    """Cosine between the experts of a block, [experts, experts]. The one criterion that reads weights: router rows."""
    experts = f"experts/{block.name}/"
    match criterion:
        case "router_logits":
            return importance.router_logits_similarity(sums[experts + "logit_gram"])
        case "router_weights":
            return importance.router_weights_similarity(source.read(block.prefix + source.family.router).double())
        case "expert_output":
            return importance.expert_output_similarity(sums[experts + "output_sums"], sums[experts + "assignments"])


def expert_outliers(sums: Sums, block: Block) -> list[int]:
    """Experts of a block whose outputs are far larger than its other experts' (`FAR_ABOVE_EXPERTS` times their median), ascending.

    Known as super experts: they write the massive activations of first tokens, which attention needs as its sink. Few tokens
    go to them, so that criteria that look at gates alone drop them (of a routed SmolLM2-135M, with 72 % of the damage).
    """
    experts = f"experts/{block.name}/"
    sizes = importance.mean_output_norm(sums[experts + "gated_norm_sums"], sums[experts + "gate_sums"])
    return importance.outliers(sizes, FAR_ABOVE_EXPERTS)


def expert_groups(
    source: Checkpoint, sums: Sums, block: Block, recipe: ExpertRecipe, keep: int, outliers: Collection[int] = ()
) -> list[ExpertGroup]:
    """Which experts of a block stay, and which are averaged into them; outliers stay as they are where the recipe says so."""
    scores = expert_importance(sums, block, recipe.importance)
    merges = recipe.compression != "prune"
    similarity = expert_similarity(source, sums, block, recipe.similarity) if merges else None
    protected = outliers if recipe.keep_outliers else ()
    return group_experts(recipe.compression, scores, similarity, keep, protected)
