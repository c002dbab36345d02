"""The stage `plan`: a config, statistics and a target in, the list of what is kept out. Changes no weight."""

import copy
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, field_validator

from slimqwen.artifacts import check_file_replaceable, makes_file, write_text
from slimqwen.artifacts.json_file import load_model
from slimqwen.calibration.statistics import Statistics
from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.core.errors import UserError
from slimqwen.core.warning import warn
from slimqwen.families.count import Counts, count
from slimqwen.planning.choose import Scores, choose
from slimqwen.planning.chosen import plan_warnings
from slimqwen.planning.experts import ExpertGroup
from slimqwen.planning.measured_depth import MeasuredDepth
from slimqwen.planning.stability import Agreement, measure_stability
from slimqwen.planning.units import Units
from slimqwen.recipe import DepthCriterion, PruningRecipe, Target, WidthCriterion
from slimqwen.recipe.renamed import translate
from slimqwen.shapes.target import completed, target_config


class BasisFile(BaseModel):
    """The coordinates of a rotated cut (`rotation.basis.Basis`): a file beside the plan, and its fingerprint."""

    model_config = ConfigDict(extra="forbid")

    file: str
    fingerprint: str


class Plan(BaseModel):
    """What remains of a checkpoint.

    Indices count in the source checkpoint. Blocks go by their source name ("model.layers.3", "mtp.layers.0"); blocks
    of dropped layers do not appear. `kept`: axis name -> what stays of it; an axis within blocks that keeps all of its
    units does not appear, and experts have `expert_groups` instead. With a `basis` the hidden axis counts directions of it and
    not channels. `sources` are the tokens measured of each source of calibration text; `pruning.source_weights` is what they counted for.
    `readers`: norm -> the ridge that its refitted readers were found with, None where they are left as rotated.
    `outliers`: block name -> its source experts whose outputs are far larger than the others' (`choose.expert_outliers`), kept or not.
    """

    model_config = ConfigDict(extra="forbid")

    format: Literal["slimqwen.plan/1"] = "slimqwen.plan/1"
    checkpoint: str
    statistics_data: str
    sources: dict[str, int] = {}
    target: Target
    pruning: PruningRecipe
    kept_layers: list[int]
    kept: dict[str, Units]
    basis: BasisFile | None = None
    readers: dict[str, float | None] = {}
    expert_groups: dict[str, list[ExpertGroup]]
    outliers: dict[str, list[int]] = {}
    before: Counts
    after: Counts
    scores: Scores
    stability: list[Agreement] | None = None

    @field_validator("pruning", mode="before")
    @classmethod
    def _read_old_keys(cls, values: Any) -> Any:
        """Read the criteria of a plan that version 0.1 wrote."""
        if isinstance(values, dict):
            translate(values := copy.deepcopy(values), PruningRecipe)
        return values

    def save(self, path: Path) -> None:
        write_text(path, self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Plan":
        """Load a plan. Raises UserError for a file that is missing or is none."""
        advice = "give a plan.json written by `slimqwen plan`."
        return load_model(path, cls, what="a plan of slimqwen.plan/1", advice=advice)


def cuts_only_channels(source: Checkpoint, plan: Plan) -> bool:
    """Return whether a plan takes nothing from a checkpoint but channels of the residual stream.

    Then the networks still compute what they did, of a stream that carries less, and a refit of them fits the calibration
    text more than it makes up for the loss: 2 % less KL on text like it and 7 % more on other text.
    """
    config = source.config
    experts = source.family.sizes(config)[source.family.expert]
    return (
        plan.kept_layers == list(range(config["num_hidden_layers"]))
        and plan.kept.keys() <= {source.family.hidden.name}
        and all(len(groups) == experts for groups in plan.expert_groups.values())
        and plan.target.num_experts_per_tok == config["num_experts_per_tok"]
    )


@makes_file("checkpoint", "statistics", "depth", kind="plan")
def plan(
    checkpoint: Path,
    out: Path,
    *,
    statistics: Path | Statistics,
    target: Target,
    pruning: PruningRecipe = PruningRecipe(),
    depth: Path | MeasuredDepth | None = None,
    stability: bool = False,
) -> Plan:
    """Choose what to keep by the statistics, write it to `out` and return it.

    `depth` is what `measure_depth` found out, needed for `pruning.depth: measured` where layers are dropped.
    `stability` also chooses from each half of the calibration text, and from each source, and measures how far they agree.

    Raises UserError for a target that is larger than the source or contradicts itself, for statistics that were
    measured on another checkpoint, and for source weights that do not name their sources.
    """
    basis_file = out.with_name(f"{out.stem}.basis.safetensors")
    if pruning.width == WidthCriterion.ROTATION:
        check_file_replaceable(basis_file)
    source = Checkpoint(checkpoint)
    measured = _statistics_of(source, statistics)
    target = completed(source.family, target, source.config)
    measured_depth = _measured_depth(source, target, pruning, depth)
    chosen = choose(
        source,
        measured.weighted(pruning.source_weights),
        target,
        pruning,
        folds=measured.folds(pruning.source_weights),
        measured_depth=measured_depth,
    )
    config = target_config(source.family, source.config, target, chosen.kept_layers)
    basis = None
    if chosen.basis is not None:
        basis = BasisFile(file=basis_file.name, fingerprint=chosen.basis.save(basis_file))
    result = Plan(
        checkpoint=measured.checkpoint,
        statistics_data=measured.data,
        sources=measured.sources,
        target=target,
        pruning=pruning,
        kept_layers=chosen.kept_layers,
        kept=chosen.kept,
        basis=basis,
        readers={} if chosen.basis is None else dict(chosen.basis.strengths),
        expert_groups=chosen.expert_groups,
        outliers=chosen.outliers,
        before=count(source.family, source.config),
        after=count(source.family, config),
        scores=chosen.scores,
        stability=measure_stability(source, measured, target, pruning, measured_depth) if stability else None,
    )
    result.save(out)
    for warning in plan_warnings(result):
        warn(warning)
    if note := source.family.serving_note(config):
        warn(f"note: {note}")
    return result


def _statistics_of(source: Checkpoint, statistics: Path | Statistics) -> Statistics:
    """Load the statistics. Raises UserError where they were measured on another checkpoint."""
    measured = statistics if isinstance(statistics, Statistics) else Statistics.load(statistics)
    if measured.checkpoint != source.fingerprint():
        raise UserError(
            f"the statistics were not measured on {source.folder}, or by an earlier version of slimqwen: run `slimqwen calibrate` on "
            "it first."
        )
    return measured


def _measured_depth(
    source: Checkpoint, target: Target, pruning: PruningRecipe, depth: Path | MeasuredDepth | None
) -> MeasuredDepth | None:
    """Return what dropping layers does, where the criterion needs it. Raises UserError where it is not given, or another checkpoint's."""
    if pruning.depth != DepthCriterion.MEASURED or target.num_hidden_layers == source.config["num_hidden_layers"]:
        return None
    if depth is None:
        raise UserError(
            "pruning.depth is measured: run `slimqwen measure-depth` with this target first and give what it writes as --depth, "
            "or set pruning.depth: block_influence."
        )
    measured = depth if isinstance(depth, MeasuredDepth) else MeasuredDepth.load(depth)
    if measured.checkpoint != source.fingerprint():
        raise UserError(
            f"dropping layers was not measured on {source.folder}: run `slimqwen measure-depth` on it first."
        )
    return measured
