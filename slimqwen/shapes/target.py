"""Targets: the sizes that can be cut, and the config of the cut model."""

from slimqwen.core.errors import UserError
from slimqwen.families import Config, Family
from slimqwen.families.axes import Axis
from slimqwen.recipe import Target

UNITS_OF_NO_AXIS = ("num_hidden_layers", "num_experts_per_tok")


def shape_of(family: Family, config: Config) -> Target:
    """Return a model's current sizes that can be cut; those that its family lacks are None."""
    known = {*UNITS_OF_NO_AXIS, *family.fields}
    return Target(**{field: config[field] for field in Target.model_fields if field in known})


def completed(family: Family, target: Target, config: Config) -> Target:
    """Complete `target` with the source's sizes.

    Where it has only the outer of two nested sizes (KV heads, but not query heads), the inner one keeps its ratio.
    Raises UserError for sizes above the source's, and for sizes that this family does not have.
    """
    source = shape_of(family, config)
    wanted = target.model_dump(exclude_none=True)
    in_use = family.axes_in_use(config)
    for field, value in wanted.items():
        if field in UNITS_OF_NO_AXIS or (field in family.fields and value == config[field]):
            continue
        if field not in family.fields or family.fields[field][-1] not in in_use:
            raise UserError(f"the target names {field}, which no layer of this {family.model_type} has: leave it out.")
    full = source.model_copy(update=wanted)
    sizes = target_sizes(family, config, full.model_copy(update=_left_to_ratio(family, wanted)))
    inner = {field: _product(sizes, axes) for field, axes in family.fields.items() if field in Target.model_fields}
    full = full.model_copy(update=inner)
    check_target(source, full)
    for axis, size in family.sizes(config).items():
        if sizes[axis] > size:  # an outer unit would need more than it has: 4 value heads of a key head that has 2
            raise UserError(
                f"the target has {sizes[axis]} {axis.name}s per unit of the outer axis, the source {size}: "
                "cut the inner heads along with the outer ones, or give only the outer size."
            )
    return full


def check_target(source: Target, target: Target) -> None:
    """Raise one `UserError` with every reason why `target` cannot be cut out of `source`."""
    wanted, available = target.model_dump(exclude_none=True), source.model_dump(exclude_none=True)
    problems = [
        f"{field} {wanted[field]} is more than the source's {available[field]}"
        for field in wanted
        if wanted[field] > available[field]
    ]
    experts, top_k = wanted["num_experts"], wanted["num_experts_per_tok"]
    if experts < top_k:
        problems.append(f"num_experts {experts} is less than num_experts_per_tok {top_k}")
    if problems:
        raise UserError(f"the target can't be cut out of the source, change target: {'; '.join(problems)}.")


def target_sizes(family: Family, config: Config, target: Target) -> dict[Axis, int]:
    """Return the size of every axis after a cut to `target`; an axis whose field is None keeps its size.

    Raises UserError where a size is not a multiple of the axes around it (query heads of KV heads, say).
    """
    sizes = family.sizes(config)
    wanted = target.model_dump(exclude_none=True)
    for field, (*outer, axis) in family.fields.items():
        if field in wanted:
            units = _product(sizes, outer)
            if wanted[field] % units:
                raise UserError(
                    f"target: {field} {wanted[field]} is not a multiple of {units}, the number of {outer[-1].name}s."
                )
            sizes[axis] = wanted[field] // units
    return sizes


def target_config(family: Family, config: Config, target: Target, layers: list[int] | None = None) -> Config:
    """Return the config of a model cut to a completed target, which keeps `layers`, by default the first ones."""
    layers = list(range(size_of(target.num_hidden_layers))) if layers is None else layers
    sizes = target_sizes(family, config, target)
    return family.resized(config, sizes, layers, size_of(target.num_experts_per_tok))


def size_of(value: int | None) -> int:
    """Return a size of a completed target, which is never None."""
    assert value is not None, "the target must be completed first"
    return value


def _left_to_ratio(family: Family, wanted: dict[str, int]) -> dict[str, None]:
    """Return the inner fields of nested axes that the target does not give, as None, so that their axes keep their size."""
    nested = [field for field, axes in family.fields.items() if len(axes) > 1 and field in Target.model_fields]
    return {field: None for field in nested if field not in wanted}


def _product(sizes: dict[Axis, int], axes: list[Axis] | tuple[Axis, ...]) -> int:
    total = 1
    for axis in axes:
        total *= sizes[axis]
    return total
