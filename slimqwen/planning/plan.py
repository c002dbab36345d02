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
from slimqwen.planning import importance
from slimqwen.planning.depth import kept_layers
from slimqwen.planning.experts import ExpertGroup, group_experts
from slimqwen.planning.shapes import completed, size_of, target_config
from slimqwen.planning.width import kept_channels
from slimqwen.recipe import ExpertRecipe, PruningRecipe, Target


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
            block: expert_groups(source, measured, block, pruning.experts, size_of(target.num_experts))
            for block in scores.experts
            if not _is_dropped(source, block, layers)
        },
        before=count(source.family, source.config),
        after=count(source.family, target_config(source.family, source.config, target, layers)),
        scores=scores,
    )
    result.save(out)
    return result


def importance_scores(source: Checkpoint, statistics: Statistics, recipe: ExpertRecipe) -> Scores:
    """Every score, from the sums. The width score averages over the backbone's norms; the MTP module, a drafting head
    with five norms of its own, follows the backbone's choice (ours: the paper says "the RMSNorms")."""
    sums = statistics.sums
    norms = [value for name, value in sums.items() if name.startswith("norm/model.")]
    tokens = statistics.tokens["main"]
    return Scores(
        layer_similarity=importance.similarity(sums["layers/hidden_sums"]).tolist(),
        layer_block_influence=importance.block_influence(sums["layers/cosine_sums"], tokens).tolist(),
        hidden=importance.norm_activation(norms, [tokens] * len(norms)).tolist(),
        experts={
            block.name: _expert_importance(recipe.importance, statistics, block.name).tolist()
            for block in source.family.blocks(source.config)
            if block.experts is not None
        },
    )


def expert_groups(
    source: Checkpoint, statistics: Statistics, block: str, recipe: ExpertRecipe, keep: int
) -> list[ExpertGroup]:
    """Which experts of a block stay, and which are averaged into them."""
    sums = {
        name.rpartition("/")[2]: value
        for name, value in statistics.sums.items()
        if name.startswith(f"experts/{block}/")
    }
    similarity = None
    if recipe.compression != "prune":
        match recipe.similarity:
            case "router_logits":
                similarity = importance.router_logits_similarity(sums["logit_gram"])
            case "router_weights":
                rows = source.read(f"{block}.{source.family.router}").double()
                similarity = importance.router_weights_similarity(rows)
            case "expert_output":
                similarity = importance.expert_output_similarity(sums["output_sums"], sums["assignments"])
    return group_experts(recipe.compression, _expert_importance(recipe.importance, statistics, block), similarity, keep)


def _expert_importance(criterion: str, statistics: Statistics, block: str) -> torch.Tensor:
    def sums(name: str) -> torch.Tensor:
        return statistics.sums[f"experts/{block}/{name}"]

    tokens = statistics.tokens["mtp" if block.startswith("mtp.") else "main"]
    match criterion:
        case "frequency":
            return importance.frequency(sums("assignments"), tokens)
        case "soft_logits":
            return importance.soft_logits(sums("gate_sums"), tokens)
        case "reap":
            return importance.reap(sums("gated_norm_sums"), sums("assignments"))
    raise AssertionError(f"unknown expert importance {criterion}")


def _is_dropped(source: Checkpoint, block_name: str, layers: list[int]) -> bool:
    block = next(b for b in source.family.blocks(source.config) if b.name == block_name)
    return block.layer is not None and block.layer not in layers
