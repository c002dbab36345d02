"""The stage `plan`: a config, statistics and a target in, the list of what is kept out. Touches no weight."""

from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from slimqwen.artifacts import write_text
from slimqwen.calibration.statistics import Statistics
from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.errors import UserError
from slimqwen.families.count import Counts, count
from slimqwen.families.family import Block
from slimqwen.planning import importance
from slimqwen.planning.depth import kept_layers
from slimqwen.planning.experts import ExpertGroup, group_experts
from slimqwen.planning.shapes import completed, size_of, target_config
from slimqwen.planning.width import kept_channels
from slimqwen.progress import say
from slimqwen.recipe import ExpertImportance, ExpertRecipe, ExpertSimilarity, PruningRecipe, Target


class Scores(BaseModel):
    """The importance that the choice was made by, for the report and for anyone who wants to look."""

    model_config = ConfigDict(extra="forbid")

    layer_similarity: list[float]
    layer_block_influence: list[float]
    hidden: list[float]
    experts: dict[str, list[float]]


class Plan(BaseModel):
    """What remains of a checkpoint.

    Indices count in the source checkpoint. Blocks go by their source name ("model.layers.3", "mtp.layers.0"); blocks
    of dropped layers do not appear. `kept` holds axes with one index set for the model, by axis name.
    """

    model_config = ConfigDict(extra="forbid")

    format: Literal["slimqwen.plan/1"] = "slimqwen.plan/1"
    checkpoint: str
    statistics_data: str
    target: Target
    pruning: PruningRecipe
    kept_layers: list[int]
    kept: dict[str, list[int]]
    expert_groups: dict[str, list[ExpertGroup]]
    before: Counts
    after: Counts
    scores: Scores

    def save(self, path: Path) -> None:
        write_text(path, self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Plan":
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise UserError(
                f"{path} cannot be read ({error.strerror}): give a plan.json written by `slimqwen plan`."
            ) from error
        except ValidationError as error:
            raise UserError(f"{path} is not a plan of slimqwen.plan/1: {error.errors()[0]['msg']}.") from error


def plan(
    checkpoint: Path,
    out: Path,
    *,
    statistics: Path | Statistics,
    target: Target,
    pruning: PruningRecipe = PruningRecipe(),
) -> Plan:
    """Choose what to keep by the statistics, write it to `out` and return it.

    Raises UserError for a target that is larger than the source or contradicts itself, and for statistics that were
    measured on another checkpoint.
    """
    source = Checkpoint(checkpoint)
    measured = statistics if isinstance(statistics, Statistics) else Statistics.load(statistics)
    if measured.checkpoint != source.fingerprint():
        raise UserError(f"the statistics were not measured on {checkpoint}: run `slimqwen calibrate` on it first.")
    target = completed(target, source.config)
    scores = importance_scores(source, measured, pruning.experts)
    layers = kept_layers(
        pruning.depth,
        source.config["num_hidden_layers"],
        size_of(target.num_hidden_layers),
        similarity=torch.tensor(scores.layer_similarity, dtype=torch.float64),
        block_influence=torch.tensor(scores.layer_block_influence, dtype=torch.float64),
        must_keep_one_of=source.family.attention_layers(source.config),
    )
    result = Plan(
        checkpoint=measured.checkpoint,
        statistics_data=measured.data,
        target=target,
        pruning=pruning,
        kept_layers=layers,
        kept={
            source.family.hidden.name: kept_channels(
                torch.tensor(scores.hidden, dtype=torch.float64), size_of(target.hidden_size)
            )
        },
        expert_groups={
            block.name: expert_groups(source, measured, block, pruning.experts, size_of(target.num_experts))
            for block in source.family.moe_blocks(source.config)
            if block.layer is None or block.layer in layers
        },
        before=count(source.family, source.config),
        after=count(source.family, target_config(source.family, source.config, target, layers)),
        scores=scores,
    )
    result.save(out)
    note = source.family.serving_note(target_config(source.family, source.config, target, layers))
    if note:
        say(f"note: {note}")
    return result


def importance_scores(source: Checkpoint, statistics: Statistics, recipe: ExpertRecipe) -> Scores:
    """Every score, from the sums.

    The width score averages over the backbone's norms; the MTP module, a drafting head with five norms of its own,
    follows the backbone's choice (ours: the paper says "the RMSNorms").
    """
    sums, tokens = statistics.sums, statistics.tokens["main"]
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
            block.name: expert_importance(statistics, block, recipe.importance).tolist()
            for block in source.family.moe_blocks(source.config)
        },
    )


def expert_importance(statistics: Statistics, block: Block, criterion: ExpertImportance) -> torch.Tensor:
    """One score per expert of a block, [experts]."""
    sums = statistics.of_experts(block.name)
    tokens = statistics.tokens["mtp" if block.is_mtp else "main"]
    match criterion:
        case "frequency":
            return importance.frequency(sums["assignments"], tokens)
        case "soft_logits":
            return importance.soft_logits(sums["gate_sums"], tokens)
        case "reap":
            return importance.reap(sums["gated_norm_sums"], sums["assignments"])


def expert_similarity(
    source: Checkpoint, statistics: Statistics, block: Block, criterion: ExpertSimilarity
) -> torch.Tensor:
    """Cosine between the experts of a block, [experts, experts]. The one criterion that reads weights: router rows."""
    sums = statistics.of_experts(block.name)
    match criterion:
        case "router_logits":
            return importance.router_logits_similarity(sums["logit_gram"])
        case "router_weights":
            return importance.router_weights_similarity(source.read(block.prefix + source.family.router).double())
        case "expert_output":
            return importance.expert_output_similarity(sums["output_sums"], sums["assignments"])


def expert_groups(
    source: Checkpoint, statistics: Statistics, block: Block, recipe: ExpertRecipe, keep: int
) -> list[ExpertGroup]:
    """Which experts of a block stay, and which are averaged into them."""
    scores = expert_importance(statistics, block, recipe.importance)
    merges = recipe.compression != "prune"
    similarity = expert_similarity(source, statistics, block, recipe.similarity) if merges else None
    return group_experts(recipe.compression, scores, similarity, keep)
