"""From a plan to a cut: a plan may have been edited by hand, so whatever it names is looked up before it is used."""

from collections.abc import Iterator
from pathlib import Path

from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.checkpoint.source import TensorSource
from slimqwen.core.errors import UserError, did_you_mean
from slimqwen.families.axes import Axis, axes_of
from slimqwen.families.family import Block, Family, Layout
from slimqwen.planning.plan import Plan
from slimqwen.planning.rotation import Basis
from slimqwen.planning.units import Units
from slimqwen.pruning.cut import Cut
from slimqwen.pruning.residual import Residual


def planned_cut(
    source: TensorSource, plan: Plan, layout: Layout | None = None, residual: Residual | None = None
) -> Cut:
    """Return the cut that a plan describes. Raises UserError where the plan names what the checkpoint does not have.

    residual: `planned_residual`, for weights. An optimiser's moments are cut without: they have no norms to make up
    for, and squares do not follow a rotation, which raises UserError.
    """
    if plan.basis is not None and residual is None:
        raise UserError(
            "the plan rotates the residual stream, and the moments of an optimiser cannot follow: train on without them (in a "
            "recipe distil.optimizer.at_cut: reset)."
        )
    layers = source.config["num_hidden_layers"]
    if not _within(plan.kept_layers, layers):
        raise _misfit(source, f"kept_layers must be different layers from 0 to {layers - 1}, are {plan.kept_layers}")
    problem = next(_wrong_units(source, plan), None) or next(_wrong_groups(source, plan), None)
    if problem:
        raise _misfit(source, problem)
    cut = Cut(
        source, plan.kept_layers, plan.kept, plan.expert_groups, plan.target.num_experts_per_tok, layout, residual
    )
    for field, wanted in plan.target.model_dump(exclude_none=True).items():
        if field not in cut.config or cut.config[field] != wanted:
            left = f"{cut.config[field]}" if field in cut.config else "no such size"
            raise _misfit(source, f"target.{field} is {wanted}, and what is kept leaves {left}")
    return cut


def planned_residual(source: Checkpoint, plan: Plan, file: Path | None) -> Residual | None:
    """Return what the plan in `file` does to the residual stream beyond choosing channels; None where that is nothing.

    Raises UserError where the basis that belongs to it is not beside the file, or is not of its shape.
    """
    hidden = source.config["hidden_size"]
    kept = plan.target.hidden_size or hidden
    if kept == hidden and plan.basis is None:
        return None
    if plan.basis is None:
        return Residual(source, kept, compensate=True, basis=None) if plan.pruning.compensate else None
    assert file is not None, "a plan with a basis is read from its file"
    basis = Basis.load(file, plan.basis.file, plan.basis.fingerprint)
    norms = {
        name
        for block, name in source.family.residual_norms(source.config)
        if block.layer is None or block.layer in plan.kept_layers
    }
    shapes = {tuple(matrix.shape) for matrix in (basis.directions, *basis.readers.values())}
    complete = norms <= basis.scales.keys() and (not basis.readers or norms <= basis.readers.keys())
    if shapes != {(hidden, kept)} or not complete:
        raise _misfit(source, f"its basis must be of shape ({hidden}, {kept}) and have every norm that stays")
    return Residual(source, kept, compensate=plan.pruning.compensate, basis=basis)


def _misfit(source: TensorSource, problem: str) -> UserError:
    return UserError(f"the plan does not fit {source.folder}: {problem}. Make it again with `slimqwen plan`.")


def _within(indices: list[int], size: int) -> bool:
    return bool(indices) and len(set(indices)) == len(indices) and all(0 <= index < size for index in indices)


def _kept_blocks(source: TensorSource, plan: Plan) -> list[Block]:
    blocks = source.family.blocks(source.config)
    return [block for block in blocks if block.layer is None or block.layer in plan.kept_layers]


def _wrong_units(source: TensorSource, plan: Plan) -> Iterator[str]:
    """Yield what is wrong with `kept`: unknown axes and blocks, units that are not there, sets of unequal sizes."""
    sizes = source.family.sizes(source.config)
    axes = {axis.name: axis for axis in sizes if axis != source.family.expert}  # experts go by expert_groups
    for name, units in plan.kept.items():
        if name not in axes:
            yield f"kept names an axis '{name}'{did_you_mean(name, axes)}; known are {', '.join(axes)}"
            return
        axis = axes[name]
        if isinstance(units, dict):
            wanted = {block.name for block in _kept_blocks(source, plan) if _mentions(block, axis)}
            if axis.scope == "model":
                yield f"kept.{name} must be one list for the whole model"
            if units.keys() != wanted:
                yield f"kept.{name} must have the blocks {', '.join(sorted(wanted))}, has {', '.join(sorted(units))}"
        outer = _around(source.family, axis)
        counts = set()
        for where, indices in _index_lists(f"kept.{name}", units, None if outer is None else sizes[outer]):
            if not _within(indices, sizes[axis]):
                yield f"{where} must be different numbers from 0 to {sizes[axis] - 1}"
            counts.add(len(indices))
        if len(counts) > 1:
            yield f"kept.{name} keeps {min(counts)} units in one place and {max(counts)} in another; a config has one size"


def _index_lists(where: str, units: Units, outer_units: int | None) -> Iterator[tuple[str, list[int]]]:
    """Yield every list of indices, with a name to tell it by; an impossible one (empty) where the nesting is wrong."""
    if not isinstance(units, dict):
        yield where, units
        return
    for block, lists in units.items():
        inner = [indices for indices in lists if isinstance(indices, list)]
        if not inner:
            yield f"{where} of {block}", [index for index in lists if isinstance(index, int)]
        elif len(inner) != outer_units:
            yield f"{where} of {block} (one list for each of {outer_units} units)", []
        else:
            yield from ((f"{where} of {block}, list {i},", indices) for i, indices in enumerate(inner))


def _mentions(block: Block, axis: Axis) -> bool:
    tables = [*block.tables.values(), *([block.experts.per_expert] if block.experts else [])]
    return any(axis in axes_of(term) for table in tables for dims in table.values() for term in dims)


def _around(family: Family, axis: Axis) -> Axis | None:
    """Return the axis each unit of which may keep units of this one of its own: experts of neurons, KV heads of query heads."""
    if axis.scope == "expert":
        return family.expert
    return next((axes[-2] for axes in family.fields.values() if len(axes) > 1 and axes[-1] == axis), None)


def _wrong_groups(source: TensorSource, plan: Plan) -> Iterator[str]:
    """Yield what is wrong with `expert_groups`: blocks too many or too few, experts that are not there, unequal numbers."""
    experts = source.family.sizes(source.config)[source.family.expert]
    wanted = {block.name for block in _kept_blocks(source, plan) if block.experts}
    if plan.expert_groups.keys() != wanted:
        yield f"expert_groups must have the blocks {', '.join(sorted(wanted))}, has {', '.join(sorted(plan.expert_groups))}"
    for block, groups in plan.expert_groups.items():
        if len(groups) != plan.target.num_experts:
            yield f"expert_groups of {block} make {len(groups)} experts, target.num_experts is {plan.target.num_experts}"
        if not all(_within(group.members, experts) for group in groups):
            yield f"expert_groups of {block} name experts beyond {experts - 1}"
    top_k = plan.target.num_experts_per_tok or 0
    if not 1 <= top_k <= (plan.target.num_experts or 0):
        yield f"target.num_experts_per_tok is {top_k}, target.num_experts {plan.target.num_experts}"
